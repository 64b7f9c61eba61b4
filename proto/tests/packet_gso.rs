//! Super-packets, cut and joined: byte for byte what a client's own segments are.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod packets;

use packets::{LIMITS, V4, V6, finish, is_v6, l4, make_partial, outbound, tcp, udp};
use rvpn_proto::gso::{
    Coalescer, Joins, Offer, Segments, finish_checksum, shorten, size, size_of, trim,
};
use rvpn_proto::packet::grammar::Rng;
use rvpn_proto::packet::{Parsed, parse};
use rvpn_proto::queue::{MIN_LIMIT, Meta, Queue, Settings};
use rvpn_proto::record::{MAX_PACKET, Offload, gso_type};
use rvpn_proto::validate::{self, Limits};

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;
const ALL: Joins = Joins {
    tcp: true,
    udp: true,
};

/// One flow: client to far end, in one of the families.
#[derive(Clone, Copy, Debug)]
struct Flow {
    v6: bool,
    udp: bool,
    port: u16,
}

impl Flow {
    fn packet(self, id: u16, flags: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let family = if self.v6 { V6 } else { V4 };
        let (src, dst) = ((family.inner, self.port), (family.far, 443));
        let mut packet = if self.udp {
            udp(src, dst, payload)
        } else {
            tcp(src, dst, flags, sequence, payload)
        };
        if !self.v6 {
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            finish(&mut packet);
        }
        packet
    }

    fn kind(self) -> u8 {
        match (self.udp, self.v6) {
            (true, _) => gso_type::UDP_L4,
            (false, false) => gso_type::TCP_V4,
            (false, true) => gso_type::TCP_V6,
        }
    }
}

fn flows() -> [Flow; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(udp, v6)| Flow {
        v6,
        udp,
        port: 4000,
    })
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut payload = vec![0; len];
    Rng::new(seed).fill(&mut payload);
    payload
}

fn super_offload(flow: Flow, gso_size: u16) -> Offload {
    Offload {
        partial: true,
        gso_type: flow.kind(),
        gso_size,
    }
}

/// All segments, copied out.
fn segments(packet: &mut [u8], parsed: &Parsed, offload: Offload) -> Vec<Vec<u8>> {
    let mut cut = Segments::new(packet, parsed, offload).unwrap();
    let count = cut.left();
    let mut all = Vec::new();
    while let Some(segment) = cut.cut() {
        all.push(segment.to_vec());
    }
    assert_eq!((all.len(), cut.left()), (count, 0));
    all
}

#[test]
fn a_super_packet_is_cut_in_place_into_what_a_card_sends() {
    for flow in flows() {
        for (len, step) in [
            (1, 1000),
            (1000, 1000),
            (1001, 1000),
            (5000, 1000),
            (60_001, 1448),
            (9000, 256),
        ] {
            let payload = noise(len as u64, len);
            let flags = ACK | PSH | FIN | CWR;
            let first = u32::MAX - 2000;
            let mut packet = flow.packet(0xfffe, flags, first, &payload);
            make_partial(&mut packet);
            let parsed = parse(&packet).unwrap();
            let offload = super_offload(flow, step);
            let (count, bytes) = size(&parsed, offload);
            packet.extend([0xa5; 9]);
            let got = segments(&mut packet, &parsed, offload);
            assert_eq!(got.len() as u64, count);
            assert_eq!(got.iter().map(|s| s.len() as u64).sum::<u64>(), bytes);
            let parts = payload.chunks(step.into());
            for (n, (got, part)) in got.iter().zip(parts).enumerate() {
                let flags = match (n == 0, n + 1 == count as usize) {
                    (true, true) => flags,
                    (true, false) => ACK | CWR,
                    (false, true) => ACK | PSH | FIN,
                    (false, false) => ACK,
                };
                let sequence = first.wrapping_add(n as u32 * u32::from(step));
                let id = 0xfffe_u16.wrapping_add(n as u16);
                assert_eq!(*got, flow.packet(id, flags, sequence, part), "{flow:?} {n}");
            }
        }
    }
}

