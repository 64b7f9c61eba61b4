//! Every rule by which a packet of a client goes no further, with its counter.

use rvpn_lab::capture::{Capture, drain_udp};
use rvpn_lab::packet::{self, fix_header};
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::counter;
use rvpn_lab::scene::{Scene, drops, expect_datagram, received, round_trip};
use rvpn_lab::topology::{FAR4, GW4, GW6, UP4, UP6};
use rvpn_lab::tunnel_client::{DIALECTS, Session, Speech, on};
use rvpn_lab::wait_until;

/// A change to a packet that was good.
fn but(mut packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut packet);
    packet
}

/// The same with a header checksum that fits.
fn but4(packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut packet = but(packet, change);
    fix_header(&mut packet);
    packet
}

/// Sends the packets, none of which may be seen anywhere, and expects all of
/// them under this reason of the gateway's.
async fn refused(scene: &Scene, session: &mut Session, reason: &str, packets: &[Vec<u8>]) {
    let row = scene.row("alice");
    let out = &row["outbound"];
    let all = |drops: std::collections::BTreeMap<String, u64>| drops.values().sum::<u64>();
    let passed = out["packets"].as_u64().expect("a number");
    let before = drops(out);
    for packet in packets {
        session.tx.send(packet).await;
    }
    let sent = packets.len() as u64;
    let row = scene.counted("alice", passed + all(before.clone()) + sent);
    let after = drops(&row["outbound"]);
    let moved = |why: &str| after.get(why).unwrap_or(&0) - before.get(why).unwrap_or(&0);
    assert_eq!(moved(reason), sent, "{reason}: {before:?} {after:?}");
    assert!(received(session).await.is_empty(), "{reason}");
}

#[test]
fn f_11_each_rule_of_the_gateway_and_its_counter() {
    let scene = Scene::default();
    let servers = scene.servers();
    let mut outside = Capture::on(&scene.lab.up);
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let (a, a6) = (session.v4.to_string(), session.source(UP6));
        let canary = Canary::new();
        let udp = || packet::udp(&a, 1, UP4, 5353, &canary.0);
        let udp6 = || packet::udp(&a6, 1, UP6, 5353, &canary.0);
        let tcp = || packet::tcp((&a, 1), (UP4, 2), "S", 1, 0, &canary.0);
        let cases: [(&str, Vec<Vec<u8>>); 7] = [
            (
                "malformed",
                vec![
                    but(udp(), |p| p[0] = 0x55),
                    but(udp(), |p| p[0] = 0x44),
                    but(udp(), |p| p.truncate(19)),
                    but4(udp(), |p| p[3] += 1),
                    but4(udp(), |p| p[2..4].fill(0)),
                    but(udp6(), |p| p.truncate(39)),
                    but(udp6(), |p| p[5] += 1),
                    but4(udp(), |p| p[25] += 1),
                    but(tcp(), |p| p[32] = 0x40),
                    but(tcp(), |p| p[32] = 0xf0),
                ],
            ),
            (
                "options",
                vec![
                    packet::raw4(&a, UP4, 17, &[7, 4, 4, 0], &canary.0),
                    packet::raw6(&a6, UP6, 0, &[17, 0, 1, 4, 0, 0, 0, 0]),
                    packet::raw6(&a6, UP6, 43, &[17, 0, 0, 0, 0, 0, 0, 0]),
                    packet::raw6(&a6, UP6, 60, &[17, 0, 1, 4, 0, 0, 0, 0]),
                ],
            ),
            (
                "protocol",
                vec![
                    packet::raw4(&a, UP4, 47, &[], &canary.0),
                    packet::raw4(&a, UP4, 132, &[], &canary.0),
                    packet::raw4(&a, UP4, 41, &[], &canary.0),
                    packet::raw6(&a6, UP6, 4, &canary.0),
                    packet::raw6(&a6, UP6, 50, &canary.0),
                ],
            ),
            (
                "too-big",
                vec![
                    packet::udp(&a, 1, UP4, 5353, &[7; 1473]),
                    packet::udp(&a6, 1, UP6, 5353, &[7; 1453]),
                ],
            ),
            (
                "address",
                [
                    "0.0.0.1",
                    "127.0.0.1",
                    "224.0.0.1",
                    "239.1.1.1",
                    "255.255.255.255",
                ]
                .iter()
                .map(|to| packet::udp(&a, 1, to, 5353, &canary.0))
                .chain(
                    ["::", "::1", "ff02::1", "ff0e::1"]
                        .iter()
                        .map(|to| packet::udp(&a6, 1, to, 5353, &canary.0)),
                )
                .collect(),
            ),
            (
                "spoofed",
                vec![
                    packet::udp(GW4, 1, UP4, 5353, &canary.0),
                    packet::udp("10.64.200.2", 1, UP4, 5353, &canary.0),
                    packet::udp(&a.replace(".2", ".0"), 1, UP4, 5353, &canary.0),
                    packet::udp(&a.replace(".2", ".1"), 1, UP4, 5353, &canary.0),
                    packet::udp(&a.replace(".2", ".255"), 1, UP4, 5353, &canary.0),
                    packet::udp(GW6, 1, UP6, 5353, &canary.0),
                    packet::udp("fe80::1", 1, UP6, 5353, &canary.0),
                ],
            ),
            (
                "hop-limit",
                vec![packet::with_ttl(udp(), 0), packet::with_ttl(udp6(), 0)],
            ),
        ];
        for (reason, packets) in &cases {
            refused(&scene, &mut session, reason, packets).await;
        }
        assert_eq!(outside.count(&canary.0), 0);
        // After all that the client is served as before.
        for server in &servers {
            assert_eq!(drain_udp(server).len(), 0);
            round_trip(&mut session, server, 4000).await;
        }
    });
}

