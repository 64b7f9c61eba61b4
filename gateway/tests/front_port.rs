//! One port for everything, with everybody there at once.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
#[expect(dead_code, reason = "another test program uses the rest")]
#[path = "../../proto/tests/greeting/mod.rs"]
mod greeting;

use std::sync::Arc;
use std::time::{Duration, Instant};

use front_support::client::{ask, login, read_reply, read_to_end};
use front_support::served::{serve, tls_device};
use front_support::trust::trusting;
use front_support::{Lab, NAME, PATIENCE};
use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use greeting::Greeting;
use rustls::pki_types::{CertificateDer, ServerName};
use rvpn_gateway::serve::table::Ending;
use rvpn_gateway::serve::{Service, Visit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

/// What can come.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Page,
    PageWithoutTls,
    PageWithoutName,
    Client,
    ClientWithoutTls,
    BadClient,
    DeviceA,
    DeviceB,
    UnknownName,
    UnknownHost,
    Forwarded,
    ForwardedFromTls,
    ForwardedToAddress,
    Ssh,
    Other,
    Silent,
    Http2,
    Ssl2,
    OldTls,
    BadName,
}

const KINDS: [Kind; 20] = [
    Kind::Page,
    Kind::PageWithoutTls,
    Kind::PageWithoutName,
    Kind::Client,
    Kind::ClientWithoutTls,
    Kind::BadClient,
    Kind::DeviceA,
    Kind::DeviceB,
    Kind::UnknownName,
    Kind::UnknownHost,
    Kind::Forwarded,
    Kind::ForwardedFromTls,
    Kind::ForwardedToAddress,
    Kind::Ssh,
    Kind::Other,
    Kind::Silent,
    Kind::Http2,
    Kind::Ssl2,
    Kind::OldTls,
    Kind::BadName,
];

/// All of them at once, from several places.
const CROWD: usize = 500;

