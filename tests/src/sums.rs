//! Checksums of whole packets, as plainly as they can be computed.

use crate::packet::checksum;

/// Protocol and place of the transport header; `None` for a fragment.
fn transport(p: &[u8]) -> Option<(u8, usize)> {
    if p[0] >> 4 == 4 {
        let pieces = u16::from_be_bytes([p[6], p[7]]) & 0x3fff != 0;
        (!pieces).then_some((p[9], usize::from(p[0] & 15) * 4))
    } else {
        (p[6] != 44).then_some((p[6], 40))
    }
}

/// The pseudo-header and everything behind the IP header.
fn summed(p: &[u8], protocol: u8, l4: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(p.len() + 16);
    if protocol != 1 {
        all.extend(if p[0] >> 4 == 4 {
            &p[12..20]
        } else {
            &p[8..40]
        });
        let length = u32::try_from(p.len() - l4).expect("length");
        all.extend(length.to_be_bytes());
        all.extend([0, 0, 0, protocol]);
    }
    all.extend(&p[l4..]);
    all
}

fn field(protocol: u8) -> Option<usize> {
    match protocol {
        6 => Some(16),
        17 => Some(6),
        1 | 58 => Some(2),
        _ => None,
    }
}

/// What is wrong with the sums of a packet, if anything. Of fragments only the
/// IP header has one.
pub fn wrong(p: &[u8]) -> Option<&'static str> {
    if p[0] >> 4 == 4 && checksum(&p[..usize::from(p[0] & 15) * 4]) != 0 {
        return Some("IPv4 header");
    }
    let (protocol, l4) = transport(p)?;
    let at = l4 + field(protocol)?;
    let none = protocol == 17 && p[at..at + 2] == [0, 0];
    if none {
        return (p[0] >> 4 == 6).then_some("UDP over IPv6 without one");
    }
    (checksum(&summed(p, protocol, l4)) != 0).then_some("transport")
}

/// Whether the field holds the sum of the pseudo-header only, as a partial one does.
pub fn is_partial(p: &[u8]) -> bool {
    let Some((protocol @ (6 | 17), l4)) = transport(p) else {
        return false;
    };
    let at = l4 + field(protocol).expect("it has one");
    let pseudo = summed(p, protocol, l4).len() - (p.len() - l4);
    let sum = !checksum(&summed(p, protocol, l4)[..pseudo]);
    p[at..at + 2] == sum.to_be_bytes()
}

/// Leaves the checksum to whoever hands the packet to a network.
pub fn make_partial(p: &mut [u8]) {
    let (protocol, l4) = transport(p).expect("a whole packet");
    let at = l4 + field(protocol).expect("it has one");
    let whole = summed(p, protocol, l4);
    let sum = !checksum(&whole[..whole.len() - (p.len() - l4)]);
    p[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Finishes a partial checksum, as whoever hands the packet to a network does.
pub fn finish(p: &mut [u8]) {
    let (protocol, l4) = transport(p).expect("a whole packet");
    let at = l4 + field(protocol).expect("it has one");
    p[at..at + 2].fill(0);
    let sum = match checksum(&summed(p, protocol, l4)) {
        0 if protocol == 17 => 0xffff,
        sum => sum,
    };
    p[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Makes the sum of a changed packet right again, or right as far as a partial
/// one goes. A fragment is left alone.
pub fn repair(p: &mut [u8], partial: bool) {
    if transport(p).is_none_or(|(protocol, _)| field(protocol).is_none()) {
        return;
    }
    if partial {
        make_partial(p);
    } else {
        finish(p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet;

    #[test]
    fn right_sums_are_told_from_wrong_ones() {
        for p in [
            packet::udp("10.64.0.2", 1, "1.1.1.1", 2, b"odd"),
            packet::udp("fd00::1", 1, "2606:4700:4700::1111", 2, b"even"),
            packet::tcp(("10.64.0.2", 1), ("1.1.1.1", 2), "S", 1, 0, b"x"),
            packet::echo("10.64.0.2", "1.1.1.1", 1, 2, b"x"),
            packet::echo("fd00::1", "2606:4700:4700::1111", 1, 2, b"x"),
        ] {
            assert_eq!(wrong(&p), None, "{p:02x?}");
            let mut bad = p.clone();
            *bad.last_mut().expect("bytes") ^= 1;
            assert_eq!(wrong(&bad), Some("transport"));
            let mut finished = bad.clone();
            if matches!(transport(&p), Some((6 | 17, _))) {
                finish(&mut finished);
                assert_eq!(wrong(&finished), None);
                assert!(!is_partial(&finished));
            }
        }
    }
}
