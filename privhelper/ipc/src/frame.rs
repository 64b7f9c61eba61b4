//! Frames: encoding, decoding, and what each field may hold.
//!
//! A request is [`REQUEST_LEN`] bytes and an answer [`REPLY_LEN`], whatever
//! the operation: a length that never varies cannot be wrong in a new way.
//! Fields an operation does not use are zero and are checked to be.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// First two bytes of every frame.
pub const MAGIC: u16 = 0x5652;
/// Changes whenever a frame's meaning does. Helper and gateway must agree.
pub const VERSION: u8 = 1;
/// Every request is exactly this long.
pub const REQUEST_LEN: usize = 48;
/// Every answer and notice is exactly this long.
pub const REPLY_LEN: usize = 96;

/// Position in the pool; the interface is named after it.
pub type Slot = u32;
/// Counts the leases of a slot, so that a late message about a former lease
/// can never touch the present one. Never zero for a lease.
pub type Generation = u32;
/// Policy class, by its number in the helper's own configuration.
pub type Class = u8;

/// The gateway's opaque name for a lease holder.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub [u8; 16]);

impl Key {
    /// All zero: means "no key" and is refused where a key is needed.
    pub const NONE: Key = Key([0; 16]);
}

/// A key resumes a lease, so it is shown only as far as telling two apart needs.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:02x}{:02x}..)", self.0[0], self.0[1])
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// First on every connection; a gateway taking over from another sets [`FLAG_SUCCESSOR`].
    Hello = 1,
    /// The pool's figures and constants.
    Describe = 2,
    /// A slot for this key: the lingering one it had, else a free one. Carries the TUN.
    Acquire = 3,
    /// "I still hold this lease": after the helper restarted or the gateway changed. Carries no TUN.
    Confirm = 4,
    /// The session is lost but may come back: keep the slot for its key for the linger time.
    Linger = 5,
    /// The session is over: clean the slot.
    Release = 6,
}

impl Op {
    const fn from_wire(v: u8) -> Option<Op> {
        Some(match v {
            1 => Op::Hello,
            2 => Op::Describe,
            3 => Op::Acquire,
            4 => Op::Confirm,
            5 => Op::Linger,
            6 => Op::Release,
            _ => return None,
        })
    }
}

/// Marks an answer's operation byte.
const ANSWER_BIT: u8 = 0x80;
/// Operation byte of an unsolicited notice.
const NOTICE: u8 = 0xc0;

/// In [`Request::flags`] of a `Hello`: a second gateway taking over from a living first one.
pub const FLAG_SUCCESSOR: u16 = 1;
/// In [`Reply::flags`] of an `Acquire`: the key had this slot already.
pub const FLAG_RESUMED: u16 = 1;

/// What travels over the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// IP packets through the slot's TUN.
    Packets = 1,
    /// Streams dialled from the slot's stream address.
    Streams = 2,
    /// Both.
    Both = 3,
}

impl Kind {
    /// The kind a wire byte stands for.
    pub const fn from_wire(v: u8) -> Option<Kind> {
        Some(match v {
            1 => Kind::Packets,
            2 => Kind::Streams,
            3 => Kind::Both,
            _ => return None,
        })
    }

    /// Whether a lease of this kind has a stream address.
    pub const fn has_streams(self) -> bool {
        matches!(self, Kind::Streams | Kind::Both)
    }

    /// Whether a lease of this kind comes with a TUN.
    pub const fn has_tun(self) -> bool {
        matches!(self, Kind::Packets | Kind::Both)
    }
}

/// How a request ended, or why a notice was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// No slot is free; [`Reply::retry_after_ms`] says when to ask again.
    NoCapacity = 1,
    /// Slot, generation and key do not name a lease of this gateway.
    UnknownLease = 2,
    /// The class is not in the helper's configuration.
    UnknownClass = 3,
    /// The key's former holder still has the device; ask again.
    Busy = 4,
    /// A second gateway without [`FLAG_SUCCESSOR`], or a third.
    TwoGateways = 5,
    /// `Hello` has not been said, or was said twice.
    OutOfOrder = 6,
    /// The kernel refused; the helper's log says what.
    Failed = 7,
    /// Notice: the lease's device vanished or was changed by someone else.
    DeviceLost = 8,
    /// Notice: another session acquired the lease's key.
    TakenOver = 9,
    /// Notice: forwarding is closed because the rules were removed; it reopens by itself.
    RulesLost = 10,
    /// Notice: the rules are back.
    RulesRestored = 11,
    /// Notice: the helper is shutting down.
    Closing = 12,
}

