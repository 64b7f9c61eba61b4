//! Requests: what each does to the pool and to the kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rvpn_ipc::frame::{FLAG_RESUMED, FLAG_SUCCESSOR};
use rvpn_ipc::{Op, Reply, Request, Slot, Status};

use super::{RETRY, Server};
use crate::apply;
use crate::kernel::{link, ruleset, tun};
use crate::plan::{self, LeaseTag, Live, Tag};
use crate::pool::{Acquired, Holder, LET_GO};

/// Requests read from one peer before the others have their turn.
const TURN: usize = 16;
/// Acquires that may wait for a former holder at a time.
const WAITING: usize = 64;

/// An acquire whose key's device is still held.
pub(super) struct Pending {
    holder: Holder,
    request: Request,
    until: Instant,
}

/// What is sent back, with the TUN of a lease.
type Answer = (Reply, Option<OwnedFd>);

fn milliseconds(d: Duration) -> u32 {
    u32::try_from(d.as_millis()).unwrap_or(u32::MAX)
}

fn refused(r: &Request, status: Status, after: Duration) -> Reply {
    let mut reply = Reply::to(r, status);
    reply.retry_after_ms = milliseconds(after);
    reply
}

impl Server {
    pub(super) fn serve_peers(&mut self, ready: &[bool]) -> io::Result<()> {
        let ids = self.peers.ids();
        for (id, flags) in ids.into_iter().zip(ready.chunks_exact(2)) {
            for _ in 0..if flags[0] { TURN } else { 0 } {
                let Some(request) = self.peers.read(id, Instant::now()) else {
                    break;
                };
                self.handle(id, &request)?;
            }
            if flags[1] {
                self.peers.process_gone(id);
            }
        }
        self.bury_peers();
        Ok(())
    }

    /// What closed connections held lingers.
    pub(super) fn bury_peers(&mut self) {
        for id in self.peers.bury() {
            self.pending.retain(|p| p.holder != id);
            let until = Instant::now() + self.config.linger;
            self.pool.holder_gone(id, until);
        }
    }

    fn handle(&mut self, id: Holder, r: &Request) -> io::Result<()> {
        let said = |status| Reply::to(r, status);
        let greeted = self.peers.get(id).is_some_and(|p| p.greeted);
        // One gateway, or a second that says it is the successor.
        let room = usize::from(r.flags & FLAG_SUCCESSOR) + 1;
        let reply = match r.op {
            op if greeted == (op == Op::Hello) => {
                self.peers.close(id);
                said(Status::OutOfOrder)
            }
            Op::Hello if self.peers.greeted() >= room => {
                self.peers.close(id);
                said(Status::TwoGateways)
            }
            Op::Hello => {
                self.peers.greet(id);
                self.with_figures(said(Status::Ok))
            }
            Op::Describe => self.with_figures(said(Status::Ok)),
            Op::Acquire => return self.acquire(id, r),
            Op::Confirm if self.pool.confirm(r.slot, r.generation, r.key, id) => {
                self.with_lease(said(Status::Ok), r.slot)
            }
            Op::Confirm => said(Status::UnknownLease),
            Op::Linger | Op::Release => {
                let lingers = r.op == Op::Linger && !self.config.linger.is_zero();
                let until = lingers.then(|| Instant::now() + self.config.linger);
                let known = self.pool.end(r.slot, r.generation, id, until);
                if known && !lingers {
                    self.clean(r.slot)?;
                }
                said(if known {
                    Status::Ok
                } else {
                    Status::UnknownLease
                })
            }
        };
        self.peers.send(id, &reply, None);
        Ok(())
    }

    fn with_figures(&self, reply: Reply) -> Reply {
        let (c, config) = (self.pool.counts(), &self.config);
        Reply {
            mtu: config.mtu,
            nat_low: config.nat.0,
            nat_high: config.nat.1,
            offload: if config.offload { tun::OFFLOAD } else { 0 },
            v4: config.pool4.v4(),
            v6: config.pool6.v6(),
            stream4: config.stream4.v4(),
            stream6: config.stream6.v6(),
            slots: self.pool.len(),
            free: c.free,
            leased: c.leased,
            lingering: c.lingering,
            cleaning: c.cleaning,
            linger_ms: milliseconds(config.linger),
            ..reply
        }
    }

    fn with_lease(&self, reply: Reply, slot: Slot) -> Reply {
        let [v4, v6] = plan::prefixes(&self.config, slot);
        let [stream4, stream6] = plan::streams(&self.config, slot);
        Reply {
            slot,
            generation: self.pool.generation(slot),
            v4: v4.v4(),
            v6: v6.v6(),
            stream4: stream4.v4(),
            stream6: stream6.v6(),
            ..self.with_figures(reply)
        }
    }

