//! The queue in front of a connection: where packets wait, and which of them
//! go first or not at all.
//!
//! A TUN's own queue counts packets and a socket's counts bytes of ciphertext;
//! both let one bulk flow stand in front of everything for most of a second.
//! So what waits, waits here: in one bucket for each flow, served in turn by
//! bytes (deficit round robin), flows that have just begun first. The limit is
//! in bytes of memory; above it the head of the longest bucket goes, because
//! its sender learns soonest that way. A bucket that stands for longer than a
//! burst loses packets at the head in growing frequency (CoDel, RFC 8289); of
//! a TCP super-packet only its first segment, since the signal is the same and
//! the other forty-five need not be sent again.
//!
//! Packets lie in chains of small blocks, taken from and given back to a list.
//! A ring would have to be served in order of arrival, which is what this
//! queue is there to avoid, and whole buffers of 64 KiB would hold 32 packets
//! of any size within the limit. Chains hold what the packets need, never
//! fragment, and cost a copy in and one out. That is little for a small packet;
//! long ones come and go in buffers of their own, see [`Buffer`], without a
//! copy. Nothing is allocated once the queue has seen its depth.
//!
//! Time is passed in, in microseconds of any clock that does not go back.

mod buffer;
mod codel;
mod flow;
mod pace;
mod stats;
mod store;
mod stride;
mod turn;

pub use self::buffer::Buffer;
pub use self::pace::Pace;
pub use self::stats::{Stats, Tally};
pub use self::stride::Stride;

use self::codel::Verdict;
use self::flow::Owners;
use self::store::{LONG, LONG_BLOCKS, NONE, Store, Waiting, blocks};
use self::turn::{Flow, List, Place};
use crate::gso::size_of;
use crate::record::{MAX_PACKET, MESSAGE_LIMIT, Offload};

/// Buckets of a queue, more than there are flows with something waiting, nearly always.
pub const BUCKETS: usize = 256;
/// The least limit: one packet on its way out, one on its way in.
pub const MIN_LIMIT: usize = 2 * LONG_BLOCKS as usize * store::BLOCK;
/// Less would only turn the wheel more often for each packet.
const MIN_QUANTUM: u32 = 1500;

/// How a queue behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of memory for waiting packets, at least [`MIN_LIMIT`].
    pub limit: usize,
    /// Bytes that a flow may send before it is the next one's turn.
    pub quantum: u32,
    /// The same where the socket behind the queue is slow: see [`Queue::take_part`].
    pub slow_quantum: u32,
    /// Microseconds that a packet may wait for good.
    pub target: u64,
    /// Microseconds that all may wait longer, as in a burst.
    pub interval: u64,
    /// A flow that has no more than this waiting is let be.
    pub mtu: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limit: 2 * 1024 * 1024,
            // Nearly a message, and no more than one super-packet. What goes together is
            // joined again at the other end, where every packet has its price.
            quantum: 60_000,
            // A thin flow that is not new any more would wait 13 ms for ten others
            // with the same on a link of 100 Mbit/s.
            slow_quantum: 2 * 1024,
            target: 5_000,
            interval: 100_000,
            mtu: 1500,
        }
    }
}

/// What the queue must know of a packet and gives back with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// What is left to do for it.
    pub offload: Offload,
    /// Bytes of all headers, IP and transport. Used for super-packets only.
    pub header_len: u16,
}

impl Meta {
    /// A packet of this length in all three units.
    fn weight(self, len: usize) -> (usize, u64) {
        let (segments, _) = size_of(len, self.header_len.into(), self.offload);
        (len, segments)
    }
}

/// The packet that goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Its bytes as it was pushed, which [`Queue::take`] writes.
    pub len: usize,
    /// As it was pushed.
    pub meta: Meta,
    /// So many segments at its front are dropped: whoever takes the packet has
    /// to cut them off. They are counted as dropped already. At least one remains.
    pub cut: u16,
    /// So many bytes at its end, whole segments, are still waiting: see
    /// [`Queue::take_part`]. They are to be cut off too.
    pub rest: u16,
}

