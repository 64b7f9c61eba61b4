//! The serving loop: one thread, one poll, never a blocking send.

mod events;
mod leases;
mod peers;

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
use crate::cleaner::{Cleaner, Done, Job};
use crate::config::Config;
use crate::confine::{self, landlock};
use crate::kernel::netlink::Socket;
use crate::kernel::{Kernel, host, tun};
use crate::notify::Notify;
use crate::plan::Tag;
use crate::pool::Pool;

/// The table is compared this often, whatever the notifications say.
const VERIFY: Duration = Duration::from_secs(4);
/// Time for a gateway to claim its leases after the helper restarted, whatever the linger time.
const CLAIM: Duration = Duration::from_secs(10);
/// What failed is tried again after this long.
const RETRY: Duration = Duration::from_secs(1);
/// How often a held lease's device is tried while its holder has time to let go.
const PENDING_TICK: Duration = Duration::from_millis(5);

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
    rules: usize,
    peers: peers::Peers,
    pending: Vec<leases::Pending>,
    growing: bool,
    next_verify: Instant,
    next_watchdog: Instant,
    /// What to try again and when: to clean a slot, or to grow.
    retries: Vec<(Instant, Option<Slot>)>,
    doubts: events::Doubts,
}

/// Builds the pool from what is there and what is missing, confines the process, and serves.
pub(crate) fn run(config: Arc<Config>, listener: OwnedFd, notify: Notify) -> io::Result<()> {
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut kernel = Kernel::open(&config)?;
    let links = Socket::open(NetlinkRoute, events::LINK_GROUPS)?;
    let tables = Socket::open(NetlinkNetFilter, events::TABLE_GROUPS)?;
    let uplinks = host::uplinks(&mut kernel)?;
    if uplinks.is_empty() {
        say!(warning: "no uplink: there is no default route; clients reach nothing until then");
    }
    let (pool, rules) = adopt(&mut kernel, &uplinks)?;
    if !landlock::confine(&[
        (tun::DEVICE.as_ref(), landlock::CHANGE),
        ("/proc/sys/net".as_ref(), landlock::CHANGE),
        ("/proc".as_ref(), landlock::READ),
        (&config.state, landlock::KEEP),
    ])? {
        say!(warning: "this kernel has no Landlock: files are guarded by ownership alone");
    }
    let cleaner = Cleaner::start(&config)?;
    confine::seccomp::apply()?;
    confine::prove()?;
    let now = Instant::now();
    let mut server = Server {
        kernel,
        pool,
        cleaner,
        notify,
        listener,
        signals,
        links,
        tables,
        uplinks,
        rules,
        peers: peers::Peers::new(config.gateway.uid),
        config,
        pending: Vec::new(),
        growing: false,
        next_verify: now + VERIFY,
        next_watchdog: now,
        retries: Vec::new(),
        doubts: events::Doubts::default(),
    };
    for slot in server.pool.cleaning() {
        server.clean(slot)?;
    }
    server.start_watching();
    let (c, slots) = (server.pool.counts(), server.pool.len());
    let (path, old) = (server.config.socket.display(), c.lingering);
    let counts = format!("{} free, {old} with a lease from before", c.free);
    say!(notice: "serving {slots} slots on {path}: {counts}, {} being cleaned", c.cleaning);
    server.notify.say("READY=1\nSTATUS=serving");
    server.serve()
}

/// Takes over devices of ours, makes the missing ones, and installs the rules with live leases in them.
pub(crate) fn adopt(k: &mut Kernel, uplinks: &[u32]) -> io::Result<(Pool, usize)> {
    let Survey { ours, foreign, .. } = apply::survey(k)?;
    if let Some(name) = foreign.first() {
        return Err(apply::foreign(name));
    }
    let until = Instant::now() + k.config.linger.max(CLAIM);
    let (mut pool, mut missing) = (Pool::default(), Vec::new());
    let last = ours.last().map_or(0, |d| d.slot + 1);
    let mut found = ours.into_iter().peekable();
    // Slots are numbered without gaps: a device that went missing among others is made again.
    for slot in 0..last.max(k.config.slots) {
        if let Some(d) = found.next_if(|d| d.slot == slot) {
            pool.add(d.index, d.tag, d.sound, until);
        } else {
            missing.push((slot, Tag::NEW));
            pool.add(0, Tag::NEW, true, until);
        }
    }
    let rules = apply::base(k, uplinks, &pool.live())?;
    for (slot, index) in apply::create(k, &missing)? {
        pool.set_index(slot, index);
    }
    Ok((pool, rules))
}