#[test]
fn f_10_segments_are_made_where_the_packet_lies() {
    for flow in flows() {
        let mut packet = flow.packet(1, ACK, 1, &noise(1, 5000));
        make_partial(&mut packet);
        let parsed = parse(&packet).unwrap();
        let payloads = packet.as_ptr_range();
        let headers = parsed.header_len();
        let mut cut = Segments::new(&mut packet, &parsed, super_offload(flow, 1000)).unwrap();
        let mut n = 0;
        while let Some(segment) = cut.cut() {
            let there = payloads.start.wrapping_add(headers + n * 1000);
            assert_eq!(segment[headers..].as_ptr(), there, "segment {n} was copied");
            n += 1;
        }
        assert_eq!(n, 5);
    }
}

#[test]
fn a_packet_that_is_no_super_packet_is_its_only_segment() {
    for flow in flows() {
        let finished = flow.packet(1, ACK, 1, b"payload");
        let mut packet = finished.clone();
        let parsed = parse(&packet).unwrap();
        assert_eq!(
            segments(&mut packet, &parsed, Offload::NONE),
            [&finished[..]]
        );
        make_partial(&mut packet);
        assert_ne!(packet, finished);
        let partial = Offload {
            partial: true,
            ..Offload::NONE
        };
        let mut again = packet.clone();
        assert_eq!(segments(&mut packet, &parsed, partial), [&finished[..]]);
        finish_checksum(&mut again, &parsed).unwrap();
        assert_eq!(again, finished);
    }
}

/// Sends packets through a coalescer as the gateway does, and cuts apart again
/// what it gives. Also returns how many packets came out of it.
fn joined(joins: Joins, packets: &[Vec<u8>]) -> (Vec<Vec<u8>>, usize) {
    let mut coalescer = Coalescer::new(joins);
    let mut buffer = vec![0; MAX_PACKET];
    let (mut all, mut writes) = (Vec::new(), 0);
    let mut flush = |coalescer: &mut Coalescer, buffer: &mut [u8], all: &mut Vec<Vec<u8>>| {
        let Some(made) = coalescer.flush(buffer) else {
            return;
        };
        writes += 1;
        let packet = &mut buffer[..made.parsed.len()];
        // The device believes it, so it must be right by our own rules.
        let limits = Limits {
            offload: true,
            ..LIMITS
        };
        let judged = validate::inbound(packet, made.offload, &limits);
        assert_eq!(judged.unwrap().len(), packet.len());
        let count = size(&made.parsed, made.offload).0;
        assert_eq!(count, u64::from(made.segments));
        all.extend(segments(packet, &made.parsed, made.offload));
    };
    let mut passed = 0;
    for packet in packets {
        let parsed = outbound(packet).unwrap();
        loop {
            match coalescer.offer(&mut buffer, packet, &parsed, Offload::NONE) {
                Offer::Taken => break,
                Offer::Flush => flush(&mut coalescer, &mut buffer, &mut all),
                Offer::Pass => {
                    all.push(packet.clone());
                    passed += 1;
                    break;
                }
            }
        }
    }
    flush(&mut coalescer, &mut buffer, &mut all);
    assert!(coalescer.is_empty());
    (all, writes + passed)
}

/// So many packets of a flow, in order.
fn stream(flow: Flow, count: usize, len: usize) -> Vec<Vec<u8>> {
    let payload = noise(9, len);
    (0..count)
        .map(|n| flow.packet(n as u16, ACK, (n * len) as u32, &payload))
        .collect()
}

#[test]
fn a_stream_is_joined_and_comes_apart_the_same() {
    for flow in flows() {
        let packets = stream(flow, 40, 1400);
        assert_eq!(joined(ALL, &packets), (packets.clone(), 1), "{flow:?}");
        // The last may be shorter, and then it is the last.
        let mut packets = stream(flow, 20, 1200);
        packets.push(flow.packet(20, ACK, 20 * 1200, b"short"));
        assert_eq!(joined(ALL, &packets), (packets.clone(), 1), "{flow:?}");
        packets.push(flow.packet(21, ACK, 20 * 1200 + 5, &noise(1, 1200)));
        assert_eq!(joined(ALL, &packets), (packets.clone(), 2), "{flow:?}");
        // More than a packet holds, or than a kernel takes.
        let packets = stream(flow, 200, 1400);
        let (all, writes) = joined(ALL, &packets);
        assert!(
            all == packets && (5..=6).contains(&writes),
            "{flow:?}: {writes}"
        );
        let packets = stream(flow, 128, 300);
        let (all, writes) = joined(ALL, &packets);
        let expected = if flow.udp { 2 } else { 1 };
        assert!(all == packets && writes == expected, "{flow:?}: {writes}");
    }
}

