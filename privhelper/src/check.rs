//! Whether this host can carry this configuration.

use std::io;
use std::path::Path;

use crate::apply;
use crate::config::{Config, Uplink};
use crate::kernel::{Kernel, host, link, sysctl, tun};

/// One thing worth saying about the host.
pub(crate) enum Finding {
    /// The helper does not start with this.
    Wrong(String),
    Warning(String),
    Good(String),
}

pub(crate) fn host(k: &mut Kernel, config: &Config) -> io::Result<Vec<Finding>> {
    let mut all = Vec::new();
    let mut judge = |wrong: Vec<String>, good: &str| {
        if wrong.is_empty() {
            all.push(Finding::Good(good.to_owned()));
        }
        all.extend(wrong.into_iter().map(Finding::Wrong));
    };
    let device = Path::new(tun::DEVICE).exists();
    let missing = format!(
        "{} is missing: load the module (modprobe tun), or give the container the device",
        tun::DEVICE
    );
    judge(
        if device { vec![] } else { vec![missing] },
        "TUN device present",
    );

    let overlaps = host::overlaps(k, config)?;
    let text = |(ours, theirs)| {
        format!("{ours} overlaps {theirs}, an address or route of this host: choose another prefix")
    };
    judge(
        overlaps.into_iter().map(text).collect(),
        "prefixes free on this host",
    );

    let foreign = apply::survey(k, config)?.foreign;
    judge(
        foreign
            .iter()
            .map(|n| apply::foreign(n).to_string())
            .collect(),
        "interface names free or ours",
    );

    let (low, high) = (config.nat_low, config.nat_high);
    let mut wrong = Vec::new();
    if let Some((from, to)) = host::local_ports()?
        && low <= to
        && from <= high
    {
        wrong.push(format!(
            "nat-range = {low}-{high} overlaps ip_local_port_range {from}-{to}: a client could catch this host's own connections; move one of them"
        ));
    }
    for (table, port) in host::bound_ports()?
        .into_iter()
        .filter(|(_, p)| (low..=high).contains(p))
    {
        wrong.push(format!(
            "nat-range = {low}-{high} contains port {port}, which a program uses ({table}): a client could catch its traffic; move one of them"
        ));
    }
    judge(wrong, "translation ports used by nobody else");

    let links = link::dump(&mut k.route)?;
    let uplinks = host::uplinks(k, config)?;
    let stuck: Vec<String> = links
        .iter()
        .filter(|l| uplinks.contains(&l.index))
        .map(|l| format!("net/ipv4/conf/{}/forwarding", l.name))
        .filter(|s| sysctl::stuck(s))
        .map(|s| format!("{s} cannot be switched on: mount /proc/sys writable"))
        .collect();
    judge(stuck, "forwarding on, or ours to switch on");

    let names: Vec<String> = links.into_iter().map(|l| l.name).collect();
    let localnet: Vec<String> = names
        .iter()
        .map(String::as_str)
        .chain(["all", "default"])
        .map(|n| format!("net/ipv4/conf/{n}/route_localnet"))
        .filter(|s| sysctl::read(s).is_ok_and(|v| v.as_deref() == Some("1")))
        .map(|s| format!("{s} = 1 would let clients reach 127.0.0.0/8: set it to 0"))
        .collect();
    judge(localnet, "loopback addresses not routable");

    if let Uplink::Named(wanted) = &config.uplink {
        let absent = wanted.iter().filter(|w| !names.contains(w));
        judge(
            absent
                .map(|w| format!("uplink '{w}' does not exist: name an interface of this host"))
                .collect(),
            "uplinks present",
        );
    } else if uplinks.is_empty() {
        all.push(Finding::Warning(
            "there is no default route: clients reach nothing until there is one".to_owned(),
        ));
    }
    all.extend(bound(config)?);
    Ok(all)
}

/// What all clients together can take, against what there is.
fn bound(config: &Config) -> io::Result<Vec<Finding>> {
    let cap = config
        .classes
        .iter()
        .map(|c| u64::from(c.flow_cap))
        .max()
        .unwrap_or(0);
    let all = u64::from(config.max_slots) * cap;
    let ports = u64::from(config.nat_high - config.nat_low) + 1;
    let tracked = host::conntrack_max()?.unwrap_or(u64::MAX);
    let text = format!(
        "{} clients x {cap} flows = {all}; {ports} ports to each destination, {tracked} flows tracked",
        config.max_slots
    );
    let tight = cap > ports || all > tracked;
    Ok(vec![if tight {
        Finding::Warning(format!(
            "{text}: clients together can exhaust what is smaller"
        ))
    } else {
        Finding::Good(text)
    }])
}
