//! A gateway that says whatever a test wants said, over whatever certificate.
//!
//! It speaks enough of the protocol for the real client to believe it, and
//! writes down all it was told, so that a test can count what it was not told.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::{SinkExt, StreamExt};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rvpn_proto::control::{Goodbye, Message as Control, SUBPROTOCOL, Stage};
use rvpn_proto::record::{Offload, Reader, append};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::broadcast;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::http::HeaderValue;

use crate::machine::Machine;
use crate::ns::Ns;
use crate::wait_until;

/// A certificate with its key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// One that nobody vouches for.
    pub fn alone(name: &str) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let made = params(name).self_signed(&key).expect("a certificate");
        Identity::new(made.der().clone(), &key)
    }

    fn new(certificate: CertificateDer<'static>, key: &KeyPair) -> Identity {
        Identity {
            chain: vec![certificate],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        }
    }

    /// The SHA-256 by which clients pin it.
    pub fn fingerprint(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.chain[0]);
        digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
    }
}

fn params(name: &str) -> CertificateParams {
    CertificateParams::new(vec![name.to_owned()]).expect("a name")
}

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Who vouches for certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Default for Authority {
    fn default() -> Authority {
        Authority::new()
    }
}

impl Authority {
    pub fn new() -> Authority {
        let key = KeyPair::generate().expect("a key");
        let mut own = params("ca.test");
        // No two of the same name: they would be told apart by their keys only.
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        own.distinguished_name
            .push(DnType::CommonName, format!("authority {n}"));
        own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let made = own.self_signed(&key).expect("a certificate");
        Authority {
            pem: made.pem(),
            issuer: Issuer::new(own, key),
        }
    }

    /// Its own certificate as a file.
    pub fn file(&self, dir: &Path) -> PathBuf {
        let path = dir.join("authority.pem");
        std::fs::write(&path, &self.pem).expect("certificate");
        path
    }

    /// A certificate of this name, and whether it is still good.
    pub fn identity(&self, name: &str, expired: bool) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let mut wanted = params(name);
        if expired {
            wanted.not_before = date_time_ymd(2020, 1, 1);
            wanted.not_after = date_time_ymd(2021, 1, 1);
        }
        let made = wanted.signed_by(&key, &self.issuer).expect("a certificate");
        Identity::new(made.der().clone(), &key)
    }
}

/// What the client did so far.
#[derive(Default)]
pub struct Heard {
    /// TCP connections.
    pub connections: usize,
    /// Requests that came through TLS, with what they showed as a login.
    pub logins: Vec<String>,
    /// Farewells of the client, and the codes of its close frames.
    pub goodbyes: Vec<Goodbye>,
    pub closes: Vec<u16>,
    /// Inner packets.
    pub packets: Vec<Vec<u8>>,
}

/// The gateway; it ends with the test.
pub struct FakeGateway {
    at: String,
    fingerprint: String,
    tls: Arc<Mutex<TlsAcceptor>>,
    heard: Arc<Mutex<Heard>>,
    packets: broadcast::Sender<Vec<u8>>,
    welcome: Arc<Mutex<Value>>,
}

/// A welcome with nothing wrong in it, IPv4 only.
pub fn welcome() -> Value {
    json!({
        "kind": "welcome", "version": 1, "name": "fake/1", "session": "s1",
        "v4": {"address": "10.64.0.2", "peer": "10.64.0.1"},
        "mtu": 1500, "keepalive_s": 12,
        "limits": {"max_message": 196_608, "max_control": 16_384},
        "routes": ["0.0.0.0/0"],
    })
}

/// The same with some fields replaced.
pub fn welcome_with(fields: &Value) -> Value {
    let mut all = welcome();
    for (key, value) in fields.as_object().expect("an object") {
        all[key] = value.clone();
    }
    all
}

impl FakeGateway {
    /// Listens in the namespace and greets everybody with this.
    pub fn start(ns: &Ns, at: &str, identity: Identity, welcome: Value) -> FakeGateway {
        let listener = ns.tcp(at);
        let fingerprint = identity.fingerprint();
        let (packets, _) = broadcast::channel(4096);
        let fake = FakeGateway {
            at: at.to_owned(),
            fingerprint,
            tls: Arc::new(Mutex::new(acceptor(identity))),
            heard: Arc::default(),
            packets,
            welcome: Arc::new(Mutex::new(welcome)),
        };
        let serve = Serve {
            tls: fake.tls.clone(),
            heard: fake.heard.clone(),
            packets: fake.packets.clone(),
            welcome: fake.welcome.clone(),
        };
        std::thread::spawn(move || serve.all(listener));
        fake
    }

