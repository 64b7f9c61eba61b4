//! The public port's HTTP: PRO-09, PRO-11, PRO-17, AUT-16 to AUT-19, TLS, proxies.

mod front_support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use front_support::client::{
    ACCEPT, KEY, NATIVE, ask, frame, login, read_reply, read_to_end, upgrade,
};
use front_support::tokens::claims;
use front_support::{Lab, NAME, PATIENCE};
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

/// Short deadlines, so that waiting for them is short.
const HASTE: &str = "[limits]\nlogin-seconds = 1\nlogin-failures = 100000\n";

#[tokio::test]
async fn the_answer_to_an_upgrade_has_what_it_needs_and_nothing_more() {
    let lab = Lab::new().await;
    let reply = lab.request(&login(&lab.ops.good())).await;
    assert_eq!(reply.status, 101);
    assert_eq!(reply.header("sec-websocket-accept"), Some(ACCEPT));
    let mut names: Vec<_> = reply.headers.iter().map(|(n, _)| n.as_str()).collect();
    names.sort_unstable();
    let wanted = [
        "connection",
        "sec-websocket-accept",
        "sec-websocket-protocol",
        "upgrade",
    ];
    assert_eq!(names, wanted);
    assert!(
        reply.rest.is_empty(),
        "the session says nothing in the same segment"
    );
}

#[tokio::test]
async fn pro_09_bytes_behind_an_upgrade_are_kept_for_the_session() {
    let lab = Lab::new().await;
    let mut request = login(&lab.ops.good()).into_bytes();
    request.extend(frame("first"));
    request.extend(frame("second"));
    let mut io = lab.tls().await;
    io.write_all(&request).await.unwrap();
    let reply = read_reply(&mut io).await;
    assert_eq!(reply.status, 101);
    let mut socket = WebSocketStream::from_partially_read(io, reply.rest, Role::Client, None).await;
    for text in ["first", "second"] {
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(text));
    }
}

#[tokio::test]
async fn pro_09_a_request_behind_a_refused_upgrade_is_never_looked_at() {
    let lab = Lab::new().await;
    let page = format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    for (first, status) in [
        (login("a.b.c"), 403),
        (upgrade("/nothing", NAME, ""), 404),
        (login("a.b.c").replace(KEY, "short"), 400),
        (login(&lab.ops.good()).replace("websocket", "h2c"), 426),
    ] {
        let mut io = lab.tls().await;
        let mut both = first.into_bytes();
        both.extend(login(&lab.ops.good()).into_bytes());
        both.extend(page.as_bytes());
        io.write_all(&both).await.unwrap();
        let all = String::from_utf8(read_to_end(&mut io).await).unwrap();
        assert!(all.starts_with(&format!("HTTP/1.1 {status} ")), "{all}");
        assert_eq!(all.matches("HTTP/1.1").count(), 1, "{all}");
    }
    assert_eq!(lab.echo.count(), 0);
}

#[tokio::test]
async fn pro_08_an_upgrade_with_a_body_is_none() {
    let lab = Lab::new().await;
    let good = lab.ops.good();
    for more in [
        "Content-Length: 5",
        "Transfer-Encoding: chunked",
        "Content-Length: 0\r\nContent-Length: 5",
        "Content-Length: +0",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Expect: 100-continue",
        "Host: other.test",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ] {
        let request = login(&good).replace("Connection:", &format!("{more}\r\nConnection:"));
        let reply = lab.request(&request).await;
        assert_eq!(reply.status, 400, "{more}");
    }
    for (from, to) in [
        ("GET ", "POST "),
        ("HTTP/1.1", "HTTP/1.0"),
        ("GET /", "GET http://other.test/"),
        ("Host: vpn.test", "Host : vpn.test"),
        ("Host: vpn.test", "Host: vpn.test\0"),
    ] {
        let reply = lab.request(&login(&good).replacen(from, to, 1)).await;
        assert_eq!(reply.status, 400, "{to}");
    }
    assert_eq!(lab.echo.count(), 0);
    let reply = lab
        .request(&login(&good).replacen("GET /", "GET http://vpn.test/", 1))
        .await;
    assert_eq!(reply.status, 101, "the same host twice is not two hosts");
}

