use super::*;
use proptest::prelude::*;

fn acquire() -> Request {
    Request {
        key: Key([7; 16]),
        kind: Some(Kind::Both),
        class: 3,
        ..Request::new(Op::Acquire, 9)
    }
}

#[test]
fn the_layout_of_a_request_is_fixed() {
    let mut expected = [0; REQUEST_LEN];
    expected[..8].copy_from_slice(&[0x52, 0x56, 1, 3, 9, 0, 0, 0]);
    expected[16..32].copy_from_slice(&[7; 16]);
    expected[32..34].copy_from_slice(&[3, 3]);
    assert_eq!(acquire().encode(), expected);
}

#[test]
fn every_request_survives_the_wire() {
    let lease = |op| Request {
        slot: 5,
        generation: 2,
        ..Request::new(op, 1)
    };
    let all = [
        Request::new(Op::Hello, 1),
        Request {
            flags: FLAG_SUCCESSOR,
            ..Request::new(Op::Hello, u32::MAX)
        },
        Request::new(Op::Describe, 2),
        acquire(),
        Request {
            key: Key([1; 16]),
            ..lease(Op::Confirm)
        },
        lease(Op::Linger),
        lease(Op::Release),
    ];
    for request in all {
        assert_eq!(Request::decode(&request.encode()), Ok(request));
    }
}

#[test]
fn a_field_the_operation_does_not_use_is_refused() {
    let hello = Request::new(Op::Hello, 1);
    let cases = [
        (Request { seq: 0, ..hello }, "seq"),
        (
            Request {
                generation: 1,
                ..hello
            },
            "generation",
        ),
        (Request { slot: 1, ..hello }, "slot"),
        (
            Request {
                key: Key([1; 16]),
                ..hello
            },
            "key",
        ),
        (
            Request {
                kind: Some(Kind::Packets),
                ..hello
            },
            "kind",
        ),
        (Request { class: 1, ..hello }, "class"),
        (Request { flags: 2, ..hello }, "flags"),
        (
            Request {
                flags: FLAG_SUCCESSOR,
                ..acquire()
            },
            "flags",
        ),
        (
            Request {
                key: Key::NONE,
                ..acquire()
            },
            "key",
        ),
        (
            Request {
                kind: None,
                ..acquire()
            },
            "kind",
        ),
        (Request::new(Op::Release, 1), "generation"),
    ];
    for (request, field) in cases {
        assert_eq!(
            Request::decode(&request.encode()),
            Err(FrameError::Field(field))
        );
    }
}

#[test]
fn foreign_bytes_are_named() {
    let good = acquire().encode();
    let with = |at: usize, v: u8| {
        let mut b = good;
        b[at] = v;
        Request::decode(&b)
    };
    assert_eq!(with(0, 0), Err(FrameError::Magic(0x5600)));
    assert_eq!(with(2, 2), Err(FrameError::Version(2)));
    assert_eq!(with(3, 0), Err(FrameError::Op(0)));
    assert_eq!(with(3, 7), Err(FrameError::Op(7)));
    assert_eq!(with(32, 4), Err(FrameError::Field("kind")));
    for at in 36..REQUEST_LEN {
        assert_eq!(with(at, 1), Err(FrameError::Field("reserved")));
    }
    for n in [0, 1, REQUEST_LEN - 1, REQUEST_LEN + 1, 65536] {
        assert_eq!(Request::decode(&vec![0x52; n]), Err(FrameError::Length(n)));
    }
}

#[test]
fn a_notice_is_not_an_answer() {
    let notice = Reply::notice(Status::DeviceLost, 3, 4);
    assert_eq!(Reply::decode(&notice.encode()), Ok(notice));
    let mut forged = notice.encode();
    forged[4] = 1;
    assert_eq!(Reply::decode(&forged), Err(FrameError::Field("seq")));
}

proptest! {
    #[test]
    fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
        if let Ok(r) = Request::decode(&bytes) {
            prop_assert_eq!(&r.encode()[..], &bytes[..]);
        }
        if let Ok(r) = Reply::decode(&bytes) {
            prop_assert_eq!(&r.encode()[..], &bytes[..]);
        }
    }

    #[test]
    fn what_decodes_encodes_to_the_same_bytes(
        at in 3_usize..REQUEST_LEN, value: u8, seq: u32, op in 1_u8..7
    ) {
        let mut b = acquire().encode();
        b[3] = op;
        b[4..8].copy_from_slice(&seq.to_le_bytes());
        b[at] = value;
        if let Ok(r) = Request::decode(&b) {
            prop_assert_eq!(r.encode(), b);
        }
    }

    #[test]
    fn every_answer_survives_the_wire(
        seq in 1_u32.., status in 0_u16..13, words: [u32; 10], shorts: [u16; 5], v4: u32, v6: u128
    ) {
        let reply = Reply {
            op: Some(Op::Acquire),
            seq,
            status: Status::from_wire(status).unwrap(),
            flags: shorts[0],
            slot: words[0],
            generation: words[1],
            v4: v4.into(),
            v6: v6.into(),
            stream4: (!v4).into(),
            stream6: (!v6).into(),
            mtu: shorts[1],
            nat_low: shorts[2],
            nat_high: shorts[3],
            offload: shorts[4],
            slots: words[2],
            free: words[3],
            leased: words[4],
            lingering: words[5],
            cleaning: words[6],
            linger_ms: words[7],
            retry_after_ms: words[8],
        };
        prop_assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
    }
}
