//! The helper's boundary: what a taken-over gateway, another user, and a
//! hostile environment cannot do.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rvpn_ipc::frame::{REPLY_LEN, REQUEST_LEN};
use rvpn_ipc::{Client, ClientError, Key, Kind, Op, Request, Status, seqpacket};
use rvpn_lab::helper::{as_user, bin, faulty, field, give};
use rvpn_lab::read_back::{devices, elements, rules_alone};
use rvpn_lab::topology::{UP4, many_uids};
use rvpn_lab::{Helper, Lab, Tunnel, packet, wait_until, wait_within};
use serde_json::Value;

fn setup(config: &str) -> (Lab, Helper) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, config);
    (lab, helper)
}

#[track_caller]
fn two_users() {
    assert!(
        many_uids(),
        "this case needs two users: run it as root (sudo ./dev-bin/test)"
    );
}

fn evil_command(helper: &Helper, attack: &str, number: u64) -> Command {
    let mut c = Command::new(bin("evil-gw"));
    c.arg(&helper.socket)
        .arg(helper.uid.to_string())
        .arg(helper.gateway_uid.to_string());
    c.arg(attack).arg(number.to_string());
    c
}

#[track_caller]
fn evil(lab: &Lab, helper: &Helper, attack: &str, number: u64) -> Value {
    let out = lab.gw.output(&mut evil_command(helper, attack, number));
    let (text, errors) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(
        out.status.success(),
        "{attack}: {errors}; helper: {}",
        helper.log()
    );
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{attack}: {e}: {text}"))
}

#[track_caller]
fn all_free(client: &mut Client) {
    wait_until("every slot is free", || {
        let d = client.describe().unwrap();
        d.free == d.slots
    });
}

/// Acquires as soon as there is a free slot.
fn when_free(client: &mut Client, key: u8) -> Tunnel {
    let key = Key([key; 16]);
    let mut got = None;
    wait_until("a slot is free", || {
        match client.acquire(key, Kind::Both, 0) {
            Ok(lease) => {
                got = Some(Tunnel::new(key, lease));
                true
            }
            Err(ClientError::Refused(r)) => {
                assert_eq!(r.status, Status::NoCapacity);
                false
            }
            Err(e) => panic!("{e}"),
        }
    });
    got.unwrap()
}

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

#[test]
fn hlp_11_no_other_way_to_a_device() {
    two_users();
    let (lab, helper) = setup("");
    let said = evil(&lab, &helper, "cage", helper.pid().into());
    assert_eq!(said["tried"]["/dev/net/tun"], libc::EACCES);
    // Without the cage the owner still stands in the way of attaching by name.
    let attached = lab.gw.run(|| {
        rvpn_lab::ns::become_user(helper.gateway_uid);
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        let mut request = [0_u8; 40];
        request[..3].copy_from_slice(b"rv0");
        request[16..18].copy_from_slice(&0x5001_u16.to_ne_bytes());
        rvpn_lab::raw::ioctl_buffer(file.as_fd(), 0x4004_54ca, &mut request)
    });
    assert_eq!(attached.unwrap_err().raw_os_error(), Some(libc::EPERM));
}

