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

use rvpn_ipc::{Generation, Key, Slot};

use crate::plan::{LeaseTag, Live, Tag};

/// Which connection holds a lease.
pub(crate) type Holder = u64;

/// How long a holder has to let go of a lease another session has acquired.
pub(crate) const LET_GO: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Leased(Holder),
    /// The session may come back until then.
    Lingering(Instant),
    Cleaning,
}

#[derive(Debug)]
struct Entry {
    generation: Generation,
    /// The device's index; zero while there is none.
    index: u32,
    state: State,
    /// The lease; of a slot that is being cleaned, the former one.
    lease: Option<LeaseTag>,
}

/// What a number that is no slot's stands for: nothing to be had of it, nothing to be done to it.
const NOWHERE: Entry = Entry::new(0, 0, None);

impl Entry {
    const fn new(generation: Generation, index: u32, lease: Option<LeaseTag>) -> Entry {
        let state = State::Cleaning;
        Entry {
            generation,
            index,
            state,
            lease,
        }
    }

    fn live(&self) -> Option<LeaseTag> {
        let live = matches!(self.state, State::Leased(_) | State::Lingering(_));
        self.lease.filter(|_| live)
    }
}

/// How many slots are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) free: u32,
    pub(crate) leased: u32,
    pub(crate) lingering: u32,
    pub(crate) cleaning: u32,
}

impl Counts {
    fn of(&mut self, state: State) -> &mut u32 {
        match state {
            State::Free => &mut self.free,
            State::Leased(_) => &mut self.leased,
            State::Lingering(_) => &mut self.lingering,
            State::Cleaning => &mut self.cleaning,
        }
    }
}

