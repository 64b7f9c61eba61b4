//! HTTP for names that clients serve, over real sockets.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
mod serve_support;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use front_support::client::{ACCEPT, Reply, ask, read_reply, read_to_end, upgrade};
use front_support::{Lab, NAME};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Frame};
use hyper::{Response, StatusCode};
use rustls::pki_types::ServerName;
use rvpn_gateway::serve::OpenError;
use rvpn_gateway::serve::table::Offer;
use serve_support::backend::{Backend, Body, Seen, tell, whole};
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
async fn rev_04_what_is_no_host_is_refused() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    for head in [
        "Host: a.ex@b.ex\r\n",
        "Host: a.ex%00\r\n",
        "Host: a.ex\r\nHost: b.ex\r\n",
        "Host: a.ex\r\nHost: a.ex\r\n",
        "Host: a.ex:99999\r\n",
        "Host: b\u{fc}cher.ex\r\n",
        "Host: \r\n",
        "",
    ] {
        let reply = plain(&lab, &format!("GET / HTTP/1.1\r\n{head}\r\n")).await;
        assert_eq!(reply.status, 400, "{head:?}");
    }
    let reply = plain(&lab, "GET http://b.ex/ HTTP/1.1\r\nHost: a.ex\r\n\r\n").await;
    assert_eq!(reply.status, 400);
    assert_eq!(a.count(), 0);
    let reply = plain(&lab, "GET http://A.ex/x HTTP/1.1\r\nHost: a.ex\r\n\r\n").await;
    assert_eq!((reply.status, a.last().line), (200, "GET /x".to_owned()));
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

/// Requests that two readers could take for different ones, and what is
/// allowed to come of them beside a refusal: one request with this body.
const SMUGGLED: &[(&str, &str, Option<&str>)] = &[
    (
        "CL.TE",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nX",
        Some(""),
    ),
    (
        "TE.CL",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n1\r\nA\r\n0\r\n\r\n",
        Some("A"),
    ),
    (
        "TE.TE",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
        None,
    ),
    (
        "TE twice",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        None,
    ),
    (
        "TE list",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: x, chunked\r\n\r\n0\r\n\r\n",
        None,
    ),
    (
        "TE xchunked",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        None,
    ),
    (
        "TE tab",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding:\tchunked\r\n\r\n1\r\nA\r\n0\r\n\r\n",
        Some("A"),
    ),
    (
        "TE vertical tab",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        None,
    ),
    (
        "two CL",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nAB",
        None,
    ),
    (
        "two equal CL",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nA",
        Some("A"),
    ),
    (
        "CL list",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1, 1\r\n\r\nA",
        None,
    ),
    (
        "CL +",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: +1\r\n\r\nA",
        None,
    ),
    (
        "CL hex",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 0x1\r\n\r\nA",
        None,
    ),
    (
        "CL minus",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: -1\r\n\r\nA",
        None,
    ),
    (
        "CL inner space",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1 1\r\n\r\nA",
        None,
    ),
    (
        "CL end space",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1 \r\n\r\nA",
        Some("A"),
    ),
    (
        "CL too large",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 18446744073709551617\r\n\r\nA",
        None,
    ),
    (
        "chunk extension",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\n\r\n1;x=y\r\nA\r\n0\r\n\r\n",
        Some("A"),
    ),
    (
        "chunk size 0x",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\nA\r\n0\r\n\r\n",
        None,
    ),
    (
        "chunk size +",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\nA\r\n0\r\n\r\n",
        None,
    ),
    (
        "chunk size huge",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\nA\r\n0\r\n\r\n",
        None,
    ),
    (
        "chunk bare LF",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\n\r\n1\nA\r\n0\r\n\r\n",
        Some("A"),
    ),
    (
        "chunk extension LF",
        "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\n\r\n1;a\nb\r\nA\r\n0\r\n\r\n",
        None,
    ),
    ("bare LF", "GET / HTTP/1.1\nHost: a.ex\n\n", Some("")),
    (
        "bare CR",
        "GET / HTTP/1.1\r\nHost: a.ex\rX: y\r\n\r\n",
        None,
    ),
    (
        "fold",
        "GET / HTTP/1.1\r\nHost: a.ex\r\nX: a\r\n b\r\n\r\n",
        None,
    ),
    (
        "fold first",
        "GET / HTTP/1.1\r\n Host: b.ex\r\nHost: a.ex\r\n\r\n",
        None,
    ),
    (
        "space before colon",
        "GET / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding : chunked\r\n\r\n",
        None,
    ),
    (
        "NUL in value",
        "GET / HTTP/1.1\r\nHost: a.ex\r\nX: a\0b\r\n\r\n",
        None,
    ),
    (
        "NUL in name",
        "GET / HTTP/1.1\r\nHost: a.ex\r\nX\0: a\r\n\r\n",
        None,
    ),
    (
        "1.0 and TE",
        "POST / HTTP/1.0\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        None,
    ),
    ("1.2", "GET / HTTP/1.2\r\nHost: a.ex\r\n\r\n", None),
    ("0.9", "GET /\r\nHost: a.ex\r\n\r\n", None),
    (
        "absolute form against Host",
        "GET http://b.ex/ HTTP/1.1\r\nHost: a.ex\r\n\r\n",
        None,
    ),
    (
        "GET with body",
        "GET / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1\r\n\r\nA",
        Some("A"),
    ),
    (
        "HEAD with body",
        "HEAD / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 1\r\n\r\nA",
        Some("A"),
    ),
    (
        "no colon",
        "GET / HTTP/1.1\r\nHost: a.ex\r\nX\r\n\r\n",
        None,
    ),
    (
        "space in path",
        "GET /a b HTTP/1.1\r\nHost: a.ex\r\n\r\n",
        None,
    ),
    (
        "CONNECT",
        "CONNECT a.ex:443 HTTP/1.1\r\nHost: a.ex:443\r\n\r\n",
        None,
    ),
    (
        "h2c",
        "GET / HTTP/1.1\r\nHost: a.ex\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        Some(""),
    ),
];

