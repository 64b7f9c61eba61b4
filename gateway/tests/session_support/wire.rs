//! A connection between a test and a session: plain TCP over loopback with a
//! WebSocket on it.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rvpn_gateway::admit::{Counted, Io, Prefixed};
use rvpn_gateway::session::transport::Socket;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{Bytes, Message};
use tokio_tungstenite::{WebSocketStream, accept_async, client_async};

use super::fake_helper::PATIENCE;

/// The client's half.
pub(crate) struct Client {
    pub(crate) socket: WebSocketStream<TcpStream>,
}

/// Both halves of a new connection.
pub(crate) async fn connect() -> (Client, Socket) {
    let (client, io) = connect_io().await;
    (client, Socket::accept(io, Bytes::new()).await)
}

/// Both halves, the gateway's as it is after the upgrade.
pub(crate) async fn connect_io() -> (Client, Io) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let client = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        client_async("ws://gateway/", tcp).await.unwrap().0
    };
    let server = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let io = Io::plain(Prefixed::new(Bytes::new(), Counted::new(tcp)));
        accept_async(io).await.unwrap().into_inner()
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
