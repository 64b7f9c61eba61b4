//! Memory for waiting packets: chains of blocks out of chunks.
//!
//! The index of a packet's first block names the packet, and its particulars
//! are kept beside that block, so that there is one thing to run out of. A long
//! packet has only that one block, and lies in a buffer of its own.

use super::{Buffer, Meta};

/// No block.
pub(super) const NONE: u32 = u32::MAX;
/// Small enough that a small packet wastes little, large enough that the
/// largest is not scattered over too many.
pub(super) const BLOCK: usize = 1024;
/// Blocks that are allocated together.
const CHUNK: u32 = 64;
/// A packet of no less keeps its buffer, of which it fills half at least.
pub(super) const LONG: usize = 32 * 1024;
/// What that is charged: the buffer, and the block that names it.
pub(super) const LONG_BLOCKS: u32 = 66;

/// Blocks that a packet needs.
pub(super) fn blocks(len: usize) -> u32 {
    match len {
        LONG.. => LONG_BLOCKS,
        _ => u32::try_from(len.div_ceil(BLOCK)).unwrap_or(NONE),
    }
}

/// A packet that waits, without its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    /// The packet behind it in its flow.
    pub(super) behind: u32,
    pub(super) len: u16,
    /// Segments dropped off its front.
    pub(super) cut: u16,
    pub(super) meta: Meta,
    pub(super) since: u64,
}

impl Waiting {
    const NOTHING: Self = Self {
        behind: NONE,
        len: 0,
        cut: 0,
        meta: Meta {
            offload: crate::record::Offload::NONE,
            header_len: 0,
        },
        since: 0,
    };

    /// Its bytes without the dropped segments.
    pub(super) fn remaining(&self) -> usize {
        usize::from(self.len) - usize::from(self.cut) * usize::from(self.meta.offload.gso_size)
    }

    /// The same in all three units.
    pub(super) fn weight(&self) -> (usize, u64) {
        self.meta.weight(self.remaining())
    }

    /// So many segments are no longer than `most` with their headers, or one
    /// if none is; nothing if that is all, or if it cannot be cut.
    pub(super) fn segments_within(&self, most: usize) -> Option<u16> {
        if self.remaining() <= most || !self.can_be_cut() {
            return None;
        }
        let headers = usize::from(self.meta.header_len);
        let segment = usize::from(self.meta.offload.gso_size);
        let fit = (most.saturating_sub(headers) / segment).max(1);
        // Fewer than there are, since all are longer than `most`, or one, and
        // more than one is left.
        u16::try_from(fit).ok()
    }

    /// Whether a segment can go and at least one stay.
    pub(super) fn can_be_cut(&self) -> bool {
        let headers = usize::from(self.meta.header_len);
        let segment = usize::from(self.meta.offload.gso_size);
        self.meta.offload.is_tcp_super()
            && segment > 0
            && headers > 0
            && self.remaining() > headers + segment
    }
}

#[derive(Debug)]
pub(super) struct Store {
    chunks: Vec<Box<[u8]>>,
    /// The block behind each block, in its packet or among the free ones.
    links: Vec<u32>,
    /// Of packets, at the index of their first block.
    waiting: Vec<Waiting>,
    /// Of long packets, at the same index.
    long: Vec<Option<Buffer>>,
    /// Buffers that held such before.
    spare: Vec<Buffer>,
    /// Buffers that do now.
    taken: usize,
    first_free: u32,
    used: u32,
    limit: u32,
}

impl Store {
    pub(super) fn new(limit: usize) -> Self {
        let mut store = Self {
            chunks: Vec::new(),
            links: Vec::new(),
            waiting: Vec::new(),
            long: Vec::new(),
            spare: Vec::new(),
            taken: 0,
            first_free: NONE,
            used: 0,
            limit: 0,
        };
        store.set_limit(limit);
        store
    }

