//! An inner packet, looked at once.
//!
//! [`parse`] reads what validation, translation and segmentation need and says
//! where it lies; nobody after it looks for headers again. It refuses only what
//! has no sensible reading: lengths that contradict each other, headers that are
//! not there. What is well-formed and yet unwanted is for [`crate::validate`].

mod bytes;
#[cfg(feature = "grammar")]
pub mod grammar;
mod quoted;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(crate) use self::bytes::{array, put, word};
pub(crate) use self::quoted::{Quoted, parse_quoted};
use crate::validate::DropReason;

/// Numbers of the protocols that a client may use.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// Bits of the TCP header's flag byte.
pub mod tcp_flag {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// Beginning.
    pub const SYN: u8 = 0x02;
    /// End at once.
    pub const RST: u8 = 0x04;
    /// Hand it to the program now.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
    /// The urgent pointer counts.
    pub const URG: u8 = 0x20;
    /// Congestion was signalled.
    pub const ECE: u8 = 0x40;
    /// Congestion window reduced.
    pub const CWR: u8 = 0x80;
}

pub(crate) const V4_HEADER: usize = 20;
pub(crate) const V6_HEADER: usize = 40;
pub(crate) const TCP_HEADER: usize = 20;
/// With all the options there is room for.
pub(crate) const TCP_HEADER_MOST: usize = 60;
pub(crate) const UDP_HEADER: usize = 8;
const ICMP_HEADER: usize = 8;
const FRAGMENT_HEADER: usize = 8;
const FRAGMENT: u8 = 44;
/// More headers than this in a row have no use but to be slow.
const MAX_EXTENSIONS: u32 = 8;

/// Which IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Which of a packet's two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The sender's.
    Source,
    /// The recipient's.
    Destination,
}

impl Side {
    /// The same host in an answer, or in the packet that an error quotes.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    /// Where the address begins in an IP header.
    pub(crate) const fn at(self, version: Version) -> usize {
        match (version, self) {
            (Version::V4, Self::Source) => 12,
            (Version::V4, Self::Destination) => 16,
            (Version::V6, Self::Source) => 8,
            (Version::V6, Self::Destination) => 24,
        }
    }
}

/// The part of a datagram that a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Shared by the fragments of one datagram.
    pub id: u32,
    /// Where its bytes belong in the datagram.
    pub offset: u16,
    /// Whether others follow it.
    pub more: bool,
}

/// What an ICMP or ICMPv6 message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Icmp {
    /// Its type.
    pub kind: u8,
    /// Its code.
    pub code: u8,
    /// Whether it quotes the packet that caused it.
    pub error: bool,
}

/// What the transport header says, if there is one that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// See [`tcp_flag`].
        flags: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Its length field.
        length: u16,
    },
    /// ICMP in IPv4, ICMPv6 in IPv6.
    Icmp(Icmp),
    /// A fragment other than the first, which has none.
    Later,
    /// A protocol that no client may use.
    Other,
}

/// What [`parse`] found. Offsets count from the packet's first byte and lie
/// within its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    pub(crate) version: Version,
    pub(crate) protocol: u8,
    pub(crate) len: u16,
    pub(crate) l4: u16,
    pub(crate) header_len: u16,
    pub(crate) fragment: Option<Fragment>,
    pub(crate) transport: Transport,
    pub(crate) options: bool,
    /// The transport checksum was computed and is right. Set by validation.
    pub(crate) verified: bool,
}

/// Reads the headers of a packet. Bytes behind its own length are ignored.
pub fn parse(packet: &[u8]) -> Result<Parsed, DropReason> {
    let ip = match packet.first().map(|byte| byte >> 4) {
        Some(4) => parse_v4(packet)?,
        Some(6) => parse_v6(packet)?,
        Some(_) => return Err(DropReason::Version),
        None => return Err(DropReason::Empty),
    };
    // Behind options, which nobody may use, what is no transport header is no wonder.
    parse_transport(ip, packet).map_err(|reason| match (ip.options, ip.version) {
        (false, _) => reason,
        (true, Version::V4) => DropReason::Options,
        (true, Version::V6) => DropReason::Extension,
    })
}

impl Parsed {
    /// Which IP it is.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// The protocol behind all of IP's headers.
    #[must_use]
    pub const fn protocol(&self) -> u8 {
        self.protocol
    }

