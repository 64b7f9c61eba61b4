//! A small client of the gateway for tests: the native protocol and the four
//! older dialects behind one interface, and everything a client should not do.
//!
//! What the older dialects put around a packet is written down here once more,
//! so that a test compares two readings of the specification.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use rustls::pki_types::ServerName;
use rvpn_proto::control::{Hello, Message as Control, OFFLOAD, PATH, SUBPROTOCOL, Stage, Welcome};
use rvpn_proto::record::{MESSAGE_LIMIT, Offload, Reader, append};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, Request, Response};
use tokio_tungstenite::tungstenite::{self, Bytes, Message};
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

/// What a client says at first, where it has a choice.
#[derive(Clone, Debug, Default)]
pub struct Login {
    pub instance: String,
    pub ticket: Option<String>,
    pub mtu: Option<u16>,
}

/// A session that is open.
pub struct Session {
    pub tx: Sender,
    pub rx: Receiver,
    /// Its addresses, as it has to use them.
    pub v4: Ipv4Addr,
    pub v6: Option<Ipv6Addr>,
    pub welcome: Option<Welcome>,
    /// The text of the greeting, if there was one.
    pub greeting: Option<String>,
    /// From the answer to the upgrade to the greeting or welcome.
    pub waited: Duration,
    /// The client's end of the TCP connection.
    pub local: SocketAddr,
}

/// How the gateway ended it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    pub code: u16,
    pub reason: String,
}

impl Session {
    /// Logs in and waits for the addresses; for a raw client these are
    /// anything it likes, here 127.0.1.2.
    #[track_caller]
    pub fn open(target: &Target, speech: Speech, token: &str) -> impl Future<Output = Session> {
        let login = Login::default();
        async move {
            match Session::try_open(target, speech, speech.path(), Some(token), login).await {
                Ok(session) => session,
                Err(closed) => panic!("{speech:?} was not let in: {closed:?}"),
            }
        }
    }

    /// The same on another path, without a token, or with a ticket. An error is
    /// the close frame, or the status in its place.
    pub async fn try_open(
        target: &Target,
        speech: Speech,
        path: &str,
        token: Option<&str>,
        login: Login,
    ) -> Result<Session, Closed> {
        let opened = target.open(path, token).await.map_err(|answer| Closed {
            code: answer.status().as_u16(),
            reason: String::new(),
        })?;
        let Opened {
            socket,
            local,
            since,
        } = opened;
        let (sink, stream) = socket.split();
        let mut session = Session {
            tx: Sender { speech, sink },
            rx: Receiver {
                speech,
                stream,
                waiting: VecDeque::new(),
                padding: Vec::new(),
                noise: Vec::new(),
            },
            v4: Ipv4Addr::new(127, 0, 1, 2),
            v6: None,
            welcome: None,
            greeting: None,
            waited: Duration::ZERO,
            local,
        };
        match speech {
            Speech::Native { offload } => session.greet(offload, login).await?,
            Speech::Raw => {}
            Speech::Text4 | Speech::Text46 | Speech::Padded => session.greeted().await?,
        }
        session.waited = since.elapsed();
        Ok(session)
    }

    async fn greet(&mut self, offload: bool, login: Login) -> Result<(), Closed> {
        let mut hello = Hello {
            versions: vec![1],
            name: "lab".to_owned(),
            instance: login.instance,
            ticket: login.ticket,
            mtu: login.mtu,
            ..Hello::default()
        };
        if hello.instance.is_empty() {
            hello.instance = "lab".to_owned();
        }
        if offload {
            hello.capabilities.push(OFFLOAD.to_owned());
        }
        let text = Control::Hello(hello)
            .to_text(Stage::BeforeLogin)
            .expect("a hello");
        self.tx.message(Message::text(text)).await;
        loop {
            match self.rx.event().await {
                Event::Text(text) => match Control::parse(&text, Stage::Session) {
                    Ok(Control::Welcome(welcome)) => {
                        self.v4 = welcome.v4.address;
                        self.v6 = welcome.v6.map(|pair| pair.address);
                        self.welcome = Some(*welcome);
                        return Ok(());
                    }
                    // The close frame that follows says the same.
                    Ok(Control::Goodbye(_)) => {}
                    other => panic!("in place of a welcome: {other:?}"),
                },
                Event::Closed(closed) => return Err(closed),
                other => panic!("in place of a welcome: {other:?}"),
            }
        }
    }

