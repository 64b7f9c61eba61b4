//! The four dialects of the first VPN gateways, whose clients exist and cannot
//! be changed.
//!
//! They all carry one packet a message and differ in how the client learns its
//! addresses and whether messages are padded. None of them tells which it
//! speaks: the first takes a greeting for a packet, the last hangs without one.
//! So a dialect belongs to a path or listener, by configuration.

mod announce;
mod padding;
mod snat;

pub use self::announce::{Addresses, Announcement, AnnouncementError, Lease, LeaseError};
pub use self::padding::{Entropy, Noise, Padding};
pub use self::snat::{MAX_SOURCES, SourceMap};

use std::error::Error;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::record::MAX_PACKET;

/// Where clients of the last dialect look for their gateway, unless configured otherwise.
pub const DEFAULT_PATH: &str = "/tunnel";
/// The close reason that these clients know for [`crate::control::close::POOL_FULL`].
pub const POOL_FULL_REASON: &str = "No available TUN interfaces";
/// The largest packet with a length in front.
pub const MAX_PADDED: usize = 0x7fff;

/// In front of a padded packet: its length, and this bit.
const LENGTH_BIT: u16 = 0x8000;
/// The first byte of noise.
const NOISE: u8 = 0;
/// When the greeting of the padded dialect is sent, in milliseconds after the
/// upgrade. One that comes in the same segment as the answer to the upgrade is
/// lost by the original client, which then waits for ever.
const HELLO_AFTER_MS: (u32, u32) = (100, 1000);

/// Which of the four.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// No greeting; the client sends from whatever addresses it likes. IPv4 only.
    SnatRaw,
    /// The greeting announces an IPv4 subnet. IPv4 only.
    TextV4,
    /// The greeting announces an IPv4 and an IPv6 subnet.
    TextDual,
    /// The same, but padded, delayed, and with noise between packets.
    Padded,
}

/// The server's first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// How long after the upgrade it must be sent. Packets may not overtake it.
    pub after: Duration,
    /// What is sent.
    pub body: Body,
}

/// A message, by WebSocket type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A text message.
    Text(String),
    /// A binary message.
    Binary(Vec<u8>),
}

impl Body {
    /// As the other side sees it.
    pub fn as_incoming(&self) -> Incoming<'_> {
        match self {
            Self::Text(text) => Incoming::Text(text),
            Self::Binary(bytes) => Incoming::Binary(bytes),
        }
    }
}

/// A message that arrived, by WebSocket type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A text message.
    Text(&'a str),
    /// A binary message.
    Binary(&'a [u8]),
}

/// What a message means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// A packet, not validated; in the padded dialect also the greeting, on its way to the client.
    Packet(&'a [u8]),
    /// Nothing, on purpose.
    Noise,
}

/// Why a message means nothing. The packet is dropped; the connection may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Clients send no text messages.
    Text,
    /// No packet is empty.
    Empty,
    /// No packet is this long.
    TooLong {
        /// Bytes of it.
        length: usize,
    },
    /// Neither a length nor noise.
    Prefix {
        /// The first byte.
        first: u8,
    },
    /// The message ends inside the length or the packet.
    Short {
        /// Bytes announced, with the length itself.
        announced: usize,
        /// Bytes that are there.
        length: usize,
    },
}

/// Why a packet cannot be sent in this dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Its length.
    pub length: usize,
    /// The largest.
    pub limit: usize,
}

/// What goes around a packet, for those who build the message themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    prefix: [u8; 2],
    prefix_len: usize,
    /// Zero bytes behind the packet.
    pub padding: usize,
}

impl Envelope {
    /// Bytes in front of the packet.
    pub fn prefix(&self) -> &[u8] {
        &self.prefix[..self.prefix_len]
    }
}

