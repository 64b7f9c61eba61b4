//! Greetings of TLS that a gateway must not take, or not take at their word.

use std::sync::Arc;

use rustls::HandshakeKind;
use rustls::pki_types::ServerName;
use rvpn_gateway::config::Names;
use rvpn_gateway::serve::table::Ending;
use rvpn_gateway::tls::Fingerprint;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::front_support::client::{ask, read_to_end};
use crate::front_support::served::{compare, serve};
use crate::front_support::{Lab, NAME, PATIENCE};
use crate::greeting::{Greeting, list8, names};
use crate::{DEVICE, HASTE, ROOM, alert, any, exchange, real_greeting};

#[tokio::test]
async fn pro_05_an_odd_name_never_leads_to_a_tenant() {
    let lab = Lab::and(ROOM).await;
    let answers = |io| compare(io, Arc::new(vec![22]));
    // Somebody serves everything there is to serve.
    let exact = serve(
        &lab.front.table,
        DEVICE,
        None,
        Ending::There,
        move |_, io| answers(io),
    );
    let below = serve(
        &lab.front.table,
        "*.b.example",
        None,
        Ending::There,
        move |_, io| answers(io),
    );
    let label = vec![b'a'; 63];
    let long = [&label[..], &label, &label, &label, b"b.example"].join(&b'.');
    let odd: Vec<Vec<u8>> = [
        &b""[..],
        b".",
        b"app.example\0",
        b"app\0.example",
        b"\0app.example",
        b"app.example:443",
        b"app.example..",
        b".app.example",
        b"app..example",
        b"*.b.example",
        b"*.example",
        b"b\xc3\xbccher.b.example",
        b"\xff.b.example",
        b"app.example/",
        b"a b.b.example",
        b"-.b.example",
        &long,
        &[b'a'; 255],
        &[b'a'; 256],
    ]
    .map(|name| Greeting::of(name).bytes())
    .to_vec();
    let doubled = [
        Greeting::new().with(0, names(&[b"app.example", b"x.b.example"])),
        Greeting::new().with(0, names(&[b"app.example", b"app.example"])),
        Greeting::of(b"app.example").with(0, names(&[b"app.example"])),
        Greeting::new().with(0, names(&[])),
        Greeting::new().with(0, Vec::new()),
    ];
    let refused = odd.into_iter().chain(doubled.iter().map(Greeting::bytes));
    for bytes in refused {
        let answer = exchange(&lab, &bytes).await;
        assert_eq!(answer.len(), 7, "{answer:?}");
        assert_eq!(answer[..6], [21, 3, 1, 0, 2, 2]);
    }
    // Names that nobody serves, and addresses, are the gateway's own.
    for name in [
        "b.example",
        "other.example",
        "app.example.com",
        "127.0.0.1",
        "pp.example",
    ] {
        let bytes = Greeting::of(name.as_bytes()).bytes();
        let answer = exchange(&lab, &bytes).await;
        // This greeting offers no key: TLS asks again or says so itself.
        assert!(
            matches!(answer.first(), Some(21 | 22)) && answer != b"same",
            "{name} {answer:?}"
        );
    }
    assert_eq!((exact.visits(), below.visits()), (0, 0));
    // One canonical form leads there, whatever is around it.
    for name in ["app.example", "APP.Example", "app.example."] {
        let greased = Greeting::of(name.as_bytes())
            .with(0x0a0a, Vec::new())
            .with(0xfe0d, vec![7; 200])
            .with(0xfafa, vec![0]);
        assert_eq!(exchange(&lab, &greased.bytes()).await, b"same", "{name}");
    }
    for name in ["x.b.example", "X.Y.B.example."] {
        assert_eq!(
            exchange(&lab, &Greeting::of(name.as_bytes()).bytes()).await,
            b"same"
        );
    }
    assert_eq!((exact.visits(), below.visits()), (3, 2));
}

#[tokio::test]
async fn pro_05_a_name_of_the_gateway_is_nobody_elses() {
    let lab = Lab::and(ROOM).await;
    // It was a client's, until the gateway took the name for itself.
    let former = serve(
        &lab.front.table,
        "later.test",
        None,
        Ending::There,
        |_, io| compare(io, Arc::new(vec![22])),
    );
    let mut config = (*lab.front.config()).clone();
    config.names = Names::new(vec![NAME.to_owned(), "later.test".to_owned()]).unwrap();
    lab.front.configure(Arc::new(config));
    let (shown, _io) = any(&lab, "later.test").await;
    assert_eq!(Fingerprint::of(&shown), lab.front.tls.fingerprint());
    assert_eq!(former.visits(), 0);
}

#[tokio::test]
async fn pro_06_old_versions_get_an_alert_and_the_end() {
    let lab = Lab::and(ROOM).await;
    let device = serve(&lab.front.table, DEVICE, None, Ending::There, |_, io| {
        compare(io, Arc::new(vec![22]))
    });
    let ssl2 = b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x01\x00\x80\x02\x00\x80";
    let mut all = vec![ssl2.to_vec()];
    for name in [DEVICE, NAME] {
        for version in [0x0300, 0x0301, 0x0302] {
            let greeting = Greeting {
                version,
                ..Greeting::of(name.as_bytes())
            };
            all.push(greeting.without(43).bytes());
        }
        // The same said by the extension.
        let said = Greeting::of(name.as_bytes()).without(43);
        all.push(said.with(43, list8(&[3, 2, 3, 1])).bytes());
    }
    for bytes in all {
        assert_eq!(exchange(&lab, &bytes).await, alert(70), "{bytes:?}");
    }
    assert_eq!(device.visits(), 0);
}

