//! Requests: what each does to the pool and to the kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rvpn_ipc::frame::{FLAG_RESUMED, FLAG_SUCCESSOR};
use rvpn_ipc::{Op, Reply, Request, Slot, Status};

use super::{RETRY, Server};
use crate::apply;
use crate::kernel::{link, ruleset, tun};
use crate::plan::{self, Device, Lease};
use crate::pool::{Entry, Holder, LET_GO, State};

/// Requests read from one peer before the others have their turn.
const TURN: usize = 16;
/// Acquires that may wait for a former holder at a time.
const WAITING: usize = 64;

/// An acquire whose key's device is still held.
pub(super) struct Pending {
    pub(super) holder: Holder,
    request: Request,
    until: Instant,
}

fn milliseconds(d: Duration) -> u32 {
    u32::try_from(d.as_millis()).unwrap_or(u32::MAX)
}

fn refused(r: &Request, status: Status, after: Duration) -> Reply {
    let mut reply = Reply::to(r, status);
    reply.retry_after_ms = milliseconds(after);
    reply
}

impl Server {
    pub(super) fn serve_peers(&mut self, ready: &[bool]) {
        let ids: Vec<Holder> = self.peers.all.keys().copied().collect();
        for (id, flags) in ids.into_iter().zip(ready.chunks_exact(2)) {
            for _ in 0..if flags[0] { TURN } else { 0 } {
                let Some(request) = self.peers.read(id) else {
                    break;
                };
                self.handle(id, &request);
            }
            if let Some(p) = self.peers.all.get_mut(&id) {
                p.closed |= flags[1] && p.process.is_some();
            }
        }
    }

    fn handle(&mut self, id: Holder, r: &Request) {
        // One gateway, or a second that says it is the successor.
        let full = self.peers.greeted() > usize::from(r.flags & FLAG_SUCCESSOR);
        let Some(peer) = self.peers.all.get_mut(&id) else {
            return;
        };
        let (ok, unknown) = (Status::Ok, Status::UnknownLease);
        let (ok, unknown) = (Reply::to(r, ok), Reply::to(r, unknown));
        let reply = match r.op {
            op if peer.greeted() == (op == Op::Hello) => {
                peer.closed = true;
                Reply::to(r, Status::OutOfOrder)
            }
            Op::Hello if full => {
                peer.closed = true;
                Reply::to(r, Status::TwoGateways)
            }
            Op::Hello | Op::Describe => {
                peer.deadline = None;
                self.describe(ok, Device::new(0))
            }
            Op::Acquire => return self.acquire(id, r),
            Op::Confirm => {
                let found = self.pool.confirm(r.slot, r.generation, r.key, id);
                found.map_or(unknown, |device| self.describe(ok, device))
            }
            Op::Linger | Op::Release => {
                let lingers = r.op == Op::Linger && !self.config.linger.is_zero();
                let until = lingers.then(|| Instant::now() + self.config.linger);
                let known = self.pool.end(r.slot, r.generation, id, until);
                if known && !lingers {
                    self.clean(r.slot);
                }
                if known { ok } else { unknown }
            }
        };
        self.peers.send(id, &reply, None);
    }

    /// Fills in the pool's figures and a lease's addresses: the first slot's are the pool's own.
    fn describe(&self, reply: Reply, of: Device) -> Reply {
        let (counts, c) = (self.pool.counts(), &self.config);
        let first = plan::addresses(c, of.slot);
        Reply {
            slot: of.slot,
            generation: of.generation,
            v4: first.v4,
            v6: first.v6,
            stream4: first.stream4,
            stream6: first.stream6,
            mtu: c.mtu,
            nat_low: c.nat.0,
            nat_high: c.nat.1,
            offload: if c.offload { tun::OFFLOAD } else { 0 },
            slots: self.pool.len(),
            free: counts.free,
            leased: counts.leased,
            lingering: counts.lingering,
            cleaning: counts.cleaning,
            linger_ms: milliseconds(c.linger),
            ..reply
        }
    }

