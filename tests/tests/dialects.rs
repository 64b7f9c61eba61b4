//! What the clients of the first gateways rely on, through the real programs.

use std::collections::BTreeSet;
use std::time::Duration;

use rvpn_lab::capture::{contains, drain_udp};
use rvpn_lab::packet;
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::flows;
use rvpn_lab::scene::{Scene, drops, expect_datagram, received, round_trip};
use rvpn_lab::topology::{FAR4, UP4, UP6};
use rvpn_lab::tunnel_client::{DIALECTS, Login, Session, Speech, on};
use tokio_tungstenite::tungstenite::Message;

#[test]
fn f_01_a_binary_message_is_a_packet_both_ways() {
    let scene = Scene::new(
        "",
        "[[dialect]]\npath = \"/a\"\nkind = \"raw\"\nanonymous = true\n\
         [[dialect]]\npath = \"/b\"\nkind = \"text4\"\nanonymous = true\n\
         [[dialect]]\npath = \"/any/path\"\nkind = \"text46\"\nanonymous = true\n\
         [[dialect]]\npath = \"/tunnel\"\nkind = \"padded\"\nanonymous = true\n",
    );
    let servers = scene.servers();
    let paths = ["/a", "/b", "/any/path", "/tunnel"];
    on(&scene.phone, async || {
        for (speech, path) in Speech::OLDER.into_iter().zip(paths) {
            // As the originals connect: no token, no subprotocol.
            let opened =
                Session::try_open(&scene.target, speech, path, None, Login::default()).await;
            let mut session = opened.expect("let in");
            round_trip(&mut session, &servers[0], 4000).await;
            session.ping(UP4, 1, 1).await;
            session.ping(FAR4, 1, 2).await;
            if speech.has_v6() {
                round_trip(&mut session, &servers[1], 4000).await;
                session.ping(UP6, 1, 3).await;
            }
            assert!(scene.row("anonymous")["service"].is_string());
            // These leave without a word.
            drop(session);
            scene.deserted();
        }
    });
}

#[test]
fn f_01_the_first_packet_waits_for_the_device() {
    // Faster than slots are cleaned.
    let scene = Scene::new("slots = 24\nmax-slots = 24\n", DIALECTS);
    on(&scene.phone, async || {
        for _ in 0..20 {
            // The first gateway's client sends its single ping at once and waits for ever.
            let mut session = scene.session(Speech::Raw, "eager").await;
            session.ping(UP4, 3, 1).await;
            drop(session);
            scene.deserted();
        }
    });
}

#[test]
fn f_08_any_source_of_the_first_dialect_is_mapped() {
    let scene = Scene::default();
    let [server, _] = scene.servers();
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Raw, "alice").await;
        let mut sources: Vec<String> = (1..=28).map(|n| format!("127.0.1.{n}")).collect();
        sources.extend(["10.0.0.1", "8.8.8.8", "192.168.0.7", "169.254.9.9"].map(str::to_owned));
        let mut externals = BTreeSet::new();
        for (port, source) in (4000..).zip(&sources) {
            let (there, back) = (Canary::new(), Canary::new());
            let out = packet::udp(source, port, UP4, 5353, &there.0);
            session.tx.send(&out).await;
            let from = expect_datagram(&server, &there.0);
            assert!(externals.insert(from), "{from} twice");
            server.send_to(&back.0, from).expect("answer");
            // Mapped back to the very source, with sums to match.
            let answer = packet::udp(UP4, 5353, source, port, &back.0);
            assert_eq!(session.rx.packet().await[12..], answer[12..], "{source}");
        }
        assert_eq!(sources.len(), 32);

        // In order of appearance they are .2 to .33 of the subnet.
        let row = scene.row("alice");
        let base = row["addresses"][0].as_str().expect("an address");
        let net = base.rsplit_once('.').expect("IPv4").0;
        for n in 2..=33 {
            let inside = format!("src={net}.{n} dst={UP4} sport={} dport=5353", 3998 + n);
            assert_eq!(flows(&scene.lab.gw, &inside).len(), 1, "{inside}");
        }

        // There is no room for another, and none for IPv6.
        let lost = [Canary::new(), Canary::new()];
        let more = packet::udp("127.0.1.99", 4000, UP4, 5353, &lost[0].0);
        session.tx.send(&more).await;
        let six = packet::udp("fd00::2", 4000, UP6, 5353, &lost[1].0);
        session.tx.send(&six).await;
        // Nor do they count who cannot be anybody.
        for nobody in ["0.0.0.0", "224.0.0.1", "255.255.255.255"] {
            let probe = packet::udp(nobody, 4000, UP4, 5353, &lost[0].0);
            session.tx.send(&probe).await;
        }
        let row = scene.counted("alice", 37);
        let dropped = drops(&row["outbound"]);
        assert_eq!(dropped.values().sum::<u64>(), 5, "{row}");
        assert!(dropped["spoofed"] >= 2, "{row}");
        // The others go on.
        session
            .tx
            .send(&packet::udp("127.0.1.5", 4004, UP4, 5353, b"still"))
            .await;
        expect_datagram(&server, b"still");
        assert!(received_by_raw(&mut session).await.is_empty());
    });
}

