//! The older reverse tunnel clients against the program itself: clients for
//! Node made of the libraries they were made of, visitors on the public port.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod packer_support;

use std::net::SocketAddr;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use packer_support::go;
use packer_support::live::{Node, Program};
use packer_support::visitor::{self, Device};
use packer_support::{NAME, PATIENCE, SECRET, domains, token};
use rustls::pki_types::ServerName;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const KINDS: [&str; 3] = ["c1", "c2", "c3"];
const APP: &str = "app.a.example";
/// What goes each way in the long transfers.
const LONG: usize = 200 * 1024 * 1024;
/// What a slow reader is offered.
const OFFERED: usize = 24 * 1024 * 1024;

/// Serves every connection to a new port by this.
async fn local<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(tcp));
        }
    });
    port
}

/// Answers each request with what it was asked for.
async fn http(name: &'static str) -> u16 {
    local(move |mut tcp| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match tcp.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8(head).unwrap();
        let path = head.split(' ').nth(1).unwrap();
        let body = format!("{name} has {path}");
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        drop(tcp.write_all(answer.as_bytes()).await);
    })
    .await
}

async fn visit(at: SocketAddr) -> TcpStream {
    let tcp = TcpStream::connect(at).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_06_each_client_serves_https_with_its_own_certificate_and_http() {
    let program = Program::start("");
    let device = Device::of(APP);
    let acceptor = device.acceptor();
    let https = local(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            let mut tls = acceptor.accept(tcp).await.unwrap();
            let mut word = [0; 5];
            tls.read_exact(&mut word).await.unwrap();
            tls.write_all(b"device says hello").await.unwrap();
            drop(tls.shutdown().await);
        }
    })
    .await;
    let http = http("the device").await;
    for kind in KINDS {
        let token = domains(SECRET, &[APP]);
        let services = [("https", https), ("http", http)];
        let node = Node::start(kind, program.at, &token, &services);
        node.ready(kind);
        program.wait_for("client came");
        let mut tls = device.visit(visit(program.at).await, APP).await;
        assert_eq!(
            visitor::ask(&mut tls, "hello").await,
            "device says hello",
            "{kind}"
        );
        let said = node.says("visitor");
        assert_eq!(
            (&said[2], &said[3]),
            (&json!("https"), &json!(APP)),
            "{kind}"
        );

        let request = format!("GET /page HTTP/1.1\r\nHost: {APP}\r\nConnection: close\r\n\r\n");
        let answer = visitor::ask(&mut visit(program.at).await, &request).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{kind}: {answer}");
        assert!(answer.ends_with("the device has /page"), "{kind}: {answer}");
        let said = node.says("visitor");
        assert_eq!(
            (&said[2], &said[3]),
            (&json!("http"), &json!(APP)),
            "{kind}"
        );
        drop(node);
        program.wait_for("client lost");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_04_https_without_a_name_reaches_a_client_that_serves_http() {
    let program = Program::start("");
    let http = http("the device").await;
    let node = Node::start(
        "c1",
        program.at,
        &domains(SECRET, &[APP]),
        &[("http", http)],
    );
    node.ready("c1");
    // No SNI: an address is none. The certificate is the gateway's.
    let tcp = visit(program.at).await;
    let mut tls = anybody(tcp, ServerName::try_from("127.0.0.1").unwrap()).await;
    let request = format!("GET /plain HTTP/1.1\r\nHost: {APP}\r\nConnection: close\r\n\r\n");
    let answer = visitor::ask(&mut tls, &request).await;
    assert!(answer.ends_with("the device has /plain"), "{answer}");
}

/// A visitor who believes everybody, as `curl -k` does.
async fn anybody(tcp: TcpStream, name: ServerName<'static>) -> impl AsyncRead + AsyncWrite + Unpin {
    let config = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(Believer))
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    timeout(PATIENCE, connector.connect(name, tcp))
        .await
        .unwrap()
        .unwrap()
}

#[derive(Debug)]
struct Believer;

impl rustls::client::danger::ServerCertVerifier for Believer {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Bytes that do not repeat, in portions.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buf: &mut [u8]) {
        for eight in buf.chunks_mut(8) {
            self.0 = self
                .0
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let bytes = (self.0 ^ (self.0 >> 29)).to_le_bytes();
            eight.copy_from_slice(&bytes[..eight.len()]);
        }
    }
}

/// Sends so much noise; its hash.
async fn pour(io: &mut (impl AsyncWrite + Unpin), length: usize, seed: u64) -> [u8; 32] {
    let (mut noise, mut hash) = (Noise(seed), Context::new(&SHA256));
    let mut buf = vec![0; 64 * 1024];
    let mut left = length;
    while left > 0 {
        let n = left.min(buf.len());
        noise.fill(&mut buf[..n]);
        hash.update(&buf[..n]);
        io.write_all(&buf[..n]).await.unwrap();
        left -= n;
    }
    io.flush().await.unwrap();
    hash.finish().as_ref().try_into().unwrap()
}

