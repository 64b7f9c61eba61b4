//! The announced subnets, and what clients make of them.
//!
//! No client uses the subnet as such. One adds to its base, another overwrites
//! the last byte; both come to the same address only if the base ends in zero,
//! whatever the mask says.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// The subnets of one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// The subnet bases do not end in zero, so clients would disagree on their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseError;

impl fmt::Display for LeaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the subnets of a dialect client must begin at a last octet 0 and a last byte 0",
        )
    }
}

impl Error for LeaseError {}

impl Lease {
    /// From the first addresses of its subnets.
    pub fn new(v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Self, LeaseError> {
        let [.., v4_last] = v4.octets();
        let [.., v6_last] = v6.octets();
        if v4_last == 0 && v6_last == 0 {
            Ok(Self { v4, v6 })
        } else {
            Err(LeaseError)
        }
    }

    /// The addresses that every client of the later dialects uses.
    pub fn client(&self) -> Addresses {
        Addresses {
            v4: Ipv4Addr::from_bits(self.v4.to_bits() | 2),
            v6: Some(Ipv6Addr::from_bits(self.v6.to_bits() | 1)),
        }
    }

    /// The gateway's own, which answer pings.
    pub fn host(&self) -> Addresses {
        Addresses {
            v4: Ipv4Addr::from_bits(self.v4.to_bits() | 1),
            v6: Some(self.v6),
        }
    }

    pub(super) fn announce_v4(&self) -> String {
        format!("{}/24", self.v4)
    }

    pub(super) fn announce_dual(&self) -> String {
        let mut text = format!("{}/30,", self.v4);
        // All groups in full: clients split at the colons and know no `::`.
        for (i, group) in self.v6.segments().into_iter().enumerate() {
            let colon = if i == 0 { "" } else { ":" };
            // Writing to a string does not fail.
            let _ = write!(text, "{colon}{group:x}");
        }
        text.push_str("/127");
        text
    }
}

/// What one end uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6, if the dialect has it.
    pub v6: Option<Ipv6Addr>,
}

/// A greeting as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The IPv4 base and prefix length.
    pub v4: (Ipv4Addr, u8),
    /// The IPv6 base and prefix length, if announced.
    pub v6: Option<(Ipv6Addr, u8)>,
}

/// Not one or two subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnnouncementError;

impl fmt::Display for AnnouncementError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the greeting announces neither an IPv4 subnet nor one of each family")
    }
}

impl Error for AnnouncementError {}

impl Announcement {
    /// What the command line clients use: the base plus two, plus one.
    pub fn added(&self) -> Addresses {
        Addresses {
            v4: Ipv4Addr::from_bits(self.v4.0.to_bits().wrapping_add(2)),
            v6: self
                .v6
                .map(|(base, _)| Ipv6Addr::from_bits(base.to_bits().wrapping_add(1))),
        }
    }

    /// What the telephone client uses: the last byte overwritten with two, with one.
    pub fn overwritten(&self) -> Addresses {
        Addresses {
            v4: Ipv4Addr::from_bits(self.v4.0.to_bits() & !0xff | 2),
            v6: self
                .v6
                .map(|(base, _)| Ipv6Addr::from_bits(base.to_bits() & !0xff | 1)),
        }
    }
}

impl FromStr for Announcement {
    type Err = AnnouncementError;

    fn from_str(text: &str) -> Result<Self, AnnouncementError> {
        let (v4, v6) = match text.split_once(',') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        Ok(Self {
            v4: subnet(v4, 32)?,
            v6: v6.map(|v6| subnet(v6, 128)).transpose()?,
        })
    }
}

fn subnet<A: FromStr>(text: &str, width: u8) -> Result<(A, u8), AnnouncementError> {
    let (base, length) = text.split_once('/').ok_or(AnnouncementError)?;
    let base = base.parse().map_err(|_| AnnouncementError)?;
    let digits = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
    let length = length.parse().ok().filter(|l| digits && *l <= width);
    Ok((base, length.ok_or(AnnouncementError)?))
}
