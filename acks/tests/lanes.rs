//! What is given away is written, in order, and counted; what is not, is told.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

use std::fs::File;
use std::io::{PipeReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use rvpn_acks::{Aside, Lane, ROOM, Writer, Written};

fn pair() -> (File, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (File::from(OwnedFd::from(near)), far)
}

fn settle(lane: &mut Lane) {
    let begun = Instant::now();
    while !lane.is_idle() {
        assert!(begun.elapsed() < Duration::from_secs(5), "still writing");
        std::thread::yield_now();
    }
}

#[test]
fn they_arrive_in_order_and_are_counted_once() {
    let writer = Writer::start("test").unwrap();
    let (device, far) = pair();
    let mut lane = writer.lane(device);
    let mut total = Written::default();
    for n in 0..2_000_u32 {
        while !lane.give(&[7; 10], &n.to_be_bytes()) {
            std::thread::yield_now();
        }
        let mut got = [0; 64];
        let length = far.recv(&mut got).unwrap();
        assert_eq!(got[..length], [&[7; 10][..], &n.to_be_bytes()].concat());
        let more = lane.written();
        total.packets += more.packets;
        total.bytes += more.bytes;
    }
    settle(&mut lane);
    let last = lane.written();
    assert_eq!(total.packets + last.packets, 2_000);
    assert_eq!(total.bytes + last.bytes, 8_000);
    assert_eq!((last.refused, last.down), (0, 0));
    assert_eq!(lane.written(), Written::default());
}

#[test]
fn what_is_too_long_or_too_much_is_not_taken() {
    let writer = Writer::start("test").unwrap();
    // A FIFO that nobody reads from: its writer waits, since it may block.
    let (near, mut far) = std::io::pipe().map(|(r, w)| (w, r)).unwrap();
    let lane = writer.lane(File::from(OwnedFd::from(near)));
    assert!(!lane.give(&[0; 10], &[0; ROOM - 9]));
    let (mut given, begun) = (0, Instant::now());
    while lane.give(&[0; 10], &[1; ROOM - 10]) {
        given += 1;
        assert!(begun.elapsed() < Duration::from_secs(20), "{given} taken");
    }
    // All that was taken comes, also after the end of the lane.
    drop((lane, writer));
    let mut all = Vec::new();
    far.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), given * ROOM);
}

#[test]
fn a_device_that_is_gone_loses_them_and_says_so() {
    let writer = Writer::start("test").unwrap();
    let (device, far) = pair();
    drop(far);
    let mut lane = writer.lane(device);
    assert!(lane.give(&[], &[1; 40]));
    settle(&mut lane);
    let expected = Written {
        refused: 1,
        ..Written::default()
    };
    assert_eq!(lane.written(), expected);
    // The others do not notice.
    let (device, far) = pair();
    let lane = writer.lane(device);
    assert!(lane.give(&[1], &[2; 40]));
    assert_eq!(far.recv(&mut [0; 64]).unwrap(), 41);
}

/// A device that takes nothing any more until somebody reads from it.
fn full() -> (File, PipeReader) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[0; 64 * 1024]).unwrap();
    (File::from(OwnedFd::from(writer)), reader)
}

#[test]
fn one_device_leaves_room_for_others() {
    let writer = Writer::start("test").unwrap();
    let (device, stuck) = full();
    let lane = writer.lane(device);
    let taken = (0..1_000).take_while(|_| lane.give(&[], &[1; 40])).count();
    assert!((64..192).contains(&taken), "{taken}");
    let (device, far) = pair();
    let other = writer.lane(device);
    for _ in 0..64 {
        assert!(other.give(&[], &[2; 40]));
    }
    drop(stuck);
    for _ in 0..64 {
        assert_eq!(far.recv(&mut [0; 64]).unwrap(), 40);
    }
}

#[test]
fn with_little_to_do_nothing_goes_aside() {
    let writer = Writer::start("test").unwrap();
    let (device, far) = pair();
    let mut aside = Aside::default();
    assert!(!aside.give(&[], &[1; 40]) && !aside.is_open());
    for round in 1..4 {
        aside.open(&writer, || device.try_clone());
        assert!(aside.give(&[1; 10], &[2; 40]) && aside.is_open());
        assert_eq!(far.recv(&mut [0; 64]).unwrap(), 50);
        // There was much since it was opened, and then no more.
        aside.look();
        assert!(aside.give(&[1; 10], &[2; 40]), "{round}");
        assert_eq!(far.recv(&mut [0; 64]).unwrap(), 50);
        aside.look();
        assert!(!aside.give(&[1; 10], &[2; 40]));
        let begun = Instant::now();
        while aside.is_open() {
            assert!(begun.elapsed() < Duration::from_secs(5), "still writing");
            aside.look();
        }
        let written = aside.written();
        assert_eq!((written.packets, written.bytes), (2, 80), "{round}");
    }
}

#[test]
fn what_does_not_end_is_left() {
    let writer = Writer::start("test").unwrap();
    let (device, stuck) = full();
    let mut aside = Aside::default();
    aside.open(&writer, || device.try_clone());
    assert!(aside.give(&[], &[1; 40]));
    aside.close();
    assert!(aside.is_open());
    assert!(aside.abandon());
    assert!(!aside.is_open());
    assert_eq!(aside.written(), Written::default());
    // Not what has ended.
    drop(stuck);
    let (device, far) = pair();
    aside.open(&writer, || device.try_clone());
    assert!(aside.give(&[], &[1; 40]));
    assert_eq!(far.recv(&mut [0; 64]).unwrap(), 40);
    let begun = Instant::now();
    while aside.is_open() {
        assert!(begun.elapsed() < Duration::from_secs(5), "still writing");
        aside.close();
    }
    assert!(!aside.abandon());
    assert_eq!(aside.written().packets, 1);
}