    async fn greeted(&mut self) -> Result<(), Closed> {
        let text = loop {
            match self.rx.event().await {
                Event::Text(text) => break text,
                Event::Packet(body, _) if self.rx.speech == Speech::Padded => {
                    break String::from_utf8(body.to_vec()).expect("a greeting in ASCII");
                }
                Event::Noise => {}
                Event::Closed(closed) => return Err(closed),
                other => panic!("in place of a greeting: {other:?}"),
            }
        };
        let mut bases = text.split(',').map(|subnet| {
            let (base, length) = subnet.split_once('/').expect("a subnet");
            assert!(length.parse::<u8>().is_ok(), "{text}");
            base
        });
        let v4: Ipv4Addr = bases.next().and_then(|b| b.parse().ok()).expect("IPv4");
        self.v4 = (u32::from(v4) + 2).into();
        self.v6 = bases.next().map(|base| {
            // Full groups, which old clients split at the colons.
            assert_eq!(
                base.split(':').filter(|g| !g.is_empty()).count(),
                8,
                "{text}"
            );
            let base: Ipv6Addr = base.parse().expect("IPv6");
            (u128::from(base) + 1).into()
        });
        assert_eq!(self.v6.is_some(), self.rx.speech.has_v6(), "{text}");
        self.greeting = Some(text);
        Ok(())
    }

    /// Its address of the family of `like`.
    pub fn source(&self, like: &str) -> String {
        if like.contains(':') {
            self.v6.expect("a client with IPv6").to_string()
        } else {
            self.v4.to_string()
        }
    }

    /// Sends an echo request there and waits for the answer to it.
    pub async fn ping(&mut self, host: &str, id: u16, sequence: u16) {
        let payload = [id.to_be_bytes(), sequence.to_be_bytes()].concat();
        let request = crate::packet::echo(&self.source(host), host, id, sequence, &payload);
        self.tx.send(&request).await;
        loop {
            let packet = self.rx.packet().await;
            // Type, code, checksum, identifier, sequence.
            let (kind, at) = if host.contains(':') {
                (129, 40)
            } else {
                (0, 20)
            };
            let body = packet.get(at..).unwrap_or_default();
            if body.first() == Some(&kind)
                && body.get(4..) == Some([&payload[..], &payload].concat().as_slice())
            {
                return;
            }
        }
    }
}

/// The client's way out.
pub struct Sender {
    speech: Speech,
    sink: SplitSink<Socket, Message>,
}

impl Sender {
    /// A packet in a message of its own.
    pub async fn send(&mut self, packet: &[u8]) {
        self.feed(packet, Offload::NONE).await;
        self.flush().await;
    }

    /// The same without waiting for it to leave.
    pub async fn feed(&mut self, packet: &[u8], offload: Offload) {
        let message = self.wrap(packet, offload);
        self.sink.feed(message).await.expect("send");
    }

    pub async fn flush(&mut self) {
        self.sink.flush().await.expect("send");
    }

    /// Several packets, in as few messages as this client may.
    pub async fn feed_all(&mut self, packets: &[Vec<u8>]) {
        if !matches!(self.speech, Speech::Native { .. }) {
            for packet in packets {
                self.feed(packet, Offload::NONE).await;
            }
            return;
        }
        let mut message = Vec::new();
        for packet in packets {
            if message.len() + 8 + packet.len() > MESSAGE_LIMIT {
                let full = Message::binary(std::mem::take(&mut message));
                self.sink.feed(full).await.expect("send");
            }
            append(&mut message, packet, Offload::NONE).expect("a packet");
        }
        self.sink
            .feed(Message::binary(message))
            .await
            .expect("send");
    }

    /// Any message at all.
    pub async fn message(&mut self, message: Message) {
        self.sink.send(message).await.expect("send");
    }

    /// The same, of a connection that may be gone.
    pub async fn try_message(&mut self, message: Message) -> Result<(), tungstenite::Error> {
        self.sink.send(message).await
    }

    /// What goes around a packet.
    pub fn wrap(&self, packet: &[u8], offload: Offload) -> Message {
        match self.speech {
            Speech::Native { .. } => {
                let mut message = Vec::with_capacity(packet.len() + 8);
                append(&mut message, packet, offload).expect("a packet");
                Message::binary(message)
            }
            Speech::Raw | Speech::Text4 | Speech::Text46 => Message::binary(packet.to_vec()),
            Speech::Padded => {
                let length = u16::try_from(packet.len()).expect("a short packet");
                assert!(length < 0x8000, "a short packet");
                let mut message = (0x8000 | length).to_be_bytes().to_vec();
                message.extend(packet);
                // A padding that differs from packet to packet.
                message.resize(message.len() + usize::from(length % 3), 0);
                Message::binary(message)
            }
        }
    }
}

