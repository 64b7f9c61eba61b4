//! Translation, case by case: errors, absent checksums, fragments.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod packets;

use std::collections::BTreeMap;

use packets::{
    FAMILIES, Family, V4, V6, error, icmp, inbound, is_v6, l4, nat, ones_sum, outbound, part_of,
    piece, pieces, pseudo, raw, tcp, udp,
};
use rvpn_proto::nat::{OwnAddresses, SourceNat, Sum};
use rvpn_proto::packet::grammar::Rng;
use rvpn_proto::validate::{self, DropReason, FragmentBudget, Sources};

const ACK: u8 = 0x10;

fn out(mut packet: Vec<u8>) -> Vec<u8> {
    let parsed = outbound(&packet).unwrap();
    nat().outbound(&mut packet, &parsed, Sum::Full).unwrap();
    packet
}

fn back(mut packet: Vec<u8>) -> Vec<u8> {
    let parsed = inbound(&packet).unwrap();
    nat().inbound(&mut packet, &parsed, Sum::Full).unwrap();
    packet
}

/// Every error that may pass, as type and code.
fn errors(family: Family) -> Vec<(u8, u8)> {
    if family.icmp == 1 {
        let unreachable = (0..16).map(|code| (3, code));
        let others = [(4, 0), (11, 0), (11, 1), (12, 0), (12, 1), (12, 2)];
        unreachable.chain(others).collect()
    } else {
        let unreachable = (0..8).map(|code| (1, code));
        let others = [(2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)];
        unreachable.chain(others).collect()
    }
}

/// What an error may be about, sent from one address to another.
fn causes(family: Family, src: &str, dst: &str) -> Vec<Vec<u8>> {
    let echo = if family.icmp == 1 { 8 } else { 128 };
    vec![
        udp((src, 4000), (dst, 53), b"question"),
        udp((src, 4000), (dst, 53), b"odd"),
        tcp((src, 4000), (dst, 443), ACK, 1, &[7; 100]),
        icmp(src, dst, echo, 0, b"\0\x01\0\x01ping"),
        // Of something we do not carry ourselves, and without ports.
        raw(src, dst, 132, &[9; 40]),
        piece(&udp((src, 1), (dst, 2), &[7; 64]), 9, 32, &[7; 32], false),
    ]
}

#[test]
fn nat_10_errors_are_translated_outside_and_in() {
    for family in FAMILIES {
        let Family {
            inner,
            lease,
            far,
            router,
            ..
        } = family;
        for kind in errors(family) {
            // About what the client sent, from a router or the far end itself.
            let pairs = causes(family, lease, far).into_iter();
            for (theirs, ours) in pairs.zip(causes(family, inner, far)) {
                for source in [router, far] {
                    let got = back(error(source, lease, kind, 0, &theirs));
                    assert_eq!(got, error(source, inner, kind, 0, &ours), "{kind:?}");
                }
            }
            // From the client, about what it got.
            let pairs = causes(family, far, inner).into_iter();
            for (ours, theirs) in pairs.zip(causes(family, far, lease)) {
                let got = out(error(inner, far, kind, 0, &ours));
                assert_eq!(got, error(lease, far, kind, 0, &theirs), "{kind:?}");
            }
        }
    }
}

#[test]
fn nat_10_errors_quote_as_much_as_they_like() {
    for family in FAMILIES {
        let Family {
            inner,
            lease,
            far,
            router,
            ..
        } = family;
        let kind = errors(family)[0];
        let header = if family.icmp == 1 { 20 } else { 40 };
        let theirs = tcp((lease, 4000), (far, 443), ACK, 1, &[7; 100]);
        let ours = tcp((inner, 4000), (far, 443), ACK, 1, &[7; 100]);
        for len in header..=theirs.len() {
            let got = back(error(router, lease, kind, 0, &theirs[..len]));
            // A checksum of which only one byte was quoted can be no better.
            let mut ours = ours[..len].to_vec();
            if len == header + 17 {
                ours[header + 16] = theirs[header + 16];
            }
            assert_eq!(got, error(router, inner, kind, 0, &ours), "{len} bytes");
        }
    }
}

