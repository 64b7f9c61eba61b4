//! Conversations of the first gateways' clients, message for message.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rvpn_gateway::admit::{Admission, Kind};
use rvpn_gateway::config;
use rvpn_gateway::meter::DropReason;
use rvpn_lab::packet;
use rvpn_proto::dialect::{Dialect, Noise, Padding};
use session_support::fake_helper::{PATIENCE, SlotState};
use session_support::lab::Lab;
use session_support::wire::Client;
use tokio_tungstenite::tungstenite::Message;

const FAR4: &str = "1.1.1.1";
const FAR6: &str = "2606:4700:4700::1111";

fn path(variant: Dialect, padding: Padding) -> Kind {
    Kind::Dialect(Arc::new(config::Dialect {
        path: "/tunnel".to_owned(),
        variant,
        account: None,
        anonymous: true,
        legacy: None,
        class: 0,
        padding,
    }))
}

fn guest(lab: &Lab, variant: Dialect, padding: Padding) -> Admission {
    Admission {
        kind: path(variant, padding),
        anonymous: true,
        ..lab.guest()
    }
}

/// A client on the second slot, so that a translation would show.
async fn come(lab: &Lab, variant: Dialect, padding: Padding) -> (Client, Client) {
    let first = lab.admit(guest(lab, variant, padding)).await;
    lab.fake.await_slot(0, SlotState::Leased);
    let second = lab.admit(guest(lab, variant, padding)).await;
    lab.fake.await_slot(1, SlotState::Leased);
    (first, second)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_dialect_carries_any_source_and_says_nothing_first() {
    let lab = Lab::new(2).await;
    let (_first, mut client) = come(&lab, Dialect::SnatRaw, Padding::NONE).await;
    // The ping it sends the moment it is connected, whoever it thinks it is.
    client
        .send(packet::echo("192.168.1.7", FAR4, 1, 1, b"first"))
        .await;
    let device = lab.device(1);
    assert_eq!(
        device.read(),
        packet::echo("10.64.1.2", FAR4, 1, 1, b"first")
    );
    client
        .send(packet::udp("172.16.0.9", 5, FAR4, 6, b"other"))
        .await;
    assert_eq!(
        device.read(),
        packet::udp("10.64.1.3", 5, FAR4, 6, b"other")
    );
    device.write(&packet::udp(FAR4, 6, "10.64.1.3", 5, b"back"));
    assert_eq!(
        client.data().await,
        packet::udp(FAR4, 6, "172.16.0.9", 5, b"back")
    );
    // Neither a source beyond the thirty-second nor IPv6 exists there.
    for n in 0..31 {
        let source = format!("10.9.9.{n}");
        client.send(packet::udp(&source, 5, FAR4, 6, b"")).await;
    }
    client.send(packet::udp("fd00::1", 5, FAR6, 6, b"")).await;
    device.write(&packet::udp(FAR6, 6, "fd00:1234:5678:1::1", 5, b""));
    for n in 0..30 {
        let outside = format!("10.64.1.{}", n + 4);
        assert_eq!(device.read(), packet::udp(&outside, 5, FAR4, 6, b""));
    }
    lab.dropped(1, DropReason::Spoofed, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_text_dialects_announce_the_lease_and_carry_its_addresses() {
    for (dialect, hello) in [
        (Dialect::TextV4, "10.64.1.0/24"),
        (
            Dialect::TextDual,
            "10.64.1.0/30,fd00:1234:5678:1:0:0:0:0/127",
        ),
    ] {
        let lab = Lab::new(2).await;
        let (_first, mut client) = come(&lab, dialect, Padding::NONE).await;
        assert_eq!(client.text().await, hello);
        let device = lab.device(1);
        let out = packet::echo("10.64.1.2", FAR4, 1, 1, b"out");
        client.send(out.clone()).await;
        assert_eq!(device.read(), out);
        let back = packet::udp(FAR4, 1, "10.64.1.2", 2, b"back");
        device.write(&back);
        assert_eq!(client.data().await, back);
        client
            .send(packet::echo("10.64.1.3", FAR4, 1, 1, b""))
            .await;
        lab.dropped(1, DropReason::Spoofed, 1).await;
        // Text is no packet, and no reason to part either.
        client.send(Message::text("hello?")).await;
        client.send(out.clone()).await;
        assert_eq!(device.read(), out);
        let six = packet::echo("fd00:1234:5678:1::1", FAR6, 1, 1, b"six");
        client.send(six.clone()).await;
        if dialect.carries_v6() {
            assert_eq!(device.read(), six);
        } else {
            lab.dropped(1, DropReason::Spoofed, 2).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spf_13_the_kernels_own_chatter_stays_out_of_a_tunnel() {
    let lab = Lab::new(2).await;
    let (_first, mut client) = come(&lab, Dialect::TextDual, Padding::NONE).await;
    client.text().await;
    let device = lab.device(1);
    device.write(&packet::icmp6("fe80::1", "ff02::2", 133, 0, b""));
    device.write(&packet::udp(FAR4, 1, "10.64.1.9", 2, b"not its"));
    let back = packet::udp(FAR4, 1, "10.64.1.2", 2, b"its own");
    device.write(&back);
    assert_eq!(client.data().await, back);
    lab.inbound_dropped(1, DropReason::Chatter, 2).await;
}

/// One that may not pass, and that the next one does.
async fn refused(lab: &Lab, client: &mut Client, packet: Vec<u8>, reason: DropReason) {
    let before = lab.shared.list()[0].totals.outbound.drops[reason as usize];
    client.send(packet).await;
    lab.dropped(0, reason, before + 1).await;
    let good = packet::udp("10.64.0.2", 1, FAR4, 2, b"goes on");
    client.send(good.clone()).await;
    assert_eq!(lab.device(0).read(), good);
}

#[tokio::test(flavor = "multi_thread")]
async fn f_09_only_the_announced_address_may_send() {
    let lab = Lab::new(1).await;
    let mut client = lab
        .admit(guest(&lab, Dialect::TextDual, Padding::NONE))
        .await;
    client.text().await;
    for source in [
        "10.64.0.0",
        "10.64.0.1",
        "10.64.0.3",
        "10.64.0.255",
        "10.64.1.2",
        "192.168.1.7",
        FAR6,
        "fd00:1234:5678::",
        "fd00:1234:5678::2",
    ] {
        let far = if source.contains(':') {
            "2001:db8::1"
        } else {
            FAR4
        };
        let packet = packet::udp(source, 1, far, 2, b"spoofed");
        refused(&lab, &mut client, packet, DropReason::Spoofed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f_11_each_rule_between_a_tunnel_and_the_internet() {
    let lab = Lab::new(1).await;
    let mut client = lab
        .admit(guest(&lab, Dialect::TextDual, Padding::NONE))
        .await;
    client.text().await;
    let own = "10.64.0.2";
    let mut cut = packet::udp(own, 1, FAR4, 2, b"cut");
    cut.pop();
    refused(&lab, &mut client, cut, DropReason::Malformed).await;
    // Private networks are the kernel's rules' to refuse, these are nobody's to allow.
    for special in [
        "0.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.251",
        "240.0.0.1",
        "255.255.255.255",
    ] {
        let packet = packet::udp(own, 1, special, 2, b"");
        refused(&lab, &mut client, packet, DropReason::Address).await;
    }
    for special in ["::1", "fe80::1", "ff02::1", "::ffff:1.1.1.1"] {
        let packet = packet::udp("fd00:1234:5678::1", 1, special, 2, b"");
        refused(&lab, &mut client, packet, DropReason::Address).await;
    }
    // The other way.
    let device = lab.device(0);
    let sources = ["0.0.0.1", "127.0.0.1", "169.254.1.1", "224.0.0.1"];
    for source in sources {
        device.write(&packet::udp(source, 1, own, 2, b""));
    }
    let good = packet::udp(FAR4, 1, own, 2, b"goes on");
    device.write(&good);
    assert_eq!(client.data().await, good);
    let count = sources.len() as u64;
    lab.inbound_dropped(0, DropReason::Address, count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f_12_header_checksum_and_hops_are_checked_and_fragments_left_to_the_kernel() {
    let lab = Lab::new(1).await;
    let mut client = lab
        .admit(guest(&lab, Dialect::SnatRaw, Padding::NONE))
        .await;
    // The first source is given the address that it has already.
    let own = "10.64.0.2";
    let last = packet::with_ttl(packet::udp(own, 1, FAR4, 2, b""), 1);
    client.send(last.clone()).await;
    let device = lab.device(0);
    assert_eq!(device.read(), last, "whose answer is the kernel's");
    let mut wrong = packet::udp(own, 1, FAR4, 2, b"");
    wrong[10] ^= 1;
    refused(&lab, &mut client, wrong, DropReason::Checksum).await;
    let expired = packet::with_ttl(packet::udp(own, 1, FAR4, 2, b""), 0);
    refused(&lab, &mut client, expired, DropReason::HopLimit).await;
    for fragment in packet::fragments(&packet::udp(own, 1, FAR4, 2, &[7; 100]), 64) {
        client.send(fragment.clone()).await;
        assert_eq!(device.read(), fragment);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_padded_dialect_says_hello_late_and_wraps_every_packet() {
    let lab = Lab::new(2).await;
    let padding = Padding {
        bytes: (3, 3),
        noise: None,
    };
    let asked = Instant::now();
    let (_first, mut client) = come(&lab, Dialect::Padded, padding).await;
    // Packets that come before the greeting wait for the device.
    let out = packet::udp("10.64.1.2", 1, FAR4, 2, b"early");
    client.send(wrapped(&out, 7)).await;
    let hello = client.data().await;
    assert!(asked.elapsed() >= Duration::from_millis(50));
    let text = b"10.64.1.0/30,fd00:1234:5678:1:0:0:0:0/127";
    assert_eq!(hello, wrapped(text, 3));
    let device = lab.device(1);
    assert_eq!(device.read(), out);
    for noise in [vec![], vec![0], vec![0; 1500]] {
        client.send(noise).await;
    }
    client.send(vec![0x45, 1, 2]).await;
    client.send(wrapped(&out, 0)).await;
    assert_eq!(device.read(), out);
    lab.dropped(1, DropReason::Malformed, 1).await;
    let back = packet::udp(FAR4, 2, "10.64.1.2", 1, b"back");
    device.write(&back);
    assert_eq!(client.data().await, wrapped(&back, 3));
    let six = packet::udp(FAR6, 2, "fd00:1234:5678:1::1", 1, b"back");
    device.write(&six);
    assert_eq!(client.data().await, wrapped(&six, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_comes_by_itself_and_is_not_counted_as_traffic() {
    let lab = Lab::new(2).await;
    let padding = Padding {
        bytes: (0, 0),
        noise: Some(Noise {
            bytes: (4, 9),
            every_ms: (5, 20),
        }),
    };
    let (_first, mut client) = come(&lab, Dialect::Padded, padding).await;
    client.data().await;
    for _ in 0..10 {
        let noise = client.data().await;
        assert!((4..=9).contains(&noise.len()) && noise.iter().all(|b| *b == 0));
    }
    let list = lab.shared.list();
    assert!(list.iter().all(|v| v.totals.inbound.packets == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_is_told_in_words_the_old_clients_know() {
    let lab = Lab::new(1).await;
    let _first = lab.admit(guest(&lab, Dialect::Padded, Padding::NONE)).await;
    lab.fake.await_slot(0, SlotState::Leased);
    let asked = Instant::now();
    let mut second = lab.admit(guest(&lab, Dialect::Padded, Padding::NONE)).await;
    let (code, reason) = second.close_frame().await;
    assert_eq!(
        (code, reason.as_str()),
        (1013, "No available TUN interfaces")
    );
    assert!(asked.elapsed() < Duration::from_millis(100));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_leaves_nothing_behind_and_a_token_keeps_its_lease() {
    let lab = Lab::new(2).await;
    let client = lab.admit(guest(&lab, Dialect::TextV4, Padding::NONE)).await;
    lab.fake.await_slot(0, SlotState::Leased);
    drop(client);
    lab.fake.await_slot(0, SlotState::Free);

    let known = || Admission {
        anonymous: false,
        ..guest(&lab, Dialect::TextV4, Padding::NONE)
    };
    let mut client = lab.admit(known()).await;
    let hello = client.text().await;
    // A second one with the same token gets its own, not the first one's.
    let mut other = lab.admit(known()).await;
    assert_ne!(other.text().await, hello);
    drop(client);
    lab.fake.await_slot(0, SlotState::Lingering);
    let mut client = lab.admit(known()).await;
    assert_eq!(client.text().await, hello);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_are_counted_alike_in_every_dialect() {
    for dialect in Dialect::ALL {
        let lab = Lab::new(1).await;
        let mut client = lab.admit(guest(&lab, dialect, Padding::SLIGHT)).await;
        if dialect != Dialect::SnatRaw {
            client.next().await;
        }
        let device = lab.device(0);
        let mut bytes = 0;
        for len in (0..1400).step_by(111) {
            let out = packet::udp("10.64.0.2", 1, FAR4, 2, &vec![9; len]);
            let message = if dialect == Dialect::Padded {
                wrapped(&out, 5)
            } else {
                out.clone()
            };
            client.send(message).await;
            assert_eq!(device.read(), out);
            device.write(&packet::udp(FAR4, 2, "10.64.0.2", 1, &vec![8; len]));
            bytes += out.len() as u64;
        }
        lab.counted(bytes, bytes).await;
        let deadline = Instant::now() + PATIENCE;
        while lab.shared.list()[0].totals.inbound.packets != 13 {
            assert!(Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
    }
}

fn wrapped(packet: &[u8], padding: usize) -> Vec<u8> {
    let mut message = (0x8000 | packet.len() as u16).to_be_bytes().to_vec();
    message.extend_from_slice(packet);
    message.resize(message.len() + padding, 0);
    message
}