impl Next {
    fn of(waiting: &Waiting) -> Next {
        Next {
            len: waiting.len.into(),
            meta: waiting.meta,
            cut: waiting.cut,
            rest: 0,
        }
    }

    /// Its bytes once it is cut.
    pub fn remaining(&self) -> usize {
        let front = usize::from(self.cut) * usize::from(self.meta.offload.gso_size);
        self.len - front - usize::from(self.rest)
    }
}

/// The queue of one connection in one direction.
#[derive(Debug)]
pub struct Queue {
    settings: Settings,
    /// The one of the two that holds now.
    quantum: u32,
    key: [u64; 2],
    store: Store,
    /// Empty while nothing has waited since the last [`Queue::relax`].
    flows: Vec<Flow>,
    /// Empty with them.
    owners: Owners,
    fresh: List,
    aged: List,
    /// Chosen, but not taken yet, and its flow.
    next: Option<(u32, u16)>,
    stats: Stats,
}

impl Queue {
    /// An empty queue; `key` is random, so that nobody can aim at the bucket of
    /// somebody else's flow.
    pub fn new(settings: Settings, key: [u64; 2]) -> Self {
        let settings = Settings {
            limit: settings.limit.max(MIN_LIMIT),
            quantum: settings.quantum.max(MIN_QUANTUM),
            slow_quantum: settings.slow_quantum.max(MIN_QUANTUM),
            ..settings
        };
        Self {
            settings,
            quantum: settings.quantum,
            key,
            store: Store::new(settings.limit),
            flows: Vec::new(),
            owners: Owners::default(),
            fresh: List::default(),
            aged: List::default(),
            next: None,
            stats: Stats::default(),
        }
    }

    /// Takes a packet in, if it is one; others may go for it.
    pub fn push(&mut self, packet: &[u8], meta: Meta, now: u64) -> bool {
        if !self.make_room(packet.len(), meta) {
            return false;
        }
        let flow = flow::hash(self.key, packet);
        let slot = if packet.len() < LONG {
            self.store.put(packet, meta, now)
        } else {
            let mut buffer = self.store.spare();
            buffer.packet()[..packet.len()].copy_from_slice(packet);
            self.store.put_long(buffer, packet.len() as u16, meta, now)
        };
        self.append(flow, slot, meta);
        true
    }

    /// The same with the packet at its place in a buffer, which may be another
    /// one afterwards.
    pub fn push_buffer(&mut self, buffer: &mut Buffer, len: usize, meta: Meta, now: u64) -> bool {
        if len < LONG {
            return self.push(&buffer.packet()[..len], meta, now);
        }
        if !self.make_room(len, meta) {
            return false;
        }
        let flow = flow::hash(self.key, &buffer.packet()[..len]);
        let buffer = std::mem::replace(buffer, self.store.spare());
        let slot = self.store.put_long(buffer, len as u16, meta, now);
        self.append(flow, slot, meta);
        true
    }

    /// Whether it is a packet for which there is room, or can be.
    fn make_room(&mut self, len: usize, meta: Meta) -> bool {
        let mut fits = (1..=MAX_PACKET).contains(&len);
        while fits && self.store.available() < blocks(len) {
            fits = self.drop_from_longest();
        }
        if !fits {
            self.stats.refused.add(meta.weight(len));
        } else if self.flows.is_empty() {
            self.flows.resize_with(BUCKETS, Flow::default);
            self.owners = Owners::new();
        }
        fits
    }

    /// Puts a packet at the end of its flow.
    fn append(&mut self, hash: u64, slot: u32, meta: Meta) {
        let len = usize::from(self.store.waiting(slot).len);
        let flows = &self.flows;
        let idle = |index: u16| flows[usize::from(index)].place == Place::Nowhere;
        let (index, new) = self.owners.bucket(hash, idle);
        let flow = &mut self.flows[usize::from(index)];
        if new {
            *flow = Flow::default();
        }
        if flow.head == NONE {
            flow.head = slot;
        } else {
            self.store.waiting_mut(flow.tail).behind = slot;
        }
        flow.tail = slot;
        flow.blocks += blocks(len);
        flow.bytes += len as u32;
        if flow.place == Place::Nowhere {
            flow.place = Place::Fresh;
            flow.deficit = self.quantum.into();
            self.fresh.push(&mut self.flows, index);
        }
        self.stats.accepted.add(meta.weight(len));
        self.stats.queued.add(meta.weight(len));
    }

