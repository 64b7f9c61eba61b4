//! The helper over time: silence, load, a panic, a restart.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rvpn_ipc::frame::REPLY_LEN;
use rvpn_ipc::{Client, ClientError, Key, Kind, Op, Request, Status, seqpacket};
use rvpn_lab::attack::evil;
use rvpn_lab::boundary::{all_free, setup};
use rvpn_lab::helper::{as_user, faulty, field};
use rvpn_lab::read_back::{elements, rules_alone};
use rvpn_lab::topology::UP4;
use rvpn_lab::{Helper, Lab, Tunnel, packet, wait_until};

#[test]
fn hlp_19_silence_and_unread_answers() {
    let (_lab, helper) = setup("");
    let open = || {
        as_user(helper.gateway_uid, || {
            seqpacket::connect(&helper.socket).unwrap()
        })
    };
    // Nothing said: closed after a second, the gateway beside it is served.
    let silent = open();
    let mut client = helper.connect();
    seqpacket::set_timeout(silent.as_fd(), Duration::from_secs(3)).unwrap();
    let start = Instant::now();
    let got = seqpacket::recv(silent.as_fd(), &mut [0; REPLY_LEN], false).unwrap();
    assert_eq!(got.len, 0);
    assert!((Duration::from_millis(900)..Duration::from_secs(3)).contains(&start.elapsed()));
    client.describe().unwrap();
    drop(client);
    // Answers never read: the queue is bounded, then the connection ends; others are answered all the while.
    let deaf = open();
    seqpacket::set_timeout(deaf.as_fd(), Duration::from_millis(100)).unwrap();
    let mut seq = 0;
    let start = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut beside = None;
    loop {
        seq += 1;
        let op = if seq == 1 { Op::Hello } else { Op::Describe };
        match seqpacket::send(deaf.as_fd(), &Request::new(op, seq).encode(), None) {
            Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => break,
            _ => {}
        }
        if seq == 2 {
            beside = Some(helper.try_connect(true).expect("a successor").0);
        }
        if let Some(c) = &mut beside {
            let asked = Instant::now();
            c.describe().unwrap();
            slowest = slowest.max(asked.elapsed());
        }
        assert!(start.elapsed() < Duration::from_secs(10), "never closed");
    }
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

#[test]
fn hlp_21_what_each_thread_holds() {
    let (lab, helper) = setup("");
    let said = evil(&lab, &helper, "cage", helper.pid().into());
    assert_eq!(said["proven"], true, "the gateway's cage, on every thread");
    let tasks: Vec<_> = fs::read_dir(format!("/proc/{}/task", helper.pid()))
        .unwrap()
        .collect();
    assert_eq!(tasks.len(), 2);
    for t in tasks {
        let path = t.unwrap().path().join("status").display().to_string();
        let wanted = [
            ("CapEff", "0000000000001000"),
            ("CapPrm", "0000000000001000"),
            ("CapBnd", "0000000000001000"),
            ("CapInh", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
        ];
        for (name, value) in wanted {
            assert_eq!(field(&path, name), value, "{name} of {path}");
        }
        let uid = helper.uid.to_string();
        assert!(
            field(&path, "Uid").split_whitespace().all(|u| u == uid),
            "{path}"
        );
        assert_eq!(field(&path, "Groups"), "");
    }
    drop(lab);
}

#[test]
fn hlp_22_the_rules_after_many_leases() {
    let (lab, helper) = setup("slots = 8\nmax-slots = 8\n");
    let mut client = helper.connect();
    let before = rules_alone(&lab.gw);
    for n in 0..3_000_u32 {
        let key = Key([u8::try_from(n % 7 + 1).unwrap(); 16]);
        match client.acquire(key, Kind::Both, 0) {
            Ok(lease) => {
                let (slot, generation) = (lease.reply.slot, lease.reply.generation);
                drop(lease);
                client.release(slot, generation).unwrap();
            }
            Err(ClientError::Refused(r)) => assert_eq!(r.status, Status::NoCapacity),
            Err(e) => panic!("{e}"),
        }
    }
    all_free(&mut client);
    assert_eq!(rules_alone(&lab.gw), before);
    for set in [
        "lease4",
        "lease6",
        "back4",
        "back6",
        "marks",
        "stream4",
        "stream6",
        "stream_marks4",
        "stream_marks6",
    ] {
        assert_eq!(elements(&lab.gw, set), 0, "{set}");
    }
}

#[test]
fn hlp_23_memory_and_descriptors_under_load() {
    let (_lab, helper) = setup("");
    let mut client = helper.connect();
    // A lease waits for locks of the whole kernel: what is measured here is not how long.
    seqpacket::set_timeout(client.socket(), Duration::from_secs(30)).unwrap();
    let round = |client: &mut Client, leases: u32, questions: u32| {
        for i in 0..leases {
            let key = Key([u8::try_from(i % 9 + 1).unwrap(); 16]);
            match client.acquire(key, Kind::Packets, 0) {
                Ok(lease) => {
                    let (slot, generation) = (lease.reply.slot, lease.reply.generation);
                    drop(lease);
                    client.release(slot, generation).unwrap();
                }
                Err(ClientError::Refused(r)) => assert_eq!(r.status, Status::NoCapacity),
                Err(e) => panic!("lease {i}: {e}"),
            }
            for _ in 0..questions / leases {
                client.describe().unwrap();
            }
        }
        all_free(client);
    };
    round(&mut client, 100, 5_000);
    let (fds, memory) = (helper.descriptors(), helper.anonymous());
    round(&mut client, 500, 100_000);
    assert_eq!(helper.descriptors(), fds);
    let (after, resident) = (helper.anonymous(), helper.resident());
    assert!(after <= memory + 64, "{memory} KiB, then {after} KiB");
    assert!(resident <= 8 * 1024, "{resident} KiB");
}

#[test]
fn hlp_24_no_verb_for_anything_else() {
    let (_lab, helper) = setup("");
    // Every operation byte but the six is refused, whatever else the frame holds.
    let known: Vec<u8> = (0..=u8::MAX)
        .filter(|op| {
            let mut frame = Request::new(Op::Describe, 7).encode();
            frame[3] = *op;
            !matches!(Request::decode(&frame), Err(rvpn_ipc::FrameError::Op(_)))
        })
        .collect();
    assert_eq!(known, [1, 2, 3, 4, 5, 6]);
    for op in [0, 7, 0x80, 0xc0, 0xff] {
        let mut client = helper.connect();
        let mut frame = Request::new(Op::Describe, 7).encode();
        frame[3] = op;
        seqpacket::send(client.socket(), &frame, None).unwrap();
        assert!(client.describe().is_err(), "operation {op}");
        drop(client);
        wait_until("the next gateway is served", || {
            helper.try_connect(false).is_ok()
        });
    }
}

#[test]
fn hlp_25_a_panic_is_an_end_and_a_beginning() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "linger = 60\n");
    helper.start(&lab.gw);
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 1);
    drop(client);
    helper.kill();
    // The device is attached and the rules are open when the panic strikes; nobody was told.
    let plain = helper.command("serve").get_program().to_owned();
    helper.program(faulty(), &[("RVPN_FAULT", "opened:panic")]);
    helper.start(&lab.gw);
    let mut client = helper.connect();
    assert!(client.acquire(Key([2; 16]), Kind::Both, 0).is_err());
    assert_eq!(helper.ended().code(), Some(70), "{}", helper.log());
    assert!(helper.log().contains("internal error"));
    helper.program(plain.into(), &[]);
    helper.start(&lab.gw);
    let mut client = helper.connect();
    client
        .confirm(a.reply.slot, a.reply.generation, a.key)
        .unwrap();
    let d = client.describe().unwrap();
    assert_eq!((d.leased, d.free + d.lingering + d.cleaning), (1, 3));
    assert_eq!(elements(&lab.gw, "lease4") as u32, d.leased + d.lingering);
    let b = Tunnel::acquire(&mut client, 2);
    b.send(&packet::echo(&b.v4(2), UP4, 1, 1, b"whole again"));
    b.expect(b"whole again");
    a.send(&packet::echo(&a.v4(2), UP4, 1, 1, b"all along"));
    a.expect(b"all along");
}

#[test]
fn hlp_26_stopped_by_a_signal_it_leaves_everything_for_the_next() {
    let (lab, mut helper) = setup("linger = 60\n");
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 1);
    helper.signal(Signal::SIGTERM);
    assert_eq!(client.wait_notice().unwrap().status, Status::Closing);
    assert_eq!(helper.ended().code(), Some(0));
    a.send(&packet::echo(&a.v4(2), UP4, 1, 1, b"without a helper"));
    a.expect(b"without a helper");
    helper.start(&lab.gw);
    let mut client = helper.connect();
    client
        .confirm(a.reply.slot, a.reply.generation, a.key)
        .unwrap();
}
