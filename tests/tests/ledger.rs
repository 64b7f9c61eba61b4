//! What the gateway counts against traffic that is known to the byte.

use std::net::UdpSocket;

use nix::sys::socket::{setsockopt, sockopt};
use rvpn_lab::scene::{PORT, Scene, drops, number};
use rvpn_lab::sums;
use rvpn_lab::tcp_watch::TcpWatch;
use rvpn_lab::topology::{GW4, UP4, UP6};
use rvpn_lab::tunnel_client::{Session, Speech, on};
use rvpn_lab::{PATIENCE, packet, wait_until};
use rvpn_proto::packet::grammar::Rng;
use rvpn_proto::record::{Offload, gso_type};
use serde_json::{Value, json};

/// Together they are the 20,000 datagrams of a kind of client.
const VOLLEYS: usize = 313;
/// So many of the largest fit into a socket's buffer.
const VOLLEY: usize = 32;

/// Packets and bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    packets: u64,
    payload: u64,
}

impl Sum {
    fn add(&mut self, length: usize) {
        self.packets += 1;
        self.payload += length as u64;
    }

    fn of(direction: &Value) -> Sum {
        Sum {
            packets: number(&direction["packets"]),
            payload: number(&direction["payload"]),
        }
    }
}

/// The rows of a live session and of the ledger agree with what was sent and
/// with what was on the wire.
fn settle(
    scene: &Scene,
    account: &str,
    session: Session,
    watch: &TcpWatch,
    [out, back]: [Sum; 2],
) -> Value {
    let (mut row, mut wire) = (Value::Null, [0; 2]);
    wait_until("the wire's bytes are those of the capture", || {
        (row, wire) = (scene.row(account), watch.payload(session.local.port()));
        let said = [&row["outbound"]["wire"], &row["inbound"]["wire"]].map(number);
        said == wire
    });
    assert!(wire.iter().all(|bytes| *bytes > 0));
    // A row that is read while it is written may have some of its figures from before.
    row = scene.row(account);
    assert_eq!(Sum::of(&row["outbound"]), out, "{row}");
    assert_eq!(Sum::of(&row["inbound"]), back, "{row}");
    drop(session);
    scene.deserted();
    let path = format!("/api/v1/usage?account={account}");
    let mut usage = Value::Null;
    wait_until("the session is closed in the ledger", || {
        let mut all = scene.gateway.api("GET", &path, &Value::Null);
        let rows = all["usage"].as_array_mut().expect("rows");
        let own = rows.iter_mut().find(|one| one["session"] == row["id"]);
        usage = own.map(Value::take).unwrap_or_default();
        usage["ended-ms"].is_u64()
    });
    assert_eq!(Sum::of(&usage["outbound"]), out, "{usage}");
    assert_eq!(Sum::of(&usage["inbound"]), back, "{usage}");
    // By now the connection's own end is counted as well.
    for (way, before) in [("outbound", wire[0]), ("inbound", wire[1])] {
        assert!(number(&usage[way]["wire"]) >= before, "{usage}");
    }
    usage
}

#[test]
fn int_03_known_traffic_of_every_kind_of_client_is_billed_to_the_byte() {
    let scene = Scene::default();
    let servers = scene.servers();
    let watch = TcpWatch::on(&scene.phone, 443);
    let native = [true, false].map(|offload| Speech::Native { offload });
    on(&scene.phone, async || {
        for (seed, speech) in (1..).zip(native.into_iter().chain(Speech::OLDER)) {
            println!("{speech:?}: seed {seed}");
            let mut rng = Rng::new(seed);
            let mut session = scene.session(speech, speech.kind()).await;
            let (mut out, mut back) = (Sum::default(), Sum::default());
            for n in 0..VOLLEYS {
                let v6 = speech.has_v6() && n % 2 == 1;
                let (up, server, header) = match v6 {
                    true => (UP6, &servers[1], 48),
                    false => (UP4, &servers[0], 28),
                };
                let own = session.source(up);
                let packets: Vec<Vec<u8>> = (0..VOLLEY)
                    .map(|_| {
                        let mut payload = vec![0; rng.below(1501 - header)];
                        rng.fill(&mut payload);
                        packet::udp(&own, 4000, up, PORT, &payload)
                    })
                    .collect();
                packets.iter().for_each(|p| out.add(p.len()));
                session.tx.feed_all(&packets).await;
                session.tx.flush().await;
                let from = arrived(server, header, &packets);
                for _ in 0..VOLLEY {
                    let size = rng.below(1501 - header);
                    server
                        .send_to(&vec![n.to_le_bytes()[0]; size], from)
                        .expect("send");
                    back.add(header + size);
                }
                let mut got = Sum::default();
                for _ in 0..VOLLEY {
                    got.add(session.rx.packet().await.len());
                }
                assert_eq!(got.packets, VOLLEY as u64);
            }
            assert_eq!(out.packets + back.packets, 2 * (VOLLEYS * VOLLEY) as u64);
            let row = scene.counted(speech.kind(), out.packets);
            assert!(drops(&row["outbound"]).is_empty(), "{row}");
            settle(&scene, speech.kind(), session, &watch, [out, back]);
        }
        let total: u64 = scene
            .gateway
            .api("GET", "/api/v1/usage/accounts", &Value::Null)["accounts"]
            .as_array()
            .expect("accounts")
            .iter()
            .map(|row| number(&row["outbound"]["packets"]))
            .sum();
        assert_eq!(total, 6 * (VOLLEYS * VOLLEY) as u64);
    });
}