impl Server {
    /// Hands a slot the pool has for cleaning to the cleaner.
    fn clean(&mut self, slot: Slot) -> io::Result<()> {
        let (index, former) = (self.pool.index(slot), self.pool.former(slot));
        self.cleaner.submit(Job::Clean(slot, index, former))
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            self.timers(now)?;
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
            self.settle_doubts();
            if ready[4] {
                self.peers.accept(self.listener.as_fd(), Instant::now());
            }
            self.serve_peers(&ready[5..])?;
        }
    }

    /// Waits for the next thing to do; true where something is to be read or written.
    fn wait(&self, now: Instant) -> io::Result<Vec<bool>> {
        let deadlines = [
            self.pool.next_deadline(),
            self.peers.next_deadline(),
            (!self.pending.is_empty()).then(|| now + PENDING_TICK),
            self.retries.iter().map(|r| r.0).min(),
            self.doubts.next_deadline(),
            self.notify.watchdog.map(|_| self.next_watchdog),
        ];
        let deadlines = deadlines.into_iter().flatten();
        let next = deadlines.fold(self.next_verify, Instant::min);
        // One millisecond late rather than a turn too early.
        let wait = next.saturating_duration_since(now) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let inputs = [
            self.signals.as_fd(),
            self.cleaner.wake.as_fd(),
            self.links.fd.as_fd(),
            self.tables.fd.as_fd(),
            self.listener.as_fd(),
        ];
        let mut fds = inputs.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).to_vec();
        self.peers.poll_fds(&mut fds);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(fds.iter().map(|f| f.any().unwrap_or(false)).collect())
    }

    fn timers(&mut self, now: Instant) -> io::Result<()> {
        for slot in self.pool.expire(now) {
            self.clean(slot)?;
        }
        self.retry_pending(now)?;
        self.peers.expire(now);
        self.bury_peers();
        let due: Vec<_> = self.retries.extract_if(.., |r| r.0 <= now).collect();
        for (_, what) in due {
            match what {
                Some(slot) => self.clean(slot)?,
                None => self.growing = false,
            }
        }
        if now >= self.next_verify {
            self.next_verify = now + VERIFY;
            self.doubts.rules = true;
            self.settle_doubts();
        }
        let watchdog = self.notify.watchdog.filter(|_| now >= self.next_watchdog);
        if let Some(interval) = watchdog {
            self.next_watchdog = now + interval;
            self.notify.say("WATCHDOG=1");
        }
        let wanted = self.pool.wanted(self.config.grow, self.config.max_slots);
        if wanted > 0 && !self.growing {
            self.growing = true;
            let from = self.pool.len();
            self.cleaner.submit(Job::Grow(from, from + wanted))?;
        }
        Ok(())
    }

    fn cleaner_reports(&mut self) {
        let _ = self.cleaner.wake.read();
        while let Ok(report) = self.cleaner.done.try_recv() {
            let now = Instant::now();
            match report {
                Done::Cleaned(slot, Ok(index)) => self.pool.cleaned(slot, index),
                Done::Cleaned(slot, Err(e)) => {
                    say!(error: "slot {slot} stays out of use, trying again: {e}");
                    self.retries.push((now + RETRY, Some(slot)));
                }
                Done::Grown(made, result) => {
                    for index in made {
                        self.pool.add(index, Tag::NEW, true, now);
                    }
                    self.growing = result.is_err();
                    if let Err(e) = result {
                        say!(error: "the pool cannot grow beyond {} slots: {e}", self.pool.len());
                        // Try again when time has passed, not at every turn.
                        self.retries.push((now + 30 * RETRY, None));
                    }
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
