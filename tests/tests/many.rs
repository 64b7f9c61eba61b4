//! Many at once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rvpn_lab::scene::Scene;
use rvpn_lab::topology::UP4;
use rvpn_lab::tunnel_client::{Session, Speech, on};

const ALL: usize = 1000;
/// For all of them, on a loaded machine with debug assertions.
const BOUND: Duration = Duration::from_secs(60);

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
        join_all(sessions.iter_mut().map(|session| session.ping(UP4, 1, 1))).await;
        let answered = begun.elapsed();
        println!("{ALL} connected within {connected:?}, answered within {answered:?}");
        assert!(answered < BOUND, "{answered:?}");

        // Each on a lease of its own, each with the one packet it sent and got.
        let rows = scene.gateway.sessions();
        let leases: BTreeSet<String> = rows.iter().map(|r| r["addresses"].to_string()).collect();
        assert_eq!(leases.len(), ALL);
        for row in &rows {
            assert_eq!(row["outbound"]["packets"], 1, "{row}");
            assert_eq!(row["inbound"]["packets"], 1, "{row}");
        }
        drop(sessions);
        scene.deserted();
    });
}
