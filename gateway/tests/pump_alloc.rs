//! Packets in motion take nothing from the allocator.
//!
//! A program of its own, because it counts every allocation of its thread.
#![expect(unsafe_code, reason = "an allocator is unsafe to write")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use rvpn_acks::Writer;
use rvpn_gateway::meter::Totals;
use rvpn_gateway::pump::{Agreed, Identity, Out, Pump};
use rvpn_gateway::tun::{MAX_READ, Tun, VIRTIO_LEN};
use rvpn_lab::packet;
use rvpn_proto::gso::{VirtioHeader, rebuild};
use rvpn_proto::packet::parse;
use rvpn_proto::queue::{Buffer, Stride};
use rvpn_proto::record::{MESSAGE_LIMIT, Offload, Reader, append, gso_type};
use tokio::time::Instant;

thread_local! {
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is the system allocator's; beside it only a number changes.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.set(TAKEN.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        TAKEN.set(TAKEN.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn taken_by(what: impl FnOnce()) -> u64 {
    let before = TAKEN.get();
    what();
    TAKEN.get() - before
}

const INNER: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 64, 0, 2),
    Ipv6Addr::new(0xfd00, 1, 2, 0, 0, 0, 0, 1),
);
const LEASE: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 64, 7, 2),
    Ipv6Addr::new(0xfd00, 1, 2, 7, 0, 0, 0, 1),
);

fn pump(offload: bool) -> Pump {
    let identity = Identity::Pair {
        inner: INNER,
        lease: LEASE,
    };
    let agreed = Agreed {
        mtu: 1500,
        offload,
        device: 0x7f,
    };
    Pump::new(&identity, agreed, [1, 2])
}

/// What a read of the device would give.
fn read(packet: &[u8], offload: Offload) -> Vec<u8> {
    let mut read = VirtioHeader {
        gso_type: offload.gso_type,
        gso_size: offload.gso_size,
        ..VirtioHeader::FINISHED
    }
    .to_bytes()
    .to_vec();
    read.extend_from_slice(packet);
    read
}

/// The same of a super-packet to the client, of so many segments.
fn read_super(segments: usize) -> Vec<u8> {
    let to = LEASE.0.to_string();
    let payload = vec![7; segments * 1400];
    let mut packet = packet::tcp(("1.1.1.1", 80), (&to, 2000), ".", 1, 1, &payload);
    let offload = Offload {
        partial: true,
        gso_type: gso_type::TCP_V4,
        gso_size: 1400,
    };
    let parsed = parse(&packet).expect("a packet");
    let virtio = rebuild(&mut packet, &parsed, offload).expect("a super-packet");
    [&virtio.to_bytes()[..], &packet].concat()
}

#[test]
fn packets_to_the_client_take_no_memory_once_the_queue_has_seen_its_depth() {
    for offload in [true, false] {
        let mut pump = pump(offload);
        let mut totals = Totals::default();
        let mut message = Buffer::new();
        let mut packets: Vec<Vec<u8>> = (0..64_u16)
            .map(|n| {
                let len = [8, 500, 1400][usize::from(n % 3)];
                let (to, from) = (LEASE.0.to_string(), "1.1.1.1");
                packet::udp(from, 1000 + n % 8, &to, 53, &vec![n as u8; len])
            })
            .map(|packet| read(&packet, Offload::NONE))
            .collect();
        // Those change hands instead of being copied, but not the shorter ones.
        packets.extend([46, 20, 46].map(read_super));
        let all = 64 + 46 + 20 + 46;
        let mut copy = Buffer::new();
        let mut round = |pump: &mut Pump, totals: &mut Totals, most| {
            let now = Instant::now();
            for packet in &packets {
                copy.from(VIRTIO_LEN)[..packet.len()].copy_from_slice(packet);
                pump.inbound(&mut copy, packet.len(), totals, now);
            }
            while let Some(waiting) = pump.next_len(now) {
                assert!(waiting.whole <= message.packet().len());
                pump.take_buffer(&mut message, most, totals);
            }
            pump.settle(totals);
        };
        round(&mut pump, &mut totals, MESSAGE_LIMIT);
        assert_eq!(totals.inbound.packets, all, "they pass");
        let taken = taken_by(|| {
            for n in 0..100 {
                let most = [MESSAGE_LIMIT, 16 * 1024][n % 2];
                round(&mut pump, &mut totals, most);
            }
        });
        assert_eq!(totals.inbound.packets, 101 * all);
        assert_eq!(taken, 0, "offload: {offload}");
    }
}

