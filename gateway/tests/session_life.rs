//! How sessions begin, continue and end, with a protocol that adds nothing: a
//! message is a packet.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rvpn_gateway::meter::Orphan;
use rvpn_gateway::session::drive::Patience;
use rvpn_ipc::{Key, Status};
use session_support::fake_helper::{PATIENCE, SlotState};
use session_support::lab::Lab;
use session_support::plain::LONG;
use tokio_tungstenite::tungstenite::Message;

const ALICE: Key = Key([1; 16]);
const BOB: Key = Key([2; 16]);

async fn lab(slots: usize) -> Lab {
    Lab::new(slots).await
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_cross_both_ways_and_are_counted_to_the_byte() {
    let lab = lab(1).await;
    let mut client = lab.arrive(ALICE).await;
    let welcome = client.text().await;
    assert!(
        welcome.starts_with("10.64.0.2 fd00:1234:5678::1 "),
        "{welcome}"
    );
    let id = lab.only_session();
    let device = lab.device(0);
    let mut bytes = 0;
    for len in (1..1500).step_by(7) {
        let packet = vec![len as u8; len];
        client.send(packet.clone()).await;
        assert_eq!(device.read(), packet);
        device.write(&packet);
        assert_eq!(client.data().await, packet);
        bytes += len as u64;
    }
    client.send(Message::text("abc")).await;
    assert_eq!(client.text().await, "ABC");
    client.send(Message::text("goodbye")).await;
    assert_eq!(client.close_frame().await.0, 1000);
    lab.fake.await_slot(0, SlotState::Free);
    let totals = lab.ended(id).await;
    assert_eq!(
        (totals.outbound.packets, totals.outbound.payload),
        (215, bytes)
    );
    assert_eq!(
        (totals.inbound.packets, totals.inbound.payload),
        (215, bytes)
    );
    assert!(totals.outbound.wire > bytes && totals.inbound.wire > bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_client_keeps_its_slot_and_comes_back_to_it() {
    let lab = lab(2).await;
    let mut client = lab.arrive(ALICE).await;
    client.text().await;
    drop(client);
    lab.fake.await_slot(0, SlotState::Lingering);
    let mut client = lab.arrive(ALICE).await;
    client.text().await;
    let device = lab.device(0);
    client.send(vec![7; 40]).await;
    assert_eq!(device.read(), [7; 40]);
    assert_eq!(lab.fake.slot(1).0, SlotState::Free);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_connection_takes_the_device_over_at_once() {
    let lab = lab(2).await;
    let mut first = lab.arrive(ALICE).await;
    first.text().await;
    let device = lab.device(0);
    let asked = Instant::now();
    let mut second = lab.arrive(ALICE).await;
    second.text().await;
    assert!(asked.elapsed() < Duration::from_secs(1));
    // The very same device, not one the helper had to attach anew.
    second.send(vec![9; 40]).await;
    assert_eq!(device.read(), [9; 40]);
    device.write(&[8; 30]);
    assert_eq!(second.data().await, [8; 30][..]);
    assert_eq!(
        first.close_frame().await,
        (1000, "continued elsewhere".into())
    );
    assert_eq!(lab.fake.slot(0).0, SlotState::Leased);
    assert_eq!(lab.shared.hub.count(), 1);
    drop(second);
    lab.fake.await_slot(0, SlotState::Lingering);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_refuses_within_a_tenth_of_a_second() {
    let lab = lab(1).await;
    let mut alice = lab.arrive(ALICE).await;
    alice.text().await;
    let asked = Instant::now();
    let mut bob = lab.arrive(BOB).await;
    assert_eq!(bob.text().await, "1013 Some(2s)");
    let (code, reason) = bob.close_frame().await;
    assert!(asked.elapsed() < Duration::from_millis(100));
    assert_eq!(
        (code, reason.as_str()),
        (1013, "No available TUN interfaces")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_client_is_gone_within_two_seconds() {
    let lab = lab(1).await;
    let mut client = lab.arrive(ALICE).await;
    client.text().await;
    let revoked = Instant::now();
    lab.revoke.send_replace(true);
    let (code, reason) = client.close_frame().await;
    assert_eq!((code, reason.as_str()), (1008, "access was revoked"));
    lab.fake.await_slot(0, SlotState::Free);
    assert!(revoked.elapsed() < Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kicked_session_is_listed_no_more_and_others_stay() {
    let lab = lab(2).await;
    let mut alice = lab.arrive(ALICE).await;
    alice.text().await;
    let mut bob = lab.arrive(BOB).await;
    bob.text().await;
    let device = lab.device(1);
    bob.send(vec![1; 30]).await;
    device.read();
    lab.counted(30, 0).await;
    let list = lab.shared.list();
    let by_slot = |slot| list.iter().find(|v| v.card.slot == Some(slot)).unwrap();
    assert_eq!(by_slot(1).totals.outbound.payload, 30);
    assert!(lab.shared.kick(by_slot(0).card.id));
    assert_eq!(alice.close_frame().await.0, 1008);
    lab.fake.await_slot(0, SlotState::Free);
    assert!(!lab.shared.kick(by_slot(0).card.id));
    let left = lab.shared.list();
    assert_eq!((left.len(), left[0].card.slot), (1, Some(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_with_its_token() {
    let lab = lab(1).await;
    let mut guest = lab.guest();
    guest.expires_at = Some(std::time::SystemTime::now() + Duration::from_millis(50));
    let mut client = lab.arrive_as(ALICE, guest, LONG).await;
    assert_eq!(client.close_frame().await.1, "the token has expired");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_flows_on_while_the_helper_restarts() {
    let mut lab = lab(1).await;
    let mut client = lab.arrive(ALICE).await;
    client.text().await;
    let device = lab.device(0);
    lab.fake.stop();
    for n in 0..100 {
        client.send(vec![n; 64]).await;
        assert_eq!(device.read(), [n; 64]);
        device.write(&[n; 65]);
        assert_eq!(client.data().await, [n; 65][..]);
    }
    let refused = async {
        let mut bob = lab.arrive(BOB).await;
        bob.close_frame().await
    };
    assert_eq!(refused.await.0, 1013);
    lab.fake.revive();
    lab.fake.await_slot(0, SlotState::Leased);
    client.send(vec![1; 64]).await;
    assert_eq!(device.read(), [1; 64]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_device_vanishes_is_told_so_and_nobody_else_notices() {
    let lab = lab(2).await;
    let mut alice = lab.arrive(ALICE).await;
    alice.text().await;
    let mut bob = lab.arrive(BOB).await;
    bob.text().await;
    let device = lab.device(1);
    lab.fake.destroy_device(0);
    let (code, reason) = alice.close_frame().await;
    assert_eq!((code, reason.as_str()), (1011, "the tunnel device is gone"));
    bob.send(vec![3; 20]).await;
    assert_eq!(device.read(), [3; 20]);

    lab.fake.notify(Status::DeviceLost, 1);
    assert_eq!(bob.close_frame().await.0, 1011);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_client_is_given_up_but_a_slow_one_is_not() {
    let lab = lab(2).await;
    let patience = Patience {
        silence: Duration::from_millis(300),
        ping_every: None,
    };
    let mut silent = lab.arrive_as(ALICE, lab.guest(), patience).await;
    silent.text().await;
    let mut alive = lab.arrive_as(BOB, lab.guest(), patience).await;
    alive.text().await;
    let mut clock = tokio::time::interval(Duration::from_millis(50));
    for _ in 0..18 {
        clock.tick().await;
        alive.send(Message::Ping(Bytes::new())).await;
    }
    lab.fake.await_slot(0, SlotState::Lingering);
    assert_eq!(lab.fake.slot(1).0, SlotState::Leased);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_pings_is_ended_for_policy() {
    let lab = lab(1).await;
    let mut client = lab.arrive(ALICE).await;
    client.text().await;
    for _ in 0..400 {
        client
            .socket
            .get_mut()
            .try_write(&[0x89, 0x80, 0, 0, 0, 0])
            .unwrap();
    }
    let (code, reason) = client.close_frame().await;
    assert_eq!((code, reason.as_str()), (1008, "too many control messages"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_gateway_tells_everyone_when_to_come_back() {
    let lab = lab(3).await;
    let mut clients = [lab.arrive(ALICE).await, lab.arrive(BOB).await];
    for client in &mut clients {
        client.text().await;
    }
    let shared = Arc::clone(&lab.shared);
    let drained = tokio::spawn(async move { shared.drain(PATIENCE).await });
    let mut waits = Vec::new();
    for client in &mut clients {
        waits.push(client.text().await);
        let (code, reason) = client.close_frame().await;
        assert_eq!((code, reason.as_str()), (1012, "the gateway restarts"));
    }
    assert_ne!(waits[0], waits[1], "all would come back at once");
    for slot in 0..2 {
        lab.fake.await_slot(slot, SlotState::Lingering);
    }
    assert_eq!(drained.await.unwrap(), 0);
    let mut late = lab.arrive(Key([3; 16])).await;
    assert_eq!(late.close_frame().await.0, 1012);
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_of_a_killed_gateway_are_found_by_the_next() {
    let lab = lab(1).await;
    let mut client = lab.arrive(ALICE).await;
    client.text().await;
    let id = lab.only_session();
    let device = lab.device(0);
    for _ in 0..10 {
        client.send(vec![5; 100]).await;
        device.read();
        device.write(&[6; 200]);
        client.data().await;
    }
    lab.counted(1000, 2000).await;
    // A copy is what the next process finds: nothing was said to anybody.
    let next = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(lab.dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "rows") {
            std::fs::copy(&path, next.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let (orphans, _) = Orphan::find(next.path()).unwrap();
    let rows = orphans[0].usage(77);
    assert_eq!((rows.len(), rows[0].session), (1, id));
    assert_eq!(
        (rows[0].account.as_str(), rows[0].ended_ms),
        ("alice", Some(77))
    );
    assert_eq!(rows[0].totals.outbound.payload, 1000);
    assert_eq!(rows[0].totals.inbound.payload, 2000);
}
