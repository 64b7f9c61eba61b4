//! Packets for the cases, written by etherparse and not by what is tested, and
//! the Internet checksum once more, as plainly as it can be.
#![expect(dead_code, reason = "every test program takes from here what it needs")]

use std::net::IpAddr;

use etherparse::{IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder, TcpHeader};
use rvpn_proto::nat::Nat;
use rvpn_proto::packet::Parsed;
use rvpn_proto::record::Offload;
use rvpn_proto::validate::{self, DropReason, Limits, Sources};

/// The client as it sees itself, as the device sees it, whom it speaks with and
/// the next client's lease: one family each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub(crate) inner: &'static str,
    pub(crate) lease: &'static str,
    pub(crate) far: &'static str,
    pub(crate) other: &'static str,
    /// On the way.
    pub(crate) router: &'static str,
    pub(crate) icmp: u8,
}

pub(crate) const V4: Family = Family {
    inner: "10.64.0.2",
    lease: "10.64.7.2",
    far: "1.1.1.1",
    other: "10.64.8.2",
    router: "9.9.9.9",
    icmp: 1,
};
pub(crate) const V6: Family = Family {
    inner: "fd3a:91c2:77e0::1",
    lease: "fd3a:91c2:77e0:7::1",
    far: "2606:4700:4700::1111",
    other: "fd3a:91c2:77e0:8::1",
    router: "2001:db8::9",
    icmp: 58,
};
pub(crate) const FAMILIES: [Family; 2] = [V4, V6];

pub(crate) const LIMITS: Limits = Limits {
    mtu: 1500,
    offload: false,
    verify: true,
};

pub(crate) fn nat() -> Nat {
    let ip = |text: &str| text.parse().unwrap();
    let ip6 = |text: &str| text.parse().unwrap();
    Nat::new(ip(V4.inner), ip(V4.lease), ip6(V6.inner), ip6(V6.lease))
}

/// Both of the client's addresses.
pub(crate) fn both() -> Sources {
    Sources::Own {
        v4: Some(V4.inner.parse().unwrap()),
        v6: Some(V6.inner.parse().unwrap()),
    }
}

/// The judgement on a finished packet of the client's.
pub(crate) fn outbound(packet: &[u8]) -> Result<Parsed, DropReason> {
    validate::outbound(packet, Offload::NONE, &LIMITS, &both())
}

/// The judgement on a finished packet from the device.
pub(crate) fn inbound(packet: &[u8]) -> Result<Parsed, DropReason> {
    validate::inbound(packet, Offload::NONE, &LIMITS)
}

pub(crate) fn why(judged: Result<Parsed, DropReason>) -> Option<DropReason> {
    judged.err()
}

/// Any packet: an IP header with this in its protocol field, and what follows it.
pub(crate) fn raw(src: &str, dst: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (src.parse().unwrap(), dst.parse().unwrap()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let len = body.len().try_into().unwrap();
            let mut header =
                Ipv4Header::new(len, 64, IpNumber(protocol), src.octets(), dst.octets()).unwrap();
            header.header_checksum = header.calc_header_checksum();
            header.write(&mut packet).unwrap();
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: body.len().try_into().unwrap(),
                next_header: IpNumber(protocol),
                hop_limit: 64,
                source: src.octets(),
                destination: dst.octets(),
            };
            header.write(&mut packet).unwrap();
        }
        _ => panic!("{src} and {dst} are not of one family"),
    }
    packet.extend_from_slice(body);
    packet
}

pub(crate) fn udp(src: (&str, u16), dst: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = match (src.0.parse().unwrap(), dst.0.parse().unwrap()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => PacketBuilder::ipv4(a.octets(), b.octets(), 64),
        (IpAddr::V6(a), IpAddr::V6(b)) => PacketBuilder::ipv6(a.octets(), b.octets(), 64),
        _ => panic!("{src:?} and {dst:?} are not of one family"),
    };
    let builder = builder.udp(src.1, dst.1);
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// TCP flags as the header has them.
pub(crate) fn tcp(
    src: (&str, u16),
    dst: (&str, u16),
    flags: u8,
    sequence: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut header = TcpHeader::new(src.1, dst.1, sequence, 65_000);
    header.acknowledgment_number = 77;
    let mut packet = Vec::new();
    let builder = match (src.0.parse().unwrap(), dst.0.parse().unwrap()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => PacketBuilder::ipv4(a.octets(), b.octets(), 64),
        (IpAddr::V6(a), IpAddr::V6(b)) => PacketBuilder::ipv6(a.octets(), b.octets(), 64),
        _ => panic!("{src:?} and {dst:?} are not of one family"),
    };
    let builder = builder.tcp_header(header);
    builder.write(&mut packet, payload).unwrap();
    let l4 = l4(&packet);
    packet[l4 + 13] = flags;
    finish(&mut packet);
    packet
}

/// Of the family's own ICMP, with this behind type, code and checksum.
pub(crate) fn icmp(src: &str, dst: &str, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    let mut body = vec![kind, code, 0, 0];
    body.extend_from_slice(rest);
    let protocol = if src.contains(':') { 58 } else { 1 };
    let mut packet = raw(src, dst, protocol, &body);
    finish(&mut packet);
    packet
}

/// An error: type, code, the 32 bits of the header, the packet it is about.
pub(crate) fn error(
    src: &str,
    dst: &str,
    (kind, code): (u8, u8),
    info: u32,
    quoted: &[u8],
) -> Vec<u8> {
    let mut rest = info.to_be_bytes().to_vec();
    rest.extend_from_slice(quoted);
    icmp(src, dst, kind, code, &rest)
}

pub(crate) fn is_v6(packet: &[u8]) -> bool {
    packet[0] >> 4 == 6
}

/// Where the transport header of a plain packet is.
pub(crate) fn l4(packet: &[u8]) -> usize {
    if is_v6(packet) {
        40
    } else {
        usize::from(packet[0] & 15) * 4
    }
}

fn protocol(packet: &[u8]) -> u8 {
    if is_v6(packet) { packet[6] } else { packet[9] }
}

pub(crate) fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum.try_into().unwrap()
}

