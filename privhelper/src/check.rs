//! Whether this host can carry this configuration.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use crate::config::{Config, overlap};
use crate::kernel::{Kernel, link, sysctl, tun};
use crate::{apply, confine};

/// How much one thing worth saying about the host matters.
pub(crate) type Weight = &'static str;
pub(crate) const GOOD: Weight = "good";
pub(crate) const WARNING: Weight = "warning";
/// The helper does not start with this.
pub(crate) const WRONG: Weight = "wrong";

/// All there is to say about the host. A matter with nothing wrong is said to be good.
pub(crate) fn host(k: &mut Kernel) -> io::Result<Vec<(Weight, String)>> {
    let (mut all, c) = (vec![bound_together(&k.config)?], k.config.clone());
    let mut judge = |good: &str, wrong: Vec<String>| {
        if wrong.is_empty() {
            all.push((GOOD, good.to_owned()));
        }
        all.extend(wrong.into_iter().map(|w| (WRONG, w)));
    };
    judge("users of their own", two_users(&c));

    let remedy = "load the module (modprobe tun), or give the container the device";
    let missing =
        (!Path::new(tun::DEVICE).exists()).then(|| format!("{} is missing: {remedy}", tun::DEVICE));
    judge("TUN device present", missing.into_iter().collect());

    let found = apply::survey(k, None)?;
    let foreign = found.foreign.iter().map(|n| apply::foreign(n).to_string());
    judge("interface names free or ours", foreign.collect());

    let ours: BTreeSet<u32> = found.ours.iter().map(|d| d.0.index).collect();
    let mut overlaps = Vec::new();
    for f in [link::routes(k)?, link::addresses(k, None)?].concat() {
        let theirs = !f.ours && !ours.contains(&f.index) && f.net.prefix_len() > 0;
        for range in c.own_nets() {
            if theirs && overlap(&range, &f.net) {
                let net = f.net.trunc();
                let what = "an address or route of this host: choose another prefix";
                overlaps.push(format!("{range} overlaps {net}, {what}"));
            }
        }
    }
    overlaps.sort();
    overlaps.dedup();
    judge("prefixes free on this host", overlaps);

    let (low, high) = c.nat;
    let nat = format!("nat-range = {low}-{high}");
    let text = sysctl::read("net/ipv4/ip_local_port_range")?.unwrap_or_default();
    let ends: Vec<u16> = text.split_whitespace().flat_map(str::parse).collect();
    let mut shared = Vec::new();
    if let [from, to] = ends[..]
        && low <= to
        && from <= high
    {
        let what = "a client could catch this host's own connections; move one of them";
        shared.push(format!(
            "{nat} overlaps ip_local_port_range {from}-{to}: {what}"
        ));
    }
    for (table, port) in bound_ports()? {
        if (low..=high).contains(&port) {
            let what = "a client could catch its traffic; move one of them";
            let who = format!("port {port}, which a program uses ({table})");
            shared.push(format!("{nat} contains {who}: {what}"));
        }
    }
    judge("translation ports used by nobody else", shared);

    let (links, uplinks) = (link::get(k, None)?, apply::uplinks(k)?);
    let leaving = links.iter().filter(|l| uplinks.contains(&l.index));
    let stuck = leaving.map(|l| format!("net/ipv4/conf/{}/forwarding", l.name));
    let stuck = stuck.filter(|s| sysctl::stuck(s));
    let stuck = stuck.map(|s| format!("{s} cannot be switched on: mount /proc/sys writable"));
    judge("forwarding on, or ours to switch on", stuck.collect());

    let names: Vec<&str> = links.iter().map(|l| l.name.as_str()).collect();
    let settings = names.iter().chain(&["all", "default"]);
    let localnet = settings.map(|n| format!("net/ipv4/conf/{n}/route_localnet"));
    let localnet = localnet.filter(|s| sysctl::is(s, "1").unwrap_or(false));
    let harm = "would let clients reach 127.0.0.0/8: set it to 0";
    let localnet = localnet.map(|s| format!("{s} = 1 {harm}"));
    judge("loopback addresses not routable", localnet.collect());

    let absent = c.uplink.iter().filter(|w| !names.contains(&w.as_str()));
    let remedy = "name an interface of this host";
    let absent = absent.map(|w| format!("uplink '{w}' does not exist: {remedy}"));
    judge("uplinks present or found by route", absent.collect());
    if uplinks.is_empty() {
        let none = "no uplink: there is no default route; clients reach nothing until then";
        all.push((WARNING, none.to_owned()));
    }
    Ok(all)
}

/// The split between the halves is one between users. A user namespace may have but one.
fn two_users(c: &Config) -> Vec<String> {
    let (helper, gateway) = (c.helper.uid, c.gateway.uid);
    if confine::in_user_namespace() || (helper != gateway && helper != 0 && gateway != 0) {
        return Vec::new();
    }
    let found = format!("helper-user is uid {helper} and gateway-user is uid {gateway}");
    let wanted = "each needs a user of its own, which is not root's";
    vec![format!("{found}: {wanted}")]
}

/// What all clients together can take, against what there is.
fn bound_together(c: &Config) -> io::Result<(Weight, String)> {
    let cap = c.classes.iter().map(|k| k.flow_cap).max().unwrap_or(0);
    let (clients, ports) = (c.max_slots, u32::from(c.nat.1 - c.nat.0) + 1);
    let all = u64::from(clients) * u64::from(cap);
    let tracked = sysctl::read("net/netfilter/nf_conntrack_max")?;
    let tracked = tracked.and_then(|t| t.parse().ok()).unwrap_or(u64::MAX);
    let there = format!("{ports} ports to each destination, {tracked} flows tracked");
    let text = format!("{clients} clients x {cap} flows = {all}; {there}");
    if cap > ports || all > tracked {
        let warning = format!("{text}: clients together can exhaust what is smaller");
        return Ok((WARNING, warning));
    }
    Ok((GOOD, text))
}

/// Ports something listens on or is bound to, with the table that says so: there
/// such a socket has no port at the other end.
fn bound_ports() -> io::Result<Vec<(&'static str, u16)>> {
    let port = |s: &str| u16::from_str_radix(s.rsplit(':').next()?, 16).ok();
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = sysctl::if_there(fs::read_to_string(format!("/proc/self/net/{table}")))?;
        for line in text.unwrap_or_default().lines().skip(1) {
            let mut ends = line.split_whitespace().skip(1).map_while(port);
            if let (Some(port), Some(0)) = (ends.next(), ends.next()) {
                ports.push((table, port));
            }
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

/// Whether something listens on this socket. Nothing is asked of it: it would log a stranger.
pub(crate) fn listening(socket: &Path) -> io::Result<bool> {
    const LISTENS: &str = "00010000";
    let ending = format!(" {}", socket.display());
    let listens = |l: &str| l.ends_with(&ending) && l.split_whitespace().nth(3) == Some(LISTENS);
    let table = fs::read_to_string("/proc/self/net/unix")?;
    Ok(table.lines().any(listens))
}
