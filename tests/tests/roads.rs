//! Sessions over bad roads, and the road itself.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rvpn_lab::probe::Canary;
use rvpn_lab::relay::Relay;
use rvpn_lab::scene::{Scene, round_trip};
use rvpn_lab::topology::{NB4, UP4, at};
use rvpn_lab::tunnel_client::{DIALECTS, Login, Session, Speech, Target, on};
use rvpn_lab::{Lab, wait_until};
use rvpn_proto::control::PATH;

const NATIVE: Speech = Speech::Native { offload: true };

fn address(text: &str, port: u16) -> SocketAddr {
    at(text, port).parse().expect("an address")
}

/// Logs in again with what the session before was given.
async fn resume(target: &Target, token: &str, before: &Session) -> Session {
    let ticket = before.welcome.as_ref().and_then(|w| w.ticket.clone());
    let login = Login {
        ticket: Some(ticket.expect("a ticket").ticket),
        ..Login::default()
    };
    Session::try_open(target, NATIVE, PATH, Some(token), login)
        .await
        .expect("let in again")
}

#[test]
fn a_session_over_a_long_road_resumes_on_its_lease_after_a_cut() {
    let scene = Scene::new("linger = 60\n", DIALECTS);
    let servers = scene.servers();
    let relay = Relay::new(
        &scene.lab.nb,
        address(NB4, 443),
        &scene.lab.nb,
        scene.gateway.address(),
        1,
    );
    let delay = Duration::from_millis(100);
    relay.delay(delay);
    let road = scene.target.clone().via(relay.at);
    on(&scene.phone, async || {
        let token = scene.gateway.token("alice");
        let mut first = Session::open(&road, NATIVE, &token).await;
        let begun = Instant::now();
        first.ping(UP4, 1, 1).await;
        assert!(begun.elapsed() >= 2 * delay, "not over the relay");
        let (_, from4) = round_trip(&mut first, &servers[0], 4000).await;
        let (_, from6) = round_trip(&mut first, &servers[1], 4000).await;
        let lease = scene.row("alice")["addresses"].clone();

        // The connection breaks, both ends hear of it, and the lease waits.
        relay.cut();
        assert_eq!(first.rx.closed().await.code, 1006);
        scene.deserted();
        let mut second = resume(&road, &token, &first).await;
        let welcome = second.welcome.as_ref().expect("a welcome");
        assert!(welcome.resumed);
        assert_eq!((second.v4, second.v6), (first.v4, first.v6));
        assert_eq!(scene.row("alice")["addresses"], lease);
        // What the internet began before the cut still finds the client.
        for (server, from) in servers.iter().zip([from4, from6]) {
            let canary = Canary::new();
            server.send_to(&canary.0, from).expect("send");
            assert!(second.rx.packet().await.ends_with(&canary.0));
            assert_eq!(round_trip(&mut second, server, 4000).await.1, from);
        }

        // Nobody hears of anything, and the client comes by another road.
        relay.strand();
        let mut third = resume(&scene.target, &token, &second).await;
        assert!(third.welcome.as_ref().is_some_and(|w| w.resumed));
        assert_eq!(round_trip(&mut third, &servers[0], 4000).await.1, from4);
        assert_eq!(scene.row("alice")["addresses"], lease);

        // A ticket that was used is worth nothing; the instance's lease is its own all the same.
        let fourth = resume(&scene.target, &token, &first).await;
        assert_eq!((fourth.v4, fourth.v6), (first.v4, first.v6));
        assert_eq!(third.rx.closed().await.code, 1000, "continued elsewhere");
    });
}

