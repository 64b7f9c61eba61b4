//! The rules that stand before the device, one case of SECURITY at a time, as
//! far as they are kept by looking at one packet. What the kernel's rules add is
//! tried in the laboratory.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod packets;

use packets::{
    FAMILIES, LIMITS, V4, V6, error, finish_header, icmp, inbound, nat, outbound, piece, pieces,
    raw, tcp, udp, why,
};
use rvpn_proto::nat::Sum;
use rvpn_proto::record::Offload;
use rvpn_proto::validate::{self, DropReason, Sources};

const ACK: u8 = 0x10;

fn good() -> Vec<u8> {
    udp((V4.inner, 4000), (V4.far, 53), b"question")
}

fn from(source: &str, far: &str) -> Vec<u8> {
    udp((source, 4000), (far, 53), b"question")
}

#[test]
fn spf_12_ipv6_from_a_client_that_has_none() {
    let echo = |dst: &str| icmp(V6.inner, dst, 128, 0, &[0, 1, 0, 1]);
    let packets = [
        echo("fe80::1"),
        echo("ff02::1"),
        echo("::ffff:10.64.8.2"),
        echo(V6.far),
        icmp("fe80::2", "ff02::2", 133, 0, &[0; 4]),
        icmp("fe80::2", "ff02::1:ff00:1", 135, 0, &[0; 20]),
        from(V6.inner, V6.far),
    ];
    let v4_only = Sources::Own {
        v4: Some(V4.inner.parse().unwrap()),
        v6: None,
    };
    for packet in &packets {
        for sources in [v4_only, Sources::AnyV4] {
            let judged = validate::outbound(packet, Offload::NONE, &LIMITS, &sources);
            assert_eq!(why(judged), Some(DropReason::Family), "{packet:02x?}");
        }
    }
    // One that has IPv6 gets no further with what belongs to a link.
    for dst in ["fe80::1", "ff02::1", "::ffff:10.64.8.2", "::1", "::"] {
        assert_eq!(why(outbound(&echo(dst))), Some(DropReason::Destination));
    }
    for kind in [130, 131, 132, 133, 134, 135, 136, 137, 143, 255] {
        let packet = icmp(V6.inner, V6.far, kind, 0, &[0; 20]);
        assert_eq!(why(outbound(&packet)), Some(DropReason::IcmpType));
    }
    assert!(outbound(&echo(V6.far)).is_ok());
}

#[test]
fn spf_13_the_kernels_own_chatter() {
    let report = {
        // A listener report with its router alert.
        let mut body = vec![58, 0, 5, 2, 0, 0, 1, 0];
        body.extend([143, 0, 0, 0, 0, 0, 0, 0]);
        raw("fe80::1", "ff02::16", 0, &body)
    };
    let membership = raw("10.64.7.1", "224.0.0.22", 2, &[0x22, 0, 0, 0, 0, 0, 0, 0]);
    for packet in [
        report,
        membership,
        icmp("fe80::1", "ff02::2", 133, 0, &[0; 4]),
        icmp("::", "ff02::1:ff00:1", 135, 0, &[0; 20]),
        from("fe80::1", "ff02::fb"),
        from("10.64.7.1", "239.255.255.250"),
        from("10.64.7.1", "255.255.255.255"),
    ] {
        assert_eq!(why(inbound(&packet)), Some(DropReason::Recipient));
    }
}

