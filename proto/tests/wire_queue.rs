//! The egress queue: fair, short, bounded, and honest about what it dropped.

use rvpn_proto::queue::{Buffer, MIN_LIMIT, Meta, Next, Queue, Settings, Stats};
use rvpn_proto::record::{MAX_PACKET, MESSAGE_LIMIT, Offload, gso_type};

const MS: u64 = 1000;
const BLOCK: usize = 1024;
/// What a packet costs that has a buffer of its own.
const LONG: usize = 66 * BLOCK;

fn queue(limit: usize) -> Queue {
    let settings = Settings {
        limit,
        ..Settings::default()
    };
    Queue::new(settings, [7, 11])
}

/// A UDP packet of a flow, numbered.
fn packet(flow: u16, number: u32, len: usize) -> Vec<u8> {
    assert!(len >= 32);
    let mut packet = vec![flow as u8 ^ number as u8; len];
    packet[..28].fill(0);
    packet[0] = 0x45;
    packet[9] = 17;
    packet[20..22].copy_from_slice(&flow.to_be_bytes());
    packet[28..32].copy_from_slice(&number.to_be_bytes());
    packet
}

fn flow_of(packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[20], packet[21]])
}

fn number_of(packet: &[u8]) -> u32 {
    u32::from_be_bytes([packet[28], packet[29], packet[30], packet[31]])
}

fn tcp_super(segment: u16) -> Meta {
    Meta {
        offload: Offload {
            partial: true,
            gso_type: gso_type::TCP_V4,
            gso_size: segment,
        },
        header_len: 40,
    }
}

fn pop(queue: &mut Queue, now: u64) -> Option<(Next, Vec<u8>)> {
    let chosen = queue.next(now)?;
    let mut out = vec![0; chosen.len];
    let taken = queue.take(&mut out).expect("it was chosen");
    assert_eq!(taken, chosen);
    Some((taken, out))
}

fn balanced(stats: &Stats) -> bool {
    let Stats {
        accepted,
        delivered,
        queued,
        overflow,
        late,
        trimmed,
        refused: _,
    } = stats;
    let bytes = delivered.bytes + queued.bytes + overflow.bytes + late.bytes + trimmed.bytes;
    let packets = delivered.packets + queued.packets + overflow.packets + late.packets;
    accepted.bytes == bytes && accepted.packets == packets
}

#[test]
fn packets_come_out_as_they_went_in_and_in_order() {
    let mut queue = queue(2 << 20);
    let lens = [32, 1023, 1024, 1025, 2048, 9000, 32, MAX_PACKET];
    for (number, len) in (0..).zip(lens) {
        assert!(queue.push(&packet(5, number, len), Meta::default(), 0));
    }
    for (number, len) in (0..).zip(lens) {
        let (next, bytes) = pop(&mut queue, 0).unwrap();
        assert_eq!((next.len, next.cut, next.meta), (len, 0, Meta::default()));
        assert!(bytes == packet(5, number, len), "packet {number}");
    }
    assert_eq!(pop(&mut queue, 0), None);
    assert!(queue.is_empty());
    assert_eq!(queue.held(), 0);
    assert_eq!(queue.stats().delivered, queue.stats().accepted);
}

#[test]
fn the_chosen_packet_stays_chosen_until_it_is_taken() {
    let mut queue = queue(2 << 20);
    queue.push(&packet(1, 0, 100), Meta::default(), 0);
    let chosen = queue.next(0).unwrap();
    queue.push(&packet(2, 0, 50), Meta::default(), 0);
    assert_eq!(queue.next(900 * MS), Some(chosen));
    assert_eq!(queue.take(&mut [0; 99]), None, "too short a buffer");
    assert_eq!(queue.bytes(), 150);
    let mut out = [0; 200];
    assert_eq!(queue.take(&mut out), Some(chosen));
    assert!(out[..100] == packet(1, 0, 100));
    assert_eq!(queue.take(&mut out), None, "nothing is chosen");
    assert_eq!(pop(&mut queue, 0).unwrap().0.len, 50);
}