/// The client's way in.
pub struct Receiver {
    speech: Speech,
    stream: SplitStream<Socket>,
    waiting: VecDeque<(Bytes, Offload)>,
    padding: Vec<usize>,
    noise: Vec<usize>,
}

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Packet(Bytes, Offload),
    Text(String),
    Noise,
    /// A WebSocket ping; it is answered.
    Ping,
    Closed(Closed),
}

impl Receiver {
    /// Whatever comes next.
    pub async fn event(&mut self) -> Event {
        match timeout(PATIENCE, self.wait()).await {
            Ok(event) => event,
            Err(_) => panic!("{:?}: nothing came within {PATIENCE:?}", self.speech),
        }
    }

    /// The same without an end.
    pub async fn wait(&mut self) -> Event {
        loop {
            if let Some((packet, offload)) = self.waiting.pop_front() {
                return Event::Packet(packet, offload);
            }
            match self.stream.next().await {
                None => return broken("the end of the connection"),
                Some(Err(e)) => return broken(&e.to_string()),
                Some(Ok(Message::Text(text))) => return Event::Text(text.to_string()),
                Some(Ok(Message::Ping(_))) => return Event::Ping,
                Some(Ok(Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(frame))) => {
                    let (code, reason) = frame.map_or((1005, String::new()), |frame| {
                        (frame.code.into(), frame.reason.to_string())
                    });
                    return Event::Closed(Closed { code, reason });
                }
                Some(Ok(Message::Binary(data))) => {
                    if let Some(event) = self.unwrap(data) {
                        return event;
                    }
                }
            }
        }
    }

    fn unwrap(&mut self, data: Bytes) -> Option<Event> {
        match self.speech {
            Speech::Native { .. } => {
                for record in Reader::new(&data) {
                    let record = record.unwrap_or_else(|e| panic!("{e}"));
                    let packet = data.slice_ref(record.packet);
                    self.waiting.push_back((packet, record.offload));
                }
                None
            }
            Speech::Raw | Speech::Text4 | Speech::Text46 => {
                Some(Event::Packet(data, Offload::NONE))
            }
            Speech::Padded => {
                if data.first().is_none_or(|first| *first == 0) {
                    self.noise.push(data.len());
                    return Some(Event::Noise);
                }
                let prefix = u16::from_be_bytes([data[0], data[1]]);
                assert!(prefix & 0x8000 != 0, "a length: {data:02x?}");
                let end = 2 + usize::from(prefix & 0x7fff);
                assert!(data[end..].iter().all(|b| *b == 0), "padding: {data:02x?}");
                self.padding.push(data.len() - end);
                Some(Event::Packet(data.slice(2..end), Offload::NONE))
            }
        }
    }

    /// Padding bytes of every message of the padded dialect so far.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    /// Bytes of every message of noise so far.
    pub fn noise(&self) -> &[usize] {
        &self.noise
    }

    /// The next packet, past noise and control messages.
    pub async fn packet(&mut self) -> Bytes {
        self.packet_with().await.0
    }

    /// The same, and what is left to do for it.
    pub async fn packet_with(&mut self) -> (Bytes, Offload) {
        loop {
            match self.event().await {
                Event::Packet(packet, offload) => return (packet, offload),
                Event::Text(_) | Event::Noise | Event::Ping => {}
                Event::Closed(closed) => panic!("{:?}: {closed:?}", self.speech),
            }
        }
    }

    /// How it ends, past everything else.
    pub async fn closed(&mut self) -> Closed {
        loop {
            if let Event::Closed(closed) = self.event().await {
                return closed;
            }
        }
    }
}

fn broken(how: &str) -> Event {
    Event::Closed(Closed {
        code: 1006,
        reason: how.to_owned(),
    })
}

/// Runs a client's part on its own machine, on one thread.
pub fn on<T: Send, F: Future<Output = T>>(
    machine: &crate::Ns,
    part: impl FnOnce() -> F + Send,
) -> T {
    machine.run(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime")
            .block_on(part())
    })
}
