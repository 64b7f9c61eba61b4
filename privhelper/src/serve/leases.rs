//! Requests: what each does to the pool and to the kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rvpn_ipc::frame::{FLAG_RESUMED, FLAG_SUCCESSOR};
use rvpn_ipc::{Op, Reply, Request, Slot, Status};

use super::{RETRY, Server, element};
use crate::apply;
use crate::kernel::ruleset;
use crate::kernel::{link, tun};
use crate::plan::{self, LeaseTag, Tag};
use crate::pool::{Acquired, Holder, LET_GO, lease};

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

/// How far an acquire got.
enum Outcome {
    Granted(Reply, Option<OwnedFd>),
    Refused(Status, Duration),
    Wait,
}

impl Server {
    pub(super) fn serve_peers(&mut self, ready: &[bool]) -> io::Result<()> {
        let ids: Vec<_> = (0..ready.len() / 2)
            .filter_map(|i| self.peers.id_at(i))
            .collect();
        for (id, flags) in ids.into_iter().zip(ready.chunks_exact(2)) {
            if flags[0] {
                for _ in 0..TURN {
                    let Some(request) = self.peers.read(id, Instant::now()) else {
                        break;
                    };
                    self.handle(id, &request)?;
                }
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
            self.pool
                .holder_gone(id, Instant::now() + self.config.linger);
        }
    }

    fn handle(&mut self, id: Holder, r: &Request) -> io::Result<()> {
        let greeted = self.peers.get(id).is_some_and(|p| p.greeted);
        if greeted == (r.op == Op::Hello) {
            self.answer(id, &Reply::to(r, Status::OutOfOrder), None);
            self.peers.close(id);
            return Ok(());
        }
        let status = match r.op {
            Op::Hello => return self.hello(id, r),
            Op::Describe => {
                let reply = self.with_figures(Reply::to(r, Status::Ok));
                self.answer(id, &reply, None);
                return Ok(());
            }
            Op::Acquire => return self.acquire(id, r),
            Op::Confirm => {
                if self.pool.confirm(r.slot, r.generation, r.key, id) {
                    let reply = self.with_lease(Reply::to(r, Status::Ok), r.slot);
                    self.answer(id, &reply, None);
                    return Ok(());
                }
                Status::UnknownLease
            }
            Op::Linger if !self.config.linger.is_zero() => {
                let until = Instant::now() + self.config.linger;
                let known = self.pool.linger(r.slot, r.generation, id, until);
                if known {
                    Status::Ok
                } else {
                    Status::UnknownLease
                }
            }
            Op::Linger | Op::Release => {
                let lease = self.pool_lease(r.slot);
                if self.pool.release(r.slot, r.generation, id) {
                    self.clean(r.slot, lease)?;
                    Status::Ok
                } else {
                    Status::UnknownLease
                }
            }
        };
        self.answer(id, &Reply::to(r, status), None);
        Ok(())
    }

    fn pool_lease(&self, slot: Slot) -> Option<LeaseTag> {
        (slot < self.pool.len())
            .then(|| self.pool.tag(slot).lease)
            .flatten()
    }

    fn answer(&mut self, id: Holder, reply: &Reply, fd: Option<OwnedFd>) {
        if let Some(p) = self.peers.get(id) {
            p.send(reply, fd);
        }
    }

    /// One gateway, or a second that says it is the successor.
    fn hello(&mut self, id: Holder, r: &Request) -> io::Result<()> {
        let room = if r.flags & FLAG_SUCCESSOR != 0 { 2 } else { 1 };
        if self.peers.greeted() >= room {
            self.answer(id, &Reply::to(r, Status::TwoGateways), None);
            self.peers.close(id);
            return Ok(());
        }
        self.peers.greet(id);
        let reply = self.with_figures(Reply::to(r, Status::Ok));
        self.answer(id, &reply, None);
        Ok(())
    }

    fn with_figures(&self, reply: Reply) -> Reply {
        let c = self.pool.counts();
        let offload = if self.config.offload {
            tun::OFFLOAD_TCP | tun::OFFLOAD_UDP
        } else {
            0
        };
        Reply {
            mtu: self.config.mtu,
            nat_low: self.config.nat_low,
            nat_high: self.config.nat_high,
            offload,
            v4: self.config.pool4.addr,
            v6: self.config.pool6.addr,
            stream4: self.config.stream4.addr,
            stream6: self.config.stream6.addr,
            slots: self.pool.len(),
            free: c.free,
            leased: c.leased,
            lingering: c.lingering,
            cleaning: c.cleaning,
            linger_ms: u32::try_from(self.config.linger.as_millis()).unwrap_or(u32::MAX),
            ..reply
        }
    }

    fn with_lease(&self, reply: Reply, slot: Slot) -> Reply {
        Reply {
            slot,
            generation: self.pool.tag(slot).generation,
            v4: plan::v4_base(self.config.pool4, slot),
            v6: plan::v6_base(self.config.pool6, slot),
            stream4: plan::stream4(&self.config, slot),
            stream6: plan::stream6(&self.config, slot),
            ..self.with_figures(reply)
        }
    }

    fn acquire(&mut self, id: Holder, r: &Request) -> io::Result<()> {
        if !self.config.classes.iter().any(|c| c.number == r.class) {
            self.answer(id, &Reply::to(r, Status::UnknownClass), None);
            return Ok(());
        }
        if let Acquired::Held {
            slot,
            generation,
            holder,
        } = self.pool.find(r.key)
            && let Some(p) = self.peers.get(holder)
        {
            p.send(&Reply::notice(Status::TakenOver, slot, generation), None);
        }
        if self.pending.iter().any(|p| p.request.key == r.key) {
            self.refuse(id, r, Status::Busy, RETRY);
            return Ok(());
        }
        let until = Instant::now() + LET_GO;
        match self.attempt(id, r, false)? {
            Outcome::Wait if self.pending.len() < WAITING => {
                self.pending.push(Pending {
                    holder: id,
                    request: *r,
                    until,
                });
            }
            Outcome::Wait => self.refuse(id, r, Status::Busy, RETRY),
            Outcome::Granted(reply, fd) => self.answer(id, &reply, fd),
            Outcome::Refused(status, after) => self.refuse(id, r, status, after),
        }
        Ok(())
    }

    fn refuse(&mut self, id: Holder, r: &Request, status: Status, after: Duration) {
        let retry_after_ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        self.answer(
            id,
            &Reply {
                retry_after_ms,
                ..Reply::to(r, status)
            },
            None,
        );
    }

    pub(super) fn retry_pending(&mut self, now: Instant) -> io::Result<()> {
        // Making a device again takes tens of milliseconds: one a turn, for the others' sake.
        let mut forced = false;
        for p in std::mem::take(&mut self.pending) {
            let force = now >= p.until && !forced;
            forced |= force;
            match self.attempt(p.holder, &p.request, force)? {
                Outcome::Wait => self.pending.push(p),
                Outcome::Granted(reply, fd) => self.answer(p.holder, &reply, fd),
                Outcome::Refused(status, after) => self.refuse(p.holder, &p.request, status, after),
            }
        }
        Ok(())
    }

    /// Tries to open the slot a key leads to. With `force` a device somebody still holds is made again.
    fn attempt(&mut self, id: Holder, r: &Request, force: bool) -> io::Result<Outcome> {
        let Some(kind) = r.kind else {
            return Ok(Outcome::Refused(Status::Failed, RETRY));
        };
        let wanted = lease(r.key, kind, r.class);
        // A free slot whose device turns out to be lost costs another try.
        for _ in 0..3 {
            let (slot, resumed) = match self.pool.find(r.key) {
                Acquired::Fresh(slot) => (slot, false),
                Acquired::Resumed(slot) | Acquired::Held { slot, .. } => (slot, true),
                Acquired::Full => {
                    return Ok(Outcome::Refused(Status::NoCapacity, self.retry_after()));
                }
            };
            match self.open(id, slot, wanted, resumed, force) {
                Ok((fd, offload)) => {
                    let flags = if resumed { FLAG_RESUMED } else { 0 };
                    let reply = self.with_lease(
                        Reply {
                            flags,
                            ..Reply::to(r, Status::Ok)
                        },
                        slot,
                    );
                    let fd = kind.has_tun().then_some(fd);
                    return Ok(Outcome::Granted(Reply { offload, ..reply }, fd));
                }
                Err(e) if resumed && e.raw_os_error() == Some(libc::EBUSY) => {
                    return Ok(Outcome::Wait);
                }
                Err(e) => {
                    say!(3, "{} cannot be leased: {e}", plan::device_name(slot));
                    self.lose(slot)?;
                }
            }
        }
        Ok(Outcome::Refused(Status::Failed, RETRY))
    }

    /// When a slot may be free: growth takes a moment, a lingering lease its time.
    fn retry_after(&self) -> Duration {
        let now = Instant::now();
        let growing = self.growing || self.pool.counts().cleaning > 0;
        let until = self
            .pool
            .next_deadline()
            .map(|d| d.saturating_duration_since(now));
        match until {
            _ if growing => RETRY / 4,
            Some(until) => until.clamp(RETRY / 4, 10 * RETRY),
            None => 10 * RETRY,
        }
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
        let Server {
            kernel: k,
            config,
            pool,
            ..
        } = self;
        let former = pool
            .tag(slot)
            .lease
            .filter(|_| resumed)
            .map(|l| element(slot, pool.index(slot), l));
        let tag = Tag {
            generation: pool.next_generation(slot),
            lease: Some(wanted),
        };
        let attached = match apply::attach(k, config, slot, pool.index(slot)) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && !force => return Err(e),
            Err(_) if resumed => {
                let index = apply::recreate(k, config, slot, pool.index(slot), tag)?;
                pool.set_index(slot, index);
                apply::attach(k, config, slot, index)?
            }
            other => other?,
        };
        let index = pool.index(slot);
        link::set_alias(&mut k.route, index, &tag.to_alias())?;
        link::add_hosts6(&mut k.route, &[(index, plan::hosts(config, slot).1)])?;
        let opened = element(slot, index, wanted);
        if former != Some(opened) {
            if let Some(old) = former {
                ruleset::remove_lease(k, config, old)?;
            }
            ruleset::add_lease(k, config, opened)?;
        }
        #[cfg(feature = "fault-hooks")]
        crate::fault::at("opened");
        pool.grant(slot, wanted, id);
        Ok((attached.0.into_fd(), attached.1))
    }

    /// Ends a slot's lease because its device is not what it was.
    pub(super) fn lose(&mut self, slot: Slot) -> io::Result<()> {
        let lease = self.pool_lease(slot);
        let (holder, began) = self.pool.lost(slot);
        if let Some((generation, holder)) = holder
            && let Some(p) = self.peers.get(holder)
        {
            p.send(&Reply::notice(Status::DeviceLost, slot, generation), None);
        }
        if began {
            self.clean(slot, lease)
        } else {
            Ok(())
        }
    }
}
