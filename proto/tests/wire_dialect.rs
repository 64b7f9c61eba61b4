//! The older dialects, against bytes written down from the originals.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use proptest::prelude::*;
use rvpn_proto::dialect::{
    Body, DecodeError, Decoded, Dialect, Entropy, Incoming, Lease, LeaseError, MAX_PADDED,
    MAX_SOURCES, Padding, SourceMap, Unfit,
};
use rvpn_proto::record::MAX_PACKET;

fn lease(slot: u8) -> Lease {
    let v4 = Ipv4Addr::new(10, 0, 100 + slot, 0);
    let v6 = Ipv6Addr::new(0xfd00, 0x1234, 0, 0, 0, 0, slot.into(), 0);
    Lease::new(v4, v6).expect("both end in zero")
}

/// Zero draws the least of each range, all ones the most.
fn least() -> u64 {
    0
}

fn most() -> u64 {
    u64::MAX
}

#[test]
fn greetings_have_these_very_bytes() {
    let hello = |dialect: Dialect| dialect.hello(&lease(0), &Padding::NONE, &mut least);
    assert_eq!(hello(Dialect::SnatRaw), None);
    let text_v4 = hello(Dialect::TextV4).unwrap();
    assert_eq!(text_v4.body, Body::Text("10.0.100.0/24".into()));
    assert_eq!(text_v4.after, Duration::ZERO);
    let dual = hello(Dialect::TextDual).unwrap();
    assert_eq!(
        dual.body,
        Body::Text("10.0.100.0/30,fd00:1234:0:0:0:0:0:0/127".into())
    );
    assert_eq!(dual.after, Duration::ZERO);

    let padded = Dialect::Padded
        .hello(&lease(2), &Padding::SLIGHT, &mut most)
        .unwrap();
    let mut golden = vec![0x80, 0x27];
    golden.extend_from_slice(b"10.0.102.0/30,fd00:1234:0:0:0:0:2:0/127");
    golden.push(0);
    assert_eq!(golden.len(), 2 + 39 + 1);
    assert_eq!(padded.body, Body::Binary(golden));
}

/// One that comes with the answer to the upgrade hangs the original client.
#[test]
fn the_padded_greeting_is_delayed() {
    let after = |mut entropy: fn() -> u64| {
        let hello = Dialect::Padded.hello(&lease(0), &Padding::NONE, &mut entropy);
        hello.unwrap().after
    };
    assert_eq!(after(least), Duration::from_millis(100));
    assert_eq!(after(most), Duration::from_millis(1000));
}

#[test]
fn packets_have_these_very_bytes() {
    let packet = [0x45, 0, 0, 3];
    let encode = |dialect: Dialect, padding: Padding, mut entropy: fn() -> u64| {
        let mut out = vec![0xee];
        dialect
            .encode(&packet, &padding, &mut entropy, &mut out)
            .unwrap();
        out
    };
    for raw in [Dialect::SnatRaw, Dialect::TextV4, Dialect::TextDual] {
        assert_eq!(encode(raw, Padding::BROAD, most), [0xee, 0x45, 0, 0, 3]);
    }
    let padded = Dialect::Padded;
    assert_eq!(
        encode(padded, Padding::NONE, most),
        [0xee, 0x80, 4, 0x45, 0, 0, 3]
    );
    assert_eq!(
        encode(padded, Padding::SLIGHT, most),
        [0xee, 0x80, 4, 0x45, 0, 0, 3, 0]
    );
    assert_eq!(
        encode(padded, Padding::BROAD, least),
        [0xee, 0x80, 4, 0x45, 0, 0, 3, 0]
    );
    let broad = encode(padded, Padding::BROAD, most);
    assert_eq!(broad.len(), 1 + 2 + 4 + 1500);
    assert!(broad[7..].iter().all(|b| *b == 0));
}

#[test]
fn both_kinds_of_client_come_to_the_addresses_of_the_lease() {
    for dialect in [Dialect::TextV4, Dialect::TextDual, Dialect::Padded] {
        let lease = lease(3);
        let hello = dialect.hello(&lease, &Padding::BROAD, &mut most).unwrap();
        let announced = dialect
            .read_hello(hello.body.as_incoming())
            .unwrap()
            .unwrap();
        let mut expected = lease.client();
        if !dialect.carries_v6() {
            expected.v6 = None;
        }
        assert_eq!(announced.added(), expected, "{dialect}");
        assert_eq!(announced.overwritten(), expected, "{dialect}");
        assert_eq!(expected.v4, Ipv4Addr::new(10, 0, 103, 2));
    }
    assert_eq!(
        lease(3).client().v6,
        Some("fd00:1234::3:1".parse().unwrap())
    );
    assert_eq!(lease(3).host().v4, Ipv4Addr::new(10, 0, 103, 1));
    assert_eq!(lease(3).host().v6, Some("fd00:1234::3:0".parse().unwrap()));
}

