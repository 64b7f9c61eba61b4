//! A connection that is given whole messages past the WebSocket library, which
//! would copy each into a buffer of its own first.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rvpn_proto::frame::{Header, mask};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Shorter messages are gathered, so that several share a write and a TLS record.
const SHORT: usize = 8 * 1024;

/// A stream, and what it has accepted but not taken yet.
#[derive(Debug)]
pub(crate) struct Ahead<S> {
    inner: S,
    pending: Vec<u8>,
    /// So many bytes of that are gone.
    gone: usize,
}

impl<S> Ahead<S> {
    /// Nothing waits.
    pub(crate) fn new(inner: S) -> Ahead<S> {
        Ahead {
            inner,
            pending: Vec::new(),
            gone: 0,
        }
    }

    /// The stream below.
    pub(crate) fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }
}

impl<S: AsyncWrite + Unpin> Ahead<S> {
    /// Sends a binary message as a client does, whose bytes are masked where they
    /// lie. What the stream does not take now goes with the next flush or write,
    /// before anything else. Only when the library has nothing more to send.
    pub(crate) fn message(&mut self, cx: &mut Context<'_>, payload: &mut [u8]) -> io::Result<()> {
        let mut key = [0; 4];
        aws_lc_rs::rand::fill(&mut key).map_err(|_| io::Error::other("no random bytes"))?;
        mask(payload, key);
        self.give(cx, Header::new(payload.len(), Some(key)).bytes(), payload)
    }

    fn give(&mut self, cx: &mut Context<'_>, header: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut given = 0;
        let after = |given: usize| {
            let head = header.get(given..).unwrap_or_default();
            (head, &payload[given.saturating_sub(header.len())..])
        };
        if payload.len() >= SHORT && self.poll_pending(cx)?.is_ready() {
            while given < header.len() + payload.len() {
                let (head, rest) = after(given);
                let parts = [IoSlice::new(head), IoSlice::new(rest)];
                let parts = &parts[usize::from(head.is_empty())..];
                match Pin::new(&mut self.inner).poll_write_vectored(cx, parts)? {
                    Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(n) => given += n,
                    Poll::Pending => break,
                }
            }
        }
        let (head, rest) = after(given);
        self.pending.extend_from_slice(head);
        self.pending.extend_from_slice(rest);
        Ok(())
    }

    /// Ready when nothing waits here.
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.gone < self.pending.len() {
            let left = &self.pending[self.gone..];
            let n = ready!(Pin::new(&mut self.inner).poll_write(cx, left))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gone += n;
        }
        self.pending.clear();
        self.gone = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Ahead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Ahead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::StreamExt as _;
    use tokio::io::AsyncWriteExt as _;
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    #[tokio::test]
    async fn messages_arrive_whole_and_in_order_however_little_is_taken_at_once() {
        for room in [7, 1000, 1 << 20] {
            let (near, far) = tokio::io::duplex(room);
            let mut far = WebSocketStream::from_raw_socket(far, Role::Server, None).await;
            let lengths = [
                0, 1, 125, 126, 5000, 9000, 65_535, 65_536, 70_000, 3, 20_000,
            ];
            let sending = tokio::spawn(async move {
                let mut ahead = Ahead::new(near);
                for (n, length) in lengths.into_iter().enumerate() {
                    let mut payload: Vec<u8> = (0..length).map(|i| (i * 31 + n) as u8).collect();
                    poll_fn(|cx| Poll::Ready(ahead.message(cx, &mut payload)))
                        .await
                        .unwrap();
                    // Every third waits for the next ones, as short ones in a turn do.
                    if n % 3 == 0 {
                        ahead.flush().await.unwrap();
                    }
                }
                ahead.flush().await.unwrap();
                ahead
            });
            for (n, length) in lengths.into_iter().enumerate() {
                let Some(Ok(Message::Binary(data))) = far.next().await else {
                    panic!("{n} did not arrive");
                };
                assert_eq!(data.len(), length);
                assert!(
                    data.iter()
                        .enumerate()
                        .all(|(i, b)| *b == (i * 31 + n) as u8)
                );
            }
            drop(sending.await.unwrap());
        }
    }
}