/// Extensions without which nobody can agree on keys in TLS 1.2.
fn agreeable(suite: u16) -> Greeting {
    let greeting = Greeting::of(NAME.as_bytes())
        .without(43)
        .with(10, vec![0, 4, 0, 0x1d, 0, 0x17])
        .with(11, vec![1, 0])
        .with(13, vec![0, 6, 4, 3, 8, 4, 4, 1])
        .with(23, Vec::new());
    Greeting {
        suites: vec![suite],
        ..greeting
    }
}

#[tokio::test]
async fn pro_01_only_suites_that_authenticate_what_they_encrypt() {
    let lab = Lab::and(HASTE).await;
    // CBC, RC4, 3DES, none at all, export, without forward secrecy, anonymous.
    let weak = [
        0xc009, 0xc00a, 0xc013, 0xc014, 0xc023, 0xc024, 0xc027, 0xc028, 0xc007, 0xc011, 0xc008,
        0xc012, 0x0005, 0x000a, 0x002f, 0x0035, 0x003c, 0x003d, 0x009c, 0x009d, 0x0000, 0x0001,
        0x0003, 0xc006, 0xc010, 0x0034, 0xc018, 0xc0ac, 0xc0ae,
    ];
    for suite in weak {
        let answer = exchange(&lab, &agreeable(suite).bytes()).await;
        assert_eq!(
            (answer.first(), answer.get(6)),
            (Some(&21), Some(&40)),
            "{suite:04x}"
        );
    }
    for suite in [0xc02b_u16, 0xc02c, 0xcca9] {
        let mut io = lab.tcp().await;
        io.write_all(&agreeable(suite).bytes()).await.unwrap();
        let mut answer = [0; 80];
        timeout(PATIENCE, io.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!((answer[0], answer[5]), (22, 2), "{suite:04x}");
        // Behind version, random and session.
        let at = 11 + 32 + 1 + usize::from(answer[43]);
        assert_eq!(answer[at..at + 2], suite.to_be_bytes());
    }
}

#[tokio::test]
async fn pro_01_the_state_machine_is_not_led_astray() {
    let lab = Lab::and(HASTE).await;
    let hello = real_greeting(&lab, NAME);
    let record = |kind: u8, content: &[u8]| {
        let mut bytes = vec![kind, 3, 3];
        bytes.extend(u16::try_from(content.len()).unwrap().to_be_bytes());
        bytes.extend(content);
        bytes
    };
    // Behind a good greeting: everything that must not come there.
    let wrong = [
        record(23, b"GET / HTTP/1.1\r\n\r\n"),
        record(22, &[20, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        record(22, &hello[5..]),
        record(22, &[0, 0, 0, 0]),
        record(99, b"x"),
        record(22, &[]),
        vec![23, 3, 3, 0xff, 0xff],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        record(20, &[2]),
    ];
    for (n, wrong) in wrong.iter().enumerate() {
        let answer = exchange(&lab, &[&hello[..], wrong].concat()).await;
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(
            !text.contains("HTTP/1.1"),
            "{n}: a request without keys was answered"
        );
        // A server's greeting may come first; the end comes by an alert or the deadline.
        let first = answer.first().copied().unwrap_or(21);
        assert!((20..=22).contains(&first), "{n}: {first}");
    }
    // And the next one is served.
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
}

#[tokio::test]
async fn pro_07_nothing_is_resumed_and_nothing_comes_early() {
    let lab = Lab::and(ROOM).await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut config = (**lab.connector(&[version]).config()).clone();
        config.enable_early_data = true;
        let connector = TlsConnector::from(Arc::new(config));
        for turn in 0..3 {
            let name = ServerName::try_from(NAME).unwrap();
            let mut io = connector.connect(name, lab.tcp().await).await.unwrap();
            // What a client wants to send early is sent when keys are there.
            let request = format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
            assert_eq!(ask(&mut io, &request).await.status, 200);
            let session = io.get_ref().1;
            assert!(!session.is_early_data_accepted(), "{version:?} {turn}");
            assert_eq!(
                session
                    .handshake_kind()
                    .map(|k| k == HandshakeKind::Resumed),
                Some(false)
            );
            assert_eq!(session.tls13_tickets_received(), 0);
        }
    }
    // Early data that nobody agreed to.
    let hello = real_greeting(&lab, NAME);
    let mut early = hello.clone();
    early.extend([23, 3, 3, 0, 64]);
    early.extend([7; 64]);
    let mut io = lab.tcp().await;
    io.write_all(&early).await.unwrap();
    let answer = read_to_end(&mut io).await;
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP/1.1"));
}

#[tokio::test]
async fn pro_07_renegotiation_is_refused() {
    let lab = Lab::and(HASTE).await;
    let at = lab.at.to_string();
    let talk = tokio::task::spawn_blocking(move || {
        use std::io::Write;
        let mut openssl = std::process::Command::new("openssl")
            .args(["s_client", "-connect", &at, "-tls1_2", "-servername", NAME])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("openssl, which every test machine has");
        let mut to = openssl.stdin.take().unwrap();
        // A line with this letter alone begins another handshake.
        to.write_all(b"R\n").unwrap();
        to.flush().unwrap();
        let output = openssl.wait_with_output().unwrap();
        drop(to);
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&text).into_owned()
    });
    let text = timeout(PATIENCE, talk).await.expect("an end").unwrap();
    assert!(text.contains("RENEGOTIATING"), "{text}");
    assert!(
        text.contains("no renegotiation") || text.contains("alert"),
        "{text}"
    );
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
}