/// The answer to an acquire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acquired {
    /// A free slot, to be opened for this lease.
    Fresh(Slot),
    /// The key's own slot, still open to its flows.
    Resumed(Slot),
    /// The key's own slot, but somebody holds it: he is told, and has a moment to let go.
    Held(Slot, Generation, Holder),
    Full,
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
    pub(crate) fn add(&mut self, index: u32, tag: Tag, sound: bool, until: Instant) {
        let Tag { generation, lease } = tag;
        let state = match lease {
            Some(l) if sound && !self.keys.contains_key(&l.key) => State::Lingering(until),
            None if sound => State::Free,
            _ => State::Cleaning,
        };
        let slot = self.len();
        self.counts.cleaning += 1;
        self.slots.push(Entry::new(generation, index, lease));
        self.enter(slot, state, lease);
    }

    /// Moves a slot to a state, keeping counts, keys and the free list true.
    fn enter(&mut self, slot: Slot, state: State, lease: Option<LeaseTag>) {
        let entry = &mut self.slots[slot as usize];
        *self.counts.of(entry.state) -= 1;
        *self.counts.of(state) += 1;
        if let Some(l) = entry.live() {
            self.keys.remove(&l.key);
        }
        if entry.state == State::Free {
            let at = self.free.iter().position(|&s| s == slot);
            at.and_then(|at| self.free.remove(at));
        }
        (entry.state, entry.lease) = (state, lease);
        if let Some(l) = entry.live() {
            self.keys.insert(l.key, slot);
        }
        if state == State::Free {
            self.free.push_back(slot);
        }
    }

    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    fn entry(&self, slot: Slot) -> &Entry {
        self.slots.get(slot as usize).unwrap_or(&NOWHERE)
    }

    pub(crate) fn index(&self, slot: Slot) -> u32 {
        self.entry(slot).index
    }

    pub(crate) fn generation(&self, slot: Slot) -> Generation {
        self.entry(slot).generation
    }

    /// The slot's lease, if it has one.
    pub(crate) fn lease(&self, slot: Slot) -> Option<LeaseTag> {
        self.entry(slot).live()
    }

    /// The generation of a slot that is to be cleaned, and what it was leased as.
    pub(crate) fn former(&self, slot: Slot) -> Tag {
        let entry = self.entry(slot);
        let lease = entry.lease.filter(|_| entry.state == State::Cleaning);
        Tag::new(entry.generation, lease)
    }

    fn entries(&self) -> impl Iterator<Item = (Slot, &Entry)> {
        (0..).zip(&self.slots)
    }

    /// Every slot with a lease, for a table made anew.
    pub(crate) fn live(&self) -> Vec<Live> {
        let live = |(slot, e): (Slot, &Entry)| Some(Live::new(slot, e.index, e.live()?));
        self.entries().filter_map(live).collect()
    }

    /// Every slot that has a device.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (Slot, u32)> {
        let devices = self.entries().map(|(slot, e)| (slot, e.index));
        devices.filter(|d| d.1 != 0)
    }

    /// Every slot that is to be cleaned.
    pub(crate) fn cleaning(&self) -> Vec<Slot> {
        let found = self.entries().filter(|e| e.1.state == State::Cleaning);
        found.map(|e| e.0).collect()
    }

    /// Finds the slot for a key; [`Pool::grant`] makes it the holder's once its device is open.
    pub(crate) fn find(&self, key: Key) -> Acquired {
        let Some(&slot) = self.keys.get(&key) else {
            let next = self.free.front().copied();
            return next.map_or(Acquired::Full, Acquired::Fresh);
        };
        let entry = self.entry(slot);
        match entry.state {
            State::Leased(holder) => Acquired::Held(slot, entry.generation, holder),
            _ => Acquired::Resumed(slot),
        }
    }

    /// The generation the slot's next lease will have.
    pub(crate) fn next_generation(&self, slot: Slot) -> Generation {
        self.generation(slot).checked_add(1).unwrap_or(1)
    }

    pub(crate) fn grant(&mut self, slot: Slot, lease: LeaseTag, holder: Holder) -> Generation {
        let generation = self.next_generation(slot);
        self.slots[slot as usize].generation = generation;
        self.enter(slot, State::Leased(holder), Some(lease));
        generation
    }

    /// A lease claimed by whoever holds it already, or by the gateway that takes over.
    pub(crate) fn confirm(&mut self, slot: Slot, g: Generation, key: Key, holder: Holder) -> bool {
        let lease = self.lease(slot).filter(|l| l.key == key);
        let lease = lease.filter(|_| self.generation(slot) == g);
        if lease.is_some() {
            self.enter(slot, State::Leased(holder), lease);
        }
        lease.is_some()
    }

    /// The holder ends its lease: the session may come back until then, or the slot is to be cleaned.
    pub(crate) fn end(
        &mut self,
        slot: Slot,
        g: Generation,
        holder: Holder,
        until: Option<Instant>,
    ) -> bool {
        let entry = self.entry(slot);
        let held = entry.generation == g && entry.state == State::Leased(holder);
        if held {
            let state = until.map_or(State::Cleaning, State::Lingering);
            self.enter(slot, state, entry.lease);
        }
        held
    }

    /// A gateway is gone: all it held lingers.
    pub(crate) fn holder_gone(&mut self, holder: Holder, until: Instant) {
        for slot in 0..self.len() {
            let entry = self.entry(slot);
            if entry.state == State::Leased(holder) {
                self.enter(slot, State::Lingering(until), entry.lease);
            }
        }
    }

    /// Every lingering slot, and until when.
    fn lingering(&self) -> impl Iterator<Item = (Slot, Instant)> {
        self.entries().filter_map(|(slot, e)| match e.state {
            State::Lingering(until) => Some((slot, until)),
            _ => None,
        })
    }

    /// When the next lingering lease ends.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.lingering().map(|l| l.1).min()
    }

    /// Ends the leases whose time is over and returns their slots, to be cleaned.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Slot> {
        let over = self.lingering().filter(|l| l.1 <= now);
        let over: Vec<Slot> = over.map(|l| l.0).collect();
        for &slot in &over {
            self.enter(slot, State::Cleaning, self.lease(slot));
        }
        over
    }

    /// The device vanished or was changed. False when the slot was being cleaned already;
    /// else also the lease's generation and holder, if it has them.
    pub(crate) fn lost(&mut self, slot: Slot) -> (Option<(Generation, Holder)>, bool) {
        let entry = self.entry(slot);
        let told = match entry.state {
            State::Cleaning => return (None, false),
            State::Leased(holder) => Some((entry.generation, holder)),
            _ => None,
        };
        self.enter(slot, State::Cleaning, entry.lease);
        (told, true)
    }

    /// The slot is proven clean, on this device.
    pub(crate) fn cleaned(&mut self, slot: Slot, index: u32) {
        let entry = self.slots.get_mut(slot as usize);
        if let Some(entry) = entry.filter(|e| e.state == State::Cleaning) {
            entry.index = index;
            self.enter(slot, State::Free, None);
        }
    }

    /// The slot's device was made, or made again.
    pub(crate) fn set_index(&mut self, slot: Slot, index: u32) {
        self.slots[slot as usize].index = index;
    }

    /// Slots to add now, so that demand never waits for creation.
    pub(crate) fn wanted(&self, grow: u32, max: u32) -> u32 {
        let room = grow.min(max.saturating_sub(self.len()));
        if self.counts.free < grow.div_ceil(2) {
            room
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvpn_ipc::Kind;

    fn key(n: u8) -> Key {
        Key([n; 16])
    }

    fn packets(n: u8) -> LeaseTag {
        LeaseTag::new(key(n), Kind::Packets, 0)
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
        assert_eq!(p.find(key(1)), Acquired::Held(0, g, 7));
        assert!(!p.end(0, g, 8, Some(now)), "another connection");
        assert!(!p.end(0, g + 1, 7, Some(now)), "another generation");
        assert!(p.end(0, g, 7, Some(now + LET_GO)));
        assert!(!p.end(0, g, 7, None), "twice");
        assert_eq!(p.find(key(1)), Acquired::Resumed(0));
        assert_eq!(p.grant(0, packets(1), 9), g + 1);
        assert!(p.end(0, g + 1, 9, None));
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
        assert!(
            !p.end(0, 5, 1, Some(now)),
            "and its predecessor has lost it"
        );
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
                    if let Acquired::Fresh(s) | Acquired::Resumed(s) | Acquired::Held(s, ..) =
                        p.find(k.key)
                    {
                        held.push((s, p.grant(s, k, holder), holder));
                    }
                }
                2 => drop(p.end(slot, generation, holder, None)),
                3 => drop(p.end(slot, generation, holder, Some(now + LET_GO))),
                4 if !held.is_empty() => {
                    let (s, g, h) =
                        held.swap_remove(usize::try_from(next(held.len() as u64)).unwrap());
                    p.end(s, g, h, (next(2) == 0).then_some(now));
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
