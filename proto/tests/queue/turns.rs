//! Which flow goes next, and how much of it.

use super::*;

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

/// Ten bulk flows, which know nothing of each other, and a thin one: whatever
/// the key, none has to share its bucket, so nothing waits behind bulk or is
/// dropped with it.
#[test]
fn a_thin_flow_never_shares_a_bucket_with_one_of_a_few() {
    let settings = Settings {
        limit: 8 << 20,
        ..Settings::default()
    };
    for key in 0..500 {
        let mut queue = Queue::new(settings, [key, 11]);
        for flow in 0..10 {
            for number in 0..2 {
                queue.push(&packet(flow, number, 60_000), Meta::default(), 0);
            }
        }
        // All of them have had their first turns.
        for _ in 0..10 {
            pop(&mut queue, 0).unwrap();
        }
        queue.push(&packet(99, 0, 84), Meta::default(), 0);
        let (_, first) = pop(&mut queue, 0).unwrap();
        assert_eq!(flow_of(&first), 99, "with key {key}");
    }
}

/// A bucket whose flow has ended is the next one's, which begins anew.
#[test]
fn more_flows_than_buckets_come_and_go() {
    let mut queue = queue(8 << 20);
    for round in 0..100_u16 {
        for flow in 0..40 {
            queue.push(&packet(round * 40 + flow, 0, 100), Meta::default(), 0);
        }
        let mut seen: Vec<u16> = (0..40)
            .map(|_| flow_of(&pop(&mut queue, 0).unwrap().1))
            .collect();
        seen.sort_unstable();
        assert_eq!(seen[0], round * 40);
        seen.dedup();
        assert_eq!(seen.len(), 40);
    }
    assert!(queue.is_empty());
    assert_eq!(queue.stats().delivered.packets, 4000);
}
