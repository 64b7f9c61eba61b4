//! What hostile visitors get.

use std::time::{Duration, Instant};

use rvpn_gateway::serve::OpenError;
use tokio::io::AsyncWriteExt;

use crate::front_support::Lab;
use crate::front_support::client::{ask, read_to_end, upgrade};
use crate::serve_support::backend::Seen;
use crate::{get, plain, web};

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
