//! Children that enter the cage, so that the test itself stays outside.
#![expect(
    unsafe_code,
    reason = "fork, and system calls and ioctls by number, have no safe wrapper"
)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, geteuid};

/// Neither root nor anybody else's on a test machine.
pub(crate) const UID: u32 = 65_021;
/// A child that hangs is ended by SIGALRM, which fails the test that expects another end.
const PATIENCE: u32 = 60;

/// What became of a child, and what it said.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: WaitStatus,
    pub(crate) text: String,
}

impl Outcome {
    /// The text of a child that came to its end.
    #[track_caller]
    pub(crate) fn whole(self) -> String {
        assert!(matches!(self.status, WaitStatus::Exited(_, 0)), "{self:?}");
        self.text
    }
}

/// Runs the closure in a process of one thread.
pub(crate) fn child(f: impl FnOnce() -> String) -> Outcome {
    let (mut reader, mut writer) = io::pipe().expect("pipe");
    // SAFETY: the child goes on in this function only and ends by _exit, which runs no handler of the parent's.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            drop(reader);
            nix::unistd::alarm::set(PATIENCE);
            let (text, code) = match catch_unwind(AssertUnwindSafe(f)) {
                Ok(text) => (text, 0),
                Err(why) => {
                    let why = why.downcast_ref::<String>().cloned().unwrap_or_else(|| {
                        (*why.downcast_ref::<&str>().unwrap_or(&"no text")).to_owned()
                    });
                    (why, 101)
                }
            };
            let _ = writer.write_all(text.as_bytes());
            // SAFETY: ends the process.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let mut text = String::new();
            let _ = reader.read_to_string(&mut text);
            let status = waitpid(child, None).expect("wait");
            Outcome { status, text }
        }
    }
}

/// Any system call, to see whether it is let through.
pub(crate) fn syscall(number: i64, a: [u64; 6]) -> io::Result<i64> {
    // SAFETY: callers pass numbers, and pointers that are null, invalid or to live strings.
    let ret = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// An ioctl whose argument is a buffer at least as large as what the request writes.
pub(crate) fn ioctl(fd: BorrowedFd<'_>, request: u64, arg: &mut [u8; 64]) -> io::Result<()> {
    // SAFETY: the buffer is live and larger than an ifreq.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request, arg.as_mut_ptr()) };
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The highest version of Landlock the kernel knows.
pub(crate) fn landlock_version() -> i64 {
    // Flag 1 asks for the version.
    syscall(libc::SYS_landlock_create_ruleset, [0, 0, 1, 0, 0, 0]).unwrap_or(0)
}

/// Network and mounts of the child's own, loopback up.
pub(crate) fn unshare_network() {
    let own = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    if geteuid().is_root() {
        unshare(own).expect("unshare");
    } else {
        let (uid, gid) = (geteuid(), nix::unistd::getegid());
        unshare(own | CloneFlags::CLONE_NEWUSER).expect("unshare");
        fs::write("/proc/self/setgroups", "deny").expect("setgroups");
        fs::write("/proc/self/uid_map", format!("0 {uid} 1")).expect("uid map");
        fs::write("/proc/self/gid_map", format!("0 {gid} 1")).expect("gid map");
    }
    ip("link set lo up");
}

pub(crate) fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).status();
    assert!(done.is_ok_and(|s| s.success()), "ip {words}");
}

/// A directory that the caged user owns and one that it may only read, though
/// the modes of its files would let anybody write.
pub(crate) struct Places {
    _all: tempfile::TempDir,
    pub(crate) state: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) other: PathBuf,
}

impl Places {
    pub(crate) fn new() -> Places {
        let all = tempfile::tempdir().expect("directory");
        let make = |name: &str| {
            let dir = all.path().join(name);
            fs::create_dir(&dir).expect("directory");
            let file = dir.join("file");
            File::create(&file)
                .and_then(|mut f| f.write_all(b"as it was"))
                .expect("file");
            open_to_all(&file);
            open_to_all(&dir);
            dir
        };
        let (state, config, other) = (make("state"), make("config"), make("other"));
        open_to_all(&all.path().to_owned());
        if geteuid().is_root() {
            chown(&state, Some(UID), Some(UID)).expect("chown");
        }
        Places {
            _all: all,
            state,
            config,
            other,
        }
    }

    pub(crate) fn policy(&self, refusal: rvpn_sandbox::Refusal) -> rvpn_sandbox::Policy {
        rvpn_sandbox::Policy {
            read: vec![self.config.clone()],
            write: vec![self.state.clone()],
            user: geteuid().is_root().then_some((UID, UID)),
            descriptors: Some(512),
            refusal,
            ..rvpn_sandbox::Policy::default()
        }
    }
}

fn open_to_all(path: &PathBuf) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("mode");
}

pub(crate) fn errno<T>(r: io::Result<T>) -> i32 {
    r.err().map_or(0, |e| e.raw_os_error().unwrap_or(-1))
}