/// Runs the helper under strace with a load of leases; the trace, by line.
fn traced(config: &str) -> Vec<String> {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, config);
    let trace = lab.dir.join("trace").display().to_string();
    helper.wrapped_in(&[
        "strace",
        "-f",
        "-qq",
        "-s",
        "200",
        "-o",
        &trace,
        "-e",
        "trace=sendto,socket,openat,open,ioctl,execve,connect,bind,sendmsg,mount,setsockopt",
    ]);
    helper.start(&lab.gw);
    let mut client = helper.connect();
    for n in 0..60 {
        let t = when_free(&mut client, n % 5 + 1);
        let (slot, generation) = (t.reply.slot, t.reply.generation);
        drop(t);
        client.release(slot, generation).unwrap();
    }
    all_free(&mut client);
    drop(client);
    helper.kill();
    fs::read_to_string(&trace)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn hlp_12_every_message_to_the_kernel_is_of_the_model() {
    let lines = traced("");
    let sent: Vec<&String> = lines.iter().filter(|l| l.contains("sendto(")).collect();
    assert!(sent.len() > 500, "{} messages", sent.len());
    let kinds = [
        "RTM_NEWLINK",
        "RTM_GETLINK",
        "RTM_DELLINK",
        "RTM_NEWADDR",
        "RTM_GETADDR",
        "RTM_DELADDR",
        "RTM_NEWROUTE",
        "RTM_DELROUTE",
        "RTM_GETROUTE",
        "NFNL_MSG_BATCH_BEGIN",
        "NFNL_SUBSYS_NFTABLES<<8|NFT_MSG_GETRULE",
        "NFNL_SUBSYS_NFTABLES<<8|NFT_MSG_GETTABLE",
        "NFNL_SUBSYS_CTNETLINK<<8|IPCTNL_MSG_CT_DELETE",
        "NFNL_SUBSYS_CTNETLINK<<8|IPCTNL_MSG_CT_GET",
    ];
    for line in &sent {
        assert!(
            kinds
                .iter()
                .any(|k| line.contains(&format!("nlmsg_type={k}"))),
            "not of the model: {line}"
        );
        // What a lease's IPv6 address brought along goes with it, by the device's index.
        assert!(
            !line.contains("RTM_DELROUTE")
                || line.contains("if_nametoindex(\"rv") && line.contains("fd52:5650:1:"),
            "{line}"
        );
        assert!(
            !line.contains("RTM_NEWROUTE")
                || line.contains("RTN_LOCAL") && line.contains("10.63.192.0")
                || line.contains("ffff"),
            "{line}"
        );
    }
    // Names in ioctls and aliases are the pool's own.
    for line in lines.iter().filter(|l| l.contains("TUNSETIFF")) {
        assert!(line.contains("TUNSETIFF"), "{line}");
    }
    for line in lines
        .iter()
        .filter(|l| l.contains("/net/ipv") && l.contains("O_WRONLY"))
    {
        let name = line
            .split("/conf/")
            .nth(1)
            .and_then(|r| r.split('/').next())
            .unwrap_or("");
        let ours = name.strip_prefix("rv").is_some_and(|n| {
            !n.is_empty() && n.len() <= 5 && n.bytes().all(|b| b.is_ascii_digit())
        });
        assert!(ours || name == "wan0", "a sysctl of {name}: {line}");
    }
}

#[test]
fn hlp_13_netlink_from_another_process() {
    let (lab, helper) = setup("");
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 1);
    // To every port the helper has: a forged death of the device, and of the table.
    let ports: Vec<u32> = {
        let text = lab
            .gw
            .run(|| fs::read_to_string("/proc/thread-self/net/netlink"))
            .unwrap();
        text.lines()
            .skip(1)
            .filter_map(|l| l.split_whitespace().nth(2)?.parse().ok())
            .filter(|p| *p != 0)
            .collect()
    };
    assert!(ports.len() >= 4, "{ports:?}");
    for protocol in [libc::NETLINK_ROUTE, libc::NETLINK_NETFILTER] {
        for port in &ports {
            for kind in [libc::RTM_DELLINK, (10 << 8) | 2, libc::NLMSG_ERROR as u16] {
                let _ = lab.gw.run(|| {
                    rvpn_lab::raw::netlink_to(protocol, *port, kind, &a.reply.slot.to_ne_bytes())
                });
            }
        }
    }
    for n in 0..20 {
        let t = when_free(&mut client, 2 + n);
        client.release(t.reply.slot, t.reply.generation).unwrap();
    }
    assert!(
        client.take_notice().is_none(),
        "a forged message was believed"
    );
    a.send(&packet::echo(&a.v4(2), UP4, 1, 1, b"still here"));
    a.expect(b"still here");
}

#[test]
fn hlp_14_a_name_changes_hands_while_a_device_is_made() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "slots = 1\n");
    helper.program(faulty(), &[("RVPN_FAULT", "created:1500")]);
    helper.launch(&lab.gw);
    // Between making and configuring: the device is removed and another takes its name.
    wait_until("the device is made", || devices(&lab.gw) == ["rv0"]);
    lab.gw.ip("link del rv0");
    lab.gw.ip("link add rv0 type veth peer name other0");
    let status = helper.ended();
    assert_eq!(status.code(), Some(78), "{}", helper.log());
    let l = rvpn_lab::read_back::ip_json(&lab.gw, "-d link show rv0");
    assert_eq!(
        l[0]["group"], "default",
        "the other's device was touched: {l}"
    );
    assert_eq!(l[0]["ifalias"], Value::Null);
    assert_eq!(l[0]["linkinfo"]["info_kind"], "veth");
}

