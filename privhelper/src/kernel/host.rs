//! What is on the host already and must not be stepped on.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{Kernel, link, sysctl};
use crate::net::Net;
use crate::plan::Tag;

/// The interfaces client traffic may leave by, by index, sorted.
pub(crate) fn uplinks(k: &mut Kernel) -> io::Result<Vec<u32>> {
    let mut found: Vec<u32> = if k.config.uplink.is_empty() {
        let defaults = link::routes(k)?.into_iter().filter(|r| r.net.len == 0);
        defaults.map(|r| r.index).filter(|&i| i > 1).collect()
    } else {
        let (links, c) = (link::dump(k)?, &k.config);
        let named = |l: &&link::Link| c.uplink.contains(&l.name) && l.group != c.link_group;
        links.iter().filter(named).map(|l| l.index).collect()
    };
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The local port range, ends included.
pub(crate) fn local_ports() -> io::Result<Option<(u16, u16)>> {
    let text = sysctl::read("net/ipv4/ip_local_port_range")?.unwrap_or_default();
    let ends = text.split_once(char::is_whitespace);
    Ok(ends.and_then(|(low, high)| Some((low.parse().ok()?, high.trim().parse().ok()?))))
}

/// Ports something listens on or is bound to, with the table that says so.
pub(crate) fn bound_ports() -> io::Result<Vec<(&'static str, u16)>> {
    const TCP_LISTEN: &str = "0A";
    let port = |s: &str| u16::from_str_radix(s.rsplit(':').next()?, 16).ok();
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = sysctl::if_there(fs::read_to_string(format!("/proc/self/net/{table}")))?;
        for line in text.unwrap_or_default().lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let &[_, local, remote, state, ..] = words.as_slice() else {
                continue;
            };
            let (tcp, idle) = (table.starts_with("tcp"), port(remote) == Some(0));
            let waits = if tcp { state == TCP_LISTEN } else { idle };
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
    let listens = |l: &str| l.ends_with(&ending) && l.split_whitespace().nth(3) == Some(LISTENS);
    let table = fs::read_to_string("/proc/self/net/unix")?;
    Ok(table.lines().any(listens))
}

/// The largest number of flows the kernel tracks, for all of the host.
pub(crate) fn conntrack_max() -> io::Result<Option<u64>> {
    let text = sysctl::read("net/netfilter/nf_conntrack_max")?;
    Ok(text.and_then(|t| t.parse().ok()))
}

/// Host routes and addresses inside our ranges that are not ours: `(our range, theirs)`.
pub(crate) fn overlaps(k: &mut Kernel) -> io::Result<Vec<(Net, Net)>> {
    let (links, c) = (link::dump(k)?, Arc::clone(&k.config));
    let made = |l: &&link::Link| l.group == c.link_group && Tag::from_alias(&l.alias).is_some();
    let ours: HashSet<u32> = links.iter().filter(made).map(|l| l.index).collect();
    let mut out = Vec::new();
    let found = [link::routes(k)?, link::addresses(k, None)?].concat();
    for f in found {
        for range in c.own_nets() {
            let theirs = !f.ours && !ours.contains(&f.index) && f.net.len > 0;
            if theirs && range.overlaps(f.net) && !out.contains(&(range, f.net)) {
                out.push((range, f.net));
            }
        }
    }
    Ok(out)
}
