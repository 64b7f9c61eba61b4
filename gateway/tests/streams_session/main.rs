//! Clients that serve, from hello to goodbye, and what hostile ones get.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod oracle;
#[path = "../session_support/mod.rs"]
mod session_support;

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use rvpn_gateway::admit::{Admission, Kind, Via};
use rvpn_gateway::auth::rights::Rights;
use rvpn_gateway::serve::table::Found;
use rvpn_gateway::serve::{Carrier, OpenError, Service, Stream, Visit};
use rvpn_proto::control::Stage;
use rvpn_proto::streams::mux::{Handle, Limits, Mux, Side};
use rvpn_proto::streams::{
    Hello, MAX_RECEIVED, Message, Offered, Opening, STREAMS, Serve, Serving, Status, Turned,
    Welcome,
};
use session_support::fake_helper::PATIENCE;
use session_support::lab::Lab;
use session_support::wire::Client;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message as Frame;

fn guest(lab: &Lab, account: &str, names: &[&str]) -> Admission {
    let rights = Rights {
        names: names.iter().map(|n| n.parse().unwrap()).collect(),
        ports: vec![15432],
        home: None,
    };
    let via = Via {
        host: "vpn.test".to_owned(),
        port: 8443,
        tls: true,
    };
    Admission {
        account: account.into(),
        kind: Kind::Streams(Arc::new(via)),
        rights: Arc::new(rights),
        ..lab.guest()
    }
}

fn hello(instance: &str) -> Hello {
    Hello {
        versions: vec![1],
        name: "test".to_owned(),
        instance: instance.to_owned(),
        keepalive_s: None,
    }
}

async fn say(client: &mut Client, message: &Message) {
    let text = message.to_text(Stage::Session).unwrap();
    client.send(Frame::text(text)).await;
}

async fn hear(client: &mut Client) -> Message {
    Message::parse(&client.text().await, Stage::Session).unwrap()
}

async fn join(lab: &Lab, guest: Admission, instance: &str) -> (Client, Welcome) {
    let mut client = lab.admit(guest).await;
    say(&mut client, &Message::Hello(hello(instance))).await;
    match hear(&mut client).await {
        Message::Welcome(welcome) => (client, welcome),
        other => panic!("{other:?} in place of a welcome"),
    }
}

fn wish(id: u32, service: Offered, name: Option<&str>) -> Message {
    Message::Serve(Serve {
        id,
        service,
        name: name.map(str::to_owned),
        port: None,
        ending: None,
    })
}

async fn serve(client: &mut Client, id: u32, service: Offered, name: Option<&str>) -> Serving {
    say(client, &wish(id, service, name)).await;
    match hear(client).await {
        Message::Serving(serving) => serving,
        other => panic!("{other:?} in place of being served"),
    }
}

async fn refused(client: &mut Client, message: Message) -> Turned {
    say(client, &message).await;
    match hear(client).await {
        Message::Refused(turned) => turned,
        other => panic!("{other:?} in place of a refusal"),
    }
}

fn carrier(lab: &Lab, name: &str) -> Option<Arc<dyn Carrier>> {
    let name = name.parse().unwrap();
    let peer = "192.0.2.1:1".parse().unwrap();
    match lab.shared.table.find(&name, Service::Https, peer) {
        Found::Served(chosen) => Some(chosen.server.carrier),
        Found::Nobody => None,
    }
}

fn visit(name: &str) -> Visit {
    Visit {
        peer: "198.51.100.7:4711".parse().unwrap(),
        port: 443,
        name: Some(name.parse().unwrap()),
        service: Service::Https,
    }
}

/// The client's end of the streams of one connection, by hand.
struct Ends {
    client: Client,
    mux: Mux,
}

impl Ends {
    fn of(client: Client) -> Ends {
        let limits = Limits {
            accepted: STREAMS,
            ..Limits::default()
        };
        Ends {
            client,
            mux: Mux::new(Side::Client, limits),
        }
    }