/// Says who it is, then repeats.
async fn answering(who: &'static str, _: Visit, mut io: DuplexStream) {
    drop(io.write_all(who.as_bytes()).await);
    let mut bytes = [0; 256];
    while let Ok(n @ 1..) = io.read(&mut bytes).await {
        if io.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}

/// A web server without TLS that tells for which host it was asked.
async fn website(_: Visit, mut io: DuplexStream) {
    let mut head = Vec::new();
    while let Ok(1..) = io.read_buf(&mut head).await {
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let host = text.lines().find_map(|l| l.strip_prefix("host:"));
        let body = format!("site of {}", host.unwrap_or("nobody").trim());
        let length = body.len();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
        if io.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
        head.clear();
    }
}

fn connector(certificate: &CertificateDer<'static>) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

fn page(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

async fn expect(io: &mut (impl AsyncRead + Unpin), expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    let read = timeout(PATIENCE, io.read_exact(&mut bytes)).await;
    read.expect("an answer in time").expect("a whole answer");
    assert_eq!(bytes, expected);
}

/// A word there and back, so that it is known to be the one who logged in.
async fn echoed<S: AsyncRead + AsyncWrite + Unpin>(mut io: S, token: &str, word: String) {
    let reply = ask(&mut io, &login(token)).await;
    assert_eq!(reply.status, 101);
    let mut socket = WebSocketStream::from_partially_read(io, reply.rest, Role::Client, None).await;
    socket.send(Message::text(word.clone())).await.unwrap();
    let answer = timeout(PATIENCE, socket.next()).await.unwrap();
    assert_eq!(answer.unwrap().unwrap(), Message::text(word));
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

/// Those who are known.
struct Town {
    lab: Lab,
    a: CertificateDer<'static>,
    b: CertificateDer<'static>,
}

impl Town {
    async fn device(
        &self,
        certificate: &CertificateDer<'static>,
        name: &str,
        tcp: TcpStream,
        n: usize,
    ) {
        let server = ServerName::try_from(name.to_owned()).unwrap();
        let mut io = connector(certificate).connect(server, tcp).await.unwrap();
        let word = format!("{n:08}");
        io.write_all(word.as_bytes()).await.unwrap();
        expect(&mut io, format!("{name}: {word}").as_bytes()).await;
    }

    /// TLS with whatever certificate.
    async fn anybody(&self, name: &str, tcp: TcpStream) -> Tls {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        trusting().connect(name, tcp).await.unwrap()
    }

    /// Comes, and checks that the answer is the right one for its kind.
    async fn visit(&self, kind: Kind, n: usize) {
        let lab = &self.lab;
        let mut tcp = lab.tcp_from(&format!("127.0.1.{}", n % 250 + 1)).await;
        tcp.set_nodelay(true).unwrap();
        match kind {
            Kind::Page => {
                let reply = ask(&mut lab.over(tcp).await, &page(NAME)).await;
                assert_eq!(reply.status, 200);
            }
            Kind::PageWithoutTls => {
                // A slow one: four bytes at a time.
                for piece in page(NAME).as_bytes().chunks(4) {
                    tcp.write_all(piece).await.unwrap();
                    sleep(Duration::from_millis(2)).await;
                }
                assert_eq!(read_reply(&mut tcp).await.status, 200);
            }
            Kind::PageWithoutName => {
                // Clients send no name when they want an address.
                let mut roots = rustls::RootCertStore::empty();
                roots.add(self.a.clone()).unwrap();
                let address = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
                let seen = connector(&self.a).connect(address, tcp).await;
                let error = seen
                    .expect_err("it is not a device's certificate")
                    .to_string();
                assert!(error.contains("certificate"), "{error}");
            }
            Kind::Client => echoed(lab.over(tcp).await, &lab.ops.good(), format!("tls {n}")).await,
            Kind::ClientWithoutTls => echoed(tcp, &lab.ops.good(), format!("plain {n}")).await,
            Kind::BadClient => {
                let reply = ask(&mut lab.over(tcp).await, &login("not.a.token")).await;
                assert_eq!(reply.status, 403);
            }
            Kind::DeviceA => self.device(&self.a, "a.example", tcp, n).await,
            Kind::DeviceB => self.device(&self.b, "b.example", tcp, n).await,
            Kind::UnknownName => {
                let server = ServerName::try_from("nobody.example").unwrap();
                let seen = connector(&self.a).connect(server, tcp).await;
                let error = seen
                    .expect_err("the gateway answers, no device")
                    .to_string();
                assert!(error.contains("certificate"), "{error}");
            }
            Kind::UnknownHost => {
                let status = ask(&mut tcp, &page("nobody.example")).await.status;
                assert_eq!(status, 502);
            }
            // by Host, whatever the port and the letters.
            Kind::Forwarded => {
                let reply = ask(&mut tcp, &page("Web.Example:80")).await;
                assert_eq!(reply.status, 200);
                assert!(reply.text().starts_with("site of web.example"), "{reply:?}");
            }
            // TLS ends at the gateway, as this client has only HTTP.
            Kind::ForwardedFromTls => {
                let mut io = self.anybody("web.example", tcp).await;
                let reply = ask(&mut io, &page("web.example")).await;
                assert_eq!(
                    (reply.status, reply.text()),
                    (200, "site of web.example".to_owned())
                );
            }
            // no name in TLS, and an address that a client serves.
            Kind::ForwardedToAddress => {
                let mut io = self.anybody("127.0.0.77", tcp).await;
                let reply = ask(&mut io, &page("127.0.0.77")).await;
                assert_eq!(
                    (reply.status, reply.text()),
                    (200, "site of 127.0.0.77".to_owned())
                );
            }
            Kind::Ssh => {
                tcp.write_all(b"SSH-2.0-me\r\n").await.unwrap();
                expect(&mut tcp, b"SSH-2.0-box\r\nSSH-2.0-me\r\n").await;
            }
            Kind::Other => {
                let word = format!("\x01 {n}");
                tcp.write_all(word.as_bytes()).await.unwrap();
                expect(&mut tcp, format!("other {word}").as_bytes()).await;
            }
            Kind::Silent => {
                expect(&mut tcp, b"220 mail").await;
                tcp.write_all(b"QUIT").await.unwrap();
                expect(&mut tcp, b"QUIT").await;
            }
            Kind::Http2 => {
                tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                    .await
                    .unwrap();
                let answer = read_to_end(&mut tcp).await;
                assert_eq!(answer[..9], *b"\0\0\0\x04\0\0\0\0\0");
                assert!(answer.ends_with(&[0, 0, 0, 13]), "{answer:?}");
            }
            Kind::Ssl2 => {
                tcp.write_all(b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10")
                    .await
                    .unwrap();
                assert_eq!(read_to_end(&mut tcp).await, [21, 3, 1, 0, 2, 2, 70]);
            }
            Kind::OldTls => {
                let old = Greeting {
                    version: 0x0302,
                    ..Greeting::of(b"a.example")
                }
                .without(43);
                tcp.write_all(&old.bytes()).await.unwrap();
                assert_eq!(read_to_end(&mut tcp).await, [21, 3, 1, 0, 2, 2, 70]);
            }
            Kind::BadName => {
                tcp.write_all(&Greeting::of(b"a.example\0").bytes())
                    .await
                    .unwrap();
                assert_eq!(read_to_end(&mut tcp).await, [21, 3, 1, 0, 2, 2, 112]);
            }
        }
    }
}

/// one TCP port serves everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn r_1_five_hundred_of_all_kinds_at_once_each_get_the_right_answer() {
    let lab = Lab::and(
        "[limits]\npending-per-address = 8192\nlogin-failures = 100000\nsessions-per-account = 4096\n\
         [front]\ndefault-service = \"other.example\"\nssh = \"box.example\"\nsilent = \"mail.example\"\n",
    )
    .await;
    let table = &lab.front.table;
    let (first, a) = tls_device(table, "a.example");
    let (second, b) = tls_device(table, "b.example");
    let talk = |who| move |visit, io| answering(who, visit, io);
    let ssh = serve(
        table,
        "box.example",
        None,
        Ending::There,
        talk("SSH-2.0-box\r\n"),
    );
    let other = serve(table, "other.example", None, Ending::There, talk("other "));
    let web = serve(
        table,
        "web.example",
        Some(Service::Http),
        Ending::There,
        website,
    );
    let address = serve(
        table,
        "127.0.0.77",
        Some(Service::Http),
        Ending::There,
        website,
    );
    let mail = serve(table, "mail.example", None, Ending::There, talk("220 mail"));
    let town = Arc::new(Town { lab, a, b });
    let start = Instant::now();
    let crowd = (0..CROWD).map(|n| {
        let town = Arc::clone(&town);
        let kind = KINDS[n % KINDS.len()];
        async move {
            let visit = tokio::spawn(async move { town.visit(kind, n).await });
            visit
                .await
                .unwrap_or_else(|error| panic!("{kind:?} {n}: {error}"));
        }
    });
    join_all(crowd).await;
    let each = CROWD / KINDS.len();
    let visits = [&first, &second, &ssh, &other, &mail].map(|d| d.visits());
    assert_eq!(visits, [each; 5], "nobody came to the wrong one");
    assert_eq!((web.visits(), address.visits()), (2 * each, each));
    assert_eq!(town.lab.echo.count(), 2 * each);
    eprintln!("{CROWD} connections in {:?}", start.elapsed());
}

/// whoever asks for an address says no name in TLS, which then ends at the
/// gateway; the request leads to the client that serves the address.
#[tokio::test]
async fn r_4_tls_without_a_name_ends_here_and_goes_by_host() {
    let lab = Lab::new().await;
    let address = serve(
        &lab.front.table,
        "127.0.0.1",
        Some(Service::Http),
        Ending::There,
        website,
    );
    let name = || ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
    for (host, expected) in [
        ("127.0.0.1:8443", (200, "site of 127.0.0.1:8443")),
        ("127.0.0.1", (200, "site of 127.0.0.1")),
    ] {
        let mut io = trusting().connect(name(), lab.tcp().await).await.unwrap();
        let reply = ask(&mut io, &page(host)).await;
        assert_eq!((reply.status, &*reply.text()), expected);
    }
    assert_eq!(address.visits(), 2);
    // The gateway's own name, asked for in the same way, is still its own.
    let mut io = trusting().connect(name(), lab.tcp().await).await.unwrap();
    let reply = ask(&mut io, &page(NAME)).await;
    assert_eq!((reply.status, address.visits()), (200, 2));
}

/// a name that nobody serves is shown the gateway's certificate and a page
/// that is the same whether it was ever served or not.
#[tokio::test]
async fn r_27_a_name_that_nobody_serves_gets_a_page_that_tells_nothing() {
    let lab = Lab::new().await;
    let left = serve(
        &lab.front.table,
        "left.example",
        None,
        Ending::There,
        website,
    );
    drop(left);
    let mut pages = Vec::new();
    for host in ["left.example", "never.example"] {
        let server = ServerName::try_from(host).unwrap();
        let mut io = trusting().connect(server, lab.tcp().await).await.unwrap();
        let shown = io.get_ref().1.peer_certificates().unwrap()[0].clone();
        let own = rvpn_gateway::tls::Fingerprint::of(&shown);
        assert_eq!(own, lab.front.tls.fingerprint());
        let reply = ask(&mut io, &page(host)).await;
        assert_eq!(reply.status, 502, "{reply:?}");
        pages.push(reply.text().replace(host, "NAME"));
        let reply = ask(&mut lab.tcp().await, &page(host)).await;
        assert_eq!(reply.status, 502);
        pages.push(reply.text().replace(host, "NAME"));
    }
    pages.dedup();
    assert_eq!(pages.len(), 1, "{pages:?}");
}
