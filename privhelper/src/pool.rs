//! The lease state machine. Pure: time is handed in, effects are handed out.
//!
//! ```text
//!     free ──acquire──► leased ──linger──► lingering ──same key──► leased
//!                          └──release / linger over──► cleaning ──► free
//! ```
//!
//! Every slot is in exactly one state. Counts, keys and the order of reuse are
//! not kept beside the slots but read off them: ten thousand are walked in microseconds.

use std::time::{Duration, Instant};

use rvpn_ipc::{Generation, Key, Slot};

use crate::plan::{Device, Lease};

/// Which connection holds a lease.
pub(crate) type Holder = u64;

/// How long a holder has to let go of a lease another session has acquired.
pub(crate) const LET_GO: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// By how many were freed before it: the slot used last is reused last.
    Free(u64),
    Leased(Holder),
    /// The session may come back until then.
    Lingering(Instant),
    Cleaning,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Of a slot that is being cleaned, with the former lease.
    pub(crate) device: Device,
    pub(crate) state: State,
}

impl Entry {
    /// The lease, if it is still one.
    pub(crate) fn live(&self) -> Option<Lease> {
        let live = matches!(self.state, State::Leased(_) | State::Lingering(_));
        self.device.lease.filter(|_| live)
    }

    /// Its holder, if the lease is of this generation.
    fn holder(&self, g: Generation) -> Option<Holder> {
        match self.state {
            State::Leased(holder) if self.device.generation == g => Some(holder),
            _ => None,
        }
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

#[derive(Debug, Default)]
pub(crate) struct Pool {
    /// The slots, by number.
    pub(crate) entries: Vec<Entry>,
    freed: u64,
}

impl Pool {
    fn free(&mut self) -> State {
        self.freed += 1;
        State::Free(self.freed)
    }

    /// Adds the next slot, free or as its device's tag says; `sound` false sends it to cleaning first.
    pub(crate) fn add(&mut self, device: Device, sound: bool, until: Instant) {
        let state = match device.lease {
            _ if !sound => State::Cleaning,
            Some(_) => State::Lingering(until),
            None => self.free(),
        };
        self.entries.push(Entry { device, state });
    }

    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for entry in &self.entries {
            *match entry.state {
                State::Free(_) => &mut counts.free,
                State::Leased(_) => &mut counts.leased,
                State::Lingering(_) => &mut counts.lingering,
                State::Cleaning => &mut counts.cleaning,
            } += 1;
        }
        counts
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Entry> {
        self.entries.get(slot as usize)
    }

    /// The devices of every slot with a lease, for a table made anew.
    pub(crate) fn live(&self) -> Vec<Device> {
        let live = self.entries.iter().filter(|e| e.live().is_some());
        live.map(|e| e.device).collect()
    }

    /// The slot for a key: its own, or the next free one.
    pub(crate) fn find(&self, key: Key) -> Option<&Entry> {
        let mut all = self.entries.iter();
        let own = all.find(|e| e.live().is_some_and(|l| l.key == key));
        let since = |e: &&Entry| match e.state {
            State::Free(since) => since,
            _ => u64::MAX,
        };
        let next = || self.entries.iter().min_by_key(since);
        own.or_else(|| next().filter(|e| since(e) < u64::MAX))
    }

    /// The slot is the holder's, on this device with this lease.
    pub(crate) fn grant(&mut self, device: Device, holder: Holder) {
        let state = State::Leased(holder);
        self.entries[device.slot as usize] = Entry { device, state };
    }

    /// A lease claimed by whoever holds it already, or by the gateway that takes over.
    pub(crate) fn confirm(
        &mut self,
        slot: Slot,
        g: Generation,
        key: Key,
        holder: Holder,
    ) -> Option<Device> {
        let entry = self.entries.get_mut(slot as usize)?;
        let named = entry.live()?.key == key && entry.device.generation == g;
        if named {
            entry.state = State::Leased(holder);
        }
        named.then_some(entry.device)
    }

    /// The holder ends its lease: the session may come back until then, or the slot is to be cleaned.
    pub(crate) fn end(
        &mut self,
        slot: Slot,
        g: Generation,
        holder: Holder,
        until: Option<Instant>,
    ) -> bool {
        let entry = self.entries.get_mut(slot as usize);
        let held = entry.filter(|e| e.holder(g) == Some(holder));
        let state = until.map_or(State::Cleaning, State::Lingering);
        held.map(|e| e.state = state).is_some()
    }

    /// A gateway is gone: all it held lingers.
    pub(crate) fn holder_gone(&mut self, holder: Holder, until: Instant) {
        let held = |e: &&mut Entry| e.state == State::Leased(holder);
        let held = self.entries.iter_mut().filter(held);
        held.for_each(|e| e.state = State::Lingering(until));
    }

    /// When the next lingering lease ends.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let until = |e: &Entry| match e.state {
            State::Lingering(until) => Some(until),
            _ => None,
        };
        self.entries.iter().filter_map(until).min()
    }

