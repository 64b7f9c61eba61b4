//! The connection itself: frames in, frames out.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rvpn_ipc::frame::REPLY_LEN;
use rvpn_ipc::{Reply, Request, Status, seqpacket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Why one connection ended; all are answered by a new one.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it closed the connection")]
    Closed,
    #[error("its answer is not one: {0}")]
    Garbled(String),
    #[error("it refused the connection: {0}")]
    Refused(Status),
    #[error(
        "uid {found} serves the socket instead of the helper's uid {expected}: another program is in its place"
    )]
    Impostor { found: u32, expected: u32 },
    #[error("it did not answer within a second")]
    Silent,
}

/// A connection to whoever was checked to be the helper.
#[derive(Debug)]
pub(super) struct Link {
    fd: AsyncFd<File>,
}

impl Link {
    /// Takes a connected socket.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Link> {
        let fd = crate::fd::watch(fd, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Link { fd })
    }

    /// Sends one request, whole.
    pub(super) async fn send(&self, request: &Request) -> Result<(), Broken> {
        let frame = request.encode();
        self.fd
            .async_io(Interest::WRITABLE, |fd| {
                seqpacket::send(fd.as_fd(), &frame, None)
            })
            .await?;
        Ok(())
    }

    /// The next answer or notice. Dropping the future loses nothing.
    pub(super) async fn receive(&self) -> Result<(Reply, Option<OwnedFd>), Broken> {
        let mut buf = [0; REPLY_LEN];
        let got = self
            .fd
            .async_io(Interest::READABLE, |fd| {
                seqpacket::recv(fd.as_fd(), &mut buf, true)
            })
            .await?;
        if got.len == 0 {
            return Err(Broken::Closed);
        }
        if got.truncated || got.surplus_fds {
            return Err(Broken::Garbled("longer than an answer is".into()));
        }
        let reply = Reply::decode(&buf[..got.len]).map_err(|e| Broken::Garbled(e.to_string()))?;
        Ok((reply, got.fd))
    }
}