#[tokio::test]
async fn packets_to_the_device_take_no_memory() {
    for offload in [true, false] {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let tun = Tun::adopt(OwnedFd::from(ours)).unwrap();
        let mut pump = pump(offload);
        let mut totals = Totals::default();
        let mut message = Vec::new();
        for n in 0..48_u16 {
            let len = [600, 600, 20][usize::from(n % 3)];
            let (from, to) = (INNER.0.to_string(), "1.1.1.1");
            let packet = packet::udp(&from, 1000 + n / 8, to, 53, &vec![n as u8; len]);
            append(&mut message, &packet, Offload::NONE).unwrap();
        }
        let mut scratch = vec![0; MAX_READ];
        let mut got = vec![0; MAX_READ];
        let mut round = |pump: &mut Pump, totals: &mut Totals| {
            let mut out = Out {
                tun: &tun,
                totals,
                scratch: &mut scratch,
                stride: &mut Stride::default(),
                now: Instant::now(),
            };
            for record in Reader::new(&message) {
                let record = record.unwrap();
                pump.outbound(record.packet, record.offload, &mut out);
            }
            pump.flush(&mut out);
            let mut reads = 0;
            while let Ok(n) = theirs.recv(&mut got) {
                assert!(n > VIRTIO_LEN);
                reads += 1;
            }
            reads
        };
        assert!(round(&mut pump, &mut totals) < 48, "some are joined");
        assert_eq!(totals.outbound.packets, 48, "they pass");
        let taken = taken_by(|| {
            for _ in 0..100 {
                round(&mut pump, &mut totals);
            }
        });
        assert_eq!(totals.outbound.packets, 101 * 48);
        assert_eq!(taken, 0, "offload: {offload}");
    }
}

/// And acknowledgements none when another thread writes them; what it has written
/// is counted, and what it could not.
#[tokio::test]
async fn acknowledgements_given_away_take_no_memory_and_are_counted() {
    const EACH: u32 = 16;
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let mut tun = Tun::adopt(OwnedFd::from(ours)).unwrap();
    tun.open_aside(&Writer::start("acks").unwrap());
    let mut pump = pump(true);
    let mut totals = Totals::default();
    let from = INNER.0.to_string();
    let acks: Vec<_> = (0..EACH)
        .map(|n| packet::tcp((&from, 1000), ("1.1.1.1", 80), ".", 1, n, b""))
        .collect();
    let mut scratch = vec![0; MAX_READ];
    let mut got = vec![0; MAX_READ];
    let mut round = |pump: &mut Pump, tun: &mut Tun, totals: &mut Totals| {
        for ack in &acks {
            let mut out = Out {
                tun,
                totals,
                scratch: &mut scratch,
                stride: &mut Stride::default(),
                now: Instant::now(),
            };
            pump.outbound(ack, Offload::NONE, &mut out);
        }
        for n in 0..EACH {
            let length = theirs.recv(&mut got).unwrap();
            let header = packet::tcp_header(&got[VIRTIO_LEN..length]).unwrap();
            assert_eq!(header[8..12], n.to_be_bytes());
        }
        tun.count_aside(&mut totals.outbound);
    };
    let taken = taken_by(|| {
        for _ in 0..100 {
            round(&mut pump, &mut tun, &mut totals);
        }
    });
    assert_eq!(taken, 0);
    tun.finish_aside(&mut totals.outbound).await;
    let all = u64::from(100 * EACH);
    assert_eq!(totals.outbound.packets, all);
    assert_eq!(totals.outbound.payload, all * acks[0].len() as u64);
    assert_eq!(totals.drops(), 0);
    // Now nobody else has the descriptor.
    assert!(!tun.aside.give(&[0; VIRTIO_LEN], &acks[0]));

    tun.open_aside(&Writer::start("acks").unwrap());
    drop(theirs);
    assert!(tun.aside.give(&[0; VIRTIO_LEN], &acks[0]));
    tun.finish_aside(&mut totals.outbound).await;
    assert_eq!((totals.outbound.packets, totals.drops()), (all, 1));
    assert!(tun.into_fd().is_some());
}

/// A lane that is to close takes no more, also while what it took is under way.
#[tokio::test]
async fn a_lane_that_closes_lets_go_of_the_device_under_load() {
    let writer = Writer::start("acks").unwrap();
    // The thread is busy with somebody else's device, which is full.
    let (mut reader, mut full) = std::io::pipe().unwrap();
    full.write_all(&[0; 64 * 1024]).unwrap();
    let before = writer.lane(File::from(OwnedFd::from(full)));
    assert!(before.give(&[], &[1; 40]));

    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let mut tun = Tun::adopt(OwnedFd::from(ours)).unwrap();
    let mut totals = Totals::default();
    tun.open_aside(&writer);
    assert!(tun.aside.give(&[2; VIRTIO_LEN], &[3; 40]));
    tun.aside.close();
    tun.count_aside(&mut totals.outbound);
    assert_eq!(totals.outbound.packets, 0, "it waits");
    assert!(!tun.aside.give(&[2; VIRTIO_LEN], &[4; 40]));
    // Opened again, it is the same one.
    tun.open_aside(&writer);
    assert!(tun.aside.give(&[2; VIRTIO_LEN], &[5; 40]));
    tun.aside.close();
    tun.count_aside(&mut totals.outbound);

    reader.read_exact(&mut [0; 64 * 1024]).unwrap();
    tun.finish_aside(&mut totals.outbound).await;
    assert_eq!((totals.outbound.packets, totals.outbound.payload), (2, 80));
    let mut got = [0; 64];
    for mark in [3, 5] {
        assert_eq!(theirs.recv(&mut got).unwrap(), VIRTIO_LEN + 40);
        assert_eq!(got[VIRTIO_LEN], mark);
    }
    assert!(tun.into_fd().is_some());
}

#[test]
fn the_counting_counts() {
    assert!(taken_by(|| drop(vec![0_u8; 100])) > 0);
}