/// As `received`, by a client that chose 127.0.1.2.
async fn received_by_raw(session: &mut Session) -> Vec<Vec<u8>> {
    assert_eq!(session.v4.to_string(), "127.0.1.2");
    received(session).await
}

#[test]
fn f_09_only_the_assigned_address_may_be_used() {
    let scene = Scene::default();
    let servers = scene.servers();
    on(&scene.phone, async || {
        for speech in [Speech::Text4, Speech::Text46, Speech::Padded] {
            let account = speech.kind();
            let mut session = scene.session(speech, account).await;
            let own = u32::from(session.v4);
            assert_eq!(own & 0xff, 2, "the base ends in 0: {:?}", session.greeting);
            let mut sent = 0;
            let base = own - 2;
            for wrong in [
                base,
                base + 1,
                base + 3,
                base + 255,
                base + 256,
                own ^ 1 << 20,
            ] {
                let source = std::net::Ipv4Addr::from(wrong).to_string();
                let spoofed = packet::udp(&source, 1, UP4, 5353, &Canary::new().0);
                session.tx.send(&spoofed).await;
                sent += 1;
            }
            // One without IPv6 has no right address there at all.
            let own6 = session.v6.map_or(0xfd52_5650_0001 << 80, u128::from);
            for wrong in [own6 - 1, own6 + 1, own6 + (1 << 16)] {
                let source = std::net::Ipv6Addr::from(wrong).to_string();
                let spoofed = packet::udp(&source, 1, UP6, 5353, &Canary::new().0);
                session.tx.send(&spoofed).await;
                sent += 1;
            }
            let row = scene.counted(account, sent);
            assert_eq!(drops(&row["outbound"])["spoofed"], sent, "{row}");
            assert!(received(&mut session).await.is_empty());
            round_trip(&mut session, &servers[0], 2).await;
            drop(session);
            scene.deserted();
        }
        for server in &servers {
            assert_eq!(drain_udp(server).len(), 0, "a spoofed packet arrived");
        }
    });
}

#[test]
fn f_13_both_families_with_errors_and_fragments() {
    let scene = Scene::default();
    let servers = scene.servers();
    let speeches = [
        Speech::Text46,
        Speech::Padded,
        Speech::Native { offload: true },
    ];
    on(&scene.phone, async || {
        for speech in speeches {
            let mut session = scene.session(speech, speech.kind()).await;
            let own = session.source(UP6);
            round_trip(&mut session, &servers[1], 4100).await;
            session.ping(UP6, 5, 1).await;
            // Masqueraded by the kernel, as IPv4 is.
            let inside = scene.row(speech.kind())["addresses"][1].clone();
            let inside = format!("src={}", inside.as_str().expect("IPv6"));
            let flow = flows(&scene.lab.gw, &inside);
            assert!(
                flow.iter().any(|f| f.contains("dst=2606:4700:4700::2 ")),
                "{flow:?}"
            );

            // A closed port: the error quotes the client's packet as it sent it.
            let closed = packet::udp(&own, 4101, UP6, 9, &Canary::new().0);
            session.tx.send(&closed).await;
            let error = session.rx.packet().await;
            assert_eq!(error[40..42], [1, 4], "port unreachable: {error:02x?}");
            let quoted = &error[48..];
            assert_eq!(
                quoted[8..],
                closed[8..],
                "addresses, ports, sums and payload"
            );

            // In pieces there, whole here.
            let long: Vec<u8> = (0..3000_u32).map(|n| n.to_le_bytes()[0]).collect();
            let whole = packet::udp(&own, 4102, UP6, 5353, &long);
            for piece in packet::fragments6(&whole, 1232, 77) {
                session.tx.send(&piece).await;
            }
            expect_datagram(&servers[1], &long);
            drop(session);
            scene.deserted();
        }
    });
}

