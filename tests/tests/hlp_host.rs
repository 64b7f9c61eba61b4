//! The helper on its host: what it says to the kernel, and what other processes,
//! files and names there cannot make it do.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};

use rvpn_ipc::{Client, ClientError, seqpacket};
use rvpn_lab::attack::evil;
use rvpn_lab::boundary::{all_free, setup, two_users, when_free};
use rvpn_lab::helper::{as_user, faulty, give};
use rvpn_lab::read_back::devices;
use rvpn_lab::topology::UP4;
use rvpn_lab::{Helper, Lab, Tunnel, packet, wait_until};
use serde_json::Value;

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
