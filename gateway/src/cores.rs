//! One single-threaded runtime per core for the data plane.
//!
//! A session lives its whole life on one of them, with its socket and its TUN.
//! Nothing of a client is shared between threads but the device itself, while
//! bare acknowledgements are written by a second one. Login, the admin API and
//! the store run elsewhere and cannot delay a packet.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread::{JoinHandle, available_parallelism};

use rvpn_acks::Writer;
use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;
use tracing::warn;

/// Rates closer together than this count as equal when a core is chosen.
const RATE_STEP: u64 = 1 << 20;

/// Bytes a second from which on a core counts as busy when it is asked whether
/// there are processors to spare.
const BUSY: u64 = 64 << 20;

/// After so many polls of sessions the kernel is asked what else is ready. A busy
/// session is always ready for another turn; at tokio's interval of 61 a device
/// or socket that had become ready meanwhile would wait for all of those, tens of
/// milliseconds, where asking costs less than a microsecond.
const EVENT_INTERVAL: u32 = 2;

/// Number of a data core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CoreId(usize);

/// What a session tells its core about the work it makes.
#[derive(Debug, Default)]
pub struct Load {
    sessions: AtomicUsize,
    bytes: AtomicU64,
    seen: AtomicU64,
    rate: AtomicU64,
    /// Writes acknowledgements for those that have much to do.
    acks: Option<Writer>,
    /// The cores are so busy that it would take from one what it gives to another.
    crowded: AtomicBool,
}

impl Load {
    /// Adds the bytes of one turn. Only the core's own thread calls this.
    pub fn add(&self, bytes: u64) {
        self.bytes.store(self.bytes.load(Relaxed) + bytes, Relaxed);
    }

    /// Who writes acknowledgements for a session of this core that has much to
    /// do, if there is a processor for it.
    pub fn acks(&self) -> Option<&Writer> {
        self.acks.as_ref().filter(|_| !self.crowded.load(Relaxed))
    }
}

/// A session's place on a core; leaving it is dropping it.
#[derive(Debug)]
pub struct Seat {
    core: CoreId,
    load: Arc<Load>,
}

impl Seat {
    /// Where.
    pub fn core(&self) -> CoreId {
        self.core
    }

    /// The core's account of its work.
    pub fn load(&self) -> &Load {
        &self.load
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.load.sessions.fetch_sub(1, Relaxed);
    }
}

struct Core {
    runtime: Handle,
    load: Arc<Load>,
    thread: Option<JoinHandle<()>>,
}

/// All data cores of the process. Dropping them ends their tasks.
pub struct Cores {
    cores: Vec<Core>,
    stop: watch::Sender<bool>,
}

impl Cores {
    /// Starts `count` threads, each kept on a CPU of its own if `pin` is set.
    pub fn start(count: usize, pin: bool) -> io::Result<Cores> {
        let (stop, stopped) = watch::channel(false);
        let mut cores = Cores {
            cores: Vec::with_capacity(count),
            stop,
        };
        // On a single processor all work is in the way of all other.
        let spare = count > 1 && available_parallelism().is_ok_and(|n| n.get() > 1);
        for n in 0..count.max(1) {
            let runtime = Builder::new_current_thread()
                .enable_all()
                .event_interval(EVENT_INTERVAL)
                .build()?;
            let handle = runtime.handle().clone();
            let mut stopped = stopped.clone();
            let thread = std::thread::Builder::new()
                .name(format!("rvpn-data-{n}"))
                .spawn(move || {
                    if pin {
                        pin_to(n);
                    }
                    // An error means that the sender is gone, which is also a stop.
                    runtime.block_on(async { drop(stopped.wait_for(|s| *s).await) });
                })?;
            let acks = spare.then(|| Writer::start(&format!("rvpn-acks-{n}")));
            let acks = acks.and_then(|started| {
                let without = "acknowledgements are written with the rest: no thread for them";
                started.inspect_err(|error| warn!(%error, without)).ok()
            });
            cores.cores.push(Core {
                runtime: handle,
                load: Arc::new(Load {
                    acks,
                    ..Load::default()
                }),
                thread: Some(thread),
            });
        }
        Ok(cores)
    }

    /// Takes a seat on the core with the least traffic in the last second,
    /// among equals the one with the fewest sessions.
    pub fn least_loaded(&self) -> Seat {
        let mut best = 0;
        let weigh = |n: usize| {
            let load = &self.cores[n].load;
            (
                load.rate.load(Relaxed) / RATE_STEP,
                load.sessions.load(Relaxed),
            )
        };
        for n in 1..self.cores.len() {
            if weigh(n) < weigh(best) {
                best = n;
            }
        }
        self.seat(CoreId(best))
    }

