//! The system calls that remain.
//!
//! What an event loop over sockets and TUN descriptors, a TLS library, an
//! embedded database and threads need. `ioctl` is allowed by request, so that a
//! TUN can be read and written but not changed; `socket` by family, type and
//! protocol; `clone` for threads alone; no memory becomes executable.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule,
};

use crate::Refusal;

/// Allowed whatever their arguments. A test holds that each is used.
const PLAIN: &[libc::c_long] = &[
    // Descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_eventfd2,
    // Files: the database, the counters, certificates read again.
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_flock,
    libc::SYS_fchmod,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    // Sockets that are made already.
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
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Threads and memory.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    // Signals and the end.
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_uname,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Forms of the same that only some architectures have. The C library of today
/// uses part of these; an older or another one the rest.
#[cfg(target_arch = "x86_64")]
const OLDER: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[libc::c_long] = &[
    libc::SYS_faccessat,
    libc::SYS_readlinkat,
    libc::SYS_renameat,
    libc::SYS_unlinkat,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
];

/// Allowed with some arguments only; see [`rules`].
const BY_ARGUMENT: &[libc::c_long] = &[
    libc::SYS_ioctl,
    libc::SYS_clone,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_prctl,
    libc::SYS_tgkill,
];

/// Every call that is let through, with some arguments at least.
pub fn allowed() -> impl Iterator<Item = libc::c_long> {
    [PLAIN, OLDER, BY_ARGUMENT].into_iter().flatten().copied()
}

/// `ioctl` requests that only look, and the one that makes a socket non-blocking.
const LOOKING: [u64; 7] = [
    libc::TCGETS,
    libc::TIOCGWINSZ,
    // As SIOCINQ and SIOCOUTQ, the queues of a socket.
    libc::FIONREAD,
    libc::TIOCOUTQ,
    libc::FIONBIO,
    TUNGETFEATURES,
    TUNGETIFF,
];
const TUNGETFEATURES: u64 = 0x8004_54cf;
const TUNGETIFF: u64 = 0x8004_54d2;

/// Names a mapping; nothing else is done with it.
const PR_SET_VMA: u64 = 0x5356_4d41;
/// The socket type without its flags.
const SOCK_TYPE: u64 = 0xf;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn error(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}

/// Widens a C constant, which is never negative here.
fn wide(constant: libc::c_int) -> u64 {
    u64::from(constant.cast_unsigned())
}

fn equal(arg: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    values
        .iter()
        .map(|&v| SeccompRule::new(vec![Condition::new(arg, Len::Dword, Op::Eq, v)?]))
        .collect()
}

fn masked(arg: u8, mask: u64, value: u64) -> Result<Condition, BackendError> {
    Condition::new(arg, Len::Dword, Op::MaskedEq(mask), value)
}

fn rules() -> Result<Rules, BackendError> {
    let mut rules: Rules = [PLAIN, OLDER]
        .into_iter()
        .flatten()
        .map(|&n| (n, Vec::new()))
        .collect();
    rules.insert(libc::SYS_ioctl, equal(1, &LOOKING)?);

    // Threads, not processes, and in no namespace of their own.
    let thread = wide(libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND);
    let apart = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_PTRACE
        | libc::CLONE_PIDFD;
    let flags = masked(0, thread | wide(apart), thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![flags])?]);

    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let no_code = masked(2, wide(libc::PROT_EXEC), 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![no_code])?]);
    }

    let unix = Condition::new(0, Len::Dword, Op::Eq, wide(libc::AF_UNIX))?;
    let mut sockets = Vec::new();
    for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let kind = masked(1, SOCK_TYPE, wide(kind))?;
        sockets.push(SeccompRule::new(vec![unix.clone(), kind])?);
    }
    for family in [libc::AF_INET, libc::AF_INET6] {
        // The protocol is named, or else it is the type's own: no SCTP, no MPTCP, no ping socket.
        for (kind, protocol) in [
            (libc::SOCK_STREAM, 0),
            (libc::SOCK_STREAM, libc::IPPROTO_TCP),
            (libc::SOCK_DGRAM, 0),
            (libc::SOCK_DGRAM, libc::IPPROTO_UDP),
        ] {
            sockets.push(SeccompRule::new(vec![
                Condition::new(0, Len::Dword, Op::Eq, wide(family))?,
                masked(1, SOCK_TYPE, wide(kind))?,
                Condition::new(2, Len::Dword, Op::Eq, wide(protocol))?,
            ])?);
        }
    }
    rules.insert(libc::SYS_socket, sockets);
    rules.insert(libc::SYS_socketpair, vec![SeccompRule::new(vec![unix])?]);

    rules.insert(
        libc::SYS_prctl,
        equal(0, &[wide(libc::PR_SET_NAME), PR_SET_VMA])?,
    );
    // A process may end itself (abort); it signals nobody else.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, equal(0, &[own])?);
    Ok(rules)
}

fn install(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> io::Result<()> {
    let arch: seccompiler::TargetArch = std::env::consts::ARCH.try_into().map_err(error)?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).map_err(error)?;
    let program: BpfProgram = filter.try_into().map_err(error)?;
    seccompiler::apply_filter_all_threads(&program).map_err(error)
}

fn errno(number: libc::c_int) -> SeccompAction {
    SeccompAction::Errno(number.cast_unsigned())
}

/// Of several filters the strictest answer counts, so what an earlier one refuses
/// may stand in the list of the last.
pub(crate) fn apply(refusal: Refusal) -> io::Result<()> {
    let mut rules = rules().map_err(error)?;
    // The C library tries clone3 first, and falls back when told that there is none.
    let absent = Rules::from([(libc::SYS_clone3, Vec::new())]);
    install(absent, SeccompAction::Allow, errno(libc::ENOSYS))?;
    rules.insert(libc::SYS_clone3, Vec::new());
    let otherwise = match refusal {
        Refusal::Error => errno(libc::EPERM),
        Refusal::Kill => {
            // The resolver asks for the host's addresses, and does without an answer.
            let asking = equal(0, &[wide(libc::AF_NETLINK)]).map_err(error)?;
            let asked = Rules::from([(libc::SYS_socket, asking.clone())]);
            install(asked, SeccompAction::Allow, errno(libc::EPERM))?;
            rules.entry(libc::SYS_socket).or_default().extend(asking);
            SeccompAction::KillProcess
        }
    };
    install(rules, otherwise, SeccompAction::Allow)
}