/// The server gets exactly these datagrams in this order.
fn arrived(server: &UdpSocket, header: usize, packets: &[Vec<u8>]) -> std::net::SocketAddr {
    let mut buf = [0; 2048];
    let mut whence = None;
    for packet in packets {
        let (n, from) = server.recv_from(&mut buf).expect("a datagram");
        assert_eq!(buf[..n], packet[header..]);
        whence = Some(from);
    }
    whence.expect("some")
}

#[test]
fn int_03_a_super_packet_is_billed_as_its_segments() {
    let scene = Scene::default();
    let [server, server6] = scene.servers();
    let watch = TcpWatch::on(&scene.phone, 443);
    let listener = scene.lab.up.tcp(&format!("{UP4}:80"));
    on(&scene.phone, async || {
        let native = Speech::Native { offload: true };
        let mut session = scene.session(native, "native").await;
        let (mut out, mut back) = (Sum::default(), Sum::default());

        // UDP, cut by the kernels into datagrams of 1200 bytes and a shorter one.
        for (server, up, header) in [(&server, UP4, 28), (&server6, UP6, 48)] {
            for segments in [2, 7, 40] {
                let payload: Vec<u8> = (0..1200 * segments - 11_u32)
                    .map(|n| n.to_le_bytes()[1])
                    .collect();
                let own = session.source(up);
                let mut whole = packet::udp(&own, 4000, up, PORT, &payload);
                let offload = Offload {
                    partial: true,
                    gso_type: gso_type::UDP_L4,
                    gso_size: 1200,
                };
                sums::make_partial(&mut whole);
                session.tx.feed(&whole, offload).await;
                session.tx.flush().await;
                let mut from = None;
                let mut buf = [0; 2048];
                for part in payload.chunks(1200) {
                    let (n, whence) = server.recv_from(&mut buf).expect("a datagram");
                    assert_eq!(buf[..n], *part);
                    out.add(header + part.len());
                    from = Some(whence);
                }
                // And back, as one write of the server's.
                setsockopt(server, sockopt::UdpGsoSegment, &1000).expect("UDP_SEGMENT");
                server.send_to(&payload, from.expect("some")).expect("send");
                setsockopt(server, sockopt::UdpGsoSegment, &0).expect("UDP_SEGMENT");
                let mut have = 0;
                while have < payload.len() {
                    let (got, offload) = session.rx.packet_with().await;
                    let data = &got[header..];
                    let step = if offload.gso_size == 0 {
                        data.len()
                    } else {
                        offload.gso_size.into()
                    };
                    for part in data.chunks(step) {
                        assert_eq!(*part, payload[have..have + part.len()]);
                        back.add(header + part.len());
                        have += part.len();
                    }
                }
            }
        }

        // TCP, spoken by hand.
        let own = session.v4.to_string();
        let segment = |flags: &str, seq, ack, data: &[u8]| {
            packet::tcp((&own, 4000), (UP4, 80), flags, seq, ack, data)
        };
        let syn = segment("S", 1000, 0, b"");
        out.add(syn.len());
        session.tx.send(&syn).await;
        let (answer, _) = session.rx.packet_with().await;
        back.add(answer.len());
        let theirs = u32::from_be_bytes(answer[24..28].try_into().expect("four")) + 1;
        let data: Vec<u8> = (0..20 * 1400 - 100_u32)
            .map(|n| n.to_le_bytes()[0])
            .collect();
        let mut whole = segment(".P", 1001, theirs, &data);
        sums::make_partial(&mut whole);
        let offload = Offload {
            partial: true,
            gso_type: gso_type::TCP_V4,
            gso_size: 1400,
        };
        session.tx.feed(&whole, offload).await;
        session.tx.flush().await;
        data.chunks(1400).for_each(|part| out.add(40 + part.len()));
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut got = vec![0; data.len()];
        std::io::Read::read_exact(&mut stream, &mut got).expect("all of it");
        assert_eq!(got, data);
        std::io::Write::write_all(&mut stream, &data[..5000]).expect("write");
        // No more than is sent before an acknowledgment.
        let mut have = vec![false; 5000];
        let mut supers = 0;
        while have.contains(&false) {
            let (got, offload) = session.rx.packet_with().await;
            let header = 20 + usize::from(got[32] >> 4) * 4;
            let seq = u32::from_be_bytes(got[24..28].try_into().expect("four"));
            let at = usize::try_from(seq.wrapping_sub(theirs)).expect("offset");
            let body = &got[header..];
            if !body.is_empty() {
                assert_eq!(*body, data[at..at + body.len()]);
                have[at..at + body.len()].fill(true);
            }
            let step = match offload.gso_size {
                0 => body.len().max(1),
                size => {
                    supers += 1;
                    size.into()
                }
            };
            for part in body.chunks(step) {
                back.add(header + part.len());
            }
            if body.is_empty() {
                back.add(header);
            }
        }
        assert!(supers > 0, "the kernel cut everything itself");
        let end = u32::try_from(1001 + data.len()).expect("a number");
        let reset = segment("R.", end, theirs + 5000, b"");
        out.add(reset.len());
        session.tx.send(&reset).await;
        // Whatever the server sent again before it heard of that.
        for late in rvpn_lab::scene::received(&mut session).await {
            back.add(late.len());
        }
        // The echo that ended the wait.
        out.add(28 + 16);
        back.add(28 + 16);
        scene.counted("native", out.packets);
        settle(&scene, "native", session, &watch, [out, back]);
    });
}

