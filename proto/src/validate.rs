//! What a packet must be to pass, in both directions.
//!
//! [`outbound`] stands before the TUN descriptor: everything behind it, the
//! kernel included, may take for granted that lengths add up, nothing trails,
//! the sender is who it should be, and no header asks a router for anything.
//! [`inbound`] reads what the kernel has already looked at, so it leaves out
//! what only a client could do, but still refuses what translation or another
//! machine's kernel would stumble over.
//!
//! Which hosts and ports a client may reach is not decided here: the kernel's
//! rules know the host's networks and the operator's policy.

mod address;
mod fragments;
mod reason;

use std::net::{Ipv4Addr, Ipv6Addr};

pub use self::fragments::{FRAGMENT_BYTES, FRAGMENT_SECONDS, FRAGMENTED, FragmentBudget};
pub use self::reason::DropReason;
use crate::checksum;
use crate::packet::{
    Fragment, Icmp, Parsed, Side, Transport, UDP_HEADER, V4_HEADER, Version, array, parse,
    protocol, tcp_flag, word,
};
use crate::record::{Offload, gso_type};

/// Fewer bytes a segment would make tens of thousands of packets out of one.
pub const MIN_SEGMENT: u16 = 256;

/// Which sources a client may send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// One address of each family, none where the client has none.
    Own {
        /// IPv4.
        v4: Option<Ipv4Addr>,
        /// IPv6.
        v6: Option<Ipv6Addr>,
    },
    /// Any IPv4 address whatever, as in the first dialect, where it is replaced;
    /// see [`crate::nat::SourceNat`]. Its clients even send from loopback addresses.
    AnyV4,
}

/// What was agreed on with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest packet that is not a super-packet, and the longest segment of one.
    pub mtu: u16,
    /// Whether super-packets and partial checksums may be sent.
    pub offload: bool,
    /// Whether finished transport checksums of whole packets are computed. It
    /// costs a look at every byte; the kernel would pass wrong ones on, untranslated.
    pub verify: bool,
}

/// Judges a packet from a client. Fragments have to pass a [`FragmentBudget`] as
/// well; whether it speaks to itself is for the translation, which knows both names.
pub fn outbound(
    packet: &[u8],
    offload: Offload,
    limits: &Limits,
    sources: &Sources,
) -> Result<Parsed, DropReason> {
    let mut parsed = parse(packet)?;
    let packet = &packet[..parsed.len()];
    headers(&parsed, packet)?;
    addresses(&parsed, packet, sources)?;
    transport(&parsed)?;
    if let Transport::Tcp { flags, .. } = parsed.transport {
        tcp_flags(flags)?;
    }
    fragment(&parsed)?;
    check_offload(&parsed, offload, limits, MIN_SEGMENT)?;
    udp_without_sum(&parsed, packet, offload)?;
    if limits.verify && !offload.partial && parsed.is_whole() {
        if !transport_sum_is_right(&parsed, packet) {
            return Err(DropReason::TransportChecksum);
        }
        parsed.verified = true;
    }
    Ok(parsed)
}

/// Judges a packet that the TUN gave us for a client. Whom it is for is found
/// out by the translation.
pub fn inbound(packet: &[u8], offload: Offload, limits: &Limits) -> Result<Parsed, DropReason> {
    let parsed = parse(packet)?;
    let packet = &packet[..parsed.len()];
    correspondents(&parsed, packet)?;
    headers(&parsed, packet)?;
    transport(&parsed)?;
    fragment(&parsed)?;
    // The kernel makes super-packets of whatever segments arrive, also of small
    // ones, and offers offload whether or not the client takes it.
    let limits = Limits {
        offload: true,
        ..*limits
    };
    check_offload(&parsed, offload, &limits, 1)?;
    Ok(parsed)
}

fn headers(parsed: &Parsed, packet: &[u8]) -> Result<(), DropReason> {
    let hops = match parsed.version {
        Version::V4 => {
            if parsed.options {
                return Err(DropReason::Options);
            }
            if checksum::sum(&packet[..V4_HEADER]) != 0xffff {
                return Err(DropReason::HeaderChecksum);
            }
            packet[8]
        }
        Version::V6 => {
            if parsed.options {
                return Err(DropReason::Extension);
            }
            packet[7]
        }
    };
    if hops == 0 {
        return Err(DropReason::HopLimit);
    }
    Ok(())
}