    /// Chooses the packet that goes next. It stays the next one until it is taken.
    pub fn next(&mut self, now: u64) -> Option<Next> {
        if self.next.is_none() {
            self.next = self.choose(now);
        }
        let (slot, _) = self.next?;
        Some(Next::of(self.store.waiting(slot)))
    }

    /// Writes the packet that [`Queue::next`] chose to the start of `out`,
    /// uncut, and lets it go. Nothing happens if none was chosen or if `out` is
    /// too short for it.
    pub fn take(&mut self, out: &mut [u8]) -> Option<Next> {
        let (slot, _) = self.next?;
        let waiting = *self.store.waiting(slot);
        let next = Next::of(&waiting);
        self.store.copy(slot, out.get_mut(..next.len)?);
        self.let_go(slot, &waiting);
        Some(next)
    }

    /// The same, but of a TCP super-packet that is longer than `most` bytes only
    /// as many segments as are not, at least one. The others stay, as the first
    /// of their flow, and whatever is more urgent can go before them.
    pub fn take_part(&mut self, out: &mut [u8], most: usize) -> Option<Next> {
        self.pace(most);
        let (slot, index) = self.next?;
        let waiting = *self.store.waiting(slot);
        let Some(segments) = waiting.segments_within(most) else {
            return self.take(out);
        };
        let mut next = Next::of(&waiting);
        self.store.copy(slot, out.get_mut(..next.len)?);
        self.next = None;
        let left = self.store.waiting_mut(slot);
        left.cut += segments;
        let gone = waiting.remaining() - left.remaining();
        let headers = usize::from(waiting.meta.header_len);
        // At most the length, which was a u16.
        next.rest = (left.remaining() - headers) as u16;
        let flow = &mut self.flows[usize::from(index)];
        flow.deficit += left.remaining() as i64;
        flow.put_first(slot, left);
        let (queued, delivered) = (&mut self.stats.queued, &mut self.stats.delivered);
        queued.bytes -= gone as u64;
        queued.segments -= u64::from(segments);
        delivered.bytes += gone as u64;
        delivered.segments += u64::from(segments);
        Some(next)
    }

    /// The same into a buffer, at the packet's place there. The buffer is
    /// exchanged for that of a long packet, if it is to go whole.
    pub fn take_buffer(&mut self, out: &mut Buffer, most: usize) -> Option<Next> {
        let (slot, _) = self.next?;
        let waiting = *self.store.waiting(slot);
        if waiting.segments_within(most).is_some() || !self.store.exchange(slot, out) {
            return self.take_part(out.packet(), most);
        }
        self.pace(most);
        self.let_go(slot, &waiting);
        Some(Next::of(&waiting))
    }

    /// Less than a whole message is what a slow socket is given, and then turns are short.
    fn pace(&mut self, most: usize) {
        self.quantum = match most < MESSAGE_LIMIT {
            true => self.settings.slow_quantum,
            false => self.settings.quantum,
        };
    }

    /// Lets the packet that [`Queue::next`] chose go unread, for those that have
    /// no use for it. It counts as delivered.
    pub fn skip(&mut self) -> Option<Next> {
        let (slot, _) = self.next?;
        let waiting = *self.store.waiting(slot);
        self.let_go(slot, &waiting);
        Some(Next::of(&waiting))
    }

    fn let_go(&mut self, slot: u32, waiting: &Waiting) {
        self.store.free(slot);
        self.next = None;
        let weight = waiting.weight();
        self.stats.queued.sub(weight);
        self.stats.delivered.add(weight);
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.stats.queued.packets == 0
    }

    /// Bytes of waiting packets.
    pub fn bytes(&self) -> u64 {
        self.stats.queued.bytes
    }

    /// Memory that waiting packets hold, which is what the limit is about.
    pub fn held(&self) -> usize {
        self.store.held()
    }

