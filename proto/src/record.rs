//! Records: how packets travel in the binary messages of `rvpn.packets.1`.
//!
//! A message is one record after another, each an eight-byte header and a
//! packet. Several small packets share a message, because a message costs a
//! frame header, an encryption and often a system call; a super-packet has one
//! to itself. The reader only delimits: what is inside a record is a stranger's
//! packet until the packet code has validated it.

use std::error::Error;
use std::fmt;

/// Bytes in front of every packet.
pub const HEADER_LEN: usize = 8;
/// The largest packet: the largest total length of an IPv4 header.
pub const MAX_PACKET: usize = 65_535;
/// What a message may hold if it holds more than one record.
pub const MESSAGE_LIMIT: usize = 64 * 1024;
/// A buffer of this length takes every message that we send.
pub const MAX_SENT: usize = HEADER_LEN + MAX_PACKET;
/// The largest message anybody has to accept; PROTOCOL.md promises it to senders of the future.
pub const MAX_RECEIVED: usize = 192 * 1024;

const KIND_PACKET: u8 = 1;
const FLAG_PARTIAL: u8 = 0b0000_0001;
const GSO_SHIFT: u32 = 1;
const GSO_MASK: u8 = 0b0000_1110;
const FLAGS_KNOWN: u8 = FLAG_PARTIAL | GSO_MASK;

/// What the sender's kernel left undone, in virtio's words, so that the
/// receiver's kernel or network card can do it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The transport checksum covers only the pseudo-header so far.
    pub partial: bool,
    /// Virtio's segmentation type: 0 none, 1 TCP over IPv4, 4 TCP over IPv6, 5 UDP.
    pub gso_type: u8,
    /// Payload of one segment; 0 without segmentation.
    pub gso_size: u16,
}

/// Virtio's numbers for what a super-packet is made of.
pub mod gso_type {
    /// An ordinary packet.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCP_V4: u8 = 1;
    /// TCP over IPv6.
    pub const TCP_V6: u8 = 4;
    /// UDP over either, one datagram a segment.
    pub const UDP_L4: u8 = 5;
}

impl Offload {
    /// A finished packet.
    pub const NONE: Self = Self {
        partial: false,
        gso_type: gso_type::NONE,
        gso_size: 0,
    };

    /// Whether this is a TCP super-packet, from which single segments can be dropped.
    pub fn is_tcp_super(self) -> bool {
        matches!(self.gso_type, gso_type::TCP_V4 | gso_type::TCP_V6)
    }

    /// A super-packet has a type that is known, a segment size and a checksum
    /// still to do; anything else has none of the three but maybe the last.
    fn check(self) -> Result<(), Fault> {
        match self.gso_type {
            gso_type::NONE if self.gso_size == 0 => Ok(()),
            gso_type::NONE => Err(Fault::StraySegmentSize {
                size: self.gso_size,
            }),
            gso_type::TCP_V4 | gso_type::TCP_V6 | gso_type::UDP_L4 => {
                if self.gso_size == 0 {
                    Err(Fault::NoSegmentSize)
                } else if self.partial {
                    Ok(())
                } else {
                    Err(Fault::FinishedSuperPacket)
                }
            }
            unknown => Err(Fault::UnknownGso { gso_type: unknown }),
        }
    }
}

/// One record as it lies in its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// What is left to do for the packet.
    pub offload: Offload,
    /// Where the packet begins in the message, for those who own it and rewrite in place.
    pub at: usize,
    /// The packet, not validated.
    pub packet: &'a [u8],
}

/// Walks the records of one message. After an error it ends: what follows a
/// wrong length cannot be told from packet bytes.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    message: &'a [u8],
    at: usize,
    done: bool,
}

impl<'a> Reader<'a> {
    /// Begins at the first record.
    pub fn new(message: &'a [u8]) -> Self {
        Self {
            message,
            at: 0,
            done: false,
        }
    }

