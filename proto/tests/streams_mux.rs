//! Streams between two ends, and between one end and somebody hostile.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use rvpn_proto::streams::mux::{
    Broken, Fault, Handle, INITIAL_WINDOW, Limits, Mux, NotOpened, Side, WAITING,
};

const SYN: u16 = 1;
const ACK: u16 = 2;
const FIN: u16 = 4;
const RST: u16 = 8;

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn pair() -> (Mux, Mux) {
    pair_of(Limits::default())
}

fn pair_of(limits: Limits) -> (Mux, Mux) {
    let client = Limits {
        accepted: limits.opened,
        ..limits
    };
    (
        Mux::new(Side::Gateway, limits),
        Mux::new(Side::Client, client),
    )
}

/// Everything that one end has to say, in a message of at most so much.
fn said(from: &Mux, limit: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let polled = from.poll_send(&mut cx(), &mut out, limit);
    assert_eq!(polled.is_pending(), out.is_empty());
    assert!(out.len() <= limit);
    out
}

/// Moves messages until neither end has anything to say.
fn settle(a: &Mux, b: &Mux) {
    loop {
        let (there, back) = (said(a, 65_536), said(b, 65_536));
        if there.is_empty() && back.is_empty() {
            return;
        }
        b.receive(&there).unwrap();
        a.receive(&back).unwrap();
    }
}

fn write(stream: &mut Handle, bytes: &[u8]) -> usize {
    match stream.poll_write(&mut cx(), bytes) {
        Poll::Ready(n) => n.unwrap(),
        Poll::Pending => 0,
    }
}

fn read(stream: &mut Handle, most: usize) -> Poll<Result<Vec<u8>, Broken>> {
    let mut into = vec![0; most];
    stream.poll_read(&mut cx(), &mut into).map_ok(|n| {
        into.truncate(n);
        into
    })
}

fn accept(mux: &Mux) -> Handle {
    match mux.poll_accept(&mut cx()) {
        Poll::Ready(Some(stream)) => stream,
        other => panic!("{other:?} in place of a stream"),
    }
}

fn frame(kind: u8, flags: u16, id: u32, length: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, kind];
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn data(id: u32, flags: u16, body: &[u8]) -> Vec<u8> {
    frame(0, flags, id, body.len() as u32, body)
}

#[test]
fn bytes_go_both_ways_however_the_messages_are_cut() {
    let (gateway, client) = pair();
    let mut here = gateway.open().unwrap();
    assert_eq!(here.id(), 2);
    assert_eq!(write(&mut here, b"ping"), 4);
    for byte in said(&gateway, 65_536) {
        client.receive(&[byte]).unwrap();
    }
    let mut there = accept(&client);
    assert_eq!(read(&mut there, 10), Poll::Ready(Ok(b"ping".to_vec())));
    assert_eq!(read(&mut there, 10), Poll::Pending);
    assert_eq!(write(&mut there, b"pong"), 4);
    there.finish().unwrap();
    for piece in said(&client, 65_536).chunks(5) {
        gateway.receive(piece).unwrap();
    }
    assert_eq!(read(&mut here, 2), Poll::Ready(Ok(b"po".to_vec())));
    assert_eq!(read(&mut here, 9), Poll::Ready(Ok(b"ng".to_vec())));
    assert_eq!(read(&mut here, 9), Poll::Ready(Ok(Vec::new())));
    // The other half goes on.
    assert_eq!(write(&mut here, b"more"), 4);
    here.finish().unwrap();
    drop(here);
    settle(&gateway, &client);
    assert_eq!(read(&mut there, 9), Poll::Ready(Ok(b"more".to_vec())));
    assert_eq!(read(&mut there, 9), Poll::Ready(Ok(Vec::new())));
    drop(there);
    settle(&gateway, &client);
    assert_eq!((gateway.open_streams(), client.open_streams()), (0, 0));
}

