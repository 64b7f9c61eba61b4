//! The cage the gateway locks itself into before it reads a first byte from a stranger.
//!
//! No capability, no way to gain one, no file but its own, no system call that
//! a program of sockets and files does not need. Entered once, before there is
//! a second thread; whatever cannot be applied is an error, never a warning.

mod calls;
mod files;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use caps::CapSet;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, getgid, getresuid, getuid, setgroups, setresgid, setresuid};

pub use calls::allowed;

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
    /// The only ports to bind for TCP; any when there is no list.
    pub tcp_bind: Option<Vec<u16>>,
    /// The only ports to connect to by TCP; any when there is no list.
    pub tcp_connect: Option<Vec<u16>>,
    pub refusal: Refusal,
}

/// What holds, read back after the cage was shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub uid: u32,
    pub gid: u32,
    /// Whether the bounding set is empty. A program not started as root has no
    /// right to empty it, and no way left to make use of it.
    pub bounding_empty: bool,
    /// Whether the kernel knows every restriction of files, devices and signals
    /// that is asked for; the ones named in [`Error::Landlock`] always hold.
    pub landlock_whole: bool,
}

/// Why the cage is not shut. The program must not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("sandbox: {0}: {1}")]
    Step(&'static str, String),
    #[error("sandbox: started as root: name the user to become (user = ... in the configuration)")]
    Root,
    #[error(
        "sandbox: there are {0} threads: those started before keep their rights, so the cage is to be entered first"
    )]
    Threads(usize),
    #[error(
        "sandbox: this kernel does not restrict files by Landlock: Linux 5.13 or newer with 'landlock' among its lsm= is needed"
    )]
    Landlock,
    #[error("sandbox: {thread}: {field} is {found}, not {wanted}")]
    NotProven {
        thread: String,
        field: &'static str,
        found: String,
        wanted: String,
    },
}

fn step<E: std::fmt::Display>(name: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::Step(name, e.to_string())
}

/// Shuts the cage around the whole process and proves that it is shut.
pub fn enter(policy: &Policy) -> Result<Report, Error> {
    let threads = tasks()?.len();
    if threads != 1 {
        return Err(Error::Threads(threads));
    }
    let bounding_empty = drop_privileges(policy)?;
    let landlock_whole = files::confine(policy)?;
    // Asked before the list of calls holds, which has no place for asking.
    let report = Report {
        uid: getuid().as_raw(),
        gid: getgid().as_raw(),
        bounding_empty,
        landlock_whole,
    };
    calls::apply(policy.refusal).map_err(step("system calls"))?;
    prove_these(&wanted(bounding_empty))?;
    Ok(report)
}

/// True when the bounding set was emptied.
fn drop_privileges(policy: &Policy) -> Result<bool, Error> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("core limit"))?;
    if let Some(n) = policy.descriptors {
        setrlimit(Resource::RLIMIT_NOFILE, n, n).map_err(step("limit of open files"))?;
    }
    let may_drop = caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)
        .map_err(step("capabilities"))?;
    if may_drop {
        for cap in caps::all() {
            // Capabilities newer than the running kernel cannot be dropped, nor held.
            let _ = caps::drop(None, CapSet::Bounding, cap);
        }
    }
    let ids = getresuid().map_err(step("user"))?;
    // A saved uid of root is as good as root.
    let root = [ids.real, ids.effective, ids.saved]
        .iter()
        .any(|u| u.is_root());
    if root && !single_user() {
        let (uid, gid) = policy.user.filter(|(u, _)| *u != 0).ok_or(Error::Root)?;
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
    prctl::set_dumpable(false).map_err(step("dumpable"))?;
    Ok(may_drop)
}

/// Whether this is a user namespace in which there is one user only.
fn single_user() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().nth(2) == Some("1")
}

/// Reads back, for every thread, that nothing is left.
pub fn prove() -> Result<(), Error> {
    prove_these(&wanted(false))
}

fn wanted(bounding_empty: bool) -> Vec<(&'static str, String)> {
    let none = || "0".repeat(16);
    let uid = getuid();
    let mut all = vec![
        ("CapInh", none()),
        ("CapPrm", none()),
        ("CapEff", none()),
        ("CapAmb", none()),
        ("NoNewPrivs", "1".to_owned()),
        ("Seccomp", "2".to_owned()),
        // Real, effective, saved, and the one for files.
        ("Uid", [uid; 4].map(|u| u.to_string()).join("\t")),
    ];
    if bounding_empty {
        all.push(("CapBnd", none()));
    }
    all
}

fn tasks() -> Result<Vec<PathBuf>, Error> {
    fs::read_dir("/proc/self/task")
        .and_then(|d| d.map(|t| t.map(|t| t.path())).collect())
        .map_err(step("threads"))
}

fn prove_these(wanted: &[(&'static str, String)]) -> Result<(), Error> {
    for path in tasks()? {
        let status = match fs::read_to_string(path.join("status")) {
            Ok(status) => status,
            // The thread has ended since the directory was read.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => continue,
            Err(e) => return Err(Error::Step("threads", e.to_string())),
        };
        for (field, value) in wanted {
            let found = status
                .lines()
                .find_map(|l| l.strip_prefix(field)?.strip_prefix(":\t"))
                .unwrap_or_default();
            if found != value {
                return Err(Error::NotProven {
                    thread: path.display().to_string(),
                    field,
                    found: found.to_owned(),
                    wanted: value.clone(),
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
