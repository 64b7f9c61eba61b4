//! A visitor's stream as bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rvpn_proto::streams::mux::Handle;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::carrier::Present;

/// One stream. Shutting it down finishes our half; dropping it before cuts it off.
#[derive(Debug)]
pub struct Stream {
    handle: Handle,
    /// Counts the visitor as there.
    _present: Present,
}

impl Stream {
    pub(super) fn new(handle: Handle, present: Present) -> Stream {
        Stream {
            handle,
            _present: present,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n = ready!(self.handle.poll_read(cx, buf.initialize_unfilled()))?;
        buf.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.handle.poll_write(cx, bytes).map_err(io::Error::from)
    }

    /// What was written is on its way already.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.handle.finish().map_err(io::Error::from))
    }
}
