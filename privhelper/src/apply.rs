//! Making the kernel look like the plan, reading back how far it does, and
//! removing every trace of it again.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use ipnet::IpNet;

use crate::config::Config;
use crate::kernel::link::{self, Link};
use crate::kernel::sysctl;
use crate::kernel::tun::{OFFLOAD, Tun};
use crate::kernel::{Kernel, conntrack, ruleset};
use crate::plan::{self, Device};

/// Devices configured in one go: few enough that nothing else waits for long.
const BATCH: usize = 64;

/// The host's links, sorted into ours and those in our way.
#[derive(Default)]
pub(crate) struct Survey {
    /// In the order of their slots; true for those exactly as we make them, of which
    /// any other is made again before anybody gets it.
    pub(crate) ours: Vec<(Device, bool)>,
    /// Names and groups of ours on devices we did not make.
    pub(crate) foreign: Vec<String>,
    /// One of these is in our group.
    shared_group: bool,
}

/// Reads back what is there, or the device of this index alone.
pub(crate) fn survey(k: &mut Kernel, of: Option<u32>) -> io::Result<Survey> {
    let (mut found, links) = (Survey::default(), link::get(k, of)?);
    if links.is_empty() {
        return Ok(found);
    }
    let addresses = link::addresses(k, of)?.into_iter();
    let addresses: BTreeSet<(u32, IpNet)> = addresses.map(|f| (f.index, f.net)).collect();
    for l in links {
        let grouped = l.group == k.config.link_group;
        match ours(&k.config, &l) {
            Some(d) => {
                let hosts = d.hosts(&k.config);
                let [v4, v6] = hosts.map(|host| addresses.contains(&(d.index, host)));
                // The IPv6 address comes with a lease.
                let addressed = v4 && (v6 || d.lease.is_none());
                found.ours.push((d, addressed && is_sound(&k.config, &l)));
            }
            None if plan::slot_of(&l.name).is_none() && !grouped => {}
            None => {
                found.shared_group |= grouped;
                found.foreign.push(l.name);
            }
        }
    }
    found.ours.sort_unstable_by_key(|d| d.0.slot);
    Ok(found)
}

/// The slot's device that a link is, by all that only we give to one.
fn ours(c: &Config, l: &Link) -> Option<Device> {
    let ours = l.tun && l.group == c.link_group;
    Device::read(&l.name, &l.alias, l.index).filter(|_| ours)
}

/// Whether the link is a slot exactly as we make them, addresses aside.
pub(crate) fn is_sound(c: &Config, l: &Link) -> bool {
    let ours = l.group == c.link_group && l.owner == Some(c.helper.uid);
    ours && l.tun && l.whole && l.up && l.mtu == u32::from(c.mtu)
}

/// The error for a device that somebody else made under one of our names.
pub(crate) fn foreign(name: &str) -> io::Error {
    let remedy = "rename or remove it, it is not touched";
    let text = format!("interface '{name}' was not made by this helper: {remedy}");
    io::Error::new(io::ErrorKind::AlreadyExists, text)
}

