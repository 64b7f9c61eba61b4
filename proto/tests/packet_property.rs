//! Properties of translation, held over random packets: two hundred thousand
//! unless `RVPN_PROPERTY_PACKETS` says how many, ten million for a release
//! (NAT-14, NAT-15). A failure names the seed of its packet.

use std::net::{Ipv4Addr, Ipv6Addr};

use rvpn_proto::gso::{Segments, VirtioHeader, finish_checksum, rebuild};
use rvpn_proto::nat::{HEAD, Nat, Sum};
use rvpn_proto::packet::grammar::{Client, Made, ROOM, Rng, packet, spoil};
use rvpn_proto::packet::{Parsed, Side, parse};
use rvpn_proto::record::Offload;
use rvpn_proto::validate::{FragmentBudget, Limits, Sources, inbound, outbound};

const RUNS: u64 = 200_000;
const LIMITS: Limits = Limits {
    mtu: 1500,
    offload: true,
    verify: true,
};

/// How many packets a property is tried with.
fn runs() -> u64 {
    match std::env::var("RVPN_PROPERTY_PACKETS") {
        Ok(text) => text.parse().expect("RVPN_PROPERTY_PACKETS is a number"),
        Err(_) => RUNS,
    }
}

/// Runs `each` with every seed, on a few threads, each with buffers of its own.
fn with_seeds(first: u64, each: impl Fn(u64, &mut [[u8; ROOM]; 2]) + Sync) {
    let runs = runs();
    const THREADS: u64 = 4;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let each = &each;
            scope.spawn(move || {
                let mut buffers = Box::new([[0; ROOM]; 2]);
                for seed in (thread..runs).step_by(4) {
                    each(first + seed, &mut buffers);
                }
            });
        }
    });
}

fn addresses(rng: &mut Rng) -> Client {
    let mut v6 = [0; 16];
    rng.fill(&mut v6);
    v6[0] = 0xfd;
    let [a, b, c, d, ..] = rng.bits().to_le_bytes();
    // Odd corners of one's complement on purpose: words of all ones or all zeros.
    let v4 = match rng.below(16) {
        0 => [10, 255, 255, 255],
        1 => [10, 0, 0, 0],
        2 => {
            v6[2..].fill(0);
            [10, 0, 255, 255]
        }
        3 => {
            v6[1..].fill(0xff);
            [10, 255, 0, 0]
        }
        // Peers in the grammar never begin with this.
        _ => [101 + a % 20, b, c, d],
    };
    Client {
        v4: Ipv4Addr::from(v4),
        v6: Ipv6Addr::from(v6),
    }
}

fn nat(inner: &Client, lease: &Client) -> Nat {
    Nat::new(inner.v4, lease.v4, inner.v6, lease.v6)
}

fn sources(client: &Client) -> Sources {
    Sources::Own {
        v4: Some(client.v4),
        v6: Some(client.v6),
    }
}

fn translate(nat: &Nat, side: Side, packet: &mut [u8], parsed: &Parsed, offload: Offload) {
    let head = packet.len().min(HEAD);
    let sum = Sum::from(offload);
    match side {
        Side::Source => nat.outbound(&mut packet[..head], parsed, sum),
        Side::Destination => nat.inbound(&mut packet[..head], parsed, sum),
    }
    .expect("translated");
}

fn checked(side: Side, client: &Client, made: &Made, packet: &[u8], seed: u64) -> Parsed {
    let parsed = match side {
        Side::Source => outbound(packet, made.offload, &LIMITS, &sources(client)),
        Side::Destination => inbound(packet, made.offload, &LIMITS),
    };
    let parsed = parsed.unwrap_or_else(|reason| panic!("seed {seed}: {reason}: {packet:02x?}"));
    assert_eq!(parsed.len(), made.len, "seed {seed}");
    parsed
}

/// Seeds take turns in direction. Towards the client its addresses on the
/// outside come first.
fn turn(seed: u64, a: Client, b: Client) -> (Side, Client, Client, Nat) {
    if seed.is_multiple_of(2) {
        (Side::Source, a, b, nat(&a, &b))
    } else {
        (Side::Destination, a, b, nat(&b, &a))
    }
}

#[test]
fn nat_14_incremental_checksums_equal_full_recomputation() {
    with_seeds(14_000_000_000, |seed, [one, two]| {
        let mut rng = Rng::new(seed);
        let (a, b) = (addresses(&mut rng), addresses(&mut rng));
        let (side, before, after, nat) = turn(seed, a, b);
        // The same packet, written anew for the other address.
        let mut again = rng.clone();
        let made = packet(&mut rng, &before, side, one);
        let expected = packet(&mut again, &after, side, two);
        assert_eq!(made.len, expected.len);
        let (one, two) = (&mut one[..made.len], &two[..made.len]);
        let parsed = checked(side, &before, &made, one, seed);
        translate(&nat, side, one, &parsed, made.offload);
        assert!(*one == *two, "seed {seed}: {one:02x?}, not {two:02x?}");
    });
}