#[test]
fn f_11_what_only_an_attacker_sends_and_its_counter() {
    let scene = Scene::default();
    let servers = scene.servers();
    let mut outside = Capture::on(&scene.lab.up);
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let (a, a6) = (session.v4.to_string(), session.source(UP6));
        let canary = Canary::new();
        let tcp = |flags: &str| packet::tcp((&a, 1), (UP4, 2), flags, 1, 0, &canary.0);
        let tcp6 = |flags: &str| packet::tcp((&a6, 1), (UP6, 2), flags, 1, 0, &canary.0);
        // A packet of somebody else's, as an error would quote it.
        let quoted = packet::udp("10.64.200.2", 1, UP4, 53, &canary.0);
        let quoted6 = packet::udp("fd52:5650:1:ffff::1", 1, UP6, 53, &canary.0);
        let long = packet::udp(&a, 1, UP4, 5353, &[7; 1400]);
        let pieces = packet::fragments(&long, 704);
        let cases: [(&str, Vec<Vec<u8>>); 5] = [
            (
                "tcp-flags",
                ["", "SF", "SR", "FPU", "F"]
                    .iter()
                    .flat_map(|flags| [tcp(flags), tcp6(flags)])
                    .collect(),
            ),
            (
                "protocol",
                vec![
                    packet::icmp4(&a, UP4, 5, 1, &canary.0),
                    packet::icmp4(&a, UP4, 9, 0, &canary.0),
                    packet::icmp6(&a6, UP6, 134, 0, &canary.0),
                    packet::icmp6(&a6, UP6, 135, 0, &canary.0),
                    packet::icmp6(&a6, UP6, 137, 0, &canary.0),
                ],
            ),
            (
                "quoted",
                vec![
                    packet::icmp4(&a, UP4, 3, 1, &quoted),
                    packet::icmp4(&a, UP4, 11, 0, &quoted),
                    packet::icmp6(&a6, UP6, 1, 4, &quoted6),
                    packet::icmp6(&a6, UP6, 3, 0, &quoted6),
                ],
            ),
            (
                "fragment",
                vec![
                    // Past the end of any datagram.
                    but4(pieces[1].clone(), |p| {
                        p[6..8].copy_from_slice(&[0x1f, 0xff])
                    }),
                    // Over the flags of a TCP header that was looked at.
                    but4(pieces[1].clone(), |p| {
                        p[6..8].copy_from_slice(&[0x20, 1]);
                        p[9] = 6;
                    }),
                ],
            ),
            // A first piece too short for a header.
            (
                "malformed",
                vec![packet::fragments(&tcp("S"), 8)[0].clone()],
            ),
        ];
        for (reason, packets) in &cases {
            refused(&scene, &mut session, reason, packets).await;
        }
        assert_eq!(outside.count(&canary.0), 0);
        for server in &servers {
            round_trip(&mut session, server, 4000).await;
        }
    });
}

