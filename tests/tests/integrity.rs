//! What comes out of the tunnel is what went in.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rvpn_lab::bulk::{Way, start};
use rvpn_lab::capture::{Capture, drain_udp};
use rvpn_lab::machine::Machine;
use rvpn_lab::raw::{Feature, feature};
use rvpn_lab::read_back::{bad_sums, ip_json};
use rvpn_lab::scene::{PORT, Scene, drops, number};
use rvpn_lab::topology::{UP4, UP6, at};
use rvpn_lab::tunnel_client::{Event, Session, Speech, on};
use rvpn_lab::{Gateway, Helper, Lab, Ns, PATIENCE, packet, sums, wait_within};
use rvpn_proto::packet::grammar::Rng;
use rvpn_proto::record::Offload;
use serde_json::Value;
use tokio::time::timeout;

/// So many of the largest fit into a socket's buffer.
const VOLLEY: u32 = 32;

/// One way of a test, over either family.
struct Road<'a> {
    up: &'a str,
    server: &'a UdpSocket,
    /// Bytes of the headers of a datagram.
    header: usize,
}

fn roads(servers: &[UdpSocket; 2]) -> [Road<'_>; 2] {
    let road = |up, n: usize, header| Road {
        up,
        server: &servers[n],
        header,
    };
    [road(UP4, 0, 28), road(UP6, 1, 48)]
}

#[test]
fn int_12_numbered_datagrams_arrive_once_and_in_order() {
    const ALL: u32 = 100_000;
    let scene = Scene::default();
    let servers = scene.servers();
    on(&scene.phone, async || {
        for (speech, road) in [Speech::Native { offload: true }, Speech::Padded]
            .into_iter()
            .zip(roads(&servers))
        {
            let account = speech.kind();
            let mut session = scene.session(speech, account).await;
            let own = session.source(road.up);
            let mut buf = [0; 64];
            let mut whence = None;
            let numbers = || (0..ALL / VOLLEY).map(|n| n * VOLLEY..(n + 1) * VOLLEY);
            for volley in numbers() {
                let packets: Vec<_> = volley
                    .clone()
                    .map(|n| packet::udp(&own, 4000, road.up, PORT, &n.to_be_bytes()))
                    .collect();
                session.tx.feed_all(&packets).await;
                session.tx.flush().await;
                for n in volley {
                    let (len, from) = road.server.recv_from(&mut buf).expect("a datagram");
                    assert_eq!(buf[..len], n.to_be_bytes());
                    whence = Some(from);
                }
            }
            let whence = whence.expect("some came");
            for volley in numbers() {
                for n in volley.clone() {
                    road.server.send_to(&n.to_be_bytes(), whence).expect("send");
                }
                for n in volley {
                    let got = session.rx.packet().await;
                    assert_eq!(got[road.header..], n.to_be_bytes());
                }
            }
            assert_eq!(drain_udp(road.server).len(), 0, "something came twice");
            let row = scene.counted(account, ALL.into());
            for way in ["outbound", "inbound"] {
                assert_eq!(number(&row[way]["packets"]), u64::from(ALL), "{row}");
                assert!(drops(&row[way]).is_empty(), "{row}");
            }
        }
    });
}

