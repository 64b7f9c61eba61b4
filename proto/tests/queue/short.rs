//! What is dropped when, and how much memory waits.

use super::*;

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

/// A flow that offers `offered` bytes a millisecond to a link of `link`, for so long.
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
