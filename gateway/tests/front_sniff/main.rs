//! What a connection is taken for, on the real port: by its bytes, and not by
//! how they come.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

#[path = "../front_support/mod.rs"]
mod front_support;
#[expect(dead_code, reason = "another test program uses the rest")]
#[path = "../../../proto/tests/greeting/mod.rs"]
mod greeting;
mod greetings;

use std::sync::Arc;
use std::time::{Duration, Instant};

use front_support::client::{read_reply, read_to_end};
use front_support::served::{Device, compare, serve, tls_device};
use front_support::trust::trusting;
use front_support::{Lab, NAME, PATIENCE, Setup};
use futures_util::future::join_all;
use greeting::{Greeting, records};
use rustls::pki_types::{CertificateDer, ServerName};
use rvpn_gateway::serve::table::Ending;
use rvpn_gateway::serve::{Service, Visit};
use rvpn_gateway::tls::Fingerprint;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

const DEVICE: &str = "app.example";
/// Many connections from one address, none of which waits long.
const ROOM: &str =
    "[limits]\npending-per-address = 8192\nlogin-seconds = 5\nlogin-failures = 100000\n";
const HASTE: &str = "[limits]\npending-per-address = 8192\nlogin-seconds = 1\n";

/// What an alert looks like on the wire.
fn alert(code: u8) -> Vec<u8> {
    vec![21, 3, 1, 0, 2, 2, code]
}

/// The greeting of a real client.
fn real_greeting(lab: &Lab, name: &str) -> Vec<u8> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let config = lab.connector(rustls::ALL_VERSIONS).config().clone();
    let mut bytes = Vec::new();
    let mut half = rustls::ClientConnection::new(config, name).unwrap();
    half.write_tls(&mut bytes).unwrap();
    bytes
}

/// A device that wants to see these bytes, and them only.
fn witness(lab: &Lab, bytes: &[u8]) -> Device {
    let expected = Arc::new(bytes.to_vec());
    serve(
        &lab.front.table,
        DEVICE,
        None,
        Ending::There,
        move |_, io| compare(io, Arc::clone(&expected)),
    )
}

/// Sends pieces, each in a segment of its own.
async fn drip(io: &mut TcpStream, pieces: impl Iterator<Item = &[u8]>) {
    io.set_nodelay(true).unwrap();
    for piece in pieces {
        // Whoever is refused early closes early.
        if io.write_all(piece).await.is_err() {
            return;
        }
        sleep(Duration::from_millis(1)).await;
    }
}

/// Sends these bytes and waits for the end of the answer.
async fn exchange(lab: &Lab, bytes: &[u8]) -> Vec<u8> {
    let mut io = lab.tcp().await;
    io.write_all(bytes).await.unwrap();
    read_to_end(&mut io).await
}

#[tokio::test]
async fn r_2_and_pro_02_a_greeting_in_any_segments_goes_to_the_same_device_untouched() {
    let lab = Lab::and(ROOM).await;
    let bytes = real_greeting(&lab, DEVICE);
    let device = witness(&lab, &bytes);
    let cuts = (1..bytes.len()).map(|cut| {
        let (lab, bytes) = (&lab, &bytes);
        async move {
            let mut io = lab.tcp().await;
            drip(&mut io, [&bytes[..cut], &bytes[cut..]].into_iter()).await;
            assert_eq!(read_to_end(&mut io).await, b"same", "cut at {cut}");
        }
    });
    // So many at once as one account may have.
    let mut cuts = cuts.collect::<Vec<_>>();
    while !cuts.is_empty() {
        let some = cuts.split_off(cuts.len().saturating_sub(400));
        join_all(some).await;
    }
    assert_eq!(device.visits(), bytes.len() - 1);
    let mut io = lab.tcp().await;
    drip(&mut io, bytes.chunks(1)).await;
    assert_eq!(read_to_end(&mut io).await, b"same", "byte by byte");
}