#[test]
fn spf_14_ip_options() {
    let options: [(&str, &[u8]); 7] = [
        ("loose source route", &[131, 7, 4, 1, 1, 1, 1, 0]),
        ("strict source route", &[137, 7, 4, 1, 1, 1, 1, 0]),
        ("record route", &[7, 7, 4, 0, 0, 0, 0, 0]),
        ("timestamp", &[68, 8, 5, 0, 0, 0, 0, 0]),
        ("router alert", &[148, 4, 0, 0]),
        ("nothing", &[1, 1, 1, 1]),
        ("end", &[0, 0, 0, 0]),
    ];
    let with = |options: &[u8]| {
        let whole = good();
        let mut packet = whole[..20].to_vec();
        packet.extend_from_slice(options);
        packet.extend_from_slice(&whole[20..]);
        packet[0] = 0x45 + u8::try_from(options.len() / 4).unwrap();
        let len = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        finish_header(&mut packet);
        packet
    };
    for (name, options) in options {
        let packet = with(options);
        assert_eq!(why(outbound(&packet)), Some(DropReason::Options), "{name}");
        assert_eq!(why(inbound(&packet)), Some(DropReason::Options), "{name}");
    }
    for words in 1..=10 {
        let packet = with(&vec![1; words * 4]);
        assert_eq!(why(outbound(&packet)), Some(DropReason::Options));
    }
    // What IPv6 has in their place.
    for (name, next) in [("hop-by-hop", 0), ("routing", 43), ("destination", 60)] {
        let whole = from(V6.inner, V6.far);
        let mut body = vec![17, 0, 1, 4, 0, 0, 0, 0];
        body.extend_from_slice(&whole[40..]);
        let packet = raw(V6.inner, V6.far, next, &body);
        let judged = why(outbound(&packet));
        assert_eq!(judged, Some(DropReason::Extension), "{name}");
        // Not behind a fragment header either, nor two of those.
        body.splice(..0, [next, 0, 0, 0, 0, 0, 0, 1]);
        let packet = raw(V6.inner, V6.far, 44, &body);
        let judged = why(outbound(&packet));
        assert_eq!(judged, Some(DropReason::Extension), "{name}");
    }
    let twice = [[44, 0, 0, 0, 0, 0, 0, 1], [17, 0, 0, 0, 0, 0, 0, 1]].concat();
    let packet = raw(V6.inner, V6.far, 44, &[twice, vec![0; 8]].concat());
    assert_eq!(why(outbound(&packet)), Some(DropReason::Extension));
}

#[test]
fn spf_15_no_hops_left() {
    for family in FAMILIES {
        let mut packet = from(family.inner, family.far);
        let at = if family.icmp == 1 { 8 } else { 7 };
        packet[at] = 0;
        finish_header(&mut packet);
        assert_eq!(why(outbound(&packet)), Some(DropReason::HopLimit));
        assert_eq!(why(inbound(&packet)), Some(DropReason::HopLimit));
        // With one left the kernel answers, and the client understands it.
        packet[at] = 1;
        finish_header(&mut packet);
        let parsed = outbound(&packet).unwrap();
        nat().outbound(&mut packet, &parsed, Sum::Full).unwrap();
        let exceeded = if family.icmp == 1 { 11 } else { 3 };
        let mut answer = error(family.router, family.lease, (exceeded, 0), 0, &packet);
        let parsed = inbound(&answer).unwrap();
        nat().inbound(&mut answer, &parsed, Sum::Full).unwrap();
        let mut asked = from(family.inner, family.far);
        asked[at] = 1;
        finish_header(&mut asked);
        let quoted = if family.icmp == 1 { 28 } else { 48 };
        assert_eq!(answer[quoted..], asked);
    }
}

#[test]
fn spf_16_only_what_is_for_the_lease_reaches_a_client() {
    for family in FAMILIES {
        for dst in [family.other, family.inner] {
            let mut packet = udp((family.far, 53), (dst, 4000), b"");
            let before = packet.clone();
            let parsed = inbound(&packet).unwrap();
            let translated = nat().inbound(&mut packet, &parsed, Sum::Full);
            assert_eq!(translated, Err(DropReason::Recipient));
            assert_eq!(packet, before, "refused and unchanged");
        }
    }
}

