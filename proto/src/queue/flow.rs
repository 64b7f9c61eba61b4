//! Which bucket a packet belongs to.
//!
//! Only a hash is wanted, so nothing is refused here: bytes that are no packet
//! share a bucket and are somebody else's business.
//!
//! One bucket for each hash would let two of a few flows meet soon, and a thin
//! one would wait behind bulk and be dropped with it for as long as both live.
//! So buckets lie in sets: a flow may have any of its set, and two share one
//! only while all of it are taken.

use super::BUCKETS;

/// Buckets of a set.
const WAYS: usize = 8;
const SETS: usize = BUCKETS / WAYS;

/// Whose the buckets are, by a part of the hash that the set does not tell.
/// Zero is nobody's.
#[derive(Debug, Default)]
pub(super) struct Owners {
    sets: Vec<[u32; WAYS]>,
}

impl Owners {
    pub(super) fn new() -> Owners {
        Owners {
            sets: vec![[0; WAYS]; SETS],
        }
    }

    /// The bucket of the flow with this hash, and whether it has just become
    /// that; `idle` says whether a bucket can be given to another flow.
    ///
    /// What shares a bucket gets one of its own as soon as one is idle. Its
    /// packets may come out of order then, once.
    pub(super) fn bucket(&mut self, hash: u64, idle: impl Fn(u16) -> bool) -> (u16, bool) {
        let set = hash as usize % SETS;
        let tag = (hash >> 32) as u32 | 1;
        let first = (set * WAYS) as u16;
        let tags = &mut self.sets[set];
        if let Some(way) = tags.iter().position(|other| *other == tag) {
            return (first + way as u16, false);
        }
        let mut ways = first..first + WAYS as u16;
        match ways.find(|bucket| idle(*bucket)) {
            Some(bucket) => {
                tags[usize::from(bucket - first)] = tag;
                (bucket, true)
            }
            None => (first + (hash >> 8) as u16 % WAYS as u16, false),
        }
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A hash of a packet's flow: addresses, protocol and, for TCP and UDP,
/// ports. Fragments go without ports, since only the first of them has any and
/// they must not overtake each other.
pub(super) fn hash(key: [u64; 2], packet: &[u8]) -> u64 {
    siphash(key, words(packet))
}

fn words(packet: &[u8]) -> [u64; 5] {
    match packet.first().map(|first| first >> 4) {
        Some(4) => words_v4(packet),
        Some(6) => words_v6(packet),
        _ => None,
    }
    .unwrap_or_default()
}

fn words_v4(packet: &[u8]) -> Option<[u64; 5]> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let header_len = usize::from(header[0] & 0x0f) * 4;
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    let ports = match fragment {
        true => 0,
        false => ports(header[9], packet, header_len),
    };
    let addresses = word(packet, 12)?;
    Some([addresses, ports, header[9].into(), 0, 4])
}

fn words_v6(packet: &[u8]) -> Option<[u64; 5]> {
    let header: &[u8; 40] = packet.first_chunk()?;
    let protocol = header[6];
    let last = ports(protocol, packet, 40) << 8 | u64::from(protocol);
    Some([
        word(packet, 8)?,
        word(packet, 16)?,
        word(packet, 24)?,
        word(packet, 32)?,
        last,
    ])
}

fn ports(protocol: u8, packet: &[u8], at: usize) -> u64 {
    let ports = packet.get(at..).and_then(|rest| rest.first_chunk());
    match (protocol, ports) {
        (TCP | UDP, Some(ports)) => u32::from_le_bytes(*ports).into(),
        _ => 0,
    }
}

fn word(packet: &[u8], at: usize) -> Option<u64> {
    let bytes = packet.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*bytes))
}

/// SipHash-1-3 over whole words; quick, and without the key nobody can find
/// two flows that meet.
fn siphash(key: [u64; 2], words: [u64; 5]) -> u64 {
    let mut state = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    let length = (words.len() as u64 * 8) << 56;
    for word in words.into_iter().chain([length]) {
        state[3] ^= word;
        round(&mut state);
        state[0] ^= word;
    }
    state[2] ^= 0xff;
    for _ in 0..3 {
        round(&mut state);
    }
    state[0] ^ state[1] ^ state[2] ^ state[3]
}