#[test]
fn the_wire_is_that_of_yamux() {
    let (gateway, client) = pair();
    let silent = gateway.open().unwrap();
    assert_eq!(said(&gateway, 65_536), frame(1, SYN, 2, 0, b""));
    drop(silent);
    assert_eq!(said(&gateway, 65_536), data(2, RST, b""));
    let mut here = gateway.open().unwrap();
    write(&mut here, b"hi");
    here.finish().unwrap();
    assert_eq!(said(&gateway, 65_536), data(4, SYN | FIN, b"hi"));
    client.receive(&data(2, SYN, b"hi")).unwrap();
    let _there = accept(&client);
    assert_eq!(said(&client, 65_536), frame(1, ACK, 2, 0, b""));
    gateway.receive(&frame(2, SYN, 0, 77, b"")).unwrap();
    assert_eq!(said(&gateway, 65_536), frame(2, ACK, 0, 77, b""));
    gateway.go_away();
    gateway.go_away();
    assert_eq!(said(&gateway, 65_536), frame(3, 0, 0, 0, b""));
    client.receive(&frame(3, 0, 0, 0, b"")).unwrap();
    assert_eq!(client.open().unwrap_err(), NotOpened::Gone);
}

#[test]
fn what_was_cut_off_does_not_look_finished() {
    let (gateway, client) = pair();
    let mut here = gateway.open().unwrap();
    write(&mut here, b"request");
    settle(&gateway, &client);
    let mut there = accept(&client);
    write(&mut there, b"half an answ");
    settle(&gateway, &client);
    assert_eq!(read(&mut here, 4), Poll::Ready(Ok(b"half".to_vec())));
    drop(there);
    settle(&gateway, &client);
    assert_eq!(read(&mut here, 99), Poll::Ready(Err(Broken::Reset)));
    let polled = here.poll_write(&mut cx(), b"x");
    assert_eq!(polled, Poll::Ready(Err(Broken::Reset)));
    drop(here);

    // Also when the other direction was finished before.
    let mut here = gateway.open().unwrap();
    write(&mut here, b"request");
    here.finish().unwrap();
    settle(&gateway, &client);
    let mut there = accept(&client);
    write(&mut there, b"half");
    drop(there);
    settle(&gateway, &client);
    assert_eq!(read(&mut here, 99), Poll::Ready(Err(Broken::Reset)));
    drop(here);
    assert_eq!((gateway.open_streams(), client.open_streams()), (0, 0));
}

#[test]
fn whoever_finished_and_left_still_says_all_of_it_and_takes_no_answer() {
    let (gateway, client) = pair();
    let mut here = gateway.open().unwrap();
    let whole = vec![7; WAITING];
    assert_eq!(write(&mut here, &whole), WAITING);
    here.finish().unwrap();
    drop(here);
    settle(&gateway, &client);
    let mut there = accept(&client);
    assert_eq!(read(&mut there, WAITING), Poll::Ready(Ok(whole)));
    assert_eq!(read(&mut there, 1), Poll::Ready(Ok(Vec::new())));
    // Nobody would read it: the sender is told instead of left waiting.
    let polled = there.poll_write(&mut cx(), b"answer");
    assert_eq!(polled, Poll::Ready(Err(Broken::Reset)));
    assert_eq!(gateway.open_streams(), 0);
}

#[test]
fn a_stream_that_nobody_reads_holds_no_more_than_its_window() {
    let (gateway, client) = pair();
    let mut here = gateway.open().unwrap();
    let mut sent = 0;
    for _ in 0..100 {
        sent += write(&mut here, &[1; 16_384]);
        settle(&gateway, &client);
    }
    assert_eq!(sent, INITIAL_WINDOW as usize + WAITING);
    assert_eq!(client.unread(), INITIAL_WINDOW as usize);
    // Reading it grants as much again.
    let mut there = accept(&client);
    let mut got = 0;
    for _ in 0..1000 {
        write(&mut here, &[1; 16_384]);
        settle(&gateway, &client);
        if let Poll::Ready(read) = read(&mut there, 10_000) {
            got += read.unwrap().len();
        }
    }
    assert_eq!(got, 10_000_000);
    // Whoever reads quickly has a larger window, within the limit.
    let most = Limits::default().window as usize;
    for _ in 0..200 {
        write(&mut here, &[1; 65_536]);
        settle(&gateway, &client);
        while let Poll::Ready(Ok(_)) = read(&mut there, 1 << 20) {}
    }
    for _ in 0..200 {
        write(&mut here, &[1; 65_536]);
        settle(&gateway, &client);
    }
    assert!(
        client.unread() > INITIAL_WINDOW as usize,
        "{}",
        client.unread()
    );
    assert!(client.unread() <= most, "{}", client.unread());
    assert!(most + WAITING <= 1024 * 1024);
}