#[test]
fn a_push_ends_a_stretch_and_stays_where_it_was() {
    for v6 in [false, true] {
        let flow = Flow {
            v6,
            udp: false,
            port: 1,
        };
        let mut packets = stream(flow, 6, 1000);
        packets[3] = flow.packet(3, ACK | PSH, 3000, &noise(9, 1000));
        assert_eq!(joined(ALL, &packets), (packets.clone(), 2));
        // It is no beginning; nor is the end of a connection part of one.
        packets[4] = flow.packet(4, ACK | PSH, 4000, &noise(9, 1000));
        packets[5] = flow.packet(5, ACK | FIN, 5000, &noise(9, 1000));
        assert_eq!(joined(ALL, &packets), (packets.clone(), 3));
    }
}

#[test]
fn what_does_not_go_on_is_not_joined_and_not_overtaken() {
    for flow in flows() {
        let l4 = if flow.v6 { 40 } else { 20 };
        let after = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut packets = stream(flow, 2, 1000);
            change(&mut packets[1]);
            finish(&mut packets[1]);
            let (all, writes) = joined(ALL, &packets);
            assert_eq!(all, packets);
            writes
        };
        assert_eq!(after(&|_| {}), 1);
        let hops = if flow.v6 { 7 } else { 8 };
        assert_eq!(after(&|p| p[hops] = 9), 2, "other hops");
        assert_eq!(after(&|p| p[1] ^= 0x30), 2, "congestion experienced");
        assert_eq!(after(&|p| p[l4 + 1] ^= 1), 2, "another flow");
        if flow.v6 {
            assert_eq!(after(&|p| p[3] ^= 1), 2, "another label");
        } else {
            assert_eq!(after(&|p| p[5] ^= 4), 2, "another identification");
        }
        if !flow.udp {
            assert_eq!(after(&|p| p[l4 + 7] ^= 1), 2, "a gap");
            assert_eq!(after(&|p| p[l4 + 11] ^= 1), 2, "another acknowledgement");
            assert_eq!(after(&|p| p[l4 + 15] ^= 1), 2, "another window");
            assert_eq!(after(&|p| p[l4 + 13] |= 0x40), 2, "an echo of congestion");
        }
        // Nothing in it.
        let packets = [
            flow.packet(0, ACK, 0, &noise(9, 600)),
            flow.packet(1, ACK, 600, b""),
        ];
        assert_eq!(joined(ALL, &packets), (packets.to_vec(), 2));
        // Longer than the first.
        let packets = [
            flow.packet(0, ACK, 0, &noise(9, 600)),
            flow.packet(1, ACK, 600, &noise(9, 601)),
        ];
        assert_eq!(joined(ALL, &packets), (packets.to_vec(), 2));
        // A device that does not take it gets single ones.
        let none = Joins {
            tcp: flow.udp,
            udp: !flow.udp,
        };
        let packets = stream(flow, 4, 1000);
        assert_eq!(joined(none, &packets), (packets.clone(), 4));
    }
}

#[test]
fn a_datagram_without_a_checksum_goes_alone_and_gets_none() {
    let flow = Flow {
        v6: false,
        udp: true,
        port: 7,
    };
    let mut packets = stream(flow, 4, 1000);
    packets[2][26..28].fill(0);
    assert_eq!(joined(ALL, &packets), (packets.clone(), 3));
}

