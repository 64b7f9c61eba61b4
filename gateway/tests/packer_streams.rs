//! Visitors of older reverse tunnel clients: what passes, what ends, what
//! waits, and what must never happen.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod packer_support;

use std::time::{Duration, Instant};

use packer_support::go::{self, Client, connect, frame, raw};
use packer_support::visitor::{self, Device};
use packer_support::{Lab, OTHER, PATIENCE, SECRET, domains};
use rvpn_gateway::serve::Service::{Http, Https, Tcp};
use rvpn_gateway::serve::{OpenError, Stream, Visit};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

const HELLO: &[u8] = b"\x16\x03\x01\x00\x05hello";

/// A client of the first kind, which takes commands, with its greeting read.
async fn node_2017(lab: &Lab, name: &str) -> Client {
    let target = format!("/?access_token={}", domains(SECRET, &[name]));
    let mut client = connect(lab, &target, &[]).await.unwrap();
    let hello = client.command().await;
    assert_eq!(
        hello,
        json!([1, "hello", [1], ["add_token", "delete_token"]])
    );
    client
}

/// One of the last kind, logged in.
async fn node_2018(lab: &Lab, name: &str) -> Client {
    let mut client = go::stranger(lab).await;
    client.command().await;
    let token = domains(SECRET, &[name]);
    client.say(&json!([9, "add_token", token])).await;
    assert_eq!(client.command().await, json!([-9, null]));
    let grant = client.command().await;
    assert_eq!((&grant[0], &grant[1]), (&json!(2), &json!("grant")));
    assert!(
        grant[2]
            .as_array()
            .unwrap()
            .contains(&json!(["https", name]))
    );
    client
}

async fn read(stream: &mut Stream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    timeout(PATIENCE, stream.read_exact(&mut bytes))
        .await
        .unwrap()
        .unwrap();
    bytes
}

