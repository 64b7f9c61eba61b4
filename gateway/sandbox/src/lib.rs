//! The cage the gateway locks itself into before it reads a first byte from a stranger.
//!
//! No capability, no way to gain one, no file but its own, no system call that
//! a program of sockets and files does not need. Entered once, before there is
//! a second thread; whatever cannot be applied is an error, never a warning.

mod calls;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus,
};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

pub use calls::ALLOWED;

/// What happens to a system call that is not allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refusal {
    /// It fails with `EPERM`: what a service under attack wants.
    #[default]
    Error,
    /// The process ends: what a test wants, which would otherwise miss it.
    Kill,
}

/// What the caged program keeps.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Read, but never write: certificates, configuration, resolver files.
    pub read: Vec<PathBuf>,
    /// Read, write, create and remove beneath: the state directory.
    pub write: Vec<PathBuf>,
    /// Directories of Unix sockets to connect to.
    pub sockets: Vec<PathBuf>,
    /// User and group to become when started as root.
    pub user: Option<(u32, u32)>,
    /// Open files, when the limit is to change.
    pub descriptors: Option<u64>,
    pub refusal: Refusal,
}

/// Why the cage is not shut. The program must not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("sandbox: {0}: {1}")]
    Step(&'static str, String),
    #[error("sandbox: started as root: name the user to become (user = ... in the configuration)")]
    Root,
    #[error(
        "sandbox: Landlock is not fully enforced by this kernel: Linux 5.13 or newer is needed"
    )]
    Landlock,
    #[error("sandbox: {thread}: {field} is {found}, not {wanted}")]
    NotProven {
        thread: String,
        field: &'static str,
        found: String,
        wanted: &'static str,
    },
}

fn step<E: std::fmt::Display>(name: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::Step(name, e.to_string())
}

/// Shuts the cage around the whole process and proves that it is shut.
pub fn enter(policy: &Policy) -> Result<(), Error> {
    drop_privileges(policy)?;
    confine_files(policy)?;
    calls::apply(policy.refusal).map_err(step("system calls"))?;
    prove()
}

fn drop_privileges(policy: &Policy) -> Result<(), Error> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("core limit"))?;
    if let Some(n) = policy.descriptors {
        setrlimit(Resource::RLIMIT_NOFILE, n, n).map_err(step("limit of open files"))?;
    }
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)
        .map_err(step("capabilities"))?
    {
        for cap in caps::all() {
            // Capabilities newer than the running kernel cannot be dropped, nor held.
            let _ = caps::drop(None, CapSet::Bounding, cap);
        }
    }
    if geteuid().is_root() && !single_user() {
        let (uid, gid) = policy.user.ok_or(Error::Root)?;
        setgroups(&[]).map_err(step("groups"))?;
        let gid = Gid::from_raw(gid);
        setresgid(gid, gid, gid).map_err(step("group"))?;
        let uid = Uid::from_raw(uid);
        setresuid(uid, uid, uid).map_err(step("user"))?;
    }
    let _ = caps::clear(None, CapSet::Ambient);
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set).map_err(step("capabilities"))?;
    }
    prctl::set_no_new_privs().map_err(step("no_new_privs"))?;
    prctl::set_dumpable(false).map_err(step("dumpable"))
}

/// Whether this is a user namespace in which there is one user only.
fn single_user() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().nth(2) == Some("1")
}

fn confine_files(policy: &Policy) -> Result<(), Error> {
    let all = AccessFs::from_all(ABI::V1);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write =
        read | AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::MakeSock;
    let ruleset = Ruleset::default()
        .handle_access(all)
        .map_err(step("landlock"))?;
    let mut ruleset = ruleset.create().map_err(step("landlock"))?;
    let proc = PathBuf::from("/proc/self");
    let rules = [
        (&policy.read, read),
        (&policy.write, write),
        (&policy.sockets, read),
        (&vec![proc], read),
    ];
    for (paths, access) in rules {
        for path in paths.iter().filter(|p| p.exists()) {
            let fd = PathFd::new(path).map_err(step("landlock"))?;
            let access = if path.is_dir() {
                access
            } else {
                access & AccessFs::from_file(ABI::V1)
            };
            ruleset = ruleset
                .add_rule(PathBeneath::new(fd, access))
                .map_err(step("landlock"))?;
        }
    }
    let status = ruleset.restrict_self().map_err(step("landlock"))?;
    if status.ruleset == RulesetStatus::FullyEnforced {
        Ok(())
    } else {
        Err(Error::Landlock)
    }
}

/// Reads back, for every thread, that nothing is left.
pub fn prove() -> Result<(), Error> {
    const NONE: &str = "0000000000000000";
    let wanted = [
        ("CapInh", NONE),
        ("CapPrm", NONE),
        ("CapEff", NONE),
        ("CapAmb", NONE),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ];
    for task in fs::read_dir("/proc/self/task").map_err(step("threads"))? {
        let path = task.map_err(step("threads"))?.path();
        let status = fs::read_to_string(path.join("status")).map_err(step("threads"))?;
        for (field, value) in wanted {
            let found = status
                .lines()
                .find_map(|l| l.strip_prefix(field)?.strip_prefix(":\t"))
                .unwrap_or_default();
            if found != value {
                let thread = path.display().to_string();
                return Err(Error::NotProven {
                    thread,
                    field,
                    found: found.to_owned(),
                    wanted: value,
                });
            }
        }
    }
    Ok(())
}

/// Files a resolver and a TLS library read, for [`Policy::read`].
pub fn system_files() -> Vec<PathBuf> {
    let names = [
        "resolv.conf",
        "hosts",
        "nsswitch.conf",
        "host.conf",
        "gai.conf",
        "services",
        "ssl/certs",
        "localtime",
    ];
    let mut all: Vec<PathBuf> = names.iter().map(|n| Path::new("/etc").join(n)).collect();
    all.extend(
        [
            "/usr/share/zoneinfo",
            "/usr/lib",
            "/lib",
            "/lib64",
            "/dev/urandom",
            "/dev/null",
        ]
        .map(PathBuf::from),
    );
    all.extend(
        [
            "/run/systemd/resolve",
            "/sys/fs/cgroup",
            "/sys/devices/system/cpu",
        ]
        .map(PathBuf::from),
    );
    all
}

/// An I/O error of `EPERM`, as a refused call gives it.
pub fn is_refusal(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}
