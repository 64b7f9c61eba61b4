//! A network laboratory: a gateway host, an internet, a neighbour on the wire,
//! all in namespaces of the test's own, all gone with the test.
//!
//! Nothing here sleeps for luck: a condition is waited for with a deadline, and
//! "nothing arrived" is said only after a later packet, sent on the same way,
//! was seen to arrive (a fence).

pub mod acme_server;
pub mod attack;
pub mod boundary;
pub mod bulk;
pub mod capture;
pub mod fake_gateway;
pub mod gateway;
pub mod helper;
pub mod machine;
pub mod naive;
pub mod ns;
pub mod outside;
pub mod packet;
pub mod probe;
pub mod raw;
pub mod read_back;
pub mod relay;
pub mod rogue;
pub mod scene;
pub mod serving;
pub mod stage;
pub mod sums;
pub mod tcp_watch;
pub mod token;
pub mod topology;
pub mod tunnel_client;

use std::time::{Duration, Instant};

pub use gateway::Gateway;
pub use helper::{Helper, Tunnel};
pub use ns::Ns;
pub use topology::Lab;

/// Generous for a loaded machine; a test that passes never waits for it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until the condition holds, and says what was awaited if it does not.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_within(PATIENCE, what, &mut condition);
}

/// The same with a bound that is itself part of what is tested.
#[track_caller]
pub fn wait_within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        // Polling, not timing: the loop ends with the condition.
        std::thread::park_timeout(Duration::from_millis(2));
    }
    start.elapsed()
}
