//! The system calls that remain, on every thread; any other ends the process.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule,
};

use crate::kernel::tun;

macro_rules! numbers {
    ($($call:ident)*) => { [$(libc::$call),*] };
}

/// Allowed whatever their arguments.
const PLAIN: [libc::c_long; 33] = numbers![
    SYS_read SYS_write SYS_writev SYS_close SYS_openat SYS_newfstatat SYS_statx SYS_lseek
    SYS_fcntl SYS_fsync SYS_getdents64 SYS_ppoll SYS_poll SYS_accept4
    SYS_sendto SYS_sendmsg SYS_recvmsg SYS_getsockopt SYS_futex SYS_clock_nanosleep
    SYS_clock_gettime SYS_getrandom SYS_mmap SYS_munmap SYS_mremap SYS_madvise SYS_brk
    SYS_sigaltstack SYS_rt_sigprocmask SYS_rt_sigreturn SYS_restart_syscall SYS_exit
    SYS_exit_group
];

fn error(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("system call filter: {e}"))
}

/// `ioctl` by request, `mprotect` without execution.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let when = |argument, op, value| {
        let condition = Condition::new(argument, Len::Dword, op, value)?;
        SeccompRule::new(vec![condition])
    };
    let ioctls = tun::REQUESTS.map(|request| when(1, Op::Eq, request));
    let no_exec = when(2, Op::MaskedEq(libc::PROT_EXEC as u64), 0)?;
    let mut rules = BTreeMap::from(PLAIN.map(|call| (call, Vec::new())));
    rules.insert(
        libc::SYS_ioctl,
        ioctls.into_iter().collect::<Result<_, _>>()?,
    );
    rules.insert(libc::SYS_mprotect, vec![no_exec]);
    Ok(rules)
}

pub(crate) fn apply() -> io::Result<()> {
    let arch = std::env::consts::ARCH.try_into().map_err(error)?;
    let (otherwise, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let rules = rules().map_err(error)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, arch).map_err(error)?;
    let program: BpfProgram = filter.try_into().map_err(error)?;
    seccompiler::apply_filter_all_threads(&program).map_err(error)
}