#[tokio::test]
async fn pro_02_a_greeting_in_any_records_is_routed_the_same() {
    let lab = Lab::and(ROOM).await;
    for (name, served) in [(DEVICE, true), (NAME, false)] {
        let whole = real_greeting(&lab, name);
        // Behind the header of its only record.
        let message = &whole[5..];
        let two = (1..message.len()).step_by(7).map(|cut| {
            let mut bytes = records(&message[..cut], usize::MAX);
            bytes.extend(records(&message[cut..], usize::MAX));
            bytes
        });
        let small = [1, 2, 3, 5, 64].map(|most| records(message, most));
        for bytes in two.chain(small) {
            if served {
                let _device = witness(&lab, &bytes);
                assert_eq!(exchange(&lab, &bytes).await, b"same");
            } else {
                // TLS ends here: the answer is a greeting too.
                let mut io = lab.tcp().await;
                io.write_all(&bytes).await.unwrap();
                let mut first = [0; 6];
                timeout(PATIENCE, io.read_exact(&mut first))
                    .await
                    .unwrap()
                    .unwrap();
                assert_eq!((first[0], first[5]), (22, 2), "{} records", bytes.len());
            }
        }
    }
    // As long as can be, and with many extensions.
    let long = Greeting::of(DEVICE.as_bytes()).long(16 * 1024).bytes();
    let mut many = Greeting::of(DEVICE.as_bytes());
    for n in 0..100 {
        many = many.with(0x5000 + n, vec![1]);
    }
    for bytes in [long, many.bytes()] {
        let _device = witness(&lab, &bytes);
        assert_eq!(exchange(&lab, &bytes).await, b"same");
    }
}

/// Beginnings of all protocols, and what is answered to each when nobody but
/// the gateway is there.
fn beginnings(lab: &Lab) -> Vec<(&'static str, Vec<u8>)> {
    let request = format!("GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\nX-Pad: ");
    vec![
        ("tls", real_greeting(lab, NAME)),
        ("http", [request.as_bytes(), &[b'x'; 80]].concat()),
        (
            "http2",
            [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0; 60]].concat(),
        ),
        ("ssh", [&b"SSH-2.0-OpenSSH_9.6 "[..], &[b'c'; 60]].concat()),
        ("ssl2", [&b"\x80\x2e\x01\x00\x02"[..], &[5; 60]].concat()),
        ("other", vec![b'#'; 64]),
        (
            "proxy",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 443\r\n123456789012345678901234567890".to_vec(),
        ),
        (
            "proxy2",
            [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &[1; 60]].concat(),
        ),
    ]
}

/// Descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn pro_03_an_end_at_any_byte_leaves_nothing_behind() {
    let lab = Lab::and(HASTE).await;
    let _device = tls_device(&lab.front.table, DEVICE);
    // Whatever is opened once is open now.
    let _warm = lab
        .request(&format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n"))
        .await;
    let before = settled(&lab, 0).await;
    for (what, bytes) in beginnings(&lab) {
        let ends = (0..=64_usize).flat_map(|end| [(end, true), (end, false)]);
        let all = ends.map(|(end, fin)| {
            let (lab, bytes) = (&lab, &bytes);
            async move {
                let mut io = lab.tcp().await;
                drip(&mut io, bytes[..end].chunks(1)).await;
                if fin {
                    drop(io.shutdown().await);
                    read_to_end(&mut io).await
                } else {
                    // Closing with linger zero resets.
                    io.set_zero_linger().unwrap();
                    Vec::new()
                }
            }
        });
        let answers = join_all(all).await;
        for (n, answer) in answers.iter().enumerate() {
            // A request that is not whole gets no page, and nobody gets a session.
            assert!(!answer.starts_with(b"HTTP/1.1 2"), "{what} {n}");
            assert!(!answer.starts_with(b"HTTP/1.1 1"), "{what} {n}");
        }
    }
    assert!(
        settled(&lab, before).await <= before,
        "descriptors are left"
    );
    assert_eq!(lab.echo.count(), 0);
}

