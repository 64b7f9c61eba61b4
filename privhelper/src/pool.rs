//! The lease state machine. Pure: time is handed in, effects are handed out.
//!
//! ```text
//!     free ──acquire──► leased ──linger──► lingering ──same key──► leased
//!                          └──release / linger over──► cleaning ──► free
//! ```
//!
//! Every slot is in exactly one state, and the four counts add up to the pool.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use rvpn_ipc::{Class, Generation, Key, Kind, Slot};

use crate::plan::{LeaseTag, Tag};

/// Which connection holds a lease.
pub(crate) type Holder = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Leased { lease: LeaseTag, holder: Holder },
    Lingering { lease: LeaseTag, until: Instant },
    Cleaning { lease: Option<LeaseTag> },
}

#[derive(Debug)]
struct Entry {
    generation: Generation,
    /// The device's index; zero while there is none.
    index: u32,
    state: State,
}

/// How many slots are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) free: u32,
    pub(crate) leased: u32,
    pub(crate) lingering: u32,
    pub(crate) cleaning: u32,
}

/// The answer to an acquire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acquired {
    /// A free slot, to be opened for this lease.
    Fresh(Slot),
    /// The key's own slot, still open to its flows.
    Resumed(Slot),
    /// The key's own slot, but somebody holds it: he is told, and has a moment to let go.
    Held {
        slot: Slot,
        generation: Generation,
        holder: Holder,
    },
    Full,
}

/// A lease as effects need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) slot: Slot,
    pub(crate) index: u32,
    pub(crate) lease: LeaseTag,
}

#[derive(Debug, Default)]
pub(crate) struct Pool {
    slots: Vec<Entry>,
    free: VecDeque<Slot>,
    keys: HashMap<Key, Slot>,
    counts: Counts,
}

impl Pool {
    /// Adds the next slot, free or as its device's tag says; `sound` false sends it to cleaning first.
    pub(crate) fn add(&mut self, index: u32, tag: Tag, sound: bool, until: Instant) -> Slot {
        let slot = Slot::try_from(self.slots.len()).unwrap_or(Slot::MAX);
        let state = match tag.lease {
            Some(lease) if sound && !self.keys.contains_key(&lease.key) => {
                State::Lingering { lease, until }
            }
            lease if !sound || lease.is_some() => State::Cleaning { lease },
            _ => State::Free,
        };
        self.slots.push(Entry {
            generation: tag.generation,
            index,
            state: State::Cleaning { lease: None },
        });
        self.counts.cleaning += 1;
        self.enter(slot, state);
        slot
    }

    /// Moves a slot to a state, keeping counts, keys and the free list true.
    fn enter(&mut self, slot: Slot, state: State) {
        let entry = &mut self.slots[slot as usize];
        let old = std::mem::replace(&mut entry.state, state);
        match old {
            State::Free => self.counts.free -= 1,
            State::Leased { .. } => self.counts.leased -= 1,
            State::Lingering { .. } => self.counts.lingering -= 1,
            State::Cleaning { .. } => self.counts.cleaning -= 1,
        }
        if let State::Leased { lease, .. } | State::Lingering { lease, .. } = old {
            self.keys.remove(&lease.key);
        }
        match state {
            State::Free => {
                self.counts.free += 1;
                self.free.push_back(slot);
            }
            State::Leased { lease, .. } => {
                self.counts.leased += 1;
                self.keys.insert(lease.key, slot);
            }
            State::Lingering { lease, .. } => {
                self.counts.lingering += 1;
                self.keys.insert(lease.key, slot);
            }
            State::Cleaning { .. } => self.counts.cleaning += 1,
        }
    }

    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    pub(crate) fn index(&self, slot: Slot) -> u32 {
        self.slots.get(slot as usize).map_or(0, |e| e.index)
    }

    pub(crate) fn tag(&self, slot: Slot) -> Tag {
        let lease = self.live_lease(slot);
        Tag {
            generation: self.slots[slot as usize].generation,
            lease,
        }
    }

    fn live_lease(&self, slot: Slot) -> Option<LeaseTag> {
        match self.slots.get(slot as usize)?.state {
            State::Leased { lease, .. } | State::Lingering { lease, .. } => Some(lease),
            State::Free | State::Cleaning { .. } => None,
        }
    }

