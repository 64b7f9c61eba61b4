//! Messages in, messages out: all that a session wants of its connection.
//!
//! The trait is narrow on purpose, so that another framing can take the place
//! of this one without the session noticing.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{Sink, Stream};
use rvpn_proto::frame::Header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use crate::admit::Io;

/// Largest message: a super-packet, its record and room to spare.
pub const LIMIT: usize = 192 * 1024;
/// Small, because every idle connection holds one.
const READ_BUFFER: usize = 2 * 1024;
/// Data goes past the library, see [`Transport::data`]; the rest is small.
const WRITE_BUFFER: usize = 4 * 1024;
/// What a peer that does not read can make us hold beside the queue.
const WRITE_LIMIT: usize = 256 * 1024;

/// What arrived.
#[derive(Debug)]
pub enum Incoming {
    /// A binary message.
    Data(Bytes),
    /// A text message.
    Text(Utf8Bytes),
    /// A ping, which is answered already, or a pong.
    Control,
    /// The peer's farewell.
    Close {
        /// Its code, if it gave one.
        code: Option<u16>,
    },
}

/// Why nothing more arrives.
#[derive(Debug, PartialEq, Eq)]
pub enum Broken {
    /// The connection ended or failed underneath.
    Lost,
    /// The peer broke the WebSocket protocol.
    Protocol,
    /// A message over the limit.
    TooBig,
}

impl Broken {
    /// The close code that answers it; none when nobody is there to read it.
    pub fn code(&self) -> Option<u16> {
        match self {
            Broken::Lost => None,
            Broken::Protocol => Some(1002),
            Broken::TooBig => Some(1009),
        }
    }
}

/// A message connection, driven by polling from one task.
pub trait Transport {
    /// The next message, or why there is none.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Incoming, Broken>>;

    /// Takes a message to send. May write, does not flush. The data is copied
    /// or gone when this returns, so its buffer can be used again.
    fn feed(&mut self, message: Message) -> Result<(), Broken>;

    /// Takes a data message to send, straight to the connection: only when
    /// everything that was fed before is flushed. May write, does not flush.
    fn data(&mut self, cx: &mut Context<'_>, payload: &[u8]) -> Result<(), Broken>;

    /// Whether the kernel may not join what is written from now on to what it
    /// has already, see [`Io::keep_apart`].
    fn keep_apart(&mut self, _apart: bool) {}

    /// Ready when the socket has taken everything that was fed.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>>;

    /// Bytes read from and written to the socket so far, everything included.
    fn wire(&self) -> (u64, u64);
}

/// A WebSocket of which we are the server.
#[derive(Debug)]
pub struct Socket {
    inner: WebSocketStream<Io>,
}

impl Socket {
    /// Takes over after the upgrade; `read_ahead` is what already arrived behind it.
    pub async fn accept(stream: Io, read_ahead: Bytes) -> Socket {
        Socket::limited(stream, read_ahead, LIMIT).await
    }

    /// The same for a peer that has less to say.
    pub async fn limited(stream: Io, read_ahead: Bytes, limit: usize) -> Socket {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(WRITE_BUFFER)
            .max_write_buffer_size(WRITE_LIMIT)
            .max_message_size(Some(limit))
            .max_frame_size(Some(limit));
        let inner = WebSocketStream::from_partially_read(
            stream,
            // A copy of what there is, mostly nothing: converted, it would bring the
            // request's whole buffer along, and the connection would keep it for life.
            read_ahead.to_vec(),
            Role::Server,
            Some(config),
        )
        .await;
        Socket { inner }
    }

    /// The stream below, for its counters and socket options.
    pub fn stream(&self) -> &Io {
        self.inner.get_ref()
    }

    /// The stream below, to move it to another runtime.
    pub fn stream_mut(&mut self) -> &mut Io {
        self.inner.get_mut()
    }

    /// Sends a message that nothing is waiting behind.
    pub async fn send(&mut self, message: Message) -> Result<(), Broken> {
        self.feed(message)?;
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// The next message.
    pub async fn next(&mut self) -> Result<Incoming, Broken> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Says why we end and waits for the peer to have seen it. The caller
    /// bounds the time.
    pub async fn close(&mut self, code: u16, reason: &str) {
        if self.send(close_message(code, reason)).await.is_err() {
            return;
        }
        // Whatever still arrives is of no interest, only that it ends.
        loop {
            match self.next().await {
                Ok(Incoming::Close { .. }) | Err(Broken::Lost) => return,
                Ok(_) => {}
                Err(Broken::Protocol | Broken::TooBig) => break,
            }
        }
        // Nor is what can no longer be told apart, such as the rest of a message
        // that was refused; but a socket closed with something unread in it
        // resets, and takes the farewell with it.
        let stream = self.inner.get_mut();
        if stream.shutdown().await.is_ok() {
            let mut rest = [0; 1024];
            while matches!(stream.read(&mut rest).await, Ok(n) if n > 0) {}
        }
    }
}

/// A close frame; the reason is cut to what one may hold.
pub fn close_message(code: u16, reason: &str) -> Message {
    let reason = &reason[..reason.floor_char_boundary(123)];
    Message::Close(Some(CloseFrame {
        code: CloseCode::from(code),
        reason: reason.into(),
    }))
}

impl Transport for Socket {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Incoming, Broken>> {
        let message = ready!(Pin::new(&mut self.inner).poll_next(cx));
        Poll::Ready(match message {
            None => Err(Broken::Lost),
            Some(Err(error)) => Err(broken(&error)),
            Some(Ok(Message::Binary(data))) => Ok(Incoming::Data(data)),
            Some(Ok(Message::Text(text))) => Ok(Incoming::Text(text)),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {
                Ok(Incoming::Control)
            }
            Some(Ok(Message::Close(frame))) => Ok(Incoming::Close {
                code: frame.map(|f| f.code.into()),
            }),
        })
    }

    fn feed(&mut self, message: Message) -> Result<(), Broken> {
        Pin::new(&mut self.inner)
            .start_send(message)
            .map_err(|e| broken(&e))
    }

    fn data(&mut self, cx: &mut Context<'_>, payload: &[u8]) -> Result<(), Broken> {
        // What the library would do, without the copy into a buffer of its own,
        // which it would then also keep for life. It has nothing of its own to
        // send now, and what it has later goes behind.
        let header = Header::new(payload.len(), None);
        self.inner
            .get_mut()
            .give(cx, header.bytes(), payload)
            .map_err(|_| Broken::Lost)
    }

    fn keep_apart(&mut self, apart: bool) {
        self.inner.get_mut().keep_apart(apart);
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        Pin::new(&mut self.inner)
            .poll_flush(cx)
            .map_err(|e| broken(&e))
    }

    fn wire(&self) -> (u64, u64) {
        self.inner.get_ref().wire()
    }
}

fn broken(error: &Error) -> Broken {
    match error {
        Error::Capacity(_) => Broken::TooBig,
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Broken::Lost,
        Error::Protocol(_) | Error::Utf8(_) => Broken::Protocol,
        _ => Broken::Lost,
    }
}
