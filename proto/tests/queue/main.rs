//! The egress queue: fair, short, bounded, and honest about what it dropped.

mod short;
mod turns;

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