impl Status {
    const fn from_wire(v: u16) -> Option<Status> {
        Some(match v {
            0 => Status::Ok,
            1 => Status::NoCapacity,
            2 => Status::UnknownLease,
            3 => Status::UnknownClass,
            4 => Status::Busy,
            5 => Status::TwoGateways,
            6 => Status::OutOfOrder,
            7 => Status::Failed,
            8 => Status::DeviceLost,
            9 => Status::TakenOver,
            10 => Status::RulesLost,
            11 => Status::RulesRestored,
            12 => Status::Closing,
            _ => return None,
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Ok => "done",
            Status::NoCapacity => "no slot of the pool is free",
            Status::UnknownLease => "no such lease",
            Status::UnknownClass => "the helper's configuration has no such policy class",
            Status::Busy => "the former holder still has the device",
            Status::TwoGateways => "another gateway is connected",
            Status::OutOfOrder => "the request is not allowed at this point",
            Status::Failed => "the kernel refused; see the helper's log",
            Status::DeviceLost => "the device of the lease is gone",
            Status::TakenOver => "another session took over the lease",
            Status::RulesLost => "the packet rules were removed, forwarding is closed",
            Status::RulesRestored => "the packet rules are back",
            Status::Closing => "the helper is shutting down",
        })
    }
}

/// Why bytes are not a frame. The connection that sent them is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Not exactly the fixed length.
    Length(usize),
    /// Not ours at all.
    Magic(u16),
    /// Another release's protocol.
    Version(u8),
    /// No such operation.
    Op(u8),
    /// A field holds what its operation does not allow.
    Field(&'static str),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Length(n) => write!(f, "a frame of {n} bytes"),
            FrameError::Magic(m) => write!(f, "magic {m:#06x} is not {MAGIC:#06x}"),
            FrameError::Version(v) => write!(
                f,
                "protocol version {v}, this end speaks {VERSION}; install gateway and helper of one release"
            ),
            FrameError::Op(op) => write!(f, "unknown operation {op}"),
            FrameError::Field(name) => {
                write!(f, "field {name} holds a value its operation does not allow")
            }
        }
    }
}

impl std::error::Error for FrameError {}

/// What the gateway sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The operation.
    pub op: Op,
    /// Chosen by the gateway, echoed in the answer, never zero.
    pub seq: u32,
    /// For `Confirm`, `Linger`, `Release`.
    pub slot: Slot,
    /// For `Confirm`, `Linger`, `Release`.
    pub generation: Generation,
    /// For `Acquire` and `Confirm`.
    pub key: Key,
    /// For `Acquire`.
    pub kind: Option<Kind>,
    /// For `Acquire`.
    pub class: Class,
    /// For `Hello`.
    pub flags: u16,
}

impl Request {
    /// A request of this kind with every other field empty.
    pub const fn new(op: Op, seq: u32) -> Request {
        Request {
            op,
            seq,
            slot: 0,
            generation: 0,
            key: Key::NONE,
            kind: None,
            class: 0,
            flags: 0,
        }
    }

