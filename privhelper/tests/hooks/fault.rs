//! Faults on demand, for tests; compiled in by the feature `fault-hooks` alone.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// At this place of `RVPN_FAULT=PLACE:panic` or `PLACE:MILLISECONDS`: panics or waits.
pub(crate) fn at(place: &str) {
    let Ok(wanted) = std::env::var("RVPN_FAULT") else {
        return;
    };
    match wanted.split_once(':') {
        Some((p, "panic")) if p == place => panic!("fault asked for at {place}"),
        Some((p, ms)) if p == place => {
            std::thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0)));
        }
        _ => {}
    }
}

/// At this place of `RVPN_FAULT=PLACE:ERRNO:FIRST+STEP`: fails the first and then every so many times.
pub(crate) fn refuse(place: &str) -> io::Result<()> {
    static PASSED: AtomicU64 = AtomicU64::new(0);
    let wanted = std::env::var("RVPN_FAULT").unwrap_or_default();
    let words: Vec<&str> = wanted.split([':', '+']).collect();
    let &[p, errno, first, step] = words.as_slice() else {
        return Ok(());
    };
    let number = |s: &str| s.parse::<u64>().unwrap_or(u64::MAX);
    if p == place {
        let n = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
        if n >= number(first) && (n - number(first)).is_multiple_of(number(step)) {
            return Err(io::Error::from_raw_os_error(
                errno.parse().unwrap_or(libc::EIO),
            ));
        }
    }
    Ok(())
}