#[test]
fn int_12_what_a_burst_loses_is_counted_and_the_rest_in_order() {
    const ALL: u32 = 20_000;
    let scene = Scene::default();
    let servers = scene.servers();
    let [road, _] = roads(&servers);
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Text46, "alice").await;
        let own = session.v4.to_string();
        let hello = packet::udp(&own, 4000, UP4, PORT, b"hello");
        session.tx.send(&hello).await;
        let from = rvpn_lab::scene::expect_datagram(road.server, b"hello");
        let device = format!("rv{}", scene.row("alice")["slot"]);
        // As fast as it goes, with nobody reading meanwhile.
        let mut payload = vec![0; 1400];
        for n in 0..ALL {
            payload[..4].copy_from_slice(&n.to_be_bytes());
            road.server.send_to(&payload, from).expect("send");
        }
        let (mut last, mut got) = (None, 0_u64);
        let begun = Instant::now();
        let (mut lost, mut full);
        loop {
            let event = timeout(Duration::from_millis(20), session.rx.wait()).await;
            if let Ok(Event::Packet(packet, _)) = event {
                let n = u32::from_be_bytes(packet[28..32].try_into().expect("four"));
                assert!(last.is_none_or(|last| last < n), "{n} after {last:?}");
                last = Some(n);
                got += 1;
                continue;
            }
            let row = scene.row("alice");
            lost = drops(&row["inbound"]).values().sum::<u64>();
            // What the device had no room for never reached the gateway.
            let link = ip_json(&scene.lab.gw, &format!("-s link show {device}"));
            full = number(&link[0]["stats64"]["tx"]["dropped"]);
            let all = got + lost + full;
            assert!(all <= ALL.into(), "{got} came, {lost} and {full} dropped");
            if all == u64::from(ALL) {
                break;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{got} came, {lost} and {full} dropped"
            );
        }
        println!("{got} came, {lost} dropped by the queue, {full} by the device");
        assert!(got > 0 && lost > 0);
    });
}

/// Nobody after these machines computes a sum for them.
fn whole_sums_on_the_wire(lab: &Lab) {
    for ns in [&lab.gw, &lab.up] {
        let socket = ns.udp("0.0.0.0:0");
        feature(socket.as_fd(), "wan0", Feature::Checksums, false).expect("checksums by software");
    }
}

#[test]
fn int_13_no_bad_checksum_upstream_or_at_the_client() {
    const VOLLEYS: u32 = 200;
    let scene = Scene::default();
    whole_sums_on_the_wire(&scene.lab);
    let servers = scene.servers();
    let listener = scene.lab.up.tcp(&format!("{UP4}:80"));
    let mut wire = Capture::on(&scene.lab.up);
    let native = [true, false].map(|offload| Speech::Native { offload });
    let (mut upstream, mut clients) = (0, 0);
    on(&scene.phone, async || {
        for (seed, speech) in (1..).zip(native.into_iter().chain(Speech::OLDER)) {
            println!("{speech:?}: seed {seed}");
            let mut rng = Rng::new(seed);
            let mut session = scene.session(speech, speech.kind()).await;
            let offload = speech == Speech::Native { offload: true };
            for n in 0..VOLLEYS {
                for road in &roads(&servers) {
                    if road.header == 48 && !speech.has_v6() {
                        continue;
                    }
                    let own = session.source(road.up);
                    let mut payload = vec![0; rng.below(1400)];
                    rng.fill(&mut payload);
                    // Answered: by the server, by the kernel as echo, error and reset.
                    let port = 4000 + rng.word() % 8;
                    let mut asks = vec![
                        packet::udp(&own, port, road.up, PORT, &payload),
                        packet::echo(&own, road.up, port, 1, &payload),
                        packet::tcp((&own, 5000 + rng.word() % 8), (road.up, 81), "S", n, 0, b""),
                    ];
                    if n % 8 == 0 {
                        asks.push(packet::udp(&own, port, road.up, 9, &payload));
                    }
                    for ask in asks {
                        send(&mut session, ask, offload && rng.one_in(2)).await;
                    }
                    let (len, from) = road.server.recv_from(&mut [0; 2048]).expect("a datagram");
                    assert_eq!(len, payload.len());
                    road.server.send_to(&payload, from).expect("answer");
                    // The answers to the three kinds; errors are rarer, the kernel limits them.
                    let mut missing = vec![17, 6, if road.header == 28 { 1 } else { 58 }];
                    while !missing.is_empty() {
                        let (packet, offload) = session.rx.packet_with().await;
                        let wrong = match offload.partial {
                            true => (!sums::is_partial(&packet)).then_some("partial"),
                            false => sums::wrong(&packet),
                        };
                        assert_eq!(wrong, None, "{packet:02x?}");
                        clients += 1;
                        let kind = if road.header == 28 {
                            packet[9]
                        } else {
                            packet[6]
                        };
                        missing.retain(|k| *k != kind);
                    }
                }
            }
            for frame in wire.frames() {
                if matches!(frame[12..14], [8, 0] | [0x86, 0xdd]) {
                    assert_eq!(sums::wrong(&frame[14..]), None, "{frame:02x?}");
                    upstream += 1;
                }
            }
            wire.clear();
        }
    });
    drop(listener);
    println!("{upstream} upstream and {clients} at clients, all right");
    assert!(upstream > 10_000 && clients > 5_000, "{upstream} {clients}");
}

