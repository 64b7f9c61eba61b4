//! Making the kernel look like the plan, reading back how far it does, and
//! removing every trace of it again.

use std::fs;
use std::io;

use rvpn_ipc::Slot;

use crate::config::Config;
use crate::kernel::link::{self, Link, TunState};
use crate::kernel::sysctl::{self, Journal};
use crate::kernel::tun::{OFFLOAD, Tun};
use crate::kernel::{Kernel, conntrack, ruleset};
use crate::plan::{self, Live, Tag};

/// Devices configured in one go: few enough that nothing else waits for long.
const BATCH: usize = 64;

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
    /// One of these is in our group.
    shared_group: bool,
}

pub(crate) fn survey(k: &mut Kernel) -> io::Result<Survey> {
    let mut found = Survey::default();
    for l in link::dump(k)? {
        let grouped = l.group == k.config.link_group;
        match (plan::slot_of(&l.name), Tag::from_alias(&l.alias), &l.tun) {
            (Some(slot), Some(tag), Some(_)) if grouped => {
                let (index, sound) = (l.index, is_sound(&k.config, &l));
                found.ours.push(Device {
                    slot,
                    index,
                    tag,
                    sound,
                });
            }
            (None, _, _) if !grouped => {}
            _ => {
                found.shared_group |= grouped;
                found.foreign.push(l.name);
            }
        }
    }
    found.ours.sort_unstable_by_key(|d| d.slot);
    Ok(found)
}

/// Whether the link is a slot exactly as we make them.
pub(crate) fn is_sound(c: &Config, l: &Link) -> bool {
    let ours = l.group == c.link_group && l.up && l.mtu == u32::from(c.mtu);
    let owned = |t: TunState| t.sound && t.owner == Some(c.helper.uid);
    ours && l.tun.is_some_and(owned)
}

/// Whether the device still has its host addresses: the IPv6 one comes with a lease.
pub(crate) fn addressed(k: &mut Kernel, slot: Slot, index: u32, leased: bool) -> io::Result<bool> {
    let hosts = plan::hosts(&k.config, slot);
    let found = link::addresses(k, Some(index))?;
    let has = |host| found.iter().any(|f| f.net == host);
    Ok(has(hosts[0]) && (!leased || has(hosts[1])))
}

/// The error for a device that somebody else made under one of our names.
pub(crate) fn foreign(name: &str) -> io::Error {
    let remedy = "rename or remove it, it is not touched";
    let text = format!("interface '{name}' was not made by this helper: {remedy}");
    io::Error::new(io::ErrorKind::AlreadyExists, text)
}