#[test]
fn what_is_no_packet_is_refused_and_counted() {
    let mut queue = queue(2 << 20);
    assert!(!queue.push(&[], Meta::default(), 0));
    assert!(!queue.push(&vec![0x45; MAX_PACKET + 1], Meta::default(), 0));
    assert_eq!(queue.stats().refused.packets, 2);
    assert!(queue.is_empty());
}

#[test]
fn two_flows_get_the_same_bytes_whatever_their_packets() {
    for (long, short) in [(65_000, 1400), (1400, 64), (65_000, 64)] {
        let mut queue = queue(2 << 20);
        let mut sent = [0_usize; 2];
        let mut waiting = [0_usize; 2];
        let mut total = 0;
        while total < 40_000_000 {
            for (flow, len) in [(0, long), (1, short)] {
                while waiting[flow] < 70_000 {
                    let packet = packet(flow as u16, 0, len);
                    assert!(queue.push(&packet, Meta::default(), 0));
                    waiting[flow] += len;
                }
            }
            let (next, bytes) = pop(&mut queue, 0).unwrap();
            let flow = usize::from(flow_of(&bytes));
            waiting[flow] -= next.len;
            sent[flow] += next.len;
            total += next.len;
        }
        let share = sent[0] as f64 / total as f64;
        assert!((0.475..=0.525).contains(&share), "{long} {short}: {share}");
        assert_eq!(queue.stats().overflow.packets, 0);
    }
}

#[test]
fn a_sparse_flow_goes_before_bulk() {
    let mut queue = queue(2 << 20);
    for flow in 0..10 {
        for number in 0..3 {
            queue.push(&packet(flow, number, 60_000), Meta::default(), 0);
        }
    }
    // All bulk flows have had their first turn.
    for _ in 0..10 {
        pop(&mut queue, 0).unwrap();
    }
    for number in 0..20 {
        queue.push(&packet(99, number, 84), Meta::default(), 0);
        queue.push(&packet(1, 9, 60_000), Meta::default(), 0);
        let (_, first) = pop(&mut queue, 0).unwrap();
        assert_eq!((flow_of(&first), number_of(&first)), (99, number));
        // One bulk packet in between is enough to be fresh again next time,
        // or to be the next in turn.
        for _ in 0..10 {
            pop(&mut queue, 0);
        }
    }
}

/// A flow of one packet at a time must not stay ahead of all others by that.
#[test]
fn a_flow_of_single_packets_is_not_sparse() {
    // Renewed at once, or when the queue has seen the flow empty.
    for (len, at_once) in [
        (60_000, true),
        (60_000, false),
        (15_000, true),
        (15_000, false),
    ] {
        let mut queue = queue(2 << 20);
        let (mut sly, mut honest) = (0_usize, 0_usize);
        let (mut sly_waits, mut sly_was_last) = (false, false);
        let mut bulk = 0;
        while sly + honest < 20_000_000 {
            if !sly_waits && (at_once || !sly_was_last) {
                queue.push(&packet(1, 0, len), Meta::default(), 0);
                sly_waits = true;
            }
            while bulk < 20 {
                queue.push(&packet(2, 0, 1400), Meta::default(), 0);
                bulk += 1;
            }
            let (next, bytes) = pop(&mut queue, 0).unwrap();
            sly_was_last = flow_of(&bytes) == 1;
            if sly_was_last {
                sly_waits = false;
                sly += next.len;
            } else {
                bulk -= 1;
                honest += next.len;
            }
        }
        let share = sly as f64 / (sly + honest) as f64;
        assert!(share < 0.55, "{len} {at_once}: {share}");
    }
}

