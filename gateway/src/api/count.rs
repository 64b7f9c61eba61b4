//! What passes through the operators' own listener.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// There is one such listener in a process.
pub(super) static ADMIN: Counts = Counts {
    requests: AtomicU64::new(0),
    responses: AtomicU64::new(0),
    bytes_in: AtomicU64::new(0),
    bytes_out: AtomicU64::new(0),
};

pub(super) struct Counts {
    requests: AtomicU64,
    responses: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

/// As the ancestor's API shows it.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Shown {
    requests: u64,
    responses: u64,
    bytes_in: u64,
    bytes_out: u64,
}

impl Counts {
    pub(super) fn read(&self) -> Shown {
        let value = |of: &AtomicU64| of.load(Ordering::Relaxed);
        Shown {
            requests: value(&self.requests),
            responses: value(&self.responses),
            bytes_in: value(&self.bytes_in),
            bytes_out: value(&self.bytes_out),
        }
    }
}

fn add(to: &AtomicU64, bytes: usize) {
    to.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// Counts requests and their answers.
pub(super) async fn requests(request: Request, next: Next) -> Response {
    add(&ADMIN.requests, 1);
    let response = next.run(request).await;
    add(&ADMIN.responses, 1);
    response
}

/// Counts bytes both ways.
pub(super) struct Bytes<T>(pub(super) T);

impl<T: AsyncRead + Unpin> AsyncRead for Bytes<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.0).poll_read(cx, into))?;
        add(&ADMIN.bytes_in, into.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Bytes<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.0).poll_write(cx, bytes))?;
        add(&ADMIN.bytes_out, written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
