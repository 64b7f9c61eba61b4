//! The rules about how long a packet may be and what it may quote; the others
//! are in `packet_rules.rs`.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod packets;

use packets::{
    FAMILIES, LIMITS, V4, V6, both, error, finish, finish_header, icmp, inbound, make_partial, nat,
    outbound, piece, raw, tcp, udp, why,
};
use rvpn_proto::gso::{rebuild, size};
use rvpn_proto::nat::Sum;
use rvpn_proto::record::{Offload, gso_type};
use rvpn_proto::validate::{self, DropReason, FragmentBudget, Limits};

const ACK: u8 = 0x10;

fn good() -> Vec<u8> {
    udp((V4.inner, 4000), (V4.far, 53), b"question")
}

fn from(source: &str, far: &str) -> Vec<u8> {
    udp((source, 4000), (far, 53), b"question")
}

#[test]
fn spf_22_larger_than_the_tunnel() {
    for family in FAMILIES {
        let headers = if family.icmp == 1 { 28 } else { 48 };
        let of = |len: usize| udp((family.inner, 1), (family.far, 2), &vec![7; len - headers]);
        for mtu in [1280, 1400, 1500] {
            let limits = Limits { mtu, ..LIMITS };
            let judge =
                |packet: &[u8]| why(validate::outbound(packet, Offload::NONE, &limits, &both()));
            assert_eq!(judge(&of(mtu.into())), None);
            for len in [usize::from(mtu) + 1, 9000, 65_535] {
                assert_eq!(judge(&of(len)), Some(DropReason::TooBig), "{len}");
            }
        }
        // An unfinished checksum makes it no shorter.
        let limits = Limits {
            offload: true,
            ..LIMITS
        };
        let partial = Offload {
            partial: true,
            ..Offload::NONE
        };
        let judge = |len| why(validate::outbound(&of(len), partial, &limits, &both()));
        assert_eq!(judge(1500), None);
        assert_eq!(judge(1501), Some(DropReason::TooBig));
    }
}

#[test]
fn spf_22_super_packets_are_bounded_by_their_segments() {
    let limits = Limits {
        offload: true,
        ..LIMITS
    };
    for (family, kind) in [(V4, gso_type::TCP_V4), (V6, gso_type::TCP_V6)] {
        let headers = if family.icmp == 1 { 40 } else { 60 };
        let mut packet = tcp((family.inner, 1), (family.far, 2), ACK, 1, &[7; 20_000]);
        make_partial(&mut packet);
        let judge = |packet: &[u8], gso_type: u8, gso_size: u16, partial: bool| {
            let offload = Offload {
                partial,
                gso_type,
                gso_size,
            };
            why(validate::outbound(packet, offload, &limits, &both()))
        };
        let most = 1500 - headers;
        for size in [256, 1000, most] {
            assert_eq!(judge(&packet, kind, size, true), None);
        }
        for size in [1, 255, most + 1, 9000, 65_535] {
            let judged = judge(&packet, kind, size, true);
            assert_eq!(judged, Some(DropReason::Offload), "{size}");
        }
        for kind in [gso_type::UDP_L4, kind ^ 5, 2, 3, 7, 255] {
            let judged = judge(&packet, kind, 1000, true);
            assert_eq!(judged, Some(DropReason::Offload), "{kind}");
        }
        assert_eq!(
            judge(&packet, kind, 1000, false),
            Some(DropReason::Offload),
            "finished"
        );
        let offload = Offload {
            partial: true,
            gso_type: kind,
            gso_size: 1000,
        };
        let judged = validate::outbound(&packet, offload, &LIMITS, &both());
        assert_eq!(why(judged), Some(DropReason::Offload), "not agreed on");
        // The virtio header is ours, from what was found and nothing else.
        let parsed = validate::outbound(&packet, offload, &limits, &both()).unwrap();
        let header = rebuild(&mut packet, &parsed, offload).unwrap();
        assert_eq!((header.flags, header.gso_type), (1, kind));
        assert_eq!((header.hdr_len, header.gso_size), (headers, 1000));
        assert_eq!((header.csum_start, header.csum_offset), (headers - 20, 16));
        assert_eq!(
            size(&parsed, offload),
            (20, 20_000 + 20 * u64::from(headers))
        );
        for flags in [0x02, 0x12, 0x14] {
            let mut packet = tcp((family.inner, 1), (family.far, 2), flags, 1, &[7; 3000]);
            make_partial(&mut packet);
            let judged = judge(&packet, kind, 1000, true);
            assert_eq!(judged, Some(DropReason::Offload), "{flags:#x}");
        }
    }
}

