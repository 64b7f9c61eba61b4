//! Landlock by its three system calls: what may be opened from now on.
#![expect(unsafe_code, reason = "system calls that have no wrapper in libc")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_REG: u64 = 1 << 8;
/// Every right of the first version: what is handled and not granted is refused.
const HANDLED: u64 = (1 << 13) - 1;
const RULE_PATH_BENEATH: libc::c_int = 1;

/// To read and write what is there.
pub(crate) const CHANGE: u64 = READ_FILE | WRITE_FILE | READ_DIR;
/// To make, replace and remove files as well.
pub(crate) const KEEP: u64 = CHANGE | MAKE_REG | REMOVE_FILE;
pub(crate) const READ: u64 = READ_FILE | READ_DIR;

#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
}

#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

fn check(ret: libc::c_long) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        libc::c_int::try_from(ret).map_err(io::Error::other)
    }
}

/// Confines this thread, and those it starts, to these paths; execution is never granted.
/// False when the kernel has no Landlock.
pub(crate) fn confine(paths: &[(&Path, u64)]) -> io::Result<bool> {
    let attr = RulesetAttr {
        handled_access_fs: HANDLED,
    };
    // SAFETY: attr is a live struct of the size passed along.
    let made = check(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const attr,
            size_of::<RulesetAttr>(),
            0,
        )
    });
    let ruleset = match made {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => {
            return Ok(false);
        }
        // SAFETY: the kernel has just made this descriptor and nothing else owns it.
        other => unsafe { OwnedFd::from_raw_fd(other?) },
    };
    for (path, access) in paths {
        let file = File::open(path)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        // Rights over directories are refused for a plain file.
        let plain = WRITE_FILE | READ_FILE | EXECUTE;
        let allowed_access = if file.metadata()?.is_dir() {
            *access
        } else {
            access & plain
        };
        let rule = PathBeneathAttr {
            allowed_access,
            parent_fd: file.as_raw_fd(),
        };
        // SAFETY: rule is a live struct of the kind the constant says.
        check(unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                ruleset.as_raw_fd(),
                RULE_PATH_BENEATH,
                &raw const rule,
                0,
            )
        })?;
    }
    // SAFETY: the descriptor is a ruleset; there is no pointer.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })?;
    Ok(true)
}

/// Closes whatever was inherited from this descriptor on.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called before this program has opened anything of its own above the standard three.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Takes over a descriptor the service manager passed in.
pub(crate) fn passed(raw: i32) -> io::Result<OwnedFd> {
    // SAFETY: the service manager says that this descriptor is open and ours, and nothing else here owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: plain flags on an open descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    // SAFETY: plain flags on an open descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }.into())?;
    Ok(fd)
}
