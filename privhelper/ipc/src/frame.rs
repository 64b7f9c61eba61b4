//! Frames: encoding, decoding, and what each field may hold.
//!
//! A request is [`REQUEST_LEN`] bytes and an answer [`REPLY_LEN`], whatever
//! the operation: a length that never varies cannot be wrong in a new way.
//! Fields an operation does not use are zero and are checked to be. The fields
//! of each frame are listed once, below, in the order of their bytes.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::slice::IterMut;

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

/// What a field can be: it has a fixed number of bytes, and an empty value.
trait Field: Sized {
    const EMPTY: Self;
    fn put(self, to: &mut IterMut<'_, u8>);
    fn read(from: &mut &[u8]) -> Option<Self>;
}

/// Fields: the empty one, one read from its bytes if these are any, and its bytes.
macro_rules! fields {
    ($($name:ty: $empty:expr, $read:expr, $bytes:expr;)*) => { $(
        impl Field for $name {
            const EMPTY: $name = $empty;
            fn put(self, to: &mut IterMut<'_, u8>) {
                ($bytes)(self).into_iter().zip(to).for_each(|(from, to)| *to = from);
            }
            fn read(from: &mut &[u8]) -> Option<$name> {
                let (bytes, rest) = from.split_first_chunk()?;
                *from = rest;
                ($read)(*bytes)
            }
        }
    )* };
}

fields! {
    u8: 0, |b| Some(u8::from_le_bytes(b)), u8::to_le_bytes;
    u16: 0, |b| Some(u16::from_le_bytes(b)), u16::to_le_bytes;
    u32: 0, |b| Some(u32::from_le_bytes(b)), u32::to_le_bytes;
    Key: Key::NONE, |b| Some(Key(b)), |key: Key| key.0;
    Ipv4Addr: Ipv4Addr::UNSPECIFIED, |b: [u8; 4]| Some(b.into()), |a: Ipv4Addr| a.octets();
    Ipv6Addr: Ipv6Addr::UNSPECIFIED, |b: [u8; 16]| Some(b.into()), |a: Ipv6Addr| a.octets();
    Status: Status::Ok, |b| Status::from_wire(u16::from_le_bytes(b)), |s: Status| (s as u16).to_le_bytes();
    Op: Op::Hello, |[b]: [u8; 1]| Op::from_wire(b), |op: Op| [op as u8];
    // In an answer.
    Option<Op>: None,
        |[b]: [u8; 1]| if b == NOTICE { Some(None) } else { Op::from_wire(b.checked_sub(ANSWER_BIT)?).map(Some) },
        |op: Option<Op>| [op.map_or(NOTICE, |op| op as u8 | ANSWER_BIT)];
    Option<Kind>: None,
        |[b]: [u8; 1]| if b == 0 { Some(None) } else { Kind::from_wire(b).map(Some) },
        |kind: Option<Kind>| [kind.map_or(0, |kind| kind as u8)];
}

/// Fields that are a number, and a word and a text for it. Not every number is one.
macro_rules! numbers {
    ($(#[$about:meta])* $name:ident: $int:ty {
        $($(#[$doc:meta])* $word:ident = $number:literal $text:literal,)*
    }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($int)]
        pub enum $name { $($(#[$doc])* $word = $number,)* }

        impl $name {
            /// What the number stands for.
            pub const fn from_wire(number: $int) -> Option<$name> {
                match number {
                    $($number => Some($name::$word),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($name::$word => $text,)* })
            }
        }
    };
}

numbers! {
    /// What a request asks for.
    Op: u8 {
        /// First on every connection; a gateway taking over from another sets [`FLAG_SUCCESSOR`].
        Hello = 1 "hello",
        /// The pool's figures and constants.
        Describe = 2 "describe",
        /// A slot for this key: the lingering one it had, else a free one. Carries the TUN.
        Acquire = 3 "acquire",
        /// "I still hold this lease": after the helper restarted or the gateway changed. Carries no TUN.
        Confirm = 4 "confirm",
        /// The session is lost but may come back: keep the slot for its key for the linger time.
        Linger = 5 "linger",
        /// The session is over: clean the slot.
        Release = 6 "release",
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

numbers! {
    /// What travels over the lease.
    Kind: u8 {
        /// IP packets through the slot's TUN.
        Packets = 1 "packets",
        /// Streams dialled from the slot's stream address.
        Streams = 2 "streams",
        /// Both.
        Both = 3 "packets and streams",
    }
}

impl Kind {
    /// Whether a lease of this kind has a stream address.
    pub const fn has_streams(self) -> bool {
        matches!(self, Kind::Streams | Kind::Both)
    }

    /// Whether a lease of this kind comes with a TUN.
    pub const fn has_tun(self) -> bool {
        matches!(self, Kind::Packets | Kind::Both)
    }
}

numbers! {
    /// How a request ended, or why a notice was sent.
    Status: u16 {
        /// Done.
        Ok = 0 "done",
        /// [`Reply::retry_after_ms`] says when to ask again.
        NoCapacity = 1 "no slot of the pool is free",
        /// Slot, generation and key do not name a lease of this gateway.
        UnknownLease = 2 "no such lease",
        /// The class is not in the helper's configuration.
        UnknownClass = 3 "the helper's configuration has no such policy class",
        /// Ask again.
        Busy = 4 "the former holder still has the device",
        /// A second gateway without [`FLAG_SUCCESSOR`], or a third.
        TwoGateways = 5 "another gateway is connected",
        /// `Hello` has not been said, or was said twice.
        OutOfOrder = 6 "the request is not allowed at this point",
        /// The kernel refused.
        Failed = 7 "the kernel refused; see the helper's log",
        /// Notice: the lease's device vanished or was changed by someone else.
        DeviceLost = 8 "the device of the lease is gone",
        /// Notice: another session acquired the lease's key.
        TakenOver = 9 "another session took over the lease",
        /// Notice; it reopens by itself.
        RulesLost = 10 "the packet rules were removed, forwarding is closed",
        /// Notice.
        RulesRestored = 11 "the packet rules are back",
        /// Notice.
        Closing = 12 "the helper is shutting down",
    }
}

/// Why bytes are not a frame. The connection that sent them is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not exactly the fixed length.
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// Not ours at all.
    #[error("magic {0:#06x} is not {MAGIC:#06x}")]
    Magic(u16),
    /// Another release's protocol.
    #[error("protocol version {0}, not {VERSION}; install gateway and helper of one release")]
    Version(u8),
    /// No such operation.
    #[error("unknown operation {0}")]
    Op(u8),
    /// A field holds what its operation does not allow.
    #[error("field {0} holds a value its operation does not allow")]
    Field(&'static str),
}

/// A frame by its fields: after magic and version, in this order and no others.
macro_rules! frame {
    ($(#[$about:meta])* $name:ident: $len:ident {
        $(#[$first:meta])* op: $op:ty, $($(#[$doc:meta])* $field:ident: $kind:ty,)*
    }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $(#[$first])*
            pub op: $op,
            $($(#[$doc])* pub $field: $kind,)*
        }

        impl $name {
            const EMPTY: $name = $name { op: <$op>::EMPTY, $($field: <$kind>::EMPTY,)* };

            /// The frame.
            pub fn encode(&self) -> [u8; $len] {
                let mut frame = [0; $len];
                let mut to = frame.iter_mut();
                MAGIC.put(&mut to);
                VERSION.put(&mut to);
                self.op.put(&mut to);
                $(self.$field.put(&mut to);)*
                frame
            }

            /// Reads a frame, refusing anything its operation does not use.
            pub fn decode(bytes: &[u8]) -> Result<$name, FrameError> {
                let frame: &[u8; $len] =
                    bytes.try_into().map_err(|_| FrameError::Length(bytes.len()))?;
                let mut rest = after_header(frame)?;
                let frame = $name {
                    op: <$op>::read(&mut rest).ok_or(FrameError::Op(frame[3]))?,
                    $($field: <$kind>::read(&mut rest).ok_or(FrameError::Field(stringify!($field)))?,)*
                };
                if rest.iter().any(|&b| b != 0) {
                    return Err(FrameError::Field("reserved"));
                }
                frame.check()?;
                Ok(frame)
            }
        }
    };
}

fn after_header(mut frame: &[u8]) -> Result<&[u8], FrameError> {
    match (u16::read(&mut frame), u8::read(&mut frame)) {
        (Some(MAGIC), Some(VERSION)) => Ok(frame),
        (Some(MAGIC), version) => Err(FrameError::Version(version.unwrap_or(0))),
        (magic, _) => Err(FrameError::Magic(magic.unwrap_or(0))),
    }
}

frame! {
    /// What the gateway sends.
    Request: REQUEST_LEN {
        /// The operation.
        op: Op,
        /// Chosen by the gateway, echoed in the answer, never zero.
        seq: u32,
        /// For `Confirm`, `Linger`, `Release`.
        slot: Slot,
        /// For `Confirm`, `Linger`, `Release`.
        generation: Generation,
        /// For `Acquire` and `Confirm`.
        key: Key,
        /// For `Acquire`.
        kind: Option<Kind>,
        /// For `Acquire`.
        class: Class,
        /// For `Hello`.
        flags: u16,
    }
}

impl Request {
    /// A request of this kind with every other field empty.
    pub const fn new(op: Op, seq: u32) -> Request {
        let mut request = Request::EMPTY;
        (request.op, request.seq) = (op, seq);
        request
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
            (self.flags == 0 || self.op == Op::Hello, "flags"),
            (self.flags & !FLAG_SUCCESSOR == 0, "flags"),
        ];
        let broken = rules.iter().find(|(ok, _)| !ok);
        broken.map_or(Ok(()), |(_, field)| Err(FrameError::Field(field)))
    }
}

frame! {
    /// What the helper answers. Constants of the pool are in every `Hello` and
    /// `Describe` answer, a lease's addresses in every `Acquire` and `Confirm`.
    Reply: REPLY_LEN {
        /// The operation answered, or `None` for a notice.
        op: Option<Op>,
        /// The request's number, zero in a notice.
        seq: u32,
        /// How it went.
        status: Status,
        /// [`FLAG_RESUMED`].
        flags: u16,
        /// The lease's slot.
        slot: Slot,
        /// The lease's generation.
        generation: Generation,
        /// First address of the slot's /24: host is +1, the client's first address +2.
        v4: Ipv4Addr,
        /// First address of the slot's /112: host is +0, the client's first address +1.
        v6: Ipv6Addr,
        /// Where the slot's streams leave from.
        stream4: Ipv4Addr,
        /// Where the slot's streams leave from.
        stream6: Ipv6Addr,
        /// Of the TUN.
        mtu: u16,
        /// Source ports the rules translate to; no listener may be inside.
        nat_low: u16,
        /// Last port of that range.
        nat_high: u16,
        /// `TUN_F_*` bits set on the device; zero without offload.
        offload: u16,
        /// Slots that exist.
        slots: u32,
        /// Of these free.
        free: u32,
        /// Of these leased.
        leased: u32,
        /// Of these lingering.
        lingering: u32,
        /// Of these being cleaned.
        cleaning: u32,
        /// How long a lost session keeps its slot.
        linger_ms: u32,
        /// With [`Status::NoCapacity`] and [`Status::Busy`].
        retry_after_ms: u32,
    }
}

impl Reply {
    /// An answer to `request` with every other field empty.
    pub const fn to(request: &Request, status: Status) -> Reply {
        let mut reply = Reply::notice(status, 0, 0);
        (reply.op, reply.seq) = (Some(request.op), request.seq);
        reply
    }

    /// An unsolicited message about a lease, or about the whole pool with slot and generation zero.
    pub const fn notice(status: Status, slot: Slot, generation: Generation) -> Reply {
        let mut reply = Reply::EMPTY;
        (reply.status, reply.slot, reply.generation) = (status, slot, generation);
        reply
    }

    fn check(&self) -> Result<(), FrameError> {
        let fits = (self.seq == 0) == self.op.is_none();
        fits.then_some(()).ok_or(FrameError::Field("seq"))
    }
}

#[cfg(test)]
mod tests;
