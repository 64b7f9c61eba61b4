//! What others do to our devices, rules and uplinks: noticed by notification,
//! confirmed by asking the kernel, then repaired.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use nix::sys::socket::MsgFlags;
use rvpn_ipc::{Reply, Slot, Status};

use super::{RETRY, Server, element};
use crate::apply;
use crate::config::{Net, Uplink};
use crate::kernel::netlink::{attr_of, messages, text_of, u32_at};
use crate::kernel::nft;
use crate::kernel::{host, link, ruleset};
use crate::plan;

/// Links, addresses of both families, routes of both families.
pub(super) const LINK_GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
/// nf_tables, the seventh group.
pub(super) const TABLE_GROUPS: u32 = 1 << 6;
/// From so many doubtful slots on, all are looked at in one go.
const MANY: usize = 16;
/// Routes flap in bursts; one look at them afterwards is enough.
const SETTLE: Duration = Duration::from_millis(200);

/// What may not be as it should, to be looked at before anything else is done.
#[derive(Default)]
pub(super) struct Doubts {
    pub(super) rules: bool,
    /// Somebody else changed our table.
    tampered: bool,
    slots: Vec<Slot>,
    everything: bool,
    uplinks: Option<Instant>,
    retry: Option<Instant>,
}

impl Doubts {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.uplinks, self.retry].into_iter().flatten().min()
    }
}

