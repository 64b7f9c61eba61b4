//! Translation for the first dialect, whose clients choose their sources.

use std::net::Ipv4Addr;

use super::{Change, Sum};
use crate::checksum::Delta;
use crate::dialect::SourceMap;
use crate::packet::{Parsed, Side, Version, array};
use crate::validate::DropReason;

/// Gives every source of one client an address of its lease's /24: the first is
/// .2, the thirty-second .33, and a thirty-third is refused. Nobody loses an
/// address while the connection lasts, because it would lose its flows with it.
#[derive(Clone, Debug)]
pub struct SourceNat {
    map: SourceMap,
}

impl SourceNat {
    /// For the lease whose /24 begins at `base`.
    #[must_use]
    pub fn new(base: Ipv4Addr) -> Self {
        Self {
            map: SourceMap::new(base),
        }
    }

    /// Client to TUN; `packet` as in [`super::Nat::outbound`].
    pub fn outbound(
        &mut self,
        packet: &mut [u8],
        parsed: &Parsed,
        sum: Sum,
    ) -> Result<(), DropReason> {
        let old = client(packet, parsed, Side::Source)?;
        let new = self.map.outside(old).ok_or(DropReason::Sources)?;
        change(Side::Source, old, new).outbound(packet, parsed, sum)
    }

    /// TUN to client.
    pub fn inbound(&self, packet: &mut [u8], parsed: &Parsed, sum: Sum) -> Result<(), DropReason> {
        let old = client(packet, parsed, Side::Destination)?;
        let new = self.map.inside(old).ok_or(DropReason::Recipient)?;
        change(Side::Destination, old, new).apply(packet, parsed, sum)
    }
}

fn client(packet: &[u8], parsed: &Parsed, side: Side) -> Result<Ipv4Addr, DropReason> {
    if parsed.version() == Version::V6 {
        return Err(DropReason::Family);
    }
    array::<4>(packet, side.at(Version::V4))
        .map(Ipv4Addr::from)
        .ok_or(DropReason::Truncated)
}

fn change(side: Side, old: Ipv4Addr, new: Ipv4Addr) -> Change<4> {
    let (old, new) = (old.octets(), new.octets());
    Change {
        side,
        old,
        new,
        delta: Delta::between(&old, &new),
    }
}
