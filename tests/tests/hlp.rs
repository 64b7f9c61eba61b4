//! The helper's socket: what a taken-over gateway and another user cannot do there.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rvpn_ipc::frame::{REPLY_LEN, REQUEST_LEN};
use rvpn_ipc::{Client, ClientError, Key, Kind, Op, Request, Status, seqpacket};
use rvpn_lab::attack::evil;
use rvpn_lab::boundary::{all_free, setup, two_users};
use rvpn_lab::helper::as_user;
use rvpn_lab::read_back::{devices, elements, rules_alone};
use rvpn_lab::topology::UP4;
use rvpn_lab::{Tunnel, packet, wait_until, wait_within};

#[test]
fn hlp_01_no_strings_in_the_protocol() {
    let (_lab, helper) = setup("");
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 0x41);
    // Whatever is said in either direction has one length and holds neither name nor path.
    let all = [
        Request::new(Op::Describe, 1).encode().to_vec(),
        Request {
            key: a.key,
            kind: Some(Kind::Both),
            ..Request::new(Op::Acquire, 1)
        }
        .encode()
        .to_vec(),
        a.reply.encode().to_vec(),
        client.describe().unwrap().encode().to_vec(),
    ];
    for frame in &all {
        assert!([REQUEST_LEN, REPLY_LEN].contains(&frame.len()));
        for word in ["rv", "eth", "wan", "/", "lo"] {
            // The key, which the gateway chose, is the only text-like thing.
            let without: Vec<u8> = frame.iter().copied().filter(|&b| b != 0x41).collect();
            assert!(
                !rvpn_lab::capture::contains(&without[4..], word.as_bytes()),
                "{word} in {frame:?}"
            );
        }
    }
}