fn addresses(parsed: &Parsed, packet: &[u8], sources: &Sources) -> Result<(), DropReason> {
    let (source, destination) = (
        Side::Source.at(parsed.version),
        Side::Destination.at(parsed.version),
    );
    match parsed.version {
        Version::V4 => {
            let source = array(packet, source).ok_or(DropReason::Truncated)?;
            let destination = array(packet, destination).ok_or(DropReason::Truncated)?;
            match sources {
                Sources::Own { v4: Some(own), .. } if own.octets() == source => {}
                Sources::Own { v4: Some(_), .. } => return Err(DropReason::Spoofed),
                Sources::Own { v4: None, .. } => return Err(DropReason::Family),
                Sources::AnyV4 => {}
            }
            if !address::is_host_v4(destination) {
                return Err(DropReason::Destination);
            }
        }
        Version::V6 => {
            let source = array(packet, source).ok_or(DropReason::Truncated)?;
            let destination = array(packet, destination).ok_or(DropReason::Truncated)?;
            match sources {
                Sources::Own { v6: Some(own), .. } if own.octets() == source => {}
                Sources::Own { v6: Some(_), .. } => return Err(DropReason::Spoofed),
                Sources::Own { v6: None, .. } | Sources::AnyV4 => return Err(DropReason::Family),
            }
            if !address::is_host_v6(destination) {
                return Err(DropReason::Destination);
            }
        }
    }
    Ok(())
}

/// Of what the TUN gives: the kernel's own messages to groups are for nobody, and
/// no answer comes from an address that no question could go to.
fn correspondents(parsed: &Parsed, packet: &[u8]) -> Result<(), DropReason> {
    let (source, destination) = (
        Side::Source.at(parsed.version),
        Side::Destination.at(parsed.version),
    );
    let (group, host) = match parsed.version {
        Version::V4 => {
            let [first, ..]: [u8; 4] = array(packet, destination).ok_or(DropReason::Truncated)?;
            let source = array(packet, source).ok_or(DropReason::Truncated)?;
            (first >= 224, address::is_host_v4(source))
        }
        Version::V6 => {
            let [first, ..]: [u8; 16] = array(packet, destination).ok_or(DropReason::Truncated)?;
            let source = array(packet, source).ok_or(DropReason::Truncated)?;
            (first == 0xff, address::is_host_v6(source))
        }
    };
    if group {
        Err(DropReason::Recipient)
    } else if !host {
        Err(DropReason::Destination)
    } else {
        Ok(())
    }
}

fn transport(parsed: &Parsed) -> Result<(), DropReason> {
    match parsed.transport {
        Transport::Tcp { .. } => Ok(()),
        Transport::Udp { length, .. } => {
            let present = parsed.len - parsed.l4;
            let fits = if parsed.is_whole() {
                length == present
            } else {
                // The rest of the datagram comes in other fragments.
                length > present
            };
            if fits {
                Ok(())
            } else {
                Err(DropReason::TransportHeader)
            }
        }
        Transport::Icmp(Icmp { kind, .. }) => {
            let passes = match parsed.version {
                // Echo, the errors that are no redirect, timestamps.
                Version::V4 => matches!(kind, 0 | 3 | 4 | 8 | 11 | 12 | 13 | 14),
                // Echo and errors: not neighbour, router or listener discovery.
                Version::V6 => matches!(kind, 1..=4 | 128 | 129),
            };
            if passes {
                Ok(())
            } else {
                Err(DropReason::IcmpType)
            }
        }
        // A later fragment says its protocol too.
        Transport::Later => match (parsed.protocol, parsed.version) {
            (protocol::TCP | protocol::UDP, _)
            | (protocol::ICMP, Version::V4)
            | (protocol::ICMPV6, Version::V6) => Ok(()),
            _ => Err(DropReason::Protocol),
        },
        Transport::Other => Err(DropReason::Protocol),
    }
}

/// Connection tracking calls all other combinations invalid.
fn tcp_flags(flags: u8) -> Result<(), DropReason> {
    use tcp_flag::{ACK, FIN, RST, SYN, URG};
    const RST_ACK: u8 = RST | ACK;
    const SYN_ACK: u8 = SYN | ACK;
    const SYN_URG: u8 = SYN | URG;
    const ACK_URG: u8 = ACK | URG;
    const FIN_ACK: u8 = FIN | ACK;
    const FIN_ACK_URG: u8 = FIN | ACK | URG;
    match flags & (FIN | SYN | RST | ACK | URG) {
        SYN | SYN_ACK | SYN_URG | RST | RST_ACK | ACK | ACK_URG | FIN_ACK | FIN_ACK_URG => Ok(()),
        _ => Err(DropReason::TcpFlags),
    }
}

