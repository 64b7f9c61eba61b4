//! Flows, and the lists in which they wait for their turns.

use super::codel::Codel;
use super::store::{NONE, Waiting, blocks};

#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) head: u32,
    pub(super) tail: u32,
    /// Memory of its packets, in blocks.
    pub(super) blocks: u32,
    pub(super) bytes: u32,
    pub(super) deficit: i64,
    pub(super) place: Place,
    /// The flow behind it in its list.
    pub(super) behind: u16,
    pub(super) codel: Codel,
}

/// The list a flow is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Nowhere,
    Fresh,
    Aged,
}

/// A list of flows, linked through them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct List {
    ends: Option<(u16, u16)>,
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            head: NONE,
            tail: NONE,
            blocks: 0,
            bytes: 0,
            deficit: 0,
            place: Place::Nowhere,
            behind: 0,
            codel: Codel::default(),
        }
    }
}

impl Flow {
    /// Takes the first packet off the chain. Its memory is still held.
    pub(super) fn detach(&mut self, head: &Waiting) {
        self.head = head.behind;
        if self.head == NONE {
            self.tail = NONE;
        }
        self.blocks -= blocks(head.len.into());
        self.bytes -= head.remaining() as u32;
    }

    /// Puts it back there.
    pub(super) fn put_first(&mut self, slot: u32, packet: &mut Waiting) {
        packet.behind = self.head;
        self.head = slot;
        if self.tail == NONE {
            self.tail = slot;
        }
        self.blocks += blocks(packet.len.into());
        self.bytes += packet.remaining() as u32;
    }
}

impl List {
    pub(super) fn first(self) -> Option<u16> {
        self.ends.map(|(first, _)| first)
    }

    pub(super) fn push(&mut self, flows: &mut [Flow], index: u16) {
        self.ends = Some(match self.ends {
            None => (index, index),
            Some((first, last)) => {
                flows[usize::from(last)].behind = index;
                (first, index)
            }
        });
    }

    pub(super) fn pop(&mut self, flows: &[Flow]) {
        self.ends = match self.ends {
            Some((first, last)) if first != last => Some((flows[usize::from(first)].behind, last)),
            _ => None,
        };
    }
}