    fn acquire(&mut self, id: Holder, r: &Request) {
        if !self.config.classes.iter().any(|c| c.number == r.class) {
            let unknown = Reply::to(r, Status::UnknownClass);
            return self.peers.send(id, &unknown, None);
        }
        if let Some(&Entry { device, state }) = self.pool.find(r.key)
            && let State::Leased(holder) = state
        {
            let notice = Reply::notice(Status::TakenOver, device.slot, device.generation);
            self.peers.send(holder, &notice, None);
        }
        let waiting = self.pending.iter().any(|p| p.request.key == r.key);
        if !waiting && self.attempt(id, r, false) {
            return;
        }
        if waiting || self.pending.len() >= WAITING {
            return self.peers.send(id, &refused(r, Status::Busy, RETRY), None);
        }
        self.pending.push(Pending {
            holder: id,
            request: *r,
            until: Instant::now() + LET_GO,
        });
    }

    pub(super) fn retry_pending(&mut self, now: Instant) {
        // Making a device again takes tens of milliseconds: one a turn, for the others' sake.
        let mut forced = false;
        for p in std::mem::take(&mut self.pending) {
            let force = now >= p.until && !forced;
            forced |= force;
            if !self.attempt(p.holder, &p.request, force) {
                self.pending.push(p);
            }
        }
    }

    /// Answers an acquire with the slot its key leads to; false while somebody still
    /// holds its device. With `force` such a device is made again.
    fn attempt(&mut self, id: Holder, r: &Request, force: bool) -> bool {
        let (mut reply, mut fd) = (refused(r, Status::Failed, RETRY), None);
        // A free slot whose device turns out to be lost costs another try.
        for _ in 0..3 {
            let Some(former) = self.pool.find(r.key).map(|e| e.device) else {
                // What is being cleaned or made is free in a moment, what is leased may last.
                let soon = self.pool.counts().cleaning > 0;
                let wait = if soon { RETRY / 4 } else { 5 * RETRY };
                reply = refused(r, Status::NoCapacity, wait);
                break;
            };
            match self.open(former, r, force) {
                Ok((device, tun, offload)) => {
                    self.pool.grant(device, id);
                    reply = self.describe(Reply::to(r, Status::Ok), device);
                    reply.flags = former.lease.map_or(0, |_| FLAG_RESUMED);
                    reply.offload = offload;
                    fd = tun;
                    break;
                }
                Err(e) if former.lease.is_some() && e.raw_os_error() == Some(libc::EBUSY) => {
                    return false;
                }
                Err(e) => {
                    say!(error: "{} cannot be leased: {e}", former.name());
                    self.lose(former.slot);
                }
            }
        }
        self.peers.send(id, &reply, fd);
        true
    }

    /// Attaches, tags the device with the lease, opens the rules: in this order,
    /// so that a helper that dies on the way leaves nothing open unmarked.
    fn open(
        &mut self,
        former: Device,
        r: &Request,
        force: bool,
    ) -> io::Result<(Device, Option<OwnedFd>, u16)> {
        let Request { key, class, .. } = *r;
        let kind = r.kind.ok_or(io::ErrorKind::InvalidInput)?;
        let mut device = former.leased(Lease { key, kind, class });
        let (k, resumed) = (&mut self.kernel, former.lease.is_some());
        let (tun, offload) = match apply::attach(k, &device) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && !force => return Err(e),
            Err(_) if resumed => {
                device = apply::recreate(k, device)?;
                apply::attach(k, &device)?
            }
            other => other?,
        };
        link::set_alias(k, &device)?;
        link::add_hosts6(k, &[device])?;
        if (former.index, former.lease) != (device.index, device.lease) {
            if resumed {
                ruleset::remove_lease(k, former)?;
            }
            ruleset::add_lease(k, device)?;
        }
        #[cfg(feature = "fault-hooks")]
        crate::fault::at("opened");
        Ok((device, kind.has_tun().then(|| tun.into_fd()), offload))
    }

    /// Ends a slot's lease because its device is not what it was.
    pub(super) fn lose(&mut self, slot: Slot) {
        let Some(lost) = self.pool.lost(slot) else {
            return;
        };
        if let State::Leased(holder) = lost.state {
            let notice = Reply::notice(Status::DeviceLost, slot, lost.device.generation);
            self.peers.send(holder, &notice, None);
        }
        self.clean(slot);
    }
}
