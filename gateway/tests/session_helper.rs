//! The gateway's end of the helper's socket, against a helper that restarts,
//! stalls, runs dry and sends notices.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::time::{Duration, Instant};

use rvpn_gateway::helper::{Helper, HelperConfig, HelperError, LeaseEvent};
use rvpn_ipc::{Key, Kind, Op, Status};
use session_support::fake_helper::{FakeHelper, PATIENCE, SlotState};
use tempfile::TempDir;
use tokio::time::timeout;

const ALICE: Key = Key([1; 16]);
const BOB: Key = Key([2; 16]);

struct Lab {
    fake: FakeHelper,
    helper: Helper,
    _dir: TempDir,
}

async fn lab(slots: usize) -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeHelper::start(dir.path(), slots);
    let helper = Helper::start(HelperConfig {
        socket: fake.socket.clone(),
        uid: nix::unistd::getuid().as_raw(),
        successor: false,
    });
    timeout(PATIENCE, helper.ready()).await.unwrap().unwrap();
    Lab {
        fake,
        helper,
        _dir: dir,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_comes_back_to_its_slot_and_a_finished_one_does_not() {
    let lab = lab(2).await;
    let (lease, tun) = lab.helper.acquire(ALICE, Kind::Packets, 0).await.unwrap();
    assert!(tun.is_some() && !lease.resumed());
    let first = (lease.reply.slot, lease.reply.generation);
    drop(tun);
    drop(lease);
    lab.fake.await_slot(first.0, SlotState::Lingering);

    let (mut lease, tun) = lab.helper.acquire(ALICE, Kind::Packets, 0).await.unwrap();
    assert!(lease.resumed());
    assert_eq!((lease.reply.slot, lease.reply.generation), first);
    lease.release_on_drop();
    drop(tun);
    drop(lease);
    lab.fake.await_slot(first.0, SlotState::Free);

    let (lease, _) = lab.helper.acquire(ALICE, Kind::Streams, 0).await.unwrap();
    assert!(!lease.resumed());
    assert_ne!((lease.reply.slot, lease.reply.generation), first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_says_when_to_come_back() {
    let lab = lab(1).await;
    let held = lab.helper.acquire(ALICE, Kind::Packets, 0).await.unwrap();
    let refused = lab.helper.acquire(BOB, Kind::Packets, 0).await;
    let Err(HelperError::NoCapacity { retry_after }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(retry_after, Duration::from_secs(2));
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_survive_a_restart_of_the_helper() {
    let mut lab = lab(3).await;
    let mut kept = lab.helper.acquire(ALICE, Kind::Packets, 0).await.unwrap().0;
    let mut released = lab.helper.acquire(BOB, Kind::Packets, 0).await.unwrap().0;
    released.release_on_drop();
    let released_slot = released.reply.slot;

    lab.fake.stop();
    let mut state = lab.helper.state();
    timeout(PATIENCE, state.wait_for(|s| s.pool.is_none()))
        .await
        .unwrap()
        .unwrap();
    let refused = lab.helper.acquire(BOB, Kind::Packets, 0).await;
    assert!(matches!(refused, Err(HelperError::Away)), "{refused:?}");
    // Given back while nobody was there to hear it.
    drop(released);

    lab.fake.revive();
    timeout(PATIENCE, lab.helper.ready())
        .await
        .unwrap()
        .unwrap();
    lab.fake.await_slot(kept.reply.slot, SlotState::Leased);
    lab.fake.await_slot(released_slot, SlotState::Free);
    assert!(lab.fake.log().contains(&Op::Confirm));
    assert_eq!(*kept.events().borrow_and_update(), None);
    kept.release_on_drop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_the_new_helper_does_not_know_is_reported_lost() {
    let mut lab = lab(1).await;
    let (lease, _tun) = lab.helper.acquire(ALICE, Kind::Packets, 0).await.unwrap();
    lab.fake.forget_leases();
    lab.fake.restart();
    let mut events = lease.events();
    let event = timeout(PATIENCE, events.wait_for(Option::is_some));
    assert_eq!(*event.await.unwrap().unwrap(), Some(LeaseEvent::DeviceLost));
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_reach_the_session_they_are_about() {
    let lab = lab(2).await;
    let (alice, _tun) = lab.helper.acquire(ALICE, Kind::Packets, 0).await.unwrap();
    let (bob, _tun) = lab.helper.acquire(BOB, Kind::Packets, 0).await.unwrap();
    lab.fake.notify(Status::TakenOver, bob.reply.slot);
    let mut events = bob.events();
    let event = timeout(PATIENCE, events.wait_for(Option::is_some));
    assert_eq!(*event.await.unwrap().unwrap(), Some(LeaseEvent::TakenOver));
    assert_eq!(*alice.events().borrow(), None);

    let mut state = lab.helper.state();
    for (status, lost) in [(Status::RulesLost, true), (Status::RulesRestored, false)] {
        lab.fake.notify(status, 0);
        timeout(PATIENCE, state.wait_for(|s| s.rules_lost == lost))
            .await
            .unwrap()
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_helper_costs_two_seconds_at_most_and_is_used_again() {
    let lab = lab(1).await;
    lab.fake.stall(true);
    let asked = Instant::now();
    let refused = lab.helper.acquire(ALICE, Kind::Packets, 0).await;
    assert!(matches!(refused, Err(HelperError::Away)), "{refused:?}");
    assert!(asked.elapsed() <= Duration::from_secs(2));

    lab.fake.stall(false);
    let again = async {
        loop {
            if let Ok(lease) = lab.helper.acquire(ALICE, Kind::Packets, 0).await {
                return lease;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impostor_on_the_socket_is_not_spoken_to() {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeHelper::start(dir.path(), 1);
    let helper = Helper::start(HelperConfig {
        socket: fake.socket.clone(),
        uid: nix::unistd::getuid().as_raw() + 1,
        successor: false,
    });
    let spoken = timeout(Duration::from_millis(300), helper.ready()).await;
    assert!(spoken.is_err());
    assert!(fake.log().is_empty());
}