#[test]
fn the_limit_holds_exactly_and_the_head_of_the_longest_flow_goes() {
    for limit in [MIN_LIMIT, 2 << 20] {
        let mut queue = queue(limit);
        let blocks = limit / BLOCK;
        for number in 0..4 {
            queue.push(&packet(1, number, BLOCK), Meta::default(), 0);
        }
        for number in 0..blocks as u32 - 4 {
            queue.push(&packet(2, number, BLOCK), Meta::default(), 0);
        }
        assert_eq!(queue.held(), limit);
        assert_eq!(queue.stats().overflow.packets, 0);

        queue.push(&packet(1, 4, 33), Meta::default(), 0);
        assert_eq!(queue.held(), limit);
        assert_eq!(queue.stats().overflow.packets, 1);
        assert_eq!(queue.stats().overflow.bytes, BLOCK as u64);
        queue.push(&packet(3, 0, MAX_PACKET), Meta::default(), 0);
        assert_eq!(queue.held(), limit);
        assert_eq!(queue.stats().overflow.packets, 1 + 66);

        let mut numbers = [const { Vec::new() }; 4];
        while let Some((_, bytes)) = pop(&mut queue, 0) {
            numbers[usize::from(flow_of(&bytes))].push(number_of(&bytes));
        }
        assert_eq!(numbers[1], [0, 1, 2, 3, 4]);
        let kept: Vec<u32> = (67..blocks as u32 - 4).collect();
        assert!(numbers[2] == kept, "the oldest of the longest flow went");
        assert_eq!(numbers[3], [0]);
        assert!(balanced(queue.stats()));
    }
}

/// A flow that offers `offered` bytes a millisecond to a link of `link`, for so long.
#[test]
fn a_lower_limit_holds_at_once_and_a_higher_one_later() {
    let mut queue = queue(8 * MIN_LIMIT);
    for n in 0..1000 {
        queue.push(&packet(1, n, 1000), Meta::default(), 0);
    }
    assert_eq!(queue.stats().queued.packets, 1000);
    let chosen = queue.next(0).unwrap();
    queue.set_limit(MIN_LIMIT);
    assert_eq!(queue.held(), MIN_LIMIT);
    assert_eq!(queue.stats().overflow.packets, 1000 - 132);
    // What was chosen is on its way already; of the others the oldest went.
    let (taken, first) = pop(&mut queue, 0).unwrap();
    assert_eq!((taken, number_of(&first)), (chosen, 0));
    assert_eq!(number_of(&pop(&mut queue, 0).unwrap().1), 1000 - 131);
    // Never less than packets need to pass at all.
    queue.set_limit(0);
    assert!(queue.push(&packet(2, 0, 60_000), Meta::default(), 0));
    queue.set_limit(8 * MIN_LIMIT);
    for n in 0..1000 {
        queue.push(&packet(3, n, 1000), Meta::default(), 0);
    }
    assert!(queue.held() > 7 * MIN_LIMIT);
    assert!(balanced(queue.stats()));
}

fn overload(queue: &mut Queue, meta: Meta, len: usize, offered: usize, link: usize, ms: u64) {
    let (mut arrived, mut sent) = (0, 0);
    for now in 0..ms {
        while arrived < offered * now as usize {
            queue.push(&packet(1, 0, len), meta, now * MS);
            arrived += len;
        }
        while sent < link * now as usize {
            let Some((next, _)) = pop(queue, now * MS) else {
                break;
            };
            sent += next.remaining();
        }
    }
}

#[test]
fn a_standing_queue_loses_packets_and_a_short_burst_does_not() {
    // 100 Mbit/s, 10 % too much, for two seconds.
    let mut standing = queue(8 << 20);
    overload(&mut standing, Meta::default(), 1400, 13_750, 12_500, 2000);
    assert!(standing.stats().late.packets > 10, "{:?}", standing.stats());
    assert_eq!(standing.stats().overflow.packets, 0);
    assert!(balanced(standing.stats()));

    // A burst of 1 MiB into the same link: gone after 84 ms, less than the interval.
    let mut burst = queue(8 << 20);
    for number in 0..750 {
        burst.push(&packet(1, number, 1400), Meta::default(), 0);
    }
    let mut sent = 0;
    for now in 0..200 {
        while sent < 12_500 * now as usize {
            let Some((next, _)) = pop(&mut burst, now * MS) else {
                break;
            };
            sent += next.len;
        }
    }
    assert!(burst.is_empty());
    assert_eq!(burst.stats().late.packets, 0);
    assert_eq!(burst.stats().delivered.packets, 750);
}