#[test]
fn hlp_15_foreign_devices_with_our_names() {
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    for (make, kind) in [
        ("link add rv3 type bridge", "bridge"),
        ("link add rv3 type veth peer name other0", "veth"),
        ("tuntap add dev rv3 mode tun", "tun"),
    ] {
        lab.gw.ip(make);
        lab.gw.ip("link set rv3 up");
        let before =
            rvpn_lab::read_back::ip_json(&lab.gw, "-d link show rv3")[0]["ifindex"].clone();
        for verb in ["serve", "provision"] {
            let (code, text) = helper.run(&lab.gw, verb);
            assert_eq!(code, 78, "{text}");
            assert!(
                text.contains("interface 'rv3' was not made by this helper"),
                "{text}"
            );
        }
        let (code, text) = helper.run(&lab.gw, "teardown");
        assert!(code == 0 && text.contains("kept rv3"), "{text}");
        let after = rvpn_lab::read_back::ip_json(&lab.gw, "-d link show rv3");
        assert_eq!(after[0]["ifindex"], before, "{kind} was replaced");
        assert_eq!(after[0]["linkinfo"]["info_kind"], kind);
        assert_eq!(devices(&lab.gw), ["rv3"]);
        lab.gw.ip("link del rv3");
    }
}

#[test]
fn hlp_16_the_helpers_process_is_out_of_reach() {
    two_users();
    let (lab, helper) = setup("");
    let said = evil(&lab, &helper, "cage", helper.pid().into());
    for name in [
        "kill",
        "attach",
        "pidfd_open",
        "pidfd_getfd",
        "process_vm_readv",
    ] {
        assert_eq!(said["tried"][name], libc::EPERM, "{name}");
    }
    // Without the cage: another user's process, and not dumpable.
    let pid = helper.pid();
    as_user(helper.gateway_uid, || {
        let p = u64::from(pid);
        for (call, args) in [
            (libc::SYS_kill, [p, 15, 0, 0, 0]),
            (libc::SYS_ptrace, [16, p, 0, 0, 0]),
        ] {
            assert_eq!(
                rvpn_lab::raw::syscall(call, args)
                    .unwrap_err()
                    .raw_os_error(),
                Some(libc::EPERM)
            );
        }
        let file = fs::File::open(format!("/proc/{pid}/mem"));
        assert_eq!(
            file.unwrap_err().kind(),
            std::io::ErrorKind::PermissionDenied
        );
        assert!(fs::read_dir(format!("/proc/{pid}/fd")).is_err());
    });
}