#[test]
fn nat_11_udp_without_a_checksum_and_with_one_of_zero() {
    // None stays none, both ways.
    let without = |src, dst| {
        let mut packet = udp((src, 1), (dst, 2), b"x");
        packet[26..28].fill(0);
        packet
    };
    assert_eq!(out(without(V4.inner, V4.far)), without(V4.lease, V4.far));
    assert_eq!(back(without(V4.far, V4.lease)), without(V4.far, V4.inner));
    // A payload whose checksum comes out as none is sent as all ones, whether it
    // does so before the translation or after.
    for family in FAMILIES {
        for zero_for in [family.inner, family.lease] {
            let mut payload = *b"..payload";
            let mut packet = udp((zero_for, 1), (family.far, 2), &payload);
            let at = l4(&packet);
            packet[at + 6..at + 8].fill(0);
            packet[at + 8..at + 10].fill(0);
            let sum = ones_sum(&[&pseudo(&packet)[..], &packet[at..]].concat());
            payload[..2].copy_from_slice(&(!sum).to_be_bytes());
            let of = |src| udp((src, 1), (family.far, 2), &payload);
            assert_eq!(of(zero_for)[at + 6..at + 8], [0xff, 0xff]);
            assert_eq!(out(of(family.inner)), of(family.lease));
            let from = |dst| udp((family.far, 2), (dst, 1), &payload);
            assert_eq!(back(from(family.lease)), from(family.inner));
        }
    }
}

#[test]
fn nat_12_fragments_in_both_directions() {
    for family in FAMILIES {
        let Family {
            inner, lease, far, ..
        } = family;
        let payload: Vec<u8> = (0..3001_u32).map(|n| (n * 7) as u8).collect();
        let wholes = |a, b| {
            [
                udp((a, 4000), (b, 53), &payload),
                tcp((a, 4000), (b, 53), ACK, 9, &payload),
            ]
        };
        let there = wholes(inner, far).into_iter().zip(wholes(lease, far));
        for (before, after) in there {
            check_pieces(&before, &after, &|packet| out(packet));
        }
        let here = wholes(far, lease).into_iter().zip(wholes(far, inner));
        for (before, after) in here {
            check_pieces(&before, &after, &|packet| back(packet));
        }
    }
}

fn check_pieces(before: &[u8], after: &[u8], translate: &dyn Fn(Vec<u8>) -> Vec<u8>) {
    for size in [1240, 104, 48] {
        let mut body = Vec::new();
        let expected = pieces(after, 77, size);
        for (fragment, expected) in pieces(before, 77, size).into_iter().zip(expected) {
            let header = fragment.len() - part_of(&fragment).1.len();
            let got = translate(fragment.clone());
            assert_eq!(got, expected);
            let (at, part, _) = part_of(&got);
            if at > 0 {
                assert_eq!(got[header..], fragment[header..], "only the IP header");
            }
            body.extend_from_slice(part);
        }
        assert_eq!(body, after[l4(after)..], "put together again");
    }
}

/// What a kernel makes of the fragments it gets: the first copy of a byte
/// stays, and a datagram of which two parts overlap is given up.
#[derive(Default)]
struct Reassembly {
    parts: BTreeMap<usize, Vec<u8>>,
    total: Option<usize>,
    given_up: bool,
}

impl Reassembly {
    fn add(&mut self, fragment: &[u8]) -> Option<Vec<u8>> {
        let (at, part, more) = part_of(fragment);
        let end = at + part.len();
        let known = self.parts.get(&at).is_some_and(|p| p.len() == part.len());
        let overlaps = self.parts.iter().any(|(b, p)| at < b + p.len() && end > *b);
        if overlaps && !known {
            self.given_up = true;
        }
        self.parts.entry(at).or_insert_with(|| part.to_vec());
        if !more {
            self.given_up |= self.total.is_some_and(|total| total != end);
            self.total = Some(end);
        }
        let mut whole = Vec::new();
        for (at, part) in &self.parts {
            if *at != whole.len() {
                return None;
            }
            whole.extend_from_slice(part);
        }
        (!self.given_up && self.total == Some(whole.len())).then_some(whole)
    }
}

#[test]
fn nat_13_fragments_that_are_put_together_wrongly_or_not_at_all() {
    for family in FAMILIES {
        let whole = udp((family.inner, 4000), (family.far, 53), &[7; 120]);
        let body = whole[l4(&whole)..].to_vec();
        let cut = |from: usize, to: usize| piece(&whole, 5, from, &body[from..to], to < 128);
        let evil =
            |from: usize, to: usize| piece(&whole, 5, from, &vec![0xee; to - from], to < 128);
        let pass = |fragments: &[Vec<u8>]| {
            let mut budget = FragmentBudget::new();
            let judged: Vec<bool> = fragments
                .iter()
                .map(|f| budget.admit(f, &outbound(f).unwrap(), 0).is_ok())
                .collect();
            (judged, budget.incomplete(0))
        };
        // In order, backwards, in pieces of eight bytes.
        let eights: Vec<_> = (0..16).map(|n| cut(n * 8, n * 8 + 8)).collect();
        let backwards: Vec<_> = eights.iter().rev().cloned().collect();
        for fragments in [&eights, &backwards] {
            let (judged, incomplete) = pass(fragments);
            assert!(judged.iter().all(|passed| *passed));
            assert_eq!(incomplete, 0, "complete, so its place is free");
        }
        // A second copy is not needed, another content not wanted.
        let (judged, _) = pass(&[cut(0, 64), cut(0, 64), evil(0, 64), cut(64, 128)]);
        assert_eq!(judged, [true, false, false, true]);
        // Ports that were judged are not written over, wholly or in part.
        let (judged, _) = pass(&[cut(0, 64), evil(0, 8), evil(56, 72), cut(64, 128)]);
        assert_eq!(judged, [true, false, false, true]);
        // The last first, then one that ends behind it, then another last.
        let (judged, _) = pass(&[cut(64, 128), evil(120, 128), evil(56, 128), cut(0, 64)]);
        assert_eq!(judged, [true, false, false, true]);
    }
}