impl Dialect {
    /// All four, oldest first.
    pub const ALL: [Self; 4] = [Self::SnatRaw, Self::TextV4, Self::TextDual, Self::Padded];

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::SnatRaw => "snat-raw",
            Self::TextV4 => "text-v4",
            Self::TextDual => "text-dual",
            Self::Padded => "padded",
        }
    }

    /// Whether its clients know IPv6. Those that do not report an error for every such packet.
    pub fn carries_v6(self) -> bool {
        matches!(self, Self::TextDual | Self::Padded)
    }

    /// Whether its clients use any source address, see [`SourceMap`], or the assigned ones.
    pub fn any_source(self) -> bool {
        self == Self::SnatRaw
    }

    /// The largest packet that it carries.
    pub fn max_packet(self) -> usize {
        match self {
            Self::SnatRaw | Self::TextV4 | Self::TextDual => MAX_PACKET,
            Self::Padded => MAX_PADDED,
        }
    }

    /// What the server says first, if anything.
    pub fn hello(
        self,
        lease: &Lease,
        padding: &Padding,
        entropy: &mut impl Entropy,
    ) -> Option<Hello> {
        let at_once = |text| Hello {
            after: Duration::ZERO,
            body: Body::Text(text),
        };
        match self {
            Self::SnatRaw => None,
            Self::TextV4 => Some(at_once(lease.announce_v4())),
            Self::TextDual => Some(at_once(lease.announce_dual())),
            Self::Padded => {
                let text = lease.announce_dual();
                let after = entropy.between(HELLO_AFTER_MS);
                let mut body = Vec::new();
                // Far shorter than the limit, so it always fits.
                self.encode(text.as_bytes(), padding, entropy, &mut body)
                    .ok()?;
                Some(Hello {
                    after: Duration::from_millis(after.into()),
                    body: Body::Binary(body),
                })
            }
        }
    }

    /// What goes around a packet of this length.
    pub fn envelope(
        self,
        length: usize,
        padding: &Padding,
        entropy: &mut impl Entropy,
    ) -> Result<Envelope, Unfit> {
        let limit = self.max_packet();
        let Ok(short @ 1..) = u16::try_from(length) else {
            return Err(Unfit { length, limit });
        };
        if length > limit {
            return Err(Unfit { length, limit });
        }
        Ok(match self {
            Self::SnatRaw | Self::TextV4 | Self::TextDual => Envelope {
                prefix: [0; 2],
                prefix_len: 0,
                padding: 0,
            },
            Self::Padded => Envelope {
                prefix: (LENGTH_BIT | short).to_be_bytes(),
                prefix_len: 2,
                padding: padding.length(entropy),
            },
        })
    }

    /// Makes a binary message of a packet, behind what `out` holds already.
    pub fn encode(
        self,
        packet: &[u8],
        padding: &Padding,
        entropy: &mut impl Entropy,
        out: &mut Vec<u8>,
    ) -> Result<(), Unfit> {
        let envelope = self.envelope(packet.len(), padding, entropy)?;
        out.reserve(envelope.prefix_len + packet.len() + envelope.padding);
        out.extend_from_slice(envelope.prefix());
        out.extend_from_slice(packet);
        out.resize(out.len() + envelope.padding, 0);
        Ok(())
    }

    /// Reads a message of either side, except the greeting of the text dialects.
    pub fn decode(self, message: Incoming<'_>) -> Result<Decoded<'_>, DecodeError> {
        let Incoming::Binary(bytes) = message else {
            return Err(DecodeError::Text);
        };
        match self {
            Self::SnatRaw | Self::TextV4 | Self::TextDual => match bytes.len() {
                0 => Err(DecodeError::Empty),
                1..=MAX_PACKET => Ok(Decoded::Packet(bytes)),
                length => Err(DecodeError::TooLong { length }),
            },
            Self::Padded => padded(bytes),
        }
    }

    /// The announcement in the greeting, for the client's side. In the padded
    /// dialect noise comes before it; that is `None`.
    pub fn read_hello(
        self,
        message: Incoming<'_>,
    ) -> Result<Option<Announcement>, AnnouncementError> {
        let text = match (self, message) {
            (Self::TextV4 | Self::TextDual, Incoming::Text(text)) => text,
            (Self::Padded, Incoming::Binary(bytes)) => match padded(bytes) {
                Ok(Decoded::Noise) => return Ok(None),
                Ok(Decoded::Packet(text)) => str::from_utf8(text).map_err(|_| AnnouncementError)?,
                Err(_) => return Err(AnnouncementError),
            },
            _ => return Err(AnnouncementError),
        };
        text.parse().map(Some)
    }
}

fn padded(bytes: &[u8]) -> Result<Decoded<'_>, DecodeError> {
    let &[first, ..] = bytes else {
        return Ok(Decoded::Noise);
    };
    if first == NOISE {
        return Ok(Decoded::Noise);
    }
    let short = |announced| DecodeError::Short {
        announced,
        length: bytes.len(),
    };
    let Some((prefix, rest)) = bytes.split_first_chunk() else {
        return Err(short(2));
    };
    let prefix = u16::from_be_bytes(*prefix);
    if prefix & LENGTH_BIT == 0 {
        return Err(DecodeError::Prefix { first });
    }
    let length = usize::from(prefix & !LENGTH_BIT);
    if length == 0 {
        return Err(DecodeError::Empty);
    }
    let packet = rest.get(..length).ok_or_else(|| short(2 + length))?;
    Ok(Decoded::Packet(packet))
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of the four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownDialect;

impl fmt::Display for UnknownDialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a dialect is one of snat-raw, text-v4, text-dual and padded")
    }
}

impl Error for UnknownDialect {}

impl FromStr for Dialect {
    type Err = UnknownDialect;

    fn from_str(text: &str) -> Result<Self, UnknownDialect> {
        Self::ALL
            .into_iter()
            .find(|dialect| dialect.name() == text)
            .ok_or(UnknownDialect)
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => f.write_str("a text message where only packets are sent"),
            Self::Empty => f.write_str("an empty packet"),
            Self::TooLong { length } => {
                write!(f, "a packet of {length} bytes, {MAX_PACKET} are possible")
            }
            Self::Prefix { first } => {
                write!(f, "first byte {first:#04x} is neither a length nor noise")
            }
            Self::Short { announced, length } => {
                write!(f, "{announced} bytes announced, {length} are there")
            }
        }
    }
}

impl Error for DecodeError {}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { length, limit } = self;
        write!(
            f,
            "a packet of {length} bytes does not fit a message of 1 to {limit}"
        )
    }
}

impl Error for Unfit {}