    /// Bytes of the records that were read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    fn record(&mut self) -> Result<Record<'a>, Fault> {
        if self.message.len() > MAX_RECEIVED {
            return Err(Fault::MessageTooLong {
                length: self.message.len(),
            });
        }
        let rest = self.message.get(self.at..).unwrap_or_default();
        if rest.is_empty() {
            return Err(Fault::NoRecord);
        }
        let Some((header, body)) = rest.split_first_chunk::<HEADER_LEN>() else {
            return Err(Fault::ShortHeader { left: rest.len() });
        };
        let [l0, l1, kind, flags, s0, s1, r0, r1] = *header;
        let length = u16::from_le_bytes([l0, l1]);
        if kind != KIND_PACKET {
            return Err(Fault::UnknownKind { kind });
        }
        if flags & !FLAGS_KNOWN != 0 {
            return Err(Fault::UnknownFlags { flags });
        }
        if [r0, r1] != [0, 0] {
            return Err(Fault::Reserved {
                value: u16::from_le_bytes([r0, r1]),
            });
        }
        if length == 0 {
            return Err(Fault::Empty);
        }
        let Some(packet) = body.get(..usize::from(length)) else {
            return Err(Fault::PastEnd {
                length,
                left: body.len(),
            });
        };
        let offload = Offload {
            partial: flags & FLAG_PARTIAL != 0,
            gso_type: (flags & GSO_MASK) >> GSO_SHIFT,
            gso_size: u16::from_le_bytes([s0, s1]),
        };
        offload.check()?;
        let at = self.at + HEADER_LEN;
        self.at = at + packet.len();
        Ok(Record {
            offload,
            at,
            packet,
        })
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<Record<'a>, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let begin = self.at;
        let item = self.record().map_err(|fault| ReadError {
            offset: begin,
            fault,
        });
        self.done = item.is_err() || self.at == self.message.len();
        Some(item)
    }
}

/// What is wrong with a message, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadError {
    /// Where the faulty record begins in the message.
    pub offset: usize,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What can be wrong with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The message is longer than anybody may send.
    MessageTooLong {
        /// Its length.
        length: usize,
    },
    /// The message is empty.
    NoRecord,
    /// The message ends inside a header, or bytes trail the last record.
    ShortHeader {
        /// Bytes that are there.
        left: usize,
    },
    /// A kind that this version does not know.
    UnknownKind {
        /// Its number.
        kind: u8,
    },
    /// Flag bits that this version does not know.
    UnknownFlags {
        /// All flags.
        flags: u8,
    },
    /// The reserved field is not zero.
    Reserved {
        /// Its value.
        value: u16,
    },
    /// No packet has length 0.
    Empty,
    /// The packet would reach past the end of the message.
    PastEnd {
        /// The length announced.
        length: u16,
        /// Bytes that are there.
        left: usize,
    },
    /// A segmentation type that does not exist.
    UnknownGso {
        /// Its number.
        gso_type: u8,
    },
    /// A super-packet without the size of its segments.
    NoSegmentSize,
    /// A segment size on a packet that has no segments.
    StraySegmentSize {
        /// The size.
        size: u16,
    },
    /// A super-packet that claims a finished checksum; every segment needs its own.
    FinishedSuperPacket,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bad record at offset {}: {}", self.offset, self.fault)
    }
}

impl Error for ReadError {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MessageTooLong { length } => {
                write!(
                    f,
                    "the message has {length} bytes, {MAX_RECEIVED} are allowed"
                )
            }
            Self::NoRecord => f.write_str("the message holds no record"),
            Self::ShortHeader { left } => {
                write!(f, "{left} bytes are left, a header has {HEADER_LEN}")
            }
            Self::UnknownKind { kind } => {
                write!(f, "kind {kind} is unknown, only {KIND_PACKET} exists")
            }
            Self::UnknownFlags { flags } => write!(f, "flags {flags:#04x} hold unknown bits"),
            Self::Reserved { value } => write!(f, "the reserved field is {value:#06x}, not 0"),
            Self::Empty => f.write_str("the packet length is 0"),
            Self::PastEnd { length, left } => {
                write!(
                    f,
                    "the packet length is {length}, but {left} bytes are left"
                )
            }
            Self::UnknownGso { gso_type } => write!(f, "segmentation type {gso_type} is unknown"),
            Self::NoSegmentSize => f.write_str("a super-packet has segment size 0"),
            Self::StraySegmentSize { size } => {
                write!(f, "segment size {size} on a packet without segments")
            }
            Self::FinishedSuperPacket => f.write_str("a super-packet must have a partial checksum"),
        }
    }
}

