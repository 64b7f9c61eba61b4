//! HTTP for names that clients serve, over real sockets.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod bodies;
#[path = "../front_support/mod.rs"]
mod front_support;
mod hostile;
#[path = "../serve_support/mod.rs"]
mod serve_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use front_support::client::{Reply, ask, read_reply, read_to_end, upgrade};
use front_support::{Lab, NAME};
use rustls::pki_types::ServerName;
use rvpn_gateway::serve::table::Offer;
use serve_support::backend::{Backend, tell};
use serve_support::{Served, pattern, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A client that serves `names` and answers each with its canary.
fn web(lab: &Lab, canary: &str, names: &[&str]) -> (Served, Backend) {
    web_with(lab, canary, names, tell)
}

fn web_with(
    lab: &Lab,
    canary: &str,
    names: &[&str],
    answering: serve_support::backend::Answering,
) -> (Served, Backend) {
    let mut served = serve(&lab.front.table, canary, "1", names);
    let (_gone, nothing) = tokio::sync::mpsc::unbounded_channel();
    let asked = std::mem::replace(&mut served.asked, nothing);
    let backend = Backend::start(canary, asked, answering);
    (served, backend)
}

/// A TLS visitor that does not say whom it asks for.
async fn without_name(lab: &Lab) -> TlsStream<TcpStream> {
    let mut config = (**lab.connector(rustls::ALL_VERSIONS).config()).clone();
    config.enable_sni = false;
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from(NAME).unwrap();
    connector.connect(name, lab.tcp().await).await.unwrap()
}

fn get(host: &str, path: &str, more: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n")
}

async fn plain(lab: &Lab, request: &str) -> Reply {
    ask(&mut lab.tcp().await, request).await
}

#[tokio::test]
async fn r_05_http_goes_by_host_to_the_client_that_serves_it() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex", "*.a.ex"]);
    let (_b, b) = web(&lab, "bob", &["b.ex"]);
    for host in ["a.ex", "A.EX.", "a.ex:8080", "x.y.a.ex"] {
        let reply = plain(&lab, &get(host, "/p?q=1", "")).await;
        assert_eq!(
            (reply.status, &*reply.text()),
            (200, "alice GET /p?q=1 0\n")
        );
    }
    assert_eq!(
        plain(&lab, &get("b.ex", "/", "")).await.text(),
        "bob GET / 0\n"
    );
    assert_eq!((a.count(), b.count()), (4, 1));
    let visit = b.visits.lock().unwrap()[0].clone();
    assert_eq!((visit.peer.ip(), visit.port), (lab.at.ip(), lab.at.port()));
    assert_eq!(visit.name.unwrap().as_str(), "b.ex");
    // Not a word of it reaches the gateway's own pages, and they are as ever.
    let own = plain(&lab, &get(NAME, "/", "")).await;
    assert!(own.status == 200 && !own.text().contains("alice"));
}

#[tokio::test]
async fn rev_07_each_request_of_a_connection_goes_by_its_own_host() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let (_b, b) = web(&lab, "bob", &["b.ex"]);
    let mut io = lab.tcp().await;
    for n in 0..20 {
        let (host, canary) = if n % 3 == 0 {
            ("b.ex", "bob")
        } else {
            ("a.ex", "alice")
        };
        let reply = ask(&mut io, &get(host, &format!("/{n}"), "")).await;
        assert_eq!(reply.text(), format!("{canary} GET /{n} 0\n"));
    }
    // Pipelined ones too.
    let both = get("a.ex", "/x", "") + &get("b.ex", "/y", "");
    io.write_all(both.as_bytes()).await.unwrap();
    let first = read_reply(&mut io).await;
    let (x, y) = ("alice GET /x 0\n", "bob GET /y 0\n");
    let mut all = first.rest;
    while !String::from_utf8_lossy(&all).contains(y) {
        assert!(io.read_buf(&mut all).await.unwrap() > 0);
    }
    assert!(all.starts_with(x.as_bytes()));
    assert!(
        a.seen
            .lock()
            .unwrap()
            .iter()
            .all(|s| s.all("host") == ["a.ex"])
    );
    assert!(
        b.seen
            .lock()
            .unwrap()
            .iter()
            .all(|s| s.all("host") == ["b.ex"])
    );
    // A stream is used again as long as the client is the same.
    let streams = a.visits.lock().unwrap().len();
    assert!(streams < 14, "{streams} streams for 14 requests");
    // The gateway's own name is not answered on such a connection.
    let own = ask(&mut io, &get(NAME, "/", "")).await;
    assert_eq!(own.status, 421);
    assert_eq!(read_to_end(&mut io).await.len(), 0);
    // Nor theirs on one that began with the gateway's.
    let mut io = lab.tcp().await;
    assert_eq!(ask(&mut io, &get(NAME, "/", "")).await.status, 200);
    assert_eq!(ask(&mut io, &get("a.ex", "/", "")).await.status, 421);
}