#[test]
fn spf_17_no_other_protocol_than_ip() {
    // Who has 10.64.7.2? And the same behind an Ethernet header.
    let arp = [
        0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 64, 7, 1, 0, 0, 0, 0, 0, 0, 10, 64, 7, 2,
    ];
    let frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1, 8, 6], &arp].concat();
    for bytes in [&arp[..], &frame] {
        assert_eq!(why(outbound(bytes)), Some(DropReason::Version));
        assert_eq!(why(inbound(bytes)), Some(DropReason::Version));
    }
}

#[test]
fn spf_18_segments_out_of_nowhere_are_for_nobody_else() {
    // Whether there is a flow is the kernel's to know; whose address it is, ours.
    for family in FAMILIES {
        for flags in [0x12, 0x04, 0x14, ACK, 0x11] {
            let mut packet = tcp((family.far, 443), (family.other, 4000), flags, 1, b"");
            let parsed = inbound(&packet).unwrap();
            let translated = nat().inbound(&mut packet, &parsed, Sum::Full);
            assert_eq!(translated, Err(DropReason::Recipient));
        }
    }
    for source in ["127.0.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255"] {
        let packet = tcp((source, 443), (V4.lease, 4000), 0x12, 1, b"");
        assert_eq!(why(inbound(&packet)), Some(DropReason::Destination));
    }
    for source in ["::1", "ff02::1", "::", "::ffff:1.1.1.1"] {
        let packet = tcp((source, 443), (V6.lease, 4000), 0x12, 1, b"");
        assert_eq!(why(inbound(&packet)), Some(DropReason::Destination));
    }
}

#[test]
fn spf_19_sources_are_checked_whatever_the_kernel_says() {
    let v4 = [
        V4.lease,
        V4.other,
        "8.8.8.8",
        "10.64.0.1",
        "10.64.0.3",
        "127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
    ];
    let v6 = [V6.lease, V6.other, V6.far, "fd3a:91c2:77e0::", "::1", "::"];
    let cases = v4.map(|s| (s, V4.far)).into_iter();
    let cases = cases.chain(v6.map(|s| (s, "2001:db8::9")));
    for (source, far) in cases {
        let packet = udp((source, 4000), (far, 53), &[7; 64]);
        for packet in [
            vec![packet.clone()],
            vec![tcp((source, 1), (far, 2), 2, 1, b"")],
            pieces(&packet, 5, 16),
        ]
        .concat()
        {
            let judged = why(outbound(&packet));
            assert_eq!(judged, Some(DropReason::Spoofed), "{source}");
        }
    }
    // The first dialect's clients may call themselves anything: it is replaced.
    for source in [
        "127.0.1.7",
        "192.168.0.9",
        "169.254.1.1",
        "8.8.8.8",
        "0.0.0.0",
        "255.1.2.3",
    ] {
        let packet = udp((source, 4000), (V4.far, 53), b"");
        let judged = validate::outbound(&packet, Offload::NONE, &LIMITS, &Sources::AnyV4);
        assert_eq!(why(judged), None, "{source}");
    }
}

#[test]
fn spf_20_protocols_that_are_not_carried() {
    for family in FAMILIES {
        let foreign = if family.icmp == 1 { 58 } else { 1 };
        for protocol in [
            2, 4, 41, 47, 50, 51, 59, 89, 103, 132, 136, 253, 255, foreign,
        ] {
            let packet = raw(family.inner, family.far, protocol, &[0; 64]);
            let judged = [outbound(&packet), inbound(&packet)];
            assert_eq!(judged.map(why), [Some(DropReason::Protocol); 2]);
            for at in [0, 32] {
                let packet = piece(&packet, 9, at, &[0; 32], at == 0);
                let judged = [outbound(&packet), inbound(&packet)];
                assert_eq!(judged.map(why), [Some(DropReason::Protocol); 2], "{at}");
            }
        }
    }
}

