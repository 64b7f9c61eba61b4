//! What the first gateways did with devices and the kernel, or wished they did.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use rvpn_lab::capture::{Capture, drain_udp};
use rvpn_lab::gateway::Gateway;
use rvpn_lab::helper::field;
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::{counter, devices, flows};
use rvpn_lab::scene::{Scene, drops, expect_datagram, received, round_trip};
use rvpn_lab::token::claims;
use rvpn_lab::topology::{GW4, GW6, UP4, UP6, many_uids};
use rvpn_lab::tunnel_client::{Closed, DIALECTS, Login, Session, Speech, on};
use rvpn_lab::{Helper, Lab, packet, wait_until};
use serde_json::json;

#[test]
fn f_02_the_kernel_masquerades_both_families() {
    let scene = Scene::default();
    let servers = scene.servers();
    on(&scene.phone, async || {
        for speech in Speech::OLDER {
            let mut session = scene.session(speech, speech.kind()).await;
            let addresses = scene.row(speech.kind())["addresses"].clone();
            for (server, outside, family) in [(&servers[0], GW4, 0), (&servers[1], GW6, 1)] {
                if family == 1 && !speech.has_v6() {
                    continue;
                }
                let (_, from) = round_trip(&mut session, server, 4000).await;
                assert_eq!(from.ip().to_string(), outside);
                let inside = addresses[family].as_str().expect("an address");
                let flow = flows(&scene.lab.gw, &format!("src={inside} "));
                let back = format!("dst={outside} sport=5353 dport={} ", from.port());
                assert!(flow.iter().any(|f| f.contains(&back)), "{back}: {flow:?}");
            }
            drop(session);
            scene.deserted();
        }
    });
}

#[test]
fn f_03_a_device_and_a_subnet_for_each_client() {
    let scene = Scene::default();
    let servers = scene.servers();
    on(&scene.phone, async || {
        let mut a = scene.session(Speech::Text46, "a").await;
        let mut b = scene.session(Speech::Text46, "b").await;
        let (row_a, row_b) = (scene.row("a"), scene.row("b"));
        assert_ne!(row_a["slot"], row_b["slot"]);
        assert_ne!(u32::from(a.v4) >> 8, u32::from(b.v4) >> 8);
        let present = devices(&scene.lab.gw);
        for row in [&row_a, &row_b] {
            assert!(
                present.contains(&format!("rv{}", row["slot"])),
                "{present:?}"
            );
        }

        // A speaks as B, and to B.
        let mut outside = Capture::on(&scene.lab.up);
        let canary = Canary::new();
        let crossing = counter(&scene.lab.gw, "client_to_client");
        let (a4, b4) = (a.v4.to_string(), b.v4.to_string());
        let (a6, b6) = (a.source(UP6), b.source(UP6));
        for packet in [
            packet::udp(&b4, 1, UP4, 5353, &canary.0),
            packet::udp(&b6, 1, UP6, 5353, &canary.0),
            packet::echo(&b4, UP4, 1, 1, &canary.0),
            packet::udp(&a4, 1, &b4, 2, &canary.0),
            packet::udp(&a6, 1, &b6, 2, &canary.0),
            packet::echo(&a4, &b4, 1, 1, &canary.0),
            packet::echo(&a6, &b6, 1, 1, &canary.0),
        ] {
            a.tx.send(&packet).await;
        }
        let row = scene.counted("a", 7);
        assert_eq!(drops(&row["outbound"])["spoofed"], 3, "{row}");
        assert!(received(&mut a).await.is_empty());
        assert_eq!(counter(&scene.lab.gw, "client_to_client") - crossing, 4);
        assert!(received(&mut b).await.is_empty());
        assert_eq!(outside.count(&canary.0), 0);
        round_trip(&mut b, &servers[0], 4000).await;
        round_trip(&mut b, &servers[1], 4000).await;
    });
}

#[test]
fn f_04_the_pool_is_there_before_and_the_server_has_no_rights() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    assert_eq!(devices(&lab.gw).len(), 4, "before any server");
    let mut gateway = Gateway::start(&lab, &helper, DIALECTS);
    let status = format!("/proc/{}/status", gateway.pid());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let held = u64::from_str_radix(&field(&status, set), 16);
        assert_eq!(held, Ok(0), "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Seccomp"), "2");
    if many_uids() {
        let wanted = [helper.gateway_uid; 4].map(|uid| uid.to_string());
        let uids = field(&status, "Uid");
        assert_eq!(uids.split_whitespace().collect::<Vec<_>>(), wanted);
    }
    let (code, text) = helper.run(&lab.gw, "status");
    assert_eq!(code, 0, "{text}");
    assert_eq!(helper.run(&lab.gw, "nonsense").0, 1);
    assert!(gateway.stop().success());
    assert_eq!(devices(&lab.gw).len(), 4, "after it as well");
    drop(helper);
}