    /// Sends what there is to send.
    async fn send(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        let mut out = Vec::new();
        while self.mux.poll_send(&mut cx, &mut out, 65_536).is_ready() {
            self.client.send(std::mem::take(&mut out)).await;
        }
    }

    /// The next stream.
    async fn accept(&mut self) -> Handle {
        loop {
            let mut cx = Context::from_waker(Waker::noop());
            if let Poll::Ready(Some(handle)) = self.mux.poll_accept(&mut cx) {
                return handle;
            }
            self.take().await;
        }
    }

    async fn take(&mut self) {
        self.send().await;
        if let Frame::Binary(data) = self.client.next().await {
            self.mux.receive(&data).unwrap();
        }
        self.send().await;
    }

    async fn read(&mut self, handle: &mut Handle, bytes: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < bytes {
            let mut cx = Context::from_waker(Waker::noop());
            let mut buffer = vec![0; bytes - got.len()];
            match handle.poll_read(&mut cx, &mut buffer) {
                Poll::Ready(n) => match n.unwrap() {
                    0 => return got,
                    n => got.extend_from_slice(&buffer[..n]),
                },
                Poll::Pending => self.take().await,
            }
        }
        got
    }

    async fn write(&mut self, handle: &mut Handle, bytes: &[u8]) {
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(
            handle.poll_write(&mut cx, bytes),
            Poll::Ready(Ok(bytes.len()))
        );
        self.send().await;
    }

    /// Who a stream is for, accepted.
    async fn opening(&mut self, handle: &mut Handle, status: Status) -> Opening {
        let prefix = self.read(handle, 2).await;
        let length = Opening::length([prefix[0], prefix[1]]).unwrap();
        let text = self.read(handle, length).await;
        self.write(handle, &[status as u8]).await;
        Opening::read(&text).unwrap()
    }

