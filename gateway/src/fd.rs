//! Putting a descriptor that tokio has no type for under its event loop.
#![expect(
    unsafe_code,
    reason = "tokio cannot know that a descriptor's owner keeps it open"
)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
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
