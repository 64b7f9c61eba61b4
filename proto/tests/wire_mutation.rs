//! Bytes of no good will, by the million.
//!
//! Valid messages are damaged at random, so that decoders are reached where
//! random bytes alone would never get. Ten million rounds with optimisation,
//! one without.

use rvpn_proto::control::{Message, Stage};
use rvpn_proto::dialect::{Decoded, Dialect, Incoming, Padding};
use rvpn_proto::record::{MAX_PACKET, Offload, Reader, append};

const ROUNDS: u64 = if cfg!(debug_assertions) {
    1_000_000
} else {
    10_000_000
};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// One to four small damages: bits, bytes, pieces lost, doubled or cut off.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(6) {
            _ if bytes.is_empty() => bytes.push(random.next() as u8),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            3 => bytes.truncate(at),
            4 => {
                let end = at + random.below(bytes.len() - at).min(16);
                bytes.drain(at..end);
            }
            _ => {
                let end = at + random.below(bytes.len() - at).min(16);
                bytes.extend_from_within(at..end);
            }
        }
    }
}

#[test]
fn damaged_records_never_reach_outside_their_message() {
    let random = &mut Random(1);
    let mut bodies = Vec::new();
    for lengths in [&[1_usize][..], &[20, 40, 60], &[1, 300], &[52; 9]] {
        let mut message = Vec::new();
        for (i, length) in lengths.iter().enumerate() {
            let offload = Offload {
                partial: true,
                gso_type: [0, 1, 4, 5][i % 4],
                gso_size: if i % 4 == 0 { 0 } else { 1400 },
            };
            append(&mut message, &vec![0x45; *length], offload).expect("it fits");
        }
        bodies.push(message);
    }
    let (mut accepted, mut refused) = (0_u64, 0_u64);
    let mut message = Vec::new();
    for _ in 0..ROUNDS {
        message.clear();
        message.extend_from_slice(&bodies[random.below(bodies.len())]);
        damage(&mut message, random);
        let mut end = 0;
        for record in Reader::new(&message) {
            match record {
                Ok(record) => {
                    assert!((1..=MAX_PACKET).contains(&record.packet.len()));
                    assert_eq!(record.at, end + 8, "records lie side by side");
                    end = record.at + record.packet.len();
                    accepted += 1;
                }
                Err(error) => {
                    assert_eq!(error.offset, end);
                    assert!(error.offset <= message.len());
                    end = usize::MAX;
                    refused += 1;
                }
            }
        }
        assert!(end == usize::MAX || end == message.len(), "nothing trails");
    }
    assert!(accepted > ROUNDS / 10 && refused > ROUNDS / 10);
}

#[test]
fn damaged_dialect_messages_are_packets_noise_or_refused() {
    let random = &mut Random(2);
    let mut messages = Vec::new();
    for dialect in Dialect::ALL {
        for length in [1, 28, 84] {
            let mut message = Vec::new();
            dialect
                .encode(
                    &vec![0x45; length],
                    &Padding::BROAD,
                    &mut || 1 << 36,
                    &mut message,
                )
                .expect("it fits");
            messages.push((dialect, message));
        }
    }
    messages.push((Dialect::Padded, vec![0; 7]));
    let (mut packets, mut noise, mut refused) = (0_u64, 0_u64, 0_u64);
    let mut message = Vec::new();
    for _ in 0..ROUNDS {
        let (dialect, sound) = &messages[random.below(messages.len())];
        message.clear();
        message.extend_from_slice(sound);
        damage(&mut message, random);
        match dialect.decode(Incoming::Binary(&message)) {
            Ok(Decoded::Packet(packet)) => {
                assert!((1..=dialect.max_packet()).contains(&packet.len()));
                packets += 1;
            }
            Ok(Decoded::Noise) => {
                assert_eq!(*dialect, Dialect::Padded);
                assert!(message.first().is_none_or(|b| *b == 0));
                noise += 1;
            }
            Err(_) => refused += 1,
        }
        // A client reads the same bytes as a greeting.
        std::hint::black_box(dialect.read_hello(Incoming::Binary(&message)).ok());
    }
    assert!(packets > ROUNDS / 10 && noise > ROUNDS / 100 && refused > ROUNDS / 100);
}

#[test]
fn damaged_control_messages_are_read_or_refused() {
    let random = &mut Random(3);
    let sound: [&[u8]; 3] = [
        br#"{"kind":"hello","versions":[1],"name":"x","instance":"i","ticket":"t"}"#,
        br#"{"kind":"goodbye","code":1012,"text":"soon","retry_after_ms":1500,"x":[{}]}"#,
        br#"{"kind":"resolved","id":7,"addresses":["1.1.1.1","2606:4700::1"]}"#,
    ];
    let (mut read, mut refused) = (0_u64, 0_u64);
    let mut message = Vec::new();
    // Reading JSON and explaining why not costs more than reading a header.
    for _ in 0..ROUNDS / 10 {
        message.clear();
        message.extend_from_slice(sound[random.below(sound.len())]);
        damage(&mut message, random);
        let text = String::from_utf8_lossy(&message);
        match Message::parse(&text, Stage::Session) {
            Ok(_) => read += 1,
            Err(error) => {
                let words = error.to_string();
                assert!(words.len() < 600 && !words.contains(char::is_control));
                refused += 1;
            }
        }
    }
    assert!(read > ROUNDS / 1000 && refused > ROUNDS / 100);
}