#[tokio::test]
async fn pro_08_nothing_is_smuggled() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let (_b, b) = web(&lab, "bob", &["b.ex"]);
    for (what, request, allowed) in SMUGGLED {
        // Alone, after a good request of the same connection, and in pieces.
        for way in 0..3 {
            let before = a.count();
            let mut io = lab.tcp().await;
            if way == 1 {
                assert_eq!(ask(&mut io, &get("a.ex", "/first", "")).await.status, 200);
            }
            // What follows is a request of its own or nothing at all.
            let rest = get("a.ex", "/second", "Connection: close\r\n");
            let all = format!("{request}{rest}");
            match way {
                2 => {
                    for piece in all.as_bytes().chunks(5) {
                        if io.write_all(piece).await.is_err() {
                            break;
                        }
                    }
                }
                _ => drop(io.write_all(all.as_bytes()).await),
            }
            let answers = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
            let seen: Vec<Seen> = a.seen.lock().unwrap()[before..].to_vec();
            let mut seen = seen.iter().filter(|s| s.line != "GET /first");
            match (seen.next(), allowed) {
                (None, _) => {
                    let refused = [
                        "HTTP/1.1 400",
                        "HTTP/1.0 400",
                        "HTTP/1.1 405",
                        "HTTP/1.1 417",
                    ];
                    let one = refused.iter().any(|r| answers.starts_with(r)) || answers.is_empty();
                    assert!(one, "{what}: {answers}");
                    assert_eq!(
                        answers.matches("HTTP/1.").count().max(1),
                        1,
                        "{what}: {answers}"
                    );
                }
                (Some(one), Some(body)) => {
                    assert_eq!(String::from_utf8_lossy(&one.body), *body, "{what}");
                    assert!(one.line.ends_with(" /"), "{what}: {one:?}");
                    let (sized, coded) = (one.all("content-length"), one.all("transfer-encoding"));
                    assert!(sized.len() + coded.len() <= 1, "{what}: {one:?}");
                    assert!(one.all("upgrade").is_empty() && one.all("http2-settings").is_empty());
                    // The one behind it is the one that was meant, if any.
                    let next = seen.next();
                    assert!(
                        next.is_none_or(|s| s.line == "GET /second"),
                        "{what}: {next:?}"
                    );
                    assert!(seen.next().is_none());
                }
                (Some(one), None) => panic!("{what} was forwarded as {one:?}"),
            }
        }
    }
    assert_eq!(b.count(), 0);
    let raw = String::from_utf8_lossy(&a.moved.lock().unwrap().0).into_owned();
    assert!(!raw.contains("b.ex") && !raw.contains('\0'));
}