#[tokio::test]
async fn pro_11_heads_are_bounded() {
    let lab = Lab::and(HASTE).await;
    let page = |more: &str| format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n{more}\r\n");
    let many: String = (0..10_000).map(|n| format!("X-{n}: 1\r\n")).collect();
    for (more, status) in [
        (format!("X: {}\r\n", "a".repeat(1 << 20)), 431),
        (format!("X: {}\r\n", "a".repeat(4225)), 431),
        (many, 431),
        (format!("X: {}\r\n", "a".repeat(4000)), 200),
    ] {
        let reply = ask(&mut lab.tls().await, &page(&more)).await;
        assert_eq!(reply.status, status, "{} bytes", more.len());
    }
    let long = format!(
        "GET /?{} HTTP/1.1\r\nHost: {NAME}\r\n\r\n",
        "a".repeat(5000)
    );
    assert_eq!(lab.request(&long).await.status, 414);
    let huge = format!(
        "GET /{} HTTP/1.1\r\nHost: {NAME}\r\n\r\n",
        "a".repeat(1 << 20)
    );
    assert!(matches!(lab.request(&huge).await.status, 414 | 431));
    // A head that drips in.
    let mut io = lab.tls().await;
    io.write_all(b"GET / HTTP/1.1\r\nHost: vpn").await.unwrap();
    let start = Instant::now();
    assert_eq!(read_reply(&mut io).await.status, 408);
    assert!(read_to_end(&mut io).await.is_empty());
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn pro_17_compression_is_never_agreed_to() {
    let lab = Lab::new().await;
    let offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n";
    let request = login(&lab.ops.good()).replace("Connection:", &format!("{offer}Connection:"));
    let reply = lab.request(&request).await;
    assert_eq!(reply.status, 101);
    assert_eq!(reply.header("sec-websocket-extensions"), None);
}

#[tokio::test]
async fn aut_16_before_a_login_nobody_gets_anything() {
    let lab = Lab::and(format!("{HASTE}pending-per-address = 4000\n")).await;
    // 4 KiB and a byte of credential.
    let long = "a".repeat(4097);
    assert_eq!(lab.try_token(&long).await, 403);
    // Silence, before and after TLS, and in the middle of a hello.
    let start = Instant::now();
    let (mut silent, mut half, mut after) = (lab.tcp().await, lab.tcp().await, lab.tls().await);
    half.write_all(b"\x16\x03\x01\x02\x00\x01").await.unwrap();
    for io in [&mut silent, &mut half] {
        assert!(read_to_end(io).await.is_empty());
    }
    assert!(read_to_end(&mut after).await.is_empty());
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "the documented limit"
    );
    // Upgrades without a credential, a thousand at once.
    let lab = Arc::new(lab);
    let tries: Vec<_> = (0..1000)
        .map(|_| {
            let lab = Arc::clone(&lab);
            tokio::spawn(async move {
                let more = "Sec-WebSocket-Protocol: rvpn.packets.1\r\n";
                lab.request(&upgrade(NATIVE, NAME, more)).await.status
            })
        })
        .collect();
    for one in tries {
        assert_eq!(one.await.unwrap(), 403);
    }
    assert_eq!(lab.echo.count(), 0);
    let gone = async {
        while lab.front.pending.count() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, gone).await.expect("all closed");
    assert_eq!(lab.front.gate.connections(), 0);
}

#[tokio::test]
async fn dos_03_connections_of_one_address_are_limited() {
    let lab = Lab::and("[limits]\npending-per-address = 3\n").await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(lab.tls().await);
    }
    let mut fourth = lab.tcp().await;
    assert!(read_to_end(&mut fourth).await.is_empty(), "closed at once");
    let other = lab.tcp_from("127.0.0.2").await;
    let reply = ask(&mut lab.over(other).await, &login(&lab.ops.good())).await;
    assert_eq!(reply.status, 101, "others are not concerned");
    // Whoever is logged in does not count any more.
    let reply = ask(&mut held[0], &login(&lab.ops.good())).await;
    assert_eq!(reply.status, 101);
    let mut again = lab.tls().await;
    assert_eq!(ask(&mut again, &login(&lab.ops.good())).await.status, 101);
}