    /// Memory that the queue has taken from the system for packets.
    pub fn memory(&self) -> usize {
        self.store.memory()
    }

    /// Another limit from now on, at least [`MIN_LIMIT`]. What is above it goes
    /// as if it had just been exceeded.
    pub fn set_limit(&mut self, limit: usize) {
        let limit = limit.max(MIN_LIMIT);
        if limit != self.settings.limit {
            self.settings.limit = limit;
            self.store.set_limit(limit);
            while self.store.is_over() && self.drop_from_longest() {}
        }
    }

    /// What happened so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Gives its memory back if nothing waits. For connections that have become
    /// silent; a busy one would only take it again.
    pub fn relax(&mut self) {
        if self.is_empty() {
            (self.flows, self.owners) = (Vec::new(), Owners::default());
            (self.fresh, self.aged) = (List::default(), List::default());
            self.store.relax();
        }
    }

    fn choose(&mut self, now: u64) -> Option<(u32, u16)> {
        loop {
            let (place, index) = match (self.fresh.first(), self.aged.first()) {
                (Some(index), _) => (Place::Fresh, index),
                (None, Some(index)) => (Place::Aged, index),
                (None, None) => return None,
            };
            let flow = &mut self.flows[usize::from(index)];
            if flow.deficit <= 0 {
                flow.deficit += i64::from(self.quantum);
                self.demote(place, index);
                continue;
            }
            if let Some(slot) = self.head_in_time(index, now) {
                let remaining = self.store.waiting(slot).remaining();
                self.flows[usize::from(index)].deficit -= remaining as i64;
                return Some((slot, index));
            }
            // A fresh flow that ran empty waits for one turn of the others
            // before it is fresh again, else it could stay ahead of them all.
            if place == Place::Fresh && self.aged.first().is_some() {
                self.demote(place, index);
            } else {
                self.leave(place, index);
            }
        }
    }

    /// Takes the first flow of a list out of it.
    fn leave(&mut self, place: Place, index: u16) {
        match place {
            Place::Fresh => self.fresh.pop(&self.flows),
            Place::Aged => self.aged.pop(&self.flows),
            Place::Nowhere => {}
        }
        self.flows[usize::from(index)].place = Place::Nowhere;
    }

    fn demote(&mut self, from: Place, index: u16) {
        self.leave(from, index);
        self.flows[usize::from(index)].place = Place::Aged;
        self.aged.push(&mut self.flows, index);
    }

    /// The first packet of a flow that has not waited too long, out of the flow.
    fn head_in_time(&mut self, index: u16, now: u64) -> Option<u32> {
        loop {
            let flow = &mut self.flows[usize::from(index)];
            if flow.head == NONE {
                flow.codel.emptied();
                return None;
            }
            let slot = flow.head;
            let waiting = self.store.waiting_mut(slot);
            let behind = flow.bytes - waiting.remaining() as u32;
            let waited = now.saturating_sub(waiting.since);
            match flow.codel.judge(&self.settings, waited, behind, now) {
                Verdict::Deliver => {
                    flow.detach(waiting);
                    return Some(slot);
                }
                Verdict::Drop if waiting.can_be_cut() => {
                    let segment = waiting.meta.offload.gso_size;
                    waiting.cut += 1;
                    flow.bytes -= u32::from(segment);
                    self.stats.queued.bytes -= u64::from(segment);
                    self.stats.queued.segments -= 1;
                    self.stats.trimmed.add((segment.into(), 1));
                }
                Verdict::Drop => {
                    let weight = waiting.weight();
                    flow.detach(waiting);
                    self.store.free(slot);
                    self.stats.queued.sub(weight);
                    self.stats.late.add(weight);
                }
            }
        }
    }

    fn drop_from_longest(&mut self) -> bool {
        let Some(flow) = self.flows.iter_mut().max_by_key(|flow| flow.blocks) else {
            return false;
        };
        if flow.head == NONE {
            return false;
        }
        let slot = flow.head;
        let waiting = self.store.waiting(slot);
        let weight = waiting.weight();
        flow.detach(waiting);
        self.store.free(slot);
        self.stats.queued.sub(weight);
        self.stats.overflow.add(weight);
        true
    }
}