#[test]
fn spf_23_lengths_and_versions_that_cannot_be() {
    let good = good();
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = good.clone();
        change(&mut packet);
        finish_header(&mut packet);
        packet
    };
    assert_eq!(why(outbound(&[])), Some(DropReason::Empty));
    for len in [1, 2, 19] {
        assert_eq!(why(outbound(&good[..len])), Some(DropReason::Truncated));
    }
    for version in (0..16).filter(|v| ![4, 6].contains(v)) {
        let mut packet = good.clone();
        packet[0] = version << 4 | 5;
        assert_eq!(why(outbound(&packet)), Some(DropReason::Version));
    }
    for words in 0..5 {
        let mut packet = good.clone();
        packet[0] = 0x40 | words;
        assert_eq!(why(outbound(&packet)), Some(DropReason::HeaderLength));
    }
    let total = |len: u16| changed(&|p| p[2..4].copy_from_slice(&len.to_be_bytes()));
    for len in [0, 1, 19, 37, 1500, 65_535] {
        let judged = why(outbound(&total(len)));
        assert_eq!(judged, Some(DropReason::TotalLength), "{len}");
    }
    // The header longer than the packet.
    let mut packet = total(20);
    packet[0] = 0x46;
    assert_eq!(why(outbound(&packet)), Some(DropReason::HeaderLength));
    // The datagram longer or shorter than the packet.
    for len in [0, 7, 15, 17, 65_535] {
        let packet = changed(&|p| p[24..26].copy_from_slice(&u16::to_be_bytes(len)));
        let judged = why(outbound(&packet));
        assert_eq!(judged, Some(DropReason::TransportHeader), "{len}");
    }
    let six = from(V6.inner, V6.far);
    for len in [1, 39] {
        assert_eq!(why(outbound(&six[..len])), Some(DropReason::Truncated));
    }
    for len in [17_u16, 1500, 65_535] {
        let mut packet = six.clone();
        packet[4..6].copy_from_slice(&len.to_be_bytes());
        assert_eq!(why(outbound(&packet)), Some(DropReason::TotalLength));
    }
    // Transport headers that are not all there, or say so.
    for family in FAMILIES {
        for (protocol, least) in [(6, 20), (17, 8), (family.icmp, 8)] {
            for len in 0..least {
                let packet = raw(family.inner, family.far, protocol, &vec![0; len]);
                assert_eq!(why(outbound(&packet)), Some(DropReason::TransportHeader));
            }
        }
        for words in [0, 4, 6, 15] {
            let mut packet = tcp((family.inner, 1), (family.far, 2), ACK, 1, b"");
            let at = packets::l4(&packet) + 12;
            packet[at] = words << 4;
            finish(&mut packet);
            assert_eq!(why(outbound(&packet)), Some(DropReason::TransportHeader));
        }
    }
}

#[test]
fn spf_24_bytes_behind_the_packet() {
    for family in FAMILIES {
        let packet = udp((family.inner, 4000), (family.far, 53), b"odd");
        for trailing in [1, 2, 19, 20, 1000, 60_000] {
            let mut longer = packet.clone();
            longer.extend(std::iter::repeat_n(0xa5, trailing));
            let parsed = outbound(&longer).unwrap();
            assert_eq!(parsed.len(), packet.len());
            assert_eq!(size(&parsed, Offload::NONE), (1, packet.len() as u64));
            nat().outbound(&mut longer, &parsed, Sum::Full).unwrap();
            let (head, tail) = longer.split_at(packet.len());
            let expected = udp((family.lease, 4000), (family.far, 53), b"odd");
            assert_eq!(head, expected);
            assert!(tail.iter().all(|b| *b == 0xa5), "touched");
        }
    }
}