#[test]
fn streams_take_turns_and_a_stalled_one_stops_nobody() {
    let (gateway, client) = pair();
    let mut stalled = gateway.open().unwrap();
    let mut quick: Vec<Handle> = (0..9).map(|_| gateway.open().unwrap()).collect();
    for _ in 0..50 {
        write(&mut stalled, &[0; 65_536]);
        settle(&gateway, &client);
    }
    let _stalled = accept(&client);
    let mut there = Vec::new();
    for stream in &mut quick {
        assert_eq!(write(stream, &[1; 65_536]), 65_536);
    }
    // One message: each stream is in it before any has a second frame.
    let message = said(&gateway, 10 * 16_500);
    client.receive(&message).unwrap();
    for _ in 0..9 {
        let mut stream = accept(&client);
        let Poll::Ready(Ok(bytes)) = read(&mut stream, 65_536) else {
            panic!("nothing on stream {}", stream.id());
        };
        assert!(bytes.len() >= 16_384, "{}", bytes.len());
        there.push(stream);
    }
}

#[test]
fn rev_14_streams_without_end_are_capped() {
    let (gateway, client) = pair_of(Limits {
        opened: 3,
        ..Limits::default()
    });
    let open: Vec<Handle> = (0..3).map(|_| gateway.open().unwrap()).collect();
    assert_eq!(gateway.open().unwrap_err(), NotOpened::Full);
    drop(open);
    let again = gateway.open().unwrap();
    assert_eq!(again.id(), 8);
    drop(again);
    // Streams that came and went unsaid were never mentioned.
    assert!(said(&gateway, 65_536).is_empty());
    // The other end refuses what is too much by resetting it.
    for n in 4..14_u32 {
        client.receive(&data(2 + 2 * n, SYN, b"x")).unwrap();
    }
    assert_eq!(client.open_streams(), 3);
    let refused = said(&client, 65_536);
    let resets = refused.chunks(12).filter(|f| f[1] == 0 && f[3] == 8);
    assert_eq!(resets.count(), 7);
}

#[test]
fn unread_bytes_of_all_streams_are_bounded_together() {
    let limits = Limits {
        unread: 1 << 20,
        share: 4096,
        ..Limits::default()
    };
    let (gateway, client) = pair_of(limits);
    let mut streams: Vec<Handle> = (0..100).map(|_| gateway.open().unwrap()).collect();
    for _ in 0..40 {
        for stream in &mut streams {
            // One that was reset takes nothing more.
            let _n = stream.poll_write(&mut cx(), &[0; 8192]);
        }
        settle(&gateway, &client);
        assert!(client.unread() <= limits.unread + 100 * limits.share);
    }
}

