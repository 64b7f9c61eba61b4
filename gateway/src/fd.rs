//! What descriptors need that neither tokio nor nix offers.
#![expect(
    unsafe_code,
    reason = "tokio cannot know that a descriptor's owner keeps it open, and TCP_NOTSENT_LOWAT has no wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes the descriptor non-blocking and registers it with the current runtime.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<File>> {
    // O_NONBLOCK is a flag of every open file, but the standard library sets
    // it on sockets only; the type is used for nothing else.
    let fd = UnixDatagram::from(fd);
    fd.set_nonblocking(true)?;
    let file = File::from(OwnedFd::from(fd));
    // SAFETY: the file owns its descriptor and moves into the AsyncFd, which
    // hands out shared references only, so it stays open and the same.
    let watched = unsafe { AsyncFd::register_with_interest(file, interest) };
    watched.map_err(io::Error::from)
}

/// What the kernel may hold of ours unsent. What waits longer waits in the
/// session's queue, where it can still give way to something more urgent.
const UNSENT: libc::c_int = 16 * 1024;

/// Sets a client socket's options: no delay, and little unsent.
pub fn tune(socket: BorrowedFd<'_>) -> io::Result<()> {
    for (option, value) in [(libc::TCP_NODELAY, 1), (libc::TCP_NOTSENT_LOWAT, UNSENT)] {
        // SAFETY: value is a live int and its size is passed along.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                option,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
