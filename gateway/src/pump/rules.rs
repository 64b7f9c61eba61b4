//! What a packet must be to pass, and what is changed in it.

use std::net::{Ipv4Addr, Ipv6Addr};

use rvpn_proto::record::{Offload, gso_type};

use crate::meter::DropReason;
use crate::tun::VIRTIO_LEN;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const FRAGMENT: u8 = 44;
/// Everything that is rewritten lies within this: an error message's own
/// headers and those of the packet it quotes.
pub(super) const HEAD: usize = 128;
/// Fewer bytes a segment would make tens of thousands of packets out of one.
const MIN_SEGMENT: u16 = 256;
const VIRTIO_NEEDS_CSUM: u8 = 1;
const VIRTIO_ECN: u8 = 0x80;

/// A packet that passed, and where its parts are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checked {
    /// Its length by its own header; what trails is cut.
    pub(super) len: usize,
    /// Of all headers, IP and transport.
    pub(super) header_len: usize,
    pub(super) v6: bool,
    protocol: u8,
    /// Where the transport header is.
    l4: usize,
    /// A fragment other than the first, which has no transport header.
    later: bool,
    offload: Offload,
}

/// Which address is the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// The source.
    Outbound,
    /// The destination.
    Inbound,
}

/// Reads the headers of a packet that leaves or enters a client.
pub(super) fn check(packet: &[u8], offload: Offload, mtu: u16) -> Result<Checked, DropReason> {
    let checked = match packet.first().map(|b| b >> 4) {
        Some(4) => check_v4(packet)?,
        Some(6) => check_v6(packet)?,
        _ => return Err(DropReason::Malformed),
    };
    let checked = transport(&packet[..checked.len], checked)?;
    check_offload(Checked { offload, ..checked }, mtu)
}

fn check_v4(packet: &[u8]) -> Result<Checked, DropReason> {
    let Some(header) = packet.first_chunk::<20>() else {
        return Err(DropReason::Malformed);
    };
    match header[0] & 15 {
        0..5 => return Err(DropReason::Malformed),
        5 => {}
        _ => return Err(DropReason::Options),
    }
    let len = usize::from(u16_at(header, 2));
    if len < 20 || len > packet.len() {
        return Err(DropReason::Malformed);
    }
    if sum(header, 0) != 0xffff {
        return Err(DropReason::Checksum);
    }
    if header[8] == 0 {
        return Err(DropReason::HopLimit);
    }
    let fragment = u16_at(header, 6);
    Ok(Checked {
        len,
        header_len: 20,
        v6: false,
        protocol: header[9],
        l4: 20,
        later: fragment & 0x1fff != 0,
        offload: Offload::NONE,
    })
}

fn check_v6(packet: &[u8]) -> Result<Checked, DropReason> {
    let Some(header) = packet.first_chunk::<40>() else {
        return Err(DropReason::Malformed);
    };
    let len = 40 + usize::from(u16_at(header, 4));
    if len > packet.len() {
        return Err(DropReason::Malformed);
    }
    if header[7] == 0 {
        return Err(DropReason::HopLimit);
    }
    let (mut protocol, mut l4, mut later) = (header[6], 40, false);
    if protocol == FRAGMENT {
        let Some(fragment) = packet[40..len].first_chunk::<8>() else {
            return Err(DropReason::Malformed);
        };
        (protocol, l4) = (fragment[0], 48);
        later = u16_at(fragment, 2) & 0xfff8 != 0;
    }
    Ok(Checked {
        len,
        header_len: l4,
        v6: true,
        protocol,
        l4,
        later,
        offload: Offload::NONE,
    })
}

fn transport(packet: &[u8], checked: Checked) -> Result<Checked, DropReason> {
    let least = match (checked.protocol, checked.v6) {
        (TCP, _) => 20,
        (UDP, _) | (ICMP, false) | (ICMPV6, true) => 8,
        // Hop-by-hop, routing and destination options.
        (0 | 43 | 60, true) => return Err(DropReason::Options),
        _ => return Err(DropReason::Protocol),
    };
    if checked.later {
        return Ok(checked);
    }
    let l4 = &packet[checked.l4..];
    if l4.len() < least {
        return Err(DropReason::Malformed);
    }
    let header = if checked.protocol == TCP {
        usize::from(l4[12] >> 4) * 4
    } else {
        8
    };
    if header < least || header > l4.len() {
        return Err(DropReason::Malformed);
    }
    let fragmented = first_fragment(packet, checked);
    if checked.protocol == UDP && !fragmented && usize::from(u16_at(l4, 4)) != l4.len() {
        return Err(DropReason::Malformed);
    }
    Ok(Checked {
        header_len: checked.l4 + header,
        ..checked
    })
}

