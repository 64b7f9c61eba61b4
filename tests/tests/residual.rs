//! What is under way for a lease's former holder reaches nobody, least of all the next one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use rvpn_ipc::{Client, ClientError, Key, Kind, Status};
use rvpn_lab::capture::drain_udp;
use rvpn_lab::read_back::flows;
use rvpn_lab::topology::{FAMILIES, FAR4, Family, GW4, at};
use rvpn_lab::{Helper, Lab, Tunnel, packet, wait_until, wait_within};

/// A pool of one slot, so that the next lease is of the very same.
fn one_slot() -> (Lab, Helper, Client) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "slots = 1\nmax-slots = 1\n");
    let client = helper.connect();
    (lab, helper, client)
}

/// Acquires as soon as the one slot is free again.
fn acquire_when_free(client: &mut Client, key: u8) -> Tunnel {
    let mut got = None;
    wait_until("the slot is free again", || {
        match client.acquire(Key([key; 16]), Kind::Both, 0) {
            Ok(lease) => {
                got = Some(Tunnel::new(Key([key; 16]), lease));
                true
            }
            Err(ClientError::Refused(r)) if r.status == Status::NoCapacity => false,
            Err(e) => panic!("{e}"),
        }
    });
    got.unwrap()
}

/// A opens a flow; the server keeps sending to it while A leaves and B gets the
/// very slot. Returns what B received in all, after the server has sent on.
fn residual_udp(lab: &Lab, client: &mut Client, f: Family) -> usize {
    let server = lab.up.udp(&at(f.up, 6000));
    let a = Tunnel::acquire(client, 1);
    a.send(&packet::udp(&f.source(&a), 4000, f.up, 6000, b"hello"));
    let (_, mapped) = server.recv_from(&mut [0; 64]).unwrap();
    let stop = AtomicBool::new(false);
    let sent = AtomicUsize::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = server.send_to(b"residual datagram", mapped);
                sent.fetch_add(1, Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_micros(500));
            }
        });
        a.expect(b"residual datagram");
        let (slot, generation) = (a.reply.slot, a.reply.generation);
        drop(a);
        client.release(slot, generation).unwrap();
        let b = acquire_when_free(client, 2);
        assert_eq!(b.reply.slot, slot);
        let from = sent.load(Ordering::Relaxed);
        wait_until("the server has sent a thousand more", || {
            sent.load(Ordering::Relaxed) > from + 1000
        });
        stop.store(true, Ordering::Relaxed);
        let got = b.drain().len();
        give_back(client, b);
        got
    })
}

fn give_back(client: &mut Client, lease: Tunnel) {
    let (slot, generation) = (lease.reply.slot, lease.reply.generation);
    drop(lease);
    client.release(slot, generation).unwrap();
    wait_until("it is clean", || client.describe().unwrap().free == 1);
}

#[test]
fn nat_04_residual_udp() {
    let (lab, _helper, mut client) = one_slot();
    for f in FAMILIES {
        assert_eq!(residual_udp(&lab, &mut client, f), 0, "{f:?}");
    }
}

/// A completes a handshake and acknowledges nothing more; the server retransmits into B's time.
fn residual_tcp(lab: &Lab, client: &mut Client, f: Family) -> usize {
    let listener = lab.up.tcp(&at(f.up, 6001));
    let a = Tunnel::acquire(client, 1);
    let src = f.source(&a);
    a.send(&packet::tcp((&src, 4000), (f.up, 6001), "S", 100, 0, b""));
    let theirs = a.syn_answered(6001).wrapping_add(1);
    a.send(&packet::tcp(
        (&src, 4000),
        (f.up, 6001),
        ".",
        101,
        theirs,
        b"",
    ));
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"residual segment").unwrap();
    a.expect(b"residual segment");
    let (slot, generation) = (a.reply.slot, a.reply.generation);
    drop(a);
    client.release(slot, generation).unwrap();
    let b = acquire_when_free(client, 2);
    assert_eq!(b.reply.slot, slot);
    // It sends again, into nothing, or is told that nobody is there.
    server.set_nonblocking(true).unwrap();
    let before = retransmitted(lab);
    wait_until("the server has sent again or was reset", || {
        let reset = matches!(std::io::Read::read(&mut &server, &mut [0; 8]), Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset);
        reset || retransmitted(lab) > before + 1
    });
    let got = b.drain().len();
    let _ = server.shutdown(Shutdown::Both);
    give_back(client, b);
    got
}