#[tokio::test]
async fn rev_05_sni_and_host_must_agree() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let mut io = lab.tls().await;
    let reply = ask(&mut io, &get("a.ex", "/", "")).await;
    assert_eq!((reply.status, a.count()), (421, 0));
    assert_eq!(read_to_end(&mut io).await.len(), 0);
}

#[tokio::test]
async fn rev_06_what_is_passed_through_is_untouched() {
    let lab = Lab::new().await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let config = (**lab.connector(rustls::ALL_VERSIONS).config()).clone();
    let name = ServerName::try_from("a.ex").unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    tls.write_tls(&mut bytes).unwrap();
    // Whatever follows a greeting is nobody's business but the two ends'.
    bytes.extend((0..300_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8));
    let sum = |bytes: &[u8]| digest(&SHA256, bytes).as_ref().to_vec();
    let mut io = lab.tcp().await;
    let sent = bytes.clone();
    let (mut read, mut write) = io.split();
    let (_, mut stream) = {
        write.write_all(&sent[..5000]).await.unwrap();
        a.asked.recv().await.unwrap()
    };
    let mut got = vec![0; bytes.len()];
    let (written, read_all) =
        tokio::join!(write.write_all(&sent[5000..]), stream.read_exact(&mut got));
    written.unwrap();
    read_all.unwrap();
    assert_eq!(sum(&got), sum(&bytes));
    // And back.
    let mut back = vec![0; bytes.len()];
    let (written, read_all) = tokio::join!(stream.write_all(&bytes), read.read_exact(&mut back));
    written.unwrap();
    read_all.unwrap();
    assert_eq!(sum(&back), sum(&bytes));
}

#[tokio::test]
async fn rev_12_the_client_sees_the_real_visitor_exactly_once() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let forged = "X-Forwarded-For: 9.9.9.9\r\nx-forwarded-for: 8.8.8.8\r\nX_Forwarded_For: 7.7.7.7\r\n\
                  Forwarded: for=9.9.9.9\r\nX-Real-IP: 9.9.9.9\r\nTrue-Client-IP: 9.9.9.9\r\n\
                  X-Forwarded-Proto: https\r\nX-Forwarded-Host: evil.ex\r\n\
                  Connection: x-forwarded-for, forwarded, x-real-ip, keep-alive\r\n";
    let mut io = lab.tcp_from("127.0.0.7").await;
    assert_eq!(ask(&mut io, &get("a.ex:81", "/", forged)).await.status, 200);
    let seen = a.last();
    assert_eq!(seen.all("x-forwarded-for"), ["127.0.0.7"]);
    assert_eq!(seen.all("x-real-ip"), ["127.0.0.7"]);
    assert_eq!(seen.all("x-forwarded-proto"), ["http"]);
    assert_eq!(seen.all("x-forwarded-host"), ["a.ex:81"]);
    assert_eq!(
        seen.all("forwarded"),
        ["for=127.0.0.7;host=\"a.ex:81\";proto=http"]
    );
    let raw = String::from_utf8_lossy(&a.moved.lock().unwrap().0).into_owned();
    for forged in ["9.9.9.9", "8.8.8.8", "7.7.7.7", "evil"] {
        assert!(!raw.contains(forged), "{raw}");
    }
}

#[tokio::test]
async fn rev_16_challenges_of_issuers_go_to_the_one_who_serves_the_name() {
    let lab = Lab::and(
        "[[name]]\npattern = \"a.ex\"\nhttp = \"redirect\"\n[[name]]\npattern = \"b.ex\"\nhttp = \"acme-only\"\n",
    )
    .await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let (_b, b) = web(&lab, "bob", &["b.ex"]);
    let challenge = "/.well-known/acme-challenge/token";
    let reply = plain(&lab, &get("a.ex", challenge, "")).await;
    assert_eq!(reply.text(), format!("alice GET {challenge} 0\n"));
    let reply = plain(&lab, &get("b.ex", challenge, "")).await;
    assert_eq!(reply.text(), format!("bob GET {challenge} 0\n"));
    // Nobody serves it: nobody else answers.
    assert_eq!(plain(&lab, &get("c.ex", challenge, "")).await.status, 502);
    // everything else is sent to https, or is not there.
    let reply = plain(&lab, &get("A.ex:8080", "/x?y", "")).await;
    assert_eq!(
        (reply.status, reply.header("location")),
        (301, Some("https://a.ex/x?y"))
    );
    assert_eq!(reply.header("connection"), Some("close"));
    let post = "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1\r\n\r\nA";
    assert_eq!(plain(&lab, post).await.status, 308);
    assert_eq!(plain(&lab, &get("b.ex", "/x", "")).await.status, 404);
    // Looking like a challenge is not being one.
    let near = get("a.ex", "/.well-known/acme-challenge", "");
    assert_eq!(plain(&lab, &near).await.status, 301);
    assert_eq!((a.count(), b.count()), (1, 1));
}

