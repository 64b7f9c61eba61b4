//! What the cage refuses, each thing shown to be possible without it.

use std::fs::{self, File, OpenOptions};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use crate::child::{Places, UID, child, errno, ioctl, landlock_version, syscall, unshare_network};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::geteuid;
use rvpn_sandbox::{Error, Policy, Refusal, enter, prove};

type Call = (&'static str, i64, [u64; 6]);

/// No pointer, and no descriptor.
const NONE: u64 = u64::MAX;

/// Each with arguments that do no harm where it is let through.
const CALLS: [Call; 64] = [
    ("execve", libc::SYS_execve, [0; 6]),
    ("execveat", libc::SYS_execveat, [NONE, 0, 0, 0, 0, 0]),
    (
        "clone with a namespace",
        libc::SYS_clone,
        [0x4000_0000 | 0x0001_0000, 0, 0, 0, 0, 0],
    ),
    ("ptrace", libc::SYS_ptrace, [16, 0, 0, 0, 0, 0]),
    (
        "process_vm_readv",
        libc::SYS_process_vm_readv,
        [NONE, 0, 0, 0, 0, 0],
    ),
    (
        "process_vm_writev",
        libc::SYS_process_vm_writev,
        [NONE, 0, 0, 0, 0, 0],
    ),
    (
        "process_madvise",
        libc::SYS_process_madvise,
        [NONE, 0, 0, 0, 0, 0],
    ),
    ("pidfd_open", libc::SYS_pidfd_open, [1, 0, 0, 0, 0, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [NONE, 0, 0, 0, 0, 0]),
    (
        "pidfd_send_signal",
        libc::SYS_pidfd_send_signal,
        [NONE, 0, 0, 0, 0, 0],
    ),
    ("kcmp", libc::SYS_kcmp, [0, 0, NONE, 0, 0, 0]),
    ("kill", libc::SYS_kill, [0, 0, 0, 0, 0, 0]),
    ("tkill", libc::SYS_tkill, [NONE, 0, 0, 0, 0, 0]),
    ("tgkill of another", libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]),
    (
        "rt_sigqueueinfo",
        libc::SYS_rt_sigqueueinfo,
        [1, 0, 0, 0, 0, 0],
    ),
    ("unshare", libc::SYS_unshare, [0x0200, 0, 0, 0, 0, 0]),
    ("setns", libc::SYS_setns, [NONE, 0, 0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0; 6]),
    ("umount2", libc::SYS_umount2, [0; 6]),
    ("pivot_root", libc::SYS_pivot_root, [0; 6]),
    ("chroot", libc::SYS_chroot, [0; 6]),
    ("fsopen", libc::SYS_fsopen, [0; 6]),
    ("open_tree", libc::SYS_open_tree, [NONE, 0, 0, 0, 0, 0]),
    (
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        [NONE, 0, 0, 0, 0, 0],
    ),
    ("bpf", libc::SYS_bpf, [99, 0, 0, 0, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [99, 0, 0, 0, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 6]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
    (
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        [1, 0, 0, 0, 0, 0],
    ),
    (
        "io_uring_enter",
        libc::SYS_io_uring_enter,
        [NONE, 0, 0, 0, 0, 0],
    ),
    ("keyctl", libc::SYS_keyctl, [99, 0, 0, 0, 0, 0]),
    ("add_key", libc::SYS_add_key, [0; 6]),
    ("request_key", libc::SYS_request_key, [0; 6]),
    ("init_module", libc::SYS_init_module, [0; 6]),
    (
        "finit_module",
        libc::SYS_finit_module,
        [NONE, 0, 0, 0, 0, 0],
    ),
    ("kexec_load", libc::SYS_kexec_load, [0, 0, 0, 0xffff, 0, 0]),
    ("setuid", libc::SYS_setresuid, [NONE, NONE, NONE, 0, 0, 0]),
    ("setgroups", libc::SYS_setgroups, [1, 1, 0, 0, 0, 0]),
    ("capset", libc::SYS_capset, [0; 6]),
    (
        "personality",
        libc::SYS_personality,
        [0xffff_ffff, 0, 0, 0, 0, 0],
    ),
    ("raising a limit", libc::SYS_prlimit64, [0, 4, 1, 0, 0, 0]),
    ("prctl: dumpable", libc::SYS_prctl, [4, 0, 0, 0, 0, 0]),
    ("prctl: seccomp", libc::SYS_prctl, [22, 99, 0, 0, 0, 0]),
    ("memfd_create", libc::SYS_memfd_create, [0; 6]),
    (
        "memory to execute",
        libc::SYS_mmap,
        [0, 4096, 5, 0x22, NONE, 0],
    ),
    (
        "mprotect to execute",
        libc::SYS_mprotect,
        [0, 0, 4, 0, 0, 0],
    ),
    (
        "pkey_mprotect",
        libc::SYS_pkey_mprotect,
        [0, 0, 4, NONE, 0, 0],
    ),
    ("splice", libc::SYS_splice, [NONE, 0, NONE, 0, 1, 0]),
    ("vmsplice", libc::SYS_vmsplice, [NONE, 0, 0, 0, 0, 0]),
    ("mknodat", libc::SYS_mknodat, [NONE, 0, 0, 0, 0, 0]),
    ("linkat", libc::SYS_linkat, [NONE, 0, NONE, 0, 0, 0]),
    ("symlinkat", libc::SYS_symlinkat, [0, NONE, 0, 0, 0, 0]),
    ("fchownat", libc::SYS_fchownat, [NONE, 0, 0, 0, 0, 0]),
    ("truncate", libc::SYS_truncate, [0; 6]),
    ("setxattr", libc::SYS_setxattr, [0; 6]),
    ("inotify_init1", libc::SYS_inotify_init1, [0; 6]),
    ("shmget", libc::SYS_shmget, [0, 0, 0, 0, 0, 0]),
    ("AF_PACKET", libc::SYS_socket, [17, 3, 0, 0, 0, 0]),
    ("AF_NETLINK", libc::SYS_socket, [16, 3, 0, 0, 0, 0]),
    ("AF_ALG", libc::SYS_socket, [38, 5, 0, 0, 0, 0]),
    ("SOCK_RAW", libc::SYS_socket, [2, 3, 1, 0, 0, 0]),
    ("ICMP by datagrams", libc::SYS_socket, [10, 2, 58, 0, 0, 0]),
    ("SCTP", libc::SYS_socket, [2, 5, 0, 0, 0, 0]),
    ("MPTCP", libc::SYS_socket, [2, 1, 262, 0, 0, 0]),
];

/// `TUNSET*`, `TUNATTACHFILTER` and their kin.
const DEVICE: [(&str, u64); 20] = [
    ("TUNSETNOCSUM", 0x4004_54c8),
    ("TUNSETDEBUG", 0x4004_54c9),
    ("TUNSETIFF", 0x4004_54ca),
    ("TUNSETPERSIST", 0x4004_54cb),
    ("TUNSETOWNER", 0x4004_54cc),
    ("TUNSETLINK", 0x4004_54cd),
    ("TUNSETGROUP", 0x4004_54ce),
    ("TUNSETOFFLOAD", 0x4004_54d0),
    ("TUNSETTXFILTER", 0x4004_54d1),
    ("TUNSETSNDBUF", 0x4004_54d4),
    ("TUNATTACHFILTER", 0x4010_54d5),
    ("TUNDETACHFILTER", 0x4010_54d6),
    ("TUNSETVNETHDRSZ", 0x4004_54d8),
    ("TUNSETQUEUE", 0x4004_54d9),
    ("TUNSETIFINDEX", 0x4004_54da),
    ("TUNSETVNETLE", 0x4004_54dc),
    ("TUNSETVNETBE", 0x4004_54de),
    ("TUNSETSTEERINGEBPF", 0x8004_54e0),
    ("TUNSETCARRIER", 0x4004_54e2),
    ("TUNGETDEVNETNS", 0x54e3),
];

fn try_all() -> Vec<(&'static str, i32)> {
    CALLS
        .iter()
        .map(|&(name, number, args)| (name, errno(syscall(number, args))))
        .collect()
}

#[test]
fn calls_beyond_the_need() {
    let places = Places::new();
    let said = child(|| {
        enter(&places.policy(Refusal::Error)).unwrap();
        try_all()
            .iter()
            .filter(|(_, e)| *e != libc::EPERM)
            .map(|(name, e)| format!("{name}: {e}\n"))
            .collect()
    });
    assert_eq!(said.whole(), "");
    // Without the cage something else is said, or done: the above does not pass for another reason.
    let said = child(|| {
        let refused = try_all();
        refused
            .iter()
            .filter(|(_, e)| *e == libc::EPERM)
            .map(|(name, _)| format!("{name}\n"))
            .collect()
    });
    if geteuid().is_root() {
        assert_eq!(said.whole(), "");
    }
}

#[test]
fn processes_cannot_be_made() {
    let places = Places::new();
    let said = child(|| {
        enter(&places.policy(Refusal::Error)).unwrap();
        let clone3 = errno(syscall(libc::SYS_clone3, [0; 6]));
        let spawned = std::process::Command::new("/bin/true").spawn();
        format!("{clone3} {}", errno(spawned))
    });
    assert_eq!(said.whole(), format!("{} {}", libc::ENOSYS, libc::EPERM));
}

#[test]
fn a_device_is_carried_but_not_changed() {
    let said = child(|| {
        unshare_network();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .unwrap();
        let mut request = [0; 64];
        request[..4].copy_from_slice(b"tun9");
        // IFF_TUN | IFF_NO_PI
        request[16..18].copy_from_slice(&0x1001_u16.to_ne_bytes());
        ioctl(file.as_fd(), 0x4004_54ca, &mut request).unwrap();
        // As root and uncaged the device obeys: it could be kept, and given away.
        let changed = errno(ioctl(file.as_fd(), 0x4004_54d4, &mut [1; 64]));
        let places = Places::new();
        enter(&places.policy(Refusal::Error)).unwrap();
        let mut refused = 0;
        for (name, request) in DEVICE {
            let e = errno(ioctl(file.as_fd(), request, &mut [0; 64]));
            assert_eq!(e, libc::EPERM, "{name}");
            refused += 1;
        }
        // The upper half of the argument is not looked at by the kernel, so it must not matter here.
        let high = errno(ioctl(
            file.as_fd(),
            0x1_0000_0000 | 0x4004_54cb,
            &mut [0; 64],
        ));
        let looked = errno(ioctl(file.as_fd(), 0x8004_54d2, &mut [0; 64]));
        format!("{changed} {refused} {high} {looked}")
    });
    assert_eq!(
        said.whole(),
        format!("0 {} {} 0", DEVICE.len(), libc::EPERM)
    );
}

#[test]
fn files_that_are_not_ones_own() {
    let places = Places::new();
    let said = child(|| {
        let truncating = |dir: &std::path::Path| {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_TRUNC)
                .open(dir.join("file"))
        };
        let whole = enter(&places.policy(Refusal::Error))
            .unwrap()
            .landlock_whole;
        let (state, config, other) = (&places.state, &places.config, &places.other);
        fs::write(state.join("new"), "x").unwrap();
        fs::rename(state.join("new"), state.join("newer")).unwrap();
        fs::remove_file(state.join("newer")).unwrap();
        assert_eq!(
            fs::read_to_string(config.join("file")).unwrap(),
            "as it was"
        );
        assert_eq!(fs::read_dir(config).unwrap().count(), 1);
        let refused = [
            (
                "write",
                errno(OpenOptions::new().write(true).open(config.join("file"))),
            ),
            ("create", errno(File::create(config.join("new")))),
            ("remove", errno(fs::remove_file(config.join("file")))),
            ("elsewhere", errno(File::open(other.join("file")))),
            ("list elsewhere", errno(fs::read_dir(other))),
            ("password file", errno(File::open("/etc/passwd"))),
            ("device", errno(File::open("/dev/net/tun"))),
            (
                "system settings",
                errno(File::open("/proc/sys/net/ipv4/ip_forward")),
            ),
            ("init's memory", errno(File::open("/proc/1/mem"))),
            (
                "move out",
                errno(fs::rename(state.join("file"), other.join("moved"))),
            ),
        ];
        for (what, e) in refused {
            assert!([libc::EACCES, libc::EXDEV].contains(&e), "{what}: {e}");
        }
        // A file opened to read is emptied by this flag alone, where truncation is not a right of its own.
        let emptied = errno(truncating(config));
        assert!(!whole || emptied == libc::EACCES, "{emptied}");
        whole.to_string()
    });
    assert_eq!(said.whole(), (landlock_version() >= 7).to_string());
    let after = fs::read_to_string(places.config.join("file")).unwrap();
    assert!(landlock_version() < 3 || after == "as it was");
    // Nothing but the cage stood in the way.
    assert!(
        child(|| {
            if geteuid().is_root() {
                nix::unistd::setuid(nix::unistd::Uid::from_raw(UID)).unwrap();
            }
            fs::write(places.config.join("file"), "changed").unwrap();
            File::open(places.other.join("file")).unwrap();
            String::new()
        })
        .whole()
        .is_empty()
    );
}

#[test]
fn sockets_and_signals_of_others() {
    if landlock_version() < 6 {
        return;
    }
    let places = Places::new();
    let said = child(|| {
        unshare_network();
        let name = SocketAddr::from_abstract_name(b"not the gateway's").unwrap();
        let _other = UnixListener::bind_addr(&name).unwrap();
        UnixStream::connect_addr(&name).unwrap();
        let open = TcpListener::bind("127.0.0.1:4001").unwrap();
        let mut policy = places.policy(Refusal::Error);
        policy.tcp_bind = Some(vec![4002]);
        policy.tcp_connect = Some(vec![4001]);
        enter(&policy).unwrap();
        TcpListener::bind("127.0.0.1:4002").unwrap();
        TcpStream::connect("127.0.0.1:4001").unwrap();
        drop(open);
        [
            errno(UnixStream::connect_addr(&name)),
            errno(TcpListener::bind("127.0.0.1:4003")),
            errno(TcpStream::connect("127.0.0.1:4002")),
        ]
        .map(|e| e.to_string())
        .join(" ")
    });
    let (eperm, eacces) = (libc::EPERM, libc::EACCES);
    assert_eq!(said.whole(), format!("{eperm} {eacces} {eacces}"));
}

#[test]
fn a_violation_ends_the_process_where_that_is_asked_for() {
    for (name, number, args) in CALLS {
        let places = Places::new();
        let said = child(|| {
            enter(&places.policy(Refusal::Kill)).unwrap();
            let _ = syscall(number, args);
            "went on".to_owned()
        });
        // The resolver asks by netlink; it is told no and lives.
        if name == "AF_NETLINK" {
            assert_eq!(said.whole(), "went on");
            continue;
        }
        let killed = matches!(said.status, WaitStatus::Signaled(_, Signal::SIGSYS, _));
        assert!(killed, "{name}: {said:?}");
    }
}

#[test]
fn what_holds_is_read_back_on_every_thread() {
    let places = Places::new();
    let root = geteuid().is_root();
    let said = child(|| {
        let report = enter(&places.policy(Refusal::Error)).unwrap();
        if root {
            assert_eq!((report.uid, report.gid), (UID, UID));
            assert!(report.bounding_empty);
        }
        let limits = fs::read_to_string("/proc/self/limits").unwrap();
        for (name, value) in [("Max core file size", "0"), ("Max open files", "512")] {
            let line = limits.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            let both: Vec<&str> = line.split_whitespace().take(2).collect();
            assert_eq!(both, [value; 2], "{name}");
        }
        // What is not dumpable belongs to root in /proc, whoever runs it.
        assert_eq!(fs::metadata("/proc/self/environ").unwrap().uid(), 0);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        prove().unwrap();
        assert_eq!(fs::read_dir("/proc/self/task").unwrap().count(), 2);
        for task in fs::read_dir("/proc/self/task").unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find(|l| l.starts_with(name)).unwrap();
                line.split_whitespace()
                    .skip(1)
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(field(set), "0000000000000000", "{set}");
            }
            if root {
                assert_eq!(field("CapBnd"), "0000000000000000");
                assert_eq!(field("Uid"), [UID; 4].map(|u| u.to_string()).join(" "));
                assert_eq!(field("Gid"), [UID; 4].map(|u| u.to_string()).join(" "));
                assert_eq!(field("Groups"), "");
            }
            assert_eq!(field("NoNewPrivs"), "1");
            assert_eq!(field("Seccomp:"), "2");
        }
        drop(go);
        other.join().unwrap().unwrap_err();
        "proven".to_owned()
    });
    assert_eq!(said.whole(), "proven");
}

#[test]
fn nothing_is_proven_without_the_cage() {
    assert!(matches!(prove(), Err(Error::NotProven { .. })));
}

#[test]
fn a_thread_too_early_or_a_root_that_would_stay_is_an_error() {
    let places = Places::new();
    let said = child(|| {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let early = std::thread::spawn(move || wait.recv());
        let refused = enter(&places.policy(Refusal::Error));
        drop(go);
        let _ = early.join();
        format!("{:?}", refused.unwrap_err())
    });
    assert_eq!(said.whole(), "Threads(2)");
    if geteuid().is_root() {
        for user in [None, Some((0, 0)), Some((0, UID))] {
            let policy = Policy {
                user,
                ..Policy::default()
            };
            let said = child(|| format!("{:?}", enter(&policy).unwrap_err()));
            assert_eq!(said.whole(), "Root");
        }
        // Root is kept for later in the saved user.
        let said = child(|| {
            let uid = nix::unistd::Uid::from_raw(UID);
            nix::unistd::setresuid(uid, uid, nix::unistd::Uid::from_raw(0)).unwrap();
            enter(&Policy::default()).map_or_else(|e| e.to_string(), |r| format!("{r:?}"))
        });
        assert!(said.whole().contains("started as root"));
    }
}
