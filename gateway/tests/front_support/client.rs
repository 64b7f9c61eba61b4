//! Clients that write their requests by hand, so that they can write bad ones.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::{Lab, NAME, PATIENCE};

pub(crate) const NATIVE: &str = "/rvpn/v1/packets";
/// From the RFC, with its answer.
pub(crate) const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
pub(crate) const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// What is behind the headers so far.
    pub(crate) rest: Vec<u8>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, v)| v.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.rest).into_owned()
    }
}

/// A request that opens a WebSocket; more headers go into `more`, each with
/// its line end.
pub(crate) fn upgrade(target: &str, host: &str, more: &str) -> String {
    format!(
        "GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n{more}\r\n"
    )
}

/// The native one with a token.
pub(crate) fn login(token: &str) -> String {
    upgrade(
        NATIVE,
        NAME,
        &format!("Sec-WebSocket-Protocol: rvpn.packets.1\r\nAuthorization: Bearer {token}\r\n"),
    )
}

/// A masked text frame, as a client sends it.
pub(crate) fn frame(text: &str) -> Vec<u8> {
    let mask = [1, 2, 3, 4];
    let mut bytes = vec![0x81, 0x80 | u8::try_from(text.len()).unwrap()];
    bytes.extend(mask);
    bytes.extend(text.bytes().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
    bytes
}

/// Sends a request and reads the answer's head and the body that it announces.
pub(crate) async fn ask<S: AsyncRead + AsyncWrite + Unpin>(io: &mut S, request: &str) -> Reply {
    // A front that refuses may close before it has read all.
    let _sent = io.write_all(request.as_bytes()).await;
    read_reply(io).await
}

pub(crate) async fn read_reply<S: AsyncRead + Unpin>(io: &mut S) -> Reply {
    let reading = async {
        let mut bytes = Vec::new();
        let head = loop {
            if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                break end + 4;
            }
            let n = io.read_buf(&mut bytes).await.unwrap_or(0);
            assert!(n > 0, "closed after {:?}", String::from_utf8_lossy(&bytes));
        };
        let rest = bytes.split_off(head);
        let text = String::from_utf8(bytes).unwrap();
        let mut lines = text.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        let headers = lines
            .filter_map(|l| l.split_once(": "))
            .map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned()))
            .collect();
        let mut reply = Reply {
            status: status.parse().unwrap(),
            headers,
            rest,
        };
        let length = reply
            .header("content-length")
            .map_or(0, |l| l.parse().unwrap());
        while reply.rest.len() < length {
            assert!(
                io.read_buf(&mut reply.rest).await.unwrap() > 0,
                "a whole body"
            );
        }
        reply
    };
    timeout(PATIENCE, reading).await.expect("an answer in time")
}

/// Everything until the end of the connection.
pub(crate) async fn read_to_end<S: AsyncRead + Unpin>(io: &mut S) -> Vec<u8> {
    let mut bytes = Vec::new();
    let reading = async {
        // An abrupt end is an end.
        while io.read_buf(&mut bytes).await.unwrap_or(0) > 0 {}
    };
    timeout(PATIENCE, reading).await.expect("the end in time");
    bytes
}

impl Lab {
    pub(crate) async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.at).await.unwrap()
    }

    /// From another address of this machine.
    pub(crate) async fn tcp_from(&self, ip: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        let from = SocketAddr::new(ip.parse::<IpAddr>().unwrap(), 0);
        socket.bind(from).unwrap();
        socket.connect(self.at).await.unwrap()
    }

    /// A client that believes the certificate in the state directory and no other.
    pub(crate) fn connector(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        let file = self.dir.path().join("tls.crt");
        roots
            .add(CertificateDer::from_pem_file(file).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        TlsConnector::from(Arc::new(config))
    }

    pub(crate) async fn tls(&self) -> TlsStream<TcpStream> {
        self.over(self.tcp().await).await
    }

    pub(crate) async fn over(&self, tcp: TcpStream) -> TlsStream<TcpStream> {
        let name = ServerName::try_from(NAME).unwrap();
        self.connector(rustls::ALL_VERSIONS)
            .connect(name, tcp)
            .await
            .unwrap()
    }

    /// One request on a connection of its own.
    pub(crate) async fn request(&self, request: &str) -> Reply {
        ask(&mut self.tls().await, request).await
    }

    /// The status of a native login with this token.
    pub(crate) async fn try_token(&self, token: &str) -> u16 {
        self.request(&login(token)).await.status
    }

    /// A WebSocket that is logged in.
    pub(crate) async fn socket(&self, request: &str) -> WebSocketStream<TlsStream<TcpStream>> {
        let mut io = self.tls().await;
        let reply = ask(&mut io, request).await;
        assert_eq!(reply.status, 101, "{reply:?}");
        WebSocketStream::from_partially_read(io, reply.rest, Role::Client, None).await
    }
}