#[test]
fn spf_25_a_forged_error_about_another_clients_flow() {
    for family in FAMILIES {
        let (unreachable, too_big, redirect) = if family.icmp == 1 {
            ((3, 1), (3, 4), 5)
        } else {
            ((1, 0), (2, 0), 137)
        };
        let theirs = tcp((family.far, 443), (family.other, 4000), ACK, 1, b"");
        let answers = tcp((family.other, 4000), (family.far, 443), ACK, 1, b"");
        for quoted in [&theirs, &answers] {
            for kind in [unreachable, too_big] {
                let mut packet = error(family.inner, family.far, kind, 68, quoted);
                let before = packet.clone();
                let parsed = outbound(&packet).unwrap();
                let translated = nat().outbound(&mut packet, &parsed, Sum::Full);
                assert_eq!(translated, Err(DropReason::Quoted));
                assert_eq!(packet, before, "refused and unchanged");
            }
            let packet = icmp(family.inner, family.far, redirect, 1, quoted);
            assert_eq!(why(outbound(&packet)), Some(DropReason::IcmpType));
        }
        // Not even the beginning of a header is quoted.
        for len in [0, 1, 19] {
            let mut packet = error(family.inner, family.far, unreachable, 0, &theirs[..len]);
            let parsed = outbound(&packet).unwrap();
            let translated = nat().outbound(&mut packet, &parsed, Sum::Full);
            assert_eq!(translated, Err(DropReason::Quoted));
        }
        // About a packet that it got, a client may complain.
        let mine = tcp((family.far, 443), (family.inner, 4000), ACK, 1, b"");
        let mut packet = error(family.inner, family.far, unreachable, 0, &mine);
        let parsed = outbound(&packet).unwrap();
        nat().outbound(&mut packet, &parsed, Sum::Full).unwrap();
        let mine = tcp((family.far, 443), (family.lease, 4000), ACK, 1, b"");
        let expected = error(family.lease, family.far, unreachable, 0, &mine);
        assert_eq!(packet, expected);
    }
}

#[test]
fn spf_26_an_error_says_that_a_clients_packets_are_too_big() {
    for family in FAMILIES {
        let kind = if family.icmp == 1 { (3, 4) } else { (2, 0) };
        for mtu in [68, 552, 1280] {
            let sent = |src| tcp((src, 4000), (family.far, 443), ACK, 1, &[7; 600]);
            let quoted = &sent(family.lease)[..576];
            let mut packet = error(family.router, family.lease, kind, mtu, quoted);
            let parsed = inbound(&packet).unwrap();
            nat().inbound(&mut packet, &parsed, Sum::Full).unwrap();
            let quoted = &sent(family.inner)[..576];
            assert_eq!(
                packet,
                error(family.router, family.inner, kind, mtu, quoted)
            );
            // About anybody else's it is not handed on.
            let quoted = &sent(family.other)[..576];
            let mut packet = error(family.router, family.lease, kind, mtu, quoted);
            let parsed = inbound(&packet).unwrap();
            let translated = nat().inbound(&mut packet, &parsed, Sum::Full);
            assert_eq!(translated, Err(DropReason::Quoted));
        }
    }
}

#[test]
fn fragments_that_cannot_be_are_refused_one_by_one() {
    for family in FAMILIES {
        let whole = tcp((family.inner, 1), (family.far, 2), ACK, 1, &[7; 400]);
        let mut budget = FragmentBudget::new();
        let mut judge = |at: usize, len: usize, more: bool| {
            let packet = piece(&whole, 3, at, &vec![0; len], more);
            let judged = outbound(&packet);
            judged.and_then(|parsed| budget.admit(&packet, &parsed, 0))
        };
        let wrong = Err(DropReason::Fragment);
        // Over the header that was judged in the first one.
        assert_eq!(judge(8, 16, true), wrong);
        assert_eq!(judge(16, 16, true), wrong);
        // Not a multiple of eight, empty, beyond the longest datagram.
        assert_eq!(judge(24, 15, true), wrong);
        assert_eq!(judge(24, 0, true), wrong);
        assert_eq!(judge(65_528, 8, false), wrong);
        assert_eq!(judge(24, 15, false), Ok(()));
    }
}
