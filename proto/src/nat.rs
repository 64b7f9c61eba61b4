//! Gives a client other addresses, in place.
//!
//! A native client keeps one pair of addresses for ever while its lease comes
//! and goes; the first dialect's clients choose their own. Either way only
//! addresses and checksums of a packet change, and each checksum is brought up
//! to date with what changed: it stays exactly as right, or as wrong, as it was.
//! An ICMP error quotes a packet that went the other way. Its address is
//! translated too, or the client could not tell which connection is meant; one
//! that quotes a packet of somebody else is dropped, because it is how a
//! neighbour's connection would be attacked.

mod own;
mod sources;

use std::net::{Ipv4Addr, Ipv6Addr};

pub use self::own::OwnAddresses;
pub use self::sources::SourceNat;
use crate::checksum::Delta;
use crate::packet::{
    Icmp, Parsed, Quoted, Side, Transport, Version, array, parse_quoted, protocol, put, word,
};
use crate::validate::DropReason;

/// All that is ever changed lies within so many bytes of a validated packet, so
/// it is enough to have these in one writable piece.
pub const HEAD: usize = 128;

/// What is in the field of a packet's transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// The finished checksum.
    Full,
    /// Only the sum of the pseudo-header, for a kernel or a card to finish.
    Partial,
}

impl From<crate::record::Offload> for Sum {
    fn from(offload: crate::record::Offload) -> Self {
        if offload.partial {
            Self::Partial
        } else {
            Self::Full
        }
    }
}

/// The addresses of one client on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nat {
    v4: Pair<4>,
    v6: Pair<16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair<const N: usize> {
    inner: [u8; N],
    lease: [u8; N],
    /// From inner to lease.
    delta: Delta,
}

impl<const N: usize> Pair<N> {
    fn new(inner: [u8; N], lease: [u8; N]) -> Self {
        let delta = Delta::between(&inner, &lease);
        Self {
            inner,
            lease,
            delta,
        }
    }

    fn outbound(&self) -> Change<N> {
        Change {
            side: Side::Source,
            old: self.inner,
            new: self.lease,
            delta: self.delta,
        }
    }

    fn inbound(&self) -> Change<N> {
        Change {
            side: Side::Destination,
            old: self.lease,
            new: self.inner,
            delta: self.delta.inverse(),
        }
    }
}

impl Nat {
    /// Between the addresses the client has and those the TUN knows it by.
    #[must_use]
    pub fn new(inner4: Ipv4Addr, lease4: Ipv4Addr, inner6: Ipv6Addr, lease6: Ipv6Addr) -> Self {
        Self {
            v4: Pair::new(inner4.octets(), lease4.octets()),
            v6: Pair::new(inner6.octets(), lease6.octets()),
        }
    }

    /// Client to TUN. `packet` holds at least the first [`HEAD`] bytes of the
    /// packet that was parsed, or all of it.
    pub fn outbound(&self, packet: &mut [u8], parsed: &Parsed, sum: Sum) -> Result<(), DropReason> {
        match parsed.version() {
            Version::V4 => {
                let change = self.v4.outbound();
                change.outbound(packet, parsed, sum)
            }
            Version::V6 => {
                let change = self.v6.outbound();
                change.outbound(packet, parsed, sum)
            }
        }
    }

    /// TUN to client, with the same promise about `packet`.
    pub fn inbound(&self, packet: &mut [u8], parsed: &Parsed, sum: Sum) -> Result<(), DropReason> {
        match parsed.version() {
            Version::V4 => self.v4.inbound().apply(packet, parsed, sum),
            Version::V6 => self.v6.inbound().apply(packet, parsed, sum),
        }
    }
}

/// One address becomes another, at one place of a packet.
#[derive(Clone, Copy, Debug)]
struct Change<const N: usize> {
    side: Side,
    old: [u8; N],
    new: [u8; N],
    delta: Delta,
}

impl<const N: usize> Change<N> {
    fn outbound(&self, packet: &mut [u8], parsed: &Parsed, sum: Sum) -> Result<(), DropReason> {
        self.check_hairpin(packet, parsed)?;
        self.apply(packet, parsed, sum)
    }

    fn check_outbound(&self, packet: &[u8], parsed: &Parsed) -> Result<(), DropReason> {
        self.check_hairpin(packet, parsed)?;
        self.check(packet, parsed).map(drop)
    }

    fn check_hairpin(&self, packet: &[u8], parsed: &Parsed) -> Result<(), DropReason> {
        let to: [u8; N] =
            array(packet, Side::Destination.at(parsed.version())).ok_or(DropReason::Truncated)?;
        // The TUN would send it straight back.
        if to == self.new || to == self.old {
            return Err(DropReason::Hairpin);
        }
        Ok(())
    }

