//! A client's machine that serves, its servers, and visitors.

use std::fs;
use std::net::{SocketAddr, TcpStream as StdStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::gateway::Gateway;
use crate::machine::Machine;
use crate::ns::{Daemon, Ns};
use crate::token::claims;
use crate::topology::{GW4, at};
use crate::wait_until;

/// A name's own certificate, made for one test.
pub struct Identity {
    pub certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    /// For programs.
    pub pem: String,
}

impl Identity {
    pub fn of(name: &str) -> Identity {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        let key = signing_key.serialize_der();
        Identity {
            certificate: cert.der().clone(),
            key: PrivateKeyDer::try_from(key).expect("a key"),
            pem: cert.pem(),
        }
    }

    /// What a server of this name has.
    pub fn acceptor(&self) -> TlsAcceptor {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .expect("a certificate");
        TlsAcceptor::from(Arc::new(config))
    }

    /// What a visitor has that believes this one and no other.
    pub fn connector(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("a root");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }
}

/// A connection from a namespace, for the caller's runtime.
pub fn connect(ns: &Ns, to: SocketAddr) -> TcpStream {
    let stream = ns.run(|| StdStream::connect(to).expect("a connection"));
    stream.set_nonblocking(true).expect("a socket");
    let stream = TcpStream::from_std(stream).expect("a socket");
    stream.set_nodelay(true).expect("a socket");
    stream
}

/// A visitor of a name, through the gateway's public port, with TLS that only
/// the name's own server can end.
pub async fn visit(from: &Ns, name: &str, identity: &Identity) -> client::TlsStream<TcpStream> {
    let connected = try_visit(from, name, identity).await;
    connected.unwrap_or_else(|e| panic!("no TLS with {name}: {e}"))
}

/// The same where it may fail.
pub async fn try_visit(
    from: &Ns,
    name: &str,
    identity: &Identity,
) -> std::io::Result<client::TlsStream<TcpStream>> {
    let tcp = connect(from, at(GW4, 443).parse().expect("address"));
    let sni = ServerName::try_from(name.to_owned()).expect("a name");
    identity.connector().connect(sni, tcp).await
}

/// Listens in a namespace, for the caller's runtime.
pub fn listen(ns: &Ns, address: &str) -> TcpListener {
    let listener = ns.tcp(address);
    listener.set_nonblocking(true).expect("a socket");
    TcpListener::from_std(listener).expect("a socket")
}

/// A TLS server that does the same with every connection.
pub fn tls_server<F>(
    ns: &Ns,
    address: &str,
    identity: &Identity,
    serve: impl Fn(server::TlsStream<TcpStream>) -> F + Send + Sync + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let (listener, acceptor) = (listen(ns, address), identity.acceptor());
    let serve = Arc::new(serve);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, serve) = (acceptor.clone(), Arc::clone(&serve));
            tokio::spawn(async move {
                let _nodelay = tcp.set_nodelay(true);
                if let Ok(tls) = acceptor.accept(tcp).await {
                    serve(tls).await;
                }
            });
        }
    });
}

/// Sends everything back.
pub async fn echo(mut tls: server::TlsStream<TcpStream>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match tls.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                if tls.write_all(&buffer[..n]).await.is_err() || tls.flush().await.is_err() {
                    return;
                }
            }
        }
    }
    let _gone = tls.shutdown().await;
}

/// `rvpn serve`, running.
pub struct Serve {
    pub daemon: Daemon,
    pub log: PathBuf,
}

impl Machine {
    /// What says which gateway, with a token of these claims.
    pub fn login(
        &self,
        gateway: &Gateway,
        account: &str,
        names: &[&str],
        ports: &[u16],
    ) -> Vec<String> {
        let mut says = claims(account);
        says["domains"] = json!(names);
        says["ports"] = json!(ports);
        let token = self.secret(&format!("{account}.token"), &gateway.token_with(&says));
        let words = [
            "--server",
            &at(GW4, 443),
            "--token-file",
            &token,
            "--fingerprint",
            &gateway.fingerprint(),
        ];
        words.map(str::to_owned).to_vec()
    }

