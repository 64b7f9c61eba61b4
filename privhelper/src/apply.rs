//! Making the kernel look like the plan, and reading back how far it does.

use std::io;
use std::ops::Range;

use rvpn_ipc::Slot;

use crate::config::{Config, Net};
use crate::journal::Journal;
use crate::kernel::link::{self, Link, Spec};
use crate::kernel::tun::{OFFLOAD_TCP, OFFLOAD_UDP, Tun};
use crate::kernel::{Kernel, ruleset, sysctl};
use crate::plan::{self, Tag};

/// Devices configured in one go: few enough that nothing else waits for long.
pub(crate) const BATCH: u32 = 64;

/// A device of ours as found.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) slot: Slot,
    pub(crate) index: u32,
    pub(crate) tag: Tag,
    /// Exactly as we make them; else it is made again before anybody gets it.
    pub(crate) sound: bool,
}

/// The host's links, sorted into ours and those in our way.
#[derive(Default)]
pub(crate) struct Survey {
    pub(crate) ours: Vec<Device>,
    /// Names and groups of ours on devices we did not make.
    pub(crate) foreign: Vec<String>,
}

pub(crate) fn survey(k: &mut Kernel, config: &Config) -> io::Result<Survey> {
    let mut found = Survey::default();
    for l in link::dump(&mut k.route)? {
        let slot = plan::slot_of(&l.name);
        let tag = Tag::from_alias(&l.alias);
        match (slot, tag, &l.tun) {
            (Some(slot), Some(tag), Some(_)) if l.group == config.link_group => {
                let sound = is_sound(config, &l);
                found.ours.push(Device {
                    slot,
                    index: l.index,
                    tag,
                    sound,
                });
            }
            (None, _, _) if l.group != config.link_group => {}
            _ => found.foreign.push(l.name),
        }
    }
    found.ours.sort_unstable_by_key(|d| d.slot);
    Ok(found)
}

/// Whether the link is a slot exactly as we make them.
pub(crate) fn is_sound(config: &Config, l: &Link) -> bool {
    l.group == config.link_group
        && l.up
        && l.mtu == config.mtu.into()
        && l.tun
            .is_some_and(|t| t.sound && t.owner == Some(config.helper_uid))
}

/// Whether the device still has its host addresses: the IPv6 one comes with a lease.
pub(crate) fn addressed(
    k: &mut Kernel,
    config: &Config,
    slot: Slot,
    index: u32,
    leased: bool,
) -> io::Result<bool> {
    let (v4, v6) = plan::hosts(config, slot);
    let found = link::addresses_of(&mut k.route, index)?;
    Ok(found.contains(&Net::V4(v4)) && (!leased || found.contains(&Net::V6(v6))))
}

/// The error for a device that somebody else made under one of our names.
pub(crate) fn foreign(name: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::AlreadyExists,
        format!(
            "interface '{name}' was not made by this helper: rename or remove it, it is not touched"
        ),
    )
}

/// Switches forwarding on where client traffic comes back in, and keeps our addresses silent there.
pub(crate) fn open_uplinks(k: &mut Kernel, config: &Config, uplinks: &[u32]) -> io::Result<()> {
    let mut journal = Journal::open(&config.state)?;
    for &index in uplinks {
        let name = link::get(&mut k.route, index)?.name;
        journal.raise(&format!("net/ipv4/conf/{name}/forwarding"), "1")?;
        journal.raise(&format!("net/ipv4/conf/{name}/arp_ignore"), "1")?;
        journal.raise(&format!("net/ipv4/conf/{name}/arp_announce"), "2")?;
        if !journal.raise(&format!("net/ipv6/conf/{name}/force_forwarding"), "1")? {
            // A router ignores advertisements unless told otherwise: the default route must stay.
            if sysctl::read(&format!("net/ipv6/conf/{name}/accept_ra"))?.as_deref() == Some("1") {
                journal.raise(&format!("net/ipv6/conf/{name}/accept_ra"), "2")?;
            }
            journal.raise("net/ipv6/conf/all/forwarding", "1")?;
        }
    }
    Ok(())
}

/// Makes the slots' devices: owned, tagged and silent, then persistent, so that a
/// failure before leaves none behind and one after leaves what is known as ours.
/// They come up once nobody holds them: a device without carrier costs the kernel
/// no walk of all IPv6 routes, without which 10,000 take a fifth of the time.
pub(crate) fn create(
    k: &mut Kernel,
    config: &Config,
    slots: Range<Slot>,
) -> io::Result<Vec<(Slot, u32)>> {
    let slots: Vec<_> = slots.map(|s| (s, Tag::NEW)).collect();
    create_tagged(k, config, &slots)
}

pub(crate) fn create_tagged(
    k: &mut Kernel,
    config: &Config,
    slots: &[(Slot, Tag)],
) -> io::Result<Vec<(Slot, u32)>> {
    let mut made = Vec::with_capacity(slots.len());
    for some in slots.chunks(BATCH as usize) {
        let mut tuns = Vec::with_capacity(some.len());
        let mut specs = Vec::with_capacity(some.len());
        for &(slot, tag) in some {
            let (tun, index) = fresh(k, config, slot)?;
            let (host4, _) = plan::hosts(config, slot);
            tuns.push(tun);
            specs.push(Spec {
                index,
                group: config.link_group,
                alias: tag.to_alias(),
                mtu: config.mtu,
                txqueuelen: config.txqueuelen,
                host4,
            });
            made.push((slot, index));
        }
        let done = link::tag(&mut k.route, &specs)
            .and_then(|()| tuns.into_iter().try_for_each(keep))
            .and_then(|()| link::bring_up(&mut k.route, &specs));
        if let Err(e) = done {
            for s in &specs {
                link::delete(&mut k.route, s.index)?;
            }
            return Err(e);
        }
    }
    Ok(made)
}

