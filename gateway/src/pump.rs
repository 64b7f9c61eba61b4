//! Between a client's messages and its device.
//!
//! Outbound, every packet is validated, given the address the device knows the
//! client by, put behind a virtio header made from what was validated, and
//! written. Inbound, it is validated too, since whatever reaches the device is
//! a stranger's, given the client's own address and queued.
//!
//! A client without offload is spared the work of one packet at a time as far
//! as it is ours: super-packets for it are cut where they lie, and what it
//! sends in a row is joined to super-packets before it is written. Datagrams
//! are joined for every client, since programs send them singly.
//!
//! What a packet must be and what is changed in it is [`rvpn_proto`]'s to say.

pub mod budget;
mod identity;
mod reason;

use std::io::IoSlice;

use rvpn_proto::gso::{Coalescer, Joins, Offer, Segments, VirtioHeader, rebuild, size, size_of};
use rvpn_proto::nat::HEAD;
use rvpn_proto::packet::{Parsed, parse};
use rvpn_proto::queue::{Buffer, Meta, Next, Queue, Settings, Stats, Stride};
use rvpn_proto::record::Offload;
use rvpn_proto::validate::{self, FragmentBudget, Limits, Sources};
use rvpn_proto::{gso, nat};
use tokio::time::Instant;

use self::budget::{Budget, Depth, PROCESS};
pub use self::identity::Identity;
use self::identity::Translation;
use crate::meter::{DropReason, Side, Totals};
use crate::tun::{Refused, Tun, VIRTIO_LEN};

/// Bits of `TUN_F_*`: both kinds of TCP, both kinds of UDP.
const TUN_TCP: u16 = 0x02 | 0x04;
const TUN_UDP: u16 = 0x20 | 0x40;

/// What a client and its device were found to be capable of.
#[derive(Clone, Copy, Debug)]
pub struct Agreed {
    /// The largest packet without segmentation.
    pub mtu: u16,
    /// Whether the client takes and gives super-packets.
    pub offload: bool,
    /// What the device takes, as `TUN_F_*` bits.
    pub device: u16,
}

/// Where a client's packets go.
pub struct Out<'a> {
    /// Its device.
    pub tun: &'a Tun,
    /// What is counted.
    pub totals: &'a mut Totals,
    /// Room for the longest packet. What may go on with the next one stays
    /// there until [`Pump::flush`].
    pub scratch: &'a mut [u8],
    /// When to look what has come of it.
    pub stride: &'a mut Stride,
    /// The time.
    pub now: Instant,
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
    sources: Sources,
    translation: Translation,
    limits: Limits,
    /// None while no datagram of the client's is incomplete.
    fragments: Option<Box<FragmentBudget>>,
    coalescer: Coalescer,
    queue: Queue,
    /// Of the queue while there is enough for all.
    most: usize,
    budget: &'static Budget,
    /// What the budget knows of.
    charged: usize,
    begun: Instant,
    counted: Stats,
}

impl Pump {
    /// With an empty queue; `key` is random, see [`Queue::new`].
    pub fn new(identity: &Identity, agreed: Agreed, key: [u64; 2]) -> Pump {
        let settings = Settings {
            mtu: agreed.mtu.into(),
            ..Settings::default()
        };
        let joins = Joins {
            // A client with offload has done that itself.
            tcp: !agreed.offload && agreed.device & TUN_TCP == TUN_TCP,
            udp: agreed.device & TUN_UDP == TUN_UDP,
        };
        Pump {
            sources: identity.sources(),
            translation: Translation::of(identity),
            limits: Limits {
                mtu: agreed.mtu,
                offload: agreed.offload,
                verify: true,
            },
            fragments: None,
            coalescer: Coalescer::new(joins),
            queue: Queue::new(settings, key),
            most: settings.limit,
            budget: &PROCESS,
            charged: 0,
            begun: Instant::now(),
            counted: Stats::default(),
        }
    }