    /// Whether it is the client's packet and, if an error, about one of its own:
    /// what it quotes then.
    fn check(&self, packet: &[u8], parsed: &Parsed) -> Result<Option<Quoted>, DropReason> {
        // What trails is nobody's, so it is not read.
        let packet = &packet[..packet.len().min(parsed.len())];
        if array(packet, self.side.at(parsed.version())) != Some(self.old) {
            return Err(match self.side {
                Side::Source => DropReason::Spoofed,
                Side::Destination => DropReason::Recipient,
            });
        }
        match parsed.transport() {
            Transport::Icmp(Icmp { error: true, .. }) => self.quoted(packet, parsed).map(Some),
            Transport::Icmp(_)
            | Transport::Tcp { .. }
            | Transport::Udp { .. }
            | Transport::Later
            | Transport::Other => Ok(None),
        }
    }

    /// Changes everything or, where it refuses, nothing.
    fn apply(&self, packet: &mut [u8], parsed: &Parsed, sum: Sum) -> Result<(), DropReason> {
        let quoted = self.check(packet, parsed)?;
        let end = packet.len().min(parsed.len());
        let packet = &mut packet[..end];
        put(packet, self.side.at(parsed.version()), self.new);
        if parsed.version() == Version::V4 {
            update(packet, 10, |check| self.delta.update(check));
        }
        let l4 = parsed.l4();
        match parsed.transport() {
            Transport::Tcp { .. } => update(packet, l4 + 16, |check| match sum {
                Sum::Full => self.delta.update(check),
                Sum::Partial => self.delta.update_partial(check),
            }),
            Transport::Udp { .. } => update(packet, l4 + 6, |check| match sum {
                Sum::Full => self.delta.update_udp(check),
                Sum::Partial => self.delta.update_partial(check),
            }),
            Transport::Icmp(_) => {
                let mut delta = match parsed.version() {
                    // ICMP has no pseudo-header.
                    Version::V4 => None,
                    Version::V6 => Some(self.delta),
                };
                if let Some(quoted) = quoted {
                    let inside = self.translate_quoted(packet, parsed.version(), quoted);
                    delta = Some(delta.map_or(inside, |delta| delta.and(inside)));
                }
                if let Some(delta) = delta {
                    update(packet, l4 + 2, |check| delta.update(check));
                }
            }
            Transport::Later | Transport::Other => {}
        }
        Ok(())
    }

    fn quoted(&self, packet: &[u8], parsed: &Parsed) -> Result<Quoted, DropReason> {
        let quoted = parse_quoted(packet, parsed.version(), parsed.header_len())
            .ok_or(DropReason::Quoted)?;
        let at = quoted.ip + self.side.opposite().at(parsed.version());
        if array(packet, at) == Some(self.old) {
            Ok(quoted)
        } else {
            Err(DropReason::Quoted)
        }
    }

    /// Returns what all of it adds to the sum of the message that quotes it.
    fn translate_quoted(&self, packet: &mut [u8], version: Version, quoted: Quoted) -> Delta {
        put(
            packet,
            quoted.ip + self.side.opposite().at(version),
            self.new,
        );
        let mut inside = self.delta;
        if version == Version::V4 {
            inside = inside.and(replace(packet, quoted.ip + 10, |check| {
                self.delta.update(check)
            }));
        }
        // As much of the transport header as was quoted.
        match (quoted.transport, version) {
            (Some((protocol::TCP, l4)), _) => {
                inside.and(replace(packet, l4 + 16, |check| self.delta.update(check)))
            }
            (Some((protocol::UDP, l4)), _) => inside.and(replace(packet, l4 + 6, |check| {
                self.delta.update_udp(check)
            })),
            (Some((protocol::ICMPV6, l4)), Version::V6) => {
                inside.and(replace(packet, l4 + 2, |check| self.delta.update(check)))
            }
            (Some(_) | None, _) => inside,
        }
    }
}

fn update(packet: &mut [u8], at: usize, new: impl FnOnce(u16) -> u16) {
    if let Some(old) = word(packet, at) {
        put(packet, at, new(old).to_be_bytes());
    }
}

fn replace(packet: &mut [u8], at: usize, new: impl FnOnce(u16) -> u16) -> Delta {
    let Some(old) = word(packet, at) else {
        return Delta::NONE;
    };
    let new = new(old);
    put(packet, at, new.to_be_bytes());
    Delta::word(old, new)
}
