//! What a client believes of a welcome.
//!
//! A gateway is chosen by the user, but may be taken over or be somebody
//! else's. It must not be able to take traffic that the user did not mean to
//! send through it, nor to point the client's resolver or routes at the
//! client itself.

use std::error::Error;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::message::Welcome;
use super::prefix::Prefix;
use super::{KEEPALIVE_MAX, VERSIONS};
use crate::record::HEADER_LEN;

/// What the user allows gateways to decide.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy<'a> {
    /// Routes of the gateway are used at all. If not, they are not judged
    /// either: a gateway suggests the default route to everybody.
    pub routes: bool,
    /// They may cover the whole Internet.
    pub default_route: bool,
    /// They may go to networks that the client is directly attached to.
    pub over_local: bool,
    /// Those networks.
    pub local: &'a [Prefix],
}

/// Why a welcome is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A version that was not offered.
    Version(u16),
    /// The inner address cannot be ours, or the peer's cannot be the peer's.
    Address(IpAddr),
    /// Both ends have the same address.
    SameAddress(IpAddr),
    /// The MTU is out of range.
    Mtu(u32),
    /// The resolver cannot be reached through any tunnel.
    Dns(IpAddr),
    /// A route that the user did not allow, or that nobody should want.
    Route(Prefix, RouteFault),
    /// Together the routes cover more than the user allowed; this one is over it.
    TooMuch(Prefix),
    /// Too seldom to keep the connection alive.
    Keepalive(u16),
    /// A packet of the MTU does not fit into a message.
    MaxMessage(u32),
}

/// What is wrong with a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteFault {
    /// It covers all or a large part of the Internet.
    Whole,
    /// It takes a network that the client is directly attached to.
    Local(Prefix),
    /// It goes to loopback, link-local, multicast or otherwise special addresses.
    Special(Prefix),
}

/// Without leave for the whole Internet, no route is shorter than this.
const NARROW_V4: u8 = 8;
/// As for IPv4; the shortest that address registries hand out are a little shorter.
const NARROW_V6: u8 = 24;
/// And all of them together cover at most a quarter of IPv4.
const TOTAL_V4: u64 = 1 << 30;

const SPECIAL_V4: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];
const SPECIAL_V6: [(Ipv6Addr, u8); 3] = [
    // Unspecified, loopback, and IPv4 in its several disguises.
    (Ipv6Addr::UNSPECIFIED, 64),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
];
/// The part of IPv6 that is handed out, which some route instead of all.
const GLOBAL_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

impl Welcome {
    /// Refuses what no gateway needs and what the user did not allow. To be
    /// called before anything of the welcome is used.
    pub fn validate(&self, policy: &Policy<'_>) -> Result<(), Refusal> {
        if !VERSIONS.contains(&self.version) {
            return Err(Refusal::Version(self.version));
        }
        let v6 = self.v6.map(|pair| [pair.address.into(), pair.peer.into()]);
        let v4 = [self.v4.address.into(), self.v4.peer.into()];
        for [address, peer] in [Some(v4), v6].into_iter().flatten() {
            for inner in [address, peer] {
                let taken = policy.local.iter().any(|local| local.has(inner));
                if special(inner) || (taken && !policy.over_local) {
                    return Err(Refusal::Address(inner));
                }
            }
            if address == peer {
                return Err(Refusal::SameAddress(address));
            }
        }
        if !(576..=65_535).contains(&self.mtu) {
            return Err(Refusal::Mtu(self.mtu));
        }
        if u64::from(self.limits.max_message) < u64::from(self.mtu) + HEADER_LEN as u64 {
            return Err(Refusal::MaxMessage(self.limits.max_message));
        }
        let seldom = u64::from(self.keepalive_s) > KEEPALIVE_MAX.as_secs();
        if self.keepalive_s == 0 || seldom {
            return Err(Refusal::Keepalive(self.keepalive_s));
        }
        if let Some(dns) = self.dns.iter().find(|dns| special(**dns)) {
            return Err(Refusal::Dns(*dns));
        }
        self.validate_routes(policy)
    }