#[test]
fn int_05_what_is_dropped_is_counted_apart_and_not_billed() {
    let scene = Scene::default();
    let [server, _] = scene.servers();
    let watch = TcpWatch::on(&scene.phone, 443);
    let native = [true, false].map(|offload| Speech::Native { offload });
    on(&scene.phone, async || {
        for speech in native.into_iter().chain([Speech::Text46, Speech::Padded]) {
            let mut session = scene.session(speech, speech.kind()).await;
            let own = session.v4.to_string();
            let (mut out, mut wrong) = (Sum::default(), [0_u64; 4]);
            let mut rng = Rng::new(7);
            for n in 0..2000_usize {
                let payload = vec![n.to_le_bytes()[0]; rng.below(1400)];
                let good = packet::udp(&own, 4000, UP4, PORT, &payload);
                let bad = match rng.below(8) {
                    0 => packet::udp(GW4, 4000, UP4, PORT, &payload),
                    1 => {
                        let mut bad = good.clone();
                        bad[10] ^= 1;
                        bad
                    }
                    2 => packet::raw4(&own, UP4, 47, &[], &payload),
                    3 => packet::udp(&own, 4000, "224.0.0.9", PORT, &payload),
                    _ => {
                        out.add(good.len());
                        session.tx.send(&good).await;
                        rvpn_lab::scene::expect_datagram(&server, &payload);
                        continue;
                    }
                };
                let kind = match (bad[9], bad[12], bad[16]) {
                    (47, ..) => 2,
                    (_, 1, _) => 0,
                    (.., 224) => 3,
                    _ => 1,
                };
                wrong[kind] += 1;
                session.tx.send(&bad).await;
            }
            let expected = json!({"spoofed": wrong[0], "checksum": wrong[1], "protocol": wrong[2], "address": wrong[3]});
            let row = scene.counted(speech.kind(), 2000);
            assert_eq!(row["outbound"]["drops"], expected);
            let usage = settle(
                &scene,
                speech.kind(),
                session,
                &watch,
                [out, Sum::default()],
            );
            assert_eq!(usage["outbound"]["drops"], expected, "in the ledger");
            assert_eq!(usage["inbound"]["drops"], json!({}));
        }
    });
}
