//! Giving up everything but `CAP_NET_ADMIN`, and proving it.
//!
//! Order matters: bounding set, user, capabilities, no-new-privileges,
//! Landlock (before the second thread starts), system calls (on all threads).

use std::collections::BTreeMap;
use std::fs;
use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    make_bitflags, path_beneath_rules,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::{prctl, stat};
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule,
};

use crate::config::Config;
use crate::kernel::{raw, tun};

/// Descriptors needed beside those of a batch in creation.
const DESCRIPTORS: u64 = 256;
/// What `/proc` says of every thread: `CAP_NET_ADMIN`, bit 12, and no more.
const HELD: [(&str, &str); 6] = [
    ("CapEff", "0000000000001000"),
    ("CapPrm", "0000000000001000"),
    ("CapInh", "0000000000000000"),
    ("CapAmb", "0000000000000000"),
    ("NoNewPrivs", "1"),
    ("Seccomp", "2"),
];

/// Whether our user ids are not the machine's own.
pub(crate) fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let words: Vec<&str> = map.split_whitespace().collect();
    words != ["0", "0", "4294967295"]
}

/// Makes what we inherited harmless: file modes, limits, descriptors, the working directory.
pub(crate) fn settle(keep_descriptors: u64) -> io::Result<()> {
    stat::umask(stat::Mode::from_bits_truncate(0o077));
    std::env::set_current_dir("/")?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = setrlimit(
        Resource::RLIMIT_NOFILE,
        soft.max(DESCRIPTORS),
        hard.max(DESCRIPTORS),
    );
    let needed = format!("the limit of open files is {soft}, {DESCRIPTORS} are needed: raise it");
    raised.map_err(|_| io::Error::other(needed))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(raw::close_from(3 + keep_descriptors)?)
}

/// Becomes the helper's user with `CAP_NET_ADMIN` and nothing else.
pub(crate) fn drop_privileges(config: &Config) -> io::Result<()> {
    let keep = CapsHashSet::from([Capability::CAP_NET_ADMIN]);
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(error)? {
        for cap in caps::all().into_iter().filter(|c| !keep.contains(c)) {
            // Capabilities newer than the running kernel cannot be dropped, nor held.
            let _ = caps::drop(None, CapSet::Bounding, cap);
        }
    }
    if geteuid().is_root() {
        prctl::set_keepcaps(true)?;
        match setgroups(&[]) {
            // A user namespace without gid maps has no groups to give up.
            Err(nix::Error::EPERM) if in_user_namespace() => {}
            other => other?,
        }
        let uid = Uid::from_raw(config.helper.uid);
        let gid = Gid::from_raw(config.helper.gid);
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
    }
    let _ = caps::clear(None, CapSet::Ambient);
    let needed = "no CAP_NET_ADMIN: start it as root, or with that capability in its unit";
    let refused = |_| io::Error::new(io::ErrorKind::PermissionDenied, needed);
    caps::set(None, CapSet::Effective, &keep).map_err(refused)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(error)?;
    caps::clear(None, CapSet::Inheritable).map_err(error)?;
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)?;
    Ok(())
}

/// Confines this thread, and those it starts, to the files it needs; execution is never granted.
pub(crate) fn files(config: &Config) -> io::Result<()> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let change = read | AccessFs::WriteFile;
    let confined = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(ABI::V1))?
            .create()?
            .add_rules(path_beneath_rules(["/proc"], read))?
            .add_rules(path_beneath_rules([tun::DEVICE, "/proc/sys/net"], change))?
            .add_rules(path_beneath_rules(
                [&config.state],
                change | AccessFs::MakeReg,
            ))?
            .restrict_self()
    };
    let confined = confined().map_err(error::<RulesetError>)?;
    if confined.ruleset == RulesetStatus::NotEnforced {
        say!(warning: "this kernel has no Landlock: files are guarded by ownership alone");
    }
    Ok(())
}

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

fn error<E: std::fmt::Display>(e: E) -> io::Error {
    io::Error::other(e.to_string())
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

/// The system calls that remain, on every thread; any other ends the process.
pub(crate) fn calls() -> io::Result<()> {
    let arch = std::env::consts::ARCH.try_into().map_err(error)?;
    let (otherwise, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let rules = rules().map_err(error)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, arch).map_err(error)?;
    let program: BpfProgram = filter.try_into().map_err(error)?;
    seccompiler::apply_filter_all_threads(&program).map_err(error)
}

/// Reads back, for every thread, that it holds what it should and no more.
pub(crate) fn prove() -> io::Result<()> {
    for task in fs::read_dir("/proc/self/task")? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        for (name, wanted) in HELD {
            let value = |l| str::strip_prefix(l, name)?.strip_prefix(":\t");
            let found = status.lines().find_map(value).unwrap_or_default();
            if found != wanted {
                let why = format!("confinement failed: {name} is {found}, not {wanted}");
                return Err(io::Error::other(why));
            }
        }
    }
    Ok(())
}