    /// The packet's length by its own header. What trails is not part of it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.into()
    }

    /// Never: the least packet is a header.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Where IP's headers end.
    #[must_use]
    pub fn l4(&self) -> usize {
        self.l4.into()
    }

    /// Bytes of all headers, IP and transport.
    #[must_use]
    pub fn header_len(&self) -> usize {
        self.header_len.into()
    }

    /// Bytes behind all headers.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        usize::from(self.len - self.header_len)
    }

    /// Which part of a datagram it is, if it has a fragment header.
    #[must_use]
    pub const fn fragment(&self) -> Option<Fragment> {
        self.fragment
    }

    /// Whether it is a datagram of its own.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        match self.fragment {
            Some(fragment) => fragment.offset == 0 && !fragment.more,
            None => true,
        }
    }

    /// What its transport header says.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// Source and destination port, if it has any.
    #[must_use]
    pub const fn ports(&self) -> Option<(u16, u16)> {
        match self.transport {
            Transport::Tcp {
                source,
                destination,
                ..
            }
            | Transport::Udp {
                source,
                destination,
                ..
            } => Some((source, destination)),
            Transport::Icmp(_) | Transport::Later | Transport::Other => None,
        }
    }

    /// Its ICMP type and code, if it has any.
    #[must_use]
    pub const fn icmp(&self) -> Option<Icmp> {
        match self.transport {
            Transport::Icmp(icmp) => Some(icmp),
            Transport::Tcp { .. } | Transport::Udp { .. } | Transport::Later | Transport::Other => {
                None
            }
        }
    }

    /// Whether it has IPv4 options or IPv6 extension headers other than a fragment's.
    #[must_use]
    pub const fn has_options(&self) -> bool {
        self.options
    }

    /// Whether its transport header follows the plain IP header directly.
    #[must_use]
    pub(crate) fn is_plain(&self) -> bool {
        let plain = match self.version {
            Version::V4 => V4_HEADER,
            Version::V6 => V6_HEADER,
        };
        self.l4() == plain && self.is_whole()
    }

    /// Whether it only acknowledges: TCP without data that begins and ends nothing,
    /// and does not close the window. Nothing is lost if a later one overtakes it.
    #[must_use]
    pub fn is_bare_ack(&self, packet: &[u8]) -> bool {
        let acks = matches!(self.transport, Transport::Tcp { flags, .. } if flags == tcp_flag::ACK);
        acks && self.payload_len() == 0
            && self.is_plain()
            && array::<2>(packet, self.l4() + 14).is_some_and(|window| window != [0; 2])
    }

    /// Where the checksum of a TCP or UDP header lies.
    pub(crate) fn sum_at(&self) -> Option<usize> {
        match self.transport {
            Transport::Tcp { .. } => Some(self.l4() + 16),
            Transport::Udp { .. } => Some(self.l4() + 6),
            Transport::Icmp(_) | Transport::Later | Transport::Other => None,
        }
    }

    /// One of the addresses of the packet that this was parsed from.
    #[must_use]
    pub fn address(&self, packet: &[u8], side: Side) -> Option<IpAddr> {
        let at = side.at(self.version);
        match self.version {
            Version::V4 => Some(Ipv4Addr::from(array::<4>(packet, at)?).into()),
            Version::V6 => Some(Ipv6Addr::from(array::<16>(packet, at)?).into()),
        }
    }
}

fn parse_v4(packet: &[u8]) -> Result<Parsed, DropReason> {
    let Some(header) = packet.first_chunk::<V4_HEADER>() else {
        return Err(DropReason::Truncated);
    };
    let header_len = u16::from(header[0] & 0x0f) * 4;
    let len = u16::from_be_bytes([header[2], header[3]]);
    if usize::from(header_len) < V4_HEADER {
        return Err(DropReason::HeaderLength);
    }
    if usize::from(len) < V4_HEADER || usize::from(len) > packet.len() {
        return Err(DropReason::TotalLength);
    }
    if header_len > len {
        return Err(DropReason::HeaderLength);
    }
    let bits = u16::from_be_bytes([header[6], header[7]]);
    let (offset, more) = ((bits & 0x1fff) << 3, bits & 0x2000 != 0);
    let fragment = (offset != 0 || more).then(|| Fragment {
        id: u16::from_be_bytes([header[4], header[5]]).into(),
        offset,
        more,
    });
    Ok(Parsed {
        version: Version::V4,
        protocol: header[9],
        len,
        l4: header_len,
        header_len,
        fragment,
        transport: Transport::Other,
        options: usize::from(header_len) != V4_HEADER,
        verified: false,
    })
}

