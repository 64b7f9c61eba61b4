//! A socket option that has no wrapper.
#![expect(unsafe_code, reason = "setsockopt by number")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Has the kernel honour what a dump asks for, an interface's addresses alone for one.
pub(crate) fn set_strict(socket: impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: on is a live int and its size is passed along.
    let ret = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_GET_STRICT_CHK,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
