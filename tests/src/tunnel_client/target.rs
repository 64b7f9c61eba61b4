//! What is spoken, and where.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use rustls::pki_types::ServerName;
use rvpn_proto::control::{PATH, SUBPROTOCOL};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, Request, Response};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::PATIENCE;
use crate::gateway::{Gateway, NAME};

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speech {
    /// `rvpn.packets.1`, with or without super-packets.
    Native {
        offload: bool,
    },
    Raw,
    Text4,
    Text46,
    Padded,
}

impl Speech {
    /// The older four.
    pub const OLDER: [Speech; 4] = [Speech::Raw, Speech::Text4, Speech::Text46, Speech::Padded];

    /// Whether its clients have IPv6.
    pub fn has_v6(self) -> bool {
        !matches!(self, Speech::Raw | Speech::Text4)
    }

    /// Its name in the configuration.
    pub fn kind(self) -> &'static str {
        match self {
            Speech::Native { .. } => "native",
            Speech::Raw => "raw",
            Speech::Text4 => "text4",
            Speech::Text46 => "text46",
            Speech::Padded => "padded",
        }
    }

    /// Where [`DIALECTS`] puts it.
    pub fn path(self) -> &'static str {
        match self {
            Speech::Native { .. } => PATH,
            Speech::Raw => "/raw",
            Speech::Text4 => "/text4",
            Speech::Text46 => "/text46",
            Speech::Padded => "/tunnel",
        }
    }
}

/// All four older dialects, for holders of a token.
pub const DIALECTS: &str = "\
[[dialect]]\npath = \"/raw\"\nkind = \"raw\"\n\
[[dialect]]\npath = \"/text4\"\nkind = \"text4\"\n\
[[dialect]]\npath = \"/text46\"\nkind = \"text46\"\n\
[[dialect]]\npath = \"/tunnel\"\nkind = \"padded\"\n";

pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

pub type Socket = WebSocketStream<Box<dyn Stream>>;

/// A place that speaks WebSocket, and what is believed of it.
#[derive(Clone)]
pub struct Target {
    pub at: SocketAddr,
    tls: Option<Arc<rustls::ClientConfig>>,
    /// The host of requests.
    pub host: String,
}

/// A socket and where it is bound on the client's side.
pub struct Opened {
    pub socket: Socket,
    pub local: SocketAddr,
    /// When the upgrade was answered.
    pub since: Instant,
}

impl Target {
    /// The gateway itself, whose own certificate is the only one that counts.
    pub fn of(gateway: &Gateway) -> Target {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(gateway.certificate()).expect("certificate");
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
        Target {
            at: gateway.address(),
            tls: Some(Arc::new(config)),
            host: NAME.to_owned(),
        }
    }

    /// A place without TLS, such as a proxy.
    pub fn plain(at: SocketAddr) -> Target {
        Target {
            at,
            tls: None,
            host: NAME.to_owned(),
        }
    }

    /// The same through another address, such as a relay's.
    pub fn via(mut self, at: SocketAddr) -> Target {
        self.at = at;
        self
    }

    /// A connection without a request.
    pub async fn connect(&self) -> io::Result<(Box<dyn Stream>, SocketAddr)> {
        let tcp = TcpStream::connect(self.at).await?;
        self.over(tcp).await
    }

    /// The same from one of this machine's addresses.
    pub async fn connect_from(
        &self,
        from: SocketAddr,
    ) -> io::Result<(Box<dyn Stream>, SocketAddr)> {
        let socket = match from {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.bind(from)?;
        let tcp = socket.connect(self.at).await?;
        self.over(tcp).await
    }

    async fn over(&self, tcp: TcpStream) -> io::Result<(Box<dyn Stream>, SocketAddr)> {
        tcp.set_nodelay(true)?;
        let local = tcp.local_addr()?;
        let io: Box<dyn Stream> = match &self.tls {
            Some(config) => {
                let name = ServerName::try_from(NAME).expect("a name");
                let tls = TlsConnector::from(config.clone());
                Box::new(tls.connect(name, tcp).await?)
            }
            None => Box::new(tcp),
        };
        Ok((io, local))
    }

    /// The upgrade request of a path, with a token as programs show it.
    pub fn request(&self, path: &str, token: Option<&str>) -> Request<()> {
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        let mut request = format!("{scheme}://{}{path}", self.host)
            .into_client_request()
            .expect("a request");
        let headers = request.headers_mut();
        if let Some(token) = token {
            let value = HeaderValue::from_str(&format!("Bearer {token}")).expect("a token");
            headers.insert("Authorization", value);
        }
        if path == PATH {
            let native = HeaderValue::from_static(SUBPROTOCOL);
            headers.insert("Sec-WebSocket-Protocol", native);
        }
        request
    }

    /// Upgrades; an answer other than 101 is the error.
    pub async fn open(
        &self,
        path: &str,
        token: Option<&str>,
    ) -> Result<Opened, Box<Response<Option<Vec<u8>>>>> {
        let connecting = async {
            let (io, local) = self
                .connect()
                .await
                .unwrap_or_else(|e| panic!("{}: {e}", self.at));
            match client_async(self.request(path, token), io).await {
                Ok((socket, _)) => Ok(Opened {
                    socket,
                    local,
                    since: Instant::now(),
                }),
                Err(tungstenite::Error::Http(response)) => Err(response),
                Err(e) => panic!("{path}: {e}"),
            }
        };
        timeout(PATIENCE, connecting)
            .await
            .expect("an answer to the upgrade in time")
    }
}