    /// Ends the leases whose time is over and returns their slots, to be cleaned.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Slot> {
        let mut over = Vec::new();
        for e in &mut self.entries {
            if matches!(e.state, State::Lingering(until) if until <= now) {
                e.state = State::Cleaning;
                over.push(e.device.slot);
            }
        }
        over
    }

    /// The device vanished or was changed: the slot is to be cleaned. What it was, unless
    /// it is being cleaned already.
    pub(crate) fn lost(&mut self, slot: Slot) -> Option<Entry> {
        let entry = self.entries.get_mut(slot as usize);
        let entry = entry.filter(|e| e.state != State::Cleaning)?;
        let state = State::Cleaning;
        Some(std::mem::replace(entry, Entry { state, ..*entry }))
    }

    /// The slot is proven clean, on this device.
    pub(crate) fn cleaned(&mut self, device: Device) {
        let state = self.free();
        let entry = self.entries.get_mut(device.slot as usize);
        if let Some(entry) = entry.filter(|e| e.state == State::Cleaning) {
            *entry = Entry { device, state };
        }
    }

    /// Slots to add now, so that demand never waits for creation: none while some are being made.
    pub(crate) fn wanted(&self, grow: u32, max: u32) -> u32 {
        let made = self.entries.iter().all(|e| e.device.index != 0);
        let few = self.counts().free < grow.div_ceil(2);
        let room = grow.min(max.saturating_sub(self.len()));
        if made && few { room } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvpn_ipc::Kind;

    fn packets(n: u8) -> Lease {
        Lease {
            key: Key([n; 16]),
            kind: Kind::Packets,
            class: 0,
        }
    }

    fn device(slot: Slot, generation: Generation, lease: Option<Lease>) -> Device {
        Device {
            slot,
            index: slot + 10,
            generation,
            lease,
        }
    }

    fn pool(n: u32) -> Pool {
        let mut p = Pool::default();
        for slot in 0..n {
            p.add(device(slot, 0, None), true, Instant::now());
        }
        p
    }

    /// The slot a key leads to, and its state; what a helper opens for it is granted.
    fn found(p: &Pool, n: u8) -> Option<(Slot, State)> {
        let entry = p.find(packets(n).key)?;
        Some((entry.device.slot, entry.state))
    }

    fn grant(p: &mut Pool, n: u8, holder: Holder) -> (Slot, Generation) {
        let device = p.find(packets(n).key).unwrap().device.leased(packets(n));
        p.grant(device, holder);
        (device.slot, device.generation)
    }

    #[test]
    fn a_lease_goes_round() {
        let now = Instant::now();
        let mut p = pool(2);
        let (slot, g) = grant(&mut p, 1, 7);
        assert_eq!(slot, 0);
        assert_eq!(found(&p, 1), Some((0, State::Leased(7))));
        assert!(!p.end(0, g, 8, Some(now)), "another connection");
        assert!(!p.end(0, g + 1, 7, Some(now)), "another generation");
        assert!(p.end(0, g, 7, Some(now + LET_GO)));
        assert!(!p.end(0, g, 7, None), "twice");
        assert_eq!(found(&p, 1), Some((0, State::Lingering(now + LET_GO))));
        assert_eq!(grant(&mut p, 1, 9), (0, g + 1));
        assert!(p.end(0, g + 1, 9, None));
        let expected = Counts {
            free: 1,
            cleaning: 1,
            ..Counts::default()
        };
        assert_eq!(p.counts(), expected);
        let next = found(&p, 1).map(|f| f.0);
        assert_eq!(next, Some(1), "a released key has nothing");
        let clean = Device {
            index: 44,
            ..device(0, g + 1, None)
        };
        p.cleaned(clean);
        assert_eq!(
            (p.get(0).unwrap().device.index, p.counts().free),
            (44, 2),
            "on its new device"
        );
        let next = found(&p, 2).map(|f| f.0);
        assert_eq!(next, Some(1), "the slot used last is reused last");
    }

    #[test]
    fn lingering_ends() {
        let now = Instant::now();
        let mut p = pool(1);
        grant(&mut p, 1, 1);
        p.holder_gone(1, now + LET_GO);
        assert_eq!(p.next_deadline(), Some(now + LET_GO));
        assert!(p.expire(now).is_empty());
        assert_eq!(p.expire(now + LET_GO), [0]);
        assert_eq!(p.counts().cleaning, 1);
        assert_eq!(found(&p, 1), None);
    }

    #[test]
    fn a_restart_finds_its_leases_and_doubts_the_rest() {
        let now = Instant::now();
        let mut p = Pool::default();
        p.add(device(0, 5, Some(packets(1))), true, now + LET_GO);
        p.add(device(1, 2, None), true, now);
        p.add(device(2, 3, Some(packets(2))), false, now);
        let expected = Counts {
            free: 1,
            lingering: 1,
            cleaning: 1,
            leased: 0,
        };
        assert_eq!(p.counts(), expected);
        let key = |n| packets(n).key;
        assert_eq!(p.confirm(0, 4, key(1), 1), None);
        assert_eq!(p.confirm(0, 5, key(2), 1), None);
        assert_eq!(p.confirm(2, 3, key(2), 1), None, "it is being cleaned");
        assert!(p.confirm(0, 5, key(1), 1).is_some());
        let taken = p.confirm(0, 5, key(1), 2);
        assert!(taken.is_some(), "a successor takes it over");
        assert!(
            !p.end(0, 5, 1, Some(now)),
            "and its predecessor has lost it"
        );
    }

    #[test]
    fn a_lost_device_ends_its_lease() {
        let mut p = pool(2);
        let (slot, g) = grant(&mut p, 1, 3);
        let lost = p.lost(slot).unwrap();
        assert_eq!(
            (lost.device.generation, lost.state),
            (g, State::Leased(3)),
            "its holder is to be told"
        );
        assert_eq!(p.lost(slot), None);
        assert!(matches!(p.lost(1).unwrap().state, State::Free(_)));
        assert_eq!(found(&p, 1), None);
        assert_eq!(p.lost(9), None);
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
                    let n = u8::try_from(next(9) + 1).unwrap();
                    if found(&p, n).is_some() {
                        let (slot, generation) = grant(&mut p, n, holder);
                        held.push((slot, generation, holder));
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
                    p.cleaned(device(slot, generation, None));
                }
            }
            let c = p.counts();
            assert_eq!(c.free + c.leased + c.lingering + c.cleaning, 5, "{step}");
            let keys: std::collections::BTreeSet<_> =
                p.live().iter().map(|d| d.lease.unwrap().key).collect();
            let live = (c.leased + c.lingering) as usize;
            assert_eq!(keys.len(), live, "one slot a key: step {step}");
        }
    }

    #[test]
    fn growth_runs_ahead_and_stops_at_the_limit() {
        let mut p = pool(4);
        assert_eq!(p.wanted(4, 16), 0);
        grant(&mut p, 1, 1);
        grant(&mut p, 2, 1);
        assert_eq!(p.wanted(4, 16), 0);
        grant(&mut p, 3, 1);
        assert_eq!(p.wanted(4, 16), 4);
        assert_eq!(p.wanted(4, 6), 2);
        assert_eq!(p.wanted(4, 4), 0);
        p.add(Device::new(4), false, Instant::now());
        assert_eq!(p.wanted(4, 16), 0, "some are being made");
    }
}