    fn acquire(&mut self, id: Holder, r: &Request) -> io::Result<()> {
        if !self.config.classes.iter().any(|c| c.number == r.class) {
            let unknown = Reply::to(r, Status::UnknownClass);
            self.peers.send(id, &unknown, None);
            return Ok(());
        }
        if let Acquired::Held(slot, generation, holder) = self.pool.find(r.key) {
            let notice = Reply::notice(Status::TakenOver, slot, generation);
            self.peers.send(holder, &notice, None);
        }
        let busy = (refused(r, Status::Busy, RETRY), None);
        let waiting = self.pending.iter().any(|p| p.request.key == r.key);
        let until = Instant::now() + LET_GO;
        let answer = if waiting {
            Some(busy)
        } else {
            self.attempt(id, r, false)?
        };
        match answer {
            Some((reply, fd)) => self.peers.send(id, &reply, fd),
            None if self.pending.len() < WAITING => {
                let (holder, request) = (id, *r);
                self.pending.push(Pending {
                    holder,
                    request,
                    until,
                });
            }
            None => self.peers.send(id, &refused(r, Status::Busy, RETRY), None),
        }
        Ok(())
    }

    pub(super) fn retry_pending(&mut self, now: Instant) -> io::Result<()> {
        // Making a device again takes tens of milliseconds: one a turn, for the others' sake.
        let mut forced = false;
        for p in std::mem::take(&mut self.pending) {
            let force = now >= p.until && !forced;
            forced |= force;
            match self.attempt(p.holder, &p.request, force)? {
                Some((reply, fd)) => self.peers.send(p.holder, &reply, fd),
                None => self.pending.push(p),
            }
        }
        Ok(())
    }

    /// Tries to open the slot a key leads to; `None` while somebody still holds
    /// its device. With `force` such a device is made again.
    fn attempt(&mut self, id: Holder, r: &Request, force: bool) -> io::Result<Option<Answer>> {
        let Some(kind) = r.kind else {
            return Ok(Some((refused(r, Status::Failed, RETRY), None)));
        };
        let wanted = LeaseTag::new(r.key, kind, r.class);
        // A free slot whose device turns out to be lost costs another try.
        for _ in 0..3 {
            let (slot, resumed) = match self.pool.find(r.key) {
                Acquired::Fresh(slot) => (slot, false),
                Acquired::Resumed(slot) | Acquired::Held(slot, ..) => (slot, true),
                Acquired::Full => {
                    let full = refused(r, Status::NoCapacity, self.retry_after());
                    return Ok(Some((full, None)));
                }
            };
            match self.open(id, slot, wanted, resumed, force) {
                Ok((fd, offload)) => {
                    let mut reply = self.with_lease(Reply::to(r, Status::Ok), slot);
                    reply.flags = if resumed { FLAG_RESUMED } else { 0 };
                    reply.offload = offload;
                    let fd = kind.has_tun().then_some(fd);
                    return Ok(Some((reply, fd)));
                }
                Err(e) if resumed && e.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
                Err(e) => {
                    say!(error: "{} cannot be leased: {e}", plan::device_name(slot));
                    self.lose(slot)?;
                }
            }
        }
        Ok(Some((refused(r, Status::Failed, RETRY), None)))
    }

    /// When a slot may be free: growth takes a moment, a lingering lease its time.
    fn retry_after(&self) -> Duration {
        if self.growing || self.pool.counts().cleaning > 0 {
            return RETRY / 4;
        }
        let until = self.pool.next_deadline();
        let until = until.map(|d| d.saturating_duration_since(Instant::now()));
        until.map_or(10 * RETRY, |d| d.clamp(RETRY / 4, 10 * RETRY))
    }

    /// Attaches, tags the device with the lease, opens the rules, grants: in this
    /// order, so that a helper that dies on the way leaves nothing open unmarked.
    fn open(
        &mut self,
        id: Holder,
        slot: Slot,
        wanted: LeaseTag,
        resumed: bool,
        force: bool,
    ) -> io::Result<(OwnedFd, u16)> {
        let (k, mut index) = (&mut self.kernel, self.pool.index(slot));
        let former = self.pool.lease(slot).filter(|_| resumed);
        let former = former.map(|lease| Live::new(slot, index, lease));
        let tag = Tag::new(self.pool.next_generation(slot), Some(wanted));
        let (tun, offload) = match apply::attach(k, slot, index) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && !force => return Err(e),
            Err(_) if resumed => {
                index = apply::recreate(k, slot, index, tag)?;
                self.pool.set_index(slot, index);
                apply::attach(k, slot, index)?
            }
            other => other?,
        };
        link::set_alias(k, index, tag)?;
        link::add_hosts6(k, &[(slot, index)])?;
        let opened = Live::new(slot, index, wanted);
        if former != Some(opened) {
            former.map_or(Ok(()), |old| ruleset::remove_lease(k, old))?;
            ruleset::add_lease(k, opened)?;
        }
        #[cfg(feature = "fault-hooks")]
        crate::fault::at("opened");
        self.pool.grant(slot, wanted, id);
        Ok((tun.into_fd(), offload))
    }

    /// Ends a slot's lease because its device is not what it was.
    pub(super) fn lose(&mut self, slot: Slot) -> io::Result<()> {
        let (held, began) = self.pool.lost(slot);
        if let Some((generation, holder)) = held {
            let notice = Reply::notice(Status::DeviceLost, slot, generation);
            self.peers.send(holder, &notice, None);
        }
        if began { self.clean(slot) } else { Ok(()) }
    }
}