    /// Every slot with a lease, for a table made anew.
    pub(crate) fn live(&self) -> impl Iterator<Item = Live> + '_ {
        (0..self.len()).filter_map(|slot| {
            Some(Live {
                slot,
                index: self.index(slot),
                lease: self.live_lease(slot)?,
            })
        })
    }

    /// Every slot that has a device.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (Slot, u32)> + '_ {
        (0..)
            .zip(&self.slots)
            .filter(|(_, e)| e.index != 0)
            .map(|(s, e)| (s, e.index))
    }

    /// Finds the slot for a key; [`Pool::grant`] makes it the holder's once its device is open.
    pub(crate) fn find(&mut self, key: Key) -> Acquired {
        let Some(&slot) = self.keys.get(&key) else {
            return self
                .free
                .front()
                .map_or(Acquired::Full, |&slot| Acquired::Fresh(slot));
        };
        let entry = &self.slots[slot as usize];
        match entry.state {
            State::Leased { holder, .. } => Acquired::Held {
                slot,
                generation: entry.generation,
                holder,
            },
            _ => Acquired::Resumed(slot),
        }
    }

    /// The generation the slot's next lease will have.
    pub(crate) fn next_generation(&self, slot: Slot) -> Generation {
        self.slots[slot as usize]
            .generation
            .checked_add(1)
            .unwrap_or(1)
    }

    pub(crate) fn grant(&mut self, slot: Slot, lease: LeaseTag, holder: Holder) -> Generation {
        if self.free.front() == Some(&slot) {
            self.free.pop_front();
        }
        let generation = self.next_generation(slot);
        self.slots[slot as usize].generation = generation;
        self.enter(slot, State::Leased { lease, holder });
        generation
    }

    /// A lease claimed by whoever holds it already, or by the gateway that takes over.
    pub(crate) fn confirm(
        &mut self,
        slot: Slot,
        generation: Generation,
        key: Key,
        holder: Holder,
    ) -> bool {
        match (
            self.slots.get(slot as usize).map(|e| e.generation),
            self.live_lease(slot),
        ) {
            (Some(g), Some(lease)) if g == generation && lease.key == key => {
                self.enter(slot, State::Leased { lease, holder });
                true
            }
            _ => false,
        }
    }

    fn leased_to(&self, slot: Slot, generation: Generation, holder: Holder) -> Option<LeaseTag> {
        let entry = self.slots.get(slot as usize)?;
        match entry.state {
            State::Leased { lease, holder: h } if entry.generation == generation && h == holder => {
                Some(lease)
            }
            _ => None,
        }
    }

    /// The session may come back until then. Without time to, the slot is to be cleaned.
    pub(crate) fn linger(
        &mut self,
        slot: Slot,
        generation: Generation,
        holder: Holder,
        until: Instant,
    ) -> bool {
        let Some(lease) = self.leased_to(slot, generation, holder) else {
            return false;
        };
        self.enter(slot, State::Lingering { lease, until });
        true
    }

    /// The session is over; the slot is to be cleaned.
    pub(crate) fn release(&mut self, slot: Slot, generation: Generation, holder: Holder) -> bool {
        let Some(lease) = self.leased_to(slot, generation, holder) else {
            return false;
        };
        self.enter(slot, State::Cleaning { lease: Some(lease) });
        true
    }

    /// A gateway is gone: all it held lingers.
    pub(crate) fn holder_gone(&mut self, holder: Holder, until: Instant) {
        for slot in 0..self.len() {
            if let State::Leased { lease, holder: h } = self.slots[slot as usize].state
                && h == holder
            {
                self.enter(slot, State::Lingering { lease, until });
            }
        }
    }

    /// When the next lingering lease ends.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.slots
            .iter()
            .filter_map(|e| match e.state {
                State::Lingering { until, .. } => Some(until),
                _ => None,
            })
            .min()
    }

    /// Ends the leases whose time is over and returns them, to be cleaned.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Live> {
        if self.counts.lingering == 0 {
            return Vec::new();
        }
        let over: Vec<Live> = self
            .live()
            .filter(|l| matches!(self.slots[l.slot as usize].state, State::Lingering { until, .. } if until <= now))
            .collect();
        for l in &over {
            self.enter(
                l.slot,
                State::Cleaning {
                    lease: Some(l.lease),
                },
            );
        }
        over
    }

    /// The device vanished or was changed. Returns the lease's generation and holder, if it had one,
    /// and whether the slot was not being cleaned already.
    pub(crate) fn lost(&mut self, slot: Slot) -> (Option<(Generation, Holder)>, bool) {
        let Some(entry) = self.slots.get(slot as usize) else {
            return (None, false);
        };
        let (told, lease) = match entry.state {
            State::Cleaning { .. } => return (None, false),
            State::Leased { lease, holder } => (Some((entry.generation, holder)), Some(lease)),
            State::Lingering { lease, .. } => (None, Some(lease)),
            State::Free => {
                self.free.retain(|&s| s != slot);
                (None, None)
            }
        };
        self.enter(slot, State::Cleaning { lease });
        (told, true)
    }

    /// What the slots to be cleaned after a restart had been leased as.
    pub(crate) fn cleaning(&self) -> impl Iterator<Item = (Slot, Option<LeaseTag>)> + '_ {
        (0..).zip(&self.slots).filter_map(|(s, e)| match e.state {
            State::Cleaning { lease } => Some((s, lease)),
            _ => None,
        })
    }

    /// The slot is proven clean, on this device.
    pub(crate) fn cleaned(&mut self, slot: Slot, index: u32) {
        if let Some(entry) = self.slots.get_mut(slot as usize)
            && matches!(entry.state, State::Cleaning { .. })
        {
            entry.index = index;
            self.enter(slot, State::Free);
        }
    }

    /// A held device was made again for its lease.
    pub(crate) fn set_index(&mut self, slot: Slot, index: u32) {
        self.slots[slot as usize].index = index;
    }

    /// Slots to add now, so that demand never waits for creation.
    pub(crate) fn wanted(&self, grow: u32, max: u32) -> u32 {
        let low = self.counts.free < grow.div_ceil(2);
        if low {
            grow.min(max.saturating_sub(self.len()))
        } else {
            0
        }
    }
}