#[test]
fn a_bare_acknowledgement_carries_begins_ends_and_closes_nothing() {
    for family in FAMILIES {
        for flags in 0..=255_u8 {
            for payload in [&b""[..], b"x"] {
                let mut packet = tcp((family.inner, 1), (family.far, 2), flags, 1, payload);
                if let Ok(parsed) = outbound(&packet) {
                    let bare = flags == ACK && payload.is_empty();
                    assert_eq!(
                        parsed.is_bare_ack(&packet),
                        bare,
                        "{flags:#04x} {payload:?}"
                    );
                    // Whoever hears of a closed window late waits for its opening again.
                    let window = packet.len() - payload.len() - 6;
                    for (value, leaves_room) in [(1_u16, true), (256, true), (0, false)] {
                        packet[window..window + 2].copy_from_slice(&value.to_be_bytes());
                        assert_eq!(parsed.is_bare_ack(&packet), bare && leaves_room, "{value}");
                    }
                }
            }
        }
        let datagram = udp((family.inner, 1), (family.far, 2), b"");
        assert!(!outbound(&datagram).unwrap().is_bare_ack(&datagram));
    }
}

#[test]
fn spf_21_flags_that_no_connection_produces() {
    let (fin, syn, rst, psh, urg) = (0x01, 0x02, 0x04, 0x08, 0x20);
    let fine = [
        syn,
        syn | ACK,
        syn | urg,
        rst,
        rst | ACK,
        ACK,
        ACK | urg,
        fin | ACK,
        fin | ACK | urg,
    ];
    for family in FAMILIES {
        for flags in 0..=255_u8 {
            // The push and what is said about congestion go with everything.
            let known = fine.contains(&(flags & !(psh | 0xc0)));
            let mut packet = tcp((family.inner, 1), (family.far, 2), flags, 1, b"");
            let judged = outbound(&packet);
            let expected = (!known).then_some(DropReason::TcpFlags);
            assert_eq!(why(judged), expected, "{flags:#04x}");
            // What passes leaves with the address of the lease, so if the kernel
            // knew no flow for it the private one would still not be seen.
            if let Ok(parsed) = judged {
                nat().outbound(&mut packet, &parsed, Sum::Full).unwrap();
                let expected = tcp((family.lease, 1), (family.far, 2), flags, 1, b"");
                assert_eq!(packet, expected);
            }
        }
    }
}

#[test]
fn spf_21_wrong_checksums() {
    for family in FAMILIES {
        let kind = if family.icmp == 1 { 8 } else { 128 };
        for packet in [
            udp((family.inner, 1), (family.far, 2), b"odd"),
            tcp((family.inner, 1), (family.far, 2), ACK, 1, b"odd"),
            icmp(family.inner, family.far, kind, 0, b"odd len"),
        ] {
            assert!(outbound(&packet).is_ok());
            let l4 = packets::l4(&packet);
            for at in l4..packet.len() {
                for bit in 0..8 {
                    let mut wrong = packet.clone();
                    wrong[at] ^= 1 << bit;
                    assert!(outbound(&wrong).is_err(), "bit {bit} of byte {at}");
                }
            }
            let mut wrong = packet.clone();
            *wrong.last_mut().unwrap() ^= 1;
            assert_eq!(why(outbound(&wrong)), Some(DropReason::TransportChecksum));
        }
    }
    // None is allowed in IPv4, and in IPv4 only.
    let without = |mut packet: Vec<u8>| {
        let at = packets::l4(&packet) + 6;
        packet[at..at + 2].fill(0);
        why(outbound(&packet))
    };
    assert_eq!(without(from(V4.inner, V4.far)), None);
    let v6 = without(from(V6.inner, V6.far));
    assert_eq!(v6, Some(DropReason::TransportChecksum));
    let mut wrong = good();
    wrong[11] ^= 1;
    assert_eq!(why(outbound(&wrong)), Some(DropReason::HeaderChecksum));
    assert_eq!(why(inbound(&wrong)), Some(DropReason::HeaderChecksum));
}
