//! What happens to packets between a client's messages and its device, where
//! it is more than one packet at a time.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::sync::Arc;

use rvpn_gateway::admit::{Admission, Kind};
use rvpn_gateway::config;
use rvpn_gateway::meter::{DropReason, Totals};
use rvpn_gateway::tun::VIRTIO_LEN;
use rvpn_lab::packet;
use rvpn_proto::control::{self, Hello, Message, Stage};
use rvpn_proto::dialect::{Dialect, Padding};
use rvpn_proto::gso::{Segments, VirtioHeader};
use rvpn_proto::packet::parse;
use rvpn_proto::record::{Offload, Reader, append, gso_type};
use session_support::lab::{Device, Lab};
use session_support::wire::Client;

const INNER4: &str = "10.64.0.2";
const INNER6: &str = "fd00:1234:5678::1";
const FAR4: &str = "1.1.1.1";
const FAR6: &str = "2606:4700:4700::1111";

fn hello(capabilities: &[&str], mtu: Option<u16>) -> Hello {
    Hello {
        versions: vec![1],
        name: "test".to_owned(),
        instance: "phone".to_owned(),
        capabilities: capabilities.iter().map(|&c| c.to_owned()).collect(),
        mtu,
        ..Hello::default()
    }
}

async fn join(lab: &Lab, hello: Hello) -> Client {
    let mut client = lab.admit(lab.guest()).await;
    let text = Message::Hello(hello).to_text(Stage::BeforeLogin).unwrap();
    client
        .send(tokio_tungstenite::tungstenite::Message::text(text))
        .await;
    let answer = Message::parse(&client.text().await, Stage::Session).unwrap();
    assert!(matches!(answer, Message::Welcome(_)), "{answer:?}");
    client
}

async fn old(lab: &Lab, variant: Dialect) -> Client {
    let kind = Kind::Dialect(Arc::new(config::Dialect {
        path: "/tunnel".to_owned(),
        variant,
        account: None,
        anonymous: true,
        legacy: None,
        class: 0,
        padding: Padding::NONE,
    }));
    let guest = Admission {
        kind,
        anonymous: true,
        ..lab.guest()
    };
    let mut client = lab.admit(guest).await;
    lab.fake
        .await_slot(0, session_support::fake_helper::SlotState::Leased);
    if variant != Dialect::SnatRaw {
        client.next().await;
    }
    client
}

/// All packets in one message, so that they are one batch for sure.
async fn send(client: &mut Client, packets: &[Vec<u8>]) {
    let mut message = Vec::new();
    for packet in packets {
        append(&mut message, packet, Offload::NONE).unwrap();
    }
    client.send(message).await;
}

/// One write to the device, as the kernel understands it: its segments.
fn written(device: &Device) -> Vec<Vec<u8>> {
    let mut read = device.read_whole();
    let header = VirtioHeader::read(&read).unwrap();
    let packet = &mut read[VIRTIO_LEN..];
    let parsed = parse(packet).unwrap();
    assert!(header.describes(&parsed), "{header:?}");
    assert_eq!(parsed.len(), packet.len(), "nothing trails");
    let mut cut = Segments::new(packet, &parsed, header.offload()).unwrap();
    let mut all = Vec::new();
    while let Some(segment) = cut.cut() {
        all.push(segment.to_vec());
    }
    assert_eq!(cut.left(), 0);
    all
}

/// Packets of one flow in a row, TCP or UDP, each of so many payload bytes.
fn row(src: &str, far: &str, tcp: bool, count: u32, len: usize) -> Vec<Vec<u8>> {
    let of = |n: u32| {
        let payload: Vec<u8> = (0..len as u32).map(|at| (at * 31 + n * 7) as u8).collect();
        let mut packet = if tcp {
            packet::tcp((src, 4000), (far, 443), ".", n * len as u32, 1, &payload)
        } else {
            packet::udp(src, 4000, far, 443, &payload)
        };
        if packet[0] >> 4 == 4 {
            packet[4..6].copy_from_slice(&(n as u16 + 500).to_be_bytes());
            packet::fix_header(&mut packet);
        }
        packet
    };
    (0..count).map(of).collect()
}

