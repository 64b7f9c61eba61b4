//! The serving loop: one thread, one poll, never a blocking send.

mod events;
mod leases;
mod peers;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rvpn_ipc::{Reply, Status};

use crate::apply::{self, Survey};
use crate::cleaner::{Cleaner, Done, Job};
use crate::config::Config;
use crate::confine;
use crate::kernel::netlink::Socket;
use crate::kernel::ruleset::Element;
use crate::kernel::{Kernel, host, tun};
use crate::notify::Notify;
use crate::plan::{LeaseTag, Tag};
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
pub(crate) struct Server {
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
    /// Jobs to hand to the cleaner again, and when.
    retries: Vec<(Instant, Job)>,
    doubts: events::Doubts,
}

fn element(slot: u32, index: u32, l: LeaseTag) -> Element {
    Element {
        slot,
        index,
        class: l.class,
        streams: l.kind.has_streams(),
    }
}

/// Builds the pool from what is there and what is missing, confines the process, and serves.
pub(crate) fn run(config: Config, listener: OwnedFd, notify: Notify) -> io::Result<()> {
    let config = Arc::new(config);
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut kernel = Kernel::open()?;
    let links = Socket::open(libc::NETLINK_ROUTE, events::LINK_GROUPS)?;
    let tables = Socket::open(libc::NETLINK_NETFILTER, events::TABLE_GROUPS)?;
    let uplinks = host::uplinks(&mut kernel, &config)?;
    if uplinks.is_empty() {
        say!(
            4,
            "no uplink: there is no default route; clients reach nothing until there is one"
        );
    }
    let (pool, rules) = adopt(&mut kernel, &config, &uplinks)?;
    let landlocked = confine::landlock::confine(&[
        (tun::DEVICE.as_ref(), confine::landlock::CHANGE),
        ("/proc/sys/net".as_ref(), confine::landlock::CHANGE),
        ("/proc".as_ref(), confine::landlock::READ),
        (&config.state, confine::landlock::KEEP),
    ])?;
    if !landlocked {
        say!(
            4,
            "this kernel has no Landlock: files are guarded by ownership alone"
        );
    }
    let cleaner = Cleaner::start(Arc::clone(&config))?;
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
        peers: peers::Peers::new(config.gateway_uid),
        config,
        pending: Vec::new(),
        growing: false,
        next_verify: now + VERIFY,
        next_watchdog: now,
        retries: Vec::new(),
        doubts: events::Doubts::default(),
    };
    server.clean_doubtful()?;
    server.start_watching();
    let c = server.pool.counts();
    say!(
        5,
        "serving {} slots on {}: {} free, {} with a lease from before, {} being cleaned",
        server.pool.len(),
        server.config.socket.display(),
        c.free,
        c.lingering,
        c.cleaning
    );
    server.notify.say("READY=1\nSTATUS=serving");
    server.serve()
}

/// Takes over devices of ours, makes the missing ones, and installs the rules with live leases in them.
pub(crate) fn adopt(k: &mut Kernel, config: &Config, uplinks: &[u32]) -> io::Result<(Pool, usize)> {
    let Survey { ours, foreign } = apply::survey(k, config)?;
    if let Some(name) = foreign.first() {
        return Err(apply::foreign(name));
    }
    let until = Instant::now() + config.linger.max(CLAIM);
    let mut pool = Pool::default();
    let mut missing = Vec::new();
    let last = ours.last().map_or(0, |d| d.slot + 1);
    let mut found = ours.into_iter().peekable();
    // Slots are numbered without gaps: a device that went missing among others is made again.
    for slot in 0..last.max(config.slots) {
        match found.next_if(|d| d.slot == slot) {
            Some(d) => drop(pool.add(d.index, d.tag, d.sound, until)),
            None => {
                missing.push((slot, Tag::NEW));
                pool.add(0, Tag::NEW, true, until);
            }
        }
    }
    let live: Vec<Element> = pool
        .live()
        .map(|l| element(l.slot, l.index, l.lease))
        .collect();
    let rules = apply::base(k, config, uplinks, &live)?;
    for (slot, index) in apply::create_tagged(k, config, &missing)? {
        pool.set_index(slot, index);
    }
    Ok((pool, rules))
}

