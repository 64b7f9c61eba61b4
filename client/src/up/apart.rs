//! The connection to the gateway, which can be told to keep writes apart.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::sys::socket::{MsgFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// A TCP connection.
#[derive(Debug)]
pub(crate) struct Apart {
    tcp: TcpStream,
    apart: bool,
}

impl Apart {
    /// As usual, until told otherwise.
    pub(crate) fn new(tcp: TcpStream) -> Apart {
        Apart { tcp, apart: false }
    }

    /// Whether the kernel may join what is written from now on to what it has
    /// already. It would do that up to 64 KiB, whatever it was told to hold
    /// unsent at most, and on a slow link nothing passes those.
    pub(crate) fn set(&mut self, apart: bool) {
        self.apart = apart;
    }
}

impl AsyncRead for Apart {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Apart {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if !self.apart {
            return Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs);
        }
        let tcp = &self.tcp;
        loop {
            ready!(tcp.poll_write_ready(cx))?;
            let flags = MsgFlags::MSG_EOR | MsgFlags::MSG_NOSIGNAL;
            let sent = tcp.try_io(Interest::WRITABLE, || {
                Ok(sendmsg::<()>(tcp.as_raw_fd(), bufs, &[], flags, None)?)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
