//! From a slot's number to everything the kernel knows it by. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rvpn_ipc::{Class, Generation, Key, Kind, Slot};

use crate::config::Config;

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

/// Interfaces are named by us alone: `rv` and the slot's number.
const NAME_PREFIX: &str = "rv";
const ALIAS_PREFIX: &str = "rvpn1";

/// The slot a device name stands for, if it is exactly one of ours.
pub(crate) fn slot_of(name: &str) -> Option<Slot> {
    let slot: Slot = name.strip_prefix(NAME_PREFIX)?.parse().ok()?;
    (slot < MAX_SLOTS && name == Device::new(slot).name()).then_some(slot)
}

/// The bytes of an address of either family.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Where a slot's /24 and /112 begin, and where its streams leave from.
pub(crate) struct Addresses {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    pub(crate) stream4: Ipv4Addr,
    pub(crate) stream6: Ipv6Addr,
}

pub(crate) fn addresses(c: &Config, slot: Slot) -> Addresses {
    let wide = u128::from(slot);
    Addresses {
        v4: (u32::from(c.pool4.addr()) + slot * 256).into(),
        v6: (u128::from(c.pool6.addr()) + (wide << 64)).into(),
        stream4: (u32::from(c.stream4.addr()) + slot).into(),
        stream6: (u128::from(c.stream6.addr()) + wide).into(),
    }
}

/// A live or lingering lease; of a slot to be cleaned, the former one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) key: Key,
    pub(crate) kind: Kind,
    pub(crate) class: Class,
}

/// A slot's device, with what a restarted helper must know about it: that is kept
/// in the interface's alias, as `rvpn1 GENERATION` or `rvpn1 GENERATION KIND CLASS KEY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) slot: Slot,
    /// The interface's index; zero while there is none.
    pub(crate) index: u32,
    pub(crate) generation: Generation,
    pub(crate) lease: Option<Lease>,
}

impl Device {
    /// Of a slot nobody ever had.
    pub(crate) const fn new(slot: Slot) -> Device {
        Device {
            slot,
            index: 0,
            generation: 0,
            lease: None,
        }
    }

    /// The same under its next lease.
    pub(crate) fn leased(self, lease: Lease) -> Device {
        Device {
            generation: self.generation.checked_add(1).unwrap_or(1),
            lease: Some(lease),
            ..self
        }
    }

    pub(crate) fn name(&self) -> String {
        format!("{NAME_PREFIX}{}", self.slot)
    }

    /// The connection mark of its flows: tag, class, slot.
    pub(crate) fn mark(&self) -> u32 {
        let class = self.lease.map_or(0, |l| u32::from(l.class & 0x0f));
        MARK_TAG | class << MARK_CLASS_SHIFT | (self.slot & 0xffff)
    }

    /// The host's addresses on it: the second of the /24, the first of the /112.
    pub(crate) fn hosts(&self, c: &Config) -> [IpNet; 2] {
        let Addresses { v4, v6, .. } = addresses(c, self.slot);
        let host4 = Ipv4Addr::from(u32::from(v4) + 1);
        [(host4.into(), 24), (v6.into(), 112)].map(|(host, len)| IpNet::new_assert(host, len))
    }

    pub(crate) fn alias(&self) -> String {
        let free = format!("{ALIAS_PREFIX} {}", self.generation);
        let Some(l) = self.lease else { return free };
        let key = u128::from_be_bytes(l.key.0);
        format!("{free} {} {} {key:032x}", l.kind as u8, l.class)
    }

    /// Reads name and alias back; `None` means the device was not made by this helper.
    pub(crate) fn read(name: &str, alias: &str, index: u32) -> Option<Device> {
        let words: Vec<&str> = alias.split(' ').collect();
        let lease = match words.get(2..)? {
            [] => None,
            &[kind, class, key] => Some(Lease {
                key: Key(u128::from_str_radix(key, 16).ok()?.to_be_bytes()),
                kind: Kind::from_wire(kind.parse().ok()?)?,
                class: class.parse().ok()?,
            }),
            _ => return None,
        };
        let device = Device {
            slot: slot_of(name)?,
            index,
            generation: words[1].parse().ok()?,
            lease,
        };
        (device.alias() == alias).then_some(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_exactly() {
        assert_eq!(slot_of(&Device::new(0).name()), Some(0));
        assert_eq!(slot_of(&Device::new(64_999).name()), Some(64_999));
        for foreign in [
            "rv", "rv01", "rv-1", "rv+1", "rv65000", "rvx", "eth0", "rv1.1",
        ] {
            assert_eq!(slot_of(foreign), None, "{foreign}");
        }
    }

    fn leased(slot: Slot, class: Class) -> Device {
        let (key, kind) = (Key([0xab; 16]), Kind::Both);
        Device {
            index: 9,
            generation: 7,
            lease: Some(Lease { key, kind, class }),
            ..Device::new(slot)
        }
    }

    #[test]
    fn marks_separate_slots_and_classes() {
        let mark = |slot, class| leased(slot, class).mark();
        assert_eq!(mark(5, 3), 0x5203_0005);
        assert_eq!(mark(5, 3) & MARK_SLOT_MASK, mark(5, 0) & MARK_SLOT_MASK);
        assert_ne!(mark(5, 0) & MARK_SLOT_MASK, mark(6, 0) & MARK_SLOT_MASK);
        assert_eq!(Device::new(5).mark(), mark(5, 0));
    }

    #[test]
    fn aliases_are_read_back_exactly() {
        let fresh = Device::new(3);
        for device in [fresh, leased(4, 0), leased(5, 15)] {
            let (name, alias) = (device.name(), device.alias());
            let found = Device::read(&name, &alias, device.index);
            assert_eq!(found, Some(device));
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
            assert_eq!(Device::read("rv1", foreign, 1), None, "{foreign}");
        }
        assert_eq!(Device::read("rv01", "rvpn1 1", 1), None);
    }
}