fn fragment(parsed: &Parsed) -> Result<(), DropReason> {
    let Some(Fragment { offset, more, .. }) = parsed.fragment else {
        return Ok(());
    };
    if parsed.is_whole() {
        return Ok(());
    }
    let carried = parsed.len - parsed.l4;
    let end = u32::from(offset) + u32::from(carried);
    // A last part of another's place could replace the header that was judged
    // in the first one: TCP's flags and ports lie within 20 bytes (RFC 3128).
    let hides = parsed.protocol == protocol::TCP && (1..20).contains(&offset);
    if carried == 0 || (more && !carried.is_multiple_of(8)) || end > 65_535 || hides {
        return Err(DropReason::Fragment);
    }
    Ok(())
}

fn check_offload(
    parsed: &Parsed,
    offload: Offload,
    limits: &Limits,
    least: u16,
) -> Result<(), DropReason> {
    if offload == Offload::NONE {
        return if parsed.len > limits.mtu {
            Err(DropReason::TooBig)
        } else {
            Ok(())
        };
    }
    let (tcp, udp) = match parsed.transport {
        Transport::Tcp { flags, .. } => (Some(flags), false),
        Transport::Udp { .. } => (None, true),
        Transport::Icmp(_) | Transport::Later | Transport::Other => (None, false),
    };
    // Nobody can finish the checksum of a part.
    if !limits.offload || !offload.partial || !parsed.is_whole() || !(tcp.is_some() || udp) {
        return Err(DropReason::Offload);
    }
    if offload.gso_type == gso_type::NONE {
        return match (offload.gso_size, parsed.len > limits.mtu) {
            (0, false) => Ok(()),
            (0, true) => Err(DropReason::TooBig),
            (1.., _) => Err(DropReason::Offload),
        };
    }
    let kind_fits = match offload.gso_type {
        gso_type::TCP_V4 => tcp.is_some() && parsed.version == Version::V4,
        gso_type::TCP_V6 => tcp.is_some() && parsed.version == Version::V6,
        gso_type::UDP_L4 => udp,
        _ => false,
    };
    // Beginnings and resets are not repeated segment by segment.
    let bulk = tcp.is_none_or(|flags| flags & (tcp_flag::SYN | tcp_flag::RST) == 0);
    let segment = parsed.header_len() + usize::from(offload.gso_size);
    let fits = kind_fits
        && bulk
        && parsed.is_plain()
        && parsed.payload_len() > 0
        && offload.gso_size >= least
        && segment <= limits.mtu.into();
    if fits {
        Ok(())
    } else {
        Err(DropReason::Offload)
    }
}

/// A datagram may go without a checksum in IPv4 only.
fn udp_without_sum(parsed: &Parsed, packet: &[u8], offload: Offload) -> Result<(), DropReason> {
    let udp = matches!(parsed.transport, Transport::Udp { .. });
    if udp
        && parsed.version == Version::V6
        && !offload.partial
        && word(packet, parsed.l4() + 6) == Some(0)
    {
        return Err(DropReason::TransportChecksum);
    }
    Ok(())
}

/// Whether the checksum of a whole packet is what its bytes sum to. True where there is none.
pub(crate) fn transport_sum_is_right(parsed: &Parsed, packet: &[u8]) -> bool {
    let Some(body) = packet.get(parsed.l4()..parsed.len()) else {
        return false;
    };
    let pseudo = match parsed.transport {
        Transport::Later | Transport::Other => return true,
        Transport::Icmp(_) if parsed.version == Version::V4 => 0,
        Transport::Udp { .. }
            if parsed.version == Version::V4 && word(body, UDP_HEADER - 2) == Some(0) =>
        {
            return true;
        }
        Transport::Tcp { .. } | Transport::Udp { .. } | Transport::Icmp(_) => {
            pseudo_sum(parsed, packet, parsed.len - parsed.l4)
        }
    };
    checksum::add(pseudo, checksum::sum(body)) == 0xffff
}

/// The sum of the pseudo-header for a transport part of this length.
pub(crate) fn pseudo_sum(parsed: &Parsed, packet: &[u8], length: u16) -> u16 {
    let (source, destination) = (
        Side::Source.at(parsed.version),
        Side::Destination.at(parsed.version),
    );
    match parsed.version {
        Version::V4 => checksum::pseudo_v4(
            array(packet, source).unwrap_or_default(),
            array(packet, destination).unwrap_or_default(),
            parsed.protocol,
            length,
        ),
        Version::V6 => checksum::pseudo_v6(
            array(packet, source).unwrap_or_default(),
            array(packet, destination).unwrap_or_default(),
            parsed.protocol,
            length,
        ),
    }
}
