//! Records: what is written is read back, and nothing a stranger sends is
//! taken for more than it is.

use proptest::prelude::*;
use rvpn_proto::record::{
    Fault, HEADER_LEN, MAX_PACKET, MAX_RECEIVED, MAX_SENT, MESSAGE_LIMIT, Offload, ReadError,
    Reader, WriteError, Writer, append, gso_type,
};

const SUPER: Offload = Offload {
    partial: true,
    gso_type: gso_type::TCP_V4,
    gso_size: 1400,
};

fn first_error(message: &[u8]) -> ReadError {
    Reader::new(message)
        .find_map(Result::err)
        .expect("the message is refused")
}

#[test]
fn a_header_has_these_very_bytes() {
    let mut buffer = [0xee; 32];
    let mut writer = Writer::new(&mut buffer);
    writer.push(&[0x45, 0xaa, 0xbb], Offload::NONE).unwrap();
    let udp = Offload {
        partial: true,
        gso_type: gso_type::UDP_L4,
        gso_size: 0x1234,
    };
    writer.push(&[0x60], udp).unwrap();
    assert_eq!(
        writer.finish(),
        [
            3, 0, 1, 0, 0, 0, 0, 0, 0x45, 0xaa, 0xbb, //
            1, 0, 1, 0x0b, 0x34, 0x12, 0, 0, 0x60
        ]
    );
}

#[test]
fn the_largest_super_packet_has_a_message_to_itself() {
    let packet = vec![0x45; MAX_PACKET];
    let mut buffer = vec![0; MAX_SENT];
    let mut writer = Writer::new(&mut buffer);
    writer.push(&packet, SUPER).unwrap();
    assert_eq!(writer.push(&[1], Offload::NONE), Err(WriteError::Full));
    let message = writer.finish();
    assert_eq!(message.len(), MAX_SENT);
    let records: Vec<_> = Reader::new(message).map(Result::unwrap).collect();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].packet, packet);
    assert_eq!(records[0].offload, SUPER);
    assert_eq!(records[0].at, HEADER_LEN);
}

#[test]
fn small_packets_share_a_message_up_to_the_limit_exactly() {
    let packet = [0x45; 56];
    let per_record = HEADER_LEN + packet.len();
    // Longer than any message, so that it is not the buffer that ends it.
    let mut buffer = vec![0; 2 * MAX_SENT];
    let mut writer = Writer::new(&mut buffer);
    let mut count = 0;
    while writer.fits(packet.len()) {
        writer.push(&packet, Offload::NONE).unwrap();
        count += 1;
    }
    assert_eq!(count, MESSAGE_LIMIT / per_record);
    assert_eq!(writer.len(), MESSAGE_LIMIT);
    assert_eq!(writer.push(&packet, Offload::NONE), Err(WriteError::Full));
    assert_eq!(Reader::new(writer.finish()).count(), count);
}

#[test]
fn a_slot_may_be_committed_shorter_than_it_was_asked_for() {
    let mut buffer = [0; 64];
    let mut writer = Writer::new(&mut buffer);
    writer.slot(40).unwrap().fill(7);
    writer.commit(20, Offload::NONE).unwrap();
    assert_eq!(writer.len(), HEADER_LEN + 20);
    let record = Reader::new(writer.finish()).next().unwrap().unwrap();
    assert_eq!(record.packet, [7; 20]);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut buffer = [0; 64];
    let mut writer = Writer::new(&mut buffer);
    assert_eq!(
        writer.push(&[], Offload::NONE),
        Err(WriteError::Unfit { length: 0 })
    );
    assert_eq!(
        writer.push(&[0; 60], Offload::NONE),
        Err(WriteError::Unfit { length: 60 })
    );
    for (offload, fault) in [
        (
            Offload {
                gso_type: 3,
                ..SUPER
            },
            Fault::UnknownGso { gso_type: 3 },
        ),
        (
            Offload {
                gso_size: 0,
                ..SUPER
            },
            Fault::NoSegmentSize,
        ),
        (
            Offload {
                partial: false,
                ..SUPER
            },
            Fault::FinishedSuperPacket,
        ),
        (
            Offload {
                gso_type: 0,
                ..SUPER
            },
            Fault::StraySegmentSize { size: 1400 },
        ),
    ] {
        assert_eq!(
            writer.push(&[1], offload),
            Err(WriteError::Offload(fault)),
            "{offload:?}"
        );
    }
    assert!(writer.is_empty());
    let mut message = Vec::new();
    assert_eq!(
        append(&mut message, &[0; MAX_PACKET + 1], Offload::NONE),
        Err(WriteError::Unfit {
            length: MAX_PACKET + 1
        })
    );
    append(&mut message, &[0; MAX_PACKET], Offload::NONE).unwrap();
    assert_eq!(
        append(&mut message, &[0], Offload::NONE),
        Err(WriteError::Full)
    );
}