#[test]
fn a_subnet_on_which_clients_would_disagree_is_refused() {
    let v6: Ipv6Addr = "fd00:1234::".parse().unwrap();
    let odd_v6: Ipv6Addr = "fd00:1234::2".parse().unwrap();
    assert_eq!(Lease::new(Ipv4Addr::new(10, 0, 0, 4), v6), Err(LeaseError));
    assert_eq!(
        Lease::new(Ipv4Addr::new(10, 0, 0, 0), odd_v6),
        Err(LeaseError)
    );
}

#[test]
fn a_client_waits_through_noise_for_its_greeting() {
    let read = |bytes: &[u8]| Dialect::Padded.read_hello(Incoming::Binary(bytes));
    assert_eq!(read(&[]), Ok(None));
    assert_eq!(read(&[0, 0x80, 0x27]), Ok(None));
    for bad in [&[0x80_u8, 4, b'1', b'.', b'2', b'/'][..], &[0x80], &[1, 2]] {
        assert!(read(bad).is_err(), "{bad:?}");
    }
    let text = |text: &str| Dialect::TextDual.read_hello(Incoming::Text(text));
    for bad in [
        "",
        "10.0.0.0",
        "10.0.0.0/33",
        "10.0.0.0/+3",
        "10.0.0.0/24,",
        "10.0.0.0/24,fd00::/129",
        "fd00::/64,10.0.0.0/24",
        "10.0.0.0/24,fd00::/64,x",
    ] {
        assert!(text(bad).is_err(), "{bad}");
    }
    assert!(
        Dialect::TextV4
            .read_hello(Incoming::Binary(b"10.0.0.0/24"))
            .is_err()
    );
    assert!(
        Dialect::SnatRaw
            .read_hello(Incoming::Text("10.0.0.0/24"))
            .is_err()
    );
}

#[test]
fn padded_messages_are_packets_noise_or_refused() {
    let decode = |bytes| Dialect::Padded.decode(Incoming::Binary(bytes));
    assert_eq!(decode(&[]), Ok(Decoded::Noise));
    assert_eq!(decode(&[0]), Ok(Decoded::Noise));
    assert_eq!(decode(&[0, 0xff, 0x45]), Ok(Decoded::Noise));
    assert_eq!(decode(&[0; 1500]), Ok(Decoded::Noise));
    assert_eq!(
        decode(&[0x80, 1, 0x45, 0, 0]),
        Ok(Decoded::Packet(&[0x45])),
        "padding is cut"
    );
    // One byte that is not zero ended the original server.
    let short = |announced, length| Err(DecodeError::Short { announced, length });
    assert_eq!(decode(&[0x80]), short(2, 1));
    assert_eq!(decode(&[1]), short(2, 1));
    assert_eq!(decode(&[0x80, 2, 0x45]), short(4, 3));
    assert_eq!(decode(&[0xff, 0xff]), short(2 + MAX_PADDED, 2));
    assert_eq!(decode(&[0x80, 0]), Err(DecodeError::Empty));
    assert_eq!(
        decode(&[0x7f, 1, 0x45]),
        Err(DecodeError::Prefix { first: 0x7f })
    );
    assert_eq!(
        Dialect::Padded.decode(Incoming::Text("x")),
        Err(DecodeError::Text)
    );

    let mut largest = vec![0xff, 0xff];
    largest.resize(2 + MAX_PADDED + 1500, 7);
    assert_eq!(
        decode(&largest),
        Ok(Decoded::Packet(&largest[2..2 + MAX_PADDED]))
    );
}

#[test]
fn raw_messages_are_packets_or_refused() {
    let long = vec![0x45; MAX_PACKET + 1];
    for dialect in [Dialect::SnatRaw, Dialect::TextV4, Dialect::TextDual] {
        let decode = |bytes| dialect.decode(Incoming::Binary(bytes));
        assert_eq!(decode(&[0]), Ok(Decoded::Packet(&[0])));
        assert_eq!(decode(&[]), Err(DecodeError::Empty));
        assert_eq!(
            decode(&long),
            Err(DecodeError::TooLong { length: long.len() })
        );
        assert_eq!(
            decode(&long[1..]),
            Ok(Decoded::Packet(&long[1..])),
            "{dialect}"
        );
        assert_eq!(dialect.decode(Incoming::Text("E")), Err(DecodeError::Text));
    }
}

