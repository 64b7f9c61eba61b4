//! A buffer that changes hands instead of being copied.

use crate::record::MAX_PACKET;

/// Bytes of a buffer.
const LEN: usize = Buffer::ROOM + MAX_PACKET;

/// Holds any packet. It lies behind some room for the header that a device
/// puts before it, and later for the one that a message does.
#[derive(Debug)]
pub struct Buffer(Box<[u8]>);

impl Buffer {
    /// Bytes before the packet.
    pub const ROOM: usize = 16;

    /// An empty one.
    pub fn new() -> Buffer {
        Buffer(vec![0; LEN].into())
    }

    /// From so many bytes before the packet to the end of the longest.
    pub fn from(&mut self, before: usize) -> &mut [u8] {
        &mut self.0[Buffer::ROOM.saturating_sub(before)..]
    }

    /// Where the packet begins, and what may follow.
    pub fn packet(&mut self) -> &mut [u8] {
        self.from(0)
    }

    /// Everything.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Everything, for whoever puts more behind the packet.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Default for Buffer {
    fn default() -> Buffer {
        Buffer::new()
    }
}
