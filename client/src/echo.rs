//! Echo requests and their answers, as packets.

use std::net::IpAddr;

use rvpn_proto::checksum::{add, check, pseudo_v6, sum};

const V4: usize = 20;
const V6: usize = 40;
const ICMP: usize = 8;

/// Our side of all echo requests of one run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pinger {
    /// Our address.
    pub(crate) from: IpAddr,
    /// Theirs.
    pub(crate) to: IpAddr,
    /// Tells our answers from others'.
    pub(crate) id: u16,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// An answer.
    Reply {
        /// To which request.
        seq: u16,
        /// Hops left.
        hops: u8,
        /// Bytes of ICMP.
        bytes: usize,
    },
    /// Somebody on the way says why there will be none.
    Failed {
        /// Who.
        by: IpAddr,
        /// To which request.
        seq: u16,
        /// What they say.
        why: String,
    },
}

impl Pinger {
    /// A request with `payload` bytes.
    pub(crate) fn request(&self, seq: u16, payload: usize) -> Vec<u8> {
        let mut icmp = vec![0; ICMP + payload];
        icmp[4..6].copy_from_slice(&self.id.to_be_bytes());
        icmp[6..8].copy_from_slice(&seq.to_be_bytes());
        for (i, byte) in icmp[ICMP..].iter_mut().enumerate() {
            *byte = i as u8;
        }
        let length = icmp.len() as u16;
        let mut packet = Vec::with_capacity(V6 + icmp.len());
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                icmp[0] = 8;
                let total = (V4 as u16 + length).to_be_bytes();
                let [i0, i1] = seq.to_be_bytes();
                packet.extend([0x45, 0, total[0], total[1], i0, i1, 0, 0, 64, 1, 0, 0]);
                packet.extend(from.octets());
                packet.extend(to.octets());
                let header = check(sum(&packet));
                packet[10..12].copy_from_slice(&header.to_be_bytes());
                let check = check(sum(&icmp));
                icmp[2..4].copy_from_slice(&check.to_be_bytes());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                icmp[0] = 128;
                let [l0, l1] = length.to_be_bytes();
                packet.extend([0x60, 0, 0, 0, l0, l1, 58, 64]);
                packet.extend(from.octets());
                packet.extend(to.octets());
                let pseudo = pseudo_v6(from.octets(), to.octets(), 58, length);
                let check = check(add(pseudo, sum(&icmp)));
                icmp[2..4].copy_from_slice(&check.to_be_bytes());
            }
            // The callers choose our address by theirs.
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {}
        }
        packet.extend(icmp);
        packet
    }

    /// What a packet means to us; nothing if it is somebody else's.
    pub(crate) fn hear(&self, packet: &[u8]) -> Option<Heard> {
        let (source, destination, hops, icmp) = open(packet)?;
        if destination != self.from {
            return None;
        }
        let six = self.from.is_ipv6();
        let (kind, code) = (*icmp.first()?, *icmp.get(1)?);
        let reply = if six { 129 } else { 0 };
        if kind == reply {
            if source != self.to || half(icmp, 4)? != self.id {
                return None;
            }
            return Some(Heard::Reply {
                seq: half(icmp, 6)?,
                hops,
                bytes: icmp.len(),
            });
        }
        let why = match six {
            true => explain6(kind, code),
            false => explain4(kind, code),
        }?;
        // The error quotes our request.
        let (from, to, _, quoted) = open_quoted(icmp.get(ICMP..)?)?;
        if from != self.from || to != self.to || half(quoted, 4)? != self.id {
            return None;
        }
        Some(Heard::Failed {
            by: source,
            seq: half(quoted, 6)?,
            why,
        })
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

type Opened<'a> = (IpAddr, IpAddr, u8, &'a [u8]);