    /// Client to device. Whatever does not pass is counted and forgotten.
    pub fn outbound(&mut self, packet: &[u8], offload: Offload, out: &mut Out<'_>) {
        let judged = validate::outbound(packet, offload, &self.limits, &self.sources)
            .and_then(|parsed| self.admit(packet, parsed, out.now));
        let parsed = match judged {
            Ok(parsed) => parsed,
            Err(reason) => return out.totals.outbound.drop(reason.into(), 1),
        };
        loop {
            match self.coalescer.offer(out.scratch, packet, &parsed, offload) {
                Offer::Taken => return,
                Offer::Flush => self.flush(out),
                Offer::Pass => break,
            }
        }
        // The message is shared with the connection, so what changes is copied.
        let mut head = [0; HEAD];
        let (first, rest) = packet[..parsed.len()].split_at(parsed.len().min(HEAD));
        let head = &mut head[..first.len()];
        head.copy_from_slice(first);
        let side = &mut out.totals.outbound;
        self.write(head, rest, &parsed, offload, out.tun, side);
        out.stride.wrote();
    }

    /// Writes what [`Pump::outbound`] kept. Without it, or with another
    /// scratch, packets would be lost.
    pub fn flush(&mut self, out: &mut Out<'_>) {
        if let Some(kept) = self.coalescer.flush(out.scratch) {
            let packet = &mut out.scratch[..kept.parsed.len()];
            let side = &mut out.totals.outbound;
            self.write(packet, &[], &kept.parsed, kept.offload, out.tun, side);
            out.stride.wrote();
        }
    }

    /// Counts incomplete datagrams.
    fn admit(
        &mut self,
        packet: &[u8],
        parsed: Parsed,
        now: Instant,
    ) -> Result<Parsed, validate::DropReason> {
        if !parsed.is_whole() {
            let seconds = now.saturating_duration_since(self.begun).as_secs();
            let fragments = self.fragments.get_or_insert_default();
            fragments.admit(packet, &parsed, seconds)?;
        }
        Ok(parsed)
    }

    /// One packet to the device, in two parts, of which the first is changed.
    fn write(
        &mut self,
        head: &mut [u8],
        rest: &[u8],
        parsed: &Parsed,
        offload: Offload,
        tun: &Tun,
        side: &mut Side,
    ) {
        let (packets, bytes) = size(parsed, offload);
        let ready = self
            .translation
            .outbound(head, parsed, nat::Sum::from(offload))
            .and_then(|()| rebuild(head, parsed, offload));
        let virtio = match ready {
            Ok(header) => header.to_bytes(),
            Err(reason) => return side.drop(reason.into(), packets),
        };
        // Counted when it is written.
        if parsed.is_bare_ack(head) && tun.aside.give(&virtio, head) {
            return;
        }
        let parts = [
            IoSlice::new(&virtio),
            IoSlice::new(head),
            IoSlice::new(rest),
        ];
        match tun.write(&parts) {
            Ok(()) => side.pass(packets, bytes),
            Err(Refused::Packet) => side.drop(DropReason::Kernel, packets),
            // Gone is reported by the device itself, with a reason for the client.
            Err(Refused::Down | Refused::Gone) => side.drop(DropReason::Down, packets),
        }
    }