/// A lease as a tag.
pub(crate) fn lease(key: Key, kind: Kind, class: Class) -> LeaseTag {
    LeaseTag { key, kind, class }
}

/// How long a holder has to let go of a lease another session has acquired.
pub(crate) const LET_GO: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> Key {
        Key([n; 16])
    }

    fn packets(n: u8) -> LeaseTag {
        lease(key(n), Kind::Packets, 0)
    }

    fn pool(n: u32) -> Pool {
        let mut p = Pool::default();
        for i in 0..n {
            p.add(i + 10, Tag::NEW, true, Instant::now());
        }
        p
    }

    fn sum(p: &Pool) -> u32 {
        let c = p.counts();
        c.free + c.leased + c.lingering + c.cleaning
    }

    #[test]
    fn a_lease_goes_round() {
        let now = Instant::now();
        let mut p = pool(2);
        assert_eq!(p.find(key(1)), Acquired::Fresh(0));
        let g = p.grant(0, packets(1), 7);
        assert!(matches!(
            p.find(key(1)),
            Acquired::Held {
                slot: 0,
                holder: 7,
                ..
            }
        ));
        assert!(!p.linger(0, g, 8, now), "another connection");
        assert!(!p.linger(0, g + 1, 7, now), "another generation");
        assert!(p.linger(0, g, 7, now + LET_GO));
        assert!(!p.release(0, g, 7), "twice");
        assert_eq!(p.find(key(1)), Acquired::Resumed(0));
        assert_eq!(p.grant(0, packets(1), 9), g + 1);
        assert!(p.release(0, g + 1, 9));
        assert_eq!(
            p.counts(),
            Counts {
                free: 1,
                cleaning: 1,
                ..Counts::default()
            }
        );
        assert_eq!(
            p.find(key(1)),
            Acquired::Fresh(1),
            "a released key has nothing"
        );
        p.cleaned(0, 44);
        assert_eq!((p.index(0), p.counts().free), (44, 2));
        assert_eq!(
            p.find(key(2)),
            Acquired::Fresh(1),
            "the slot used last is reused last"
        );
    }

    #[test]
    fn lingering_ends() {
        let now = Instant::now();
        let mut p = pool(1);
        p.grant(0, packets(1), 1);
        p.holder_gone(1, now + LET_GO);
        assert_eq!(p.next_deadline(), Some(now + LET_GO));
        assert!(p.expire(now).is_empty());
        assert_eq!(p.expire(now + LET_GO).len(), 1);
        assert_eq!(p.counts().cleaning, 1);
        assert_eq!(p.find(key(1)), Acquired::Full);
    }

    #[test]
    fn a_restart_finds_its_leases_and_doubts_the_rest() {
        let now = Instant::now();
        let mut p = Pool::default();
        p.add(
            10,
            Tag {
                generation: 5,
                lease: Some(packets(1)),
            },
            true,
            now + LET_GO,
        );
        p.add(
            11,
            Tag {
                generation: 2,
                lease: None,
            },
            true,
            now,
        );
        p.add(
            12,
            Tag {
                generation: 3,
                lease: Some(packets(2)),
            },
            false,
            now,
        );
        p.add(
            13,
            Tag {
                generation: 3,
                lease: Some(packets(1)),
            },
            true,
            now,
        );
        assert_eq!(
            p.counts(),
            Counts {
                free: 1,
                lingering: 1,
                cleaning: 2,
                leased: 0
            }
        );
        assert!(!p.confirm(0, 4, key(1), 1));
        assert!(!p.confirm(0, 5, key(2), 1));
        assert!(p.confirm(0, 5, key(1), 1));
        assert!(p.confirm(0, 5, key(1), 2), "a successor takes it over");
        assert!(!p.linger(0, 5, 1, now), "and its predecessor has lost it");
    }

    #[test]
    fn a_lost_device_ends_its_lease() {
        let mut p = pool(2);
        let g = p.grant(0, packets(1), 3);
        assert_eq!(p.lost(0), (Some((g, 3)), true));
        assert_eq!(p.lost(0), (None, false));
        assert_eq!(p.lost(1), (None, true));
        assert_eq!(p.find(key(1)), Acquired::Full);
        assert_eq!(p.lost(9), (None, false));
    }

    #[test]
    fn the_pool_is_conserved_under_any_operations() {
        let start = Instant::now();
        let mut p = pool(5);
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |n: u64| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x % n
        };
        let mut held: Vec<(Slot, Generation, Holder)> = Vec::new();
        for step in 0..100_000_u64 {
            let now = start + Duration::from_millis(step);
            let slot = u32::try_from(next(7)).unwrap();
            let generation = u32::try_from(next(40)).unwrap();
            let holder = next(3);
            match next(8) {
                0 | 1 => {
                    let k = packets(u8::try_from(next(9) + 1).unwrap());
                    if let Acquired::Fresh(s)
                    | Acquired::Resumed(s)
                    | Acquired::Held { slot: s, .. } = p.find(k.key)
                    {
                        held.push((s, p.grant(s, k, holder), holder));
                    }
                }
                2 => drop(p.release(slot, generation, holder)),
                3 => drop(p.linger(slot, generation, holder, now + LET_GO)),
                4 if !held.is_empty() => {
                    let (s, g, h) =
                        held.swap_remove(usize::try_from(next(held.len() as u64)).unwrap());
                    if next(2) == 0 {
                        p.release(s, g, h)
                    } else {
                        p.linger(s, g, h, now)
                    };
                }
                5 => p.holder_gone(holder, now + LET_GO),
                6 => drop(p.lost(slot)),
                _ => {
                    p.expire(now);
                    p.cleaned(slot, 1);
                }
            }
            assert_eq!(sum(&p), 5, "step {step}");
            assert_eq!(p.free.len(), p.counts.free as usize, "step {step}");
            let live = p.counts.leased + p.counts.lingering;
            assert_eq!(p.keys.len(), live as usize, "step {step}");
        }
    }

    #[test]
    fn growth_runs_ahead_and_stops_at_the_limit() {
        let mut p = pool(4);
        assert_eq!(p.wanted(4, 16), 0);
        p.grant(0, packets(1), 1);
        p.grant(1, packets(2), 1);
        assert_eq!(p.wanted(4, 16), 0);
        p.grant(2, packets(3), 1);
        assert_eq!(p.wanted(4, 16), 4);
        assert_eq!(p.wanted(4, 6), 2);
        assert_eq!(p.wanted(4, 4), 0);
    }
}
