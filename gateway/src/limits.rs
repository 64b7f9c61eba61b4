//! What strangers may cost.
//!
//! Everything here is keyed by IPv4 address or IPv6 /64, since whoever has one
//! address of a /64 has all of them, and is bounded in memory, since whoever
//! has one /64 may well have 65,536.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, info};

use crate::auth::Denied;

/// Places remembered at once; beyond it the harmless ones are forgotten.
const PLACES: usize = 65_536;
/// Lines a second about refused logins, at the level for those who look closely.
const LINES: u32 = 5;
/// How often refusals are summed up for everybody else.
const SUMMARY: Duration = Duration::from_secs(10);

/// Where a connection comes from, as far as limits are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// An IPv4 address.
    V4(u32),
    /// The first half of an IPv6 address.
    V6(u64),
}

impl Place {
    /// The place of an address.
    pub fn of(address: IpAddr) -> Place {
        match address.to_canonical() {
            IpAddr::V4(a) => Place::V4(a.to_bits()),
            IpAddr::V6(a) => Place::V6((a.to_bits() >> 64) as u64),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Failed logins by place: so many at once, and so many a minute from then on.
#[derive(Debug)]
pub struct Failures {
    /// When the bucket of a place will be empty of failures again.
    clear_at: Mutex<HashMap<Place, Instant>>,
}

impl Failures {
    /// Nobody has failed yet.
    pub fn new() -> Failures {
        Failures {
            clear_at: Mutex::default(),
        }
    }

    /// How long the place must wait before its next try, if at all.
    pub fn blocked(&self, place: Place, limit: u32, now: Instant) -> Option<Duration> {
        let clear_at = *lock(&self.clear_at).get(&place)?;
        let one = Duration::from_secs(60) / limit.max(1);
        let full = now + Duration::from_secs(60);
        // There is room as long as one more failure fits under a minute's worth.
        let over = (clear_at + one).checked_duration_since(full)?;
        (!over.is_zero()).then_some(over)
    }

    /// Takes note of a failure.
    pub fn note(&self, place: Place, limit: u32, now: Instant) {
        let mut clear_at = lock(&self.clear_at);
        if clear_at.len() >= PLACES && !clear_at.contains_key(&place) {
            clear_at.retain(|_, at| *at > now);
            if clear_at.len() >= PLACES {
                // Better to forgive everybody than to refuse somebody new.
                clear_at.clear();
            }
        }
        let one = Duration::from_secs(60) / limit.max(1);
        let at = clear_at.entry(place).or_insert(now);
        *at = (*at).max(now) + one;
    }
}

impl Default for Failures {
    fn default() -> Failures {
        Failures::new()
    }
}

/// Connections that have not logged in yet.
#[derive(Debug, Default)]
pub struct Pending {
    inner: Mutex<PendingInner>,
}

#[derive(Debug, Default)]
struct PendingInner {
    all: usize,
    by_place: HashMap<Place, usize>,
}

/// One of them; dropping it makes room.
#[derive(Debug)]
pub struct PendingPass {
    pending: Arc<Pending>,
    place: Place,
}

impl Pending {
    /// Takes a place among them, if there is one left for all and for this place.
    pub fn enter(
        self: &Arc<Pending>,
        place: Place,
        all: usize,
        each: usize,
    ) -> Option<PendingPass> {
        let mut inner = lock(&self.inner);
        if inner.all >= all {
            return None;
        }
        let count = inner.by_place.entry(place).or_default();
        if *count >= each {
            return None;
        }
        *count += 1;
        inner.all += 1;
        let pending = Arc::clone(self);
        Some(PendingPass { pending, place })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        lock(&self.inner).all
    }
}

impl Drop for PendingPass {
    fn drop(&mut self) {
        let mut inner = lock(&self.pending.inner);
        inner.all -= 1;
        if let Some(count) = inner.by_place.get_mut(&self.place) {
            *count -= 1;
            if *count == 0 {
                inner.by_place.remove(&self.place);
            }
        }
    }
}

/// Refused logins, counted rather than logged: a stranger must not be able to
/// fill a disk.
#[derive(Debug)]
pub struct Refusals {
    inner: Mutex<RefusalsInner>,
}

#[derive(Debug)]
struct RefusalsInner {
    by_reason: BTreeMap<Denied, u64>,
    total: u64,
    since: Instant,
    lines: (Instant, u32),
}

impl Refusals {
    /// None yet.
    pub fn new(now: Instant) -> Refusals {
        Refusals {
            inner: Mutex::new(RefusalsInner {
                by_reason: BTreeMap::new(),
                total: 0,
                since: now,
                lines: (now, 0),
            }),
        }
    }

    /// Counts one, and says so if that was not said too often.
    pub fn note(&self, why: Denied, peer: IpAddr, now: Instant) {
        let mut inner = lock(&self.inner);
        *inner.by_reason.entry(why).or_default() += 1;
        inner.total += 1;
        if now.duration_since(inner.lines.0) >= Duration::from_secs(1) {
            inner.lines = (now, 0);
        }
        inner.lines.1 += 1;
        let say = inner.lines.1 <= LINES;
        drop(inner);
        if say {
            debug!(%why, %peer, "login refused");
        }
        self.sum_up(now);
    }

    /// Logs what was counted since the last time, if that is long enough ago.
    pub fn sum_up(&self, now: Instant) {
        let mut inner = lock(&self.inner);
        if inner.by_reason.is_empty() || now.duration_since(inner.since) < SUMMARY {
            return;
        }
        let counts = Counts(std::mem::take(&mut inner.by_reason));
        inner.since = now;
        drop(inner);
        info!(%counts, "logins were refused");
    }

    /// How many since the start.
    pub fn total(&self) -> u64 {
        lock(&self.inner).total
    }
}

struct Counts(BTreeMap<Denied, u64>);

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (why, count) in &self.0 {
            write!(f, "{comma}{why}: {count}")?;
            comma = ", ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn place(text: &str) -> Place {
        Place::of(text.parse().unwrap())
    }

    #[test]
    fn dos_15_a_place_is_an_address_or_a_64() {
        assert_eq!(place("192.0.2.1"), place("::ffff:192.0.2.1"));
        assert_ne!(place("192.0.2.1"), place("192.0.2.2"));
        assert_eq!(place("2001:db8::1"), place("2001:db8::ffff:1"));
        assert_ne!(place("2001:db8::1"), place("2001:db8:0:1::1"));
    }

    #[test]
    fn so_many_failures_at_once_and_then_so_many_a_minute() {
        let failures = Failures::new();
        let start = Instant::now();
        let (here, there) = (place("192.0.2.1"), place("192.0.2.2"));
        for n in 0..6 {
            assert_eq!(failures.blocked(here, 6, start), None, "after {n}");
            failures.note(here, 6, start);
        }
        let wait = failures.blocked(here, 6, start).unwrap();
        assert_eq!(wait, MINUTE / 6);
        assert_eq!(failures.blocked(there, 6, start), None);
        let later = start + wait;
        assert_eq!(failures.blocked(here, 6, later), None);
        failures.note(here, 6, later);
        assert!(failures.blocked(here, 6, later).is_some());
        assert_eq!(failures.blocked(here, 6, later + 2 * MINUTE), None);
    }

    #[test]
    fn dos_15_many_places_take_bounded_room() {
        let failures = Failures::new();
        let start = Instant::now();
        for n in 0..200_000_u64 {
            failures.note(Place::V6(n), 6, start);
        }
        assert!(lock(&failures.clear_at).len() <= PLACES);
    }

    #[test]
    fn pending_connections_are_limited_for_all_and_for_each() {
        let pending = Arc::new(Pending::default());
        let (a, b) = (place("192.0.2.1"), place("192.0.2.2"));
        let first = pending.enter(a, 3, 2).unwrap();
        let _second = pending.enter(a, 3, 2).unwrap();
        assert!(pending.enter(a, 3, 2).is_none(), "of this place");
        let _third = pending.enter(b, 3, 2).unwrap();
        assert!(pending.enter(b, 3, 2).is_none(), "of all");
        drop(first);
        assert_eq!(pending.count(), 2);
        assert!(pending.enter(b, 3, 2).is_some());
    }
}