fn bytes(packets: &[Vec<u8>]) -> u64 {
    packets.iter().map(|p| p.len() as u64).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_in_a_row_are_one_write_and_count_singly() {
    let lab = Lab::new(1).await;
    let mut client = join(&lab, hello(&[], None)).await;
    let device = lab.device(0);
    let lease6 = "fd00:1234:5678::1";
    let mut sent = 0;
    for (src, lease, far) in [(INNER4, "10.64.0.2", FAR4), (INNER6, lease6, FAR6)] {
        for tcp in [true, false] {
            let packets = row(src, far, tcp, 40, 1400);
            send(&mut client, &packets).await;
            assert_eq!(written(&device), row(lease, far, tcp, 40, 1400));
            sent += bytes(&packets);
        }
    }
    // A single one does not wait for a second.
    let single = row(INNER4, FAR4, true, 1, 1400);
    send(&mut client, &single).await;
    assert_eq!(written(&device), single);
    sent += bytes(&single);
    lab.counted(sent, 0).await;
    let id = lab.only_session();
    drop(client);
    let totals = lab.ended(id).await;
    assert_eq!((totals.outbound.packets, totals.drops()), (4 * 40 + 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn smaller_tunnels_get_and_give_what_fits_them() {
    for mtu in [1280, 1400] {
        let lab = Lab::new(1).await;
        let mut client = join(&lab, hello(&[], Some(mtu))).await;
        let device = lab.device(0);
        let fitting = usize::from(mtu) - 40;
        let packets = row(INNER4, FAR4, true, 30, fitting);
        send(&mut client, &packets).await;
        assert_eq!(written(&device), packets);
        send(&mut client, &row(INNER4, FAR4, true, 1, fitting + 1)).await;
        lab.dropped(0, DropReason::TooBig, 1).await;

        // What the kernel joined comes apart again, byte for byte.
        let answers = row(FAR4, INNER4, false, 20, fitting + 12);
        let mut whole = answers[0][..28].to_vec();
        for answer in &answers {
            whole.extend_from_slice(&answer[28..]);
        }
        let total = whole.len() as u16;
        whole[2..4].copy_from_slice(&total.to_be_bytes());
        whole[24..26].copy_from_slice(&(total - 20).to_be_bytes());
        packet::fix_header(&mut whole);
        let mut virtio = [1, 5, 28, 0, 0, 0, 20, 0, 6, 0];
        virtio[4..6].copy_from_slice(&(fitting as u16 + 12).to_le_bytes());
        device.write_whole(virtio, &whole);
        let mut got = Vec::new();
        while got.len() < answers.len() {
            let message = client.data().await;
            for record in Reader::new(&message) {
                let record = record.unwrap();
                assert_eq!(record.offload, Offload::NONE);
                got.push(record.packet.to_vec());
            }
        }
        assert_eq!(got, answers);
        lab.counted(bytes(&packets), bytes(&answers)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn older_clients_packets_arrive_in_order_however_they_are_joined() {
    for dialect in Dialect::ALL {
        let lab = Lab::new(1).await;
        let mut client = old(&lab, dialect).await;
        let device = lab.device(0);
        let mut packets = row("10.64.0.2", FAR4, true, 60, 1300);
        packets.extend(row("10.64.0.2", FAR4, false, 60, 1300));
        let mut got = Vec::new();
        // The test's device holds ten writes, so that is all that may be joined to one.
        for lot in packets.chunks(10) {
            for packet in lot {
                let message = if dialect == Dialect::Padded {
                    let mut message = (0x8000 | packet.len() as u16).to_be_bytes().to_vec();
                    message.extend_from_slice(packet);
                    message
                } else {
                    packet.clone()
                };
                client.send(message).await;
            }
            let wanted = got.len() + lot.len();
            while got.len() < wanted {
                got.extend(written(&device));
            }
        }
        assert_eq!(got, packets, "{dialect:?}");
        lab.counted(bytes(&packets), 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nat_12_fragments_pass_with_nothing_but_their_header_changed() {
    let lab = Lab::new(2).await;
    let _first = join(
        &lab,
        Hello {
            instance: "laptop".to_owned(),
            ..hello(&[], None)
        },
    )
    .await;
    let mut client = join(&lab, hello(&[], None)).await;
    let device = lab.device(1);
    let payload: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
    let four =
        |src: &str, dst: &str| packet::fragments(&packet::udp(src, 1, dst, 2, &payload), 1480);
    let six =
        |src: &str, dst: &str| packet::fragments6(&packet::udp(src, 1, dst, 2, &payload), 1232, 9);
    let lease4 = "10.64.1.2";
    let lease6 = "fd00:1234:5678:1::1";
    for (theirs, ours, back_theirs, back_ours) in [
        (
            four(INNER4, FAR4),
            four(lease4, FAR4),
            four(FAR4, lease4),
            four(FAR4, INNER4),
        ),
        (
            six(INNER6, FAR6),
            six(lease6, FAR6),
            six(FAR6, lease6),
            six(FAR6, INNER6),
        ),
    ] {
        send(&mut client, &theirs).await;
        for expected in &ours {
            assert_eq!(device.read(), *expected);
        }
        for fragment in &back_theirs {
            device.write(fragment);
        }
        let mut got = Vec::new();
        while got.len() < back_ours.len() {
            let message = client.data().await;
            got.extend(Reader::new(&message).map(|r| r.unwrap().packet.to_vec()));
        }
        assert_eq!(got, back_ours);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn int_05_every_drop_is_counted_once_under_its_reason() {
    let lab = Lab::new(2).await;
    let _first = join(
        &lab,
        Hello {
            instance: "laptop".to_owned(),
            ..hello(&[control::OFFLOAD], None)
        },
    )
    .await;
    let mut client = join(&lab, hello(&[control::OFFLOAD], None)).await;
    let device = lab.device(1);
    let lease = "10.64.1.2";
    let other = packet::udp("10.64.0.2", 1, FAR4, 2, b"another's");
    let mut bad_sum = packet::udp(INNER4, 1, FAR4, 2, b"flipped");
    *bad_sum.last_mut().unwrap() ^= 1;
    let whole = packet::tcp((INNER4, 1), (FAR4, 2), ".", 1, 1, &[7; 64]);
    let fragments = packet::fragments(&whole, 8);
    let same = packet::fragments(&packet::udp(INNER4, 1, FAR4, 2, &[7; 64]), 24);
    let outbound = [
        (
            packet::tcp((INNER4, 1), (FAR4, 2), "", 1, 1, b""),
            DropReason::TcpFlags,
        ),
        (
            packet::tcp((INNER4, 1), (FAR4, 2), "SF", 1, 1, b""),
            DropReason::TcpFlags,
        ),
        (bad_sum, DropReason::Checksum),
        (
            packet::icmp4(INNER4, FAR4, 5, 1, &other),
            DropReason::Protocol,
        ),
        (
            packet::icmp4(INNER4, FAR4, 3, 4, &other),
            DropReason::Quoted,
        ),
        (packet::udp(INNER4, 1, INNER4, 2, b""), DropReason::Address),
        (packet::udp(INNER4, 1, lease, 2, b""), DropReason::Address),
        (
            packet::udp(INNER4, 1, "169.254.169.254", 2, b""),
            DropReason::Address,
        ),
        (packet::udp(lease, 1, FAR4, 2, b""), DropReason::Spoofed),
        // A first fragment too short for its header, and one over another's.
        (fragments[0].clone(), DropReason::Malformed),
        (fragments[1].clone(), DropReason::Fragment),
    ];
    let mut expected = Totals::default();
    for (bytes, reason) in &outbound {
        send(&mut client, std::slice::from_ref(bytes)).await;
        expected.outbound.drop(*reason, 1);
    }
    send(&mut client, &[same[0].clone(), same[0].clone()]).await;
    let theirs = packet::fragments(&packet::udp(lease, 1, FAR4, 2, &[7; 64]), 24);
    assert_eq!(device.read(), theirs[0]);
    expected.outbound.pass(1, same[0].len() as u64);
    expected.outbound.drop(DropReason::Fragment, 1);
    // A super-packet to itself: it was one until then, so its segments count.
    let offload = Offload {
        partial: true,
        gso_type: gso_type::TCP_V4,
        gso_size: 1000,
    };
    let mut message = Vec::new();
    let hairpin = packet::tcp((INNER4, 1), (lease, 2), ".", 1, 1, &[7; 9500]);
    append(&mut message, &hairpin, offload).unwrap();
    client.send(message).await;
    expected.outbound.drop(DropReason::Address, 10);

    let about = packet::udp("10.64.0.2", 1, FAR4, 2, b"another's");
    let inbound = [
        (
            packet::udp(FAR4, 1, "10.64.0.2", 2, b""),
            DropReason::Chatter,
        ),
        (
            packet::icmp6("fe80::1", "ff02::2", 133, 0, b""),
            DropReason::Chatter,
        ),
        (packet::icmp4(FAR4, lease, 3, 4, &about), DropReason::Quoted),
        (
            packet::udp("127.0.0.1", 1, lease, 2, b""),
            DropReason::Address,
        ),
        (
            packet::raw4(FAR4, lease, 47, &[], &[0; 8]),
            DropReason::Protocol,
        ),
        (
            packet::with_ttl(packet::udp(FAR4, 1, lease, 2, b""), 0),
            DropReason::HopLimit,
        ),
    ];
    for (bytes, reason) in &inbound {
        device.write(bytes);
        expected.inbound.drop(*reason, 1);
    }
    let fence = packet::udp(FAR4, 1, lease, 2, b"fence");
    device.write(&fence);
    let message = client.data().await;
    let records: Vec<_> = Reader::new(&message)
        .map(|r| r.unwrap().packet.to_vec())
        .collect();
    assert_eq!(records, [packet::udp(FAR4, 1, INNER4, 2, b"fence")]);
    expected.inbound.pass(1, fence.len() as u64);
    let out = packet::udp(INNER4, 1, FAR4, 2, b"fence");
    send(&mut client, std::slice::from_ref(&out)).await;
    assert_eq!(device.read(), packet::udp(lease, 1, FAR4, 2, b"fence"));
    expected.outbound.pass(1, out.len() as u64);

    let id = lab
        .shared
        .list()
        .iter()
        .find(|v| v.card.slot == Some(1))
        .unwrap()
        .card
        .id;
    drop(client);
    let totals = lab.ended(id).await;
    for (got, expected) in [
        (totals.outbound, expected.outbound),
        (totals.inbound, expected.inbound),
    ] {
        let dropped: Vec<_> = got.dropped().collect();
        assert_eq!(dropped, expected.dropped().collect::<Vec<_>>());
        assert_eq!(
            (got.packets, got.payload),
            (expected.packets, expected.payload)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f_08_a_ping_from_a_loopback_address_is_answered() {
    let lab = Lab::new(1).await;
    let mut client = old(&lab, Dialect::SnatRaw).await;
    let device = lab.device(0);
    for n in 0..3_u8 {
        let source = format!("127.0.1.{}", n + 1);
        let outside = format!("10.64.0.{}", n + 2);
        client
            .send(packet::echo(&source, FAR4, 1, n.into(), b"ping"))
            .await;
        let read = device.read();
        assert_eq!(read, packet::echo(&outside, FAR4, 1, n.into(), b"ping"));
        let mut answer = packet::udp(FAR4, 7, &outside, 7, b"pong");
        device.write(&answer);
        answer = packet::udp(FAR4, 7, &source, 7, b"pong");
        assert_eq!(client.data().await, answer);
    }
}
