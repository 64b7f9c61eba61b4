//! The Internet checksum: over whole slices, and brought up to date with a change.
//!
//! A sum is kept in the numbers of the wire (the first byte is the high one) and
//! not complemented; a *check* is what stands in a header. One's complement has
//! two zeros. Sums of anything but zeros never come out as 0x0000, so a check
//! that was computed is never 0xFFFF, and every function here keeps that: two
//! changes that cancel out give back the very bytes.

/// The one's complement sum of 16-bit words; an odd last byte is a high one.
#[must_use]
pub fn sum(bytes: &[u8]) -> u16 {
    // The sum of byte-swapped words is the byte-swapped sum (RFC 1071), and that
    // of wider words folds to that of narrow ones, so words are read as they lie
    // in memory. Independent lanes let the compiler use the vector unit.
    const LANES: usize = 8;
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 4 }>();
    let mut lanes = [0_u64; LANES];
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let mut total: u64 = lanes.iter().sum();
    let (words, rest) = rest.as_chunks::<4>();
    for word in words {
        total += u64::from(u32::from_ne_bytes(*word));
    }
    let (pairs, odd) = rest.as_chunks::<2>();
    for pair in pairs {
        total += u64::from(u16::from_ne_bytes(*pair));
    }
    if let [last] = odd {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    u16::from_be(fold(total))
}

/// One's complement addition of two sums.
#[must_use]
pub const fn add(a: u16, b: u16) -> u16 {
    let (low, carry) = a.overflowing_add(b);
    low + carry as u16
}

/// Adds the carries back in until 16 bits hold the sum.
#[must_use]
pub const fn fold(total: u64) -> u16 {
    let total = (total & 0xffff_ffff) + (total >> 32);
    let total = (total & 0xffff) + ((total >> 16) & 0xffff) + (total >> 32);
    let total = (total & 0xffff) + (total >> 16);
    let total = (total & 0xffff) + (total >> 16);
    // Cannot cut anything off: what is left has 16 bits.
    (total & 0xffff) as u16
}

/// What a sum looks like in a header, except in UDP's.
#[must_use]
pub const fn check(sum: u16) -> u16 {
    !sum
}

/// What a sum looks like in a UDP header, where 0 means that there is none.
#[must_use]
pub const fn udp_check(sum: u16) -> u16 {
    match !sum {
        0 => 0xffff,
        check => check,
    }
}

/// The sum of an IPv4 pseudo-header.
#[must_use]
pub fn pseudo_v4(source: [u8; 4], destination: [u8; 4], protocol: u8, length: u16) -> u16 {
    let total = pairs(&source) + pairs(&destination) + u64::from(protocol) + u64::from(length);
    fold(total)
}

/// The sum of an IPv6 pseudo-header. No packet of ours is a jumbogram.
#[must_use]
pub fn pseudo_v6(source: [u8; 16], destination: [u8; 16], protocol: u8, length: u16) -> u16 {
    let total = pairs(&source) + pairs(&destination) + u64::from(protocol) + u64::from(length);
    fold(total)
}

/// What replacing some bytes by others adds to a sum (RFC 1624).
///
/// A client's two addresses never change, so this is computed once and costs a
/// packet one addition for each checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delta(u16);

impl Delta {
    /// Nothing changes.
    pub const NONE: Self = Self(0);

    /// For 2, 4 or 16 bytes at an even offset; an odd last byte would be ignored.
    #[must_use]
    pub fn between<const N: usize>(old: &[u8; N], new: &[u8; N]) -> Self {
        const { assert!(N.is_multiple_of(2)) };
        Self(fold(pairs(new) + pairs(&old.map(|byte| !byte))))
    }

    /// For one 16-bit field.
    #[must_use]
    pub const fn word(old: u16, new: u16) -> Self {
        Self(add(!old, new))
    }

    /// The way back.
    #[must_use]
    pub const fn inverse(self) -> Self {
        Self(!self.0)
    }