#[test]
fn rev_08_frames_for_streams_that_are_none_of_the_senders_end_its_connection() {
    // It may not open streams here.
    for id in [1, 2, 0, 7, u32::MAX] {
        let gateway = Mux::new(Side::Gateway, Limits::default());
        let got = gateway.receive(&data(id, SYN, b"x"));
        assert_eq!(got, Err(Fault::Opening(id)));
    }
    // Never given.
    for bytes in [
        data(2, 0, b"x"),
        data(1, 0, b"x"),
        data(0, 0, b"x"),
        frame(1, 0, 4, 5, b""),
        data(4, FIN, b""),
        data(6, RST, b""),
        frame(2, SYN, 2, 0, b""),
    ] {
        let gateway = Mux::new(Side::Gateway, Limits::default());
        assert!(
            matches!(gateway.receive(&bytes), Err(Fault::Stream(_))),
            "{bytes:?}"
        );
    }
    let open = || {
        let gateway = Mux::new(Side::Gateway, Limits::default());
        let mut stream = gateway.open().unwrap();
        write(&mut stream, b"hello");
        assert!(!said(&gateway, 65_536).is_empty());
        (gateway, stream)
    };
    // Ended by the sender itself, while it is still known and after.
    let (gateway, mut stream) = open();
    gateway.receive(&data(2, FIN, b"bye")).unwrap();
    assert_eq!(gateway.receive(&data(2, 0, b"x")), Err(Fault::AfterEnd(2)));
    assert_eq!(read(&mut stream, 9), Poll::Ready(Ok(b"bye".to_vec())));
    let (gateway, stream) = open();
    gateway.receive(&data(2, RST, b"")).unwrap();
    assert_eq!(gateway.receive(&data(2, 0, b"x")), Err(Fault::AfterEnd(2)));
    drop(stream);
    let (gateway, mut stream) = open();
    gateway.receive(&data(2, FIN, b"")).unwrap();
    stream.finish().unwrap();
    drop(stream);
    assert_eq!(said(&gateway, 65_536), data(2, FIN, b""));
    assert_eq!(gateway.open_streams(), 0);
    assert_eq!(gateway.receive(&data(2, 0, b"x")), Err(Fault::Stream(2)));
    // Beyond the window, by one byte and by four billion.
    let (gateway, _stream) = open();
    let whole = vec![0; INITIAL_WINDOW as usize];
    gateway.receive(&data(2, 0, &whole)).unwrap();
    assert_eq!(gateway.receive(&data(2, 0, b"x")), Err(Fault::Window(2)));
    let (gateway, _stream) = open();
    let got = gateway.receive(&frame(0, 0, 2, u32::MAX, b""));
    assert_eq!(got, Err(Fault::Window(2)));
    // Grants beyond all sense.
    let (gateway, _stream) = open();
    let got = gateway.receive(&frame(1, 0, 2, u32::MAX, b""));
    assert_eq!(got, Err(Fault::Window(2)));
    // No frames at all.
    for bytes in [
        [1; 12],
        [0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 255, 0, 0, 0, 0, 2, 0, 0, 0, 0],
    ] {
        let (gateway, _stream) = open();
        assert_eq!(gateway.receive(&bytes), Err(Fault::Header));
    }
    let (gateway, _stream) = open();
    let mut pings = (0..100).map(|n| gateway.receive(&frame(2, SYN, 0, n, b"")));
    assert!(pings.any(|p| p == Err(Fault::Flood)));
}

#[test]
fn what_was_on_its_way_to_a_stream_we_cut_off_is_no_fault() {
    let gateway = Mux::new(Side::Gateway, Limits::default());
    let mut stream = gateway.open().unwrap();
    write(&mut stream, b"hello");
    said(&gateway, 65_536);
    drop(stream);
    assert_eq!(said(&gateway, 65_536), data(2, RST, b""));
    gateway.receive(&data(2, 0, &[0; 100_000])).unwrap();
    gateway.receive(&frame(1, 0, 2, 1000, b"")).unwrap();
    gateway.receive(&data(2, FIN, b"")).unwrap();
    assert_eq!(gateway.open_streams(), 0);
    // But it said itself that this was all.
    assert_eq!(gateway.receive(&data(2, 0, b"x")), Err(Fault::Stream(2)));
    // And never more than it had been granted.
    let mut stream = gateway.open().unwrap();
    write(&mut stream, b"hello");
    said(&gateway, 65_536);
    drop(stream);
    let more = vec![0; INITIAL_WINDOW as usize + 1];
    assert_eq!(gateway.receive(&data(4, 0, &more)), Err(Fault::Stream(4)));
}

#[test]
fn the_end_of_the_connection_is_the_end_of_its_streams() {
    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (gateway, client) = pair();
    let mut here = gateway.open().unwrap();
    write(&mut here, b"x");
    settle(&gateway, &client);
    let count = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&count));
    let mut waiting = Context::from_waker(&waker);
    assert!(here.poll_read(&mut waiting, &mut [0; 4]).is_pending());
    assert!(client.poll_accept(&mut cx()).is_ready());
    assert!(client.poll_accept(&mut waiting).is_pending());
    gateway.end();
    client.end();
    assert_eq!(count.0.load(Ordering::Relaxed), 2);
    assert_eq!(read(&mut here, 4), Poll::Ready(Err(Broken::Lost)));
    let polled = here.poll_write(&mut cx(), b"x");
    assert_eq!(polled, Poll::Ready(Err(Broken::Lost)));
    assert_eq!(gateway.open().unwrap_err(), NotOpened::Gone);
    assert!(matches!(client.poll_accept(&mut cx()), Poll::Ready(None)));
    drop(here);
    assert_eq!(gateway.open_streams(), 0);
}