impl Error for Fault {}

/// Builds one message in the caller's buffer, without allocating.
#[derive(Debug)]
pub struct Writer<'a> {
    buffer: &'a mut [u8],
    used: usize,
}

/// Why a packet is not in the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// Send this message and put the packet into the next.
    Full,
    /// No message can hold it: empty, too long, or longer than the buffer.
    Unfit {
        /// The packet's length.
        length: usize,
    },
    /// The caller gave offload values that contradict each other.
    Offload(Fault),
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the message is full, send it first"),
            Self::Unfit { length } => {
                write!(
                    f,
                    "a packet of {length} bytes fits no record of 1 to {MAX_PACKET}, or not the buffer"
                )
            }
            Self::Offload(fault) => write!(f, "contradicting offload values: {fault}"),
        }
    }
}

impl Error for WriteError {}

impl<'a> Writer<'a> {
    /// Begins a message at the start of `buffer`; [`MAX_SENT`] bytes always do.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, used: 0 }
    }

    /// Whether no record is in the message.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Bytes of the message so far.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether a packet of this length goes into this message.
    pub fn fits(&self, length: usize) -> bool {
        self.room(length).is_ok()
    }

    /// Where a packet of this length goes, for those who can produce it in
    /// place. It counts only after [`Writer::commit`].
    pub fn slot(&mut self, length: usize) -> Result<&mut [u8], WriteError> {
        self.room(length)?;
        let begin = self.used + HEADER_LEN;
        Ok(&mut self.buffer[begin..begin + length])
    }

    /// Makes the first `length` bytes of the last slot a record. They may be
    /// fewer than the slot was asked for.
    pub fn commit(&mut self, length: usize, offload: Offload) -> Result<(), WriteError> {
        self.room(length)?;
        let header = header(length, offload)?;
        self.buffer[self.used..self.used + HEADER_LEN].copy_from_slice(&header);
        self.used += HEADER_LEN + length;
        Ok(())
    }

    /// Copies a packet into the message.
    pub fn push(&mut self, packet: &[u8], offload: Offload) -> Result<(), WriteError> {
        self.slot(packet.len())?.copy_from_slice(packet);
        self.commit(packet.len(), offload)
    }

    /// The message, which lies at the start of the buffer.
    pub fn finish(self) -> &'a [u8] {
        &self.buffer[..self.used]
    }

    fn room(&self, length: usize) -> Result<(), WriteError> {
        let unfit = length == 0 || length > MAX_PACKET || HEADER_LEN + length > self.buffer.len();
        if unfit {
            return Err(WriteError::Unfit { length });
        }
        let end = self.used + HEADER_LEN + length;
        let full = end > self.buffer.len() || (self.used > 0 && end > MESSAGE_LIMIT);
        if full { Err(WriteError::Full) } else { Ok(()) }
    }
}

/// Appends a record to a message that grows, under the same limits as [`Writer`].
pub fn append(message: &mut Vec<u8>, packet: &[u8], offload: Offload) -> Result<(), WriteError> {
    let header = header(packet.len(), offload)?;
    if !message.is_empty() && message.len() + HEADER_LEN + packet.len() > MESSAGE_LIMIT {
        return Err(WriteError::Full);
    }
    message.reserve(HEADER_LEN + packet.len());
    message.extend_from_slice(&header);
    message.extend_from_slice(packet);
    Ok(())
}

/// The header alone, for those who gather a message from several buffers.
pub fn header(length: usize, offload: Offload) -> Result<[u8; HEADER_LEN], WriteError> {
    let Ok(short @ 1..) = u16::try_from(length) else {
        return Err(WriteError::Unfit { length });
    };
    offload.check().map_err(WriteError::Offload)?;
    let [l0, l1] = short.to_le_bytes();
    let [s0, s1] = offload.gso_size.to_le_bytes();
    let flags = u8::from(offload.partial) | (offload.gso_type << GSO_SHIFT);
    Ok([l0, l1, KIND_PACKET, flags, s0, s1, 0, 0])
}
