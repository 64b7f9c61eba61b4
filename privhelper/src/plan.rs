//! From a slot's number to everything the kernel knows it by. Pure.

use rvpn_ipc::{Class, Generation, Key, Kind, Slot};

use crate::config::Config;
use crate::net::Net;

/// Interfaces are named by us alone: `rv` and the slot's number.
pub(crate) const NAME_PREFIX: &str = "rv";

/// High bits of every connection mark of ours, so that a mask tells them from other software's.
pub(crate) const MARK_TAG: u32 = 0x5200_0000;
/// The bits a mark's tag occupies.
pub(crate) const MARK_TAG_MASK: u32 = 0xff00_0000;
/// The bits a mark's tag and slot occupy; the class lies between.
pub(crate) const MARK_SLOT_MASK: u32 = 0xff00_ffff;
/// Where the class lies.
pub(crate) const MARK_CLASS_SHIFT: u32 = 16;

/// Slots a plan can number: the last /64 of a /48 belongs to the streams.
pub(crate) const MAX_SLOTS: u32 = 65_000;

pub(crate) fn device_name(slot: Slot) -> String {
    format!("{NAME_PREFIX}{slot}")
}

/// The slot a device name stands for, if it is exactly one of ours.
pub(crate) fn slot_of(name: &str) -> Option<Slot> {
    let slot: Slot = name.strip_prefix(NAME_PREFIX)?.parse().ok()?;
    (slot < MAX_SLOTS && device_name(slot) == name).then_some(slot)
}

/// The connection mark of a lease: tag, class, slot.
pub(crate) fn mark(slot: Slot, class: Class) -> u32 {
    MARK_TAG | u32::from(class & 0x0f) << MARK_CLASS_SHIFT | (slot & 0xffff)
}

/// What a slot's clients have: its /24 and its /112.
pub(crate) fn prefixes(c: &Config, slot: Slot) -> [Net; 2] {
    let slot = u128::from(slot);
    [c.pool4.at(slot * 256, 24), c.pool6.at(slot << 64, 112)]
}

/// The host's addresses on the slot's device: the second of the one, the first of the other.
pub(crate) fn hosts(c: &Config, slot: Slot) -> [Net; 2] {
    let [v4, v6] = prefixes(c, slot);
    [v4.at(1, 24), v6]
}

/// Where the slot's streams leave from.
pub(crate) fn streams(c: &Config, slot: Slot) -> [Net; 2] {
    let slot = slot.into();
    [c.stream4.at(slot, 32), c.stream6.at(slot, 128)]
}

/// What a restarted helper must know about a lease, kept in the interface's alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    pub(crate) generation: Generation,
    pub(crate) lease: Option<LeaseTag>,
}

/// The live or lingering lease of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeaseTag {
    pub(crate) key: Key,
    pub(crate) kind: Kind,
    pub(crate) class: Class,
}

impl LeaseTag {
    pub(crate) const fn new(key: Key, kind: Kind, class: Class) -> LeaseTag {
        LeaseTag { key, kind, class }
    }
}

/// A slot's device and the lease on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) slot: Slot,
    pub(crate) index: u32,
    pub(crate) lease: LeaseTag,
}

impl Live {
    pub(crate) const fn new(slot: Slot, index: u32, lease: LeaseTag) -> Live {
        Live { slot, index, lease }
    }
}

const ALIAS_PREFIX: &str = "rvpn1";

impl Tag {
    /// Of a slot nobody ever had.
    pub(crate) const NEW: Tag = Tag::new(0, None);

    pub(crate) const fn new(generation: Generation, lease: Option<LeaseTag>) -> Tag {
        Tag { generation, lease }
    }

    /// `rvpn1 GENERATION` or `rvpn1 GENERATION KIND CLASS KEY`.
    pub(crate) fn to_alias(self) -> String {
        let free = format!("{ALIAS_PREFIX} {}", self.generation);
        let Some(l) = self.lease else { return free };
        let key = u128::from_be_bytes(l.key.0);
        format!("{free} {} {} {key:032x}", l.kind as u8, l.class)
    }

    /// Reads an alias back; `None` means the device was not made by this helper.
    pub(crate) fn from_alias(alias: &str) -> Option<Tag> {
        let words: Vec<&str> = alias.split(' ').collect();
        let lease = match words.get(2..)? {
            [] => None,
            &[kind, class, key] => {
                let kind = Kind::from_wire(kind.parse().ok()?)?;
                let key = Key(u128::from_str_radix(key, 16).ok()?.to_be_bytes());
                Some(LeaseTag::new(key, kind, class.parse().ok()?))
            }
            _ => return None,
        };
        let tag = Tag::new(words[1].parse().ok()?, lease);
        (tag.to_alias() == alias).then_some(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_exactly() {
        assert_eq!(slot_of(&device_name(0)), Some(0));
        assert_eq!(slot_of(&device_name(64_999)), Some(64_999));
        for foreign in [
            "rv", "rv01", "rv-1", "rv+1", "rv65000", "rvx", "eth0", "rv1.1",
        ] {
            assert_eq!(slot_of(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn marks_separate_slots_and_classes() {
        assert_eq!(mark(5, 3), 0x5203_0005);
        assert_eq!(mark(5, 3) & MARK_SLOT_MASK, mark(5, 0) & MARK_SLOT_MASK);
        assert_ne!(mark(5, 0) & MARK_SLOT_MASK, mark(6, 0) & MARK_SLOT_MASK);
    }

    #[test]
    fn aliases_are_read_back_exactly() {
        let lease = LeaseTag {
            key: Key([0xab; 16]),
            kind: Kind::Both,
            class: 2,
        };
        for tag in [
            Tag {
                generation: 0,
                lease: None,
            },
            Tag {
                generation: 7,
                lease: Some(lease),
            },
        ] {
            assert_eq!(Tag::from_alias(&tag.to_alias()), Some(tag));
        }
        for foreign in [
            "",
            "rvpn1",
            "rvpn2 1",
            "rvpn1 x",
            "rvpn1 1 1 0",
            "rvpn1 1 9 0 00",
            "rvpn1 1 ",
        ] {
            assert_eq!(Tag::from_alias(foreign), None, "{foreign}");
        }
    }
}
