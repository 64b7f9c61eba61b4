//! A socket option that has no wrapper.
#![expect(unsafe_code, reason = "setsockopt by number")]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

/// Has the kernel honour what a dump asks for, an interface's addresses alone for one.
pub(crate) fn set_strict(socket: &OwnedFd) -> nix::Result<()> {
    let (option, on) = (libc::NETLINK_GET_STRICT_CHK, 1_i32);
    let (fd, value) = (socket.as_raw_fd(), (&raw const on).cast());
    // SAFETY: value points to a live int and the length is that of one.
    Errno::result(unsafe { libc::setsockopt(fd, libc::SOL_NETLINK, option, value, 4) }).map(drop)
}