#[tokio::test]
async fn pro_09_what_follows_an_upgrade_is_no_tunnel_without_a_101() {
    let lab = Lab::new().await;
    // It answers everything with 200.
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let request = upgrade("/ws", "a.ex", "");
    let smuggled = get("a.ex", "/smuggled", "");
    let mut io = lab.tcp().await;
    io.write_all(format!("{request}{smuggled}").as_bytes())
        .await
        .unwrap();
    let all = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
    assert!(
        all.starts_with("HTTP/1.1 200") && all.contains("alice GET /ws 0"),
        "{all}"
    );
    assert_eq!(all.matches("HTTP/1.1").count(), 1, "{all}");
    assert_eq!(a.count(), 1);
    let raw = String::from_utf8_lossy(&a.moved.lock().unwrap().0).into_owned();
    assert!(!raw.contains("smuggled"), "{raw}");
}

#[tokio::test]
async fn a_websocket_is_passed_on_and_bytes_behind_its_request_wait_for_the_101() {
    let lab = Lab::new().await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let mut io = lab.tcp().await;
    let early = upgrade("/ws", "a.ex", "Sec-WebSocket-Protocol: chat\r\n") + "early bytes";
    io.write_all(early.as_bytes()).await.unwrap();
    let (_, mut stream) = a.asked.recv().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(stream.read_buf(&mut head).await.unwrap() > 0);
    }
    let text = String::from_utf8(head).unwrap();
    assert!(text.contains("Sec-WebSocket-Protocol: chat") && text.contains("Sec-WebSocket-Key"));
    // Nothing more comes before the answer.
    let more = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut [0; 1])).await;
    assert!(more.is_err());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {ACCEPT}\r\n\r\nhello"
    );
    stream.write_all(answer.as_bytes()).await.unwrap();
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"early bytes");
    let mut reply = read_reply(&mut io).await;
    assert_eq!(reply.status, 101);
    assert_eq!(reply.header("sec-websocket-accept"), Some(ACCEPT));
    while reply.rest.len() < 5 {
        io.read_buf(&mut reply.rest).await.unwrap();
    }
    assert_eq!(reply.rest, b"hello");
    stream.write_all(b"and more").await.unwrap();
    let mut bytes = [0; 8];
    io.read_exact(&mut bytes).await.unwrap();
    // Each side ends by itself.
    io.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut bytes).await.unwrap(), 0);
    stream.write_all(b"last").await.unwrap();
    drop(stream);
    assert_eq!(read_to_end(&mut io).await, b"last");
    assert_eq!(lab.front.table.snapshot().visitors.current, 0);
}