fn parse_v6(packet: &[u8]) -> Result<Parsed, DropReason> {
    let Some(header) = packet.first_chunk::<V6_HEADER>() else {
        return Err(DropReason::Truncated);
    };
    let payload = u16::from_be_bytes([header[4], header[5]]);
    // Together with its header it may be longer than any packet of ours.
    let Some(len) = payload.checked_add(40) else {
        return Err(DropReason::TotalLength);
    };
    if usize::from(len) > packet.len() {
        return Err(DropReason::TotalLength);
    }
    let packet = &packet[..usize::from(len)];
    let walk = walk_v6(packet, header[6])?;
    Ok(Parsed {
        version: Version::V6,
        protocol: walk.protocol,
        len,
        l4: walk.l4,
        header_len: walk.l4,
        fragment: walk.fragment,
        transport: Transport::Other,
        options: walk.options,
        verified: false,
    })
}

struct Walk {
    protocol: u8,
    l4: u16,
    fragment: Option<Fragment>,
    options: bool,
}

fn walk_v6(packet: &[u8], next: u8) -> Result<Walk, DropReason> {
    let mut walk = Walk {
        protocol: next,
        l4: 40,
        fragment: None,
        options: false,
    };
    for _ in 0..MAX_EXTENSIONS {
        let at = usize::from(walk.l4);
        let length = match walk.protocol {
            FRAGMENT if walk.fragment.is_none() => {
                let header: [u8; FRAGMENT_HEADER] =
                    array(packet, at).ok_or(DropReason::Extension)?;
                let bits = u16::from_be_bytes([header[2], header[3]]);
                walk.fragment = Some(Fragment {
                    id: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
                    offset: bits & 0xfff8,
                    more: bits & 1 != 0,
                });
                walk.protocol = header[0];
                8
            }
            // A second fragment header would hide what the first one shows.
            FRAGMENT => return Err(DropReason::Extension),
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => {
                let [next, length] = array(packet, at).ok_or(DropReason::Extension)?;
                walk.options = true;
                walk.protocol = next;
                (u16::from(length) + 1) * 8
            }
            _ => return Ok(walk),
        };
        walk.l4 += length;
        if usize::from(walk.l4) > packet.len() {
            return Err(DropReason::Extension);
        }
        if walk.fragment.is_some_and(|fragment| fragment.offset != 0) {
            return Ok(walk);
        }
    }
    Err(DropReason::Extension)
}

fn parse_transport(ip: Parsed, packet: &[u8]) -> Result<Parsed, DropReason> {
    if ip.fragment.is_some_and(|fragment| fragment.offset != 0) {
        return Ok(Parsed {
            transport: Transport::Later,
            ..ip
        });
    }
    let l4 = &packet[ip.l4()..ip.len()];
    let (transport, length) = match (ip.protocol, ip.version) {
        (protocol::TCP, _) => {
            let header: [u8; TCP_HEADER] = array(l4, 0).ok_or(DropReason::TransportHeader)?;
            let tcp = Transport::Tcp {
                source: u16::from_be_bytes([header[0], header[1]]),
                destination: u16::from_be_bytes([header[2], header[3]]),
                flags: header[13],
            };
            let length = header[12] >> 4;
            if length < 5 {
                return Err(DropReason::TransportHeader);
            }
            (tcp, u16::from(length) * 4)
        }
        (protocol::UDP, _) => {
            let header: [u8; UDP_HEADER] = array(l4, 0).ok_or(DropReason::TransportHeader)?;
            let udp = Transport::Udp {
                source: u16::from_be_bytes([header[0], header[1]]),
                destination: u16::from_be_bytes([header[2], header[3]]),
                length: u16::from_be_bytes([header[4], header[5]]),
            };
            (udp, 8)
        }
        (protocol::ICMP, Version::V4) | (protocol::ICMPV6, Version::V6) => {
            let header: [u8; ICMP_HEADER] = array(l4, 0).ok_or(DropReason::TransportHeader)?;
            let [kind, code, ..] = header;
            let error = quotes(ip.version, kind);
            (Transport::Icmp(Icmp { kind, code, error }), 8)
        }
        _ => (Transport::Other, 0),
    };
    if usize::from(length) > l4.len() {
        return Err(DropReason::TransportHeader);
    }
    Ok(Parsed {
        header_len: ip.l4 + length,
        transport,
        ..ip
    })
}

/// Whether a message of this type quotes a packet. All of ICMPv6's lower half
/// does; in ICMP it is destination unreachable, source quench, redirect, time
/// exceeded and parameter problem.
const fn quotes(version: Version, kind: u8) -> bool {
    match version {
        Version::V4 => matches!(kind, 3 | 4 | 5 | 11 | 12),
        Version::V6 => kind < 128,
    }
}
