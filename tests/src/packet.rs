//! Inner packets, well-formed by etherparse or wrong on purpose by hand.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{PacketBuilder, TcpHeader};

fn build(step: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    step(&mut out);
    out
}

/// A UDP datagram of either family; both addresses must be of one.
pub fn udp(src: &str, sport: u16, dst: &str, dport: u16, payload: &[u8]) -> Vec<u8> {
    build(
        |out| match (src.parse::<Ipv4Addr>(), dst.parse::<Ipv4Addr>()) {
            (Ok(s), Ok(d)) => PacketBuilder::ipv4(s.octets(), d.octets(), 64)
                .udp(sport, dport)
                .write(out, payload)
                .expect("udp"),
            _ => PacketBuilder::ipv6(v6(src), v6(dst), 64)
                .udp(sport, dport)
                .write(out, payload)
                .expect("udp"),
        },
    )
}

fn v6(a: &str) -> [u8; 16] {
    a.parse::<Ipv6Addr>()
        .unwrap_or_else(|e| panic!("{a}: {e}"))
        .octets()
}

/// TCP flags by letter, as tcpdump writes them.
pub fn tcp(
    (src, sport): (&str, u16),
    (dst, dport): (&str, u16),
    flags: &str,
    seq: u32,
    ack: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut header = TcpHeader::new(sport, dport, seq, 65_000);
    header.acknowledgment_number = ack;
    header.syn = flags.contains('S');
    header.ack = flags.contains('.');
    header.fin = flags.contains('F');
    header.rst = flags.contains('R');
    header.psh = flags.contains('P');
    header.urg = flags.contains('U');
    build(
        |out| match (src.parse::<Ipv4Addr>(), dst.parse::<Ipv4Addr>()) {
            (Ok(s), Ok(d)) => PacketBuilder::ipv4(s.octets(), d.octets(), 64)
                .tcp_header(header)
                .write(out, payload)
                .expect("tcp"),
            _ => PacketBuilder::ipv6(v6(src), v6(dst), 64)
                .tcp_header(header)
                .write(out, payload)
                .expect("tcp"),
        },
    )
}

/// The TCP header and what follows it, of a packet of either family without options.
pub fn tcp_header(p: &[u8]) -> Option<&[u8]> {
    let (protocol, at) = match p.first()? >> 4 {
        4 => (p.get(9)?, 20),
        _ => (p.get(6)?, 40),
    };
    p.get(at..).filter(|t| *protocol == 6 && t.len() >= 20)
}

/// An echo request.
pub fn echo(src: &str, dst: &str, id: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    build(
        |out| match (src.parse::<Ipv4Addr>(), dst.parse::<Ipv4Addr>()) {
            (Ok(s), Ok(d)) => PacketBuilder::ipv4(s.octets(), d.octets(), 64)
                .icmpv4_echo_request(id, seq)
                .write(out, payload)
                .expect("echo"),
            _ => PacketBuilder::ipv6(v6(src), v6(dst), 64)
                .icmpv6_echo_request(id, seq)
                .write(out, payload)
                .expect("echo"),
        },
    )
}

/// An ICMPv6 message of any type.
pub fn icmp6(src: &str, dst: &str, kind: u8, code: u8, payload: &[u8]) -> Vec<u8> {
    build(|out| {
        PacketBuilder::ipv6(v6(src), v6(dst), 255)
            .icmpv6_raw(kind, code, [0; 4])
            .write(out, payload)
            .expect("icmp6");
    })
}

/// An ICMP message of any type.
pub fn icmp4(src: &str, dst: &str, kind: u8, code: u8, payload: &[u8]) -> Vec<u8> {
    let (s, d): (Ipv4Addr, Ipv4Addr) = (src.parse().expect("v4"), dst.parse().expect("v4"));
    build(|out| {
        PacketBuilder::ipv4(s.octets(), d.octets(), 64)
            .icmpv4_raw(kind, code, [0; 4])
            .write(out, payload)
            .expect("icmp4");
    })
}

/// Any protocol number, with IPv4 options if given (a multiple of four bytes).
pub fn raw4(src: &str, dst: &str, proto: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let (s, d): (Ipv4Addr, Ipv4Addr) = (src.parse().expect("v4"), dst.parse().expect("v4"));
    let header = 20 + options.len();
    let total = u16::try_from(header + payload.len()).expect("length");
    let mut p = vec![0x40 | u8::try_from(header / 4).expect("options"), 0];
    p.extend(total.to_be_bytes());
    p.extend([0x12, 0x34, 0, 0, 64, proto, 0, 0]);
    p.extend(s.octets());
    p.extend(d.octets());
    p.extend(options);
    fix_header(&mut p);
    p.extend(payload);
    p
}

/// Any next header after a bare IPv6 header.
pub fn raw6(src: &str, dst: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = vec![0x60, 0, 0, 0];
    p.extend(u16::try_from(payload.len()).expect("length").to_be_bytes());
    p.extend([next, 64]);
    p.extend(v6(src));
    p.extend(v6(dst));
    p.extend(payload);
    p
}

/// Sets time to live or hop limit.
pub fn with_ttl(mut p: Vec<u8>, ttl: u8) -> Vec<u8> {
    if p[0] >> 4 == 4 {
        p[8] = ttl;
        fix_header(&mut p);
    } else {
        p[7] = ttl;
    }
    p
}

/// Recomputes an IPv4 header's checksum.
pub fn fix_header(p: &mut [u8]) {
    let len = usize::from(p[0] & 0x0f) * 4;
    p[10..12].fill(0);
    let sum = checksum(&p[..len]);
    p[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// The internet checksum, plainly.
pub fn checksum(data: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in data.chunks(2) {
        sum += u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// Splits an IPv4 packet into fragments with at most this much payload each (a multiple of eight).
pub fn fragments(p: &[u8], size: usize) -> Vec<Vec<u8>> {
    let (header, payload) = p.split_at(20);
    let count = payload.len().div_ceil(size);
    payload
        .chunks(size)
        .enumerate()
        .map(|(i, part)| {
            let mut f = header.to_vec();
            f.extend(part);
            let more = if i + 1 < count { 0x2000 } else { 0 };
            let field = u16::try_from(i * size / 8).expect("offset") | more;
            let total = u16::try_from(f.len()).expect("length");
            f[2..4].copy_from_slice(&total.to_be_bytes());
            f[6..8].copy_from_slice(&field.to_be_bytes());
            fix_header(&mut f);
            f
        })
        .collect()
}

/// The same for IPv6, by a fragment header after the first. With one piece only
/// it is an atomic fragment: the header alone, which says that there is no more.
pub fn fragments6(p: &[u8], size: usize, id: u32) -> Vec<Vec<u8>> {
    let (header, payload) = p.split_at(40);
    let count = payload.len().div_ceil(size);
    payload
        .chunks(size)
        .enumerate()
        .map(|(i, part)| {
            let mut f = header.to_vec();
            f[6] = 44;
            let len = u16::try_from(8 + part.len()).expect("length");
            f[4..6].copy_from_slice(&len.to_be_bytes());
            let more = u16::from(i + 1 < count);
            let field = u16::try_from(i * size).expect("offset") | more;
            f.extend([header[6], 0]);
            f.extend(field.to_be_bytes());
            f.extend(id.to_be_bytes());
            f.extend(part);
            f
        })
        .collect()
}
