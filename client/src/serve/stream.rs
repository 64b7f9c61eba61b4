//! A visitor's stream as bytes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use rvpn_proto::streams::mux::Handle;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// One stream. Shutting it down finishes our half; dropping it before cuts it off.
#[derive(Debug)]
pub(super) struct Stream {
    handle: Handle,
    moved: Arc<Moved>,
}

/// Bytes of a visitor.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// From it.
    pub(super) received: AtomicU64,
    /// To it.
    pub(super) sent: AtomicU64,
}

impl Stream {
    pub(super) fn new(handle: Handle) -> Stream {
        let moved = Arc::default();
        Stream { handle, moved }
    }

    /// Its counters, also when it is gone.
    pub(super) fn moved(&self) -> Arc<Moved> {
        Arc::clone(&self.moved)
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
        self.moved.received.fetch_add(n as u64, Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(self.handle.poll_write(cx, bytes))?;
        self.moved.sent.fetch_add(n as u64, Relaxed);
        Poll::Ready(Ok(n))
    }

    /// What was written is on its way already.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.handle.finish().map_err(io::Error::from))
    }
}