#[test]
fn a_tcp_super_packet_loses_a_segment_and_another_kind_is_dropped_whole() {
    let len = 40 + 45 * 1400 + 700;
    let mut tcp = queue(8 << 20);
    overload(&mut tcp, tcp_super(1400), len, 13_750, 12_500, 2000);
    assert!(tcp.stats().trimmed.packets > 5, "{:?}", tcp.stats());
    assert_eq!(
        tcp.stats().trimmed.bytes,
        tcp.stats().trimmed.packets * 1400
    );
    assert_eq!(tcp.stats().late.packets, 0);
    assert!(balanced(tcp.stats()));
    // What was cut is forgotten: a packet that is late but alone is let be.
    while pop(&mut tcp, 2000 * MS).is_some() {}
    let trimmed = tcp.stats().trimmed;
    for round in 1..50 {
        tcp.push(
            &packet(1, 0, len),
            tcp_super(1400),
            (2000 + round * 300) * MS,
        );
        pop(&mut tcp, (2200 + round * 300) * MS).unwrap();
    }
    assert_eq!(tcp.stats().trimmed, trimmed);

    let mut udp = queue(8 << 20);
    let meta = Meta {
        offload: Offload {
            gso_type: gso_type::UDP_L4,
            ..tcp_super(1400).offload
        },
        header_len: 28,
    };
    overload(&mut udp, meta, len, 13_750, 12_500, 2000);
    assert_eq!(udp.stats().trimmed.packets, 0);
    assert!(udp.stats().late.packets > 5, "{:?}", udp.stats());
    assert!(balanced(udp.stats()));
}

#[test]
fn a_super_packet_goes_in_parts_between_which_others_pass() {
    let len = 40 + 44 * 1400 + 700;
    let mut queue = queue(2 << 20);
    let mut out = vec![0; len];
    assert_eq!(queue.take_part(&mut out, 12_000), None, "nothing waits");
    queue.push(&packet(1, 0, len), tcp_super(1400), 0);
    queue.push(&packet(1, 1, 500), Meta::default(), 0);
    let (mut first, mut parts, mut pings) = (0, 0, 0);
    while queue.next(0).is_some_and(|next| next.len == len) {
        assert_eq!(queue.take_part(&mut out[1..], 12_000), None, "no room");
        let next = queue.take_part(&mut out, 12_000).unwrap();
        assert!(
            out == packet(1, 0, len),
            "whole, for whoever takes it to cut"
        );
        assert_eq!(next.cut, first);
        assert!(next.remaining() <= 12_000);
        first += u16::try_from((next.remaining() - 40).div_ceil(1400)).unwrap();
        assert_eq!(
            usize::from(next.rest),
            (len - 40).saturating_sub(usize::from(first) * 1400)
        );
        assert!(balanced(queue.stats()));
        assert_eq!(
            queue.stats().delivered.segments,
            u64::from(first) + u64::from(pings)
        );
        parts += 1;
        // Behind the first part, whose turn may not be over, nothing waits for
        // more than another one.
        queue.push(&packet(9, parts, 84), Meta::default(), 0);
        for _ in 0..2 {
            if queue.next(0).unwrap().len == 84 {
                queue.take(&mut out).unwrap();
                pings += 1;
            }
        }
    }
    assert_eq!((first, parts), (45, 6));
    assert!(pings >= parts - 1, "{pings}");
    while let Some((_, bytes)) = pop(&mut queue, 0) {
        assert!(flow_of(&bytes) == 9 || number_of(&bytes) == 1);
    }
    let stats = queue.stats();
    assert_eq!(stats.delivered, stats.accepted);
    assert_eq!(queue.held(), 0);
}