#[test]
fn f_11_each_rule_of_the_kernel_and_its_counter() {
    let scene = Scene::new(
        "deny-ports = tcp/25, udp/100-200\nflow-cap = 20\n",
        DIALECTS,
    );
    let gw = &scene.lab.gw;
    let [server, _] = scene.servers();
    let mut outside = Capture::on(&scene.lab.up);
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let other = scene.session(Speech::Text46, "bob").await;
        let (a, a6) = (session.v4.to_string(), session.source(UP6));
        let canary = Canary::new();
        let udp = |to: &str, port| match to.contains(':') {
            true => packet::udp(&a6, 1, to, port, &canary.0),
            false => packet::udp(&a, 1, to, port, &canary.0),
        };
        let mut sent = 0;
        for (reason, packets) in [
            (
                "to_host",
                vec![
                    udp(GW4, 443),
                    udp(GW6, 443),
                    udp(&a.replace(".2", ".1"), 53),
                    packet::echo(&a, GW4, 1, 1, &canary.0),
                    packet::tcp((&a, 1), (GW4, 443), "S", 1, 0, &canary.0),
                ],
            ),
            (
                "client_to_client",
                vec![
                    udp(&other.v4.to_string(), 1),
                    udp(&other.source(UP6), 1),
                    packet::echo(&a, &other.v4.to_string(), 1, 1, &canary.0),
                ],
            ),
            (
                "denied_port",
                vec![
                    packet::tcp((&a, 1), (UP4, 25), "S", 1, 0, &canary.0),
                    packet::tcp((&a6, 1), (UP6, 25), "S", 1, 0, &canary.0),
                    udp(UP4, 100),
                    udp(UP6, 200),
                ],
            ),
        ] {
            let before = counter(gw, reason);
            for packet in &packets {
                session.tx.send(packet).await;
            }
            sent += packets.len() as u64;
            scene.counted("alice", sent);
            assert!(received(&mut session).await.is_empty(), "{reason}");
            sent += 1;
            let moved = counter(gw, reason) - before;
            assert_eq!(moved, packets.len() as u64, "{reason}");
        }
        assert_eq!(outside.count(&canary.0), 0);

        // The echoes above are one flow; nineteen more may be begun, then no other.
        let before = counter(gw, "flow_cap");
        for port in 1..=30 {
            session
                .tx
                .send(&packet::udp(&a, port, UP4, 5353, &canary.0))
                .await;
        }
        scene.counted("alice", sent + 30);
        assert!(received(&mut session).await.is_empty());
        let mut arrived = 0;
        wait_until("the rest have arrived", || {
            arrived += drain_udp(&server).len();
            arrived as u64 + counter(gw, "flow_cap") - before == 30
        });
        assert_eq!(arrived, 19);
    });
}

