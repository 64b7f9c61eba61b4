//! Removing every trace of ours, and nothing else.

use std::fs;
use std::io;

use crate::apply::{self, BATCH};
use crate::config::{Config, Net};
use crate::journal::Journal;
use crate::kernel::{Kernel, conntrack, link, ruleset};
use crate::plan;

/// What was removed.
#[derive(Debug, Default)]
pub(crate) struct Removed {
    pub(crate) devices: usize,
    pub(crate) sysctls: Vec<String>,
    /// Devices with a name or group of ours that somebody else made.
    pub(crate) kept: Vec<String>,
}

pub(crate) fn teardown(k: &mut Kernel, config: &Config) -> io::Result<Removed> {
    let found = apply::survey(k, config)?;
    for some in found.ours.chunks(BATCH as usize) {
        let hosts: Vec<_> = some
            .iter()
            .map(|d| {
                let (v4, v6) = plan::hosts(config, d.slot);
                (d.index, v4, v6)
            })
            .collect();
        link::unroute(&mut k.route, &hosts);
    }
    let foreign_in_group = link::dump(&mut k.route)?
        .iter()
        .any(|l| l.group == config.link_group && found.foreign.contains(&l.name));
    if foreign_in_group {
        for d in &found.ours {
            link::delete(&mut k.route, d.index)?;
        }
    } else if !found.ours.is_empty() {
        link::delete_group(&mut k.route, config.link_group)?;
    }
    link::any_ip(&mut k.route, Net::V4(config.stream4), false)?;
    link::any_ip(&mut k.route, Net::V6(config.stream6), false)?;
    // The devices are gone, so no flow begins again.
    if ruleset::rules_present(k)? > 0 {
        conntrack::flush(&mut k.filter, plan::MARK_TAG, plan::MARK_TAG_MASK)?;
    }
    ruleset::remove(k)?;
    let sysctls = Journal::open(&config.state)?.restore()?;
    for path in [config.socket.clone(), config.lock_path()] {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(Removed {
        devices: found.ours.len(),
        sysctls,
        kept: found.foreign,
    })
}