async fn read_all(stream: &mut Stream) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut bytes));
    read.await.expect("an end in time").map(|_| bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_03_an_https_visitor_sees_the_devices_own_certificate() {
    let lab = Lab::new().await;
    let device = Device::of("app.a.example");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    let acceptor = device.acceptor();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut tls = acceptor.accept(tcp).await.unwrap();
                let mut buf = vec![0; 1024];
                let n = tls.read(&mut buf).await.unwrap();
                tls.write_all(b"you said ").await.unwrap();
                tls.write_all(&buf[..n]).await.unwrap();
                tls.shutdown().await.unwrap();
            });
        }
    });
    for year in [2017, 2020] {
        let token = domains(SECRET, &["app.a.example"]);
        let client = match year {
            2017 => go::of_2017(&lab, &token).await,
            _ => go::of_2020(&lab, &token).await,
        };
        let task = tokio::spawn(client.serve(target));
        lab.served("app.a.example", Https).await;
        let mut tls = device
            .visit(visitor::connect(&lab).await, "app.a.example")
            .await;
        assert_eq!(visitor::ask(&mut tls, "hello").await, "you said hello");
        task.abort();
        lab.unserved("app.a.example", Https).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_frame_has_all_of_the_hello_and_five_or_seven_fields() {
    let lab = Lab::new().await;
    let mut first = vec![0x16];
    first.resize(20_000, 7);
    let mut five = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    let mut stream = lab
        .visit("a.example", Https, "[::ffff:203.0.113.9]:40000")
        .await;
    stream.write_all(&first).await.unwrap();
    let seen = five.next().await;
    assert_eq!(
        seen.fields,
        ["IPv4", "203.0.113.9", "40000", "20000", "https"]
    );
    assert_eq!(seen.body, first);
    drop((five, stream));
    lab.unserved("a.example", Https).await;

    let mut seven = go::of_2020(&lab, &domains(SECRET, &["a.example"])).await;
    let mut stream = lab.visit("a.example", Http, "[2001:db8::9]:40000").await;
    stream.write_all(&first).await.unwrap();
    let seen = seven.next().await;
    let expected = [
        "IPv6",
        "2001:db8::9",
        "40000",
        "20000",
        "http",
        "443",
        "a.example",
    ];
    assert_eq!(seen.fields, expected);
    drop((seven, stream));
    lab.unserved("a.example", Https).await;

    let mut last = node_2018(&lab, "a.example").await;
    let _stream = lab.visit("a.example", Https, "203.0.113.9:40000").await;
    let seen = last.next().await;
    let expected = [
        "IPv4",
        "203.0.113.9",
        "40000",
        "0",
        "connection",
        "443",
        "a.example",
        "https",
    ];
    assert_eq!(seen.fields, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_14_and_rev_08_two_visitors_of_one_address_are_two_streams() {
    let lab = Lab::new().await;
    let mut client = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    let peer = "203.0.113.9:40000";
    let mut streams = Vec::new();
    let mut ids = Vec::new();
    for n in 0..3_u8 {
        let mut stream = lab.visit("a.example", Https, peer).await;
        stream.write_all(&[0x16, n]).await.unwrap();
        let seen = client.next().await;
        assert_eq!(seen.body[1], n);
        ids.push(seen.id());
        streams.push(stream);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3, "{ids:?}");
    for (n, id) in ids.iter().enumerate() {
        client
            .send(frame(id, "https", format!("for {n}").as_bytes()))
            .await;
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        assert_eq!(read(stream, 5).await, format!("for {n}").as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_08_nobody_reaches_the_visitors_of_another_client() {
    let lab = Lab::new().await;
    let mut victim = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    let mut stream = lab.visit("a.example", Https, "203.0.113.9:40000").await;
    stream.write_all(HELLO).await.unwrap();
    let id = victim.next().await.id();

    let target = format!("/?access_token={}", domains(OTHER, &["b.example"]));
    let mut rogue = connect(&lab, &target, &[]).await.unwrap();
    rogue.command().await;
    rogue.send(frame(&id, "https", b"injected")).await;
    let answer = rogue.next().await;
    assert_eq!((answer.id(), answer.service()), (id.clone(), "error"));
    let error: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(error["code"], "E_NO_CONN");
    rogue.send(frame(&id, "end", b" ")).await;
    rogue.send(frame(&id, "pause", b"1")).await;
    for port in 0..100 {
        let id = format!("IPv4,203.0.113.9,{port}");
        rogue.try_send(frame(&id, "https", b"injected")).await;
    }
    assert_eq!(rogue.closed().await.0, 1008);

    victim.send(frame(&id, "https", b"good")).await;
    victim.send(frame(&id, "end", b"")).await;
    assert_eq!(read_all(&mut stream).await.unwrap(), b"good");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_may_come_in_any_portions() {
    let lab = Lab::new().await;
    let mut client = node_2018(&lab, "a.example").await;
    let mut stream = lab.visit("a.example", Https, "203.0.113.9:40000").await;
    let id = client.next().await.id();
    // Header and body apart, as this client sends them.
    client
        .send(raw(&format!("{id},5,https,443,a.example"), b""))
        .await;
    client.send(b"first".to_vec()).await;
    // Several at once, and one in pieces.
    let two = [
        frame(&id, "https", b"second"),
        frame(&id, "https", b"third"),
    ]
    .concat();
    client.send(two).await;
    for byte in raw(&format!("{id},6,https,443,a.example,\n"), b"fourth") {
        client.send(vec![byte]).await;
    }
    client.send(frame(&id, "end", b"")).await;
    assert_eq!(
        read_all(&mut stream).await.unwrap(),
        b"firstsecondthirdfourth"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_23_ends_are_told_both_ways() {
    let lab = Lab::new().await;
    let mut client = node_2017(&lab, "a.example").await;
    let begin = async |client: &mut Client, port: u16| {
        let peer = format!("203.0.113.9:{port}");
        let mut stream = lab.visit("a.example", Https, &peer).await;
        stream.write_all(HELLO).await.unwrap();
        (stream, client.next().await.id())
    };
    // The visitor ends in order, the client goes on and then ends as well.
    let (mut stream, id) = begin(&mut client, 1).await;
    stream.write_all(b"last").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(client.next().await.body, &b"last"[..]);
    let end = client.next().await;
    assert_eq!((end.service(), &end.body[..]), ("end", &b" "[..]));
    client.send(frame(&id, "https", b"answer")).await;
    client.send(frame(&id, "end", b" ")).await;
    assert_eq!(read_all(&mut stream).await.unwrap(), b"answer");
    drop(stream);
    // The visitor is cut off.
    let (stream, id) = begin(&mut client, 2).await;
    drop(stream);
    let error = client.next().await;
    assert_eq!((error.id(), error.service()), (id.clone(), "error"));
    // What was on its way to it is answered once.
    for _ in 0..3 {
        client.send(frame(&id, "https", b"late")).await;
    }
    let error = client.next().await;
    assert_eq!((error.id(), error.service()), (id, "error"));
    assert!(String::from_utf8_lossy(&error.body).contains("E_NO_CONN"));
    // The client ends first: what it said is read, what the visitor says is lost.
    let (mut stream, id) = begin(&mut client, 3).await;
    client.send(frame(&id, "https", b"all of it")).await;
    client.send(frame(&id, "end", b" ")).await;
    assert_eq!(read_all(&mut stream).await.unwrap(), b"all of it");
    stream.write_all(b"too late").await.unwrap();
    drop(stream);
    // The client cannot.
    let (mut stream, id) = begin(&mut client, 4).await;
    client.send(frame(&id, "https", b"some")).await;
    client
        .send(frame(&id, "error", br#"{"message":"no","code":"E"}"#))
        .await;
    let error = read_all(&mut stream).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // Nothing was said about the ones that the client ended.
    let (_stream, _) = begin(&mut client, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_client_refuses_the_greeting_and_is_kept() {
    let lab = Lab::new().await;
    let mut client = node_2017(&lab, "a.example").await;
    let refusal = br#"{"message":"unsupported service 'control'","code":"E"}"#;
    client.send(frame(",,", "error", refusal)).await;
    let mut stream = lab.visit("a.example", Https, "203.0.113.9:1").await;
    stream.write_all(HELLO).await.unwrap();
    assert_eq!(client.next().await.body, HELLO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_23_a_client_that_pauses_is_sent_nothing_until_it_resumes() {
    let lab = Lab::new().await;
    let mut client = node_2018(&lab, "a.example").await;
    let mut slow = lab.visit("a.example", Https, "203.0.113.9:1").await;
    let slow_id = client.next().await.id();
    let mut quick = lab.visit("a.example", Https, "203.0.113.9:2").await;
    let quick_id = client.next().await.id();
    client.send(frame(&slow_id, "pause", b"0")).await;
    // Answered, so the pause has been read.
    client.say(&json!([5, "hello"])).await;
    assert_eq!(client.command().await, json!([-5, null]));
    slow.write_all(b"waits").await.unwrap();
    quick.write_all(b"passes").await.unwrap();
    assert_eq!(client.next().await.id(), quick_id);
    let filling = async {
        loop {
            slow.write_all(&[0; 1024]).await.unwrap();
        }
    };
    // What waits is bounded: the visitor is not read from any more.
    assert!(timeout(Duration::from_millis(300), filling).await.is_err());
    quick.write_all(b"again").await.unwrap();
    assert_eq!(client.next().await.id(), quick_id);
    client.send(frame(&slow_id, "resume", b"0")).await;
    let seen = client.next().await;
    assert_eq!(seen.id(), slow_id);
    assert!(seen.body.starts_with(b"waits") && seen.body.len() <= 64 * 1024);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_23_a_slow_visitor_pauses_its_stream_and_no_other() {
    let lab = Lab::new().await;
    let mut client = node_2017(&lab, "a.example").await;
    let mut slow = lab.visit("a.example", Https, "203.0.113.9:1").await;
    slow.write_all(HELLO).await.unwrap();
    let slow_id = client.next().await.id();
    let mut quick = lab.visit("a.example", Https, "203.0.113.9:2").await;
    quick.write_all(HELLO).await.unwrap();
    let quick_id = client.next().await.id();
    let part = vec![1; 16 * 1024];
    for _ in 0..9 {
        client.send(frame(&slow_id, "https", &part)).await;
    }
    let pause = client.next().await;
    assert_eq!((pause.id(), pause.service()), (slow_id.clone(), "pause"));
    let read_so_far: usize = std::str::from_utf8(&pause.body).unwrap().parse().unwrap();
    assert_eq!(read_so_far, 9 * part.len());
    // What was on its way still finds room.
    for _ in 0..40 {
        client.send(frame(&slow_id, "https", &part)).await;
    }
    client.send(frame(&quick_id, "https", b"quick")).await;
    assert_eq!(read(&mut quick, 5).await, b"quick");
    read(&mut slow, 49 * part.len()).await;
    let resume = client.next().await;
    assert_eq!((resume.id(), resume.service()), (slow_id, "resume"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_13_a_visitor_who_never_reads_is_cut_off_and_its_tunnel_goes_on() {
    let lab = Lab::new().await;
    let mut client = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    let mut stuck = lab.visit("a.example", Https, "203.0.113.9:1").await;
    stuck.write_all(HELLO).await.unwrap();
    let stuck_id = client.next().await.id();
    let mut quick = lab.visit("a.example", Https, "203.0.113.9:2").await;
    quick.write_all(HELLO).await.unwrap();
    let quick_id = client.next().await.id();
    let part = vec![1; 32 * 1024];
    // More than there is room for, then something for the other one.
    for _ in 0..40 {
        client.send(frame(&stuck_id, "https", &part)).await;
    }
    client.send(frame(&quick_id, "https", b"quick")).await;
    let begun = Instant::now();
    assert_eq!(read(&mut quick, 5).await, b"quick");
    let waited = begun.elapsed();
    assert!(waited < Duration::from_secs(3), "{waited:?}");
    let error = client.next().await;
    assert_eq!((error.id(), error.service()), (stuck_id, "error"));
    let error = read_all(&mut stuck).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_end_their_own_client_with_a_reason() {
    let lab = Lab::new().await;
    let mut good = go::of_2017(&lab, &domains(OTHER, &["b.example"])).await;
    for (bytes, reason) in [
        (b"\xfdx".to_vec(), "not a frame of packer v1"),
        (
            raw("IPv4,1.2.3.4,80,x,https", b""),
            "a frame length that is not a number",
        ),
        (
            raw("IPv4,1.2.3.4", b""),
            "a frame header with too few fields",
        ),
        (
            raw("IPv4,1.2.3.4,80,0,\x01", b""),
            "a frame header that is not text",
        ),
        (raw(",,,999999,control", b""), "a frame that is too long"),
    ] {
        let mut client = node_2017(&lab, "a.example").await;
        lab.served("a.example", Https).await;
        client.send(bytes).await;
        assert_eq!(client.closed().await, (1008, reason.to_owned()));
        lab.unserved("a.example", Https).await;
    }
    let mut stream = lab.visit("b.example", Https, "203.0.113.9:1").await;
    stream.write_all(HELLO).await.unwrap();
    assert_eq!(good.next().await.body, HELLO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_10_a_client_that_goes_takes_its_visitors_and_names_at_once() {
    let lab = Lab::new().await;
    let mut client = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    let chosen = lab.served("a.example", Https).await;
    let mut stream = lab.visit("a.example", Https, "203.0.113.9:1").await;
    stream.write_all(HELLO).await.unwrap();
    client.next().await;
    drop(client);
    let error = read_all(&mut stream).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    lab.unserved("a.example", Https).await;
    let visit = Visit {
        peer: "203.0.113.9:1".parse().unwrap(),
        port: 443,
        name: None,
        service: Tcp,
    };
    let opened = chosen.server.carrier.open(visit).await;
    assert_eq!(opened.err(), Some(OpenError::Gone));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_14_a_tunnel_has_so_many_visitors_and_no_more() {
    let lab = Lab::new().await;
    let client = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    let chosen = lab.served("a.example", Https).await;
    let mut held = Vec::new();
    let mut refused = 0;
    for n in 0..4200_u32 {
        let visit = Visit {
            peer: std::net::SocketAddr::new([10, 0, 0, 1].into(), 1024 + n as u16),
            port: 443,
            name: None,
            service: Https,
        };
        match chosen.server.carrier.open(visit).await {
            Ok(stream) => held.push(stream),
            Err(OpenError::Full) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((held.len(), refused), (4096, 104));
    drop(held);
    drop(lab.visit("a.example", Https, "203.0.113.9:1").await);
    drop(client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_24_pings_are_answered_at_once_and_text_is_refused() {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;
    let lab = Lab::new().await;
    let mut client = go::of_2020(&lab, &domains(SECRET, &["a.example"])).await;
    let ping = Message::Ping(bytes::Bytes::from_static(b"are you there"));
    client.socket.send(ping).await.unwrap();
    let begun = Instant::now();
    let answer = timeout(PATIENCE, client.socket.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        answer.unwrap(),
        Message::Pong(bytes::Bytes::from_static(b"are you there"))
    );
    assert!(begun.elapsed() < Duration::from_secs(1));
    client.socket.send(Message::text("[1]")).await.unwrap();
    assert_eq!(client.closed().await.0, 1003);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_client_is_found_out_when_another_of_its_account_comes() {
    let lab = Lab::new().await;
    // Reads nothing, so that no ping is answered.
    let dead = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    lab.served("a.example", Https).await;
    let _next = go::of_2017(&lab, &domains(SECRET, &["a.example"])).await;
    lab.until(|| (lab.shared.hub.count() == 2).then_some(()))
        .await;
    let begun = Instant::now();
    lab.until(|| (lab.shared.hub.count() == 1).then_some(()))
        .await;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    drop(dead);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_13_the_wire_of_a_client_is_counted() {
    let lab = Lab::new().await;
    let mut client = node_2017(&lab, "a.example").await;
    let mut stream = lab.visit("a.example", Https, "203.0.113.9:1").await;
    stream.write_all(HELLO).await.unwrap();
    let id = client.next().await.id();
    client.send(frame(&id, "https", &[7; 10_000])).await;
    read(&mut stream, 10_000).await;
    let wire = lab.until(|| {
        let usage = lab.shared.meter.usage();
        let row = usage.into_iter().find(|(_, u)| u.service == "packer")?.1;
        assert_eq!(row.account, "legacy:old");
        let wire = (row.totals.outbound.wire, row.totals.inbound.wire);
        (wire.0 > 10_000).then_some(wire)
    });
    let (read, written) = wire.await;
    assert!(
        read < 12_000 && written > 100 && written < 2_000,
        "{read} {written}"
    );
}
