//! A certificate authority that speaks ACME (RFC 8555), strict about what it is
//! asked and honest about what it looks at.
//!
//! It checks every signature and nonce, really connects to look for challenges
//! (RFC 8737 by TLS, RFC 8555 section 8.3 by HTTP), and signs what a request
//! holds only if it is for the name that was proved.

mod issue;
mod jws;
mod look;
mod state;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use self::issue::Issuer;
use self::state::State;
use crate::PATIENCE;

/// What was asked so far.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Accounts made.
    pub accounts: usize,
    /// Orders, by name.
    pub orders: Vec<String>,
    /// Challenges looked for: kind, name, and whether the answer was there.
    pub looks: Vec<(String, String, bool)>,
    /// Certificates signed, by name.
    pub signed: Vec<String>,
}

/// A running authority. It ends with this.
pub struct AcmeServer {
    at: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    base: String,
    issuer: Issuer,
    state: Mutex<State>,
    /// Where names lead to, instead of ports 443 and 80.
    tls_port: AtomicU16,
    http_port: AtomicU16,
    /// How long certificates are good, in seconds.
    life: AtomicU16,
    /// Whether no name is signed for.
    refusing: AtomicBool,
    closed: AtomicBool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic inside")
    }
}

impl AcmeServer {
    /// One at a port of its own on loopback. Certificates are good for `life`.
    pub fn start(life: Duration) -> AcmeServer {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let at = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            base: format!("https://127.0.0.1:{}", at.port()),
            issuer: Issuer::new(),
            state: Mutex::default(),
            tls_port: AtomicU16::new(0),
            http_port: AtomicU16::new(0),
            life: AtomicU16::new(u16::try_from(life.as_secs()).expect("hours at most")),
            refusing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let served = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                tokio::select! {
                    () = serve(served, listener) => {}
                    _ = stopped => {}
                }
            });
        });
        AcmeServer {
            at,
            shared,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Where its directory is.
    pub fn directory(&self) -> String {
        format!("{}/directory", self.shared.base)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.at.port()
    }

    /// Whom to believe: it signs its own certificate with the same key.
    pub fn ca_pem(&self) -> &str {
        self.shared.issuer.pem()
    }

    /// The same as a file.
    pub fn ca_file(&self, dir: &Path) -> PathBuf {
        let path = dir.join("acme-ca.pem");
        std::fs::write(&path, self.ca_pem()).expect("a file");
        path
    }

    /// Lets all names lead to these ports of loopback: for TLS, and for HTTP.
    pub fn lead(&self, tls: u16, http: u16) {
        self.shared.tls_port.store(tls, Ordering::SeqCst);
        self.shared.http_port.store(http, Ordering::SeqCst);
    }

    /// Changes how long certificates are good from now on.
    pub fn life(&self, life: Duration) {
        let seconds = u16::try_from(life.as_secs()).expect("hours at most");
        self.shared.life.store(seconds, Ordering::SeqCst);
    }

    /// Signs for no name from now on, or for every one again.
    pub fn refuse(&self, all: bool) {
        self.shared.refusing.store(all, Ordering::SeqCst);
    }

    /// Closes every connection without an answer, or stops doing so.
    pub fn close(&self, all: bool) {
        self.shared.closed.store(all, Ordering::SeqCst);
    }

    /// Forgets all accounts, as some authorities do.
    pub fn forget(&self) {
        self.shared.state().accounts.clear();
    }

    /// What was asked so far.
    pub fn asked(&self) -> Asked {
        self.shared.state().asked.clone()
    }
}

impl Drop for AcmeServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _gone = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: std::net::TcpListener) {
    let listener = TcpListener::from_std(listener).expect("a runtime");
    let (chain, key) = shared.issuer.own();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|b| {
            let key = PrivateKeyDer::Pkcs8(key.into());
            b.with_no_client_auth()
                .with_single_cert(vec![CertificateDer::from(chain)], key)
        })
        .expect("a certificate");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            continue;
        };
        let (shared, acceptor) = (Arc::clone(&shared), acceptor.clone());
        tokio::spawn(async move {
            if !shared.closed.load(Ordering::SeqCst)
                && let Ok(tls) = acceptor.accept(tcp).await
            {
                let _broken = tokio::time::timeout(PATIENCE, talk(&shared, tls)).await;
            }
        });
    }
}

/// A request as it came.
struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

/// What goes back.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    kind: &'static str,
    body: Vec<u8>,
}

impl Answer {
    fn json(status: u16, body: &serde_json::Value) -> Answer {
        Answer {
            status,
            headers: Vec::new(),
            kind: "application/json",
            body: body.to_string().into_bytes(),
        }
    }

    fn problem(status: u16, kind: &str, detail: &str) -> Answer {
        let kind = format!("urn:ietf:params:acme:error:{kind}");
        let body = serde_json::json!({"type": kind, "detail": detail, "status": status});
        Answer {
            kind: "application/problem+json",
            ..Answer::json(status, &body)
        }
    }

    fn at(mut self, location: String) -> Answer {
        self.headers.push(("Location", location));
        self
    }
}

/// One request on each connection.
async fn talk(shared: &Arc<Shared>, mut tls: TlsStream<TcpStream>) -> std::io::Result<()> {
    let request = read(&mut tls).await?;
    let answer = state::respond(shared, &request);
    let nonce = shared.state().nonce();
    let mut head = format!(
        "HTTP/1.1 {} X\r\nContent-Type: {}\r\nContent-Length: {}\r\nReplay-Nonce: {nonce}\r\nConnection: close\r\n",
        answer.status,
        answer.kind,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    tls.write_all(head.as_bytes()).await?;
    if request.method != "HEAD" {
        tls.write_all(&answer.body).await?;
    }
    tls.shutdown().await
}

async fn read(tls: &mut TlsStream<TcpStream>) -> std::io::Result<Request> {
    let end = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if tls.read_buf(&mut bytes).await? == 0 || bytes.len() > 1 << 16 {
            return Err(end());
        }
    };
    let mut body = bytes.split_off(head);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let mut lines = text.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let length = lines
        .filter_map(|l| l.split_once(':'))
        .find(|(n, _)| n.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, v)| v.trim().parse::<usize>().ok())
        .unwrap_or(0);
    while body.len() < length {
        if tls.read_buf(&mut body).await? == 0 {
            return Err(end());
        }
    }
    Ok(Request {
        method: first.next().unwrap_or_default().to_owned(),
        path: first.next().unwrap_or_default().to_owned(),
        body,
    })
}