#[test]
fn f_14_padding_noise_and_a_greeting_that_waits() {
    let scene = Scene::new(
        "",
        "[[dialect]]\npath = \"/tunnel\"\n\
         [[dialect]]\npath = \"/slight\"\npadding = \"slight\"\n\
         [[dialect]]\npath = \"/broad\"\npadding = \"broad\"\n\
         [[dialect]]\npath = \"/own\"\npadding = { bytes = [7, 9], noise-bytes = [3, 5], noise-every-ms = [10, 20] }\n",
    );
    let [server, _] = scene.servers();
    on(&scene.phone, async || {
        let mut waits = BTreeSet::new();
        let token = scene.gateway.token("alice");
        for (path, padding, noise) in [
            ("/tunnel", 0..=0, None),
            ("/slight", 0..=1, Some(0..=1)),
            ("/broad", 0..=1500, Some(1..=1500)),
            ("/own", 7..=9, Some(3..=5)),
        ] {
            let opened = Session::try_open(
                &scene.target,
                Speech::Padded,
                path,
                Some(&token),
                Login::default(),
            );
            let mut session = opened.await.expect("let in");
            waits.insert(session.waited);
            for port in 4000..4010 {
                round_trip(&mut session, &server, port).await;
            }
            let lengths = session.rx.padding();
            // The greeting and ten packets.
            assert_eq!(lengths.len(), 11);
            assert!(
                lengths.iter().all(|n| padding.contains(n)),
                "{path}: {lengths:?}"
            );
            if padding.end() > &1 {
                let different: BTreeSet<_> = lengths.iter().collect();
                assert!(different.len() > 1, "{path}: {lengths:?}");
            }
            match noise {
                Some(lengths) => {
                    // For the life of the connection, not only at its start.
                    while session.rx.noise().len() < 5 {
                        session.rx.event().await;
                    }
                    let noise = session.rx.noise();
                    assert!(
                        noise.iter().all(|n| lengths.contains(n)),
                        "{path}: {noise:?}"
                    );
                }
                None => assert!(session.rx.noise().is_empty()),
            }

            // And the client's own noise is nobody's loss.
            for noise in [vec![], vec![0], vec![0; 700]] {
                session.tx.message(Message::binary(noise)).await;
            }
            round_trip(&mut session, &server, 4000).await;
            let row = scene.counted("alice", 11);
            assert!(drops(&row["outbound"]).is_empty(), "{row}");
            drop(session);
            scene.deserted();
        }
        // How late a loaded machine looks is no part of the least.
        let most = waits.last().expect("four");
        assert!(*most >= Duration::from_millis(100), "{waits:?}");
        assert_eq!(waits.len(), 4, "always the same: {waits:?}");
    });
}

#[test]
fn f_14_what_is_neither_packet_nor_noise_is_dropped_and_the_session_goes_on() {
    let scene = Scene::default();
    let [server, _] = scene.servers();
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Padded, "alice").await;
        let faults: [&[u8]; 4] = [&[0x80, 0x1c, 0x45], &[1], &[1, 0x80], &[0x80, 0]];
        for fault in faults {
            session.tx.message(Message::binary(fault.to_vec())).await;
        }
        session.tx.message(Message::text("10.64.0.0/30")).await;
        let row = scene.counted("alice", 5);
        assert_eq!(drops(&row["outbound"])["malformed"], 5, "{row}");
        round_trip(&mut session, &server, 4000).await;
    });
}

#[test]
fn f_14_nothing_of_the_kernels_own_enters_a_tunnel() {
    let scene = Scene::default();
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let row = scene.row("alice");
        let device = format!("rv{}", row["slot"]);
        let gw = &scene.lab.gw;
        // Whatever makes a host speak on a device of its own.
        gw.ip(&format!("link set {device} multicast on"));
        for group in ["239.1.2.3", "ff05::7"] {
            let socket = gw.udp(if group.contains(':') {
                "[::]:0"
            } else {
                "0.0.0.0:0"
            });
            let sent = gw.run(|| match group.parse() {
                Ok(std::net::IpAddr::V4(g)) => socket.join_multicast_v4(&g, &session.v4),
                Ok(std::net::IpAddr::V6(g)) => socket.join_multicast_v6(&g, 0),
                Err(e) => panic!("{e}"),
            });
            // Refused or not, nobody hears of it.
            drop(sent);
        }
        session.ping(UP4, 1, 1).await;
        let strange: Vec<_> = received(&mut session)
            .await
            .into_iter()
            .filter(|p| !contains(p, b"rvpn-canary"))
            .collect();
        assert!(strange.is_empty(), "{strange:02x?}");
    });
}