fn first_fragment(packet: &[u8], checked: Checked) -> bool {
    if checked.v6 {
        checked.l4 == 48
    } else {
        u16_at(packet, 6) & 0x3fff != 0
    }
}

fn check_offload(checked: Checked, mtu: u16) -> Result<Checked, DropReason> {
    let Offload {
        partial,
        gso_type: kind,
        gso_size,
    } = checked.offload;
    let mtu = usize::from(mtu);
    if partial && (checked.later || !matches!(checked.protocol, TCP | UDP)) {
        return Err(DropReason::Offload);
    }
    if kind == gso_type::NONE {
        return if checked.len > mtu {
            Err(DropReason::TooBig)
        } else {
            Ok(checked)
        };
    }
    let fits = match kind {
        gso_type::TCP_V4 => !checked.v6 && checked.protocol == TCP,
        gso_type::TCP_V6 => checked.v6 && checked.protocol == TCP,
        gso_type::UDP_L4 => checked.protocol == UDP,
        _ => false,
    };
    let sane = partial
        && !checked.later
        && checked.len > checked.header_len
        && gso_size >= MIN_SEGMENT
        && checked.header_len + usize::from(gso_size) <= mtu;
    if fits && sane && checked.l4 == if checked.v6 { 40 } else { 20 } {
        Ok(checked)
    } else {
        Err(DropReason::Offload)
    }
}

impl Checked {
    /// Packets and bytes as a client's programs see them.
    pub(super) fn size(&self) -> (u64, u64) {
        size(self.len, self.header_len, self.offload)
    }

    /// The address that is the client's, if the packet is IPv4.
    pub(super) fn client_v4(&self, head: &[u8], direction: Direction) -> Option<Ipv4Addr> {
        (!self.v6).then(|| v4_at(head, at(false, direction)))
    }

    /// The address that is the client's, if the packet is IPv6.
    pub(super) fn client_v6(&self, head: &[u8], direction: Direction) -> Option<Ipv6Addr> {
        self.v6.then(|| v6_at(head, at(true, direction)))
    }

    /// Whether the other address is one that a client may speak with at all.
    /// What else it may not is for the kernel's rules, which know more.
    pub(super) fn peer_is_unicast(&self, head: &[u8], direction: Direction) -> bool {
        let other = match direction {
            Direction::Outbound => Direction::Inbound,
            Direction::Inbound => Direction::Outbound,
        };
        if self.v6 {
            let peer = v6_at(head, at(true, other));
            !(peer.is_multicast() || peer.is_unspecified() || peer.is_loopback())
        } else {
            let peer = v4_at(head, at(false, other));
            let [first, ..] = peer.octets();
            !(first == 0 || first == 127 || first >= 224)
        }
    }

    /// Gives the client another address in the packet's head, and in the
    /// packet quoted by an error message; all sums stay as right as they were.
    pub(super) fn translate(&self, head: &mut [u8], direction: Direction, new: &[u8]) {
        let at = at(self.v6, direction);
        let mut old = [0; 16];
        let old = &mut old[..new.len()];
        old.copy_from_slice(&head[at..at + new.len()]);
        head[at..at + new.len()].copy_from_slice(new);
        if !self.v6 {
            adjust(head, 10, old, new);
        }
        if self.later {
            return;
        }
        match self.protocol {
            TCP => self.adjust_transport(head, self.l4 + 16, old, new),
            UDP => {
                let sum_at = self.l4 + 6;
                // Zero means none, and a sum that comes to zero is written as all ones.
                if self.offload.partial || u16_at(head, sum_at) != 0 {
                    self.adjust_transport(head, sum_at, old, new);
                    if !self.offload.partial && u16_at(head, sum_at) == 0 {
                        head[sum_at..sum_at + 2].copy_from_slice(&[0xff, 0xff]);
                    }
                }
            }
            ICMPV6 => {
                adjust(head, self.l4 + 2, old, new);
                self.translate_quoted(head, direction, old, new);
            }
            _ => self.translate_quoted(head, direction, old, new),
        }
    }

