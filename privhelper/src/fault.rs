//! Faults on demand, for tests; compiled in by the feature `fault-hooks` alone.

use std::time::Duration;

/// At this place of `RVPN_FAULT=PLACE:panic` or `PLACE:MILLISECONDS`: panics or waits.
pub(crate) fn at(place: &str) {
    let Ok(wanted) = std::env::var("RVPN_FAULT") else {
        return;
    };
    match wanted.split_once(':') {
        Some((p, "panic")) if p == place => panic!("fault asked for at {place}"),
        Some((p, ms)) if p == place => {
            std::thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0)))
        }
        _ => {}
    }
}
