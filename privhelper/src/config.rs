//! What the administrator decides, and nobody else can.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

/// An IPv4 prefix with no bit set beyond its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Net4 {
    pub(crate) addr: Ipv4Addr,
    pub(crate) len: u8,
}

/// An IPv6 prefix with no bit set beyond its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Net6 {
    pub(crate) addr: Ipv6Addr,
    pub(crate) len: u8,
}

/// A prefix of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
