//! The native protocol from hello to goodbye, against a device of the test's own.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::time::{Duration, Instant};

use rvpn_gateway::meter::{DropReason, Totals};
use rvpn_lab::packet;
use rvpn_proto::control::{self, Hello, Message, Resolve, Stage, Stats, Welcome};
use rvpn_proto::record::{Offload, Reader, append, gso_type};
use session_support::fake_helper::{PATIENCE, SlotState};
use session_support::lab::Lab;
use session_support::wire::Client;

const INNER4: &str = "10.64.0.2";
const INNER6: &str = "fd00:1234:5678::1";
const FAR4: &str = "1.1.1.1";
const FAR6: &str = "2606:4700:4700::1111";

fn hello(instance: &str) -> Hello {
    Hello {
        versions: vec![1],
        name: "test".to_owned(),
        instance: instance.to_owned(),
        capabilities: vec![control::OFFLOAD.to_owned()],
        ..Hello::default()
    }
}

async fn say(client: &mut Client, message: &Message) {
    let text = message.to_text(Stage::BeforeLogin).unwrap();
    client
        .send(tokio_tungstenite::tungstenite::Message::text(text))
        .await;
}

async fn hear(client: &mut Client) -> Message {
    Message::parse(&client.text().await, Stage::Session).unwrap()
}

/// A client that has been welcomed.
async fn join(lab: &Lab, hello: Hello) -> (Client, Welcome) {
    let mut client = lab.admit(lab.guest()).await;
    say(&mut client, &Message::Hello(hello)).await;
    match hear(&mut client).await {
        Message::Welcome(welcome) => (client, *welcome),
        other => panic!("{other:?} in place of a welcome"),
    }
}

async fn send(client: &mut Client, packets: &[(&[u8], Offload)]) {
    let mut message = Vec::new();
    for (packet, offload) in packets {
        append(&mut message, packet, *offload).unwrap();
    }
    client.send(message).await;
}

/// Packets until there are `count`.
async fn receive(client: &mut Client, count: usize) -> Vec<(Vec<u8>, Offload)> {
    let mut packets = Vec::new();
    while packets.len() < count {
        let message = client.data().await;
        for record in Reader::new(&message) {
            let record = record.unwrap();
            packets.push((record.packet.to_vec(), record.offload));
        }
    }
    packets
}