    /// A visitor of this name, let in.
    async fn visitor(&mut self, lab: &Lab, name: &str) -> (Stream, Handle) {
        let opening = tokio::spawn(carrier(lab, name).unwrap().open(visit(name)));
        let mut handle = self.accept().await;
        self.opening(&mut handle, Status::Accepted).await;
        let stream = timeout(PATIENCE, opening).await.unwrap().unwrap().unwrap();
        (stream, handle)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_is_described_and_its_bytes_go_both_ways() {
    let lab = Lab::new(1).await;
    let (mut client, welcome) = join(&lab, guest(&lab, "alice", &["a.ex", "*.a.ex"]), "x").await;
    assert_eq!((welcome.version, welcome.names.len()), (1, 2));
    assert_eq!(welcome.ports, [15432]);
    let serving = serve(&mut client, 7, Offered::Tls, Some("app")).await;
    assert_eq!(serving.at.name.as_deref(), Some("app.a.ex"));
    assert_eq!(serving.at.urls, ["https://app.a.ex:8443"]);
    // No lease, and still a session like any other.
    let card = lab.shared.hub.cards().remove(0);
    assert_eq!((card.service, card.slot), ("streams", None));

    let mut ends = Ends::of(client);
    let opening = tokio::spawn(carrier(&lab, "app.a.ex").unwrap().open(visit("app.a.ex")));
    let mut handle = ends.accept().await;
    let Opening::Visit(told) = ends.opening(&mut handle, Status::Accepted).await;
    assert_eq!((told.offer, told.port), (7, 443));
    assert_eq!(told.peer.to_string(), "198.51.100.7:4711");
    assert_eq!(told.name.as_deref(), Some("app.a.ex"));
    let mut stream = opening.await.unwrap().unwrap();
    // The server may speak first.
    ends.write(&mut handle, b"220 ready").await;
    let mut first = [0; 9];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"220 ready");
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(ends.read(&mut handle, 99).await, b"question");
    ends.write(&mut handle, b"answer").await;
    handle.finish().unwrap();
    drop(handle);
    ends.send().await;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"answer");
    drop(stream);
    // Those who ask are told how many there were.
    loop {
        match hear(&mut ends.client).await {
            Message::Counts(counts) if counts.open == 0 => {
                assert_eq!((counts.total, counts.turned_away), (1, 0));
                break;
            }
            Message::Counts(_) => {}
            other => panic!("{other:?}"),
        }
    }
    // What was cut off there is cut off here.
    let (mut stream, handle) = ends.visitor(&lab, "app.a.ex").await;
    drop(handle);
    ends.send().await;
    let cut = stream.read(&mut [0; 9]).await.unwrap_err();
    assert_eq!(cut.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_a_reason_and_a_remedy() {
    let lab = Lab::new(1).await;
    let (mut bob, _) = join(&lab, guest(&lab, "bob", &["b.ex", "shared.ex"]), "x").await;
    serve(&mut bob, 1, Offered::Tls, Some("shared.ex")).await;
    let (mut client, _) = join(&lab, guest(&lab, "alice", &["a.ex", "shared.ex"]), "x").await;
    for (name, code) in [
        ("b.ex", "claim"),
        ("*.a.ex", "claim"),
        ("a b", "name"),
        ("shared.ex", "taken"),
    ] {
        let turned = refused(&mut client, wish(3, Offered::Tls, Some(name))).await;
        assert_eq!((turned.id, turned.code.as_str()), (3, code), "{turned:?}");
        assert!(
            !turned.text.is_empty() && !turned.remedy.is_empty(),
            "{turned:?}"
        );
    }
    let port = |port| {
        Message::Serve(Serve {
            id: 4,
            service: Offered::Tcp,
            name: None,
            port: Some(port),
            ending: None,
        })
    };
    for wrong in [22, 443, 65_535] {
        let turned = refused(&mut client, port(wrong)).await;
        assert_eq!(turned.code, "port");
        assert!(turned.remedy.contains("15432"), "{turned:?}");
    }
    // Nothing of this serves, and the connection goes on.
    assert!(carrier(&lab, "b.ex").is_none() && carrier(&lab, "a.ex").is_none());
    serve(&mut client, 1, Offered::Tls, Some("a.ex")).await;
    assert!(carrier(&lab, "a.ex").is_some());
    say(
        &mut client,
        &Message::Withdraw(rvpn_proto::streams::Withdraw { id: 1 }),
    )
    .await;
    serve(&mut client, 2, Offered::Http, Some("a")).await;
    assert!(carrier(&lab, "a.ex").is_none());
    client.send(Frame::text(r#"{"kind":"dance"}"#)).await;
    assert!(matches!(hear(&mut client).await, Message::Error(e) if e.code == "unknown-kind"));
}

#[tokio::test(flavor = "multi_thread")]
async fn rev_08_a_rogue_ends_its_own_connection_and_touches_nobody_else() {
    let lab = Lab::new(1).await;
    let (mut bob, _) = join(&lab, guest(&lab, "bob", &["b.ex"]), "x").await;
    serve(&mut bob, 1, Offered::Tls, None).await;
    let mut bob = Ends::of(bob);
    let (mut bobs, mut handle) = bob.visitor(&lab, "b.ex").await;
    let data = |id: u32, flags: u8, body: &[u8]| {
        let mut frame = vec![0, 0, 0, flags];
        frame.extend_from_slice(&id.to_be_bytes());
        frame.extend_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
        frame.extend_from_slice(body);
        frame
    };
    // Alice has stream 2, as bob has, and 4 that is over. What it sends to
    // others, of its own or of bob's, is the end of it.
    for (rogue, why) in [
        (data(6, 0, b"stolen"), "never given"),
        (data(4, 0, b"stolen"), "ended by itself"),
        (data(1, 1, b"stolen"), "opened by itself"),
        (data(0, 0, b"stolen"), "no stream"),
        (data(2, 0, &vec![0; 60_000]).repeat(5), "beyond its window"),
        (vec![9; 24], "no frame"),
    ] {
        let (mut alice, _) = join(&lab, guest(&lab, "alice", &["a.ex"]), "x").await;
        serve(&mut alice, 1, Offered::Tls, None).await;
        let mut alice = Ends::of(alice);
        let (mut own, _handle) = alice.visitor(&lab, "a.ex").await;
        let (over, mut done) = alice.visitor(&lab, "a.ex").await;
        done.finish().unwrap();
        drop(over);
        alice.send().await;
        // The gateway says that it cut the stream off; alice has ended it too.
        let sent = rogue.chunks(60_012);
        for message in sent {
            alice.client.send(message.to_vec()).await;
        }
        assert_eq!(alice.client.close_frame().await.0, 1008, "{why}");
        let cut = timeout(PATIENCE, own.read(&mut [0; 300_000]))
            .await
            .unwrap();
        match cut {
            Ok(n) => assert!(n <= 256 * 1024 && why == "beyond its window", "{why}: {n}"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted, "{why}"),
        }
        assert!(carrier(&lab, "a.ex").is_none(), "{why}");
    }
    // Not one byte of it came to bob's visitor.
    bob.write(&mut handle, b"bob's own").await;
    let mut got = [0; 9];
    bobs.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"bob's own");
}

#[tokio::test(flavor = "multi_thread")]
async fn rev_14_visitors_of_one_client_are_capped_and_cost_little() {
    let lab = Lab::new(1).await;
    let (mut client, _) = join(&lab, guest(&lab, "alice", &["a.ex"]), "x").await;
    serve(&mut client, 1, Offered::Tls, None).await;
    let carrier = carrier(&lab, "a.ex").unwrap();
    let mut waiting = Vec::new();
    let (mut full, begun) = (0, Instant::now());
    for _ in 0..20_000 {
        let mut opening = carrier.open(visit("a.ex"));
        let mut cx = Context::from_waker(Waker::noop());
        match opening.as_mut().poll(&mut cx) {
            Poll::Ready(Err(OpenError::Full)) => full += 1,
            Poll::Ready(other) => panic!("{:?}", other.map(|_| "a stream")),
            Poll::Pending => waiting.push(opening),
        }
    }
    assert_eq!((waiting.len(), full), (STREAMS, 20_000 - STREAMS));
    assert!(begun.elapsed() < PATIENCE);
    // When they give up there is room again.
    waiting.clear();
    assert!(lab.shared.hub.count() == 1);
    let mut ends = Ends::of(client);
    for _ in 0..3 {
        ends.take().await;
    }
    let mut opening = carrier.open(visit("a.ex"));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(opening.as_mut().poll(&mut cx).is_pending());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_turns_a_visitor_away_or_says_nothing() {
    let lab = Lab::new(1).await;
    let (mut client, _) = join(&lab, guest(&lab, "alice", &["a.ex"]), "x").await;
    serve(&mut client, 1, Offered::Tls, None).await;
    let mut ends = Ends::of(client);
    for status in [Status::Refused, Status::Unreachable] {
        let opening = tokio::spawn(carrier(&lab, "a.ex").unwrap().open(visit("a.ex")));
        let mut handle = ends.accept().await;
        ends.opening(&mut handle, status).await;
        let opened = opening.await.unwrap();
        assert_eq!(opened.map(|_| ()).unwrap_err(), OpenError::Refused);
    }
    // Not something that is offered at all.
    let other = Visit {
        service: Service::Ssh,
        ..visit("a.ex")
    };
    let opened = carrier(&lab, "a.ex").unwrap().open(other).await;
    assert_eq!(opened.map(|_| ()).unwrap_err(), OpenError::Refused);
    // Asked whether it is there, one that is silent has two seconds.
    let carrier = carrier(&lab, "a.ex").unwrap();
    let opening = tokio::spawn(carrier.open(visit("a.ex")));
    let begun = Instant::now();
    carrier.probe();
    let opened = timeout(PATIENCE, opening).await.unwrap().unwrap();
    assert_eq!(opened.map(|_| ()).unwrap_err(), OpenError::Gone);
    let took = begun.elapsed();
    assert!(
        took > Duration::from_millis(1500) && took < Duration::from_secs(4),
        "{took:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_serve_end_like_others() {
    let lab = Lab::new(1).await;
    let admit = |account: &'static str| {
        let lab = &lab;
        async move {
            let (mut client, _) = join(lab, guest(lab, account, &["a.ex"]), account).await;
            serve(&mut client, 1, Offered::Tls, None).await;
            client
        }
    };
    // Kicked.
    let mut client = admit("alice").await;
    assert!(lab.shared.kick(lab.only_session()));
    assert_eq!(client.close_frame().await.0, 1008);
    // Gone from the table before it is told.
    assert!(carrier(&lab, "a.ex").is_none());
    // The token's end.
    let soon = Admission {
        expires_at: Some(SystemTime::now() + Duration::from_millis(300)),
        ..guest(&lab, "alice", &["a.ex"])
    };
    let (mut client, _) = join(&lab, soon, "x").await;
    assert_eq!(
        client.close_frame().await,
        (1008, "the token has expired".to_owned())
    );
    // Revoked: within two seconds.
    let mut client = admit("alice").await;
    let begun = Instant::now();
    lab.revoke.send_replace(true);
    assert_eq!(client.close_frame().await.0, 1008);
    assert!(begun.elapsed() < Duration::from_secs(2));
    lab.revoke.send_replace(false);
    // Data before the hello, a message too long, a flood.
    let mut client = lab.admit(guest(&lab, "alice", &["a.ex"])).await;
    client.send(vec![0; 12]).await;
    assert_eq!(client.close_frame().await.0, 1008);
    let mut client = admit("alice").await;
    client.send(vec![0; MAX_RECEIVED + 1]).await;
    assert_eq!(client.close_frame().await.0, 1009);
    let mut client = admit("alice").await;
    for _ in 0..1000 {
        if futures_util::SinkExt::send(
            &mut client.socket,
            Frame::text(r#"{"kind":"counts","open":0,"total":0,"turned_away":0}"#),
        )
        .await
        .is_err()
        {
            break;
        }
    }
    assert_eq!(client.close_frame().await.0, 1008);
    // Drained: come back, and when.
    let mut client = admit("alice").await;
    let shared = Arc::clone(&lab.shared);
    let drained = tokio::spawn(async move { shared.drain(PATIENCE).await });
    match hear(&mut client).await {
        Message::Goodbye(goodbye) => {
            assert_eq!(goodbye.code, 1012);
            assert!(goodbye.retry_after_ms.is_some_and(|ms| ms < 10_000));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(client.close_frame().await.0, 1012);
    drop(client);
    assert_eq!(drained.await.unwrap(), 0);
    let mut late = lab.admit(guest(&lab, "alice", &["a.ex"])).await;
    say(&mut late, &Message::Hello(hello("x"))).await;
    assert_eq!(late.close_frame().await.0, 1012);
}

#[tokio::test(flavor = "multi_thread")]
async fn rev_15_the_same_instance_takes_over_at_once() {
    let lab = Lab::new(1).await;
    let (mut old, _) = join(&lab, guest(&lab, "alice", &["a.ex"]), "x").await;
    serve(&mut old, 1, Offered::Tls, None).await;
    // The old connection is half open: nobody reads it any more.
    let begun = Instant::now();
    let (mut new, _) = join(&lab, guest(&lab, "alice", &["a.ex"]), "x").await;
    serve(&mut new, 1, Offered::Tls, None).await;
    let mut ends = Ends::of(new);
    let (mut stream, mut handle) = ends.visitor(&lab, "a.ex").await;
    ends.write(&mut handle, b"new").await;
    let mut got = [0; 3];
    stream.read_exact(&mut got).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(
        old.close_frame().await,
        (1000, "continued elsewhere".to_owned())
    );
}
