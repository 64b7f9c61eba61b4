//! What the allocator keeps.
//!
//! A login needs many times the memory of the session that comes of it: the
//! handshake, the request, the token. What it frees lies between what stays,
//! where the allocator keeps it, so after thousands of logins a good part of
//! the process is holes. Whole pages among them are given back when the rush
//! is over; the next one takes new ones.
#![expect(
    unsafe_code,
    reason = "the C library's allocator is asked to return memory, and that has no wrapper"
)]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// After fewer sessions it is not worth the time.
const WORTH: u64 = 64;
/// With more bytes than this a second, packets would wait for the allocator.
const QUIET: u64 = 1 << 20;

/// When to give back.
#[derive(Debug, Default)]
pub struct Heap {
    seen: AtomicU64,
    tended: AtomicU64,
}

impl Heap {
    /// Called about once a second, with the number of sessions there have been
    /// and the bytes of the last second. Whether anything was done.
    pub fn tend(&self, sessions: u64, rate: u64) -> bool {
        let rush = self.seen.swap(sessions, Relaxed) != sessions;
        let since = sessions.saturating_sub(self.tended.load(Relaxed));
        let due = !rush && rate < QUIET && since >= WORTH;
        if due {
            self.tended.store(sessions, Relaxed);
            give_back();
        }
        due
    }
}

fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the function may be called at any time, from any thread; it
    // touches only memory that nobody holds.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_when_a_rush_is_over() {
        let heap = Heap::default();
        assert!(!heap.tend(50, 0), "a rush");
        assert!(!heap.tend(50, 0), "too few");
        assert!(!heap.tend(500, 0), "a rush again");
        assert!(!heap.tend(500, QUIET), "packets on their way");
        assert!(heap.tend(500, 0));
        assert!(!heap.tend(500, 0), "once is enough");
    }
}
