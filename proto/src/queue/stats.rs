//! What happened to the packets of a queue.

/// Packets and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many.
    pub packets: u64,
    /// How many they are where the segments of a super-packet count singly.
    pub segments: u64,
    /// How long together, as they lie here.
    pub bytes: u64,
}

impl Tally {
    pub(super) fn add(&mut self, (bytes, segments): (usize, u64)) {
        self.packets += 1;
        self.segments += segments;
        self.bytes += bytes as u64;
    }

    pub(super) fn sub(&mut self, (bytes, segments): (usize, u64)) {
        self.packets -= 1;
        self.segments -= segments;
        self.bytes -= bytes as u64;
    }
}

/// What happened so far. Bytes accepted are always the sum of the bytes
/// delivered, queued and dropped for each cause. Of a super-packet that goes in
/// parts the last one counts as the packet; of the others, payload and segments do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Taken in.
    pub accepted: Tally,
    /// Given out, without what was cut off.
    pub delivered: Tally,
    /// Waiting.
    pub queued: Tally,
    /// Dropped because the queue was full.
    pub overflow: Tally,
    /// Dropped because they had waited too long.
    pub late: Tally,
    /// Segments cut off super-packets for the same reason; the bytes are payload.
    pub trimmed: Tally,
    /// Not taken in, because no packet is empty or that long.
    pub refused: Tally,
}
