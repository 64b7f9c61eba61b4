//! Address prefixes, such as `10.0.0.0/8`.

use std::error::Error;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// All addresses that begin with the same bits. The others are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

/// Why a text or a pair is no prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixError {
    /// Not `address/length`.
    Syntax,
    /// More bits than the address has.
    Length,
    /// Bits set behind the prefix: either the address or the length is a mistake.
    HostBits,
}

impl fmt::Display for PrefixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Syntax => "a prefix is written like 192.0.2.0/24",
            Self::Length => "the prefix is longer than its address",
            Self::HostBits => "the address has bits behind the prefix",
        })
    }
}

impl Error for PrefixError {}

impl Prefix {
    /// All of IPv4.
    pub const ALL_V4: Self = Self {
        address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        length: 0,
    };
    /// All of IPv6.
    pub const ALL_V6: Self = Self {
        address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        length: 0,
    };

    /// Checks and makes one.
    pub fn new(address: IpAddr, length: u8) -> Result<Self, PrefixError> {
        if length > width(address) {
            return Err(PrefixError::Length);
        }
        if high_bits(address, length) != bits(address) {
            return Err(PrefixError::HostBits);
        }
        Ok(Self { address, length })
    }

    /// The prefix of this length that `address` is in, for instance of an
    /// interface's address.
    pub fn around(address: IpAddr, length: u8) -> Result<Self, PrefixError> {
        if length > width(address) {
            return Err(PrefixError::Length);
        }
        let high = high_bits(address, length);
        let address = match address {
            // The low half of the shift below is all that IPv4 has.
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits((high >> 96) as u32)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(high)),
        };
        Ok(Self { address, length })
    }

    /// Its first address.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// How many bits are fixed.
    pub fn length(self) -> u8 {
        self.length
    }

    /// Whether all of `other` is in here.
    pub fn contains(self, other: Self) -> bool {
        self.address.is_ipv4() == other.address.is_ipv4()
            && self.length <= other.length
            && high_bits(other.address, self.length) == bits(self.address)
    }

    /// Whether the address is in here.
    pub fn has(self, address: IpAddr) -> bool {
        self.contains(Self {
            address,
            length: width(address),
        })
    }

    /// Whether any address is in both.
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other) || other.contains(self)
    }
}

fn width(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// The address at the high end of a word, so that both families compare alike.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn high_bits(address: IpAddr, length: u8) -> u128 {
    let mask = u128::MAX.checked_shl(128 - u32::from(length));
    bits(address) & mask.unwrap_or(0)
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (address, length) = text.split_once('/').ok_or(PrefixError::Syntax)?;
        let digits = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
        if !digits {
            return Err(PrefixError::Syntax);
        }
        let address = address.parse().map_err(|_| PrefixError::Syntax)?;
        Self::new(address, length.parse().map_err(|_| PrefixError::Length)?)
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}