    fn adjust_transport(&self, head: &mut [u8], sum_at: usize, old: &[u8], new: &[u8]) {
        if self.offload.partial {
            // The field holds the sum itself, not its complement.
            let sum = !u16_at(head, sum_at);
            head[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
            adjust(head, sum_at, old, new);
            let sum = !u16_at(head, sum_at);
            head[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
        } else {
            adjust(head, sum_at, old, new);
        }
    }

    /// An error quotes a packet of the other direction.
    fn translate_quoted(&self, head: &mut [u8], direction: Direction, old: &[u8], new: &[u8]) {
        let kind = head[self.l4];
        let is_error = if self.v6 {
            kind < 128
        } else {
            matches!(kind, 3 | 4 | 5 | 11 | 12)
        };
        let quoted = self.l4 + 8;
        let (version, least) = if self.v6 { (6, 40) } else { (4, 20) };
        if !is_error || head.len() < quoted + least || head[quoted] >> 4 != version {
            return;
        }
        let other = match direction {
            Direction::Outbound => Direction::Inbound,
            Direction::Inbound => Direction::Outbound,
        };
        let at = quoted + at(self.v6, other);
        if head[at..at + old.len()] != *old {
            return;
        }
        head[at..at + new.len()].copy_from_slice(new);
        if self.v6 {
            adjust(head, self.l4 + 2, old, new);
        } else {
            // The address's change and that of the quoted header's sum cancel
            // out in the outer sum.
            adjust(head, quoted + 10, old, new);
        }
    }

    /// The virtio header for the kernel, made of nothing but what was checked.
    pub(super) fn virtio(&self) -> [u8; VIRTIO_LEN] {
        let mut header = [0; VIRTIO_LEN];
        if !self.offload.partial {
            return header;
        }
        let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX).to_le_bytes();
        header[0] = VIRTIO_NEEDS_CSUM;
        header[1] = self.offload.gso_type;
        header[2..4].copy_from_slice(&short(self.header_len));
        header[4..6].copy_from_slice(&self.offload.gso_size.to_le_bytes());
        header[6..8].copy_from_slice(&short(self.l4));
        let offset = if self.protocol == TCP { 16 } else { 6 };
        header[8..10].copy_from_slice(&short(offset));
        header
    }

    /// Finishes what the kernel left undone, for a client that cannot: writes
    /// every segment, complete, over the packet and passes it on.
    pub(super) fn finish(&self, packet: &mut [u8], mut each: impl FnMut(&[u8])) {
        let packet = &mut packet[..self.len];
        if !self.offload.partial {
            each(packet);
            return;
        }
        if self.offload.gso_type == gso_type::NONE {
            self.complete(packet);
            each(packet);
            return;
        }
        let mut headers = [0; HEAD];
        let headers = &mut headers[..self.header_len];
        headers.copy_from_slice(&packet[..self.header_len]);
        let step = usize::from(self.offload.gso_size);
        let payload = self.len - self.header_len;
        let count = payload.div_ceil(step);
        for n in 0..count {
            // In front of each segment's payload lies what was passed on already.
            let begin = n * step;
            let end = self.header_len + payload.min(begin + step);
            let segment = &mut packet[begin..end];
            segment[..self.header_len].copy_from_slice(headers);
            self.segment(segment, n, n + 1 == count);
            each(segment);
        }
    }

    fn segment(&self, segment: &mut [u8], n: usize, last: bool) {
        let len = segment.len();
        let l4 = self.l4;
        if self.protocol == TCP {
            let skipped = n as u32 * u32::from(self.offload.gso_size);
            let seq = u32_at(segment, l4 + 4).wrapping_add(skipped);
            segment[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
            let flags = &mut segment[l4 + 13];
            if n > 0 {
                // Congestion window reduced: said once.
                *flags &= !0x80;
            }
            if !last {
                // The end and the push come with the last byte.
                *flags &= !0x09;
            }
        } else {
            let udp = (len - l4) as u16;
            segment[l4 + 4..l4 + 6].copy_from_slice(&udp.to_be_bytes());
        }
        if self.v6 {
            segment[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        } else {
            segment[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let id = u16_at(segment, 4).wrapping_add(n as u16);
            segment[4..6].copy_from_slice(&id.to_be_bytes());
            segment[10..12].fill(0);
            let sum = !sum(&segment[..20], 0);
            segment[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        self.complete(segment);
    }

    /// Computes the transport checksum of a whole packet.
    fn complete(&self, packet: &mut [u8]) {
        let l4 = self.l4;
        let field = l4 + if self.protocol == TCP { 16 } else { 6 };
        packet[field..field + 2].fill(0);
        let addresses = if self.v6 { 8..40 } else { 12..20 };
        let start = u64::from(self.protocol) + (packet.len() - l4) as u64;
        let pseudo = raw_sum(&packet[addresses], start);
        let sum = !fold(raw_sum(&packet[l4..], pseudo));
        let sum = if sum == 0 && self.protocol == UDP {
            0xffff
        } else {
            sum
        };
        packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Packets and bytes of a possibly super packet, as programs see them.
pub(super) fn size(len: usize, header_len: usize, offload: Offload) -> (u64, u64) {
    let step = usize::from(offload.gso_size);
    if step == 0 {
        return (1, len as u64);
    }
    let count = len.saturating_sub(header_len).div_ceil(step).max(1);
    (count as u64, (len + (count - 1) * header_len) as u64)
}

/// Cuts segments off the front of a TCP super-packet. Returns what is left of it.
pub(super) fn cut(
    packet: &mut [u8],
    header_len: usize,
    offload: Offload,
    segments: u16,
) -> (usize, Offload) {
    let gone = usize::from(segments) * usize::from(offload.gso_size);
    let len = packet.len() - gone;
    let v6 = packet[0] >> 4 == 6;
    let l4 = if v6 { 40 } else { 20 };
    packet.copy_within(header_len + gone.., header_len);
    let packet = &mut packet[..len];
    let seq = u32_at(packet, l4 + 4).wrapping_add(gone as u32);
    packet[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
    packet[l4 + 13] &= !0x80;
    if v6 {
        packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    } else {
        let old = [packet[2], packet[3]];
        let new = (len as u16).to_be_bytes();
        packet[2..4].copy_from_slice(&new);
        adjust(packet, 10, &old, &new);
    }
    // The pseudo-header's length is in the partial sum.
    let old = ((len + gone - l4) as u16).to_be_bytes();
    let new = ((len - l4) as u16).to_be_bytes();
    let field = l4 + 16;
    let sum = !u16_at(packet, field);
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    adjust(packet, field, &old, &new);
    let sum = !u16_at(packet, field);
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    let left = if len - header_len > usize::from(offload.gso_size) {
        offload
    } else {
        Offload {
            partial: true,
            ..Offload::NONE
        }
    };
    (len, left)
}

/// The kernel's word on a packet that it gives us.
pub(super) fn read_virtio(read: &[u8]) -> Option<Offload> {
    let header = read.first_chunk::<VIRTIO_LEN>()?;
    Some(Offload {
        partial: header[0] & VIRTIO_NEEDS_CSUM != 0,
        gso_type: header[1] & !VIRTIO_ECN,
        gso_size: u16::from_le_bytes([header[4], header[5]]),
    })
}

fn at(v6: bool, direction: Direction) -> usize {
    match (v6, direction) {
        (false, Direction::Outbound) => 12,
        (false, Direction::Inbound) => 16,
        (true, Direction::Outbound) => 8,
        (true, Direction::Inbound) => 24,
    }
}

/// Brings a checksum up to date with a change (RFC 1624, equation 3).
fn adjust(head: &mut [u8], sum_at: usize, old: &[u8], new: &[u8]) {
    let mut total = u64::from(!u16_at(head, sum_at));
    for (old, new) in old.chunks_exact(2).zip(new.chunks_exact(2)) {
        total += u64::from(!u16_at(old, 0)) + u64::from(u16_at(new, 0));
    }
    let sum = !fold(total);
    head[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn sum(bytes: &[u8], start: u64) -> u16 {
    fold(raw_sum(bytes, start))
}

fn raw_sum(bytes: &[u8], start: u64) -> u64 {
    let (pairs, odd) = bytes.as_chunks::<2>();
    let mut total = start;
    for pair in pairs {
        total += u64::from(u16::from_be_bytes(*pair));
    }
    if let [last] = odd {
        total += u64::from(*last) << 8;
    }
    total
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn v4_at(bytes: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32_at(bytes, at))
}

fn v6_at(bytes: &[u8], at: usize) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[at..at + 16]);
    Ipv6Addr::from(octets)
}
