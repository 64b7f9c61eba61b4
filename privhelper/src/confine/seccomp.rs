//! The system calls that remain, on every thread; any other ends the process.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule,
};

use crate::kernel::tun;

/// Allowed whatever their arguments.
const PLAIN: [libc::c_long; 35] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_fsync,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_getdents64,
    libc::SYS_ppoll,
    libc::SYS_poll,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_getsockopt,
    libc::SYS_futex,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn error(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("system call filter: {e}"))
}

/// `ioctl` by request, `mprotect` without execution.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        PLAIN.iter().map(|&n| (n, Vec::new())).collect();
    let ioctls = tun::REQUESTS
        .iter()
        .map(|&r| SeccompRule::new(vec![Condition::new(1, Len::Dword, Op::Eq, r)?]))
        .collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_ioctl, ioctls);
    let exec = libc::PROT_EXEC as u64;
    let no_exec = SeccompRule::new(vec![Condition::new(2, Len::Dword, Op::MaskedEq(exec), 0)?])?;
    rules.insert(libc::SYS_mprotect, vec![no_exec]);
    Ok(rules)
}

pub(crate) fn apply() -> io::Result<()> {
    let arch = std::env::consts::ARCH.try_into().map_err(error)?;
    let filter = SeccompFilter::new(
        rules().map_err(error)?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )
    .map_err(error)?;
    let program: BpfProgram = filter.try_into().map_err(error)?;
    seccompiler::apply_filter_all_threads(&program).map_err(error)
}