/// A datagram of the client's, its transport part, and the same translated.
fn datagram(rng: &mut Rng) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let family = FAMILIES[rng.below(2)];
    let mut payload = vec![0; 248];
    rng.fill(&mut payload);
    let whole = udp((family.inner, 4000), (family.far, 53), &payload);
    let after = udp((family.lease, 4000), (family.far, 53), &payload);
    let (body, expected) = (whole[l4(&whole)..].to_vec(), after[l4(&after)..].to_vec());
    (whole, body, expected)
}

#[test]
fn nat_13_no_order_of_fragments_makes_another_datagram() {
    let mut made = 0;
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let (whole, body, expected) = datagram(&mut rng);
        let mut fragments = pieces(&whole, 5, 8 * (1 + rng.below(6)));
        for _ in 0..rng.below(4) {
            // The same bytes again, cut in another way.
            let from = 8 * rng.below(body.len() / 8);
            let to = (from + 8 + 8 * rng.below(6)).min(body.len());
            fragments.push(piece(&whole, 5, from, &body[from..to], to < body.len()));
        }
        for n in (1..fragments.len()).rev() {
            fragments.swap(n, rng.below(n + 1));
        }
        let (mut budget, mut kernel) = (FragmentBudget::new(), Reassembly::default());
        for mut fragment in fragments {
            let parsed = outbound(&fragment).unwrap();
            if budget.admit(&fragment, &parsed, 0).is_err() {
                continue;
            }
            nat().outbound(&mut fragment, &parsed, Sum::Full).unwrap();
            if let Some(whole) = kernel.add(&fragment) {
                assert_eq!(whole, expected, "seed {seed}");
                made += 1;
                break;
            }
        }
    }
    assert!(made > 1000, "only {made} were put together at all");
}

#[test]
fn nat_13_what_was_judged_is_not_written_over() {
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let (whole, body, expected) = datagram(&mut rng);
        let (mut budget, mut kernel) = (FragmentBudget::new(), Reassembly::default());
        let mut covered = 0;
        let mut result = None;
        for mut fragment in pieces(&whole, 5, 8 * (1 + rng.below(6))) {
            let parsed = outbound(&fragment).unwrap();
            assert_eq!(budget.admit(&fragment, &parsed, 0), Ok(()), "seed {seed}");
            covered += part_of(&fragment).1.len();
            nat().outbound(&mut fragment, &parsed, Sum::Full).unwrap();
            result = kernel.add(&fragment);
            if covered < body.len() {
                // Begins in what has passed, and ends anywhere.
                let from = 8 * rng.below(covered / 8);
                let to = (from + 8 + 8 * rng.below(8)).min(body.len());
                let evil = piece(&whole, 5, from, &vec![0xee; to - from], rng.one_in(2));
                if let Ok(parsed) = outbound(&evil) {
                    let judged = budget.admit(&evil, &parsed, 0);
                    assert_eq!(judged, Err(DropReason::Fragment), "seed {seed}");
                }
            }
        }
        assert_eq!(result.as_ref(), Some(&expected), "seed {seed}");
    }
}

