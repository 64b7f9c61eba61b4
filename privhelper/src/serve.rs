//! The serving loop: one thread, one poll, never a blocking send.

mod events;
mod leases;
mod peers;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::SockProtocol::{NetlinkNetFilter, NetlinkRoute};
use rvpn_ipc::{Reply, Slot, Status};

use crate::apply::{self, Survey};
use crate::cleaner::Cleaner;
use crate::config::Config;
use crate::confine;
use crate::kernel::netlink::Socket;
use crate::kernel::{Kernel, conntrack, link, ruleset};
use crate::notify::Notify;
use crate::plan::{Device, MARK_SLOT_MASK};
use crate::pool::{Pool, State};

/// The table is compared this often, whatever the notifications say.
const VERIFY: Duration = Duration::from_secs(4);
/// Time for a gateway to claim its leases after the helper restarted, whatever the linger time.
const CLAIM: Duration = Duration::from_secs(10);
/// What failed is tried again after this long.
const RETRY: Duration = Duration::from_secs(1);
/// How often a held lease's device is tried while its holder has time to let go.
const PENDING_TICK: Duration = Duration::from_millis(5);

/// What is done at its time, and again later when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    /// Compare the table.
    Verify,
    /// Put the table back.
    Restore,
    /// Look at the doubted slots.
    Look,
    /// Find out where client traffic leaves.
    Uplinks,
    Clean(Slot),
    Watchdog(Duration),
}

/// Everything the loop owns.
struct Server {
    config: Arc<Config>,
    kernel: Kernel,
    pool: Pool,
    cleaner: Cleaner,
    notify: Notify,
    listener: OwnedFd,
    signals: SignalFd,
    links: Socket,
    tables: Socket,
    uplinks: Vec<u32>,
    /// How many the table has.
    rules: usize,
    peers: peers::Peers,
    pending: Vec<leases::Pending>,
    tasks: Vec<(Instant, Task)>,
    /// Slots that may not be as they should.
    doubted: BTreeSet<Slot>,
}

/// Builds the pool from what is there and what is missing, confines the process, and serves.
pub(crate) fn run(config: Arc<Config>, listener: OwnedFd, notify: Notify) -> io::Result<()> {
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut kernel = Kernel::open(&config)?;
    let mut links = Socket::open(NetlinkRoute, events::LINK_GROUPS)?;
    let mut tables = Socket::open(NetlinkNetFilter, events::TABLE_GROUPS)?;
    let uplinks = apply::uplinks(&mut kernel)?;
    let (pool, rules) = adopt(&mut kernel, &uplinks)?;
    confine::files(&config)?;
    let cleaner = Cleaner::start(&config)?;
    confine::calls()?;
    confine::prove()?;
    // What was noticed until now is our own doing; whatever else happened shows in a look at all of it.
    links.drain(|_| {});
    tables.drain(|_| {});
    let mut server = Server {
        kernel,
        cleaner,
        notify,
        listener,
        signals,
        links,
        tables,
        uplinks,
        rules,
        peers: peers::Peers::of(config.gateway.uid),
        config,
        pending: Vec::new(),
        tasks: Vec::new(),
        doubted: (0..pool.len()).collect(),
        pool,
    };
    let watchdog = server.notify.watchdog.map(Task::Watchdog);
    let first = [Task::Verify, Task::Look, Task::Uplinks];
    for task in first.into_iter().chain(watchdog) {
        server.after(Duration::ZERO, task);
    }
    for slot in 0..server.pool.len() {
        if server.pool.entries[slot as usize].state == State::Cleaning {
            server.clean(slot);
        }
    }
    let (c, slots) = (server.pool.counts(), server.pool.len());
    let (path, old) = (server.config.socket.display(), c.lingering);
    let counts = format!("{} free, {old} with a lease from before", c.free);
    say!(notice: "serving {slots} slots on {path}: {counts}, {} being cleaned", c.cleaning);
    server.notify.say("READY=1\nSTATUS=serving");
    server.serve()
}

/// Takes over devices of ours, makes the missing ones, and installs the rules with live leases in them.
pub(crate) fn adopt(k: &mut Kernel, uplinks: &[u32]) -> io::Result<(Pool, usize)> {
    let Survey { ours, foreign, .. } = apply::survey(k, None)?;
    if let Some(name) = foreign.first() {
        return Err(apply::foreign(name));
    }
    let until = Instant::now() + k.config.linger.max(CLAIM);
    let (mut pool, mut missing, mut keys) = (Pool::default(), Vec::new(), BTreeSet::new());
    let last = ours.last().map_or(0, |d| d.0.slot + 1);
    let mut found = ours.into_iter().peekable();
    // Slots are numbered without gaps: a device that went missing among others is made again.
    for slot in 0..last.max(k.config.slots) {
        if let Some((device, sound)) = found.next_if(|d| d.0.slot == slot) {
            let only = device.lease.is_none_or(|l| keys.insert(l.key));
            pool.add(device, sound && only, until);
        } else {
            let device = Device::new(slot);
            if slot < last {
                conntrack::flush(k, device.mark(), MARK_SLOT_MASK)?;
            }
            pool.add(device, false, until);
            missing.push(device);
        }
    }
    let rules = ruleset::ensure(k, uplinks, &pool.live())?;
    link::any_ip(k, true)?;
    apply::open_uplinks(k, uplinks)?;
    let made = apply::create(k, &missing)?;
    made.into_iter().for_each(|device| pool.cleaned(device));
    Ok((pool, rules))
}

