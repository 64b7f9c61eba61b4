//! Memory for waiting packets, all clients together.
//!
//! Each queue has a limit of its own, but thousands of them full at once would
//! be gigabytes. So they have a common budget: the more of it is used, the
//! less each may hold, and whoever has emptied its queue gives the memory back
//! at once instead of when it has become quiet.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// What this process may use for waiting packets unless told otherwise.
pub const DEFAULT: usize = 256 * 1024 * 1024;

/// That of this process.
pub static PROCESS: Budget = Budget::new(DEFAULT);

/// How much may be used and is used.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicUsize,
    used: AtomicUsize,
}

impl Budget {
    /// Nothing of it is used.
    pub const fn new(limit: usize) -> Budget {
        Budget {
            limit: AtomicUsize::new(limit),
            used: AtomicUsize::new(0),
        }
    }

    /// Bytes that all queues together may have.
    pub fn set(&self, limit: usize) {
        self.limit.store(limit, Relaxed);
    }

    /// Bytes that they have.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// A queue that had so much now has this.
    pub(super) fn change(&self, had: usize, has: usize) {
        if has >= had {
            self.used.fetch_add(has - had, Relaxed);
        } else {
            self.used.fetch_sub(had - has, Relaxed);
        }
    }

    /// What a queue may hold now that may hold `most` when there is enough. A
    /// queue never takes less than it needs to move packets at all.
    pub(super) fn share(&self, most: usize) -> usize {
        let (used, limit) = (self.used(), self.limit.load(Relaxed));
        if used <= limit / 2 {
            most
        } else if used <= limit / 4 * 3 {
            most / 2
        } else if used <= limit {
            most / 4
        } else {
            0
        }
    }

    /// Whether memory that is not needed now is to be given back now.
    pub(super) fn is_short(&self) -> bool {
        self.used() > self.limit.load(Relaxed) / 2
    }
}

/// One session's queue, for those who are not on its core.
#[derive(Debug, Default)]
pub struct Gauge {
    packets: AtomicU64,
    bytes: AtomicU64,
    memory: AtomicU64,
}

/// What a [`Gauge`] shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Packets that wait for the client, super-packets singly.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Memory the queue has for them.
    pub memory: u64,
}

impl Gauge {
    /// Sets it. Only the session itself does.
    pub fn set(&self, depth: Depth) {
        self.packets.store(depth.packets, Relaxed);
        self.bytes.store(depth.bytes, Relaxed);
        self.memory.store(depth.memory, Relaxed);
    }

    /// As it was after the session's last turn.
    pub fn depth(&self) -> Depth {
        Depth {
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            memory: self.memory.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_is_used_the_less_each_may_hold() {
        let budget = Budget::new(1000);
        let mut shares = Vec::new();
        for had in (0..1200).step_by(200) {
            shares.push(budget.share(80));
            budget.change(had, had + 200);
        }
        assert_eq!(shares, [80, 80, 80, 40, 20, 20]);
        assert_eq!((budget.share(80), budget.is_short()), (0, true));
        budget.change(1200, 0);
        assert_eq!((budget.share(80), budget.is_short()), (80, false));
    }
}
