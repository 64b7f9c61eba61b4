//! The system calls that remain.
//!
//! What an event loop over sockets and TUN descriptors, a TLS library, an
//! embedded database and threads need. `ioctl` is allowed by request, so that a
//! TUN can be read and written but not changed; `socket` by family and type;
//! `clone` for threads alone; no memory becomes executable.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule,
};

use crate::Refusal;

/// Allowed whatever their arguments.
pub const ALLOWED: [libc::c_long; 87] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_renameat,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_access,
    libc::SYS_faccessat2,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_dup,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// `ioctl` requests that only look: terminal checks, queue lengths, the name of a TUN.
const LOOKING: [u64; 7] = [
    0x5401,
    0x5413,
    0x541b,
    0x5411,
    0x5421,
    0x8004_54cf,
    0x8004_54d2,
];

fn error(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn equal(arg: u8, values: &[u64]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    values
        .iter()
        .map(|&v| SeccompRule::new(vec![Condition::new(arg, Len::Dword, Op::Eq, v)?]))
        .collect()
}

fn rules() -> Result<Rules, seccompiler::BackendError> {
    let mut rules: Rules = ALLOWED.iter().map(|&n| (n, Vec::new())).collect();
    rules.insert(libc::SYS_ioctl, equal(1, &LOOKING)?);
    // Threads, not processes: glibc tries clone3 first and falls back when there is none.
    let thread = (libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND) as u64;
    let no_namespace = Condition::new(0, Len::Qword, Op::MaskedEq(thread), thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_namespace])?]);
    let exec = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(
            call,
            vec![SeccompRule::new(vec![Condition::new(
                2,
                Len::Dword,
                Op::MaskedEq(exec),
                0,
            )?])?],
        );
    }
    let mut sockets = Vec::new();
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            // The type without its flags.
            let kind = Condition::new(1, Len::Dword, Op::MaskedEq(0xf), kind as u64)?;
            sockets.push(SeccompRule::new(vec![
                Condition::new(0, Len::Dword, Op::Eq, family as u64)?,
                kind,
            ])?);
        }
    }
    rules.insert(libc::SYS_socket, sockets);
    // Names of threads, the anonymous memory they are known by, and looking at ourselves.
    rules.insert(
        libc::SYS_prctl,
        equal(
            0,
            &[
                libc::PR_SET_NAME as u64,
                0x5356_4d41,
                libc::PR_GET_DUMPABLE as u64,
            ],
        )?,
    );
    // Reading limits, never setting them; signals to ourselves (abort) only by thread.
    rules.insert(
        libc::SYS_prlimit64,
        vec![SeccompRule::new(vec![Condition::new(
            2,
            Len::Qword,
            Op::Eq,
            0,
        )?])?],
    );
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, equal(0, &[own])?);
    Ok(rules)
}

pub(crate) fn apply(refusal: Refusal) -> io::Result<()> {
    let arch: seccompiler::TargetArch = std::env::consts::ARCH.try_into().map_err(error)?;
    let otherwise = match refusal {
        Refusal::Error => SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        Refusal::Kill => SeccompAction::KillProcess,
    };
    // Before the list: the one call whose refusal must say "not here".
    let absent = Rules::from([(libc::SYS_clone3, Vec::new())]);
    let first = SeccompFilter::new(
        absent,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
        arch,
    )
    .map_err(error)?;
    let mut all = rules().map_err(error)?;
    all.insert(libc::SYS_clone3, Vec::new());
    let first: BpfProgram = first.try_into().map_err(error)?;
    seccompiler::apply_filter_all_threads(&first).map_err(error)?;
    let second = SeccompFilter::new(all, otherwise, SeccompAction::Allow, arch).map_err(error)?;
    let second: BpfProgram = second.try_into().map_err(error)?;
    seccompiler::apply_filter_all_threads(&second).map_err(error)
}