/// Ten million is what the bounds were proven with; a run of the suite takes fewer.
fn frames_wanted() -> u64 {
    std::env::var("RVPN_FRAMES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1_000_000)
}

#[test]
fn hlp_02_mutated_frames() {
    let (lab, helper) = setup("");
    let rules = rules_alone(&lab.gw);
    let (fds, before) = (helper.descriptors(), devices(&lab.gw));
    let start = Instant::now();
    let said = evil(&lab, &helper, "frames", frames_wanted());
    println!(
        "{said} in {:?}, resident {} KiB",
        start.elapsed(),
        helper.resident()
    );
    assert!(
        said["answered"].as_u64() > said["sent"].as_u64().map(|n| n / 2),
        "{said}"
    );
    let mut client = helper.connect();
    all_free(&mut client);
    assert_eq!(rules_alone(&lab.gw), rules);
    assert_eq!(elements(&lab.gw, "lease4"), 0);
    assert!(devices(&lab.gw).len() >= before.len());
    drop(client);
    wait_until("descriptors are back", || helper.descriptors() == fds);
    assert!(helper.resident() <= 8 * 1024, "{} KiB", helper.resident());
}

#[test]
fn hlp_03_messages_of_every_wrong_shape() {
    let (lab, helper) = setup("");
    let said = evil(&lab, &helper, "shapes", 20);
    for (shape, what) in said.as_object().unwrap() {
        // What is a frame but out of order is answered once, then closed; the rest is closed at once.
        let frame = shape == "describe before hello";
        assert_eq!(what["closed"], true, "{shape}");
        assert_eq!(what["answered"], frame, "{shape}");
    }
    let said = evil(&lab, &helper, "pipeline", 1000);
    assert!(said["answered"].as_u64() >= Some(100), "{said}");
    // Ready again at once, for the real one.
    let start = Instant::now();
    helper.connect().describe().unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(
        helper.log().lines().count() < 40,
        "one line a second: {}",
        helper.log()
    );
}

#[test]
fn hlp_04_descriptors_attached_to_requests() {
    let (lab, helper) = setup("");
    let file = fs::File::open("/dev/null").unwrap();
    let fds = helper.descriptors();
    for n in [1, 2, 253] {
        for _ in 0..300 {
            as_user(helper.gateway_uid, || {
                let s = seqpacket::connect(&helper.socket).unwrap();
                seqpacket::set_timeout(s.as_fd(), rvpn_lab::PATIENCE).unwrap();
                rvpn_lab::raw::send_copies(
                    s.as_fd(),
                    &Request::new(Op::Hello, 1).encode(),
                    file.as_fd(),
                    n,
                )
                .unwrap();
                // Closed without an answer.
                let got = seqpacket::recv(s.as_fd(), &mut [0; REPLY_LEN], true);
                assert!(
                    got.map_or(true, |r| r.len == 0),
                    "{n} descriptors were accepted"
                );
            });
        }
    }
    wait_until("descriptors are constant", || helper.descriptors() == fds);
    let mut client = helper.connect();
    client.describe().unwrap();
    drop(lab);
}

#[test]
fn hlp_05_another_user() {
    two_users();
    let (lab, helper) = setup("");
    // Mode and owner keep others from the socket; with both opened, the peer's user still decides.
    let mode = |p: &std::path::Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&helper.socket), 0o660);
    assert_eq!(mode(helper.socket.parent().unwrap()), 0o750);
    let stranger = 65_030;
    let refused = as_user(stranger, || {
        Client::connect(&helper.socket, helper.uid, false)
    });
    assert!(
        matches!(refused, Err(ClientError::Io(e)) if e.kind() == std::io::ErrorKind::PermissionDenied)
    );
    fs::set_permissions(
        helper.socket.parent().unwrap(),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    fs::set_permissions(&helper.socket, fs::Permissions::from_mode(0o666)).unwrap();
    for _ in 0..20 {
        for uid in [stranger, 0] {
            let refused = as_user(uid, || Client::connect(&helper.socket, helper.uid, false));
            let closed = matches!(&refused, Err(ClientError::Closed))
                || matches!(&refused, Err(ClientError::Io(e)) if matches!(e.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe));
            assert!(closed, "uid {uid}: {refused:?}");
        }
    }
    // Root of a user namespace of its own is the stranger it was.
    let script = format!(
        "exec python3 -c \"import socket; s=socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect('{}'); s.send(bytes(48)); print(len(s.recv(96)))\"",
        helper.socket.display()
    );
    let out = lab.gw.output(Command::new("setpriv").args([
        "--reuid",
        "65030",
        "--regid",
        "65030",
        "--clear-groups",
        "unshare",
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        &script,
    ]));
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(
        text.trim() == "0" || text.contains("Connection reset") || text.contains("Broken pipe"),
        "{text}"
    );
    let complaints = helper
        .log()
        .lines()
        .filter(|l| l.contains("65030") || l.contains("uid 0,"))
        .count();
    assert!((1..=5).contains(&complaints), "{}", helper.log());
    helper.connect().describe().unwrap();
}

#[test]
fn hlp_06_a_second_gateway() {
    let (_lab, helper) = setup("linger = 60\n");
    let mut first = helper.connect();
    let a = Tunnel::acquire(&mut first, 1);
    match helper.try_connect(false) {
        Err(ClientError::Refused(r)) => assert_eq!(r.status, Status::TwoGateways),
        other => panic!("{other:?}"),
    }
    // A successor says that it is one; it confirms leases, and its predecessor loses them.
    let (mut second, _) = helper.try_connect(true).unwrap();
    assert!(
        matches!(helper.try_connect(true), Err(ClientError::Refused(r)) if r.status == Status::TwoGateways)
    );
    second
        .confirm(a.reply.slot, a.reply.generation, a.key)
        .unwrap();
    assert!(
        matches!(first.release(a.reply.slot, a.reply.generation), Err(ClientError::Refused(r)) if r.status == Status::UnknownLease)
    );
    // The same key acquired anew: told, then taken.
    let taken = as_user(helper.gateway_uid, || Tunnel::acquire(&mut first, 1));
    assert_eq!(taken.reply.slot, a.reply.slot);
    assert_eq!(second.describe().unwrap().leased, 1);
    assert_eq!(
        second.take_notice().map(|n| n.status),
        Some(Status::TakenOver)
    );
    assert_eq!(
        a.try_send(b"x").unwrap_err().raw_os_error(),
        Some(libc::EBADFD),
        "the former descriptor"
    );
    drop(first);
    wait_until("the successor is the gateway", || {
        helper.try_connect(true).is_ok()
    });
}

