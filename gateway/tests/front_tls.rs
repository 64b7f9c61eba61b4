//! What is below HTTP: TLS, proxies, first bytes, and changing all of it while clients stay.

mod front_support;

use std::sync::Arc;

use front_support::client::{ask, frame, login, read_reply, read_to_end, upgrade};
use front_support::{Lab, NAME, PATIENCE, Setup};
use futures_util::{SinkExt, StreamExt};
use rvpn_gateway::auth::Gate;
use rvpn_gateway::tls::Tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

/// Short deadlines, so that waiting for them is short.
const HASTE: &str = "[limits]\nlogin-seconds = 1\nlogin-failures = 100000\n";

#[tokio::test]
async fn plain_and_auto_listeners() {
    for mode in ["plain", "auto"] {
        let listener = match mode {
            "plain" => "mode = \"plain\"\n",
            _ => "mode = \"auto\"\n",
        };
        let lab = Lab::with(Setup {
            listener,
            more: HASTE.into(),
        })
        .await;
        let mut io = lab.tcp().await;
        assert_eq!(
            ask(&mut io, &login(&lab.ops.good())).await.status,
            101,
            "{mode}"
        );
        // One byte at a time.
        let mut io = lab.tcp().await;
        io.set_nodelay(true).unwrap();
        for byte in login(&lab.ops.good()).bytes() {
            io.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(read_reply(&mut io).await.status, 101, "{mode}");
        if mode == "auto" {
            assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
            for odd in [
                &b"SSH-2.0-x\r\n"[..],
                b"\x16\x02\x00",
                b"\0",
                b"\r\n\r\n\0\r\nQUIT\n",
            ] {
                let mut io = lab.tcp().await;
                io.write_all(odd).await.unwrap();
                let answer = read_to_end(&mut io).await;
                assert!(!answer.starts_with(b"HTTP/1.1 2"), "{odd:?}");
            }
            let mut silent = lab.tcp().await;
            assert!(read_to_end(&mut silent).await.is_empty());
        }
    }
}

/// What a proxy sends first.
fn proxy_header(source: [u8; 4]) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    bytes.extend(source);
    bytes.extend([127, 0, 0, 1, 0x30, 0x39, 1, 0xbb]);
    bytes
}

#[tokio::test]
async fn pro_04_proxy_headers_count_from_named_sources_only() {
    let listener = "mode = \"plain\"\nproxy-from = [\"127.0.0.2\"]\n";
    let lab = Lab::with(Setup {
        listener,
        more: HASTE.into(),
    })
    .await;
    let request = login(&lab.ops.good());
    let mut bytes = proxy_header([203, 0, 113, 9]);
    bytes.extend(request.as_bytes());
    let mut io = lab.tcp_from("127.0.0.2").await;
    io.write_all(&bytes).await.unwrap();
    assert_eq!(read_reply(&mut io).await.status, 101);
    assert_eq!(lab.echo.last().peer, "203.0.113.9:12345".parse().unwrap());
    // The named source must send it.
    let mut io = lab.tcp_from("127.0.0.2").await;
    io.write_all(request.as_bytes()).await.unwrap();
    assert!(read_to_end(&mut io).await.is_empty());
    // Others must not.
    let mut io = lab.tcp_from("127.0.0.3").await;
    io.write_all(&bytes).await.unwrap();
    let answer = read_to_end(&mut io).await;
    assert!(!answer.starts_with(b"HTTP/1.1 101"));
    assert_eq!(lab.echo.count(), 1);
}

#[tokio::test]
async fn pro_10_forwarded_addresses_count_from_named_sources_only() {
    let listener = "mode = \"plain\"\nforwarded-from = [\"127.0.0.2\"]\n";
    let lab = Lab::with(Setup {
        listener,
        more: HASTE.into(),
    })
    .await;
    let forged = "X-Forwarded-For: 198.51.100.1, 203.0.113.9\r\nConnection:";
    let request = login(&lab.ops.good()).replacen("Connection:", forged, 1);
    for (from, peer) in [("127.0.0.2", "203.0.113.9"), ("127.0.0.3", "127.0.0.3")] {
        let mut io = lab.tcp_from(from).await;
        assert_eq!(ask(&mut io, &request).await.status, 101);
        assert_eq!(lab.echo.last().peer.ip().to_string(), peer);
    }
}

#[tokio::test]
async fn pro_06_tls_is_1_3_or_1_2_with_http_1_1() {
    let lab = Lab::new().await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let tcp = lab.tcp().await;
        let name = rustls::pki_types::ServerName::try_from(NAME).unwrap();
        let mut io = lab.connector(&[version]).connect(name, tcp).await.unwrap();
        let session = io.get_ref().1;
        assert_eq!(session.protocol_version(), Some(version.version));
        assert_eq!(session.alpn_protocol(), Some(&b"http/1.1"[..]));
        let suite = format!("{:?}", session.negotiated_cipher_suite().unwrap().suite());
        assert!(
            suite.contains("GCM") || suite.contains("POLY1305"),
            "{suite}"
        );
        assert_eq!(ask(&mut io, &login(&lab.ops.good())).await.status, 101);
    }
    // TLS 1.0: a hello that offers nothing better.
    let mut hello = vec![0x16, 3, 1, 0, 45, 1, 0, 0, 41, 3, 1];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x13, 1, 0]);
    let mut io = lab.tcp().await;
    io.write_all(&hello).await.unwrap();
    let answer = read_to_end(&mut io).await;
    assert_eq!(answer.first(), Some(&0x15), "an alert: {answer:?}");
}

