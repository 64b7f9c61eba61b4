//! Everything about bare descriptors, in one place.
#![expect(
    unsafe_code,
    reason = "descriptors arrive as numbers, tokio cannot know who keeps them open, \
              and two settings of the kernel have no wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Owns a descriptor that was just received or given away.
pub(crate) fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the callers have it from the kernel, or from an owner that gave
    // it up, just now; nobody else will close it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Watches a descriptor that does not block.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<File>> {
    let file = File::from(fd);
    // SAFETY: the file owns its descriptor and moves into the AsyncFd, which
    // hands out shared references only, so it stays open and the same.
    let watched = unsafe { AsyncFd::register_with_interest(file, interest) };
    watched.map_err(io::Error::from)
}

/// What the kernel may hold unsent of ours; more waits where it can still be
/// put in order.
const UNSENT: libc::c_int = 16 * 1024;

/// Sets the options of the connection to the gateway.
pub(crate) fn tune(socket: BorrowedFd<'_>) -> io::Result<()> {
    for (option, value) in [(libc::TCP_NODELAY, 1), (libc::TCP_NOTSENT_LOWAT, UNSENT)] {
        // SAFETY: the value lives until the call is over, and its size is given.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

nix::ioctl_write_int!(tun_set_offload, b'T', 208);

/// Makes the kernel finish packets before it hands them out.
pub(crate) fn finish_packets(tun: &OwnedFd) -> io::Result<()> {
    // SAFETY: the call takes a number and touches no memory of ours.
    unsafe { tun_set_offload(tun.as_raw_fd(), 0) }?;
    Ok(())
}