/// The interfaces client traffic may leave by, by index, sorted.
pub(crate) fn uplinks(k: &mut Kernel) -> io::Result<Vec<u32>> {
    let mut found: Vec<u32> = if k.config.uplink.is_empty() {
        let defaults = link::routes(k)?.into_iter();
        let defaults = defaults.filter(|r| r.net.prefix_len() == 0 && r.index > 1);
        defaults.map(|r| r.index).collect()
    } else {
        let (links, c) = (link::get(k, None)?, &k.config);
        let named = |l: &&Link| c.uplink.contains(&l.name) && l.group != c.link_group;
        links.iter().filter(named).map(|l| l.index).collect()
    };
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Switches forwarding on where client traffic comes back in, and keeps our addresses silent there.
pub(crate) fn open_uplinks(k: &mut Kernel, uplinks: &[u32]) -> io::Result<()> {
    for &index in uplinks {
        let uplink = link::get(k, Some(index))?;
        let Some(Link { name, .. }) = uplink.first() else {
            continue;
        };
        let raise = |setting: &str, value| sysctl::raise(&k.config.state, setting, value);
        for (setting, value) in [
            ("forwarding", "1"),
            ("arp_ignore", "1"),
            ("arp_announce", "2"),
        ] {
            raise(&format!("net/ipv4/conf/{name}/{setting}"), value)?;
        }
        if !raise(&format!("net/ipv6/conf/{name}/force_forwarding"), "1")? {
            // A router ignores advertisements unless told otherwise: the default route must stay.
            let accept = format!("net/ipv6/conf/{name}/accept_ra");
            if sysctl::is(&accept, "1")? {
                raise(&accept, "2")?;
            }
            raise("net/ipv6/conf/all/forwarding", "1")?;
        }
    }
    Ok(())
}

/// Makes the slots' devices: owned, tagged and silent, then persistent, so that a
/// failure before leaves none behind and one after leaves what is known as ours.
/// They come up once nobody holds them: a device without carrier costs the kernel
/// no walk of all IPv6 routes, without which 10,000 take a fifth of the time.
pub(crate) fn create(k: &mut Kernel, wanted: &[Device]) -> io::Result<Vec<Device>> {
    let mut all = Vec::with_capacity(wanted.len());
    for some in wanted.chunks(BATCH) {
        let (mut tuns, mut made) = (Vec::new(), Vec::new());
        for &d in some {
            let (tun, index) = fresh(k, &d.name())?;
            tuns.push(tun);
            made.push(Device { index, ..d });
        }
        let done = link::tag(k, &made)
            .and_then(|()| tuns.into_iter().try_for_each(keep))
            .and_then(|()| link::bring_up(k, &made));
        if let Err(e) = done {
            made.iter().try_for_each(|d| link::delete(k, d.index))?;
            return Err(e);
        }
        all.extend(made);
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
fn fresh(k: &mut Kernel, name: &str) -> io::Result<(Tun, u32)> {
    if link::named(k, name)?.is_some() {
        return Err(foreign(name));
    }
    let tun = Tun::attach(name)?;
    #[cfg(feature = "fault-hooks")]
    crate::fault::at("created");
    let l = link::named(k, name)?.ok_or_else(|| foreign(name))?;
    // Only a device without history is ours; the descriptor proves that it is this one.
    let blank = l.tun && l.group == 0 && l.alias.is_empty() && l.owner.is_none();
    if !blank || tun.name()? != name {
        return Err(foreign(name));
    }
    tun.own(k.config.helper.uid)?;
    tun.offload(0)?;
    let disabled = format!("net/ipv6/conf/{name}/disable_ipv6");
    if sysctl::is(&disabled, "1")? {
        sysctl::write(&disabled, "0")?;
    }
    Ok((tun, l.index))
}

/// Attaches to a slot's device for its lease, with the offloads of this lease:
/// the former holder's outlive it. `EBUSY`: somebody still holds it.
pub(crate) fn attach(k: &mut Kernel, d: &Device) -> io::Result<(Tun, u16)> {
    let name = d.name();
    let tun = Tun::attach(&name)?;
    let there = link::named(k, &name)?;
    if there.is_none_or(|l| l.index != d.index) || tun.name()? != name {
        // Deleted meanwhile: what was attached is new, and goes with its descriptor.
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let offload = tun.offload(if k.config.offload { OFFLOAD } else { 0 })?;
    Ok((tun, offload))
}

/// Deletes the slot's device, which ends every descriptor of it, and makes a new one.
pub(crate) fn recreate(k: &mut Kernel, d: Device) -> io::Result<Device> {
    if d.index != 0 {
        link::delete(k, d.index)?;
    }
    // One made by an earlier try that failed later on is known by its tag alone.
    let left = link::named(k, &d.name())?;
    if let Some(left) = left.and_then(|l| ours(&k.config, &l)) {
        link::delete(k, left.index)?;
    }
    let made = create(k, &[d])?.pop();
    made.ok_or_else(|| io::Error::other("no device was made"))
}

/// Closes the way out while the table is away, puts it back, and opens again.
pub(crate) fn restore_rules(k: &mut Kernel, uplinks: &[u32], live: &[Device]) -> io::Result<usize> {
    link::set_group(k, Some(false))?;
    let rules = ruleset::install(k, uplinks, live)?;
    link::set_group(k, Some(true))?;
    // Going down cost the devices their IPv6 addresses.
    for some in live.chunks(BATCH) {
        link::add_hosts6(k, some)?;
    }
    Ok(rules)
}

/// Removes every trace of ours, and nothing else. Returns how many devices were
/// removed and sysctls put back, and the names of ours that somebody else gave.
pub(crate) fn teardown(k: &mut Kernel) -> io::Result<(usize, usize, Vec<String>)> {
    let found = survey(k, None)?;
    let ours: Vec<Device> = found.ours.iter().map(|d| d.0).collect();
    for some in ours.chunks(BATCH) {
        link::unroute(k, some, true);
    }
    if found.shared_group {
        ours.iter().try_for_each(|d| link::delete(k, d.index))?;
    } else if !ours.is_empty() {
        link::set_group(k, None)?;
    }
    link::any_ip(k, false)?;
    // The devices are gone, so no flow begins again.
    if ruleset::rules_present(k)? > 0 {
        conntrack::flush(k, plan::MARK_TAG, plan::MARK_TAG_MASK)?;
    }
    ruleset::remove(k)?;
    let sysctls = sysctl::restore(&k.config.state)?;
    for path in [k.config.socket.clone(), k.config.lock_path()] {
        sysctl::if_there(fs::remove_file(&path))?;
    }
    Ok((ours.len(), sysctls, found.foreign))
}