#[test]
fn a_road_that_stalls_loses_nothing_and_one_that_corrupts_ends_the_session() {
    let scene = Scene::new("linger = 60\n", DIALECTS);
    let servers = scene.servers();
    let relay = Relay::new(
        &scene.lab.nb,
        address(NB4, 443),
        &scene.lab.nb,
        scene.gateway.address(),
        2,
    );
    let road = scene.target.clone().via(relay.at);
    on(&scene.phone, async || {
        let token = scene.gateway.token("alice");
        let mut session = Session::open(&road, NATIVE, &token).await;
        let (_, from) = round_trip(&mut session, &servers[0], 4000).await;
        relay.stall(true);
        let canaries: Vec<Canary> = (0..50).map(|_| Canary::new()).collect();
        for canary in &canaries {
            servers[0].send_to(&canary.0, from).expect("send");
        }
        let passed = || scene.row("alice")["inbound"]["packets"].as_u64();
        wait_until("the gateway has sent them", || passed() == Some(51));
        relay.stall(false);
        for canary in &canaries {
            assert!(session.rx.packet().await.ends_with(&canary.0));
        }

        // TLS notices a wrong byte; nothing of it reaches a program.
        relay.impair(0, 0, 1000);
        servers[0].send_to(&Canary::new().0, from).expect("send");
        assert_eq!(session.rx.closed().await.code, 1006);
        assert!(relay.counts.corrupted.load(Ordering::Relaxed) > 0);
        relay.impair(0, 0, 0);
        let mut again = resume(&road, &token, &session).await;
        assert_eq!(round_trip(&mut again, &servers[0], 4000).await.1, from);
    });
}

#[test]
fn the_relay_does_to_datagrams_what_it_is_told() {
    const ALL: u32 = 1000;
    let lab = Lab::new();
    let server = lab.up.udp(&at(UP4, 5353));
    let relay = Relay::new(&lab.nb, address(NB4, 5353), &lab.nb, address(UP4, 5353), 7);
    let client = lab.gw.udp("0.0.0.0:0");
    client.connect(relay.at).expect("connect");
    let mut buf = [0; 64];
    let number = |bytes: &[u8]| bytes.try_into().map(u32::from_be_bytes).ok();

    // A good road: all of them, in order, and the answers as well.
    for n in 0..ALL {
        client.send(&n.to_be_bytes()).expect("send");
        let (len, from) = server.recv_from(&mut buf).expect("a datagram");
        assert_eq!(number(&buf[..len]), Some(n));
        server.send_to(&buf[..len], from).expect("answer");
        let len = client.recv(&mut buf).expect("the answer");
        assert_eq!(number(&buf[..len]), Some(n));
    }

    // A long one.
    relay.delay(Duration::from_millis(30));
    let begun = Instant::now();
    client.send(b"late").expect("send");
    server.recv_from(&mut buf).expect("a datagram");
    assert!(begun.elapsed() >= Duration::from_millis(30));
    relay.delay(Duration::ZERO);

    // A bad one.
    relay.impair(100, 200, 0);
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (mut got, mut late, mut last) = (BTreeSet::new(), 0, 0);
    for n in 0..ALL {
        client.send(&n.to_be_bytes()).expect("send");
        // So many at a time fit into every buffer on the way.
        if n % 50 < 49 {
            continue;
        }
        while got.len() as u64 + count(&relay.counts.lost) <= n.into() {
            if !rvpn_lab::capture::readable(&server, Duration::from_millis(2)) {
                continue;
            }
            let (len, _) = server.recv_from(&mut buf).expect("a datagram");
            let n = number(&buf[..len]).expect("a number");
            assert!(got.insert(n), "{n} came twice");
            late += u64::from(n < last);
            last = last.max(n);
            assert!(
                begun.elapsed() < rvpn_lab::PATIENCE,
                "neither lost nor here"
            );
        }
    }
    let (lost, reordered) = (count(&relay.counts.lost), count(&relay.counts.reordered));
    assert!((50..200).contains(&lost), "{lost} lost");
    assert!((100..300).contains(&reordered), "{reordered} reordered");
    assert!(late > 50, "{late} were overtaken");

    // One wrong bit in each.
    relay.impair(0, 0, 1000);
    for _ in 0..100 {
        client.send(&[0; 16]).expect("send");
        let (len, _) = server.recv_from(&mut buf).expect("a datagram");
        let ones: u32 = buf[..len].iter().map(|b| b.count_ones()).sum();
        assert_eq!((len, ones), (16, 1));
    }
}
