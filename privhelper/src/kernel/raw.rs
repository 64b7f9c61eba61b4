//! The three calls that have no safe wrapper.
#![expect(
    unsafe_code,
    reason = "setsockopt and close_range by number, descriptors by theirs"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

/// Has the kernel honour what a dump asks for, an interface's addresses alone for one.
pub(crate) fn set_strict(socket: &OwnedFd) -> nix::Result<()> {
    let (option, on) = (libc::NETLINK_GET_STRICT_CHK, 1_i32);
    let (fd, value) = (socket.as_raw_fd(), (&raw const on).cast());
    // SAFETY: value points to a live int and the length is that of one.
    Errno::result(unsafe { libc::setsockopt(fd, libc::SOL_NETLINK, option, value, 4) }).map(drop)
}

/// Closes whatever was inherited from this descriptor on.
pub(crate) fn close_from(first: u64) -> nix::Result<()> {
    // SAFETY: called before this program has opened anything of its own above the standard three.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    Errno::result(closed).map(drop)
}

/// Takes over a descriptor the service manager passed in.
pub(crate) fn passed(raw: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the service manager says that this descriptor is open and ours, and nothing else here owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}