/// Lets the device outlive its descriptor, which is closed.
fn keep(tun: Tun) -> io::Result<()> {
    forward_v6(&tun.name()?)?;
    tun.persist()
}

/// A device that did not exist before, and its index. From here on it is known
/// by the index alone: a name can be given to something else meanwhile.
fn fresh(k: &mut Kernel, config: &Config, slot: Slot) -> io::Result<(Tun, u32)> {
    let name = plan::device_name(slot);
    if link::index_of(&mut k.route, &name)?.is_some() {
        return Err(foreign(&name));
    }
    let tun = Tun::attach(&name)?;
    #[cfg(feature = "fault-hooks")]
    crate::fault::at("created");
    let index = link::index_of(&mut k.route, &name)?.ok_or_else(|| foreign(&name))?;
    // Only a device without history is ours; the descriptor proves that it is this one.
    let l = link::get(&mut k.route, index)?;
    let blank = l.group == 0 && l.alias.is_empty() && l.tun.is_some_and(|t| t.owner.is_none());
    if !blank || tun.name()? != l.name || l.name != name {
        return Err(foreign(&name));
    }
    tun.own(config.helper_uid)?;
    tun.offload(0)?;
    if sysctl::read(&format!("net/ipv6/conf/{name}/disable_ipv6"))?.as_deref() == Some("1") {
        sysctl::write(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0")?;
    }
    Ok((tun, index))
}

/// Forwarding of IPv6 by interface where the kernel has it (6.17); the uplink's setting covers the rest.
fn forward_v6(name: &str) -> io::Result<()> {
    let setting = format!("net/ipv6/conf/{name}/force_forwarding");
    match sysctl::read(&setting)?.as_deref() {
        Some("0") => sysctl::write(&setting, "1"),
        _ => Ok(()),
    }
}

/// Attaches to a slot's device for its lease, with the offloads of this lease:
/// the former holder's outlive it. `EBUSY`: somebody still holds it.
pub(crate) fn attach(
    k: &mut Kernel,
    config: &Config,
    slot: Slot,
    index: u32,
) -> io::Result<(Tun, u16)> {
    let name = plan::device_name(slot);
    let tun = Tun::attach(&name)?;
    if link::index_of(&mut k.route, &name)? != Some(index) || tun.name()? != name {
        // Deleted meanwhile: what was attached is new, and goes with its descriptor.
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let wanted = if config.offload {
        OFFLOAD_TCP | OFFLOAD_UDP
    } else {
        0
    };
    let offload = tun.offload(wanted)?;
    Ok((tun, offload))
}

/// Deletes the slot's device, which ends every descriptor of it, and makes a new one.
pub(crate) fn recreate(
    k: &mut Kernel,
    config: &Config,
    slot: Slot,
    index: u32,
    tag: Tag,
) -> io::Result<u32> {
    if index != 0 {
        link::delete(&mut k.route, index)?;
    }
    // One made by an earlier try that failed later on is known by its tag alone.
    if let Some(left) = link::index_of(&mut k.route, &plan::device_name(slot))? {
        let l = link::get(&mut k.route, left)?;
        if l.group == config.link_group && l.tun.is_some() && Tag::from_alias(&l.alias).is_some() {
            link::delete(&mut k.route, left)?;
        }
    }
    let made = create_tagged(k, config, &[(slot, tag)])?;
    made.first()
        .map(|m| m.1)
        .ok_or_else(|| io::Error::other("no device was made"))
}

/// What holds for all slots: the stream ranges, the uplinks, the table. Returns its rules.
pub(crate) fn base(
    k: &mut Kernel,
    config: &Config,
    uplinks: &[u32],
    leases: &[ruleset::Element],
) -> io::Result<usize> {
    let rules = ruleset::ensure(k, config, uplinks, leases)?;
    link::any_ip(&mut k.route, Net::V4(config.stream4), true)?;
    link::any_ip(&mut k.route, Net::V6(config.stream6), true)?;
    open_uplinks(k, config, uplinks)?;
    Ok(rules)
}

/// Closes the way out while the table is away, puts it back, and opens again.
pub(crate) fn restore_rules(
    k: &mut Kernel,
    config: &Config,
    uplinks: &[u32],
    leases: &[ruleset::Element],
) -> io::Result<usize> {
    link::set_group_up(&mut k.route, config.link_group, false)?;
    let rules = ruleset::install(k, config, uplinks, leases)?;
    link::set_group_up(&mut k.route, config.link_group, true)?;
    // Going down cost the devices their IPv6 addresses.
    let hosts: Vec<_> = leases
        .iter()
        .map(|e| (e.index, plan::hosts(config, e.slot).1))
        .collect();
    for some in hosts.chunks(BATCH as usize) {
        link::add_hosts6(&mut k.route, some)?;
    }
    Ok(rules)
}