impl Server {
    pub(super) fn read_links(&mut self) {
        let named = matches!(self.config.uplink, Uplink::Named(_));
        loop {
            let data = match self.links.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(data) => data,
                Err(nix::Error::EAGAIN) => return,
                Err(_) => {
                    // Some were lost: look at all of it.
                    self.doubts.everything = true;
                    self.doubts.uplinks = Some(Instant::now() + SETTLE);
                    continue;
                }
            };
            for m in messages(data) {
                match m.kind {
                    libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                        let Some(l) = link::parse_link(m.body) else {
                            continue;
                        };
                        match plan::slot_of(&l.name) {
                            Some(slot) if self.pool.index(slot) == l.index => {
                                let well = m.kind == libc::RTM_NEWLINK
                                    && apply::is_sound(&self.config, &l);
                                if !well && !self.doubts.slots.contains(&slot) {
                                    self.doubts.slots.push(slot);
                                }
                            }
                            None if named => self.doubts.uplinks = Some(Instant::now() + SETTLE),
                            _ => {}
                        }
                    }
                    libc::RTM_DELADDR => {
                        let index = u32_at(m.body, 4).unwrap_or(0);
                        let slot = self.pool.devices().find(|d| d.1 == index).map(|d| d.0);
                        if let Some(slot) = slot.filter(|s| !self.doubts.slots.contains(s)) {
                            self.doubts.slots.push(slot);
                        }
                    }
                    // A default route came or went.
                    libc::RTM_NEWROUTE | libc::RTM_DELROUTE if m.body.get(1) == Some(&0) => {
                        self.doubts.uplinks = Some(Instant::now() + SETTLE);
                    }
                    _ => {}
                }
            }
        }
    }

    pub(super) fn read_tables(&mut self) {
        let own = [self.kernel.filter.port, self.cleaner.port];
        loop {
            match self.tables.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(data) => {
                    for m in messages(data).filter(|m| !own.contains(&m.port)) {
                        let table = m
                            .body
                            .get(4..)
                            .and_then(|b| attr_of(b, nft::TABLE))
                            .map(text_of);
                        self.doubts.tampered |= table.as_deref() == Some(ruleset::NAME);
                    }
                }
                Err(nix::Error::EAGAIN) => return,
                Err(_) => self.doubts.rules = true,
            }
        }
    }

    /// What cannot be settled now is looked at again, all of it.
    pub(super) fn settle_doubts(&mut self) {
        if let Err(e) = self.try_settle() {
            say!(3, "the kernel could not be asked, trying again: {e}");
            self.doubts.everything = true;
            self.doubts.uplinks = Some(Instant::now() + SETTLE);
        }
    }

    fn try_settle(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let due = self.doubts.retry.is_none_or(|t| t <= now);
        let asked = self.doubts.tampered || self.doubts.rules || self.doubts.retry.is_some();
        if due && asked {
            let (tampered, retried) = (self.doubts.tampered, self.doubts.retry.is_some());
            let whole = ruleset::rules_present(&mut self.kernel)? == self.rules;
            (self.doubts.tampered, self.doubts.rules) = (false, false);
            if tampered || retried || !whole {
                self.restore_rules();
            }
        }
        let doubted = std::mem::take(&mut self.doubts.slots);
        if std::mem::take(&mut self.doubts.everything) || doubted.len() > MANY {
            self.look_at_all()?;
        } else {
            for slot in doubted {
                self.look_at(slot)?;
            }
        }
        if self.doubts.uplinks.is_some_and(|t| t <= now) {
            self.doubts.uplinks = None;
            self.follow_uplinks()?;
        }
        Ok(())
    }

    /// The notification may be old news, or our own doing: what counts is how it is now.
    fn look_at(&mut self, slot: Slot) -> io::Result<()> {
        let index = self.pool.index(slot);
        let leased = self.pool.tag(slot).lease.is_some();
        let well = index != 0
            && link::get(&mut self.kernel.route, index)
                .is_ok_and(|l| apply::is_sound(&self.config, &l))
            && apply::addressed(&mut self.kernel, &self.config, slot, index, leased)
                .unwrap_or(false);
        if well { Ok(()) } else { self.lose(slot) }
    }

    /// The same for all of them, by two dumps instead of two questions each.
    fn look_at_all(&mut self) -> io::Result<()> {
        let found = apply::survey(&mut self.kernel, &self.config)?.ours;
        let links: HashMap<u32, bool> = found.iter().map(|d| (d.index, d.sound)).collect();
        let addresses: HashSet<(u32, Net)> = link::addresses(&mut self.kernel.route)?
            .into_iter()
            .map(|f| (f.index, f.net))
            .collect();
        let ill: Vec<Slot> = self
            .pool
            .devices()
            .filter(|&(slot, index)| {
                let (v4, v6) = plan::hosts(&self.config, slot);
                let leased = self.pool.tag(slot).lease.is_some();
                links.get(&index) != Some(&true)
                    || !addresses.contains(&(index, Net::V4(v4)))
                    || leased && !addresses.contains(&(index, Net::V6(v6)))
            })
            .map(|d| d.0)
            .collect();
        for slot in ill {
            self.lose(slot)?;
        }
        Ok(())
    }

    /// What was noticed while the pool was made is our own doing; whatever else happened then shows.
    pub(super) fn start_watching(&mut self) {
        while !matches!(
            self.links.receive(MsgFlags::MSG_DONTWAIT),
            Err(nix::Error::EAGAIN)
        ) {}
        while !matches!(
            self.tables.receive(MsgFlags::MSG_DONTWAIT),
            Err(nix::Error::EAGAIN)
        ) {}
        self.doubts.everything = true;
        self.doubts.rules = true;
        self.doubts.uplinks = Some(Instant::now());
        self.settle_doubts();
    }

    /// Nothing is forwarded until the table is back.
    fn restore_rules(&mut self) {
        say!(
            3,
            "the table inet rvpn was changed or removed by somebody else: closing the way out and restoring it"
        );
        self.peers.tell_all(&Reply::notice(Status::RulesLost, 0, 0));
        let live: Vec<_> = self
            .pool
            .live()
            .map(|l| element(l.slot, l.index, l.lease))
            .collect();
        match apply::restore_rules(&mut self.kernel, &self.config, &self.uplinks, &live) {
            Ok(rules) => {
                self.rules = rules;
                self.doubts.retry = None;
                say!(5, "the table inet rvpn is back");
                self.peers
                    .tell_all(&Reply::notice(Status::RulesRestored, 0, 0));
            }
            Err(e) => {
                say!(3, "the table could not be restored, trying again: {e}");
                self.doubts.retry = Some(Instant::now() + RETRY);
            }
        }
    }

    fn follow_uplinks(&mut self) -> io::Result<()> {
        let uplinks = host::uplinks(&mut self.kernel, &self.config)?;
        if uplinks == self.uplinks {
            return Ok(());
        }
        let opened = ruleset::set_uplinks(&mut self.kernel, &uplinks)
            .and_then(|()| apply::open_uplinks(&mut self.kernel, &self.config, &uplinks));
        match opened {
            Ok(()) => {
                say!(
                    5,
                    "client traffic now leaves by {} uplink(s)",
                    uplinks.len()
                );
                self.uplinks = uplinks;
            }
            Err(e) => {
                say!(3, "the uplinks could not be followed, trying again: {e}");
                self.doubts.uplinks = Some(Instant::now() + RETRY);
            }
        }
        Ok(())
    }
}