#[test]
fn nat_13_incomplete_datagrams_are_few_and_forgotten() {
    let begun = |id: u16| {
        let whole = udp((V4.inner, 1), (V4.far, 2), &[7; 64]);
        let fragment = piece(&whole, id, 0, &whole[20..52], true);
        let parsed = outbound(&fragment).unwrap();
        (fragment, parsed)
    };
    let mut budget = FragmentBudget::new();
    for id in 0..64 {
        let (fragment, parsed) = begun(id);
        assert_eq!(budget.admit(&fragment, &parsed, 10), Ok(()));
    }
    let (fragment, parsed) = begun(64);
    let full = Err(DropReason::FragmentBudget);
    assert_eq!(budget.admit(&fragment, &parsed, 10), full);
    assert_eq!(budget.admit(&fragment, &parsed, 40), full);
    assert_eq!(budget.admit(&fragment, &parsed, 41), Ok(()));
    assert_eq!(budget.incomplete(41), 1);
    // Bytes are bounded as well: four datagrams of all that fits.
    let mut budget = FragmentBudget::new();
    let mut passed = 0;
    for id in 0..8 {
        let whole = udp((V4.inner, 1), (V4.far, 2), &[7; 60_000]);
        for fragment in pieces(&whole, id, 1472).into_iter().skip(1) {
            let parsed = outbound(&fragment).unwrap();
            if budget.admit(&fragment, &parsed, 0).is_ok() {
                passed += part_of(&fragment).1.len();
            }
        }
    }
    assert!((255 * 1024..=256 * 1024).contains(&passed), "{passed}");
}

#[test]
fn clients_that_know_their_lease_are_checked_and_not_changed() {
    let v4_only = OwnAddresses::new(Some(V4.lease.parse().unwrap()), None);
    let both = OwnAddresses::new(
        Some(V4.lease.parse().unwrap()),
        Some(V6.lease.parse().unwrap()),
    );
    for family in FAMILIES {
        let Family {
            lease, far, other, ..
        } = family;
        let kind = errors(family)[0];
        let sources = Sources::Own {
            v4: Some(V4.lease.parse().unwrap()),
            v6: Some(V6.lease.parse().unwrap()),
        };
        let leave = |own: &OwnAddresses, packet: &[u8]| {
            let offload = rvpn_proto::record::Offload::NONE;
            let parsed = validate::outbound(packet, offload, &packets::LIMITS, &sources)?;
            own.outbound(packet, &parsed)
        };
        let enter = |own: &OwnAddresses, packet: &[u8]| {
            let parsed = inbound(packet)?;
            own.inbound(packet, &parsed)
        };
        let forth = udp((lease, 1), (far, 2), b"x");
        let here = udp((far, 2), (lease, 1), b"x");
        assert_eq!(leave(&both, &forth), Ok(()));
        assert_eq!(enter(&both, &here), Ok(()));
        let (no, nobody) = if is_v6(&forth) {
            (Err(DropReason::Family), Err(DropReason::Recipient))
        } else {
            (Ok(()), Ok(()))
        };
        assert_eq!(leave(&v4_only, &forth), no);
        assert_eq!(enter(&v4_only, &here), nobody);
        let foreign = udp((far, 2), (other, 1), b"x");
        assert_eq!(enter(&both, &foreign), Err(DropReason::Recipient));
        let quoted = Err(DropReason::Quoted);
        assert_eq!(leave(&both, &error(lease, far, kind, 0, &foreign)), quoted);
        assert_eq!(leave(&both, &error(lease, far, kind, 0, &here)), Ok(()));
        let theirs = udp((other, 1), (far, 2), b"x");
        assert_eq!(enter(&both, &error(far, lease, kind, 0, &theirs)), quoted);
        assert_eq!(enter(&both, &error(far, lease, kind, 0, &forth)), Ok(()));
    }
}

#[test]
fn f_08_any_source_is_translated_and_found_again() {
    let mut nat = SourceNat::new("10.64.7.0".parse().unwrap());
    let offload = rvpn_proto::record::Offload::NONE;
    for n in 0..33_u8 {
        let source = format!("127.0.1.{n}");
        let mut packet = udp((&source, 1), (V4.far, 2), b"x");
        let parsed =
            validate::outbound(&packet, offload, &packets::LIMITS, &Sources::AnyV4).unwrap();
        let translated = nat.outbound(&mut packet, &parsed, Sum::Full);
        if n == 32 {
            assert_eq!(translated, Err(DropReason::Sources));
            break;
        }
        let outside = format!("10.64.7.{}", n + 2);
        assert_eq!(packet, udp((&outside, 1), (V4.far, 2), b"x"));
        let mut answer = udp((V4.far, 2), (&outside, 1), b"y");
        let parsed = inbound(&answer).unwrap();
        nat.inbound(&mut answer, &parsed, Sum::Full).unwrap();
        assert_eq!(answer, udp((V4.far, 2), (&source, 1), b"y"));
    }
    let mut unknown = udp((V4.far, 2), ("10.64.7.34", 1), b"y");
    let parsed = inbound(&unknown).unwrap();
    let translated = nat.inbound(&mut unknown, &parsed, Sum::Full);
    assert_eq!(translated, Err(DropReason::Recipient));
}