#[tokio::test]
async fn pro_11_what_is_too_large_or_too_slow_costs_little() {
    let lab = Lab::and("[limits]\nlogin-seconds = 1\n").await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let first = get("a.ex", "/", "");
    let long = format!(
        "GET / HTTP/1.1\r\nHost: a.ex\r\nX: {}\r\n\r\n",
        "x".repeat(1_000_000)
    );
    let many = format!(
        "GET / HTTP/1.1\r\nHost: a.ex\r\n{}\r\n",
        "X: y\r\n".repeat(10_000)
    );
    let url = get("a.ex", &format!("/{}", "x".repeat(1_000_000)), "");
    for (what, request, statuses) in [
        ("one line", &long, &[431][..]),
        ("many lines", &many, &[431]),
        ("a path", &url, &[414, 431]),
    ] {
        for after in [false, true] {
            let mut io = lab.tcp().await;
            if after {
                assert_eq!(ask(&mut io, &first).await.status, 200);
            }
            let began = Instant::now();
            let reply = ask(&mut io, request).await;
            assert!(statuses.contains(&reply.status), "{what}: {}", reply.status);
            assert!(began.elapsed() < Duration::from_secs(1));
        }
    }
    // A byte now and then does not make a request.
    for after in [false, true] {
        let mut io = lab.tcp().await;
        let before = a.count();
        if after {
            assert_eq!(ask(&mut io, &first).await.status, 200);
        }
        let began = Instant::now();
        let mut closed = false;
        for byte in get("a.ex", "/slow", "").bytes() {
            if io.write_all(&[byte]).await.is_err() {
                closed = true;
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            if began.elapsed() > Duration::from_secs(3) {
                break;
            }
        }
        let rest = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
        assert!(
            closed || rest.is_empty() || rest.starts_with("HTTP/1.1 408"),
            "{rest}"
        );
        assert_eq!(a.count(), before + usize::from(after));
    }
}

#[tokio::test]
async fn pro_12_control_characters_never_reach_a_client() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    for wrong in ["\0", "\x1b", "\x7f", "\x01", "\r"] {
        for request in [
            get(&format!("a.ex{wrong}"), "/", ""),
            get("a.ex", &format!("/{wrong}"), ""),
            get(
                "a.ex",
                "/",
                &format!("Sec-WebSocket-Protocol: a{wrong}b\r\n"),
            ),
            get("a.ex", "/", &format!("X{wrong}: y\r\n")),
        ] {
            let reply = plain(&lab, &request).await;
            assert!(
                matches!(reply.status, 400 | 421),
                "{request:?}: {}",
                reply.status
            );
        }
    }
    assert_eq!(a.count(), 0);
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
    // R-5: everything else is sent to https, or is not there.
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
async fn rev_18_who_is_not_served_learns_nothing() {
    let lab = Lab::new().await;
    let gone = web(&lab, "alice", &["gone.ex"]);
    let (refusing, _b) = web(&lab, "bob", &["refusing.ex"]);
    refusing.fake.fail(OpenError::Refused);
    drop(gone);
    let page = |host: &'static str| {
        let lab = &lab;
        async move {
            let mut io = lab.tcp().await;
            let request = get(host, "/", "Connection: close\r\n");
            let began = Instant::now();
            io.write_all(request.as_bytes()).await.unwrap();
            let page = read_to_end(&mut io).await;
            (page, began.elapsed())
        }
    };
    let (unknown, _) = page("unknown.ex").await;
    let text = String::from_utf8_lossy(&unknown).into_owned();
    assert!(
        text.starts_with("HTTP/1.1 502") && text.contains("Not connected"),
        "{text}"
    );
    for name in ["alice", "bob", "gone", "refusing", "unknown", "vpn"] {
        assert!(!text.contains(name), "{text}");
    }
    let mut longest = Duration::ZERO;
    for host in ["gone.ex", "refusing.ex", "a.b.c.d.e", "x.gone.ex"] {
        for _ in 0..10 {
            let (page, took) = page(host).await;
            assert_eq!(page, unknown, "{host}");
            longest = longest.max(took);
        }
    }
    assert!(longest < Duration::from_millis(500), "{longest:?}");
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
async fn bodies_of_any_size_stream_both_ways() {
    const SIZE: usize = 40 << 20;
    let lab = Lab::new().await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let mut io = lab.tcp().await;
    let head = format!("POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: {SIZE}\r\n\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    let (_, mut stream) = a.asked.recv().await.unwrap();
    let (mut read, mut write) = io.into_split();
    let piece: Vec<u8> = (0..1 << 16).map(|i: u32| (i % 251) as u8).collect();
    let sent = piece.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..SIZE / sent.len() {
            write.write_all(&sent).await.unwrap();
        }
        write
    });
    // As long as the client does not read, no more is taken than buffers hold.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!sending.is_finished());
    let mut got = Vec::new();
    while !got.windows(4).any(|w| w == b"\r\n\r\n") {
        stream.read_buf(&mut got).await.unwrap();
    }
    let head = got.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let mut body = got.split_off(head);
    let mut at = 0;
    while at < SIZE {
        for byte in body.drain(..) {
            assert_eq!(byte, piece[at % piece.len()]);
            at += 1;
        }
        if at < SIZE {
            assert!(stream.read_buf(&mut body).await.unwrap() > 0);
        }
    }
    sending.await.unwrap();
    // Back without a length, in chunks to the visitor.
    let answering = tokio::spawn(async move {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        for _ in 0..SIZE / piece.len() {
            stream.write_all(&piece).await.unwrap();
        }
    });
    let mut reader = tokio::io::BufReader::new(&mut read);
    let mut total = 0;
    let head = read_reply(&mut reader).await;
    assert_eq!(head.header("transfer-encoding"), Some("chunked"));
    let mut buf = head.rest;
    total += buf.len();
    while !buf.ends_with(b"0\r\n\r\n") {
        buf.drain(..buf.len().saturating_sub(5));
        let before = buf.len();
        assert!(reader.read_buf(&mut buf).await.unwrap() > 0);
        total += buf.len() - before;
    }
    assert!(total > SIZE && total < SIZE + SIZE / 10, "{total}");
    answering.await.unwrap();
    let traffic = lab.front.table.snapshot().traffic;
    assert!(traffic.inbound > SIZE as u64 && traffic.outbound > SIZE as u64);
}