impl Server {
    /// Hands every slot whose device or lease is in doubt to the cleaner.
    fn clean_doubtful(&mut self) -> io::Result<()> {
        let doubtful: Vec<_> = self.pool.cleaning().collect();
        doubtful
            .into_iter()
            .try_for_each(|(slot, lease)| self.clean(slot, lease))
    }

    fn job(&self, slot: u32, lease: Option<LeaseTag>) -> Job {
        Job::Clean {
            slot,
            index: self.pool.index(slot),
            generation: self.pool.tag(slot).generation,
            lease,
        }
    }

    fn clean(&mut self, slot: u32, lease: Option<LeaseTag>) -> io::Result<()> {
        self.cleaner.submit(self.job(slot, lease))
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
                self.cleaner_reports()?;
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
    fn wait(&mut self, now: Instant) -> io::Result<Vec<bool>> {
        let deadlines = [
            self.pool.next_deadline(),
            self.peers.next_deadline(),
            (!self.pending.is_empty()).then(|| now + PENDING_TICK),
            self.retries.iter().map(|r| r.0).min(),
            self.doubts.next_deadline(),
            self.notify.watchdog.map(|_| self.next_watchdog),
            Some(self.next_verify),
        ];
        let next = deadlines
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(now + VERIFY);
        // One millisecond late rather than a turn too early.
        let wait = next.saturating_duration_since(now) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        fn input(fd: BorrowedFd<'_>) -> PollFd<'_> {
            PollFd::new(fd, PollFlags::POLLIN)
        }
        let mut fds = vec![
            input(self.signals.as_fd()),
            input(self.cleaner.wake()),
            input(self.links.fd.as_fd()),
            input(self.tables.fd.as_fd()),
            input(self.listener.as_fd()),
        ];
        self.peers.poll_fds(&mut fds);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(fds.iter().map(|f| f.any().unwrap_or(false)).collect())
    }

    fn timers(&mut self, now: Instant) -> io::Result<()> {
        for l in self.pool.expire(now) {
            self.clean(l.slot, Some(l.lease))?;
        }
        self.retry_pending(now)?;
        self.peers.expire(now);
        self.bury_peers();
        let due: Vec<Job> = self
            .retries
            .extract_if(.., |r| r.0 <= now)
            .map(|r| r.1)
            .collect();
        for job in due {
            self.cleaner.submit(job)?;
        }
        if now >= self.next_verify {
            self.next_verify = now + VERIFY;
            self.doubts.rules = true;
            self.settle_doubts();
        }
        if let Some(interval) = self.notify.watchdog
            && now >= self.next_watchdog
        {
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

    fn cleaner_reports(&mut self) -> io::Result<()> {
        self.cleaner.woken();
        let reports: Vec<Done> = self.cleaner.done.try_iter().collect();
        for report in reports {
            match report {
                Done::Cleaned { slot, index } => self.pool.cleaned(slot, index),
                Done::Grown { made, error } => {
                    self.growing = false;
                    for (_, index) in made {
                        self.pool.add(index, Tag::NEW, true, Instant::now());
                    }
                    if let Some(e) = error {
                        say!(
                            3,
                            "the pool cannot grow beyond {} slots: {e}",
                            self.pool.len()
                        );
                        // Try again when time has passed, not at every turn.
                        self.growing = true;
                        let from = self.pool.len();
                        let job = Job::Grow(from, from + 1);
                        self.retries.push((Instant::now() + 30 * RETRY, job));
                    }
                }
                Done::NotCleaned { slot, error } => {
                    say!(3, "slot {slot} stays out of use, trying again: {error}");
                    let lease = self.pool.cleaning().find(|c| c.0 == slot).and_then(|c| c.1);
                    let job = self.job(slot, lease);
                    self.retries.push((Instant::now() + RETRY, job));
                }
            }
        }
        Ok(())
    }

    /// Leaves devices, leases and rules for the next start.
    fn stop(&mut self) -> io::Result<()> {
        self.notify.say("STOPPING=1");
        self.peers.tell_all(&Reply::notice(Status::Closing, 0, 0));
        say!(5, "stopped; devices and leases stay for the next start");
        Ok(())
    }
}
