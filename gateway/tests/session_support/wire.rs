//! A connection between a test and a session: plain TCP over loopback with a
//! WebSocket on it, byte counters included.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rvpn_gateway::session::transport::{ClientIo, Socket};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{Bytes, Message};
use tokio_tungstenite::{WebSocketStream, accept_async, client_async};

use super::fake_helper::PATIENCE;

/// What the gateway's own stream does, without TLS.
#[derive(Debug)]
pub(crate) struct PlainIo {
    tcp: Option<TcpStream>,
    read: u64,
    written: u64,
}

impl PlainIo {
    fn tcp(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(self.tcp.as_mut().unwrap())
    }
}

impl AsyncRead for PlainIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = self.tcp().poll_read(cx, buf);
        self.read += (buf.filled().len() - before) as u64;
        polled
    }
}

impl AsyncWrite for PlainIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = self.tcp().poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = polled {
            self.written += n as u64;
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp().poll_shutdown(cx)
    }
}

impl ClientIo for PlainIo {
    fn wire(&self) -> (u64, u64) {
        (self.read, self.written)
    }

    fn rehome(&mut self) -> io::Result<()> {
        let tcp = self.tcp.take().unwrap().into_std()?;
        self.tcp = Some(TcpStream::from_std(tcp)?);
        Ok(())
    }
}

/// The client's half.
pub(crate) struct Client {
    pub(crate) socket: WebSocketStream<TcpStream>,
}

/// Both halves of a new connection.
pub(crate) async fn connect() -> (Client, Socket<PlainIo>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let client = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        client_async("ws://gateway/", tcp).await.unwrap().0
    };
    let server = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let io = PlainIo {
            tcp: Some(tcp),
            read: 0,
            written: 0,
        };
        let io = accept_async(io).await.unwrap().into_inner();
        Socket::accept(io, Vec::new()).await
    };
    let (socket, server) = tokio::join!(client, server);
    (Client { socket }, server)
}

impl Client {
    pub(crate) async fn send(&mut self, message: impl Into<Message>) {
        self.socket.send(message.into()).await.unwrap();
    }

    /// The next message that is neither ping nor pong.
    pub(crate) async fn next(&mut self) -> Message {
        loop {
            let next = timeout(PATIENCE, self.socket.next());
            let message = next.await.expect("a message in time");
            let message = message.expect("a message, not the end").unwrap();
            if !matches!(message, Message::Ping(_) | Message::Pong(_)) {
                return message;
            }
        }
    }

    pub(crate) async fn data(&mut self) -> Bytes {
        match self.next().await {
            Message::Binary(data) => data,
            other => panic!("{other:?} in place of data"),
        }
    }

    pub(crate) async fn text(&mut self) -> String {
        match self.next().await {
            Message::Text(text) => text.to_string(),
            other => panic!("{other:?} in place of text"),
        }
    }

    /// The close frame, whatever comes before it.
    pub(crate) async fn close_frame(&mut self) -> (u16, String) {
        loop {
            if let Message::Close(frame) = self.next().await {
                let frame = frame.expect("a close frame with a code");
                return (frame.code.into(), frame.reason.to_string());
            }
        }
    }

    /// Nothing arrives for a while.
    pub(crate) async fn silence(&mut self, span: Duration) {
        let got = timeout(span, self.socket.next()).await;
        assert!(got.is_err(), "{got:?} in place of silence");
    }
}
