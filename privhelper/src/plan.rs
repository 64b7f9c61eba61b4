//! From a slot's number to everything the kernel knows it by. Pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use rvpn_ipc::{Class, Generation, Key, Kind, Slot};

use crate::config::{Config, Net4, Net6};

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

/// First address of the slot's /24.
pub(crate) fn v4_base(pool: Net4, slot: Slot) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(pool.addr) + slot * 256)
}

/// The host's address in it.
pub(crate) fn v4_host(pool: Net4, slot: Slot) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(v4_base(pool, slot)) + 1)
}

/// First address of the slot's /112, which is also the host's.
pub(crate) fn v6_base(pool: Net6, slot: Slot) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(pool.addr) + (u128::from(slot) << 64))
}

/// The host's addresses on the slot's device, with the slot's prefixes.
pub(crate) fn hosts(config: &Config, slot: Slot) -> (Net4, Net6) {
    let v4 = Net4 {
        addr: v4_host(config.pool4, slot),
        len: 24,
    };
    let v6 = Net6 {
        addr: v6_base(config.pool6, slot),
        len: 112,
    };
    (v4, v6)
}

/// Where the slot's streams leave from.
pub(crate) fn stream4(config: &Config, slot: Slot) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(config.stream4.addr) + slot)
}

/// Where the slot's streams leave from.
pub(crate) fn stream6(config: &Config, slot: Slot) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(config.stream6.addr) + u128::from(slot))
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

const ALIAS_PREFIX: &str = "rvpn1";

impl Tag {
    /// Of a slot nobody ever had.
    pub(crate) const NEW: Tag = Tag {
        generation: 0,
        lease: None,
    };

    /// `rvpn1 GENERATION` or `rvpn1 GENERATION KIND CLASS KEY`.
    pub(crate) fn to_alias(self) -> String {
        use std::fmt::Write as _;
        let mut s = format!("{ALIAS_PREFIX} {}", self.generation);
        if let Some(l) = self.lease {
            let _ = write!(s, " {} {} ", l.kind as u8, l.class);
            for b in l.key.0 {
                let _ = write!(s, "{b:02x}");
            }
        }
        s
    }

    /// Reads an alias back; `None` means the device was not made by this helper.
    pub(crate) fn from_alias(alias: &str) -> Option<Tag> {
        let mut words = alias.split(' ');
        if words.next()? != ALIAS_PREFIX {
            return None;
        }
        let generation = words.next()?.parse().ok()?;
        let lease = match words.next() {
            None => None,
            Some(kind) => Some(LeaseTag {
                kind: Kind::from_wire(kind.parse().ok()?)?,
                class: words.next()?.parse().ok()?,
                key: parse_key(words.next()?)?,
            }),
        };
        words.next().is_none().then_some(Tag { generation, lease })
    }
}

fn parse_key(hex: &str) -> Option<Key> {
    let bytes = hex.as_bytes();
    if bytes.len() != 32 {
        return None;
    }
    let mut key = [0; 16];
    for (to, pair) in key.iter_mut().zip(bytes.chunks_exact(2)) {
        let digit = |b: u8| char::from(b).to_digit(16);
        *to = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(Key(key))
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