/// As programs send them, with checksums that their kernel has left undone.
#[test]
fn small_datagrams_with_partial_checksums_are_joined() {
    for v6 in [false, true] {
        let flow = Flow {
            v6,
            udp: true,
            port: 7,
        };
        let finished = stream(flow, 100, 36);
        let partial = Offload {
            partial: true,
            ..Offload::NONE
        };
        let mut coalescer = Coalescer::new(ALL);
        let mut buffer = vec![0; MAX_PACKET];
        let (mut all, mut writes) = (Vec::new(), Vec::new());
        for packet in &finished {
            let mut packet = packet.clone();
            make_partial(&mut packet);
            let parsed = parse(&packet).unwrap();
            if coalescer.offer(&mut buffer, &packet, &parsed, partial) == Offer::Flush {
                let made = coalescer.flush(&mut buffer).unwrap();
                let whole = &mut buffer[..made.parsed.len()];
                writes.push(made.segments);
                all.extend(segments(whole, &made.parsed, made.offload));
                let again = coalescer.offer(&mut buffer, &packet, &parsed, partial);
                assert_eq!(again, Offer::Taken);
            }
        }
        let made = coalescer.flush(&mut buffer).unwrap();
        let whole = &mut buffer[..made.parsed.len()];
        writes.push(made.segments);
        all.extend(segments(whole, &made.parsed, made.offload));
        assert_eq!(all, finished);
        // Kernels take 64 at most.
        assert_eq!(writes, [64, 36]);
        // One that stays alone still has its checksum to be finished.
        let mut packet = finished[0].clone();
        make_partial(&mut packet);
        let parsed = parse(&packet).unwrap();
        coalescer.offer(&mut buffer, &packet, &parsed, partial);
        assert_eq!(coalescer.flush(&mut buffer).unwrap().offload, partial);
        // What is a super-packet already goes as it is.
        let offload = Offload {
            gso_type: gso_type::UDP_L4,
            gso_size: 12,
            ..partial
        };
        let offer = coalescer.offer(&mut buffer, &packet, &parsed, offload);
        assert_eq!(offer, Offer::Pass);
    }
}

#[test]
fn a_wrong_checksum_does_not_become_right() {
    for flow in flows() {
        let mut packets = stream(flow, 3, 1000);
        packets[1][900] ^= 1;
        let mut coalescer = Coalescer::new(ALL);
        let mut buffer = vec![0; MAX_PACKET];
        let offers = packets.iter().map(|packet| {
            // As after a judgement that leaves checksums alone.
            let parsed = parse(packet).unwrap();
            coalescer.offer(&mut buffer, packet, &parsed, Offload::NONE)
        });
        let offers: Vec<_> = offers.collect();
        assert_eq!(offers[..2], [Offer::Taken, Offer::Flush], "{flow:?}");
    }
}

/// Whatever comes, every flow's packets come out byte for byte and in order.
#[test]
fn any_mixture_of_flows_stays_in_order_byte_for_byte() {
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let mut flows: Vec<(Flow, u16, u32)> = (0..3)
            .map(|n| {
                let flow = Flow {
                    v6: rng.one_in(2),
                    udp: rng.one_in(2),
                    port: 1000 + n,
                };
                (flow, rng.word(), rng.bits() as u32)
            })
            .collect();
        let mut packets = Vec::new();
        let mut current = 0;
        for _ in 0..60 {
            if rng.one_in(6) {
                current = rng.below(3);
            }
            let (flow, id, sequence) = &mut flows[current];
            let len = [1200, 1200, 1200, 1200, 1200, 300, 0, 17][rng.below(8)];
            let flags = [ACK, ACK, ACK, ACK, ACK | PSH, ACK | FIN][rng.below(6)];
            let mut payload = vec![0; len];
            rng.fill(&mut payload);
            packets.push(flow.packet(*id, flags, *sequence, &payload));
            *id = id.wrapping_add(1);
            *sequence = sequence.wrapping_add(len as u32);
            if rng.one_in(20) {
                // Lost on the way.
                *sequence = sequence.wrapping_add(1200);
            }
        }
        let (all, writes) = joined(ALL, &packets);
        assert_eq!(all.len(), packets.len(), "seed {seed}");
        assert!(writes <= packets.len());
        let of = |packets: &[Vec<u8>], port: u16| -> Vec<Vec<u8>> {
            let has = |p: &&Vec<u8>| p[l4(p)..][..2] == port.to_be_bytes();
            packets.iter().filter(has).cloned().collect()
        };
        for port in 1000..1003 {
            assert_eq!(of(&all, port), of(&packets, port), "seed {seed}");
        }
    }
}

