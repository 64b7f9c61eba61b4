//! What is on the host already and must not be stepped on.

use std::fs;
use std::io;
use std::path::Path;

use crate::config::{Config, Net, Net4, Net6, Uplink};

use super::{Kernel, link, sysctl};

/// The interfaces client traffic may leave by, by index, sorted.
pub(crate) fn uplinks(k: &mut Kernel, config: &Config) -> io::Result<Vec<u32>> {
    let mut found: Vec<u32> = match &config.uplink {
        Uplink::DefaultRoute => link::routes(&mut k.route)?
            .into_iter()
            .filter(|r| {
                matches!(
                    r.net,
                    Net::V4(Net4 { len: 0, .. }) | Net::V6(Net6 { len: 0, .. })
                )
            })
            .map(|r| r.index)
            .filter(|&i| i > 1)
            .collect(),
        Uplink::Named(names) => link::dump(&mut k.route)?
            .into_iter()
            .filter(|l| names.contains(&l.name) && l.group != config.link_group)
            .map(|l| l.index)
            .collect(),
    };
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The local port range, ends included.
pub(crate) fn local_ports() -> io::Result<Option<(u16, u16)>> {
    let text = sysctl::read("net/ipv4/ip_local_port_range")?;
    Ok(text.and_then(|t| {
        let mut words = t.split_whitespace().map(str::parse);
        Some((words.next()?.ok()?, words.next()?.ok()?))
    }))
}

/// Ports something listens on or is bound to, with the table that says so.
pub(crate) fn bound_ports() -> io::Result<Vec<(&'static str, u16)>> {
    const TCP_LISTEN: &str = "0A";
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = match fs::read_to_string(format!("/proc/self/net/{table}")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        for line in text.lines().skip(1) {
            let mut words = line.split_whitespace().skip(1);
            let (Some(local), Some(remote), Some(state)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let port = |s: &str| {
                s.rsplit(':')
                    .next()
                    .and_then(|p| u16::from_str_radix(p, 16).ok())
            };
            let waits = if table.starts_with("tcp") {
                state == TCP_LISTEN
            } else {
                port(remote) == Some(0)
            };
            ports.extend(port(local).filter(|&p| waits && p != 0).map(|p| (table, p)));
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
    let table = fs::read_to_string("/proc/self/net/unix")?;
    Ok(table
        .lines()
        .any(|l| l.ends_with(&ending) && l.split_whitespace().nth(3) == Some(LISTENS)))
}

/// The largest number of flows the kernel tracks, for all of the host.
pub(crate) fn conntrack_max() -> io::Result<Option<u64>> {
    Ok(sysctl::read("net/netfilter/nf_conntrack_max")?.and_then(|t| t.parse().ok()))
}

/// Host routes and addresses inside our ranges that are not ours: `(our range, theirs)`.
pub(crate) fn overlaps(k: &mut Kernel, config: &Config) -> io::Result<Vec<(Net, Net)>> {
    let ours: Vec<u32> = link::dump(&mut k.route)?
        .into_iter()
        .filter(|l| {
            l.group == config.link_group && crate::plan::Tag::from_alias(&l.alias).is_some()
        })
        .map(|l| l.index)
        .collect();
    let mut found = link::routes(&mut k.route)?;
    found.extend(link::addresses(&mut k.route)?);
    let mut out = Vec::new();
    for f in found
        .into_iter()
        .filter(|f| !f.ours && !ours.contains(&f.index))
    {
        let default = matches!(
            f.net,
            Net::V4(Net4 { len: 0, .. }) | Net::V6(Net6 { len: 0, .. })
        );
        for range in crate::kernel::ruleset::own_nets(config) {
            if !default && range.overlaps(f.net) && !out.contains(&(range, f.net)) {
                out.push((range, f.net));
            }
        }
    }
    Ok(out)
}