mod random {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is cut, interleaved and delayed: each stream has its own
        /// bytes, in order and whole.
        #[test]
        fn streams_keep_their_bytes(
            steps in proptest::collection::vec((0_usize..4, 1_usize..40_000, 1_usize..20_000), 1..200)
        ) {
            let (gateway, client) = pair();
            let mut here: Vec<Handle> = (0..4).map(|_| gateway.open().unwrap()).collect();
            let mut there: Vec<Option<Handle>> = (0..4).map(|_| None).collect();
            let mut sent = [0_usize; 4];
            let mut got = [0_usize; 4];
            let byte = |stream: usize, at: usize| (at * 31 + stream * 7 + at / 251) as u8;
            for (stream, size, piece) in steps {
                let bytes: Vec<u8> = (0..size).map(|i| byte(stream, sent[stream] + i)).collect();
                sent[stream] += write(&mut here[stream], &bytes);
                let message = said(&gateway, 13 + piece);
                for part in message.chunks(piece.max(7)) {
                    client.receive(part).unwrap();
                }
                gateway.receive(&said(&client, 65_536)).unwrap();
                while let Poll::Ready(Some(stream)) = client.poll_accept(&mut cx()) {
                    let at = (stream.id() / 2 - 1) as usize;
                    there[at] = Some(stream);
                }
                if let Some(reader) = &mut there[stream]
                    && let Poll::Ready(Ok(bytes)) = read(reader, piece)
                {
                    for b in bytes {
                        prop_assert_eq!(b, byte(stream, got[stream]));
                        got[stream] += 1;
                    }
                }
            }
            for stream in &mut here {
                stream.finish().unwrap();
            }
            for _ in 0..10_000 {
                settle(&gateway, &client);
                while let Poll::Ready(Some(stream)) = client.poll_accept(&mut cx()) {
                    let at = (stream.id() / 2 - 1) as usize;
                    there[at] = Some(stream);
                }
                let mut done = true;
                for stream in 0..4 {
                    match read(there[stream].as_mut().unwrap(), 30_000) {
                        Poll::Ready(Ok(bytes)) => {
                            done &= bytes.is_empty();
                            for b in bytes {
                                prop_assert_eq!(b, byte(stream, got[stream]));
                                got[stream] += 1;
                            }
                        }
                        Poll::Ready(Err(broken)) => panic!("{broken:?}"),
                        Poll::Pending => done = false,
                    }
                }
                if done {
                    break;
                }
            }
            prop_assert_eq!(sent, got);
        }

        #[test]
        fn no_bytes_bring_an_end_down(messages in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..200), 0..20
        )) {
            let client = Mux::new(Side::Client, Limits { accepted: 4, ..Limits::default() });
            for message in messages {
                if client.receive(&message).is_err() {
                    break;
                }
                said(&client, 4096);
            }
        }

        /// The same with frames that look right.
        #[test]
        fn no_frames_bring_an_end_down(frames in proptest::collection::vec(
            (0_u8..4, 0_u16..16, 0_u32..9, prop_oneof![0_u32..300, any::<u32>()]), 0..60
        )) {
            let client = Mux::new(Side::Client, Limits { accepted: 4, ..Limits::default() });
            let mut held = Vec::new();
            for (kind, flags, id, length) in frames {
                let body = match kind {
                    0 => vec![1; length.min(300) as usize],
                    _ => Vec::new(),
                };
                if client.receive(&frame(kind, flags, id, length, &body)).is_err() {
                    break;
                }
                if let Poll::Ready(Some(mut stream)) = client.poll_accept(&mut cx()) {
                    let _n = stream.poll_write(&mut cx(), b"answer");
                    held.push(stream);
                }
                if held.len() > 2 {
                    held.remove(0);
                }
                said(&client, 4096);
            }
        }
    }
}