/// Whoever begins a handshake and then waits keeps nobody else waiting.
#[tokio::test]
async fn dos_02_half_a_handshake_holds_no_place() {
    let lab = Lab::and("[limits]\nhandshakes = 1\n").await;
    let name = rustls::pki_types::ServerName::try_from(NAME).unwrap();
    let config = lab.connector(rustls::ALL_VERSIONS).config().clone();
    let mut greeting = Vec::new();
    let mut half = rustls::ClientConnection::new(config, name).unwrap();
    half.write_tls(&mut greeting).unwrap();
    let mut waiting = Vec::new();
    for sent in [0, 1, 5, greeting.len() / 2, greeting.len()] {
        for _ in 0..8 {
            let mut io = lab.tcp().await;
            io.write_all(&greeting[..sent]).await.unwrap();
            waiting.push(io);
        }
    }
    // Answered as far as they went, so all of them have been seen.
    for io in &waiting[32..] {
        io.readable().await.unwrap();
    }
    let start = std::time::Instant::now();
    let reply = lab.request(&login(&lab.ops.good())).await;
    assert_eq!(reply.status, 101);
    // A tenth of the time the others may take.
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_certificate_is_made_once_and_another_is_taken_over_without_a_drop() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::new().await;
    let key = lab.dir.path().join("tls.key");
    let mode = std::fs::metadata(&key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let first = lab.front.tls.fingerprint();
    assert!(lab.front.tls.self_signed());
    let again = Tls::load(&lab.front.config()).unwrap();
    assert_eq!(again.fingerprint(), first, "it is kept");

    let mut socket = lab.socket(&login(&lab.ops.good())).await;
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]).unwrap();
    let (crt, own) = (
        lab.dir.path().join("own.crt"),
        lab.dir.path().join("own.key"),
    );
    std::fs::write(&crt, made.cert.pem()).unwrap();
    std::fs::write(&own, made.signing_key.serialize_pem()).unwrap();
    let files = "[tls]\ncertificate = \"own.crt\"\nkey = \"own.key\"\n";
    let config = lab.config(files);
    lab.front.tls.commit(Tls::prepare(&config).unwrap());
    assert_ne!(lab.front.tls.fingerprint(), first);
    assert!(!lab.front.tls.self_signed());
    // Who was here stays; who comes sees the new one.
    socket.send(Message::text("still here")).await.unwrap();
    assert_eq!(
        socket.next().await.unwrap().unwrap(),
        Message::text("still here")
    );
    std::fs::copy(&crt, lab.dir.path().join("tls.crt")).unwrap();
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
    // A key that does not fit is refused before anything changes.
    std::fs::copy(&key, &own).unwrap();
    let error = Tls::prepare(&config).err().unwrap().to_string();
    assert!(error.contains("own.crt"), "{error}");
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
}

#[tokio::test]
async fn wire_bytes_are_those_of_the_socket() {
    let listener = "mode = \"plain\"\n";
    let lab = Lab::with(Setup {
        listener,
        more: String::new(),
    })
    .await;
    let request = login(&lab.ops.good());
    let mut io = lab.tcp().await;
    let reply = ask(&mut io, &request).await;
    assert_eq!(reply.status, 101);
    let head = "HTTP/1.1 101 Switching Protocols\r\n".len()
        + reply
            .headers
            .iter()
            .map(|(n, v)| n.len() + v.len() + 4)
            .sum::<usize>()
        + 2;
    let ask_wire = frame("wire?");
    io.write_all(&ask_wire).await.unwrap();
    let mut answer = [0; 64];
    let n = timeout(PATIENCE, io.read(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let text = String::from_utf8(answer[2..n].to_vec()).unwrap();
    assert_eq!(text, format!("{} {head}", request.len() + ask_wire.len()));
}

#[tokio::test]
async fn a_reload_changes_all_or_nothing() {
    let lab = Lab::new().await;
    let broken =
        lab.config("[[key]]\nname = \"gone\"\nalgorithm = \"EdDSA\"\nfile = \"gone.pem\"\n");
    let error = Gate::prepare(&broken).err().unwrap().to_string();
    assert!(error.contains("gone.pem"), "{error}");
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
    lab.front.configure(Arc::new(
        lab.config("[[dialect]]\npath = \"/t\"\nanonymous = true\n"),
    ));
    assert_eq!(lab.request(&upgrade("/t", NAME, "")).await.status, 101);
}