    /// Takes a seat on a given core: where the rest of a client already is.
    pub fn seat(&self, core: CoreId) -> Seat {
        let load = Arc::clone(&self.cores[core.0].load);
        load.sessions.fetch_add(1, Relaxed);
        Seat { core, load }
    }

    /// Runs a task on the core of a seat.
    pub fn spawn<F>(&self, core: CoreId, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.cores[core.0].runtime.spawn(task);
    }

    /// Takes the measure that [`Cores::least_loaded`] goes by. Called once a second.
    pub fn measure(&self) {
        for core in &self.cores {
            let bytes = core.load.bytes.load(Relaxed);
            let before = core.load.seen.swap(bytes, Relaxed);
            core.load.rate.store(bytes.saturating_sub(before), Relaxed);
        }
        let busy = |core: &&Core| core.load.rate.load(Relaxed) >= BUSY;
        let crowded = self.cores.iter().filter(busy).count() * 2 > self.cores.len();
        for core in &self.cores {
            core.load.crowded.store(crowded, Relaxed);
        }
    }

    /// Bytes that all of them moved in the last second, as of the last measure.
    pub fn rate(&self) -> u64 {
        let rates = self.cores.iter().map(|core| core.load.rate.load(Relaxed));
        rates.sum()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.cores.len()
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        let here = std::thread::current().id();
        for core in &mut self.cores {
            // A data thread may be the one that drops us; it cannot wait for itself.
            if let Some(thread) = core.thread.take()
                && thread.thread().id() != here
                && thread.join().is_err()
            {
                warn!("a data core ended by a panic");
            }
        }
    }
}

fn pin_to(n: usize) {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;
    let this = Pid::from_raw(0);
    let pinned = sched_getaffinity(this).and_then(|allowed| {
        let usable: Vec<_> = (0..CpuSet::count())
            .filter(|&cpu| allowed.is_set(cpu).unwrap_or(false))
            .collect();
        let mut one = CpuSet::new();
        one.set(usable[n % usable.len().max(1)])?;
        sched_setaffinity(this, &one)
    });
    if let Err(error) = pinned {
        warn!(%error, "cannot keep a data thread on one CPU; the scheduler places it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn new_sessions_go_where_the_least_is_done() {
        let cores = Cores::start(3, false).unwrap();
        let a = cores.least_loaded();
        let b = cores.least_loaded();
        let c = cores.least_loaded();
        let mut taken = [a.core(), b.core(), c.core()];
        taken.sort();
        assert_eq!(taken, [CoreId(0), CoreId(1), CoreId(2)]);

        a.load().add(64 * RATE_STEP);
        b.load().add(2 * RATE_STEP);
        cores.measure();
        assert_eq!(cores.least_loaded().core(), c.core());
        // An idle second later only the number of sessions counts.
        cores.measure();
        drop(a);
        assert_eq!(cores.least_loaded().core(), CoreId(0));
    }

    #[test]
    fn acknowledgements_are_written_elsewhere_while_half_of_the_cores_are_idle() {
        let cores = Cores::start(4, false).unwrap();
        let seats: Vec<_> = (0..4).map(|n| cores.seat(CoreId(n))).collect();
        for (busy, beside) in [(1, true), (2, true), (3, false), (4, false), (2, true)] {
            for seat in &seats[..busy] {
                seat.load().add(BUSY);
            }
            cores.measure();
            for seat in &seats {
                assert_eq!(seat.load().acks().is_some(), beside, "{busy} busy");
            }
        }
        let alone = Cores::start(1, false).unwrap();
        assert!(alone.least_loaded().load().acks().is_none());
    }

    #[test]
    fn a_task_may_hold_the_last_reference_to_its_own_core() {
        let cores = Arc::new(Cores::start(2, false).unwrap());
        let held = Arc::clone(&cores);
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (tx, rx) = mpsc::channel();
        cores.spawn(CoreId(0), async move {
            wait.await.unwrap();
            drop(held);
            tx.send(()).unwrap();
        });
        drop(cores);
        go.send(()).unwrap();
        rx.recv_timeout(Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn tasks_of_one_core_share_its_thread() {
        let cores = Cores::start(2, true).unwrap();
        let (tx, rx) = mpsc::channel();
        for core in [0, 1, 0, 1] {
            let tx = tx.clone();
            cores.spawn(CoreId(core), async move {
                tx.send((core, std::thread::current().id())).unwrap();
            });
        }
        let mut ids = [const { Vec::new() }; 2];
        for _ in 0..4 {
            let (core, id) = rx.recv_timeout(Duration::from_secs(5)).unwrap();
            ids[core].push(id);
        }
        assert_eq!(ids[0][0], ids[0][1]);
        assert_eq!(ids[1][0], ids[1][1]);
        assert_ne!(ids[0][0], ids[1][0]);
    }
}