#[tokio::test]
async fn aut_17_foreign_origins_are_refused_and_cookies_mean_nothing() {
    let lab = Lab::and("allowed-origins = [\"https://page.test\"]\n").await;
    let good = lab.ops.good();
    let with = |line: &str| login(&good).replace("Connection:", &format!("{line}\r\nConnection:"));
    for (origin, status) in [
        ("https://vpn.test", 101),
        ("https://page.test", 101),
        ("https://VPN.test", 101),
        ("https://vpn.test:443", 101),
        ("http://vpn.test", 403),
        ("https://vpn.test:8443", 403),
        ("https://evil.test", 403),
        ("https://vpn.test.evil.test", 403),
        ("https://evilvpn.test", 403),
        ("https://vpn.test@evil.test", 403),
        ("https://page.test.evil.test", 403),
        ("null", 403),
        ("", 403),
        ("vpn.test", 403),
        ("file://", 403),
    ] {
        let reply = lab.request(&with(&format!("Origin: {origin}"))).await;
        assert_eq!(reply.status, status, "{origin}");
    }
    let two = with("Origin: https://vpn.test\r\nOrigin: https://evil.test");
    assert_eq!(lab.request(&two).await.status, 400);
    // A cookie is no credential.
    let cookie = upgrade(
        NATIVE,
        NAME,
        &format!(
            "Sec-WebSocket-Protocol: rvpn.packets.1\r\nCookie: token={good}; access_token={good}\r\n"
        ),
    );
    assert_eq!(lab.request(&cookie).await.status, 403);
}

#[tokio::test]
async fn aut_18_other_hosts_are_not_served() {
    let lab = Lab::new().await;
    let good = lab.ops.good();
    for (host, status) in [
        ("vpn.test", 101),
        ("VPN.TEST.:443", 101),
        ("127.0.0.1:9", 101),
        ("[::1]", 101),
        ("evil.test", 421),
        ("vpn.test.evil.test", 421),
        ("x.vpn.test", 421),
        ("a@vpn.test", 400),
        ("vpn.test:", 400),
        ("vpn.test/", 400),
        ("", 400),
    ] {
        let reply = lab
            .request(&login(&good).replacen("vpn.test", host, 1))
            .await;
        assert_eq!(reply.status, status, "{host}");
    }
    let none = login(&good).replacen("Host: vpn.test\r\n", "", 1);
    assert_eq!(lab.request(&none).await.status, 400);
}

#[tokio::test]
async fn aut_19_no_admin_on_the_public_port() {
    let lab = Lab::new().await;
    let landing = lab
        .request("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await;
    assert_eq!(landing.status, 200);
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "vpn.test",
        "127.0.0.1:7980",
    ] {
        for path in [
            "/api/v1/sessions",
            "/api/v1/config",
            "/livez",
            "/readyz",
            "/metrics",
            "//api/v1/health",
            "/%61pi/v1/health",
            "/./api/v1/health",
            "/x/../api/v1/health",
            "/api%2fv1/health",
        ] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let reply = lab.request(&request).await;
            assert_eq!(
                (reply.status, reply.text().as_str()),
                (404, "not found\n"),
                "{host} {path}"
            );
            let absolute = format!("GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            assert_eq!(lab.request(&absolute).await.status, 404, "{host} {path}");
        }
    }
    for odd in ["0", "0x7f.0.0.1", "2130706433", "127.1"] {
        let request = format!("GET /api/v1/health HTTP/1.1\r\nHost: {odd}\r\n\r\n");
        assert!(
            matches!(lab.request(&request).await.status, 400 | 421),
            "{odd}"
        );
    }
}