#[test]
fn nat_15_out_and_back_is_the_identity_and_only_addresses_and_sums_change() {
    with_seeds(15_000_000_000, |seed, [one, two]| {
        let mut rng = Rng::new(seed);
        let (a, b) = (addresses(&mut rng), addresses(&mut rng));
        let (side, before, after, there) = turn(seed, a, b);
        let (_, _, _, back) = turn(seed, b, a);
        let made = packet(&mut rng, &before, side, one);
        let (one, two) = (&mut one[..made.len], &mut two[..made.len]);
        two.copy_from_slice(one);
        let parsed = checked(side, &before, &made, one, seed);
        translate(&there, side, one, &parsed, made.offload);
        for (at, (new, old)) in one.iter().zip(two.iter()).enumerate() {
            let may = new == old || made.touched.contains(at);
            assert!(may, "seed {seed}: byte {at} of {two:02x?}");
        }
        let same = before.v4 == after.v4 || before.v6 == after.v6;
        assert!(same || *one != *two, "seed {seed}");
        let parsed = checked(side, &after, &made, one, seed);
        translate(&back, side, one, &parsed, made.offload);
        assert!(*one == *two, "seed {seed}: {one:02x?}, not {two:02x?}");
    });
}

#[test]
fn spoiled_packets_and_noise_never_panic() {
    with_seeds(16_000_000_000, |seed, [one, two]| {
        let mut rng = Rng::new(seed);
        let (a, b) = (addresses(&mut rng), addresses(&mut rng));
        let (side, before, _, nat) = turn(seed, a, b);
        let (len, offload) = if rng.one_in(8) {
            let len = rng.below(256);
            rng.fill(&mut one[..len]);
            (len, Offload::NONE)
        } else {
            let made = packet(&mut rng, &before, side, one);
            (spoil(&mut rng, one, made.len), made.offload)
        };
        let offload = if rng.one_in(4) {
            Offload {
                partial: rng.one_in(2),
                gso_type: rng.byte() & 7,
                gso_size: rng.word() >> rng.below(16),
            }
        } else {
            offload
        };
        exercise(&nat, &before, offload, &mut one[..len], two, seed);
    });
}

/// Everything that may be called with a stranger's packet.
fn exercise(
    nat: &Nat,
    client: &Client,
    offload: Offload,
    packet: &mut [u8],
    out: &mut [u8; ROOM],
    now: u64,
) {
    let limits = Limits {
        verify: false,
        ..LIMITS
    };
    let judged = [
        outbound(packet, offload, &LIMITS, &sources(client)),
        outbound(packet, offload, &limits, &Sources::AnyV4),
        inbound(packet, offload, &limits),
        // What nobody has validated must not harm either.
        parse(packet),
    ];
    if let Ok(parsed) = judged[0] {
        assert!(parsed.len() <= packet.len());
        assert!(parsed.len() <= 1500 || offload.gso_size > 0);
    }
    for parsed in judged.into_iter().flatten() {
        let sum = Sum::from(offload);
        let _ = FragmentBudget::new().admit(packet, &parsed, now);
        let _ = nat.outbound(packet, &parsed, sum);
        let _ = nat.inbound(packet, &parsed, sum);
        let _ = rebuild(packet, &parsed, offload);
        let _ = finish_checksum(packet, &parsed);
        out[..packet.len()].copy_from_slice(packet);
        if let Ok(mut segments) = Segments::new(&mut out[..packet.len()], &parsed, offload) {
            let mut written = 0;
            while let Some(segment) = segments.cut() {
                written += segment.len();
                if written > 1 << 20 {
                    break;
                }
            }
        }
    }
    let _ = VirtioHeader::read(packet).map(VirtioHeader::offload);
}

proptest::proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        version in 0..16_u8,
        partial in proptest::bool::ANY,
        gso_type in 0..8_u8,
        gso_size in proptest::num::u16::ANY,
    ) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = version << 4 | (*first & 15);
        }
        let client = Client { v4: Ipv4Addr::new(10, 64, 0, 2), v6: Ipv6Addr::LOCALHOST };
        let offload = Offload { partial, gso_type, gso_size };
        let mut out = Box::new([0; ROOM]);
        exercise(&nat(&client, &client), &client, offload, &mut bytes, &mut out, 0);
    }
}