#[test]
fn hlp_17_a_hostile_environment() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "");
    let text = helper.command("serve");
    let (program, config) = (text.get_program().to_owned(), helper.config.clone());
    let shell = format!(
        "umask 0; cd /tmp; exec 7</etc/passwd 3</dev/null; ulimit -c unlimited; exec env -i LD_PRELOAD=/nonexistent.so RUST_BACKTRACE=full LISTEN_FDS=5 LISTEN_PID=1 NOTIFY_SOCKET=/nowhere PATH=/tmp '{}' serve --config '{}'",
        program.display(),
        config.display()
    );
    helper.wrapped_in(&["sh", "-c", &shell]);
    helper.start(&lab.gw);
    let pid = helper.pid();
    let links: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|e| Some(fs::read_link(e.ok()?.path()).ok()?.display().to_string()))
        .collect();
    assert!(!links.iter().any(|l| l.contains("passwd")), "{links:?}");
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap(),
        std::path::Path::new("/")
    );
    assert_eq!(helper.status_field("Umask"), "0077");
    assert!(
        fs::read_to_string(format!("/proc/{pid}/limits"))
            .unwrap()
            .lines()
            .any(|l| l.starts_with("Max core file size") && l.contains(" 0 "))
    );
    helper.kill();
    // Closed standard streams, and limits too low: it serves, or says why not.
    for (prefix, codes) in [
        ("exec <&- >&- 2>&-;", &[0, 124][..]),
        ("ulimit -n 20;", &[78, 124]),
        ("ulimit -f 0;", &[0, 69, 70, 78, 124]),
    ] {
        let shell = format!(
            "{prefix} exec timeout 2 '{}' serve --config '{}'",
            program.display(),
            config.display()
        );
        let out = lab
            .gw
            .output(Command::new("sh").args(["-c", &shell]).stdin(Stdio::null()));
        let code = out.status.code().unwrap_or(-1);
        assert!(
            codes.contains(&code),
            "{prefix} {code}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
    for arguments in [
        &["serve", "--config"][..],
        &["--config", "relative", "serve"],
        &["serve", "extra"],
        &[],
        &["serve", "--json"],
    ] {
        let out = lab.gw.output(Command::new(&program).args(arguments));
        assert_eq!(out.status.code(), Some(1), "{arguments:?}");
        assert!(
            String::from_utf8_lossy(&out.stderr).contains("usage:"),
            "{arguments:?}"
        );
    }
    // A configuration others could have written is not read.
    fs::set_permissions(&config, fs::Permissions::from_mode(0o666)).unwrap();
    let out = lab.gw.output(
        Command::new(&program)
            .args(["check", "--config"])
            .arg(&config),
    );
    assert_eq!(out.status.code(), Some(78));
    assert!(
        String::from_utf8_lossy(&out.stderr).contains("others may write it"),
        "{out:?}"
    );
}

#[test]
fn hlp_18_a_socket_in_the_helpers_place() {
    two_users();
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "");
    let dir = helper.socket.parent().unwrap().to_owned();
    // A directory somebody else owns or can write is refused.
    fs::create_dir_all(&dir).unwrap();
    give(&dir, 65_030);
    let (code, text) = helper.run(&lab.gw, "serve");
    assert!(
        code == 78 && text.contains("must be a directory of root's"),
        "{code} {text}"
    );
    give(&dir, 0);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    let (code, text) = helper.run(&lab.gw, "serve");
    assert!(
        code == 78 && text.contains("nobody else can write"),
        "{code} {text}"
    );
    fs::remove_dir_all(&dir).unwrap();
    std::os::unix::fs::symlink("/tmp", &dir).unwrap();
    let (code, text) = helper.run(&lab.gw, "serve");
    assert!(
        code == 78 && text.contains("must be a directory"),
        "{code} {text}"
    );
    fs::remove_file(&dir).unwrap();
    helper.start(&lab.gw);
    let meta = fs::metadata(&dir).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o777),
        (0, helper.gateway_uid, 0o750)
    );
    // The client half knows a fake by its user.
    let fake = lab.dir.join("fake.sock");
    let _listener = seqpacket::listen(&fake, 1).unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o666)).unwrap();
    let refused = as_user(helper.gateway_uid, || {
        Client::connect(&fake, helper.uid, false)
    });
    assert!(
        matches!(refused, Err(ClientError::WrongPeer { found: 0, .. })),
        "{refused:?}"
    );
}

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
fn hlp_20_system_calls_beyond_the_need() {
    let (lab, helper) = setup("");
    let said = evil(&lab, &helper, "cage", helper.pid().into());
    for (name, what) in said["tried"].as_object().unwrap() {
        let refused = *what == libc::EPERM || *what == libc::EACCES;
        assert!(refused, "{name}: {what}");
    }
    // The helper's own: under load it makes sockets at the start only, connects nowhere and executes nothing.
    let lines = traced("");
    let position = lines
        .iter()
        .position(|l| l.contains("openat") && l.contains("/proc/self/task"));
    let after = &lines[position.expect("the proof of its confinement")..];
    assert!(after.len() > 100);
    for l in after {
        assert!(
            !["execve(", "socket(", "connect(", "mount("]
                .iter()
                .any(|c| l.contains(c)),
            "{l}"
        );
        if l.contains("O_WRONLY") || l.contains("O_RDWR") {
            let allowed = ["/dev/net/tun", "/proc/sys/net/", "/helper/state/"]
                .iter()
                .any(|p| l.contains(p));
            assert!(allowed, "{l}");
        }
    }
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
    let round = |client: &mut Client, n: u32| {
        for i in 0..n {
            let key = Key([u8::try_from(i % 9 + 1).unwrap(); 16]);
            if let Ok(lease) = client.acquire(key, Kind::Packets, 0) {
                let (slot, generation) = (lease.reply.slot, lease.reply.generation);
                drop(lease);
                client.release(slot, generation).unwrap();
            }
            for _ in 0..40 {
                client.describe().unwrap();
            }
        }
        all_free(client);
    };
    round(&mut client, 200);
    let (fds, memory) = (helper.descriptors(), helper.resident());
    round(&mut client, 2_000);
    assert_eq!(helper.descriptors(), fds);
    let after = helper.resident();
    assert!(
        after <= 8 * 1024 && after <= memory + 512,
        "{memory} KiB, then {after} KiB"
    );
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