#[test]
fn segments_count_singly_in_every_drop_of_the_queue() {
    let flow = flows()[2];
    let mut packet = flow.packet(0, ACK, 0, &noise(1, 14_000));
    make_partial(&mut packet);
    let meta = Meta {
        offload: super_offload(flow, 1400),
        header_len: 28,
    };
    let settings = Settings {
        limit: MIN_LIMIT,
        ..Settings::default()
    };
    let mut queue = Queue::new(settings, [1, 2]);
    for _ in 0..20 {
        queue.push(&packet, meta, 0);
    }
    let stats = *queue.stats();
    assert_eq!(stats.accepted.segments, 200);
    assert!(stats.overflow.packets > 0);
    assert_eq!(stats.overflow.segments, 10 * stats.overflow.packets);
    assert_eq!(stats.queued.segments, 10 * stats.queued.packets);
    // One whose message cannot hold it goes unread.
    let next = queue.next(0).unwrap();
    assert_eq!(queue.skip(), Some(next));
    assert_eq!(queue.skip(), None);
    assert_eq!(queue.stats().delivered.segments, 10);
    // Those that waited too long lose theirs as one.
    let mut now = 0;
    while queue.next(now).is_some() {
        queue.skip();
        now += 200_000;
    }
    let stats = *queue.stats();
    assert!(stats.late.packets > 0);
    assert_eq!(stats.late.segments, 10 * stats.late.packets);
    let gone = stats.delivered.segments + stats.overflow.segments + stats.late.segments;
    assert_eq!((stats.queued.segments, gone), (0, 200));
}

#[test]
fn the_parts_of_a_super_packet_are_its_segments() {
    for flow in flows().into_iter().filter(|flow| !flow.udp) {
        let offload = super_offload(flow, 1000);
        for length in [5100, 5000, 1001] {
            let mut packet = flow.packet(7, ACK | PSH | CWR, 100, &noise(3, length));
            make_partial(&mut packet);
            let parsed = parse(&packet).unwrap();
            let all = segments(&mut packet.clone(), &parsed, offload);
            for step in 1..all.len() {
                let mut parts = Vec::new();
                for cut in (0..all.len()).step_by(step) {
                    let mut part = packet.clone();
                    let rest = length.saturating_sub((cut + step) * 1000);
                    let mut left = (parsed, offload);
                    if rest > 0 {
                        left = shorten(&mut part, &left.0, left.1, rest as u16).unwrap();
                    }
                    if cut > 0 {
                        left = trim(&mut part, &left.0, left.1, cut as u16).unwrap();
                    }
                    parts.extend(segments(&mut part, &left.0, left.1));
                }
                assert_eq!(parts, all, "{length} bytes by {step}");
            }
            for rest in [length, length + 1, 1, length - 999] {
                let refused = shorten(&mut packet.clone(), &parsed, offload, rest as u16);
                assert!(
                    refused.is_err() || (length - rest).is_multiple_of(1000),
                    "{rest}"
                );
            }
        }
    }
}

#[test]
fn a_trimmed_super_packet_is_its_last_segments() {
    for flow in flows().into_iter().filter(|flow| !flow.udp) {
        let payload = noise(3, 5100);
        let offload = super_offload(flow, 1000);
        for gone in 1..=5 {
            let mut packet = flow.packet(7, ACK | PSH, 100, &payload);
            make_partial(&mut packet);
            let parsed = parse(&packet).unwrap();
            let all = segments(&mut packet.clone(), &parsed, offload);
            let (parsed, left) = trim(&mut packet, &parsed, offload, gone).unwrap();
            assert_eq!(
                segments(&mut packet, &parsed, left),
                all[usize::from(gone)..]
            );
            let header_len = if is_v6(&packet) { 60 } else { 40 };
            let count = size_of(parsed.len(), header_len, left).0;
            assert_eq!(count, 6 - u64::from(gone));
        }
        let mut packet = flow.packet(7, ACK, 100, &payload);
        let parsed = parse(&packet).unwrap();
        assert!(trim(&mut packet, &parsed, offload, 6).is_err());
    }
}
