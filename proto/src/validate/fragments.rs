//! How many datagrams a client may leave in pieces.
//!
//! The kernel keeps the fragments of all clients in one memory and an incomplete
//! datagram for half a minute: some two thousand of them from one client, sent in
//! a moment, and no one else's fragments pass (DOS-09). So each client has few
//! places, of its own. A place is free again as soon as its datagram is complete
//! *for sure*: only pieces that join end to end are added up, since duplicates
//! would otherwise make up a length with a hole in it.

use super::DropReason;
use crate::packet::{Fragment, Parsed, Side, Version, array};

/// Datagrams that may be incomplete at the same time.
pub const FRAGMENTED: usize = 64;
/// Bytes in incomplete datagrams: the kernel's memory for all of them is 4 MiB.
pub const FRAGMENT_BYTES: u32 = 256 * 1024;
/// The kernel forgets a datagram after 30 seconds, we a little later.
pub const FRAGMENT_SECONDS: u64 = 31;

/// The incomplete datagrams of one client. About 4 KiB; it never grows.
#[derive(Clone, Debug)]
pub struct FragmentBudget {
    places: [Option<Place>; FRAGMENTED],
}

#[derive(Clone, Copy, Debug)]
struct Place {
    key: Key,
    /// When the kernel has forgotten it.
    due: u64,
    /// Bytes of it that were let through.
    bytes: u32,
    /// One stretch without holes.
    begin: u32,
    end: u32,
    /// The datagram's length, once its last part was seen.
    total: Option<u32>,
    /// Some parts lie elsewhere: it is kept until its time is over.
    scattered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    destination: [u8; 16],
    source: [u8; 4],
    id: u32,
    version: Version,
    protocol: u8,
}

impl Default for FragmentBudget {
    fn default() -> Self {
        Self::new()
    }
}

impl FragmentBudget {
    /// Nothing is incomplete.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            places: [None; FRAGMENTED],
        }
    }

    /// Judges a validated packet; whole ones always pass. `now` is in seconds of
    /// a clock that does not go back.
    pub fn admit(&mut self, packet: &[u8], parsed: &Parsed, now: u64) -> Result<(), DropReason> {
        let fragment = match parsed.fragment() {
            Some(fragment) if !parsed.is_whole() => fragment,
            Some(_) | None => return Ok(()),
        };
        let key = key(packet, parsed, fragment).ok_or(DropReason::Truncated)?;
        let carried = u32::from(parsed.len - parsed.l4);
        let (found, used) = self.look(&key, now);
        if used + carried > FRAGMENT_BYTES {
            return Err(DropReason::FragmentBudget);
        }
        let begin = u32::from(fragment.offset);
        let part = (begin, begin + carried, !fragment.more);
        let (index, place) = match found {
            Found::Known(index, place) => (index, place),
            Found::Free(index) => (index, Place::new(key, part.0, now)),
            Found::Full => return Err(DropReason::FragmentBudget),
        };
        let place = place.with(part)?;
        self.places[index] = (!place.is_complete()).then_some(place);
        Ok(())
    }

    /// How many datagrams are incomplete.
    #[must_use]
    pub fn incomplete(&self, now: u64) -> usize {
        let live = |place: &&Option<Place>| place.is_some_and(|place| place.due > now);
        self.places.iter().filter(live).count()
    }

    fn look(&mut self, key: &Key, now: u64) -> (Found, u32) {
        let (mut found, mut used) = (Found::Full, 0);
        for (index, slot) in self.places.iter_mut().enumerate() {
            if slot.is_some_and(|place| place.due <= now) {
                *slot = None;
            }
            match slot {
                Some(place) => {
                    used += place.bytes;
                    if place.key == *key {
                        found = Found::Known(index, *place);
                    }
                }
                None if matches!(found, Found::Full) => found = Found::Free(index),
                None => {}
            }
        }
        (found, used)
    }
}

enum Found {
    Known(usize, Place),
    Free(usize),
    Full,
}

impl Place {
    fn new(key: Key, begin: u32, now: u64) -> Self {
        Self {
            key,
            due: now.saturating_add(FRAGMENT_SECONDS),
            bytes: 0,
            begin,
            end: begin,
            total: None,
            scattered: false,
        }
    }

    /// Overlapping parts are how headers are smuggled past a firewall; nobody
    /// honest sends them, and a copy of a part that has passed is not needed.
    fn with(self, (begin, end, last): (u32, u32, bool)) -> Result<Self, DropReason> {
        let overlaps = begin < self.end && end > self.begin;
        let past = self.total.is_some_and(|total| end > total || last);
        if overlaps || past || (last && self.end > end) {
            return Err(DropReason::Fragment);
        }
        let mut place = self;
        place.bytes += end - begin;
        if begin == self.end {
            place.end = end;
        } else if end == self.begin {
            place.begin = begin;
        } else {
            place.scattered = true;
        }
        if last {
            place.total = Some(end);
        }
        Ok(place)
    }

    fn is_complete(&self) -> bool {
        !self.scattered && self.begin == 0 && self.total == Some(self.end)
    }
}

fn key(packet: &[u8], parsed: &Parsed, fragment: Fragment) -> Option<Key> {
    let source = Side::Source.at(parsed.version);
    let at = Side::Destination.at(parsed.version);
    let mut destination = [0; 16];
    let source = match parsed.version {
        Version::V4 => {
            destination[..4].copy_from_slice(&array::<4>(packet, at)?);
            array(packet, source)?
        }
        Version::V6 => {
            destination = array(packet, at)?;
            // A client has one, so there is nothing to tell apart.
            [0; 4]
        }
    };
    Some(Key {
        destination,
        source,
        id: fragment.id,
        version: parsed.version,
        protocol: parsed.protocol,
    })
}