#[test]
fn what_cannot_be_cut_goes_whole_and_a_long_segment_alone() {
    let mut queue = queue(2 << 20);
    let mut out = vec![0; MAX_PACKET];
    let udp = Meta {
        offload: Offload {
            gso_type: gso_type::UDP_L4,
            ..tcp_super(1400).offload
        },
        header_len: 28,
    };
    for (meta, len) in [
        (Meta::default(), 9000),
        (udp, 28 + 5 * 1400),
        (tcp_super(1400), 1440),
    ] {
        queue.push(&packet(1, 0, len), meta, 0);
        queue.next(0).unwrap();
        let next = queue.take_part(&mut out, 1000).unwrap();
        assert_eq!((next.remaining(), next.rest), (len, 0));
        assert!(queue.is_empty());
    }
    queue.push(&packet(1, 0, 40 + 2 * 1400), tcp_super(1400), 0);
    for rest in [1400, 0] {
        queue.next(0).unwrap();
        let next = queue.take_part(&mut out, 1).unwrap();
        assert_eq!((next.remaining(), next.rest), (1440, rest));
    }
    assert!(queue.is_empty());
}

/// Ten bulk flows, and one that sends a small packet five times while each of
/// those has its turn: it is not new, since it never left, but waits little.
#[test]
fn a_thin_flow_does_not_wait_for_all_others() {
    let mut queue = queue(8 << 20);
    let mut out = vec![0; MAX_PACKET];
    let (mut sent, mut since, mut waits) = (0, 0, Vec::new());
    let mut waiting = false;
    for step in 0..2000 {
        for flow in 0..10 {
            if queue.bytes() < 4 << 20 {
                queue.push(&packet(flow, 0, 40 + 45 * 1400), tcp_super(1400), 0);
            }
        }
        // All bulk flows have had their first turns by then.
        if step > 200 && step % 5 == 0 && !waiting {
            queue.push(&packet(99, 0, 84), Meta::default(), 0);
            (waiting, since) = (true, sent);
        }
        queue.next(0).unwrap();
        let next = queue.take_part(&mut out, 12_000).unwrap();
        if next.len == 84 {
            waiting = false;
            waits.push(sent - since);
        }
        sent += next.remaining();
    }
    waits.sort_unstable();
    assert!(waits.len() > 300);
    assert!(waits[waits.len() / 2] <= 12_000, "{waits:?}");
    assert!(waits[waits.len() - 1] <= 60_000, "{waits:?}");
}

/// Packets of a flow that follow each other can be joined at the other end.
#[test]
fn turns_are_long_where_the_socket_is_fast_and_short_where_it_is_slow() {
    for (most, least, longest) in [(MESSAGE_LIMIT, 38, 42), (MESSAGE_LIMIT - 1, 1, 2)] {
        let mut queue = queue(2 << 20);
        let mut out = vec![0; MAX_PACKET];
        for number in 0..250 {
            for flow in 0..4 {
                queue.push(&packet(flow, number, 1500), Meta::default(), 0);
            }
        }
        let (mut runs, mut last) = (Vec::new(), None);
        for _ in 0..800 {
            queue.next(0).unwrap();
            let len = queue.take_part(&mut out, most).unwrap().len;
            let flow = flow_of(&out[..len]);
            match runs.last_mut() {
                Some(run) if last == Some(flow) => *run += 1,
                _ => runs.push(1),
            }
            last = Some(flow);
        }
        // The first four were given their turns before anybody knew how fast it is.
        let runs = &runs[4..runs.len() - 1];
        let (shortest, of) = (runs.iter().min().unwrap(), runs.iter().max().unwrap());
        assert!(*shortest >= least && *of <= longest, "{most}: {runs:?}");
    }
}

