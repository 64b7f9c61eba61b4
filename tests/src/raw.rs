//! System calls the laboratory needs as they are.
#![expect(
    unsafe_code,
    reason = "per-thread setresuid, ioctls by number and clone flags have no safe wrapper"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// Real, effective and saved user and group of the calling thread.
pub fn set_thread_user(id: u32) -> io::Result<()> {
    // SAFETY: plain numbers; only this thread changes.
    check(unsafe { libc::syscall(libc::SYS_setresgid, id, id, id) })?;
    // SAFETY: plain numbers; only this thread changes.
    check(unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) }).map(drop)
}

/// An ioctl whose argument is a number.
pub fn ioctl_number(fd: BorrowedFd<'_>, request: u32, arg: u64) -> io::Result<()> {
    // SAFETY: the requests passed take a number, or a pointer the kernel itself checks.
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), request, arg) }).map(drop)
}

/// An ioctl whose argument is a buffer.
pub fn ioctl_buffer(fd: BorrowedFd<'_>, request: u32, arg: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer is live and at least as large as any structure of the requests passed (an ifreq).
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), request, arg.as_mut_ptr()) })
        .map(drop)
}

/// Any system call with plain numbers, to see whether it is let through.
pub fn syscall(number: i64, args: [u64; 5]) -> io::Result<i64> {
    // SAFETY: callers pass null or invalid pointers only, which the kernel refuses.
    check(unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) })
}
