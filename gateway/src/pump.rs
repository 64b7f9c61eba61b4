//! Between a client's messages and its device.
//!
//! Outbound, every packet is validated, given the address the device knows the
//! client by, put behind a virtio header made from what was validated, and
//! written. Inbound, it is validated too, since whatever reaches the device is
//! a stranger's, given the client's own address and queued.

mod rules;

use std::io::IoSlice;
use std::net::{Ipv4Addr, Ipv6Addr};

use rvpn_proto::dialect::SourceMap;
use rvpn_proto::queue::{Meta, Queue, Settings, Stats};
use rvpn_proto::record::Offload;
use tokio::time::Instant;

use self::rules::{Checked, Direction};
use crate::meter::{DropReason, Totals};
use crate::tun::{Refused, Tun, VIRTIO_LEN};

/// Which addresses a client has.
#[derive(Debug)]
pub enum Identity {
    /// Constant ones inside, the lease's outside: translated.
    Pair {
        /// As the client sees them.
        inner: (Ipv4Addr, Ipv6Addr),
        /// As the device sees them.
        lease: (Ipv4Addr, Ipv6Addr),
    },
    /// The lease's own, on both sides.
    Own {
        /// IPv4.
        v4: Ipv4Addr,
        /// IPv6, if the client knows it.
        v6: Option<Ipv6Addr>,
    },
    /// Whatever the client likes, translated to addresses of the lease's subnet.
    Sources(Box<SourceMap>),
}

/// The packet that goes next to the client.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// Room that taking it needs.
    pub whole: usize,
    /// What of it remains when it is taken.
    pub remaining: usize,
}

/// One client's packets.
#[derive(Debug)]
pub struct Pump {
    identity: Identity,
    mtu: u16,
    offload: bool,
    queue: Queue,
    begun: Instant,
    counted: Stats,
}

impl Pump {
    /// With an empty queue. `offload` is whether the client takes and gives
    /// super-packets; `key` is random, see [`Queue::new`].
    pub fn new(identity: Identity, mtu: u16, offload: bool, key: [u64; 2]) -> Pump {
        let settings = Settings {
            mtu: mtu.into(),
            ..Settings::default()
        };
        Pump {
            identity,
            mtu,
            offload,
            queue: Queue::new(settings, key),
            begun: Instant::now(),
            counted: Stats::default(),
        }
    }
}

impl Pump {
    /// Client to device. Whatever does not pass is counted and forgotten.
    pub fn outbound(
        &mut self,
        packet: &[u8],
        offload: Offload,
        tun: &Tun,
        totals: &mut Totals,
        scratch: &mut [u8],
    ) {
        let side = &mut totals.outbound;
        if offload != Offload::NONE && !self.offload {
            side.drop(DropReason::Offload, 1);
            return;
        }
        let checked = match rules::check(packet, offload, self.mtu) {
            Ok(checked) => checked,
            Err(reason) => return side.drop(reason, 1),
        };
        let split = checked.len.min(rules::HEAD);
        let head = &mut scratch[..split];
        head.copy_from_slice(&packet[..split]);
        if !checked.peer_is_unicast(head, Direction::Outbound) {
            return side.drop(DropReason::Address, 1);
        }
        if !self.identity.send_as(&checked, head) {
            return side.drop(DropReason::Spoofed, 1);
        }
        let virtio = checked.virtio();
        let parts = [
            IoSlice::new(&virtio),
            IoSlice::new(head),
            IoSlice::new(&packet[split..checked.len]),
        ];
        match tun.write(&parts) {
            Ok(()) => {
                let (packets, bytes) = checked.size();
                side.pass(packets, bytes);
            }
            Err(Refused::Packet) => side.drop(DropReason::Kernel, 1),
            // Gone is reported by the device itself, with a reason for the client.
            Err(Refused::Down | Refused::Gone) => side.drop(DropReason::Down, 1),
        }
    }

    /// Device to queue: one read of the device, with its virtio header.
    pub fn inbound(&mut self, read: &mut [u8], totals: &mut Totals, now: Instant) {
        let side = &mut totals.inbound;
        let Some(offload) = rules::read_virtio(read) else {
            return side.drop(DropReason::Malformed, 1);
        };
        let packet = &mut read[VIRTIO_LEN..];
        let checked = match rules::check(packet, offload, self.mtu) {
            Ok(checked) => checked,
            Err(reason) => return side.drop(reason, 1),
        };
        let split = checked.len.min(rules::HEAD);
        if !self.identity.receive_as(&checked, &mut packet[..split]) {
            return side.drop(DropReason::Chatter, 1);
        }
        let now = micros(self.begun, now);
        let meta = Meta {
            offload,
            header_len: u16::try_from(checked.header_len).unwrap_or(0),
        };
        let queue = &mut self.queue;
        if self.offload {
            queue.push(&packet[..checked.len], meta, now);
        } else {
            let finished = Meta {
                offload: Offload::NONE,
                ..meta
            };
            checked.finish(packet, |segment| {
                queue.push(segment, finished, now);
            });
        }
    }