#[test]
fn the_last_segment_is_never_cut_off() {
    // The clock jumps by hours, so that everything is overdue by far.
    let mut queue = queue(2 << 20);
    let mut cuts = 0;
    let mut now = 0;
    for round in 0..2000_u32 {
        for number in 0..4 {
            let len = 41 + 3 * 1400;
            queue.push(&packet(1, round * 4 + number, len), tcp_super(1400), now);
        }
        now += [10, 200, 3_600_000][round as usize % 3] * MS;
        for _ in 0..3 {
            let Some((next, _)) = pop(&mut queue, now) else {
                break;
            };
            assert!(next.cut <= 3, "{next:?}");
            assert!(next.remaining() > 40, "{next:?}");
            assert_eq!(next.remaining(), next.len - usize::from(next.cut) * 1400);
            cuts += u64::from(next.cut);
        }
        assert!(balanced(queue.stats()));
    }
    assert!(cuts > 100);
    assert!(queue.stats().late.packets > 0, "{:?}", queue.stats());
}

#[test]
fn memory_is_that_of_the_greatest_depth_and_is_given_back() {
    let mut queue = queue(2 << 20);
    assert_eq!(queue.memory(), 0);
    for number in 0..20 {
        queue.push(&packet(1, number, 60_000), Meta::default(), 0);
    }
    let long = queue.memory();
    // Twenty buffers, and the blocks that name them.
    assert_eq!(long, 20 * (LONG - BLOCK) + 64 * BLOCK);
    while pop(&mut queue, 0).is_some() {}
    for number in 0..20 * 60 {
        queue.push(&packet(1, number, 1000), Meta::default(), 0);
    }
    let depth = queue.memory();
    assert_eq!(depth, long + 18 * 64 * BLOCK);
    for number in 0..100_000 {
        let len = 32 + (number as usize * 7919) % 60_000;
        queue.push(&packet(number as u16 % 40, number, len), Meta::default(), 0);
        while queue.held() > 17 * 60_000 {
            pop(&mut queue, 0).unwrap();
        }
    }
    assert_eq!(queue.memory(), depth, "nothing more was allocated");
    queue.relax();
    assert_eq!(queue.memory(), depth, "packets are waiting");
    while pop(&mut queue, 0).is_some() {}
    queue.relax();
    assert_eq!(queue.memory(), 0);
    queue.push(&packet(1, 7, 100), Meta::default(), 0);
    assert!(pop(&mut queue, 0).unwrap().1 == packet(1, 7, 100));
}

#[test]
fn long_packets_change_hands_and_others_are_copied() {
    let mut queue = queue(2 << 20);
    let (mut device, mut message) = (Buffer::new(), Buffer::new());
    let mut places = [device.bytes().as_ptr(), message.bytes().as_ptr()];
    for (number, len) in [60_000, 32 * BLOCK, 32 * BLOCK - 1, 100]
        .into_iter()
        .enumerate()
    {
        let bytes = packet(1, number as u32, len);
        for most in [MESSAGE_LIMIT, 12_000] {
            device.packet()[..len].copy_from_slice(&bytes);
            let before = device.bytes().as_ptr();
            assert!(queue.push_buffer(&mut device, len, tcp_super(1400), 0));
            let long = len >= 32 * BLOCK;
            assert_eq!(device.bytes().as_ptr() != before, long);
            assert_eq!(queue.held() == LONG, long);
            let mut segments = 0;
            while let Some(next) = queue.next(0) {
                let part = queue.take_buffer(&mut message, most).unwrap();
                assert_eq!(part.len, next.len);
                assert!(part.remaining() <= most);
                assert!(message.packet()[..len] == bytes, "whole, for whoever cuts");
                let last = long && part.rest == 0;
                assert_eq!(message.bytes().as_ptr() == before, last);
                segments += (part.remaining() - 40).div_ceil(1400);
            }
            assert_eq!(segments, (len - 40).div_ceil(1400));
        }
    }
    // Three have gone round: the two from outside, and the queue's spare one.
    for place in [&device, &message] {
        places = places.map(|p| {
            if p == place.bytes().as_ptr() {
                std::ptr::null()
            } else {
                p
            }
        });
    }
    assert_eq!(places.iter().filter(|p| !p.is_null()).count(), 1);
    assert_eq!(queue.memory(), LONG - BLOCK + 64 * BLOCK);
    // A lower limit lets spare buffers go, although something waits.
    for number in 0..20 {
        queue.push(&packet(2, number, 60_000), Meta::default(), 0);
    }
    queue.set_limit(MIN_LIMIT);
    assert_eq!(queue.stats().queued.packets, 2);
    assert_eq!(queue.memory(), 2 * (LONG - BLOCK) + 64 * BLOCK);
    assert!(!queue.push_buffer(&mut device, 0, Meta::default(), 0));
    assert!(!queue.push_buffer(&mut device, MAX_PACKET + 1, Meta::default(), 0));
    assert_eq!(queue.stats().refused.packets, 2);
}

