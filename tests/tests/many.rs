//! Many at once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rvpn_lab::scene::{Scene, number};
use rvpn_lab::topology::UP4;
use rvpn_lab::tunnel_client::{Session, Speech, on};
use rvpn_lab::wait_until;
use tokio::time::timeout;

const ALL: usize = 1000;
/// For all of them, on a loaded machine with debug assertions.
const BOUND: Duration = Duration::from_secs(60);

/// As ping does it: a thousand at once are more than some queues of a kernel hold.
async fn persistent(session: &mut Session) {
    let mut sequence = 0;
    loop {
        sequence += 1;
        let ping = session.ping(UP4, 1, sequence);
        if timeout(Duration::from_secs(1), ping).await.is_ok() {
            return;
        }
    }
}

#[test]
fn a_thousand_clients_at_once_are_each_answered() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("sockets for a thousand clients");
    let scene = Scene::new("slots = 1000\nmax-slots = 1024\n", "");
    on(&scene.phone, async || {
        let begun = Instant::now();
        let native = Speech::Native { offload: true };
        let names: Vec<String> = (0..ALL).map(|n| format!("account-{n}")).collect();
        let mut sessions: Vec<Session> =
            join_all(names.iter().map(|name| scene.session(native, name))).await;
        let connected = begun.elapsed();
        assert_eq!(scene.gateway.sessions().len(), ALL);
        join_all(sessions.iter_mut().map(persistent)).await;
        let answered = begun.elapsed();
        println!("{ALL} connected within {connected:?}, answered within {answered:?}");
        assert!(answered < BOUND, "{answered:?}");

        // Each on a lease of its own, each with what it sent and got.
        let rows = scene.gateway.sessions();
        let leases: BTreeSet<String> = rows.iter().map(|r| r["addresses"].to_string()).collect();
        assert_eq!(leases.len(), ALL);
        wait_until("every answer is counted", || {
            let rows = scene.gateway.sessions();
            rows.iter().all(|row| {
                let [out, back] = ["outbound", "inbound"].map(|way| number(&row[way]["packets"]));
                assert!(back <= out, "{row}");
                back > 0
            })
        });
        drop(sessions);
        scene.deserted();
    });
}