/// What the checksum of a plain packet's transport should be summed over.
pub(crate) fn pseudo(packet: &[u8]) -> Vec<u8> {
    let l4 = l4(packet);
    let mut pseudo = if is_v6(packet) {
        packet[8..40].to_vec()
    } else {
        packet[12..20].to_vec()
    };
    let length = u32::try_from(packet.len() - l4).unwrap();
    pseudo.extend(length.to_be_bytes());
    pseudo.extend([0, 0, 0, protocol(packet)]);
    pseudo
}

fn sum_at(packet: &[u8]) -> Option<usize> {
    let at = match protocol(packet) {
        6 => 16,
        17 => 6,
        1 | 58 => 2,
        _ => return None,
    };
    Some(l4(packet) + at)
}

/// Writes every checksum of a plain packet anew.
pub(crate) fn finish(packet: &mut [u8]) {
    finish_header(packet);
    let Some(at) = sum_at(packet) else { return };
    packet[at..at + 2].fill(0);
    let mut bytes = if protocol(packet) == 1 {
        Vec::new()
    } else {
        pseudo(packet)
    };
    bytes.extend_from_slice(&packet[l4(packet)..]);
    let mut check = !ones_sum(&bytes);
    if protocol(packet) == 17 && check == 0 {
        check = 0xffff;
    }
    packet[at..at + 2].copy_from_slice(&check.to_be_bytes());
}

/// Only that of the IPv4 header.
pub(crate) fn finish_header(packet: &mut [u8]) {
    if !is_v6(packet) {
        let end = usize::from(packet[0] & 15) * 4;
        let end = end.min(packet.len());
        packet[10..12].fill(0);
        let check = !ones_sum(&packet[..end]);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
    }
}

/// Leaves the checksum of TCP or UDP as a kernel with offload does.
pub(crate) fn make_partial(packet: &mut [u8]) {
    let at = sum_at(packet).unwrap();
    let sum = ones_sum(&pseudo(packet));
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// One piece of a packet's transport part, as a fragment.
pub(crate) fn piece(packet: &[u8], id: u16, at: usize, part: &[u8], more: bool) -> Vec<u8> {
    let head = if is_v6(packet) { 40 } else { 20 };
    let mut out = packet[..head].to_vec();
    if is_v6(packet) {
        let length = u16::try_from(8 + part.len()).unwrap();
        out[4..6].copy_from_slice(&length.to_be_bytes());
        out[6] = 44;
        let field = u16::try_from(at).unwrap() | u16::from(more);
        out.extend([packet[6], 0]);
        out.extend(field.to_be_bytes());
        out.extend(u32::from(id).to_be_bytes());
    } else {
        let length = u16::try_from(head + part.len()).unwrap();
        out[2..4].copy_from_slice(&length.to_be_bytes());
        out[4..6].copy_from_slice(&id.to_be_bytes());
        let field = u16::try_from(at / 8).unwrap() | if more { 0x2000 } else { 0 };
        out[6..8].copy_from_slice(&field.to_be_bytes());
        finish_header(&mut out);
    }
    out.extend_from_slice(part);
    out
}

/// A packet in pieces of so many bytes.
pub(crate) fn pieces(packet: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    let body = &packet[l4(packet)..];
    let count = body.len().div_ceil(size);
    body.chunks(size)
        .enumerate()
        .map(|(n, part)| piece(packet, id, n * size, part, n + 1 < count))
        .collect()
}

/// Where a fragment's part belongs, the part, and whether more follow.
pub(crate) fn part_of(fragment: &[u8]) -> (usize, &[u8], bool) {
    let word = |at: usize| u16::from_be_bytes([fragment[at], fragment[at + 1]]);
    if is_v6(fragment) {
        let field = word(42);
        (usize::from(field & 0xfff8), &fragment[48..], field & 1 != 0)
    } else {
        let field = word(6);
        let at = usize::from(field & 0x1fff) * 8;
        (at, &fragment[20..], field & 0x2000 != 0)
    }
}