    /// What goes next, if anything waits.
    pub fn next_len(&mut self, now: Instant) -> Option<Waiting> {
        let next = self.queue.next(micros(self.begun, now))?;
        Some(Waiting {
            whole: next.len,
            remaining: next.remaining(),
        })
    }

    /// Writes the packet that [`Pump::next_len`] told of to the start of `out`
    /// and counts it. Its length, and what is left to do for it.
    pub fn take(&mut self, out: &mut [u8], totals: &mut Totals) -> Option<(usize, Offload)> {
        let next = self.queue.take(out)?;
        let header_len = usize::from(next.meta.header_len);
        let (len, offload) = if next.cut == 0 {
            (next.len, next.meta.offload)
        } else {
            let whole = &mut out[..next.len];
            rules::cut(whole, header_len, next.meta.offload, next.cut)
        };
        let (packets, bytes) = rules::size(len, header_len, offload);
        totals.inbound.pass(packets, bytes);
        Some((len, offload))
    }

    /// Drops the packet that [`Pump::next_len`] told of: this client's
    /// messages cannot hold it.
    pub fn discard(&mut self, totals: &mut Totals) {
        let mut nowhere = vec![0; rvpn_proto::record::MAX_PACKET];
        if self.queue.take(&mut nowhere).is_some() {
            totals.inbound.drop(DropReason::TooBig, 1);
        }
    }

    /// Brings what the queue has dropped into the totals.
    pub fn count_drops(&mut self, totals: &mut Totals) {
        let stats = *self.queue.stats();
        let late = stats.late.packets + stats.trimmed.packets;
        let before = self.counted.late.packets + self.counted.trimmed.packets;
        let side = &mut totals.inbound;
        side.drop(DropReason::Delay, late - before);
        let overload = stats.overflow.packets - self.counted.overflow.packets;
        side.drop(DropReason::Overload, overload);
        let refused = stats.refused.packets - self.counted.refused.packets;
        side.drop(DropReason::Budget, refused);
        self.counted = stats;
    }

    /// Gives memory back that an idle client does not need.
    pub fn relax(&mut self) {
        self.queue.relax();
    }

    /// Bytes that wait.
    pub fn backlog(&self) -> u64 {
        self.queue.bytes()
    }
}

fn micros(begun: Instant, now: Instant) -> u64 {
    let passed = now.saturating_duration_since(begun).as_micros();
    u64::try_from(passed).unwrap_or(u64::MAX)
}

impl Identity {
    /// Makes the source what the device knows the client by. False if the
    /// client may not send from it.
    fn send_as(&mut self, packet: &Checked, head: &mut [u8]) -> bool {
        let direction = Direction::Outbound;
        let (v4, v6) = (
            packet.client_v4(head, direction),
            packet.client_v6(head, direction),
        );
        match self {
            Identity::Pair { inner, lease } => {
                if v4 == Some(inner.0) {
                    packet.translate(head, direction, &lease.0.octets());
                } else if v6 == Some(inner.1) {
                    packet.translate(head, direction, &lease.1.octets());
                } else {
                    return false;
                }
                true
            }
            Identity::Own { v4: own4, v6: own6 } => {
                v4 == Some(*own4) || (v6.is_some() && v6 == *own6)
            }
            Identity::Sources(map) => {
                let Some(outside) = v4.and_then(|source| map.outside(source)) else {
                    return false;
                };
                packet.translate(head, direction, &outside.octets());
                true
            }
        }
    }

    /// Makes the destination what the client knows itself by. False if the
    /// packet is not for it.
    fn receive_as(&mut self, packet: &Checked, head: &mut [u8]) -> bool {
        let direction = Direction::Inbound;
        let (v4, v6) = (
            packet.client_v4(head, direction),
            packet.client_v6(head, direction),
        );
        match self {
            Identity::Pair { inner, lease } => {
                if v4 == Some(lease.0) {
                    packet.translate(head, direction, &inner.0.octets());
                } else if v6 == Some(lease.1) {
                    packet.translate(head, direction, &inner.1.octets());
                } else {
                    return false;
                }
                true
            }
            Identity::Own { v4: own4, v6: own6 } => {
                v4 == Some(*own4) || (v6.is_some() && v6 == *own6)
            }
            Identity::Sources(map) => {
                let Some(inside) = v4.and_then(|address| map.inside(address)) else {
                    return false;
                };
                packet.translate(head, direction, &inside.octets());
                true
            }
        }
    }
}