impl Server {
    /// Puts the task on the list; one that is on it already is done at the earlier time.
    fn after(&mut self, wait: Duration, task: Task) {
        let mut at = Instant::now() + wait;
        self.tasks.retain(|(earlier, other)| {
            let same = *other == task;
            at = if same { at.min(*earlier) } else { at };
            !same
        });
        self.tasks.push((at, task));
    }

    fn run_tasks(&mut self, now: Instant) {
        let due: Vec<_> = self.tasks.extract_if(.., |t| t.0 <= now).collect();
        for (_, task) in due {
            if let Err(e) = self.run(task) {
                say!(error: "{task:?} could not be done, trying again: {e}");
                self.after(RETRY, task);
            }
        }
    }

    fn run(&mut self, task: Task) -> io::Result<()> {
        match task {
            Task::Verify => {
                self.after(VERIFY, task);
                if ruleset::rules_present(&mut self.kernel)? != self.rules {
                    self.after(Duration::ZERO, Task::Restore);
                }
            }
            Task::Restore => self.restore_rules()?,
            Task::Look => self.look()?,
            Task::Uplinks => self.follow_uplinks()?,
            Task::Clean(slot) => self.clean(slot),
            Task::Watchdog(interval) => {
                self.notify.say("WATCHDOG=1");
                self.after(interval, task);
            }
        }
        Ok(())
    }

    /// Hands a slot the pool has for cleaning to the cleaner, which lives as long as we do.
    fn clean(&mut self, slot: Slot) {
        let device = self.pool.get(slot).map(|e| e.device);
        let _ = device.map(|device| self.cleaner.jobs.send(device));
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            self.timers(now);
            let ready = self.wait(now)?;
            if ready[0] {
                return self.stop();
            }
            if ready[1] {
                self.cleaner_reports();
            }
            if ready[2] {
                self.read_links();
            }
            if ready[3] {
                self.read_tables();
            }
            // Doubts are settled before anybody is served.
            self.run_tasks(Instant::now());
            if ready[4] {
                self.peers.accept(self.listener.as_fd());
            }
            self.serve_peers(&ready[5..]);
        }
    }

    /// Waits for the next thing to do; true where something is to be read.
    fn wait(&self, now: Instant) -> io::Result<Vec<bool>> {
        let deadlines = [
            self.pool.next_deadline(),
            self.peers.next_deadline(),
            (!self.pending.is_empty()).then(|| now + PENDING_TICK),
            self.tasks.iter().map(|t| t.0).min(),
        ];
        let next = deadlines.into_iter().flatten().min().unwrap_or(now);
        // One millisecond late rather than a turn too early.
        let wait = next.saturating_duration_since(now) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let fds = [
            self.signals.as_fd(),
            self.cleaner.wake.as_fd(),
            self.links.fd.as_fd(),
            self.tables.fd.as_fd(),
            self.listener.as_fd(),
        ];
        let fds = fds.into_iter().chain(self.peers.fds());
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(fds.iter().map(|f| f.any().unwrap_or(false)).collect())
    }

    fn timers(&mut self, now: Instant) {
        for slot in self.pool.expire(now) {
            self.clean(slot);
        }
        self.retry_pending(now);
        // What closed connections held lingers.
        for id in self.peers.bury(now) {
            self.pending.retain(|p| p.holder != id);
            self.pool.holder_gone(id, now + self.config.linger);
        }
        self.run_tasks(now);
        // A slot of a growing pool is one whose device is to be cleaned, and is not there yet.
        let wanted = self.pool.wanted(self.config.grow, self.config.max_slots);
        for slot in self.pool.len()..self.pool.len() + wanted {
            self.pool.add(Device::new(slot), false, now);
            self.clean(slot);
        }
    }

    fn cleaner_reports(&mut self) {
        let _ = self.cleaner.wake.read();
        while let Ok((was, result)) = self.cleaner.done.try_recv() {
            match result {
                Ok(device) => self.pool.cleaned(device),
                Err(e) => {
                    say!(error: "{} stays out of use, trying again: {e}", was.name());
                    // Nobody misses a device that was never there as much as one that was.
                    let wait = if was.index == 0 { 5 * RETRY } else { RETRY };
                    self.after(wait, Task::Clean(was.slot));
                }
            }
        }
    }

    /// Leaves devices, leases and rules for the next start.
    fn stop(&mut self) -> io::Result<()> {
        self.notify.say("STOPPING=1");
        self.peers.tell_all(&Reply::notice(Status::Closing, 0, 0));
        say!(notice: "stopped; devices and leases stay for the next start");
        Ok(())
    }
}
