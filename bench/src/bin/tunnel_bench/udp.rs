//! The highest rate of datagrams that arrives whole.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use rvpn_lab::Ns;

use crate::Way;

/// IPv4 and UDP headers.
const HEADERS: usize = 28;
/// So much of a trial may be lost.
const LOSS: f64 = 0.001;
/// A queue that needs longer to drain was growing.
const STANDING: Duration = Duration::from_millis(10);
const TRIALS: u32 = 10;
/// Where the search begins, and below which nothing is worth knowing.
const FIRST: f64 = 40_000.0;
const LEAST: f64 = 500.0;
/// The receiver is never what loses them.
const BUFFER: usize = 64 << 20;

/// One trial's outcome.
struct Trial {
    /// Datagrams a second that were sent.
    rate: f64,
    whole: bool,
}

/// Packets a second between a client and the far side, `size` bytes each with
/// their headers. `None` when nothing gets through at all.
pub(crate) fn lossless(
    client: &Ns,
    far: &Ns,
    at: SocketAddr,
    way: Way,
    size: usize,
    trial: Duration,
) -> Option<f64> {
    let (near, far) = meet(client, far, at)?;
    for socket in [&near, &far] {
        setsockopt(socket, sockopt::RcvBufForce, &BUFFER).ok()?;
    }
    let (from, to) = match way {
        Way::Up => (near, far),
        Way::Down => (far, near),
    };
    let counter = Counter::default();
    std::thread::scope(|scope| {
        scope.spawn(|| counter.run(&to));
        let best = search(|rate| {
            let payload = vec![0; size.saturating_sub(HEADERS).max(8)];
            attempt(&from, payload, rate, trial, &counter)
        });
        counter.stop.store(true, Relaxed);
        best
    })
}

/// A flow that both sides know the other end of.
fn meet(client: &Ns, far: &Ns, at: SocketAddr) -> Option<(UdpSocket, UdpSocket)> {
    let there = far.run(|| UdpSocket::bind(at)).ok()?;
    let here = client
        .run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(at)?;
            Ok::<_, std::io::Error>(socket)
        })
        .ok()?;
    let short = Some(Duration::from_millis(20));
    there.set_read_timeout(short).ok()?;
    here.set_read_timeout(short).ok()?;
    for _ in 0..100 {
        here.send(&[0; 8]).ok()?;
        if let Ok((_, from)) = there.recv_from(&mut [0; 64]) {
            there.connect(from).ok()?;
            return Some((here, there));
        }
    }
    None
}

/// Doubles until it fails, then closes in.
fn search(mut attempt: impl FnMut(f64) -> Trial) -> Option<f64> {
    let (mut low, mut high, mut rate) = (0.0_f64, None::<f64>, FIRST);
    for _ in 0..TRIALS {
        let mut trial = attempt(rate);
        if !trial.whole {
            // A hiccup of the machine is not the tunnel's.
            trial = attempt(rate);
        }
        if trial.whole {
            low = low.max(trial.rate);
            if trial.rate < rate * 0.9 {
                // The sender has no more to give.
                break;
            }
        } else {
            high = Some(trial.rate.min(rate));
        }
        rate = match high {
            None => rate * 2.0,
            Some(_) if low == 0.0 => rate / 4.0,
            Some(high) if (high - low) < high * 0.08 => break,
            Some(high) => f64::midpoint(low, high),
        };
        if rate < LEAST {
            break;
        }
    }
    (low > 0.0).then_some(low)
}

fn attempt(
    from: &UdpSocket,
    mut payload: Vec<u8>,
    rate: f64,
    limit: Duration,
    counter: &Counter,
) -> Trial {
    let id = counter.begin();
    payload[..8].copy_from_slice(&id.to_ne_bytes());
    let (start, mut sent) = (Instant::now(), 0_u64);
    while start.elapsed() < limit {
        let due = (start.elapsed().as_secs_f64() * rate) as u64;
        // In the order of a network card's own bursts.
        let burst = due.saturating_sub(sent).min(64);
        for _ in 0..burst {
            // What cannot be sent is lost as well.
            let _ = from.send(&payload);
        }
        sent += burst;
        if sent >= due {
            std::thread::sleep(Duration::from_micros(40));
        }
    }
    let took = start.elapsed();
    let (mut seen, mut since) = (counter.seen.load(Relaxed), Instant::now());
    while seen < sent && since.elapsed() < STANDING * 3 {
        std::thread::sleep(Duration::from_micros(500));
        let now = counter.seen.load(Relaxed);
        if now > seen {
            (seen, since) = (now, Instant::now());
        }
    }
    let last = Duration::from_nanos(counter.last.load(Relaxed));
    let drained = (counter.epoch + last).saturating_duration_since(start + took);
    Trial {
        rate: sent as f64 / took.as_secs_f64(),
        whole: seen as f64 >= sent as f64 * (1.0 - LOSS) && drained <= STANDING,
    }
}

/// Counts what arrives of the present trial.
struct Counter {
    epoch: Instant,
    id: AtomicU64,
    seen: AtomicU64,
    /// When the last one came, in nanoseconds since the epoch.
    last: AtomicU64,
    stop: AtomicBool,
}

impl Default for Counter {
    fn default() -> Counter {
        Counter {
            epoch: Instant::now(),
            id: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            last: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }
}

impl Counter {
    fn begin(&self) -> u64 {
        let id = self.id.fetch_add(1, Relaxed) + 1;
        self.seen.store(0, Relaxed);
        id
    }

    fn run(&self, socket: &UdpSocket) {
        let mut buffer = [0; 2048];
        while !self.stop.load(Relaxed) {
            let Ok(n @ 8..) = socket.recv(&mut buffer) else {
                continue;
            };
            let id = buffer[..n].first_chunk().map(|b| u64::from_ne_bytes(*b));
            if id == Some(self.id.load(Relaxed)) {
                let now = self.epoch.elapsed().as_nanos();
                self.last.store(now as u64, Relaxed);
                self.seen.fetch_add(1, Relaxed);
            }
        }
    }
}