#[tokio::test]
async fn rev_14_beyond_its_limit_an_accounts_visitors_get_503() {
    let lab = Lab::and("[serve]\nvisitors-per-account = 2\n").await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let (_b, _) = web(&lab, "bob", &["b.ex"]);
    let mut visitors = Vec::new();
    for _ in 0..2 {
        let mut io = lab.tcp().await;
        io.write_all(get("a.ex", "/", "").as_bytes()).await.unwrap();
        visitors.push((io, a.asked.recv().await.unwrap()));
    }
    for _ in 0..20 {
        let reply = plain(&lab, &get("a.ex", "/", "")).await;
        assert_eq!(
            (reply.status, reply.header("retry-after")),
            (503, Some("1"))
        );
    }
    assert_eq!(plain(&lab, &get("b.ex", "/", "")).await.status, 200);
    visitors.pop();
    let until = Instant::now() + Duration::from_secs(5);
    while lab.front.table.snapshot().visitors.current > 1 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut io = lab.tcp().await;
    io.write_all(get("a.ex", "/", "").as_bytes()).await.unwrap();
    a.asked.recv().await.unwrap();
}

#[tokio::test]
async fn a_client_that_dies_is_502_within_a_second_and_its_successor_serves() {
    let lab = Lab::new().await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let mut io = lab.tcp().await;
    io.write_all(get("a.ex", "/", "").as_bytes()).await.unwrap();
    let stream = a.asked.recv().await.unwrap();
    let began = Instant::now();
    drop((stream, a));
    assert_eq!(read_reply(&mut io).await.status, 502);
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(read_to_end(&mut io).await.len(), 0);
    let mut io = lab.tcp().await;
    assert_eq!(ask(&mut io, &get("a.ex", "/", "")).await.status, 502);
    assert!(began.elapsed() < Duration::from_secs(1));
    // It is back, and a connection that was told so reaches it.
    let (_a, _) = web(&lab, "alice", &["a.ex"]);
    assert_eq!(ask(&mut io, &get("a.ex", "/", "")).await.status, 200);
}

#[tokio::test]
async fn r_04_tls_without_a_name_goes_by_host() {
    let lab = Lab::new().await;
    let (_a, _) = web(&lab, "alice", &["a.ex", "127.0.0.1"]);
    let mut io = without_name(&lab).await;
    let reply = ask(&mut io, &get("a.ex", "/", "")).await;
    assert_eq!(reply.text(), "alice GET / 0\n");
    // an address may be among the claims, but a tunnel's way in stays ours.
    let reply = ask(&mut io, &get("127.0.0.1:8443", "/x", "")).await;
    assert_eq!(reply.text(), "alice GET /x 0\n");
    let reply = plain(&lab, &get("127.0.0.1:80", "/x", "")).await;
    assert_eq!(reply.text(), "alice GET /x 0\n");
    let login = upgrade("/rvpn/v1/packets", "127.0.0.1", "");
    assert_eq!(plain(&lab, &login).await.status, 400);
}

#[tokio::test]
async fn on_request_a_stream_begins_with_where_its_visitor_comes_from() {
    let lab = Lab::new().await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let offer = Offer {
        proxy: true,
        ..Offer::of(pattern("a.ex"))
    };
    a.place.offer(offer).unwrap();
    let mut io = lab.tcp_from("127.0.0.9").await;
    let port = io.local_addr().unwrap().port();
    io.write_all(get("a.ex", "/", "").as_bytes()).await.unwrap();
    let (_, mut stream) = a.asked.recv().await.unwrap();
    let mut header = [0; 28];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(&header[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
    assert_eq!(header[16..20], [127, 0, 0, 9]);
    assert_eq!(header[24..26], port.to_be_bytes());
    assert_eq!(header[26..], lab.at.port().to_be_bytes());
    let mut method = [0; 4];
    stream.read_exact(&mut method).await.unwrap();
    assert_eq!(&method, b"GET ");
}