/// Through the real client, each packet seen on its way into the client's kernel
/// or out of it, and at the far side.
#[test]
fn int_13_files_and_datagrams_are_whole_and_their_sums_right_with_both_mtus() {
    const BYTES: u64 = 6 << 20;
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    whole_sums_on_the_wire(&lab);
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let mut wire = Capture::on(&lab.up);
    for mtu in [1500, 1280] {
        for offload in [true, false] {
            println!("MTU {mtu}, offload {offload}");
            let number = mtu.to_string();
            let words = ["--no-dns", "--interface", "tun9", "--mtu", &number];
            let more = if offload { &[][..] } else { &["--no-offload"] };
            let up = phone.up(&[&words, more].concat());
            let mut device = Capture::at(&phone.ns, "tun9");
            for (address, headers) in [(UP4, 28), (UP6, 48)] {
                for way in [Way::Upload, Way::Download] {
                    wire.clear();
                    start(&phone.ns, &lab.up, address, 9000, way, BYTES).whole(BYTES);
                    let (far, near) = (all_right(&mut wire, 14), all_right(&mut device, 0));
                    assert!(far.longest <= mtu, "{far:?}");
                    assert!(
                        far.bytes >= BYTES && near.bytes >= BYTES,
                        "{far:?} {near:?}"
                    );
                }
                volleys(&phone.ns, &lab.up, address, mtu - headers);
                let (far, near) = (all_right(&mut wire, 14), all_right(&mut device, 0));
                assert!(far.datagrams >= 2 * DATAGRAMS, "{far:?}");
                assert!(near.datagrams > 0 && far.longest == mtu, "{far:?} {near:?}");
            }
            up.down();
        }
    }
    for ns in [&phone.ns, &lab.up, &lab.gw] {
        assert_eq!(bad_sums(ns), 0, "{}", ns.name);
    }
}

/// The threads of a process by name, with the ticks of time each has used.
fn threads(pid: u32) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let ticks = |stat: String| {
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        let used = rest.split(' ').skip(11).take(2);
        Some((
            name.to_owned(),
            used.filter_map(|n| n.parse::<u64>().ok()).sum(),
        ))
    };
    tasks
        .filter_map(|task| ticks(fs::read_to_string(task.ok()?.path().join("stat")).ok()?))
        .collect()
}

/// Acknowledgements that another thread writes are counted like all else, at both ends.
#[test]
fn both_ends_count_alike_while_acknowledgements_go_aside() {
    const BYTES: u64 = 64 << 20;
    const MOST: usize = 40;
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "[session]\ncores = 2\n");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let up = phone.up(&["--no-dns", "--interface", "tun9"]);
    let used = |pid| {
        let all = threads(pid);
        let acks = all.iter().filter(|(name, _)| name.starts_with("rvpn-acks"));
        acks.map(|(_, ticks)| ticks).sum::<u64>()
    };
    // A thread that is given little may not have used a tick yet.
    for n in 0.. {
        for way in [Way::Upload, Way::Download] {
            start(&phone.ns, &lab.up, UP4, 9000, way, BYTES).whole(BYTES);
        }
        if used(up.half()) > 0 && used(gateway.pid()) > 0 {
            break;
        }
        assert!(
            n < MOST,
            "{:?} {:?}",
            threads(up.half()),
            threads(gateway.pid())
        );
    }
    let (mut here, mut there) = (Value::Null, Value::Null);
    // Soon, and not only with the next ping.
    wait_within(Duration::from_secs(5), "both ends count alike", || {
        (here, there) = (phone.status(), gateway.sessions().remove(0));
        ["outbound", "inbound"].iter().all(|way| {
            ["packets", "payload"]
                .iter()
                .all(|what| here[way][what] == there[way][what])
        })
    });
    for way in ["outbound", "inbound"] {
        assert!(number(&here[way]["payload"]) > BYTES, "{here}");
        assert_eq!(here[way]["dropped"], 0, "{here}");
    }
    up.down();
}