fn hoarded(linger: u64) {
    let (lab, helper) = setup(&format!("linger = {linger}\nslots = 8\nmax-slots = 8\n"));
    let said = evil(&lab, &helper, "hoard", 1);
    assert_eq!(said["held"], 8);
    let died = Instant::now();
    let mut client = helper.connect();
    wait_within(
        Duration::from_secs(linger + 1),
        "all slots are free within linger + 1 s",
        || client.describe().unwrap().free == 8,
    );
    assert!(
        died.elapsed() + Duration::from_millis(500) >= Duration::from_secs(linger),
        "freed before its time"
    );
}

#[test]
fn hlp_07_hoarding_and_dying_without_linger() {
    hoarded(0);
}

#[test]
fn hlp_07_hoarding_and_dying_with_linger() {
    hoarded(5);
}

#[test]
fn hlp_08_leases_that_are_not_ones_own() {
    let (_lab, helper) = setup("slots = 4\nmax-slots = 4\n");
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 1);
    let (slot, generation) = (a.reply.slot, a.reply.generation);
    let unknown = |r: Result<(), ClientError>| {
        assert!(matches!(r, Err(ClientError::Refused(r)) if r.status == Status::UnknownLease))
    };
    for (s, g) in [
        (slot, generation + 1),
        (slot + 1, 1),
        (3, u32::MAX),
        (4, 1),
        (u32::MAX, 1),
    ] {
        unknown(client.release(s, g));
        unknown(client.linger(s, g));
    }
    client.release(slot, generation).unwrap();
    unknown(client.release(slot, generation));
    unknown(client.linger(slot, generation));
    all_free(&mut client);
    drop(a);
    // Conserved at every step of a long race of acquires and releases.
    let mut held = Vec::new();
    for n in 0..5_000_u32 {
        let key = Key([u8::try_from(n % 6 + 1).unwrap(); 16]);
        if n % 3 < 2 {
            if let Ok(lease) = client.acquire(key, Kind::Streams, 0) {
                held.retain(|(s, _)| *s != lease.reply.slot);
                held.push((lease.reply.slot, lease.reply.generation));
            }
        } else if let Some((s, g)) = held.pop() {
            client.release(s, g).unwrap();
        }
        let d = client.describe().unwrap();
        assert_eq!(d.free + d.leased + d.lingering + d.cleaning, 4, "step {n}");
        assert_eq!(d.leased as usize, held.len(), "step {n}");
    }
}

#[test]
fn hlp_09_a_copy_of_the_descriptor_kept() {
    let (lab, helper) = setup("slots = 1\nmax-slots = 1\n");
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 1);
    let copy = a.file().try_clone().unwrap();
    client.release(a.reply.slot, a.reply.generation).unwrap();
    drop(a);
    all_free(&mut client);
    let b = Tunnel::acquire(&mut client, 2);
    // B's traffic flows, and the copy sees none of it.
    b.send(&packet::echo(&b.v4(2), UP4, 1, 1, b"for B alone"));
    b.expect(b"for B alone");
    for _ in 0..3 {
        let read = std::io::Read::read(&mut &copy, &mut [0; 2000]);
        assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EBADFD));
        let wrote = std::io::Write::write(&mut &copy, &[0; 60]);
        assert_eq!(wrote.unwrap_err().raw_os_error(), Some(libc::EBADFD));
    }
    drop(lab);
}

#[test]
fn hlp_10_the_device_cannot_be_changed_through_its_descriptor() {
    let (lab, helper) = setup("");
    let said = evil(&lab, &helper, "tun-ioctls", 1);
    for (name, what) in said["tried"].as_object().unwrap() {
        assert_eq!(*what, libc::EPERM, "{name}");
    }
    assert_eq!(said["TUNGETIFF"], "done", "looking is allowed");
    // Carrying packets is: the write is an invalid packet, the read finds none.
    assert_eq!(said["wrote"], libc::EINVAL);
    assert_eq!(said["read"], libc::EAGAIN);
}