#[test]
fn f_05_a_client_back_within_the_grace_period_keeps_its_subnet() {
    let scene = Scene::new("linger = 60\n", DIALECTS);
    let servers = scene.servers();
    let cafe = scene.lab.client("cafe", 11);
    for speech in Speech::OLDER {
        let mut named = claims(speech.kind());
        named["jti"] = json!(format!("token-{}", speech.kind()));
        let token = scene.gateway.token_with(&named);
        let before = on(&scene.phone, async || {
            let mut session = Session::open(&scene.target, speech, &token).await;
            let (_, from4) = round_trip(&mut session, &servers[0], 4000).await;
            let from6 = match speech.has_v6() {
                true => Some(round_trip(&mut session, &servers[1], 4000).await.1),
                false => None,
            };
            (session.v4, session.v6, from4, from6)
        });
        scene.deserted();
        // Another network, another address; the flows are the same.
        on(&cafe, async || {
            let mut session = Session::open(&scene.target, speech, &token).await;
            assert_eq!((session.v4, session.v6), (before.0, before.1));
            if speech == Speech::Raw {
                // The map of its sources begins anew with the first of them.
                let again = packet::udp("127.0.1.2", 4000, UP4, 5353, b"again");
                session.tx.send(&again).await;
                assert_eq!(expect_datagram(&servers[0], b"again"), before.2);
            }
            for (server, from) in servers.iter().zip([Some(before.2), before.3]) {
                let Some(from) = from else { continue };
                let canary = Canary::new();
                server.send_to(&canary.0, from).expect("send");
                assert!(session.rx.packet().await.ends_with(&canary.0));
            }
            let (_, from) = round_trip(&mut session, &servers[0], 4000).await;
            assert_eq!(from, before.2, "the same flow to the internet");
        });
        scene.deserted();
    }
}

#[test]
fn f_06_a_recycled_subnet_gets_nothing_of_the_client_before() {
    let scene = Scene::new("slots = 1\nmax-slots = 1\nlinger = 0\n", DIALECTS);
    let servers = scene.servers();
    on(&scene.phone, async || {
        let mut before = scene.session(Speech::Text46, "before").await;
        let (own4, own6) = (before.v4, before.v6);
        let (_, from4) = round_trip(&mut before, &servers[0], 4000).await;
        let (_, from6) = round_trip(&mut before, &servers[1], 4000).await;
        drop(before);
        scene.deserted();
        wait_until("no flow of its is left", || {
            flows(&scene.lab.gw, &format!("src={own4} ")).is_empty()
                && flows(&scene.lab.gw, &format!("src={} ", own6.expect("IPv6"))).is_empty()
        });
        let mut after = next_in_line(&scene, Speech::Text46, "after").await;
        assert_eq!(
            (after.v4, after.v6),
            (own4, own6),
            "the only subnet there is"
        );
        let stale = Canary::new();
        servers[0].send_to(&stale.0, from4).expect("send");
        servers[1].send_to(&stale.0, from6).expect("send");
        assert!(received(&mut after).await.is_empty());
        // The same ports begin new flows.
        round_trip(&mut after, &servers[0], 4000).await;
        round_trip(&mut after, &servers[1], 4000).await;
        assert!(servers.iter().all(|s| drain_udp(s).is_empty()));
    });
}

/// Logs in as soon as a slot is free.
async fn next_in_line(scene: &Scene, speech: Speech, account: &str) -> Session {
    let begun = Instant::now();
    let token = scene.gateway.token(account);
    loop {
        let login = Login::default();
        let path = speech.path();
        match Session::try_open(&scene.target, speech, path, Some(&token), login).await {
            Ok(session) => return session,
            Err(closed) => assert_eq!(closed.code, 1013, "{closed:?}"),
        }
        assert!(begun.elapsed() < rvpn_lab::PATIENCE, "no slot became free");
    }
}

