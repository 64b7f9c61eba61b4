//! Whether this host can carry this configuration.

use std::io;
use std::path::Path;

use crate::apply;
use crate::config::Config;
use crate::kernel::{Kernel, host, link, sysctl, tun};

/// How much one thing worth saying about the host matters.
pub(crate) type Weight = &'static str;
pub(crate) const GOOD: Weight = "good";
pub(crate) const WARNING: Weight = "warning";
/// The helper does not start with this.
pub(crate) const WRONG: Weight = "wrong";

/// All there is to say about the host. A matter with nothing wrong is said to be good.
pub(crate) fn host(k: &mut Kernel) -> io::Result<Vec<(Weight, String)>> {
    let (mut all, c) = (Vec::new(), k.config.clone());
    let mut judge = |wrong: Vec<String>, good: &str| {
        if wrong.is_empty() {
            all.push((GOOD, good.to_owned()));
        }
        all.extend(wrong.into_iter().map(|w| (WRONG, w)));
    };
    let mut wrong = Vec::new();
    if !Path::new(tun::DEVICE).exists() {
        let remedy = "load the module (modprobe tun), or give the container the device";
        wrong.push(format!("{} is missing: {remedy}", tun::DEVICE));
    }
    judge(wrong, "TUN device present");

    let overlap = |(ours, theirs)| {
        format!("{ours} overlaps {theirs}, an address or route of this host: choose another prefix")
    };
    let overlaps = host::overlaps(k)?.into_iter().map(overlap);
    judge(overlaps.collect(), "prefixes free on this host");

    let foreign = apply::survey(k)?.foreign;
    let foreign = foreign.iter().map(|n| apply::foreign(n).to_string());
    judge(foreign.collect(), "interface names free or ours");

    let (low, high) = c.nat;
    let clash = |with: String, what| {
        format!("nat-range = {low}-{high} {with}: a client could catch {what}; move one of them")
    };
    let local = host::local_ports()?.filter(|(from, to)| low <= *to && *from <= high);
    let local = local.map(|(from, to)| {
        let with = format!("overlaps ip_local_port_range {from}-{to}");
        clash(with, "this host's own connections")
    });
    let mut bound = host::bound_ports()?;
    bound.retain(|(_, port)| (low..=high).contains(port));
    let bound = bound.iter().map(|(table, port)| {
        let with = format!("contains port {port}, which a program uses ({table})");
        clash(with, "its traffic")
    });
    let shared = local.into_iter().chain(bound).collect();
    judge(shared, "translation ports used by nobody else");

    let (links, uplinks) = (link::dump(k)?, host::uplinks(k)?);
    let leaving = links.iter().filter(|l| uplinks.contains(&l.index));
    let stuck = leaving.map(|l| format!("net/ipv4/conf/{}/forwarding", l.name));
    let stuck = stuck.filter(|s| sysctl::stuck(s));
    let stuck = stuck.map(|s| format!("{s} cannot be switched on: mount /proc/sys writable"));
    judge(stuck.collect(), "forwarding on, or ours to switch on");

    let names: Vec<&str> = links.iter().map(|l| l.name.as_str()).collect();
    let settings = names.iter().chain(&["all", "default"]);
    let localnet = settings.map(|n| format!("net/ipv4/conf/{n}/route_localnet"));
    let localnet = localnet.filter(|s| sysctl::is(s, "1").unwrap_or(false));
    let harm = "would let clients reach 127.0.0.0/8: set it to 0";
    let localnet = localnet.map(|s| format!("{s} = 1 {harm}"));
    judge(localnet.collect(), "loopback addresses not routable");

    let absent = c.uplink.iter().filter(|w| !names.contains(&w.as_str()));
    let remedy = "name an interface of this host";
    let absent = absent.map(|w| format!("uplink '{w}' does not exist: {remedy}"));
    if !c.uplink.is_empty() {
        judge(absent.collect(), "uplinks present");
    } else if uplinks.is_empty() {
        let none = "there is no default route: clients reach nothing until there is one";
        all.push((WARNING, none.to_owned()));
    }
    all.push(bound_together(&c)?);
    Ok(all)
}

/// What all clients together can take, against what there is.
fn bound_together(c: &Config) -> io::Result<(Weight, String)> {
    let cap = c.classes.iter().map(|k| k.flow_cap).max().unwrap_or(0);
    let (clients, ports) = (c.max_slots, u32::from(c.nat.1 - c.nat.0) + 1);
    let all = u64::from(clients) * u64::from(cap);
    let tracked = host::conntrack_max()?.unwrap_or(u64::MAX);
    let there = format!("{ports} ports to each destination, {tracked} flows tracked");
    let text = format!("{clients} clients x {cap} flows = {all}; {there}");
    if cap > ports || all > tracked {
        let warning = format!("{text}: clients together can exhaust what is smaller");
        return Ok((WARNING, warning));
    }
    Ok((GOOD, text))
}
