//! For clients that know the addresses their lease has.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::Change;
use crate::checksum::Delta;
use crate::packet::{Parsed, Side, Version};
use crate::validate::DropReason;

/// Changes nothing, but lets pass only what a translation would have: a client's
/// own addresses, and errors about its own packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnAddresses {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl OwnAddresses {
    /// The client's addresses; none where it has none.
    #[must_use]
    pub const fn new(v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> Self {
        Self { v4, v6 }
    }

    /// Client to TUN; `packet` as in [`super::Nat::outbound`].
    pub fn outbound(&self, packet: &[u8], parsed: &Parsed) -> Result<(), DropReason> {
        match parsed.version() {
            Version::V4 => none(Side::Source, self.v4, DropReason::Family, Ipv4Addr::octets)?
                .check_outbound(packet, parsed),
            Version::V6 => none(Side::Source, self.v6, DropReason::Family, Ipv6Addr::octets)?
                .check_outbound(packet, parsed),
        }
    }

    /// TUN to client.
    pub fn inbound(&self, packet: &[u8], parsed: &Parsed) -> Result<(), DropReason> {
        let (side, reason) = (Side::Destination, DropReason::Recipient);
        match parsed.version() {
            Version::V4 => none(side, self.v4, reason, Ipv4Addr::octets)?
                .check(packet, parsed)
                .map(drop),
            Version::V6 => none(side, self.v6, reason, Ipv6Addr::octets)?
                .check(packet, parsed)
                .map(drop),
        }
    }
}

/// The change from an address to itself.
fn none<A: Copy, const N: usize>(
    side: Side,
    own: Option<A>,
    missing: DropReason,
    octets: impl FnOnce(&A) -> [u8; N],
) -> Result<Change<N>, DropReason> {
    let own = own.as_ref().map(octets).ok_or(missing)?;
    Ok(Change {
        side,
        old: own,
        new: own,
        delta: Delta::NONE,
    })
}
