//! The helper's own cage, tried from inside: each call is made by the helper's
//! process itself, as smuggled-in code would make it.

use std::ffi::CStr;
use std::fs;

use nix::sys::signal::Signal;
use rvpn_lab::attack::inject::{Injected, TEXT, inject};
use rvpn_lab::{Helper, Lab};

const NONE: u64 = u64::MAX;
/// The directory of relative paths, as an argument: this one.
const HERE: u64 = (libc::AT_FDCWD as i64).cast_unsigned();

/// Refused by the list of system calls, which ends the process. The arguments
/// would do no harm where a call was let through.
const REFUSED: [(&str, i64, [u64; 6]); 29] = [
    ("execve", libc::SYS_execve, [0; 6]),
    ("execveat", libc::SYS_execveat, [NONE, 0, 0, 0, 0, 0]),
    ("fork", libc::SYS_clone, [0, 0, 0, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, [0; 6]),
    ("a socket of IPv4", libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
    ("a raw socket", libc::SYS_socket, [2, 3, 1, 0, 0, 0]),
    ("a packet socket", libc::SYS_socket, [17, 3, 0, 0, 0, 0]),
    (
        "another netlink socket",
        libc::SYS_socket,
        [16, 3, 0, 0, 0, 0],
    ),
    ("connect", libc::SYS_connect, [NONE, 0, 0, 0, 0, 0]),
    ("bind", libc::SYS_bind, [NONE, 0, 0, 0, 0, 0]),
    ("setsockopt", libc::SYS_setsockopt, [NONE, 0, 0, 0, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [16, 0, 0, 0, 0, 0]),
    (
        "process_vm_writev",
        libc::SYS_process_vm_writev,
        [NONE, 0, 0, 0, 0, 0],
    ),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [NONE, 0, 0, 0, 0, 0]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0; 6]),
    ("unshare", libc::SYS_unshare, [0x0200, 0, 0, 0, 0, 0]),
    ("setns", libc::SYS_setns, [NONE, 0, 0, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, [99, 0, 0, 0, 0, 0]),
    ("keyctl", libc::SYS_keyctl, [99, 0, 0, 0, 0, 0]),
    (
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        [1, 0, 0, 0, 0, 0],
    ),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
    ("init_module", libc::SYS_init_module, [0; 6]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 6]),
    ("setresuid", libc::SYS_setresuid, [0; 6]),
    ("capset", libc::SYS_capset, [0; 6]),
    ("prctl", libc::SYS_prctl, [4, 0, 0, 0, 0, 0]),
    (
        "mprotect to execute",
        libc::SYS_mprotect,
        [0, 0, 4, 0, 0, 0],
    ),
    (
        "a terminal's ioctl",
        libc::SYS_ioctl,
        [0, 0x5412, 0, 0, 0, 0],
    ),
];

/// Let through by the list, refused by what the paths allow.
const PATHS: [(&CStr, i32); 8] = [
    (c"/etc/passwd", libc::O_RDONLY),
    (c"/etc/passwd", libc::O_WRONLY),
    (
        c"/tmp/of-the-helpers-making",
        libc::O_WRONLY | libc::O_CREAT,
    ),
    (c"/proc/1/mem", libc::O_RDWR),
    (c"/proc/1/ns/net", libc::O_RDONLY),
    (c"/proc/sys/kernel/core_pattern", libc::O_WRONLY),
    (c"/dev/zero", libc::O_RDWR),
    (c"/bin/sh", libc::O_RDONLY),
];

#[test]
fn hlp_20_what_the_helper_itself_may_not_do() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "slots = 1\nmax-slots = 1\n");
    helper.start(&lab.gw);
    // Calls of its own day pass in this way too, so the others fail for no other reason.
    let allowed = [
        (
            libc::SYS_lseek,
            [NONE, 0, 0, 0, 0, 0],
            -i64::from(libc::EBADF),
        ),
        (
            libc::SYS_close,
            [NONE, 0, 0, 0, 0, 0],
            -i64::from(libc::EBADF),
        ),
        (
            libc::SYS_munmap,
            [1, 4096, 0, 0, 0, 0],
            -i64::from(libc::EINVAL),
        ),
        (
            libc::SYS_ioctl,
            [NONE, 0x4004_54ca, 0, 0, 0, 0],
            -i64::from(libc::EBADF),
        ),
    ];
    for (number, arguments, answer) in allowed {
        let got = inject(helper.pid(), number, arguments, None);
        assert_eq!(got, Injected::Returned(answer), "call {number}");
    }
    for (path, flags) in PATHS {
        let arguments = [HERE, TEXT, u64::from(flags.cast_unsigned()), 0o600, 0, 0];
        let got = inject(helper.pid(), libc::SYS_openat, arguments, Some(path));
        let refused = [libc::EACCES, libc::EPERM].map(|e| Injected::Returned(-i64::from(e)));
        assert!(refused.contains(&got), "{path:?}: {got:?}");
    }
    assert!(fs::metadata("/tmp/of-the-helpers-making").is_err());
    // After all this it serves.
    assert_eq!(helper.connect().describe().map(|d| d.slots).ok(), Some(1));

    let mut wrong = Vec::new();
    for (name, number, arguments) in REFUSED {
        let got = inject(helper.pid(), number, arguments, None);
        if got == Injected::Killed(Signal::SIGSYS) {
            helper.kill();
            helper.start(&lab.gw);
        } else {
            wrong.push(format!("{name}: {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