#[test]
fn what_does_not_fit_is_not_sent() {
    for dialect in Dialect::ALL {
        let limit = dialect.max_packet();
        for length in [0, limit + 1, 1 << 20] {
            let mut out = Vec::new();
            assert_eq!(
                dialect.encode(&vec![1; length], &Padding::NONE, &mut least, &mut out),
                Err(Unfit { length, limit })
            );
            assert!(out.is_empty());
        }
    }
}

#[test]
fn noise_has_its_lengths_and_pauses() {
    let noise = |padding: Padding, mut entropy: fn() -> u64| {
        let mut out = Vec::new();
        let pause = padding.noise(&mut entropy, &mut out);
        assert!(out.iter().all(|b| *b == 0));
        assert_eq!(
            Dialect::Padded.decode(Incoming::Binary(&out)),
            Ok(Decoded::Noise)
        );
        (out.len(), pause.map(|p| p.as_millis()))
    };
    assert_eq!(noise(Padding::NONE, most), (0, None));
    assert_eq!(noise(Padding::SLIGHT, least), (0, Some(100)));
    assert_eq!(noise(Padding::SLIGHT, most), (1, Some(1000)));
    assert_eq!(noise(Padding::BROAD, least), (1, Some(50)));
    assert_eq!(noise(Padding::BROAD, most), (1500, Some(500)));
}

#[test]
fn names_are_those_of_the_configuration() {
    for (dialect, name) in [
        (Dialect::SnatRaw, "snat-raw"),
        (Dialect::TextV4, "text-v4"),
        (Dialect::TextDual, "text-dual"),
        (Dialect::Padded, "padded"),
    ] {
        assert_eq!(dialect.to_string(), name);
        assert_eq!(name.parse(), Ok(dialect));
        let json = serde_json::to_string(&dialect).unwrap();
        assert_eq!(json, format!("{name:?}"));
    }
    assert!("raw".parse::<Dialect>().is_err());
}

/// F-8: any source, 32 of them, each with its own address, found again for replies.
#[test]
fn sources_of_the_first_dialect_are_mapped_in_order() {
    let mut map = SourceMap::new(Ipv4Addr::new(10, 64, 7, 0));
    let source = |n: usize| Ipv4Addr::new(127, 0, 1, u8::try_from(n).unwrap());
    let outside = |last: usize| Ipv4Addr::new(10, 64, 7, u8::try_from(last).unwrap());
    assert_eq!(map.inside(outside(2)), None, "nothing was sent yet");
    for n in 0..MAX_SOURCES {
        assert_eq!(map.outside(source(n)), Some(outside(n + 2)));
    }
    assert_eq!(map.outside(source(MAX_SOURCES)), None);
    for n in 0..MAX_SOURCES {
        assert_eq!(map.outside(source(n)), Some(outside(n + 2)), "again");
        assert_eq!(map.inside(outside(n + 2)), Some(source(n)));
    }
    for last in [0, 1, 34, 254, 255] {
        assert_eq!(map.inside(outside(last)), None);
    }
    assert_eq!(map.inside(Ipv4Addr::new(10, 64, 8, 2)), None);
}

fn any_dialect() -> impl Strategy<Value = Dialect> {
    prop::sample::select(Dialect::ALL.to_vec())
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        dialect in any_dialect(),
        packet in prop::collection::vec(any::<u8>(), 1..3000),
        most in 0..3000_u16,
        seed: u64,
    ) {
        let padding = Padding { bytes: (0, most), noise: None };
        let mut state = seed;
        let mut entropy = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state
        };
        let mut message = Vec::new();
        dialect
            .encode(&packet, &padding, &mut entropy, &mut message)
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(message.len() <= 2 + packet.len() + usize::from(most));
        prop_assert_eq!(
            dialect.decode(Incoming::Binary(&message)),
            Ok(Decoded::Packet(&packet))
        );
    }

    #[test]
    fn draws_stay_in_their_range(low: u32, high: u32, bits: u64) {
        let drawn = (|| bits).between((low, high));
        prop_assert!(drawn >= low && drawn <= high.max(low));
    }
}