    fn validate_routes(&self, policy: &Policy<'_>) -> Result<(), Refusal> {
        if !policy.routes {
            return Ok(());
        }
        let mut total = 0_u64;
        for route in self.routes.iter().copied() {
            check_route(route, policy).map_err(|fault| Refusal::Route(route, fault))?;
            if route.address().is_ipv4() && !policy.default_route {
                total += 1 << (32 - route.length());
                if total > TOTAL_V4 {
                    return Err(Refusal::TooMuch(route));
                }
            }
        }
        Ok(())
    }
}

fn check_route(route: Prefix, policy: &Policy<'_>) -> Result<(), RouteFault> {
    if is_half(route) && policy.default_route {
        return Ok(());
    }
    let narrow = match route.address() {
        IpAddr::V4(_) => NARROW_V4,
        // All unique local addresses together are still nobody's Internet.
        IpAddr::V6(v6) if v6.is_unique_local() => 7,
        IpAddr::V6(_) => NARROW_V6,
    };
    if route.length() < narrow && !policy.default_route {
        return Err(RouteFault::Whole);
    }
    if let Some(special) = specials(route.address()).find(|s| s.overlaps(route)) {
        return Err(RouteFault::Special(special));
    }
    let mut local = policy.local.iter().copied();
    match local.find(|local| local.overlaps(route)) {
        Some(local) if !policy.over_local => Err(RouteFault::Local(local)),
        _ => Ok(()),
    }
}

/// All, the usual halves of all, or all that is in use: shorter than whatever
/// the client is attached to, so they take nothing from it.
fn is_half(route: Prefix) -> bool {
    route.length() <= 1 || Prefix::new(GLOBAL_V6.0.into(), GLOBAL_V6.1) == Ok(route)
}

fn special(address: IpAddr) -> bool {
    specials(address).any(|special| special.has(address))
}

fn specials(family: IpAddr) -> impl Iterator<Item = Prefix> {
    let v4 = SPECIAL_V4.map(|(address, length)| (IpAddr::V4(address), length));
    let v6 = SPECIAL_V6.map(|(address, length)| (IpAddr::V6(address), length));
    v4.into_iter()
        .chain(v6)
        .filter(move |(address, _)| address.is_ipv4() == family.is_ipv4())
        .filter_map(|(address, length)| Prefix::new(address, length).ok())
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => write!(
                f,
                "the gateway chose protocol version {version}, which was not offered"
            ),
            Self::Address(address) => write!(
                f,
                "the gateway assigned the inner address {address}, which is special or part of a local network"
            ),
            Self::SameAddress(address) => write!(
                f,
                "the gateway assigned {address} to both ends of the tunnel"
            ),
            Self::Mtu(mtu) => write!(
                f,
                "the gateway wants MTU {mtu}, but 576 to 65535 are possible"
            ),
            Self::Dns(address) => write!(
                f,
                "the gateway pushes the resolver {address}, which no tunnel leads to"
            ),
            Self::Route(route, fault) => write!(f, "the gateway pushes the route {route}, {fault}"),
            Self::TooMuch(route) => write!(
                f,
                "the routes that the gateway pushes, up to {route}, cover more than a quarter of the Internet, and the default route was not allowed to it"
            ),
            Self::Keepalive(seconds) => write!(
                f,
                "the gateway wants a ping every {seconds} s, but 1 to {} are possible",
                KEEPALIVE_MAX.as_secs()
            ),
            Self::MaxMessage(limit) => write!(
                f,
                "the gateway accepts messages of {limit} bytes, which do not hold a packet of its own MTU"
            ),
        }
    }
}

impl Error for Refusal {}

impl fmt::Display for RouteFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("but the default route was not allowed to it"),
            Self::Local(local) => write!(f, "which takes the local network {local}"),
            Self::Special(special) => write!(f, "which reaches into the special range {special}"),
        }
    }
}