/// Reads so much; its hash.
async fn drink(io: &mut (impl AsyncRead + Unpin), length: usize) -> [u8; 32] {
    let mut hash = Context::new(&SHA256);
    let mut buf = vec![0; 64 * 1024];
    let mut left = length;
    while left > 0 {
        let most = left.min(buf.len());
        let n = timeout(PATIENCE, io.read(&mut buf[..most]))
            .await
            .unwrap()
            .unwrap();
        assert!(n > 0, "{left} bytes are missing");
        hash.update(&buf[..n]);
        left -= n;
    }
    hash.finish().as_ref().try_into().unwrap()
}

/// 200 MB up and as many down at once, over TLS that nobody between ends.
async fn both_ways(kind: &'static str) {
    let program = Program::start("");
    let device = Device::of(APP);
    let acceptor = device.acceptor();
    let https = local(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            let tls = acceptor.accept(tcp).await.unwrap();
            let (mut reader, mut writer) = tokio::io::split(tls);
            let up = tokio::spawn(async move { drink(&mut reader, LONG).await });
            let down = pour(&mut writer, LONG, 2).await;
            writer.write_all(&down).await.unwrap();
            writer.write_all(&up.await.unwrap()).await.unwrap();
            writer.shutdown().await.unwrap();
        }
    })
    .await;
    let token = domains(SECRET, &[APP]);
    let target = SocketAddr::from(([127, 0, 0, 1], https));
    let _node = match kind {
        "g17" => {
            let client = go::of_2017_at(program.at, &token).await;
            tokio::spawn(client.serve(target));
            None
        }
        "g20" => {
            let client = go::of_2020_at(program.at, &token).await;
            tokio::spawn(client.serve(target));
            None
        }
        kind => {
            let node = Node::start(kind, program.at, &token, &[("https", https)]);
            node.ready(kind);
            Some(node)
        }
    };
    program.wait_for("client came");
    let tls = device.visit(visit(program.at).await, APP).await;
    let (mut reader, mut writer) = tokio::io::split(tls);
    let up = tokio::spawn(async move { pour(&mut writer, LONG, 1).await });
    let down = drink(&mut reader, LONG).await;
    let mut hashes = [0; 64];
    timeout(PATIENCE, reader.read_exact(&mut hashes))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        hashes[..32],
        down,
        "{kind}: what came down is what was sent"
    );
    assert_eq!(
        hashes[32..],
        up.await.unwrap(),
        "{kind}: what went up arrived"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_both_ways_by_the_client_of_february_2017() {
    both_ways("c1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_both_ways_by_the_client_of_october_2017() {
    both_ways("c2").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_both_ways_by_the_client_of_2019() {
    both_ways("c3").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_both_ways_by_the_client_in_go_of_2017() {
    both_ways("g17").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_both_ways_by_the_client_in_go_of_2020() {
    both_ways("g20").await;
}

/// A port of the ranges that clients are given ports from.
fn grantable_port() -> u16 {
    (61_000..61_999)
        .find(|port| std::net::TcpListener::bind(("0.0.0.0", *port)).is_ok())
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_25_a_granted_port_leads_to_servers_that_speak_first_and_to_those_that_do_not() {
    let program = Program::start("");
    let tcp = local(|mut tcp| async move {
        tcp.write_all(b"SSH-2.0-test\r\n").await.unwrap();
        let mut word = [0; 6];
        tcp.read_exact(&mut word).await.unwrap();
        tcp.write_all(b"you said ").await.unwrap();
        tcp.write_all(&word).await.unwrap();
    })
    .await;
    let port = grantable_port();
    let claims = json!({"domains": [APP], "ports": [port]});
    let node = Node::start("c3", program.at, &token(SECRET, &claims), &[("tcp", tcp)]);
    node.ready("c3");
    let granted = node.says("grant");
    let list = granted[1].as_array().unwrap();
    let host = list.iter().find(|g| g[0] == "tcp").unwrap();
    assert_eq!(host[2], json!([port]), "{granted}");

    // The server speaks first, and need not be spoken to for it.
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let mut io = visit(at).await;
    let mut banner = [0; 14];
    timeout(PATIENCE, io.read_exact(&mut banner))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&banner, b"SSH-2.0-test\r\n");
    let said = node.says("announced");
    assert_eq!(said[2], "tcp");
    assert_eq!(visitor::ask(&mut io, "hello\n").await, "you said hello\n");

    // The client does, and loses nothing of it.
    let mut io = visit(at).await;
    let both = visitor::ask(&mut io, "first\n").await;
    assert_eq!(both, "SSH-2.0-test\r\nyou said first\n");

    // Gone with its client.
    drop(node);
    program.wait_for("client lost");
    let deadline = std::time::Instant::now() + PATIENCE;
    while TcpStream::connect(at).await.is_ok() {
        assert!(std::time::Instant::now() < deadline, "the port stays open");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_23_slow_readers_do_not_grow_memory_and_get_everything() {
    const VISITORS: usize = 8;
    for kind in ["c2", "c3"] {
        let program = Program::start("");
        let device = Device::of(APP);
        let acceptor = device.acceptor();
        let https = local(move |tcp| {
            let acceptor = acceptor.clone();
            async move {
                let mut tls = acceptor.accept(tcp).await.unwrap();
                let hash = pour(&mut tls, OFFERED, 3).await;
                tls.write_all(&hash).await.unwrap();
                drop(tls.shutdown().await);
            }
        })
        .await;
        let mut node = Node::start(
            kind,
            program.at,
            &domains(SECRET, &[APP]),
            &[("https", https)],
        );
        node.ready(kind);
        program.wait_for("client came");
        let mut visitors = Vec::new();
        let before = program.memory();
        for _ in 0..VISITORS {
            visitors.push(device.visit(visit(program.at).await, APP).await);
        }
        for _ in 0..VISITORS {
            node.says("pause");
        }
        // All that is going to come has come.
        node.ask("memory");
        node.says("memory");
        let grown = program.memory().saturating_sub(before);
        assert!(
            grown < VISITORS << 20,
            "{kind}: {grown} bytes for {VISITORS} visitors"
        );
        let mut reading = Vec::new();
        for mut tls in visitors {
            reading.push(tokio::spawn(async move {
                let hash = drink(&mut tls, OFFERED).await;
                let mut said = [0; 32];
                tls.read_exact(&mut said).await.unwrap();
                assert_eq!(hash, said);
            }));
        }
        for one in reading {
            one.await.unwrap();
        }
        node.says("resume");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_23_a_slow_server_slows_its_visitor_down_and_loses_nothing() {
    let program = Program::start("");
    let device = Device::of(APP);
    let acceptor = device.acceptor();
    let (go, gone) = tokio::sync::watch::channel(false);
    let https = local(move |tcp| {
        let (acceptor, mut gone) = (acceptor.clone(), gone.clone());
        async move {
            let mut tls = acceptor.accept(tcp).await.unwrap();
            gone.wait_for(|g| *g).await.unwrap();
            let hash = drink(&mut tls, OFFERED).await;
            tls.write_all(&hash).await.unwrap();
            drop(tls.shutdown().await);
        }
    })
    .await;
    let node = Node::start(
        "c2",
        program.at,
        &domains(SECRET, &[APP]),
        &[("https", https)],
    );
    node.ready("c2");
    program.wait_for("client came");
    let before = program.memory();
    let tls = device.visit(visit(program.at).await, APP).await;
    let (mut reader, mut writer) = tokio::io::split(tls);
    let mut pouring = tokio::spawn(async move { pour(&mut writer, OFFERED, 4).await });
    let early = timeout(Duration::from_secs(2), &mut pouring).await;
    assert!(
        early.is_err(),
        "nothing takes so much without anybody reading"
    );
    let grown = program.memory().saturating_sub(before);
    assert!(grown < 2 << 20, "{grown} bytes");
    go.send_replace(true);
    let sent = timeout(PATIENCE, pouring).await.unwrap().unwrap();
    let mut hash = [0; 32];
    timeout(PATIENCE, reader.read_exact(&mut hash))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(hash, sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_09_a_client_with_a_wrong_token_gives_up() {
    let program = Program::start("");
    let bad = domains("wrong", &[APP]);
    for kind in ["c1", "c2"] {
        let mut node = Node::start(kind, program.at, &bad, &[]);
        assert_eq!(node.says("refused")[1], 403);
        assert_eq!(node.ends_within(PATIENCE), 2);
    }
    let node = Node::start("c3", program.at, &bad, &[]);
    node.says("greeted");
    let answer = node.says("answered");
    assert_eq!(answer[2]["code"], "E_INVALID_TOKEN");
    assert_eq!(node.says("close")[1], 1008);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_24_the_last_clients_pings_are_answered() {
    let program = Program::start("");
    let claims = json!({"domains": [APP], "iss": 1_555_555_555, "aud": format!("https://{NAME}/"), "iat": 1_555_555_555});
    let node = Node::start("c3", program.at, &token(SECRET, &claims), &[]);
    node.ready("c3");
    let granted = node.says("grant");
    assert!(
        granted[1]
            .as_array()
            .unwrap()
            .contains(&json!(["https", APP])),
        "{granted}"
    );
    node.says("pong");
    node.says("pong");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_anything_behind_it_is_an_error_for_its_visitor_only() {
    let program = Program::start("");
    let http = http("the device").await;
    let nobody = packer_support::live::free_port();
    let services = [("https", nobody), ("http", http)];
    let node = Node::start("c2", program.at, &domains(SECRET, &[APP]), &services);
    node.ready("c2");
    program.wait_for("client came");
    let mut tcp = visit(program.at).await;
    // A hello by hand would do; a library's is at hand.
    let connecting = anybody_fails(&mut tcp).await;
    assert!(connecting, "there is nobody to answer");
    node.says("error");
    let request = format!("GET /page HTTP/1.1\r\nHost: {APP}\r\nConnection: close\r\n\r\n");
    let answer = visitor::ask(&mut visit(program.at).await, &request).await;
    assert!(answer.ends_with("the device has /page"), "{answer}");
}

async fn anybody_fails(tcp: &mut TcpStream) -> bool {
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let name = ServerName::try_from(APP).unwrap();
    timeout(PATIENCE, connector.connect(name, tcp))
        .await
        .unwrap()
        .is_err()
}