    /// May leave more in use than allowed.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = u32::try_from(limit / BLOCK).unwrap_or(NONE - 1);
        self.spare
            .truncate(self.most_long().saturating_sub(self.taken));
    }

    /// Long packets that may be held at once.
    fn most_long(&self) -> usize {
        (self.limit / LONG_BLOCKS) as usize
    }

    pub(super) fn is_over(&self) -> bool {
        self.used > self.limit
    }

    /// Blocks that may still be used.
    pub(super) fn available(&self) -> u32 {
        self.limit.saturating_sub(self.used)
    }

    pub(super) fn held(&self) -> usize {
        self.used as usize * BLOCK
    }

    pub(super) fn memory(&self) -> usize {
        let buffers = self.taken + self.spare.len();
        (self.chunks.len() * CHUNK as usize + buffers * (LONG_BLOCKS as usize - 1)) * BLOCK
    }

    pub(super) fn relax(&mut self) {
        if self.used == 0 {
            self.chunks = Vec::new();
            self.links = Vec::new();
            self.waiting = Vec::new();
            self.long = Vec::new();
            self.spare = Vec::new();
            self.first_free = NONE;
        }
    }

    /// A buffer for a long packet, or for whoever gives one.
    pub(super) fn spare(&mut self) -> Buffer {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes a long packet with its buffer. The caller has made sure that it fits.
    pub(super) fn put_long(&mut self, buffer: Buffer, len: u16, meta: Meta, since: u64) -> u32 {
        let slot = self.unused();
        self.long[slot as usize] = Some(buffer);
        self.taken += 1;
        self.used += LONG_BLOCKS - 1;
        self.links[slot as usize] = NONE;
        self.waiting[slot as usize] = Waiting {
            behind: NONE,
            len,
            cut: 0,
            meta,
            since,
        };
        slot
    }

    /// Gives the buffer of a long packet out, for another one. Not if it is none.
    pub(super) fn exchange(&mut self, packet: u32, other: &mut Buffer) -> bool {
        let Some(buffer) = &mut self.long[packet as usize] else {
            return false;
        };
        std::mem::swap(buffer, other);
        true
    }

    /// Copies a packet in. The caller has made sure that it fits.
    pub(super) fn put(&mut self, packet: &[u8], meta: Meta, since: u64) -> u32 {
        let mut first = NONE;
        let mut last = NONE;
        for piece in packet.chunks(BLOCK) {
            let block = self.unused();
            self.block_mut(block)[..piece.len()].copy_from_slice(piece);
            if last == NONE {
                first = block;
            } else {
                self.links[last as usize] = block;
            }
            last = block;
        }
        self.links[last as usize] = NONE;
        self.waiting[first as usize] = Waiting {
            behind: NONE,
            // The queue has refused all that is longer.
            len: u16::try_from(packet.len()).unwrap_or(u16::MAX),
            cut: 0,
            meta,
            since,
        };
        first
    }

    pub(super) fn waiting(&self, packet: u32) -> &Waiting {
        &self.waiting[packet as usize]
    }

    pub(super) fn waiting_mut(&mut self, packet: u32) -> &mut Waiting {
        &mut self.waiting[packet as usize]
    }

    /// Copies a packet out; `out` is as long as the packet.
    pub(super) fn copy(&self, packet: u32, out: &mut [u8]) {
        if let Some(buffer) = &self.long[packet as usize] {
            out.copy_from_slice(&buffer.bytes()[Buffer::ROOM..][..out.len()]);
            return;
        }
        let mut block = packet;
        for piece in out.chunks_mut(BLOCK) {
            let at = (block % CHUNK) as usize * BLOCK;
            let chunk = &self.chunks[(block / CHUNK) as usize];
            piece.copy_from_slice(&chunk[at..at + piece.len()]);
            block = self.links[block as usize];
        }
    }

    pub(super) fn free(&mut self, packet: u32) {
        let mut last = packet;
        let mut count = 1;
        if let Some(buffer) = self.long[packet as usize].take() {
            self.taken -= 1;
            if self.taken + self.spare.len() < self.most_long() {
                self.spare.push(buffer);
            }
            count = LONG_BLOCKS;
        }
        while self.links[last as usize] != NONE {
            last = self.links[last as usize];
            count += 1;
        }
        self.links[last as usize] = self.first_free;
        self.first_free = packet;
        self.used -= count;
    }

    fn unused(&mut self) -> u32 {
        if self.first_free == NONE {
            self.grow();
        }
        let block = self.first_free;
        self.first_free = self.links[block as usize];
        self.used += 1;
        block
    }

    fn grow(&mut self) {
        let begin = CHUNK * self.chunks.len() as u32;
        let end = begin + CHUNK;
        self.chunks
            .push(vec![0; CHUNK as usize * BLOCK].into_boxed_slice());
        self.links.extend(begin + 1..end);
        self.links.push(self.first_free);
        self.waiting.resize(end as usize, Waiting::NOTHING);
        self.long.resize_with(end as usize, || None);
        self.first_free = begin;
    }

    fn block_mut(&mut self, block: u32) -> &mut [u8] {
        let at = (block % CHUNK) as usize * BLOCK;
        &mut self.chunks[(block / CHUNK) as usize][at..at + BLOCK]
    }
}