/// Switches forwarding on where client traffic comes back in, and keeps our addresses silent there.
pub(crate) fn open_uplinks(k: &mut Kernel, uplinks: &[u32]) -> io::Result<()> {
    let mut journal = Journal::open(&k.config.state)?;
    for &index in uplinks {
        let name = link::get(k, index)?.name;
        let v4 = format!("net/ipv4/conf/{name}");
        let v6 = format!("net/ipv6/conf/{name}");
        journal.raise(&format!("{v4}/forwarding"), "1")?;
        journal.raise(&format!("{v4}/arp_ignore"), "1")?;
        journal.raise(&format!("{v4}/arp_announce"), "2")?;
        if !journal.raise(&format!("{v6}/force_forwarding"), "1")? {
            // A router ignores advertisements unless told otherwise: the default route must stay.
            let accept = format!("{v6}/accept_ra");
            if sysctl::is(&accept, "1")? {
                journal.raise(&accept, "2")?;
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
pub(crate) fn create(k: &mut Kernel, slots: &[(Slot, Tag)]) -> io::Result<Vec<(Slot, u32)>> {
    let mut all = Vec::with_capacity(slots.len());
    for some in slots.chunks(BATCH) {
        let (mut tuns, mut made) = (Vec::new(), Vec::new());
        for &(slot, tag) in some {
            let (tun, index) = fresh(k, slot)?;
            tuns.push(tun);
            made.push((slot, index, tag));
        }
        let done = link::tag(k, &made)
            .and_then(|()| tuns.into_iter().try_for_each(keep))
            .and_then(|()| link::bring_up(k, &made));
        if let Err(e) = done {
            made.iter().try_for_each(|m| link::delete(k, m.1))?;
            return Err(e);
        }
        all.extend(made.into_iter().map(|(slot, index, _)| (slot, index)));
    }
    Ok(all)
}

/// Lets the device outlive its descriptor, which is closed. It forwards IPv6 by
/// itself where the kernel can (6.17); the uplink's setting covers the rest.
fn keep(tun: Tun) -> io::Result<()> {
    let setting = format!("net/ipv6/conf/{}/force_forwarding", tun.name()?);
    if sysctl::is(&setting, "0")? {
        sysctl::write(&setting, "1")?;
    }
    tun.persist()
}

/// A device that did not exist before, and its index. From here on it is known
/// by the index alone: a name can be given to something else meanwhile.
fn fresh(k: &mut Kernel, slot: Slot) -> io::Result<(Tun, u32)> {
    let name = plan::device_name(slot);
    if link::index_of(k, &name)?.is_some() {
        return Err(foreign(&name));
    }
    let tun = Tun::attach(&name)?;
    #[cfg(feature = "fault-hooks")]
    crate::fault::at("created");
    let index = link::index_of(k, &name)?.ok_or_else(|| foreign(&name))?;
    // Only a device without history is ours; the descriptor proves that it is this one.
    let l = link::get(k, index)?;
    let blank = l.group == 0 && l.alias.is_empty() && l.tun.is_some_and(|t| t.owner.is_none());
    if !blank || tun.name()? != l.name || l.name != name {
        return Err(foreign(&name));
    }
    tun.own(k.config.helper.uid)?;
    tun.offload(0)?;
    let disabled = format!("net/ipv6/conf/{name}/disable_ipv6");
    if sysctl::is(&disabled, "1")? {
        sysctl::write(&disabled, "0")?;
    }
    Ok((tun, index))
}

/// Attaches to a slot's device for its lease, with the offloads of this lease:
/// the former holder's outlive it. `EBUSY`: somebody still holds it.
pub(crate) fn attach(k: &mut Kernel, slot: Slot, index: u32) -> io::Result<(Tun, u16)> {
    let name = plan::device_name(slot);
    let tun = Tun::attach(&name)?;
    if link::index_of(k, &name)? != Some(index) || tun.name()? != name {
        // Deleted meanwhile: what was attached is new, and goes with its descriptor.
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let offload = tun.offload(if k.config.offload { OFFLOAD } else { 0 })?;
    Ok((tun, offload))
}

/// Deletes the slot's device, which ends every descriptor of it, and makes a new one.
pub(crate) fn recreate(k: &mut Kernel, slot: Slot, index: u32, tag: Tag) -> io::Result<u32> {
    if index != 0 {
        link::delete(k, index)?;
    }
    // One made by an earlier try that failed later on is known by its tag alone.
    if let Some(left) = link::index_of(k, &plan::device_name(slot))? {
        let l = link::get(k, left)?;
        let tagged = l.tun.is_some() && Tag::from_alias(&l.alias).is_some();
        if tagged && l.group == k.config.link_group {
            link::delete(k, left)?;
        }
    }
    let made = create(k, &[(slot, tag)])?;
    let index = made.first().map(|m| m.1);
    index.ok_or_else(|| io::Error::other("no device was made"))
}

/// What holds for all slots: the stream ranges, the uplinks, the table. Returns its rules.
pub(crate) fn base(k: &mut Kernel, uplinks: &[u32], leases: &[Live]) -> io::Result<usize> {
    let rules = ruleset::ensure(k, uplinks, leases)?;
    link::any_ip(k, true)?;
    open_uplinks(k, uplinks)?;
    Ok(rules)
}

/// Closes the way out while the table is away, puts it back, and opens again.
pub(crate) fn restore_rules(k: &mut Kernel, uplinks: &[u32], leases: &[Live]) -> io::Result<usize> {
    link::set_group_up(k, false)?;
    let rules = ruleset::install(k, uplinks, leases)?;
    link::set_group_up(k, true)?;
    // Going down cost the devices their IPv6 addresses.
    for some in leases.chunks(BATCH) {
        let devices: Vec<_> = some.iter().map(|l| (l.slot, l.index)).collect();
        link::add_hosts6(k, &devices)?;
    }
    Ok(rules)
}

/// Removes every trace of ours, and nothing else. Returns how many devices were
/// removed and sysctls put back, and the names of ours that somebody else gave.
pub(crate) fn teardown(k: &mut Kernel) -> io::Result<(usize, usize, Vec<String>)> {
    let found = survey(k)?;
    for some in found.ours.chunks(BATCH) {
        let devices: Vec<_> = some.iter().map(|d| (d.slot, d.index)).collect();
        link::unroute(k, &devices);
    }
    if found.shared_group {
        for d in &found.ours {
            link::delete(k, d.index)?;
        }
    } else if !found.ours.is_empty() {
        link::delete_group(k)?;
    }
    link::any_ip(k, false)?;
    // The devices are gone, so no flow begins again.
    if ruleset::rules_present(k)? > 0 {
        conntrack::flush(k, plan::MARK_TAG, plan::MARK_TAG_MASK)?;
    }
    ruleset::remove(k)?;
    let sysctls = Journal::open(&k.config.state)?.restore()?;
    for path in [k.config.socket.clone(), k.config.lock_path()] {
        sysctl::if_there(fs::remove_file(&path))?;
    }
    Ok((found.ours.len(), sysctls, found.foreign))
}