#[test]
fn every_fault_is_named_with_its_offset() {
    let good = [2, 0, 1, 0, 0, 0, 0, 0, 0x45, 0];
    let long = vec![0; MAX_RECEIVED + 1];
    let cases: [(&[u8], Fault); 12] = [
        (&[], Fault::NoRecord),
        (&[0x45], Fault::ShortHeader { left: 1 }),
        (&[2, 0, 1, 0, 0, 0, 0], Fault::ShortHeader { left: 7 }),
        (&[0, 0, 1, 0, 0, 0, 0, 0], Fault::Empty),
        (
            &[2, 0, 1, 0, 0, 0, 0, 0, 1],
            Fault::PastEnd { length: 2, left: 1 },
        ),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 1], Fault::UnknownKind { kind: 0 }),
        (&[1, 0, 2, 0, 0, 0, 0, 0, 1], Fault::UnknownKind { kind: 2 }),
        (
            &[1, 0, 1, 0x10, 0, 0, 0, 0, 1],
            Fault::UnknownFlags { flags: 0x10 },
        ),
        (
            &[1, 0, 1, 0, 0, 0, 0, 1, 1],
            Fault::Reserved { value: 0x100 },
        ),
        (
            &[1, 0, 1, 0x05, 0, 1, 0, 0, 1],
            Fault::UnknownGso { gso_type: 2 },
        ),
        (&[1, 0, 1, 0x03, 0, 0, 0, 0, 1], Fault::NoSegmentSize),
        (&long, Fault::MessageTooLong { length: long.len() }),
    ];
    for (bytes, fault) in cases {
        assert_eq!(first_error(bytes), ReadError { offset: 0, fault });
        // Behind a good record the offset moves; an empty rest is then no fault.
        if bytes.is_empty() || bytes.len() > MAX_RECEIVED {
            continue;
        }
        let behind = [&good[..], bytes].concat();
        let error = first_error(&behind);
        assert_eq!(error, ReadError { offset: 10, fault });
        assert!(error.to_string().contains("offset 10"), "{error}");
        let all: Vec<_> = Reader::new(&behind).collect();
        assert_eq!(all.len(), 2, "the reader ends with the error");
    }
}

/// PRO-21: as many records as fit, none of them nested in another.
#[test]
fn thousands_of_tiny_records_are_walked_once() {
    let mut message = Vec::new();
    while message.len() + HEADER_LEN < MAX_RECEIVED {
        message.extend_from_slice(&[1, 0, 1, 0, 0, 0, 0, 0, 0x45]);
    }
    let count = Reader::new(&message)
        .inspect(|record| assert!(record.is_ok()))
        .count();
    assert_eq!(count, message.len() / 9);
}

#[test]
fn a_message_can_be_read_in_parts() {
    let mut message = Vec::new();
    for n in 1..=9 {
        append(&mut message, &vec![0x45; n], Offload::NONE).unwrap();
    }
    let (mut from, mut lengths) = (0, Vec::new());
    while from < message.len() {
        let mut reader = Reader::new(&message[from..]);
        let part = reader.by_ref().take(2).map(|record| record.unwrap());
        lengths.extend(part.map(|record| record.packet.len()));
        from += reader.position();
    }
    assert_eq!(from, message.len());
    assert_eq!(lengths, (1..=9).collect::<Vec<_>>());
}

fn any_offload() -> impl Strategy<Value = Offload> {
    prop_oneof![
        any::<bool>().prop_map(|partial| Offload {
            partial,
            ..Offload::NONE
        }),
        (prop::sample::select(vec![1, 4, 5]), 1..=u16::MAX).prop_map(|(gso_type, gso_size)| {
            Offload {
                partial: true,
                gso_type,
                gso_size,
            }
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        packets in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 1..3000), any_offload()),
            1..20,
        )
    ) {
        let mut buffer = vec![0; MAX_SENT];
        let mut writer = Writer::new(&mut buffer);
        let mut grown = Vec::new();
        for (packet, offload) in &packets {
            writer.push(packet, *offload).unwrap();
            append(&mut grown, packet, *offload).unwrap();
        }
        let message = writer.finish();
        prop_assert_eq!(message, &grown[..]);
        let read: Vec<_> = Reader::new(message).map(Result::unwrap).collect();
        prop_assert_eq!(read.len(), packets.len());
        for (record, (packet, offload)) in read.iter().zip(&packets) {
            prop_assert_eq!(record.packet, &packet[..]);
            prop_assert_eq!(record.offload, *offload);
            prop_assert_eq!(&message[record.at..record.at + packet.len()], &packet[..]);
        }
    }

    #[test]
    fn arbitrary_bytes_are_read_or_refused(
        message in prop::collection::vec(any::<u8>(), 0..4000)
    ) {
        rewritten_equals(&message)?;
    }
}

/// Whatever was accepted is written again to the same bytes.
fn rewritten_equals(message: &[u8]) -> Result<(), TestCaseError> {
    let mut again = Vec::new();
    for record in Reader::new(message) {
        match record {
            Ok(record) => append(&mut again, record.packet, record.offload)
                .map_err(|error| TestCaseError::fail(error.to_string()))?,
            Err(error) => {
                prop_assert_eq!(error.offset, again.len());
                return Ok(());
            }
        }
    }
    prop_assert_eq!(&again[..], message);
    Ok(())
}