/// Segments the internet's end has sent again.
fn retransmitted(lab: &Lab) -> u64 {
    let text = lab
        .up
        .run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))
        .unwrap();
    let mut lines = text.lines().filter(|l| l.starts_with("Tcp:"));
    let names: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    let values: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    let at = names.iter().position(|n| *n == "RetransSegs").unwrap();
    values[at].parse().unwrap()
}

#[test]
fn nat_05_residual_tcp() {
    let (lab, _helper, mut client) = one_slot();
    for f in FAMILIES {
        assert_eq!(residual_tcp(&lab, &mut client, f), 0, "{f:?}");
    }
}

#[test]
fn nat_06_packets_in_flight_while_a_lease_is_released() {
    let (lab, _helper, mut client) = one_slot();
    for round in 0..10 {
        let f = FAMILIES[round % 2];
        let server = lab.up.udp(&at(f.up, 6000));
        let a = Tunnel::acquire(&mut client, 1);
        let (slot, generation) = (a.reply.slot, a.reply.generation);
        let src = f.source(&a);
        // A copy of the descriptor goes on sending whatever the gateway does.
        std::thread::scope(|s| {
            let sender = s.spawn(|| {
                let mut port = 1;
                let packet = |port| packet::udp(&src, port, f.up, 6000, b"late");
                let end = Instant::now() + rvpn_lab::PATIENCE;
                while a.try_send(&packet(port)).is_ok() && Instant::now() < end {
                    port = if port == 900 { 1 } else { port + 1 };
                }
            });
            wait_until("packets flow", || !drain_udp(&server).is_empty());
            client.release(slot, generation).unwrap();
            sender.join().unwrap();
        });
        drop(a);
        let b = acquire_when_free(&mut client, 2);
        assert_eq!(
            flows(&lab.gw, &format!("src={src} ")),
            [""; 0],
            "round {round}: flows of the former lease"
        );
        give_back(&mut client, b);
    }
}

/// Fills the gateway's flow table from the internet's side.
fn foreign_flows(lab: &Lab, wanted: u64) {
    lab.gw
        .sysctl("net/netfilter/nf_conntrack_udp_timeout", "900");
    let count = || {
        lab.gw
            .sysctl_get("net/netfilter/nf_conntrack_count")
            .parse::<u64>()
            .unwrap()
    };
    lab.up.run(|| {
        let s = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::empty(),
            SockProtocol::Raw,
        )
        .unwrap();
        let to = SockaddrIn::new(1, 1, 1, 2, 0);
        let mut p = packet::udp(FAR4, 1, GW4, 9, b"foreign");
        for n in 0..wanted + wanted / 50 {
            let (port, host) = (
                u16::try_from(n % 60_000).unwrap() + 1000,
                u8::try_from(n / 60_000).unwrap(),
            );
            p[15] = 10 + host;
            p[20..22].copy_from_slice(&port.to_be_bytes());
            // Without a checksum, which UDP allows.
            p[26..28].fill(0);
            packet::fix_header(&mut p[..20]);
            sendto(s.as_raw_fd(), &p, &to, MsgFlags::empty()).unwrap();
        }
    });
    wait_until("the flow table is full of others' flows", || {
        count() >= wanted
    });
}

#[test]
fn nat_07_release_among_200_000_foreign_flows() {
    let (lab, _helper, mut client) = one_slot();
    foreign_flows(&lab, 200_000);
    let mut took = Vec::new();
    for _ in 0..5 {
        let a = Tunnel::acquire(&mut client, 1);
        for port in 1..=500 {
            let f = FAMILIES[usize::from(port % 2)];
            a.send(&packet::udp(&f.source(&a), port, f.up, 6000, b"own"));
        }
        let (slot, generation) = (a.reply.slot, a.reply.generation);
        drop(a);
        client.release(slot, generation).unwrap();
        took.push(wait_within(rvpn_lab::PATIENCE, "the slot is clean", || {
            client.describe().unwrap().free == 1
        }));
    }
    took.sort();
    println!("clean after {took:?}");
    assert!(
        took[2] < Duration::from_millis(500),
        "half of them took longer than half a second: {took:?}"
    );
    assert_eq!(flows(&lab.gw, "src=10.64.0.2"), [""; 0]);
    // Reused at once by another key, among all those flows.
    for f in FAMILIES {
        let datagrams = residual_udp(&lab, &mut client, f);
        assert_eq!(datagrams, 0, "datagrams of the former holder, {f:?}");
        let segments = residual_tcp(&lab, &mut client, f);
        assert_eq!(segments, 0, "segments of the former holder, {f:?}");
    }
    let left: u64 = lab
        .gw
        .sysctl_get("net/netfilter/nf_conntrack_count")
        .parse()
        .unwrap();
    assert!(left >= 200_000, "others' flows were touched: {left} left");
}