#[test]
fn f_07_sessions_spread_over_the_cores() {
    let scene = Scene::new("", &format!("{DIALECTS}[session]\ncores = 2\n"));
    let [server, _] = scene.servers();
    on(&scene.phone, async || {
        let mut sessions = Vec::new();
        for account in ["a", "b", "c", "d"] {
            sessions.push(scene.session(Speech::Text4, account).await);
        }
        assert_eq!(scene.gateway.sessions().len(), 4);
        let before = turns(&scene.gateway);
        assert_eq!(before.len(), 2, "data threads");
        let mut used = Vec::new();
        for session in &mut sessions {
            let before = turns(&scene.gateway);
            for port in 4000..4050 {
                round_trip(session, &server, port).await;
            }
            let after = turns(&scene.gateway);
            // A session stays on one of them, which wakes for its packets.
            let woken = [after[0] - before[0], after[1] - before[1]];
            let busy = usize::from(woken[1] > woken[0]);
            assert!(woken[busy] >= 10 && woken[1 - busy] < 5, "{woken:?}");
            used.push(busy);
        }
        used.sort_unstable();
        assert_eq!(used, [0, 0, 1, 1], "two sessions on each");
    });
}

/// How often each data thread has waited for work.
fn turns(gateway: &Gateway) -> Vec<u64> {
    let tasks = format!("/proc/{}/task", gateway.pid());
    let mut found: Vec<(String, u64)> = fs::read_dir(&tasks)
        .expect(&tasks)
        .filter_map(|task| {
            let status = task.ok()?.path().join("status");
            let status = status.to_str()?;
            let name = field(status, "Name");
            let waits = field(status, "voluntary_ctxt_switches").parse().ok()?;
            name.starts_with("rvpn-data-").then_some((name, waits))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, waits)| waits).collect()
}

#[test]
fn f_10_packets_leave_no_memory_behind() {
    let scene = Scene::default();
    let [server, _] = scene.servers();
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text4, "alice").await;
        let own = session.v4.to_string();
        let status = format!("/proc/{}/status", scene.gateway.pid());
        let resident = || -> u64 {
            let text = field(&status, "VmRSS");
            text.trim_end_matches(" kB").parse().expect("kilobytes")
        };
        let mut sent = 0;
        let mut volley = async |count: u64| {
            for _ in 0..count {
                let p = packet::udp(&own, 4000, UP4, 5353, &[0x55; 1400]);
                session.tx.send(&p).await;
                expect_datagram(&server, &[0x55; 1400]);
            }
            sent += count;
            sent
        };
        // What is made once is made by now.
        volley(1000).await;
        let before = resident();
        let sent = volley(10_000).await;
        let row = scene.counted("alice", sent);
        assert_eq!(row["outbound"]["packets"], sent);
        // Kept, they would be 14 MB; a page or two a thread is the allocator's own.
        let grown = resident().saturating_sub(before);
        assert!(grown < 1024, "{grown} kB more after 10,000 packets");
    });
}

#[test]
fn f_15_and_dos_16_the_sixth_client_of_five_is_told_at_once() {
    let scene = Scene::new("slots = 5\nmax-slots = 5\n", DIALECTS);
    on(&scene.phone, async || {
        let mut inside = Vec::new();
        for n in 0..5 {
            inside.push(scene.session(Speech::Text4, &format!("account-{n}")).await);
        }
        let subnets: BTreeSet<Ipv4Addr> = inside.iter().map(|s| s.v4).collect();
        assert_eq!(subnets.len(), 5);
        let token = scene.gateway.token("late");
        let refused = Closed {
            code: 1013,
            reason: "No available TUN interfaces".to_owned(),
        };
        for speech in Speech::OLDER {
            let mut best = Duration::MAX;
            for _ in 0..8 {
                let begun = Instant::now();
                let path = speech.path();
                let late =
                    Session::try_open(&scene.target, speech, path, Some(&token), Login::default());
                let closed = match late.await {
                    Err(closed) => closed,
                    // The first dialect has no greeting to wait for.
                    Ok(mut session) if speech == Speech::Raw => session.rx.closed().await,
                    Ok(_) => panic!("{speech:?} was let in"),
                };
                best = best.min(begun.elapsed());
                assert_eq!(closed, refused, "{speech:?}");
            }
            assert!(best < Duration::from_millis(100), "{speech:?}: {best:?}");
        }
        let native = Speech::Native { offload: true };
        let late = Session::try_open(
            &scene.target,
            native,
            native.path(),
            Some(&token),
            Login::default(),
        );
        assert_eq!(late.await.err().map(|c| c.code), Some(1013));

        // One leaves, one comes; the other four never noticed.
        drop(inside.pop());
        let mut late = next_in_line(&scene, Speech::Text46, "late").await;
        late.ping(UP4, 1, 1).await;
        assert!(
            late.v6
                .is_some_and(|v6: Ipv6Addr| v6.segments()[0] & 0xfe00 == 0xfc00)
        );
        for session in &mut inside {
            session.ping(UP4, 1, 1).await;
        }
    });
}
