//! Landlock by its three system calls: what may be opened from now on.
#![expect(unsafe_code, reason = "system calls that have no wrapper in libc")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_REG: u64 = 1 << 8;
/// The rights there are over a plain file.
const PLAIN: u64 = EXECUTE | WRITE_FILE | READ_FILE;
/// Every right of the first version: what is handled and not granted is refused.
static HANDLED: u64 = (1 << 13) - 1;
const RULE_PATH_BENEATH: libc::c_int = 1;

/// To read and write what is there.
pub(crate) const CHANGE: u64 = READ_FILE | WRITE_FILE | READ_DIR;
/// To make, replace and remove files as well.
pub(crate) const KEEP: u64 = CHANGE | MAKE_REG | REMOVE_FILE;
pub(crate) const READ: u64 = READ_FILE | READ_DIR;

/// What `landlock_add_rule` takes: the rights, and what they are beneath.
#[repr(C, packed)]
struct PathBeneath(u64, i32);

macro_rules! call {
    ($number:ident, $($argument:expr),*) => {
        Errno::result(libc::syscall(libc::$number, $($argument),*))
    };
}

/// Confines this thread, and those it starts, to these paths; execution is never granted.
/// False when the kernel has no Landlock.
pub(crate) fn confine(paths: &[(&Path, u64)]) -> io::Result<bool> {
    let size = size_of_val(&HANDLED);
    // SAFETY: the handled rights are a live number of the size passed along.
    let made = unsafe { call!(SYS_landlock_create_ruleset, &raw const HANDLED, size, 0) };
    let ruleset = match made {
        Err(Errno::ENOSYS | Errno::EOPNOTSUPP) => return Ok(false),
        // SAFETY: the kernel has just made this descriptor and nothing else owns it.
        other => unsafe { OwnedFd::from_raw_fd(other? as RawFd) },
    };
    let fd = ruleset.as_raw_fd();
    for (path, access) in paths {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(named)?;
        // Rights over directories are refused for a plain file.
        let directory = file.metadata()?.is_dir();
        let access = if directory { *access } else { access & PLAIN };
        let rule = PathBeneath(access, file.as_raw_fd());
        // SAFETY: rule is a live struct of the kind the constant says.
        unsafe {
            call!(
                SYS_landlock_add_rule,
                fd,
                RULE_PATH_BENEATH,
                &raw const rule,
                0
            )
        }?;
    }
    // SAFETY: the descriptor is a ruleset; there is no pointer.
    unsafe { call!(SYS_landlock_restrict_self, fd, 0) }?;
    Ok(true)
}

/// Closes whatever was inherited from this descriptor on.
pub(crate) fn close_from(first: u64) -> io::Result<()> {
    // SAFETY: called before this program has opened anything of its own above the standard three.
    unsafe { call!(SYS_close_range, first, u32::MAX, 0) }?;
    Ok(())
}

/// Takes over a descriptor the service manager passed in.
pub(crate) fn passed(raw: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the service manager says that this descriptor is open and ours, and nothing else here owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}