/// Addresses, hops and ICMP of a packet whose sums are right.
fn open(packet: &[u8]) -> Option<Opened<'_>> {
    let (source, destination, hops, icmp) = open_quoted(packet)?;
    let announced = match source {
        IpAddr::V4(_) => usize::from(half(packet, 2)?),
        IpAddr::V6(_) => V6 + usize::from(half(packet, 4)?),
    };
    if announced > packet.len() {
        return None;
    }
    let total = match (source, destination) {
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let length = u16::try_from(icmp.len()).ok()?;
            add(pseudo_v6(s.octets(), d.octets(), 58, length), sum(icmp))
        }
        _ => {
            let header = packet.get(..usize::from(packet[0] & 15) * 4)?;
            if sum(header) != 0xffff {
                return None;
            }
            sum(icmp)
        }
    };
    (total == 0xffff).then_some((source, destination, hops, icmp))
}

/// The same for as much of a packet as an error quotes.
fn open_quoted(packet: &[u8]) -> Option<Opened<'_>> {
    match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let total = usize::from(half(packet, 2)?);
            let fragment = half(packet, 6)? & 0x3fff;
            if header < V4 || *packet.get(9)? != 1 || fragment != 0 {
                return None;
            }
            let address =
                |at: usize| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
            let end = total.min(packet.len());
            Some((
                address(12)?,
                address(16)?,
                packet[8],
                packet.get(header..end)?,
            ))
        }
        6 => {
            let length = usize::from(half(packet, 4)?);
            if *packet.get(6)? != 58 {
                return None;
            }
            let address =
                |at: usize| Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into());
            let end = (V6 + length).min(packet.len());
            Some((address(8)?, address(24)?, packet[7], packet.get(V6..end)?))
        }
        _ => None,
    }
}

fn explain4(kind: u8, code: u8) -> Option<String> {
    let text = match (kind, code) {
        (3, 0) => "network unreachable",
        (3, 1) => "host unreachable",
        (3, 4) => "too big for a network on the way",
        (3, 9 | 10 | 13) => "filtered",
        (3, _) => "unreachable",
        (11, 0) => "too many hops",
        (12, _) => "the packet was not understood",
        _ => return None,
    };
    Some(text.to_owned())
}

fn explain6(kind: u8, code: u8) -> Option<String> {
    let text = match (kind, code) {
        (1, 0) => "no route",
        (1, 1) => "filtered",
        (1, 3) => "host unreachable",
        (1, _) => "unreachable",
        (2, _) => "too big for a network on the way",
        (3, 0) => "too many hops",
        (4, _) => "the packet was not understood",
        _ => return None,
    };
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that answers, in place.
    fn answer(mut packet: Vec<u8>) -> Vec<u8> {
        let (at, len, icmp, kind) = match packet[0] >> 4 {
            4 => (12, 4, V4, 0),
            _ => (8, 16, V6, 129),
        };
        for i in at..at + len {
            packet.swap(i, i + len);
        }
        let old = u16::from_be_bytes([packet[icmp], packet[icmp + 1]]);
        packet[icmp] = kind;
        let new = u16::from_be_bytes([packet[icmp], packet[icmp + 1]]);
        let sum = u16::from_be_bytes([packet[icmp + 2], packet[icmp + 3]]);
        let fixed = rvpn_proto::checksum::Delta::word(old, new).update(sum);
        packet[icmp + 2..icmp + 4].copy_from_slice(&fixed.to_be_bytes());
        packet
    }

    #[test]
    fn there_and_back_in_both_families() {
        for (from, to) in [
            ("10.64.0.2", "1.1.1.1"),
            ("fd00::1", "2606:4700:4700::1111"),
        ] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let us = Pinger { from, to, id: 77 };
            for payload in [0, 1, 56, 1400] {
                let request = us.request(5, payload);
                assert_eq!(us.hear(&request), None, "our own request is no answer");
                let reply = answer(request);
                let heard = Heard::Reply {
                    seq: 5,
                    hops: 64,
                    bytes: 8 + payload,
                };
                assert_eq!(us.hear(&reply), Some(heard));
                let other = Pinger { id: 78, ..us };
                assert_eq!(other.hear(&reply), None);
                // Whatever is broken or cut is not ours, and no reason to panic.
                for at in 0..reply.len() {
                    let mut broken = reply.clone();
                    broken[at] ^= 0x10;
                    let _any = us.hear(&broken);
                    assert_eq!(us.hear(&reply[..at]), None);
                }
            }
        }
    }
}