    /// The frame.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut b = [0; REQUEST_LEN];
        put(&mut b, 0, &MAGIC.to_le_bytes());
        b[2] = VERSION;
        b[3] = self.op as u8;
        put(&mut b, 4, &self.seq.to_le_bytes());
        put(&mut b, 8, &self.slot.to_le_bytes());
        put(&mut b, 12, &self.generation.to_le_bytes());
        put(&mut b, 16, &self.key.0);
        b[32] = self.kind.map_or(0, |k| k as u8);
        b[33] = self.class;
        put(&mut b, 34, &self.flags.to_le_bytes());
        b
    }

    /// Reads a frame, refusing anything its operation does not use.
    pub fn decode(bytes: &[u8]) -> Result<Request, FrameError> {
        let b: &[u8; REQUEST_LEN] = bytes
            .try_into()
            .map_err(|_| FrameError::Length(bytes.len()))?;
        let op = header(b)?;
        let op = Op::from_wire(op).ok_or(FrameError::Op(op))?;
        let request = Request {
            op,
            seq: u32_at(b, 4),
            slot: u32_at(b, 8),
            generation: u32_at(b, 12),
            key: Key(array_at(b, 16)),
            kind: match b[32] {
                0 => None,
                k => Some(Kind::from_wire(k).ok_or(FrameError::Field("kind"))?),
            },
            class: b[33],
            flags: u16_at(b, 34),
        };
        if b[36..].iter().any(|&x| x != 0) {
            return Err(FrameError::Field("reserved"));
        }
        request.check()?;
        Ok(request)
    }

    fn check(&self) -> Result<(), FrameError> {
        let names_lease = matches!(self.op, Op::Confirm | Op::Linger | Op::Release);
        let has_key = matches!(self.op, Op::Acquire | Op::Confirm);
        let rules = [
            (self.seq != 0, "seq"),
            ((self.generation != 0) == names_lease, "generation"),
            (self.slot == 0 || names_lease, "slot"),
            ((self.key != Key::NONE) == has_key, "key"),
            (self.kind.is_some() == (self.op == Op::Acquire), "kind"),
            (self.class == 0 || self.op == Op::Acquire, "class"),
            (
                self.flags == 0 || (self.op == Op::Hello && self.flags == FLAG_SUCCESSOR),
                "flags",
            ),
        ];
        match rules.iter().find(|(ok, _)| !ok) {
            Some((_, field)) => Err(FrameError::Field(field)),
            None => Ok(()),
        }
    }
}

/// What the helper answers. Constants of the pool are in every `Hello` and
/// `Describe` answer, a lease's addresses in every `Acquire` and `Confirm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The operation answered, or `None` for a notice.
    pub op: Option<Op>,
    /// The request's number, zero in a notice.
    pub seq: u32,
    /// How it went.
    pub status: Status,
    /// [`FLAG_RESUMED`].
    pub flags: u16,
    /// The lease's slot.
    pub slot: Slot,
    /// The lease's generation.
    pub generation: Generation,
    /// First address of the slot's /24: host is +1, the client's first address +2.
    pub v4: Ipv4Addr,
    /// First address of the slot's /112: host is +0, the client's first address +1.
    pub v6: Ipv6Addr,
    /// Where the slot's streams leave from.
    pub stream4: Ipv4Addr,
    /// Where the slot's streams leave from.
    pub stream6: Ipv6Addr,
    /// Of the TUN.
    pub mtu: u16,
    /// Source ports the rules translate to; no listener may be inside.
    pub nat_low: u16,
    /// Last port of that range.
    pub nat_high: u16,
    /// `TUN_F_*` bits set on the device; zero without offload.
    pub offload: u16,
    /// Slots that exist.
    pub slots: u32,
    /// Of these free.
    pub free: u32,
    /// Of these leased.
    pub leased: u32,
    /// Of these lingering.
    pub lingering: u32,
    /// Of these being cleaned.
    pub cleaning: u32,
    /// How long a lost session keeps its slot.
    pub linger_ms: u32,
    /// With [`Status::NoCapacity`] and [`Status::Busy`].
    pub retry_after_ms: u32,
}

impl Reply {
    /// An answer to `request` with every other field empty.
    pub const fn to(request: &Request, status: Status) -> Reply {
        Reply {
            op: Some(request.op),
            seq: request.seq,
            ..Reply::empty(status)
        }
    }

    /// An unsolicited message about a lease, or about the whole pool with slot and generation zero.
    pub const fn notice(status: Status, slot: Slot, generation: Generation) -> Reply {
        Reply {
            slot,
            generation,
            ..Reply::empty(status)
        }
    }

    const fn empty(status: Status) -> Reply {
        Reply {
            op: None,
            seq: 0,
            status,
            flags: 0,
            slot: 0,
            generation: 0,
            v4: Ipv4Addr::UNSPECIFIED,
            v6: Ipv6Addr::UNSPECIFIED,
            stream4: Ipv4Addr::UNSPECIFIED,
            stream6: Ipv6Addr::UNSPECIFIED,
            mtu: 0,
            nat_low: 0,
            nat_high: 0,
            offload: 0,
            slots: 0,
            free: 0,
            leased: 0,
            lingering: 0,
            cleaning: 0,
            linger_ms: 0,
            retry_after_ms: 0,
        }
    }