/// What a tap has seen.
#[derive(Debug, Default)]
struct Seen {
    bytes: u64,
    datagrams: u32,
    longest: usize,
}

/// Every checksum of what was seen is right, or partial where it is the kernel's
/// own business. Forgets it then.
fn all_right(tap: &mut Capture, link: usize) -> Seen {
    let mut seen = Seen::default();
    for frame in tap.frames() {
        if link > 0 && !matches!(frame[12..14], [8, 0] | [0x86, 0xdd]) {
            continue;
        }
        let packet = &frame[link..];
        let own = link == 0 && sums::is_partial(packet);
        let wrong = sums::wrong(packet).filter(|_| !own);
        assert_eq!(wrong, None, "{:02x?}", &packet[..packet.len().min(128)]);
        let protocol = if packet[0] >> 4 == 4 {
            packet[9]
        } else {
            packet[6]
        };
        seen.datagrams += u32::from(protocol == 17);
        seen.bytes += packet.len() as u64;
        seen.longest = seen.longest.max(packet.len());
    }
    tap.clear();
    seen
}

/// In [`volleys`], each way.
const DATAGRAMS: u32 = 512;

/// Datagrams of one size and of many, there and back, in order and unchanged.
fn volleys(near: &Ns, far: &Ns, address: &str, largest: usize) {
    let server = far.udp(&at(address, PORT));
    let any = if address == UP4 {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let client = near.udp(any);
    client.connect(at(address, PORT)).expect("connect");
    let mut rng = Rng::new(7);
    let mut buf = [0; 2048];
    for volley in 0..DATAGRAMS / VOLLEY {
        let bodies: Vec<_> = (0..VOLLEY)
            .map(|n| {
                let same = volley % 2 == 0;
                let size = if same { largest } else { rng.below(largest) };
                let mut body = vec![0; size.max(4)];
                rng.fill(&mut body);
                body[..4].copy_from_slice(&(volley * VOLLEY + n).to_be_bytes());
                body
            })
            .collect();
        let mut whence = None;
        for body in &bodies {
            client.send(body).expect("send");
        }
        for body in &bodies {
            let (len, from) = server.recv_from(&mut buf).expect("a datagram");
            assert_eq!(buf[..len], body[..]);
            whence = Some(from);
        }
        for body in &bodies {
            let back = server.send_to(body, whence.expect("some came"));
            back.expect("send");
        }
        for body in &bodies {
            let len = client.recv(&mut buf).expect("a datagram");
            assert_eq!(buf[..len], body[..]);
        }
    }
}

/// Sends a packet with its sum, or with as much of it as the kernel's own are sent with.
async fn send(session: &mut Session, mut packet: Vec<u8>, partial: bool) {
    let kind = if packet[0] >> 4 == 4 {
        packet[9]
    } else {
        packet[6]
    };
    let partial = partial && matches!(kind, 6 | 17);
    if partial {
        sums::make_partial(&mut packet);
    }
    let offload = Offload {
        partial,
        ..Offload::NONE
    };
    session.tx.feed(&packet, offload).await;
    session.tx.flush().await;
}

#[test]
fn int_14_every_size_of_packet_passes_byte_by_byte() {
    let scene = Scene::default();
    let servers = scene.servers();
    let native = [true, false].map(|offload| Speech::Native { offload });
    on(&scene.phone, async || {
        for speech in native.into_iter().chain(Speech::OLDER) {
            let account = speech.kind();
            let mut session = scene.session(speech, account).await;
            let mut counted = 0;
            let (mut too_short, mut too_big) = (0, 0);
            for road in &roads(&servers) {
                if road.header == 48 && !speech.has_v6() {
                    continue;
                }
                let own = session.source(road.up);
                let ip = road.header - 8;
                // Less than a whole UDP header: no packet of anybody.
                for size in ip..road.header {
                    let whole = packet::udp(&own, 4000, road.up, PORT, b"");
                    session.tx.send(&shortened(whole, size)).await;
                    (too_short, counted) = (too_short + 1, counted + 1);
                }
                for size in road.header..=1500 {
                    let body = pattern(size - road.header, size);
                    let out = packet::udp(&own, 4000, road.up, PORT, &body);
                    assert_eq!(out.len(), size);
                    session.tx.send(&out).await;
                    counted += 1;
                    let from = rvpn_lab::scene::expect_datagram(road.server, &body);
                    let back = pattern(size - road.header, size + 7);
                    road.server.send_to(&back, from).expect("answer");
                    let (got, offload) = session.rx.packet_with().await;
                    let mut got = got.to_vec();
                    if offload.partial {
                        sums::finish(&mut got);
                    }
                    let expected = packet::udp(road.up, PORT, &own, 4000, &back);
                    assert_eq!(got.len(), size);
                    // From the addresses on; what is before is the server's kernel's choice.
                    let addresses = if ip == 20 { 12 } else { 8 };
                    assert_eq!(got[addresses..], expected[addresses..], "{speech:?} {size}");
                    assert_eq!(sums::wrong(&got), None, "{speech:?} {size}");
                }
                let long = packet::udp(&own, 4000, road.up, PORT, &pattern(1501 - road.header, 0));
                session.tx.send(&long).await;
                (too_big, counted) = (too_big + 1, counted + 1);
                // A byte too many for one packet comes in two.
                over_the_mtu(&mut session, road, &own).await;
                counted += 1;
            }
            let row = scene.counted(account, counted);
            let dropped = drops(&row["outbound"]);
            assert_eq!(dropped["malformed"], too_short, "{row}");
            assert_eq!(dropped["too-big"], too_big, "{row}");
            assert_eq!(dropped.len(), 2, "{row}");
            assert!(drops(&row["inbound"]).is_empty(), "{row}");
            drop(session);
            scene.deserted();
            assert!(servers.iter().all(|s| drain_udp(s).is_empty()));
        }
    });
}

/// The first bytes of a packet as a packet of its own.
fn shortened(mut whole: Vec<u8>, size: usize) -> Vec<u8> {
    whole.truncate(size);
    let short = |n: usize| u16::try_from(n).expect("a length").to_be_bytes();
    if whole[0] >> 4 == 4 {
        whole[2..4].copy_from_slice(&short(size));
        packet::fix_header(&mut whole);
    } else {
        whole[4..6].copy_from_slice(&short(size - 40));
    }
    whole
}

/// Bytes that differ from place to place and from packet to packet.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + seed).to_le_bytes()[0]).collect()
}

/// A datagram of MTU + 1 from the server: pieces that make the whole.
async fn over_the_mtu(session: &mut Session, road: &Road<'_>, own: &str) {
    let ask = packet::udp(own, 4000, road.up, PORT, b"?");
    session.tx.send(&ask).await;
    let from = rvpn_lab::scene::expect_datagram(road.server, b"?");
    let body = pattern(1501 - road.header, 3);
    road.server.send_to(&body, from).expect("answer");
    let mut whole = vec![0; body.len() + 8];
    let mut have = 0;
    while have < whole.len() {
        let piece = session.rx.packet().await;
        assert!(piece.len() <= 1500);
        let (at, data) = if road.header == 28 {
            let field = u16::from_be_bytes([piece[6], piece[7]]);
            (usize::from(field & 0x1fff) * 8, &piece[20..])
        } else {
            assert_eq!(piece[6], 44, "a fragment");
            let field = u16::from_be_bytes([piece[42], piece[43]]);
            (usize::from(field & 0xfff8), &piece[48..])
        };
        whole[at..at + data.len()].copy_from_slice(data);
        have += data.len();
    }
    assert_eq!(whole[8..], body);
}