    /// Both changes.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(add(self.0, other.0))
    }

    /// A finished check after the change.
    #[must_use]
    pub const fn update(self, check: u16) -> u16 {
        !add(!check, self.0)
    }

    /// A finished UDP check after the change: none stays none, and none is made.
    #[must_use]
    pub const fn update_udp(self, check: u16) -> u16 {
        match check {
            0 => 0,
            check => udp_check(add(!check, self.0)),
        }
    }

    /// The sum in the field of a partial checksum after the change. It is not
    /// complemented, and 0 has no meaning there.
    #[must_use]
    pub const fn update_partial(self, sum: u16) -> u16 {
        add(sum, self.0)
    }
}

fn pairs(bytes: &[u8]) -> u64 {
    let (pairs, _) = bytes.as_chunks::<2>();
    pairs
        .iter()
        .map(|pair| u64::from(u16::from_be_bytes(*pair)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As slow and plain as can be, to compare with.
    fn plain(bytes: &[u8]) -> u16 {
        let mut total = 0_u32;
        for pair in bytes.chunks(2) {
            total += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            total = (total & 0xffff) + (total >> 16);
        }
        total.try_into().unwrap()
    }

    #[test]
    fn rfc_1071_example() {
        assert_eq!(
            sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            0xddf2
        );
    }

    #[test]
    fn every_length_and_alignment_gives_the_plain_sum() {
        let bytes: Vec<u8> = (0..400_u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
            .collect();
        for begin in 0..9 {
            for end in begin..bytes.len() {
                let slice = &bytes[begin..end];
                assert_eq!(sum(slice), plain(slice), "{begin}..{end}");
            }
        }
    }

    #[test]
    fn extremes_fold() {
        assert_eq!(sum(&[]), 0);
        assert_eq!(sum(&[0; 1500]), 0);
        assert_eq!(sum(&vec![0xff; 65_535]), plain(&vec![0xff; 65_535]));
        assert_eq!(fold(u64::MAX), 0xffff);
        assert_eq!(fold(0x1_0000_0000), 1);
        assert_eq!(fold(0xffff_ffff_0000), 0xffff);
    }

    #[test]
    fn a_change_is_the_same_as_a_new_sum() {
        // RFC 1624, section 4: the case that the first formula got wrong.
        assert_eq!(Delta::word(0x5555, 0x3285).update(0xdd2f), 0x0000);
        assert_eq!(Delta::word(0x3285, 0x5555).update(0x0000), 0xdd2f);
        for old in [[0, 0, 0, 1], [255; 4], [10, 64, 0, 2], [127, 255, 128, 0]] {
            for new in [[0, 0, 0, 1], [255; 4], [1, 1, 1, 1], [0; 4]] {
                let rest = [0x45, 0x00, 0x12, 0x34];
                let before = check(sum(&[old, rest].concat()));
                let after = check(sum(&[new, rest].concat()));
                let delta = Delta::between(&old, &new);
                assert_eq!(delta.update(before), after);
                assert_eq!(delta.inverse().update(after), before);
            }
        }
    }

    #[test]
    fn nat_11_udp_zero_stays_zero_and_a_computed_zero_is_all_ones() {
        let delta = Delta::word(0x1234, 0x4321);
        assert_eq!(delta.update_udp(0), 0);
        // The sum after the change is 0xffff, whose complement would say "none".
        let before = check(add(0xffff, delta.inverse().0));
        assert_eq!(delta.update(before), 0);
        assert_eq!(delta.update_udp(before), 0xffff);
        assert_eq!(delta.inverse().update_udp(0xffff), before);
        assert_eq!(udp_check(0xffff), 0xffff);
        assert_eq!(udp_check(0x1234), 0xedcb);
    }

    #[test]
    fn pseudo_headers_are_what_a_slice_of_them_sums_to() {
        let (a, b) = ([10, 64, 0, 2], [1, 1, 1, 1]);
        let mut v4 = [a, b].concat();
        v4.extend([0, 17, 0, 9]);
        assert_eq!(pseudo_v4(a, b, 17, 9), sum(&v4));
        // The value in PROTOCOL.md.
        assert_eq!(pseudo_v4(a, b, 17, 9), 0x0c5e);
        let (a, b) = ([0xfd; 16], [0x26; 16]);
        let mut v6 = [a, b].concat();
        v6.extend([0, 0, 0xff, 0xff, 0, 0, 0, 6]);
        assert_eq!(pseudo_v6(a, b, 6, 0xffff), sum(&v6));
    }
}
