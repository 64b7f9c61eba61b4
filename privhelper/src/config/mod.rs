//! What the administrator decides, and nobody else can.

pub(crate) mod parse;

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

/// An IPv4 prefix with no bit set beyond its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Net4 {
    pub(crate) addr: Ipv4Addr,
    pub(crate) len: u8,
}

/// An IPv6 prefix with no bit set beyond its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Net6 {
    pub(crate) addr: Ipv6Addr,
    pub(crate) len: u8,
}

/// A prefix of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Net {
    V4(Net4),
    V6(Net6),
}

/// A transport whose ports can be denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proto {
    Tcp,
    Udp,
}

/// Ports clients may not reach, ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeniedPorts {
    pub(crate) proto: Proto,
    pub(crate) low: u16,
    pub(crate) high: u16,
}

/// What the clients of one policy class may do. Class 0 always exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) number: u8,
    /// Special-purpose prefixes opened to this class; all others stay refused.
    pub(crate) allow: Vec<Net>,
    pub(crate) deny_ports: Vec<DeniedPorts>,
    /// Concurrent flows per client.
    pub(crate) flow_cap: u32,
}

/// Where client traffic leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Uplink {
    /// Whatever interfaces hold the default routes, read again when they change.
    DefaultRoute,
    /// Exactly these.
    Named(Vec<String>),
}

/// Seconds after which an idle flow of ours is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CtTimeouts {
    pub(crate) tcp_established: u32,
    pub(crate) tcp_transitory: u32,
    pub(crate) udp: u32,
    pub(crate) udp_replied: u32,
}

/// The whole configuration, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) pool4: Net4,
    pub(crate) pool6: Net6,
    pub(crate) stream4: Net4,
    pub(crate) stream6: Net6,
    /// Devices created before the socket opens.
    pub(crate) slots: u32,
    /// Devices created at a time when fewer than this are free.
    pub(crate) grow: u32,
    pub(crate) max_slots: u32,
    pub(crate) helper_uid: u32,
    pub(crate) helper_gid: u32,
    pub(crate) gateway_uid: u32,
    pub(crate) gateway_gid: u32,
    pub(crate) uplink: Uplink,
    pub(crate) nat_low: u16,
    pub(crate) nat_high: u16,
    pub(crate) linger: Duration,
    pub(crate) ct_timeouts: CtTimeouts,
    /// Sorted by number, at most 16, the first is class 0.
    pub(crate) classes: Vec<Class>,
    pub(crate) mtu: u16,
    pub(crate) txqueuelen: u32,
    pub(crate) socket: PathBuf,
    /// Directory of the sysctl journal.
    pub(crate) state: PathBuf,
    pub(crate) link_group: u32,
    pub(crate) offload: bool,
}

impl Config {
    /// Held by the one helper that serves.
    pub(crate) fn lock_path(&self) -> PathBuf {
        self.state.join("lock")
    }
}

impl Net4 {
    pub(crate) fn overlaps(self, other: Net4) -> bool {
        let len = u32::from(self.len.min(other.len));
        let differ = u32::from(self.addr) ^ u32::from(other.addr);
        len == 0 || differ >> (32 - len) == 0
    }
}

impl Net6 {
    pub(crate) fn overlaps(self, other: Net6) -> bool {
        let len = u32::from(self.len.min(other.len));
        let differ = u128::from(self.addr) ^ u128::from(other.addr);
        len == 0 || differ >> (128 - len) == 0
    }
}

impl Net {
    pub(crate) fn overlaps(self, other: Net) -> bool {
        match (self, other) {
            (Net::V4(a), Net::V4(b)) => a.overlaps(b),
            (Net::V6(a), Net::V6(b)) => a.overlaps(b),
            _ => false,
        }
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Net::V4(n) => write!(f, "{}/{}", n.addr, n.len),
            Net::V6(n) => write!(f, "{}/{}", n.addr, n.len),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;

    pub(crate) fn example() -> Config {
        Config {
            pool4: Net4 {
                addr: Ipv4Addr::new(10, 64, 0, 0),
                len: 10,
            },
            pool6: Net6 {
                addr: "fd52:5650:1::".parse().unwrap(),
                len: 48,
            },
            stream4: Net4 {
                addr: Ipv4Addr::new(10, 63, 192, 0),
                len: 18,
            },
            stream6: Net6 {
                addr: "fd52:5650:1:ffff::".parse().unwrap(),
                len: 112,
            },
            slots: 4,
            grow: 4,
            max_slots: 16,
            helper_uid: 0,
            helper_gid: 0,
            gateway_uid: 0,
            gateway_gid: 0,
            uplink: Uplink::DefaultRoute,
            nat_low: 16384,
            nat_high: 32767,
            linger: Duration::from_secs(60),
            ct_timeouts: CtTimeouts {
                tcp_established: 7200,
                tcp_transitory: 60,
                udp: 30,
                udp_replied: 120,
            },
            classes: vec![Class {
                number: 0,
                allow: vec![],
                deny_ports: vec![],
                flow_cap: 1024,
            }],
            mtu: 1500,
            txqueuelen: 500,
            socket: PathBuf::from("/run/rvpn/helper.sock"),
            state: PathBuf::from("/run/rvpn-helper"),
            link_group: 0x5276,
            offload: true,
        }
    }
}