/// Waits until no stranger is left and there are at most so many descriptors.
async fn settled(lab: &Lab, most: usize) -> usize {
    let start = Instant::now();
    loop {
        let now = descriptors();
        let quiet = lab.front.pending.count() == 0;
        if quiet && (most == 0 || now <= most) || start.elapsed() > PATIENCE {
            assert!(quiet, "{} strangers are left", lab.front.pending.count());
            return now;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn pro_03_byte_by_byte_or_at_once_the_answer_is_the_same() {
    let lab = Lab::and(ROOM).await;
    let kinds = beginnings(&lab);
    let both = kinds.iter().map(|(what, bytes)| {
        let lab = &lab;
        async move {
            let at_once = exchange(lab, bytes).await;
            let mut io = lab.tcp().await;
            drip(&mut io, bytes.chunks(1)).await;
            (*what, at_once, read_to_end(&mut io).await)
        }
    });
    for (what, at_once, dripped) in join_all(both).await {
        // What TLS says is random; that it is said is not.
        let same = |answer: &[u8]| answer.get(..6).map(<[u8]>::to_vec);
        assert_eq!(same(&dripped), same(&at_once), "{what}");
        match what {
            "tls" => assert_eq!(at_once[..3], [22, 3, 3]),
            "http" => assert!(at_once.starts_with(b"HTTP/1.1 408"), "half a request"),
            "http2" => assert!(at_once.ends_with(&[0, 0, 0, 13]), "{at_once:?}"),
            "ssl2" => assert_eq!(at_once, alert(70)),
            _ => assert!(at_once.is_empty(), "{what}: {at_once:?}"),
        }
    }
}

#[tokio::test]
async fn pro_03_whoever_does_not_say_what_it_is_goes_in_time() {
    let lab = Lab::and(HASTE).await;
    let start = Instant::now();
    let greeting = real_greeting(&lab, NAME);
    let waiting = [
        &b""[..],
        b"\x16",
        b"GE",
        b"SSH",
        b"PRI",
        b"\x80\x2e",
        &greeting[..40],
        &greeting[..greeting.len() - 1],
    ];
    let all = waiting.map(|bytes| exchange(&lab, bytes));
    for answer in join_all(all).await {
        assert!(answer.is_empty(), "{answer:?}");
    }
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
}

/// A client that believes this certificate only.
fn believing(certificate: &CertificateDer<'static>) -> TlsConnector {
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

#[tokio::test]
async fn r_3_the_devices_own_certificate_is_what_a_visitor_sees() {
    let lab = Lab::and(ROOM).await;
    let (device, certificate) = tls_device(&lab.front.table, DEVICE);
    let name = ServerName::try_from(DEVICE).unwrap();
    let mut io = believing(&certificate)
        .connect(name, lab.tcp().await)
        .await
        .unwrap();
    io.write_all(b"hello").await.unwrap();
    let mut answer = vec![0; DEVICE.len() + 7];
    timeout(PATIENCE, io.read_exact(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(answer, b"app.example: hello");
    assert_eq!(device.visits(), 1);
    // With the device gone the name is nobody's: the gateway answers for itself.
    drop((io, device));
    let mut roots = lab.tcp().await;
    let name = ServerName::try_from(DEVICE).unwrap();
    let gone = believing(&certificate).connect(name, &mut roots).await;
    assert!(gone.is_err(), "nobody else has the device's certificate");
}

#[tokio::test]
async fn r_3_tls_ends_here_for_a_name_that_wants_it_with_its_own_certificate() {
    let lab = Lab::and(ROOM).await;
    let _device = serve(
        &lab.front.table,
        "soft.example",
        Some(Service::Http),
        Ending::Here,
        |_, _| async {},
    );
    let _there = serve(
        &lab.front.table,
        "plain.example",
        Some(Service::Http),
        Ending::There,
        |_, _| async {},
    );
    for name in ["soft.example", "plain.example"] {
        let mut seen = Vec::new();
        for _ in 0..2 {
            let (made, io) = any(&lab, name).await;
            seen.push(made);
            drop(io);
        }
        assert_eq!(seen[0], seen[1], "it is kept");
        let (_, own) = (0, lab.front.tls.fingerprint());
        assert_ne!(Fingerprint::of(&seen[0]), own);
    }
    // A name that nobody serves is shown the gateway's own.
    let (shown, _io) = any(&lab, "other.example").await;
    assert_eq!(Fingerprint::of(&shown), lab.front.tls.fingerprint());
    // One that was put there goes before both, and is gone when it is taken away.
    let made = rcgen::generate_simple_self_signed(vec!["soft.example".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let put = rvpn_gateway::tls::certified(vec![made.cert.der().clone()], key).unwrap();
    let name = rvpn_proto::name::Name::parse("soft.example").unwrap();
    let until = std::time::SystemTime::now() + Duration::from_secs(60);
    lab.front.tls.put(name.clone(), put, until);
    assert_eq!(any(&lab, "soft.example").await.0, *made.cert.der());
    assert!(lab.front.tls.remove(&name));
    assert_ne!(any(&lab, "soft.example").await.0, *made.cert.der());
}

#[tokio::test]
async fn an_authority_that_checks_a_name_sees_the_challenge_and_nothing_else() {
    let lab = Lab::and(ROOM).await;
    let (device, _) = tls_device(&lab.front.table, DEVICE);
    let made = rcgen::generate_simple_self_signed(vec!["own.example".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let put = rvpn_gateway::tls::certified(vec![made.cert.der().clone()], key).unwrap();
    let name = rvpn_proto::name::Name::parse("own.example").unwrap();
    lab.front.tls.challenge(name.clone(), put);
    let (shown, mut io) = offering(&lab, "own.example", b"acme-tls/1").await.unwrap();
    assert_eq!(shown, *made.cert.der());
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"acme-tls/1"[..]));
    assert!(read_to_end(&mut io).await.is_empty());
    // Others see what they always see.
    assert_ne!(any(&lab, "own.example").await.0, *made.cert.der());
    lab.front.tls.end_challenge(&name);
    assert!(offering(&lab, "own.example", b"acme-tls/1").await.is_err());
    // A device answers for its own name.
    drop(offering(&lab, DEVICE, b"acme-tls/1").await);
    assert_eq!(device.visits(), 1);
}

type Shown = (
    CertificateDer<'static>,
    tokio_rustls::client::TlsStream<TcpStream>,
);

async fn any(lab: &Lab, name: &str) -> Shown {
    offering(lab, name, b"http/1.1").await.unwrap()
}

/// Connects believing anybody, as far as signatures are right.
async fn offering(lab: &Lab, name: &str, protocol: &[u8]) -> std::io::Result<Shown> {
    let mut config = (**trusting().config()).clone();
    config.alpn_protocols = vec![protocol.to_vec()];
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let io = TlsConnector::from(Arc::new(config))
        .connect(name, lab.tcp().await)
        .await?;
    let shown = io.get_ref().1.peer_certificates().unwrap()[0].clone();
    Ok((shown, io))
}

/// Greets first, then repeats.
async fn speaks_first(visit: Visit, mut io: tokio::io::DuplexStream) {
    let line = format!("220 {} on {}\r\n", visit.service, visit.port != 0);
    drop(io.write_all(line.as_bytes()).await);
    let mut bytes = [0; 64];
    while let Ok(n @ 1..) = io.read(&mut bytes).await {
        if io.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn r_26_ssh_and_unknown_protocols_go_where_the_configuration_says() {
    let lab = Lab::and(format!(
        "{ROOM}[front]\ndefault-service = \"box.example\"\nssh = \"shell.example\"\nsilent = \"mail.example\"\n"
    ))
    .await;
    let table = &lab.front.table;
    let ssh = serve(
        table,
        "shell.example",
        Some(Service::Ssh),
        Ending::There,
        speaks_first,
    );
    let other = serve(
        table,
        "box.example",
        Some(Service::Tcp),
        Ending::There,
        speaks_first,
    );
    let silent = serve(table, "mail.example", None, Ending::There, speaks_first);
    for (sent, greeted) in [
        (&b"SSH-2.0-x\r\n"[..], "220 ssh on true\r\n"),
        (b"\0\x01binary", "220 tcp on true\r\n"),
        (b"", "220 tcp on true\r\n"),
    ] {
        let mut io = lab.tcp().await;
        io.write_all(sent).await.unwrap();
        eprintln!("{sent:?}");
        let mut answer = vec![0; greeted.len() + sent.len()];
        timeout(PATIENCE, io.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer, [greeted.as_bytes(), sent].concat());
    }
    assert_eq!((ssh.visits(), other.visits(), silent.visits()), (1, 1, 1));
    // HTTP and TLS are never theirs, however slowly they begin.
    let mut io = lab.tcp().await;
    let request = format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    drip(&mut io, request.as_bytes().chunks(1)).await;
    assert_eq!(read_reply(&mut io).await.status, 200);
    // Nobody there: closed, and nobody else is asked.
    drop(ssh);
    assert!(exchange(&lab, b"SSH-2.0-x\r\n").await.is_empty());
    assert_eq!((other.visits(), silent.visits()), (1, 1));
}

#[tokio::test]
async fn r_26_ssh_inside_tls_goes_to_the_client_in_whose_place_tls_ends() {
    let lab = Lab::and(ROOM).await;
    let table = &lab.front.table;
    let device = serve(table, "soft.example", None, Ending::Here, speaks_first);
    for (sent, greeted) in [
        (&b"SSH-2.0-x\r\n"[..], "220 ssh on true\r\n"),
        (b"\0binary", "220 tcp on true\r\n"),
    ] {
        let (_, mut io) = any(&lab, "soft.example").await;
        io.write_all(sent).await.unwrap();
        let mut answer = vec![0; greeted.len() + sent.len()];
        let read = timeout(PATIENCE, io.read_exact(&mut answer)).await;
        read.unwrap().unwrap();
        assert_eq!(answer, [greeted.as_bytes(), sent].concat());
    }
    assert_eq!(device.visits(), 2);
    // Not for the gateway's own name: there it is HTTP or nothing.
    let (_, mut io) = any(&lab, NAME).await;
    io.write_all(b"SSH-2.0-x\r\n\r\n").await.unwrap();
    let answer = read_to_end(&mut io).await;
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"),
        "{answer:?}"
    );
    assert_eq!(device.visits(), 2);
}

#[tokio::test]
async fn a_listener_for_one_protocol_refuses_the_others() {
    let tls = Lab::with(Setup {
        listener: "mode = \"tls\"\n",
        more: HASTE.into(),
    })
    .await;
    for odd in [
        &b"GET / HTTP/1.1\r\nHost: vpn.test\r\n\r\n"[..],
        b"SSH-2.0-x\r\n",
        b"#",
    ] {
        assert_eq!(exchange(&tls, odd).await, alert(10), "{odd:?}");
    }
    assert_eq!(tls.try_token(&tls.ops.good()).await, 101);
    let plain = Lab::with(Setup {
        listener: "mode = \"plain\"\n",
        more: HASTE.into(),
    })
    .await;
    let (device, _) = tls_device(&plain.front.table, DEVICE);
    let answer = exchange(&plain, &real_greeting(&plain, DEVICE)).await;
    assert!(!answer.starts_with(&[22]), "{answer:?}");
    assert_eq!(device.visits(), 0);
}