    /// Greets differently from now on.
    pub fn greet(&self, welcome: Value) {
        *self.welcome.lock().expect("lock") = welcome;
    }

    /// Is somebody else from the next connection on.
    pub fn turn_into(&self, identity: Identity) {
        *self.tls.lock().expect("lock") = acceptor(identity);
    }

    /// Cuts the connections.
    pub fn cut(&self) {
        self.packets
            .send(Vec::new())
            .expect("a client is connected");
    }

    /// What the client did so far.
    pub fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().expect("lock")
    }

    /// Sends a packet to whoever is connected.
    pub fn send(&self, packet: &[u8]) {
        self.packets
            .send(packet.to_vec())
            .expect("a client is connected");
    }

    /// Waits until the client has sent a packet that holds these bytes.
    #[track_caller]
    pub fn expect(&self, needle: &[u8]) -> Vec<u8> {
        let mut found = None;
        wait_until("the packet comes through the tunnel", || {
            let heard = self.heard();
            let mut packets = heard.packets.iter();
            found = packets
                .find(|p| crate::capture::contains(p, needle))
                .cloned();
            found.is_some()
        });
        found.expect("found")
    }

    /// The words by which a client logs in here and believes its certificate.
    pub fn words(&self, machine: &Machine) -> Vec<String> {
        let mut words = self.words_without_trust(machine);
        words.extend(["--fingerprint".to_owned(), self.fingerprint.clone()]);
        words
    }

    /// The same without a word on certificates.
    pub fn words_without_trust(&self, machine: &Machine) -> Vec<String> {
        let token = machine.secret("token", "canary.of.token");
        ["--server", &self.at, "--token-file", &token]
            .map(str::to_owned)
            .to_vec()
    }
}

fn acceptor(identity: Identity) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(identity.chain, identity.key)
        .expect("a certificate");
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

struct Serve {
    tls: Arc<Mutex<TlsAcceptor>>,
    heard: Arc<Mutex<Heard>>,
    packets: broadcast::Sender<Vec<u8>>,
    welcome: Arc<Mutex<Value>>,
}

impl Serve {
    fn all(self, listener: TcpListener) {
        let serve = Arc::new(self);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async move {
            listener.set_nonblocking(true).expect("listener");
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            while let Ok((tcp, _)) = listener.accept().await {
                let serve = serve.clone();
                tokio::spawn(async move { serve.one(tcp).await });
            }
        });
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().expect("lock")
    }

    /// Whatever goes wrong is what the test is about, and ends this connection only.
    async fn one(&self, tcp: TcpStream) -> Option<()> {
        self.heard().connections += 1;
        let acceptor = self.tls.lock().expect("lock").clone();
        let tls = acceptor.accept(tcp).await.ok()?;
        #[expect(
            clippy::result_large_err,
            reason = "the callback's type is the library's"
        )]
        let upgraded = accept_hdr_async(tls, |request: &Request, mut response: Response| {
            let login = request.headers().get("Authorization");
            let login = login.and_then(|v| v.to_str().ok()).unwrap_or("");
            self.heard().logins.push(login.to_owned());
            let chosen = HeaderValue::from_static(SUBPROTOCOL);
            response
                .headers_mut()
                .insert("Sec-WebSocket-Protocol", chosen);
            Ok(response)
        });
        let (mut tx, mut rx) = upgraded.await.ok()?.split();
        while !matches!(rx.next().await?.ok()?, Message::Text(_)) {}
        let text = self.welcome.lock().expect("lock").to_string();
        let mut packets = self.packets.subscribe();
        tx.send(Message::text(text)).await.ok()?;
        loop {
            tokio::select! {
                packet = packets.recv() => {
                    let packet = packet.ok()?;
                    if packet.is_empty() {
                        return None;
                    }
                    let mut message = Vec::new();
                    append(&mut message, &packet, Offload::NONE).ok()?;
                    tx.send(Message::binary(message)).await.ok()?;
                }
                message = rx.next() => match message?.ok()? {
                    Message::Binary(data) => {
                        let records = Reader::new(&data).map_while(Result::ok);
                        self.heard().packets.extend(records.map(|r| r.packet.to_vec()));
                    }
                    Message::Text(text) => {
                        if let Ok(Control::Goodbye(goodbye)) = Control::parse(&text, Stage::Session) {
                            self.heard().goodbyes.push(goodbye);
                        }
                    }
                    Message::Close(frame) => {
                        self.heard().closes.extend(frame.map(|f| u16::from(f.code)));
                    }
                    _ => {}
                }
            }
        }
    }
}