#[test]
fn nothing_is_lost_in_a_million_random_operations() {
    let mut state = 3_u64;
    let mut random = move |limit: u64| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 33) % limit
    };
    let mut queue = queue(MIN_LIMIT * 2);
    let (mut now, mut put, mut got, mut parts) = (0, 0_u64, 0_u64, 0);
    let sample = packet(0, 0, MAX_PACKET);
    let mut bytes = sample.clone();
    let mut out = vec![0; MAX_PACKET];
    let mut buffer = Buffer::new();
    // Phases of filling and of draining, so that both ends are reached.
    let mut bias = 5;
    for step in 0..1_000_000_u32 {
        if step % 1000 == 0 {
            bias = 2 + random(7);
        }
        now += random(2000);
        if random(10) < bias {
            let len = match random(8) {
                0 => 32 + random(65_503),
                1 => 32 + random(9000),
                _ => 32 + random(1468),
            } as usize;
            let flow = random(30) as u16;
            bytes[20..22].copy_from_slice(&flow.to_be_bytes());
            bytes[28..32].copy_from_slice(&step.to_be_bytes());
            let meta = match random(2) {
                0 => Meta::default(),
                _ => tcp_super(1 + random(1400) as u16),
            };
            let taken = match random(2) {
                0 => queue.push(&bytes[..len], meta, now),
                _ => {
                    buffer.packet()[..len].copy_from_slice(&bytes[..len]);
                    queue.push_buffer(&mut buffer, len, meta, now)
                }
            };
            assert!(taken);
            put += len as u64;
        } else if let Some(next) = queue.next(now) {
            let next = match random(5) {
                0 => continue,
                2 => {
                    let most = random(100_000) as usize;
                    let part = queue.take_buffer(&mut buffer, most).unwrap();
                    assert!(buffer.packet()[32..next.len] == sample[32..next.len]);
                    got += part.remaining() as u64 - u64::from(part.rest > 0) * 40;
                    continue;
                }
                1 => {
                    let most = random(20_000) as usize;
                    let part = queue.take_part(&mut out, most).unwrap();
                    assert_eq!((part.len, part.cut), (next.len, next.cut));
                    let one = usize::from(part.meta.header_len + part.meta.offload.gso_size);
                    assert!(part.rest == 0 || part.remaining() <= most.max(one));
                    parts += u32::from(part.rest > 0);
                    got += part.remaining() as u64;
                    // The headers go with each part, but count once.
                    got -= u64::from(part.rest > 0) * 40;
                    continue;
                }
                _ => next,
            };
            assert_eq!(queue.take(&mut out), Some(next));
            assert!(out[32..next.len] == sample[32..next.len], "step {step}");
            got += next.remaining() as u64;
        }
        assert!(queue.held() <= MIN_LIMIT * 2);
        assert!(balanced(queue.stats()), "step {step}");
    }
    let stats = queue.stats();
    assert_eq!((stats.accepted.bytes, stats.delivered.bytes), (put, got));
    assert!(parts > 1000, "{parts}");
    for (cause, tally) in [
        ("overflow", stats.overflow),
        ("late", stats.late),
        ("trimmed", stats.trimmed),
    ] {
        assert!(tally.packets > 100, "{cause} was not reached: {stats:?}");
    }
    while let Some((next, _)) = pop(&mut queue, now) {
        assert!(next.remaining() > 0);
    }
    assert!(balanced(queue.stats()));
    assert_eq!((queue.bytes(), queue.held()), (0, 0));
}
