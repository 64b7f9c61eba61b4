//! Random inner packets, right in every field, and ways to spoil them.
//!
//! Made for the properties that are held over ten million packets, and for
//! clients that attack a gateway on purpose. Checksums are computed here once
//! more, as plainly as they can be, so that a property compares two
//! computations and not one with itself. What is made depends on nothing but
//! the generator's state and the addresses: the same state with other addresses
//! gives the same packet between other hosts.

mod build;

use std::net::{Ipv4Addr, Ipv6Addr};

use self::build::{Body, Builder, Ends, Size};
use super::{Side, Version};
use crate::record::{Offload, gso_type};

/// Bytes that the longest packet needs.
pub const ROOM: usize = 16 * 1024;

/// A small generator (xorshift64*), seeded so that a failure can be seen again.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The same seed gives the same numbers. Any will do.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        // Zero is the one state that never changes.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any number.
    pub const fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, or 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let wide = u128::from(self.bits() >> 32) * limit as u128;
        usize::try_from(wide >> 32).unwrap_or_default()
    }

    /// A byte.
    pub const fn byte(&mut self) -> u8 {
        (self.bits() >> 56) as u8
    }

    /// A 16-bit number.
    pub const fn word(&mut self) -> u16 {
        (self.bits() >> 48) as u16
    }

    /// True once in so many times.
    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// Random bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let random = self.bits().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
}

/// Which addresses the client has in what is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

/// What was made, at the start of the buffer.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// Its length.
    pub len: usize,
    /// What is left to do for it.
    pub offload: Offload,
    /// What a translation of the client's address has to change.
    pub touched: Touched,
}

/// Where the client's address and all that depends on it lie in a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    ranges: [(usize, usize); 8],
    used: usize,
}

impl Touched {
    fn push(&mut self, at: usize, length: usize) {
        if let Some(range) = self.ranges.get_mut(self.used) {
            *range = (at, at + length);
            self.used += 1;
        }
    }

    /// Whether this byte may change.
    #[must_use]
    pub fn contains(&self, at: usize) -> bool {
        self.ranges[..self.used]
            .iter()
            .any(|(begin, end)| (*begin..*end).contains(&at))
    }

    /// Forgets what a cut here removes; what it would split goes altogether.
    /// Returns where the cut is then.
    fn cut(&mut self, len: usize) -> usize {
        let (mut kept, mut at) = (Self::default(), len);
        for (begin, end) in &self.ranges[..self.used] {
            if *end <= len {
                kept.push(*begin, end - begin);
            } else {
                at = at.min(*begin);
            }
        }
        *self = kept;
        at
    }
}

/// Makes a packet that a client sends (`client` is the source) or gets, which
/// every validation passes with an MTU of 1500.
pub fn packet(rng: &mut Rng, client: &Client, side: Side, out: &mut [u8; ROOM]) -> Made {
    let version = if rng.one_in(2) {
        Version::V6
    } else {
        Version::V4
    };
    let ends = ends(rng, version, client, side);
    let mut builder = Builder::new(out);
    let size = match rng.below(16) {
        0..=10 => Size::UpTo(64),
        11..=14 => Size::UpTo(600),
        _ => Size::UpTo(1300),
    };
    let body = match rng.below(32) {
        0..=9 => Body::Tcp,
        10..=17 => Body::Udp,
        18..=20 => Body::Echo,
        21..=26 => Body::Error,
        27..=28 => Body::First,
        29..=30 => Body::Later,
        _ => return super_packet(rng, &mut builder, &ends),
    };
    let partial = matches!(body, Body::Tcp | Body::Udp) && rng.one_in(6);
    let len = match body {
        Body::Error => {
            let other = self::ends(rng, version, client, side.opposite());
            builder.error(rng, &ends, &other)
        }
        Body::Tcp | Body::Udp | Body::Echo | Body::First | Body::Later => {
            builder.packet(rng, 0, &ends, body, size, partial, false)
        }
    };
    let offload = Offload {
        partial,
        ..Offload::NONE
    };
    Made {
        len,
        offload,
        touched: builder.touched(),
    }
}

fn super_packet(rng: &mut Rng, builder: &mut Builder<'_>, ends: &Ends) -> Made {
    let tcp = rng.one_in(2);
    let gso_size = u16::try_from(256 + rng.below(1100)).unwrap_or(256);
    let payload = usize::from(gso_size) + 1 + rng.below(8000);
    let (body, gso_type) = match (tcp, ends.version) {
        (true, Version::V4) => (Body::Tcp, gso_type::TCP_V4),
        (true, Version::V6) => (Body::Tcp, gso_type::TCP_V6),
        (false, _) => (Body::Udp, gso_type::UDP_L4),
    };
    let len = builder.packet(rng, 0, ends, body, Size::Super(payload), true, false);
    Made {
        len,
        offload: Offload {
            partial: true,
            gso_type,
            gso_size,
        },
        touched: builder.touched(),
    }
}

fn ends(rng: &mut Rng, version: Version, client: &Client, side: Side) -> Ends {
    let mut peer = [0; 16];
    rng.fill(&mut peer);
    let mut own = [0; 16];
    match version {
        Version::V4 => {
            own[..4].copy_from_slice(&client.v4.octets());
            // A public address, the odd private one among them.
            peer[0] = 1 + peer[0] % 100;
        }
        Version::V6 => {
            own = client.v6.octets();
            peer[0] = 0x20 | (peer[0] & 0x1f);
        }
    }
    let (source, destination) = match side {
        Side::Source => (own, peer),
        Side::Destination => (peer, own),
    };
    Ends {
        version,
        source,
        destination,
        client: side,
    }
}

/// Spoils a packet, or leaves it right now and then. Returns its new length.
pub fn spoil(rng: &mut Rng, packet: &mut [u8; ROOM], len: usize) -> usize {
    let mut len = len.min(ROOM);
    for _ in 0..=rng.below(3) {
        let head = len.clamp(1, 128);
        match rng.below(8) {
            0 => len = rng.below(len + 1),
            1 => len = rng.below(64).min(len),
            2 => packet[0] = rng.byte(),
            // Where lengths, fragments, protocols and header sizes are told.
            3 => packet[rng.below(10)] = rng.byte(),
            4 => packet[rng.below(60)] = rng.byte(),
            5 => packet[rng.below(head)] ^= 1 << rng.below(8),
            6 => {
                // Many headers are told by a small number.
                let next = [0, 1, 4, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 132, 253];
                packet[[6, 9, 40, 48][rng.below(4)]] = next[rng.below(next.len())];
            }
            _ => {
                let begin = rng.below(head);
                let end = (begin + 1 + rng.below(8)).min(ROOM);
                rng.fill(&mut packet[begin..end]);
            }
        }
    }
    len
}