#[test]
fn f_11_no_special_purpose_range_is_reached() {
    let scene = Scene::default();
    let special4 = [
        "10.0.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.175.48.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
    ];
    let special6 = [
        "::ffff:1.1.1.1",
        "64:ff9b::101:101",
        "100::1",
        "2001::1",
        "2001:2::1",
        "2001:db8::1",
        "2002:101:101::1",
        "fc00::1",
        "fd00::1",
        "fec0::1",
    ];
    let gw = &scene.lab.gw;
    let mut outside = Capture::on(&scene.lab.up);
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let canary = Canary::new();
        let stopped = || counter(gw, "special_purpose") + counter(gw, "not_unicast");
        let before = stopped();
        let targets = || special4.iter().chain(&special6);
        for to in targets() {
            let own = session.source(to);
            let probe = packet::udp(&own, 1, to, 5353, &canary.0);
            session.tx.send(&probe).await;
        }
        let sent = targets().count() as u64;
        let row = scene.counted("alice", sent);
        assert!(received(&mut session).await.is_empty());
        // Some are nobody's to allow and do not get as far as the kernel's rules.
        let here = drops(&row["outbound"])["address"];
        assert_eq!(here, 3, "link-local, mapped and site-local: {row}");
        assert_eq!(here + stopped() - before, sent);
        assert_eq!(outside.count(&canary.0), 0);
        // Their neighbours are the internet.
        for to in ["1.1.1.1", FAR4, UP6] {
            session.ping(to, 2, 1).await;
        }
    });
}

#[test]
fn f_11_answers_with_a_special_source_reach_nobody() {
    let scene = Scene::default();
    let [server, server6] = scene.servers();
    // The gateway knows a way back to them, so nothing else stops them.
    scene.lab.up.sysctl("net/ipv4/conf/all/rp_filter", "0");
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let (_, from4) = round_trip(&mut session, &server, 4000).await;
        let (_, from6) = round_trip(&mut session, &server6, 4000).await;
        let canary = Canary::new();
        for source in [
            "10.1.2.3",
            "192.168.1.1",
            "100.64.0.9",
            "198.18.0.1",
            "127.0.0.1",
        ] {
            let answer = packet::udp(source, 5353, GW4, from4.port(), &canary.0);
            scene.lab.up.send_raw(&answer);
        }
        for source in ["fd00::5", "2001:db8::5", "2002:101:101::5"] {
            let answer = packet::udp(source, 5353, GW6, from6.port(), &canary.0);
            scene.lab.up.send_raw(&answer);
        }
        // From the right address, as it should be.
        server.send_to(b"the fence", from4).expect("send");
        assert!(session.rx.packet().await.ends_with(b"the fence"));
        server6.send_to(b"the fence", from6).expect("send");
        assert!(session.rx.packet().await.ends_with(b"the fence"));
    });
}

#[test]
fn f_12_header_checksum_and_hop_limit_are_verified_and_fragments_left_to_the_kernel() {
    let scene = Scene::default();
    let [server, _] = scene.servers();
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let a = session.v4.to_string();
        let udp = packet::udp(&a, 4000, UP4, 5353, b"never seen");
        let bad = [
            but(udp.clone(), |p| p[10] ^= 1),
            but(udp.clone(), |p| p[8] -= 1),
            but(udp.clone(), |p| p[10..12].fill(0)),
        ];
        refused(&scene, &mut session, "checksum", &bad).await;
        let dead = [packet::with_ttl(udp.clone(), 0)];
        refused(&scene, &mut session, "hop-limit", &dead).await;
        // One hop is enough for the gateway and no further.
        session.tx.send(&packet::with_ttl(udp, 1)).await;
        assert!(
            received(&mut session)
                .await
                .iter()
                .all(|p| p[9] == 1 && p[20] == 11)
        );
        assert_eq!(drain_udp(&server).len(), 0);

        let long: Vec<u8> = (0..4000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let whole = packet::udp(&a, 4000, UP4, 5353, &long);
        let mut pieces = packet::fragments(&whole, 1200);
        pieces.reverse();
        for piece in &pieces {
            session.tx.send(piece).await;
        }
        let from = expect_datagram(&server, &long);
        // And back: as many pieces as the device's MTU needs, together the whole.
        server.send_to(&long, from).expect("answer");
        let mut body = vec![0; 4008];
        let mut have = 0;
        while have < body.len() {
            let piece = session.rx.packet().await;
            assert!(piece.len() <= 1500);
            let at = usize::from(u16::from_be_bytes([piece[6], piece[7]]) & 0x1fff) * 8;
            body[at..at + piece.len() - 20].copy_from_slice(&piece[20..]);
            have += piece.len() - 20;
        }
        assert_eq!(body[8..], long);
    });
}