    /// The frame.
    pub fn encode(&self) -> [u8; REPLY_LEN] {
        let mut b = [0; REPLY_LEN];
        put(&mut b, 0, &MAGIC.to_le_bytes());
        b[2] = VERSION;
        b[3] = self.op.map_or(NOTICE, |op| op as u8 | ANSWER_BIT);
        put(&mut b, 4, &self.seq.to_le_bytes());
        put(&mut b, 8, &(self.status as u16).to_le_bytes());
        put(&mut b, 10, &self.flags.to_le_bytes());
        put(&mut b, 12, &self.slot.to_le_bytes());
        put(&mut b, 16, &self.generation.to_le_bytes());
        put(&mut b, 20, &self.v4.octets());
        put(&mut b, 24, &self.v6.octets());
        put(&mut b, 40, &self.stream4.octets());
        put(&mut b, 44, &self.stream6.octets());
        let shorts = [self.mtu, self.nat_low, self.nat_high, self.offload];
        for (i, v) in shorts.iter().enumerate() {
            put(&mut b, 60 + 2 * i, &v.to_le_bytes());
        }
        let words = [
            self.slots,
            self.free,
            self.leased,
            self.lingering,
            self.cleaning,
            self.linger_ms,
            self.retry_after_ms,
        ];
        for (i, v) in words.iter().enumerate() {
            put(&mut b, 68 + 4 * i, &v.to_le_bytes());
        }
        b
    }

    /// Reads a frame.
    pub fn decode(bytes: &[u8]) -> Result<Reply, FrameError> {
        let b: &[u8; REPLY_LEN] = bytes
            .try_into()
            .map_err(|_| FrameError::Length(bytes.len()))?;
        let op = match header(b)? {
            NOTICE => None,
            v if v & ANSWER_BIT != 0 => {
                Some(Op::from_wire(v & !ANSWER_BIT).ok_or(FrameError::Op(v))?)
            }
            v => return Err(FrameError::Op(v)),
        };
        let seq = u32_at(b, 4);
        if (seq == 0) != op.is_none() {
            return Err(FrameError::Field("seq"));
        }
        Ok(Reply {
            op,
            seq,
            status: Status::from_wire(u16_at(b, 8)).ok_or(FrameError::Field("status"))?,
            flags: u16_at(b, 10),
            slot: u32_at(b, 12),
            generation: u32_at(b, 16),
            v4: Ipv4Addr::from(array_at::<_, 4>(b, 20)),
            v6: Ipv6Addr::from(array_at::<_, 16>(b, 24)),
            stream4: Ipv4Addr::from(array_at::<_, 4>(b, 40)),
            stream6: Ipv6Addr::from(array_at::<_, 16>(b, 44)),
            mtu: u16_at(b, 60),
            nat_low: u16_at(b, 62),
            nat_high: u16_at(b, 64),
            offload: u16_at(b, 66),
            slots: u32_at(b, 68),
            free: u32_at(b, 72),
            leased: u32_at(b, 76),
            lingering: u32_at(b, 80),
            cleaning: u32_at(b, 84),
            linger_ms: u32_at(b, 88),
            retry_after_ms: u32_at(b, 92),
        })
    }
}

/// A notice as its receiver wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What happened.
    pub status: Status,
    /// To which slot; zero with generation zero means to all.
    pub slot: Slot,
    /// To which lease of it.
    pub generation: Generation,
}

fn header<const N: usize>(b: &[u8; N]) -> Result<u8, FrameError> {
    match (u16_at(b, 0), b[2]) {
        (MAGIC, VERSION) => Ok(b[3]),
        (MAGIC, v) => Err(FrameError::Version(v)),
        (m, _) => Err(FrameError::Magic(m)),
    }
}

fn put<const N: usize>(b: &mut [u8; N], at: usize, bytes: &[u8]) {
    b[at..at + bytes.len()].copy_from_slice(bytes);
}

fn array_at<const N: usize, const M: usize>(b: &[u8; N], at: usize) -> [u8; M] {
    let mut out = [0; M];
    out.copy_from_slice(&b[at..at + M]);
    out
}

fn u16_at<const N: usize>(b: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes(array_at(b, at))
}

fn u32_at<const N: usize>(b: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes(array_at(b, at))
}

#[cfg(test)]
mod tests;