#[tokio::test]
async fn the_page_says_nothing_of_what_is_here() {
    let lab = Lab::new().await;
    let reply = lab
        .request(&format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n"))
        .await;
    assert_eq!(reply.status, 200);
    let all = format!("{:?}{}", reply.headers, reply.text()).to_lowercase();
    for word in [
        "rvpn",
        "vpn",
        "tunnel",
        "hyper",
        "rust",
        "websocket",
        "server:",
    ] {
        assert!(!all.contains(word), "{word}: {all}");
    }
    assert!(
        reply
            .header("content-security-policy")
            .unwrap()
            .contains("default-src 'none'")
    );
    let post = lab
        .request(&format!("POST / HTTP/1.1\r\nHost: {NAME}\r\n\r\n"))
        .await;
    assert_eq!(post.status, 405);
}

#[tokio::test]
async fn nobody_is_let_in_before_the_helper_is_there_or_during_a_shutdown() {
    let lab = Lab::new().await;
    lab.echo.not_ready.store(true, Ordering::SeqCst);
    let reply = lab.request(&login(&lab.ops.good())).await;
    assert_eq!(reply.status, 503);
    assert!(reply.header("retry-after").is_some());
    lab.echo.not_ready.store(false, Ordering::SeqCst);
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
    lab.front.stop();
    assert_eq!(lab.try_token(&lab.ops.good()).await, 503);
}

#[tokio::test]
async fn older_clients_come_by_their_paths() {
    let lab = Lab::and(
        "[[legacy]]\nname = \"old\"\nsecret = \"abc123\"\ndomains = [\"a.test\"]\n\
         [[dialect]]\npath = \"/open\"\nanonymous = true\n\
         [[dialect]]\npath = \"/raw\"\nkind = \"raw\"\nlegacy = \"old\"\n\
         [[dialect]]\npath = \"/tunnel\"\n\
         [[dialect]]\npath = \"/hers\"\naccount = \"alice\"\n",
    )
    .await;
    let go = async |target: String| lab.request(&upgrade(&target, NAME, "")).await;
    let reply = go("/open".into()).await;
    assert_eq!(reply.status, 101);
    assert_eq!(reply.headers.len(), 3, "{reply:?}");
    assert!(lab.echo.last().anonymous);
    assert_eq!(&*lab.echo.last().account, "anonymous");

    let good = lab.ops.good();
    assert_eq!(go("/tunnel".into()).await.status, 403);
    assert_eq!(go(format!("/tunnel?access_token={good}")).await.status, 101);
    assert_eq!(go(format!("/tunnel?x=1&token={good}")).await.status, 101);
    assert_eq!(&*lab.echo.last().account, "alice");
    let bob = lab.ops.claims(&claims("bob"));
    assert_eq!(go(format!("/hers?token={good}")).await.status, 101);
    assert_eq!(go(format!("/hers?token={bob}")).await.status, 403);

    // Each policy has its own keys.
    let old = front_support::tokens::Signer::secret(b"abc123");
    let loose = old.claims(&serde_json::json!({"domains": ["a.test"]}));
    assert_eq!(go(format!("/raw?access_token={loose}")).await.status, 101);
    assert_eq!(&*lab.echo.last().account, "legacy:old");
    assert_eq!(lab.echo.last().expires_at, None);
    assert_eq!(go(format!("/raw?access_token={good}")).await.status, 403);
    assert_eq!(
        go(format!("/tunnel?access_token={loose}")).await.status,
        403
    );
    assert_eq!(lab.try_token(&old.good()).await, 403);
    let expired = old.claims(&serde_json::json!({"exp": 1}));
    assert_eq!(go(format!("/raw?access_token={expired}")).await.status, 403);
    // Not a WebSocket: as the first gateways answered.
    let plain = lab
        .request(&format!("GET /tunnel HTTP/1.1\r\nHost: {NAME}\r\n\r\n"))
        .await;
    assert_eq!(plain.status, 426);
}