    /// Begins to serve, and says what in JSON.
    pub fn serve(&self, login: &[String], words: &[&str]) -> Serve {
        let log = self
            .home
            .join(format!("serve-{}.log", words.join("_").replace('/', "-")));
        let file = fs::File::create(&log).expect("log");
        let login = login.iter().map(String::as_str).collect::<Vec<_>>();
        let all = [&["serve", "--json"], words, &login].concat();
        let mut command = self.command(&all);
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("log"))
            .stderr(file);
        let daemon = self.ns.daemon(&mut command);
        Serve { daemon, log }
    }

    /// The same, once everything is served.
    #[track_caller]
    pub fn serving(&self, login: &[String], words: &[&str]) -> Serve {
        let mut serve = self.serve(login, words);
        serve.until("serving");
        serve
    }
}

impl Serve {
    fn child(&mut self) -> &mut Child {
        &mut self.daemon.child
    }

    pub fn pid(&self) -> u32 {
        self.daemon.child.id()
    }

    /// All that it said.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its events of this kind.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let said = self.said();
        let events = said
            .lines()
            .filter_map(|l| serde_json::from_str::<Value>(l).ok());
        events.filter(|e| e["event"] == kind).collect()
    }

    /// Waits for an event.
    #[track_caller]
    pub fn until(&mut self, kind: &str) -> Value {
        self.until_many(kind, 1).remove(0)
    }

    /// Waits for so many.
    #[track_caller]
    pub fn until_many(&mut self, kind: &str, many: usize) -> Vec<Value> {
        let mut found = Vec::new();
        wait_until(&format!("'rvpn serve' says '{kind}'"), || {
            if let Some(status) = self.child().try_wait().expect("wait") {
                panic!("'rvpn serve' ended with {status}: {}", self.said());
            }
            found = self.events(kind);
            found.len() >= many
        });
        found
    }

    /// Ends it as Ctrl-C does; its status.
    #[track_caller]
    pub fn interrupt(mut self) -> i32 {
        let pid = i32::try_from(self.pid()).expect("pid");
        kill(Pid::from_raw(pid), Signal::SIGINT).expect("kill");
        self.ended()
    }

    /// How it ended by itself.
    #[track_caller]
    pub fn ended(&mut self) -> i32 {
        let mut code = None;
        wait_until("'rvpn serve' ends", || {
            let status = self.child().try_wait().expect("wait");
            code = status.map(|s| s.code().unwrap_or(-1));
            code.is_some()
        });
        code.expect("ended")
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of 'rvpn serve':\n{}", self.said());
        }
    }
}

/// Bytes that look like nothing, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Resident memory of a process, in bytes.
pub fn resident(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status
        .lines()
        .find(|l| l.starts_with("VmRSS:"))
        .expect("VmRSS");
    let kb = line
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<usize>().ok());
    kb.expect("a number") * 1024
}

/// How long a test waits for something that is to happen at once.
pub const SOON: Duration = Duration::from_secs(20);

/// What an HTTP server was asked, whole heads.
pub type Heads = Arc<std::sync::Mutex<Vec<String>>>;

/// An HTTP server that answers every request with what it was asked for, and
/// keeps its connections. What comes before the first request, such as a PROXY
/// header, is a part of its head.
pub fn http_server(ns: &Ns, address: &str) -> Heads {
    let heads = Heads::default();
    let (listener, kept) = (listen(ns, address), Arc::clone(&heads));
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let kept = Arc::clone(&kept);
            tokio::spawn(async move {
                let mut held = Vec::new();
                let mut piece = [0; 4096];
                loop {
                    let end = held.windows(4).position(|w| w == b"\r\n\r\n");
                    // A PROXY header begins with such an end too.
                    let end = end.filter(|at| *at > 0).or_else(|| {
                        let rest = held.get(4..).unwrap_or_default();
                        let at = rest.windows(4).position(|w| w == b"\r\n\r\n")?;
                        Some(at + 4)
                    });
                    if let Some(end) = end {
                        let head = String::from_utf8_lossy(&held[..end]).into_owned();
                        held.drain(..end + 4);
                        let line = head.lines().find(|l| l.contains(" HTTP/1."));
                        // A PROXY header has no end of its own.
                        let line = line.and_then(|l| l.get(l.find("GET")?..));
                        let body = format!("you asked: {}", line.unwrap_or("nothing"));
                        kept.lock().expect("heads").push(head);
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        if tcp.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                        continue;
                    }
                    match tcp.read(&mut piece).await {
                        Ok(0) | Err(_) => return,
                        Ok(n) => held.extend_from_slice(&piece[..n]),
                    }
                }
            });
        }
    });
    heads
}