fn finished(packet: &[u8]) -> [(&[u8], Offload); 1] {
    [(packet, Offload::NONE)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_has_constant_addresses_inside_whatever_its_lease() {
    let lab = Lab::new(2).await;
    let (_first, _) = join(&lab, hello("laptop")).await;
    let (mut client, welcome) = join(&lab, hello("phone")).await;
    assert_eq!(welcome.v4.address.to_string(), INNER4);
    assert_eq!(welcome.v6.unwrap().address.to_string(), INNER6);
    assert_eq!((welcome.version, welcome.mtu), (1, 1500));
    assert!(!welcome.resumed && welcome.ticket.is_some());
    welcome
        .validate(&control::Policy {
            routes: true,
            default_route: true,
            ..control::Policy::default()
        })
        .unwrap();

    let device = lab.device(1);
    for (inner, lease, far) in [
        (INNER4, "10.64.1.2", FAR4),
        (INNER6, "fd00:1234:5678:1::1", FAR6),
    ] {
        let out = packet::udp(inner, 4000, far, 53, b"question");
        send(&mut client, &finished(&out)).await;
        assert_eq!(
            device.read(),
            packet::udp(lease, 4000, far, 53, b"question")
        );
        device.write(&packet::tcp((far, 80), (lease, 5000), ".", 7, 8, b"answer"));
        let back = packet::tcp((far, 80), (inner, 5000), ".", 7, 8, b"answer");
        assert_eq!(receive(&mut client, 1).await[0].0, back);
        let ping = packet::echo(inner, far, 1, 2, b"ping");
        send(&mut client, &finished(&ping)).await;
        assert_eq!(device.read(), packet::echo(lease, far, 1, 2, b"ping"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nat_10_errors_about_a_clients_packets_reach_it_in_its_own_terms() {
    let lab = Lab::new(2).await;
    let (_first, _) = join(&lab, hello("laptop")).await;
    let (mut client, _) = join(&lab, hello("phone")).await;
    let device = lab.device(1);
    let quoted = packet::udp("10.64.1.2", 4000, FAR4, 53, b"question");
    device.write(&packet::icmp4(FAR4, "10.64.1.2", 3, 3, &quoted));
    let (got, _) = receive(&mut client, 1).await.remove(0);
    let ours = packet::udp(INNER4, 4000, FAR4, 53, b"question");
    assert_eq!(got, packet::icmp4(FAR4, INNER4, 3, 3, &ours));

    let lease = "fd00:1234:5678:1::1";
    let theirs = packet::udp(lease, 4000, FAR6, 53, b"question");
    device.write(&packet::icmp6(FAR6, lease, 1, 4, &theirs));
    let (got, _) = receive(&mut client, 1).await.remove(0);
    let ours = packet::udp(INNER6, 4000, FAR6, 53, b"question");
    // The quoted transport sum too is what it was when the client sent it.
    let expected = packet::icmp6(FAR6, INNER6, 1, 4, &ours);
    assert_eq!(got, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn spf_23_what_a_client_may_not_send_is_counted_and_goes_nowhere() {
    let lab = Lab::new(1).await;
    let (mut client, _) = join(&lab, hello("phone")).await;
    let device = lab.device(0);
    let good = packet::udp(INNER4, 1, FAR4, 2, b"fence");
    let mut trailing = good.clone();
    trailing.extend([9; 20]);
    let mut long = good.clone();
    long[2..4].copy_from_slice(&4000_u16.to_be_bytes());
    packet::fix_header(&mut long);
    let mut bad_sum = good.clone();
    bad_sum[10] ^= 1;
    let big = packet::udp(INNER4, 1, FAR4, 2, &[0; 1473]);
    let refused = [
        (
            packet::udp("10.64.0.3", 1, FAR4, 2, b""),
            DropReason::Spoofed,
        ),
        (packet::udp("fd00::9", 1, FAR6, 2, b""), DropReason::Spoofed),
        (
            packet::udp(INNER4, 1, "224.0.0.1", 2, b""),
            DropReason::Address,
        ),
        (
            packet::udp(INNER6, 1, "ff02::1", 2, b""),
            DropReason::Address,
        ),
        (
            packet::raw4(INNER4, FAR4, 132, &[], &[0; 20]),
            DropReason::Protocol,
        ),
        (
            packet::raw6(INNER6, FAR6, 41, &[0; 40]),
            DropReason::Protocol,
        ),
        (
            packet::raw4(INNER4, FAR4, 17, &[1; 4], &[0; 8]),
            DropReason::Options,
        ),
        (packet::raw6(INNER6, FAR6, 0, &[0; 16]), DropReason::Options),
        (packet::with_ttl(good.clone(), 0), DropReason::HopLimit),
        (bad_sum, DropReason::Checksum),
        (long, DropReason::Malformed),
        (vec![0x45], DropReason::Malformed),
        (vec![0x52; 40], DropReason::Malformed),
        (big, DropReason::TooBig),
    ];
    let mut expected = Totals::default();
    for (bytes, reason) in &refused {
        send(&mut client, &finished(bytes)).await;
        expected.outbound.drop(*reason, 1);
    }
    let gso = Offload {
        partial: true,
        gso_type: gso_type::TCP_V4,
        gso_size: 1400,
    };
    // A super-packet of TCP must be TCP.
    send(&mut client, &[(&good, gso)]).await;
    expected.outbound.drop(DropReason::Offload, 1);
    // Bytes behind the packet are cut, not counted and not refused.
    send(&mut client, &finished(&trailing)).await;
    assert_eq!(device.read(), good, "nothing before it got through");
    expected.outbound.pass(1, good.len() as u64);

    say(&mut client, &Message::Stats(Stats::default())).await;
    let Message::Stats(stats) = hear(&mut client).await else {
        panic!("no stats")
    };
    let counted = stats.outbound.unwrap();
    assert_eq!(counted.dropped, refused.len() as u64 + 1);
    assert_eq!((counted.packets, counted.payload), (1, good.len() as u64));
    let id = lab.only_session();
    drop(client);
    let totals = lab.ended(id).await;
    assert_eq!(totals.outbound.drops, expected.outbound.drops);
}

#[tokio::test(flavor = "multi_thread")]
async fn super_packets_cross_whole_and_their_headers_are_ours() {
    let lab = Lab::new(2).await;
    let (_first, _) = join(&lab, hello("laptop")).await;
    let (mut client, welcome) = join(&lab, hello("phone")).await;
    assert_eq!(welcome.capabilities, [control::OFFLOAD]);
    let device = lab.device(1);
    let payload: Vec<u8> = (0..60_000_u32).map(|n| n as u8).collect();
    let gso = Offload {
        partial: true,
        gso_type: gso_type::TCP_V4,
        gso_size: 1448,
    };
    let mut packet = packet::tcp((INNER4, 4000), (FAR4, 80), ".", 1, 1, &payload);
    partial(&mut packet);
    send(&mut client, &[(&packet, gso)]).await;
    let read = device.read_whole();
    let mut expected = packet::tcp(("10.64.1.2", 4000), (FAR4, 80), ".", 1, 1, &payload);
    partial(&mut expected);
    assert_eq!(read[10..], expected);
    // NEEDS_CSUM, TCPV4, 40 bytes of headers, 1448 a segment, sum from 20 at 16.
    assert_eq!(read[..10], [1, 1, 40, 0, 0xa8, 5, 20, 0, 16, 0]);

    let mut answer = packet::tcp((FAR4, 80), ("10.64.1.2", 4000), ".", 1, 1, &payload);
    partial(&mut answer);
    device.write_whole([1, 1, 40, 0, 0xa8, 5, 20, 0, 16, 0], &answer);
    let (got, offload) = receive(&mut client, 1).await.remove(0);
    let mut back = packet::tcp((FAR4, 80), (INNER4, 4000), ".", 1, 1, &payload);
    partial(&mut back);
    assert_eq!((got, offload), (back, gso));
    lab.counted(60_000 + 42 * 40, 60_000 + 42 * 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_offload_gets_finished_segments() {
    let lab = Lab::new(1).await;
    let plain = Hello {
        capabilities: Vec::new(),
        ..hello("browser")
    };
    let (mut client, welcome) = join(&lab, plain).await;
    assert!(welcome.capabilities.is_empty());
    let device = lab.device(0);
    let payload: Vec<u8> = (0..20_000_u32).map(|n| (n / 7) as u8).collect();
    for (far, inner, kind, headers) in [(FAR4, INNER4, 1, 40_usize), (FAR6, INNER6, 4, 60)] {
        let mut packet = packet::tcp((far, 80), (inner, 4000), "P.F", 1000, 1, &payload);
        partial(&mut packet);
        let l4 = (headers - 20) as u8;
        device.write_whole([1, kind, headers as u8, 0, 0xe8, 3, l4, 0, 16, 0], &packet);
        let segments = receive(&mut client, 20).await;
        for (n, (segment, offload)) in segments.iter().enumerate() {
            assert_eq!(*offload, Offload::NONE);
            let last = if n == 19 { "P.F" } else { "." };
            let seq = 1000 + 1000 * n as u32;
            let body = &payload[1000 * n..1000 * (n + 1)];
            let mut expected = packet::tcp((far, 80), (inner, 4000), last, seq, 1, body);
            if kind == 1 {
                // The kernel numbers the segments of one packet on.
                expected[4..6].copy_from_slice(&(n as u16).to_be_bytes());
                packet::fix_header(&mut expected);
            }
            assert_eq!(*segment, expected, "segment {n} from {far}");
        }
    }
    let mut datagrams = packet::udp(FAR4, 53, INNER4, 4000, &payload[..3000]);
    let sum = pseudo_sum(&datagrams, 17);
    datagrams[26..28].copy_from_slice(&sum.to_be_bytes());
    device.write_whole([1, 5, 28, 0, 0xe8, 3, 20, 0, 6, 0], &datagrams);
    for (n, (datagram, _)) in receive(&mut client, 3).await.iter().enumerate() {
        let body = &payload[1000 * n..1000 * (n + 1)];
        let mut expected = packet::udp(FAR4, 53, INNER4, 4000, body);
        expected[4..6].copy_from_slice(&(n as u16).to_be_bytes());
        packet::fix_header(&mut expected);
        assert_eq!(*datagram, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn aut_20_a_ticket_leads_back_to_the_lease_and_only_once() {
    let lab = Lab::new(3).await;
    let (client, welcome) = join(&lab, hello("phone")).await;
    let first = welcome.ticket.unwrap().ticket;
    drop(client);
    lab.fake.await_slot(0, SlotState::Lingering);
    // Another installation with the ticket has the lease all the same: it is the account's.
    let with = |ticket: &str, name: &str| Hello {
        ticket: Some(ticket.to_owned()),
        ..hello(name)
    };
    let (mut client, welcome) = join(&lab, with(&first, "other")).await;
    assert!(welcome.resumed);
    let second = welcome.ticket.unwrap().ticket;
    // Heard from, so the ticket before is spent.
    say(&mut client, &Message::Stats(Stats::default())).await;
    hear(&mut client).await;
    drop(client);
    lab.fake.await_slot(0, SlotState::Lingering);
    let (_thief, welcome) = join(&lab, with(&first, "third")).await;
    assert!(!welcome.resumed);
    assert_eq!(lab.fake.slot(0).0, SlotState::Lingering);

    let (mut client, welcome) = join(&lab, with(&second, "other")).await;
    assert!(welcome.resumed);
    let third = welcome.ticket.unwrap().ticket;
    let goodbye = control::Goodbye {
        code: 1000,
        text: String::new(),
        retry_after_ms: None,
    };
    say(&mut client, &Message::Goodbye(goodbye)).await;
    client.close_frame().await;
    lab.fake.await_slot(0, SlotState::Free);
    let (_late, welcome) = join(&lab, with(&third, "other")).await;
    assert!(!welcome.resumed);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_installation_takes_over_at_once() {
    let lab = Lab::new(2).await;
    let (mut first, _) = join(&lab, hello("phone")).await;
    let device = lab.device(0);
    let (mut second, _) = join(&lab, hello("phone")).await;
    let Message::Goodbye(goodbye) = hear(&mut first).await else {
        panic!("no goodbye")
    };
    assert_eq!((goodbye.code, goodbye.retry_after_ms), (1000, None));
    let out = packet::udp(INNER4, 1, FAR4, 2, b"x");
    send(&mut second, &finished(&out)).await;
    assert_eq!(device.read(), out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_says_goodbye_with_a_time() {
    let lab = Lab::new(1).await;
    let (_first, _) = join(&lab, hello("laptop")).await;
    let asked = Instant::now();
    let mut second = lab.admit(lab.guest()).await;
    say(&mut second, &Message::Hello(hello("phone"))).await;
    let Message::Goodbye(goodbye) = hear(&mut second).await else {
        panic!("no goodbye")
    };
    assert_eq!((goodbye.code, goodbye.retry_after_ms), (1013, Some(2000)));
    assert_eq!(second.close_frame().await.0, 1013);
    assert!(asked.elapsed() < Duration::from_millis(100));
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_in_place_of_a_hello_is_sent_away() {
    use tokio_tungstenite::tungstenite::Message as Ws;
    let lab = Lab::new(1).await;
    let future = Hello {
        versions: vec![77],
        ..hello("phone")
    };
    let future = Message::Hello(future).to_text(Stage::BeforeLogin).unwrap();
    let padded = format!("{{\"kind\":\"hello\",\"x\":\"{}\"}}", "y".repeat(5000));
    let deep = format!("{{\"kind\":\"hello\",\"x\":{}", "[".repeat(3000));
    for (message, code) in [
        (Ws::text("hello"), 1008),
        (Ws::text("{\"kind\":\"hello\"}"), 1008),
        (Ws::text("{\"kind\":\"stats\"}"), 1008),
        (Ws::text(padded), 1008),
        (Ws::text(deep), 1008),
        (Ws::text(future), 1002),
        (Ws::binary(vec![1, 2, 3]), 1008),
    ] {
        let mut client = lab.admit(lab.guest()).await;
        client.send(message).await;
        assert_eq!(client.close_frame().await.0, code);
    }
    assert!(!lab.fake.log().contains(&rvpn_ipc::Op::Acquire));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_answers_what_it_knows_and_refuses_what_it_does_not() {
    use tokio_tungstenite::tungstenite::Message as Ws;
    let lab = Lab::new(1).await;
    let (mut client, _) = join(&lab, hello("phone")).await;
    client.send(Ws::text("{\"kind\":\"dance\"}")).await;
    let Message::Error(error) = hear(&mut client).await else {
        panic!("no error")
    };
    assert_eq!(error.code, "unknown-kind");
    let question = Resolve {
        id: 7,
        name: "localhost".to_owned(),
    };
    say(&mut client, &Message::Resolve(question)).await;
    let Message::Resolved(resolved) = hear(&mut client).await else {
        panic!("no answer")
    };
    assert_eq!(resolved.id, 7);
    assert!(
        resolved.addresses.is_empty(),
        "our own addresses are not told"
    );
    assert!(resolved.error.is_some());
    client.send(vec![0; 8]).await;
    let Message::Goodbye(goodbye) = hear(&mut client).await else {
        panic!("no goodbye")
    };
    assert_eq!(
        (goodbye.code, goodbye.text.as_str()),
        (1008, "malformed record")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_loses_packets_and_nobody_else_does() {
    let lab = Lab::new(2).await;
    let (stalled, _) = join(&lab, hello("stalled")).await;
    let (mut other, _) = join(&lab, hello("other")).await;
    let (flooded, quiet) = (lab.device(0), lab.device(1));
    let big = packet::udp(FAR4, 53, INNER4, 4000, &[7; 1400]);
    let deadline = Instant::now() + PATIENCE;
    let dropped = || {
        let list = lab.shared.list();
        let view = list.iter().find(|v| v.card.slot == Some(0)).unwrap();
        view.totals.inbound.drops[DropReason::Overload as usize]
    };
    while dropped() == 0 {
        assert!(Instant::now() < deadline, "no drop was counted");
        for _ in 0..64 {
            flooded.write(&big);
        }
    }
    let small = packet::udp(FAR4, 53, "10.64.1.2", 4000, b"still here");
    quiet.write(&small);
    let back = packet::udp(FAR4, 53, INNER4, 4000, b"still here");
    assert_eq!(receive(&mut other, 1).await[0].0, back);
    drop(stalled);
    lab.fake.await_slot(0, SlotState::Lingering);
}

/// The sum of the pseudo-header, as a partial checksum field holds it.
fn pseudo_sum(packet: &[u8], protocol: u8) -> u16 {
    let (addresses, l4) = if packet[0] >> 4 == 4 {
        (12..20, 20)
    } else {
        (8..40, 40)
    };
    let mut pseudo = packet[addresses].to_vec();
    let len = u32::try_from(packet.len() - l4).unwrap();
    pseudo.extend(len.to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    !packet::checksum(&pseudo)
}

/// Leaves a TCP packet's checksum as a kernel with offload does.
fn partial(packet: &mut [u8]) {
    let l4 = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let sum = pseudo_sum(packet, 6);
    packet[l4 + 16..l4 + 18].copy_from_slice(&sum.to_be_bytes());
}