fn round([a, b, c, d]: &mut [u64; 4]) {
    *a = a.wrapping_add(*b);
    *b = b.rotate_left(13) ^ *a;
    *a = a.rotate_left(32);
    *c = c.wrapping_add(*d);
    *d = d.rotate_left(16) ^ *c;
    *a = a.wrapping_add(*d);
    *d = d.rotate_left(21) ^ *a;
    *c = c.wrapping_add(*b);
    *b = b.rotate_left(17) ^ *c;
    *c = c.rotate_left(32);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPython, which has the reference implementation inside, makes of
    /// the same 40 bytes with a key of zeros.
    #[test]
    fn the_hash_is_siphash_1_3() {
        let words = [0, 1, 2, 3, 0x0123_4567_89ab_cdef];
        assert_eq!(siphash([0, 0], words), 0x3150_073e_1182_ab38);
        assert_eq!(siphash([0, 0], [0; 5]), 0x8a0d_55eb_cf29_c4b2);
    }

    const KEY: [u64; 2] = [1, 2];

    fn v4(protocol: u8, flags: u16, last: u8, port: u16) -> Vec<u8> {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        packet[9] = protocol;
        packet[19] = last;
        packet[20..22].copy_from_slice(&port.to_be_bytes());
        packet
    }

    fn same(a: &[u8], b: &[u8]) -> bool {
        words(a) == words(b)
    }

    #[test]
    fn flows_are_told_apart_by_addresses_protocol_and_ports() {
        let flow = v4(TCP, 0x4000, 1, 80);
        assert!(
            same(&flow, &v4(TCP, 0, 1, 80)),
            "don't-fragment is no fragment"
        );
        assert!(!same(&flow, &v4(UDP, 0, 1, 80)));
        assert!(!same(&flow, &v4(TCP, 0, 2, 80)));
        assert!(!same(&flow, &v4(TCP, 0, 1, 81)));
        assert!(same(&v4(1, 0, 1, 80), &v4(1, 0, 1, 81)), "no ports in ICMP");
    }

    #[test]
    fn fragments_of_a_datagram_stay_together() {
        let first = v4(UDP, 0x2000, 1, 80);
        let later = v4(UDP, 0x00b9, 1, 9999);
        assert!(same(&first, &later));
        let mut v6 = vec![0; 60];
        v6[0] = 0x60;
        v6[6] = 44;
        let mut other = v6.clone();
        other[48] = 7;
        assert!(same(&v6, &other));
    }

    #[test]
    fn buckets_are_used_evenly() {
        let mut counts = [0_u32; BUCKETS];
        let mut owners = Owners::new();
        for port in 0..=u16::MAX {
            // As if all of them were taken.
            let (bucket, _) = owners.bucket(hash(KEY, &v4(TCP, 0, 1, port)), |_| false);
            counts[usize::from(bucket)] += 1;
        }
        // 256 on average; six standard deviations either way.
        assert!(counts.iter().all(|n| (160..=352).contains(n)), "{counts:?}");
        let other_key = hash([3, 4], &v4(TCP, 0, 1, 80));
        let others = (0..100).filter(|n| hash([*n, 0], &v4(TCP, 0, 1, 80)) != other_key);
        assert_eq!(others.count(), 100);
    }

    #[test]
    fn flows_share_a_bucket_only_where_their_set_is_full() {
        let of_set = |n: u64| hash(KEY, &v4(TCP, 0, 1, 80)) & 0xffff_ffff | n << 33;
        let mut owners = Owners::new();
        let mut taken = Vec::new();
        for n in 1..=WAYS as u64 {
            let idle = |bucket| !taken.contains(&bucket);
            let (bucket, new) = owners.bucket(of_set(n), idle);
            assert!(new && !taken.contains(&bucket), "{n}: {bucket}");
            taken.push(bucket);
        }
        let (shared, new) = owners.bucket(of_set(20), |_| false);
        assert!(!new && taken.contains(&shared));
        for n in 1..=WAYS as u64 {
            let again = owners.bucket(of_set(n), |_| true);
            assert_eq!(again, (taken[n as usize - 1], false), "it stays there");
        }
        let idle = taken[3];
        let moved = owners.bucket(of_set(20), |bucket| bucket == idle);
        assert_eq!(moved, (idle, true));
        let (other, new) = owners.bucket(of_set(4), |_| false);
        assert!(
            !new && taken.contains(&other),
            "its bucket is another's now"
        );
    }

    #[test]
    fn what_is_no_packet_has_a_hash_too() {
        for first in 0..=u8::MAX {
            for len in 0..=44 {
                let mut bytes = vec![0xff; len];
                if let Some(byte) = bytes.first_mut() {
                    *byte = first;
                }
                hash(KEY, &bytes);
            }
        }
    }
}
