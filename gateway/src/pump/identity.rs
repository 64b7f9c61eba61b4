//! Who a client is on both sides of its device.

use std::net::{Ipv4Addr, Ipv6Addr};

use rvpn_proto::nat::{Nat, OwnAddresses, SourceNat, Sum};
use rvpn_proto::packet::Parsed;
use rvpn_proto::validate::{DropReason, Sources};

/// Which addresses a client has.
#[derive(Clone, Copy, Debug)]
pub enum Identity {
    /// Constant ones inside, the lease's outside: translated.
    Pair {
        /// As the client sees them.
        inner: (Ipv4Addr, Ipv6Addr),
        /// As the device sees them.
        lease: (Ipv4Addr, Ipv6Addr),
    },
    /// The lease's own, on both sides.
    Own {
        /// IPv4.
        v4: Ipv4Addr,
        /// IPv6, if the client knows it.
        v6: Option<Ipv6Addr>,
    },
    /// Whatever the client likes, translated to addresses of the lease's subnet.
    AnySource {
        /// Where the subnet begins.
        base: Ipv4Addr,
    },
}

impl Identity {
    /// What the client may send from.
    pub(super) fn sources(&self) -> Sources {
        match *self {
            Identity::Pair {
                inner: (v4, v6), ..
            } => Sources::Own {
                v4: Some(v4),
                v6: Some(v6),
            },
            Identity::Own { v4, v6 } => Sources::Own { v4: Some(v4), v6 },
            Identity::AnySource { .. } => Sources::AnyV4,
        }
    }
}

/// What is done to the addresses of its packets.
#[derive(Debug)]
pub(super) enum Translation {
    Pair(Nat),
    Own(OwnAddresses),
    /// Boxed, as few clients need the table.
    AnySource(Box<SourceNat>),
}

impl Translation {
    pub(super) fn of(identity: &Identity) -> Translation {
        match *identity {
            Identity::Pair { inner, lease } => {
                Translation::Pair(Nat::new(inner.0, lease.0, inner.1, lease.1))
            }
            Identity::Own { v4, v6 } => Translation::Own(OwnAddresses::new(Some(v4), v6)),
            Identity::AnySource { base } => Translation::AnySource(Box::new(SourceNat::new(base))),
        }
    }

    /// Client to device.
    pub(super) fn outbound(
        &mut self,
        head: &mut [u8],
        parsed: &Parsed,
        sum: Sum,
    ) -> Result<(), DropReason> {
        match self {
            Translation::Pair(nat) => nat.outbound(head, parsed, sum),
            Translation::Own(own) => own.outbound(head, parsed),
            Translation::AnySource(nat) => nat.outbound(head, parsed, sum),
        }
    }

    /// Device to client.
    pub(super) fn inbound(
        &self,
        head: &mut [u8],
        parsed: &Parsed,
        sum: Sum,
    ) -> Result<(), DropReason> {
        match self {
            Translation::Pair(nat) => nat.inbound(head, parsed, sum),
            Translation::Own(own) => own.inbound(head, parsed),
            Translation::AnySource(nat) => nat.inbound(head, parsed, sum),
        }
    }
}