    /// Device to queue: one read of the device, so many bytes with its virtio
    /// header, which lies before the packet's place. The buffer may be another
    /// one afterwards.
    pub fn inbound(&mut self, buffer: &mut Buffer, len: usize, totals: &mut Totals, now: Instant) {
        let side = &mut totals.inbound;
        let read = &mut buffer.from(VIRTIO_LEN)[..len];
        let Some(virtio) = VirtioHeader::read(read) else {
            return side.drop(DropReason::Malformed, 1);
        };
        let offload = virtio.offload();
        let packet = &mut read[VIRTIO_LEN..];
        let parsed = match validate::inbound(packet, offload, &self.limits) {
            Ok(parsed) if virtio.describes(&parsed) => parsed,
            Ok(_) => return side.drop(DropReason::Offload, 1),
            Err(reason) => return side.drop(reason.into(), 1),
        };
        let packet = &mut packet[..parsed.len()];
        let head = &mut packet[..parsed.len().min(HEAD)];
        let sum = nat::Sum::from(offload);
        if let Err(reason) = self.translation.inbound(head, &parsed, sum) {
            let (packets, _) = size(&parsed, offload);
            return side.drop(reason.into(), packets);
        }
        let meta = Meta {
            offload,
            header_len: u16::try_from(parsed.header_len()).unwrap_or(0),
        };
        let now = micros(self.begun, now);
        if self.limits.offload {
            self.queue.push_buffer(buffer, parsed.len(), meta, now);
            return;
        }
        let finished = Meta {
            offload: Offload::NONE,
            ..meta
        };
        match Segments::new(packet, &parsed, offload) {
            Ok(mut segments) => {
                while let Some(segment) = segments.cut() {
                    self.queue.push(segment, finished, now);
                }
                side.drop(DropReason::Offload, segments.left() as u64);
            }
            Err(reason) => side.drop(reason.into(), 1),
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
    /// and counts it. Its length, and what is left to do for it. Of a super-packet
    /// that is longer than `most` the first segments, as many as are not.
    pub fn take(
        &mut self,
        out: &mut [u8],
        most: usize,
        totals: &mut Totals,
    ) -> Option<(usize, Offload)> {
        let next = self.queue.take_part(out, most)?;
        finish(out, &next, totals)
    }

    /// The same at the packet's place in a buffer, which may be another one afterwards.
    pub fn take_buffer(
        &mut self,
        out: &mut Buffer,
        most: usize,
        totals: &mut Totals,
    ) -> Option<(usize, Offload)> {
        let next = self.queue.take_buffer(out, most)?;
        finish(out.packet(), &next, totals)
    }

    /// Drops the packet that [`Pump::next_len`] told of: this client's
    /// messages cannot hold it.
    pub fn discard(&mut self, totals: &mut Totals) {
        if let Some(next) = self.queue.skip() {
            let meta = next.meta;
            let (packets, _) = size_of(next.remaining(), meta.header_len.into(), meta.offload);
            totals.inbound.drop(DropReason::TooBig, packets);
        }
    }

    /// Brings what the queue has dropped into the totals, and what it holds
    /// into the budget of all.
    pub fn settle(&mut self, totals: &mut Totals) {
        if self.budget.is_short() && self.queue.is_empty() {
            self.queue.relax();
        }
        self.charge();
        self.queue.set_limit(self.budget.share(self.most));
        self.count_drops(totals);
    }

    fn charge(&mut self) {
        let memory = self.queue.memory();
        if memory != self.charged {
            self.budget.change(self.charged, memory);
            self.charged = memory;
        }
    }

    fn count_drops(&mut self, totals: &mut Totals) {
        let stats = *self.queue.stats();
        let late = stats.late.segments + stats.trimmed.segments;
        let before = self.counted.late.segments + self.counted.trimmed.segments;
        let side = &mut totals.inbound;
        side.drop(DropReason::Delay, late - before);
        let overload = stats.overflow.segments - self.counted.overflow.segments;
        side.drop(DropReason::Overload, overload);
        let refused = stats.refused.segments - self.counted.refused.segments;
        side.drop(DropReason::Budget, refused);
        self.counted = stats;
    }

    /// Gives memory back that an idle client does not need.
    pub fn relax(&mut self) {
        self.queue.relax();
        self.charge();
        let seconds = self.begun.elapsed().as_secs();
        if let Some(fragments) = &self.fragments
            && fragments.incomplete(seconds) == 0
        {
            self.fragments = None;
        }
    }

    /// What waits.
    pub fn depth(&self) -> Depth {
        let queued = self.queue.stats().queued;
        Depth {
            packets: queued.segments,
            bytes: queued.bytes,
            memory: self.queue.memory() as u64,
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.budget.change(self.charged, 0);
    }
}

/// Cuts a packet that was taken and counts it. Its length, and what is left to do for it.
fn finish(out: &mut [u8], next: &Next, totals: &mut Totals) -> Option<(usize, Offload)> {
    let side = &mut totals.inbound;
    let (len, offload) = if next.cut == 0 && next.rest == 0 {
        (next.len, next.meta.offload)
    } else {
        match part(&mut out[..next.len], next) {
            Ok((parsed, offload)) => (parsed.len(), offload),
            // Nothing that was queued is refused here.
            Err(reason) => {
                side.drop(reason.into(), 1);
                return None;
            }
        }
    };
    let (packets, bytes) = size_of(len, next.meta.header_len.into(), offload);
    side.pass(packets, bytes);
    Some((len, offload))
}

/// Of a TCP super-packet what goes now.
fn part(packet: &mut [u8], next: &Next) -> Result<(Parsed, Offload), validate::DropReason> {
    let mut left = (parse(packet)?, next.meta.offload);
    if next.rest > 0 {
        left = gso::shorten(packet, &left.0, left.1, next.rest)?;
    }
    if next.cut > 0 {
        left = gso::trim(packet, &left.0, left.1, next.cut)?;
    }
    Ok(left)
}

fn micros(begun: Instant, now: Instant) -> u64 {
    let passed = now.saturating_duration_since(begun).as_micros();
    u64::try_from(passed).unwrap_or(u64::MAX)
}
