//! Address prefixes of either family.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// An address and how many of its first bits matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Net {
    pub(crate) addr: IpAddr,
    pub(crate) len: u8,
}

impl Net {
    pub(crate) fn new(addr: impl Into<IpAddr>, len: u8) -> Net {
        let addr = addr.into();
        Net { addr, len }
    }

    /// The bits of a whole address of this family.
    pub(crate) fn width(self) -> u8 {
        if self.addr.is_ipv4() { 32 } else { 128 }
    }

    pub(crate) fn bits(self) -> u128 {
        match self.addr {
            IpAddr::V4(a) => u32::from(a).into(),
            IpAddr::V6(a) => a.into(),
        }
    }

    pub(crate) fn octets(self) -> Vec<u8> {
        self.bits().to_be_bytes()[16 - usize::from(self.width() / 8)..].to_vec()
    }

    pub(crate) fn v4(self) -> Ipv4Addr {
        (self.bits() as u32).into()
    }

    pub(crate) fn v6(self) -> Ipv6Addr {
        self.bits().into()
    }

    /// The prefix of this length that begins so far up from our first address.
    pub(crate) fn at(self, offset: u128, len: u8) -> Net {
        let far = Net::new(Ipv6Addr::from(self.bits() + offset), len);
        let v4 = self.addr.is_ipv4();
        if v4 { Net::new(far.v4(), len) } else { far }
    }

    pub(crate) fn overlaps(self, other: Net) -> bool {
        let rest = self.width() - self.len.min(other.len);
        let differ = self.bits() ^ other.bits();
        self.width() == other.width() && differ.checked_shr(rest.into()).unwrap_or(0) == 0
    }
}

impl FromStr for Net {
    type Err = String;

    /// A prefix of at least one bit, with none set beyond its length.
    fn from_str(s: &str) -> Result<Net, String> {
        let bad = "is not a prefix such as 10.0.0.0/8 or fd00::/8";
        let (addr, len) = s.split_once('/').ok_or(bad)?;
        let addr: IpAddr = addr.parse().map_err(|_| bad)?;
        let net = Net::new(addr, len.parse().map_err(|_| bad)?);
        let (len, whole) = (net.len, net.width());
        let fits = (1..=whole).contains(&len);
        ensure!(fits, "has length {len}: it must be from 1 to {whole}");
        let beyond = net.bits() & ((1 << (whole - len)) - 1);
        ensure!(beyond == 0, "has bits set beyond its length of {len}");
        Ok(net)
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}