fn trailing(_: &str, seen: &Seen) -> Response<Body> {
    let mut trailers = hyper::HeaderMap::new();
    trailers.insert("x-sum", "42".parse().unwrap());
    let frames = [
        Ok::<_, Infallible>(Frame::data(Bytes::from(format!("{:?}", seen.trailers)))),
        Ok(Frame::trailers(trailers)),
    ];
    let body = http_body_util::StreamBody::new(futures_util::stream::iter(frames));
    let mut answer = Response::new(BodyExt::boxed_unsync(body));
    answer
        .headers_mut()
        .insert("trailer", "x-sum".parse().unwrap());
    answer
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let lab = Lab::new().await;
    let (_a, a) = web_with(&lab, "alice", &["a.ex"], trailing);
    let request = "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\
                   Connection: close, TE\r\nTrailer: x-own\r\n\r\n1\r\nA\r\n0\r\nx-own: 7\r\n\r\n";
    let mut io = lab.tcp().await;
    io.write_all(request.as_bytes()).await.unwrap();
    let all = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
    assert_eq!(a.last().trailers, [("x-own".to_owned(), "7".to_owned())]);
    assert!(all.ends_with("0\r\nx-sum: 42\r\n\r\n"), "{all}");
}

fn odd(_: &str, seen: &Seen) -> Response<Body> {
    let mut answer = whole("some text");
    let status = match seen.line.rsplit('/').next() {
        Some("none") => StatusCode::NO_CONTENT,
        Some("same") => StatusCode::NOT_MODIFIED,
        _ => StatusCode::OK,
    };
    if status != StatusCode::OK {
        answer = Response::new(Full::default().boxed_unsync());
    }
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert("connection", "x-hop".parse().unwrap());
    answer.headers_mut().insert("x-hop", "1".parse().unwrap());
    answer
}

#[tokio::test]
async fn answers_without_a_body_and_older_visitors_are_served_as_they_should_be() {
    let lab = Lab::new().await;
    let (_a, a) = web_with(&lab, "alice", &["a.ex"], odd);
    let mut io = lab.tcp().await;
    let request =
        |method: &str, path: &str| format!("{method} {path} HTTP/1.1\r\nHost: a.ex\r\n\r\n");
    let mut head = String::new();
    io.write_all(request("HEAD", "/").as_bytes()).await.unwrap();
    while !head.ends_with("\r\n\r\n") {
        head.push(char::from(io.read_u8().await.unwrap()));
    }
    assert!(
        head.contains("content-length: 9") && !head.contains("x-hop"),
        "{head}"
    );
    for (path, status) in [("/none", 204), ("/same", 304), ("/", 200)] {
        // Were there a body, the next answer would begin with it.
        let reply = ask(&mut io, &request("GET", path)).await;
        assert_eq!(reply.status, status);
    }
    // HTTP/1.0 ends with its connection, even if its visitor half-closes at once.
    let mut io = lab.tcp().await;
    io.write_all(b"GET / HTTP/1.0\r\nHost: a.ex\r\n\r\n")
        .await
        .unwrap();
    io.shutdown().await.unwrap();
    let all = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
    assert!(
        all.starts_with("HTTP/1.0 200") && all.ends_with("some text"),
        "{all}"
    );
    assert_eq!(a.last().all("host"), ["a.ex"]);
}

#[tokio::test]
async fn who_waits_for_a_100_gets_it_and_other_expectations_are_refused() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let head = "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n";
    let mut io = lab.tcp().await;
    let reply = ask(&mut io, head).await;
    assert_eq!(reply.status, 100);
    let reply = ask(&mut io, "body").await;
    assert_eq!((reply.status, &*reply.text()), (200, "alice POST / 4\n"));
    let strange = get("a.ex", "/", "Expect: miracles\r\n");
    assert_eq!(plain(&lab, &strange).await.status, 417);
    assert_eq!(a.count(), 1);
}

#[tokio::test]
async fn r_04_tls_without_a_name_goes_by_host() {
    let lab = Lab::new().await;
    let (_a, _) = web(&lab, "alice", &["a.ex", "127.0.0.1"]);
    let mut io = without_name(&lab).await;
    let reply = ask(&mut io, &get("a.ex", "/", "")).await;
    assert_eq!(reply.text(), "alice GET / 0\n");
    // R-7: an address may be among the claims, but a tunnel's way in stays ours.
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
