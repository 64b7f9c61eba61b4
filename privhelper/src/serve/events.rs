//! What others do to our devices, rules and uplinks: noticed by notification,
//! confirmed by asking the kernel, then repaired.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use rvpn_ipc::{Reply, Slot, Status};

use super::{RETRY, Server};
use crate::apply;
use crate::kernel::netlink::{attr_of, text_of, u32_at};
use crate::kernel::{host, link, nft, ruleset};
use crate::net::Net;
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
    slots: BTreeSet<Slot>,
    everything: bool,
    uplinks: Option<Instant>,
    /// The table could not be restored: when to try again.
    retry: Option<Instant>,
}

impl Doubts {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.uplinks, self.retry].into_iter().flatten().min()
    }

    fn all(&mut self) {
        self.everything = true;
        self.uplinks = Some(Instant::now() + SETTLE);
    }
}

impl Server {
    pub(super) fn read_links(&mut self) {
        let (config, pool, doubts) = (&self.config, &self.pool, &mut self.doubts);
        let soon = Some(Instant::now() + SETTLE);
        let lost = self.links.drain(|m| match m.kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                let Some(l) = link::parse_link(m.body) else {
                    return;
                };
                let gone = m.kind == libc::RTM_DELLINK;
                let ill = gone || !apply::is_sound(config, &l);
                match plan::slot_of(&l.name) {
                    Some(slot) if ill && pool.index(slot) == l.index => {
                        doubts.slots.insert(slot);
                    }
                    None if !config.uplink.is_empty() => doubts.uplinks = soon,
                    _ => {}
                }
            }
            libc::RTM_DELADDR => {
                let index = u32_at(m.body, 4).unwrap_or(0);
                let found = pool.devices().find(|d| d.1 == index);
                doubts.slots.extend(found.map(|d| d.0));
            }
            // A default route came or went.
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE if m.body.get(1) == Some(&0) => {
                doubts.uplinks = soon;
            }
            _ => {}
        });
        if lost {
            self.doubts.all();
        }
    }

    pub(super) fn read_tables(&mut self) {
        let own = [self.kernel.filter.port, self.cleaner.port];
        let doubts = &mut self.doubts;
        let lost = self.tables.drain(|m| {
            let table = m.body.get(4..).and_then(|b| attr_of(b, nft::TABLE));
            let ours = table.map(text_of).as_deref() == Some(nft::NAME);
            doubts.tampered |= ours && !own.contains(&m.port);
        });
        self.doubts.rules |= lost;
    }

    /// What cannot be settled now is looked at again, all of it.
    pub(super) fn settle_doubts(&mut self) {
        if let Err(e) = self.try_settle() {
            say!(error: "the kernel could not be asked, trying again: {e}");
            self.doubts.all();
        }
    }

    fn try_settle(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let d = &mut self.doubts;
        let certain = d.tampered || d.retry.is_some();
        if (certain || d.rules) && d.retry.is_none_or(|t| t <= now) {
            let whole = ruleset::rules_present(&mut self.kernel)? == self.rules;
            (d.tampered, d.rules) = (false, false);
            if certain || !whole {
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
        let (k, index) = (&mut self.kernel, self.pool.index(slot));
        let leased = self.pool.lease(slot).is_some();
        let found = link::get(k, index).ok().filter(|_| index != 0);
        let sound = found.is_some_and(|l| apply::is_sound(&self.config, &l));
        let well = sound && apply::addressed(k, slot, index, leased).unwrap_or(false);
        if well { Ok(()) } else { self.lose(slot) }
    }

    /// The same for all of them, by two dumps instead of two questions each.
    fn look_at_all(&mut self) -> io::Result<()> {
        let found = apply::survey(&mut self.kernel)?.ours;
        let sound: HashMap<u32, bool> = found.iter().map(|d| (d.index, d.sound)).collect();
        let found = link::addresses(&mut self.kernel, None)?;
        let addresses: HashSet<(u32, Net)> = found.iter().map(|f| (f.index, f.net)).collect();
        let ill = |&(slot, index): &(Slot, u32)| {
            let [v4, v6] = plan::hosts(&self.config, slot);
            let open = self.pool.lease(slot).is_some();
            let has = |net| addresses.contains(&(index, net));
            !has(v4) || open && !has(v6) || sound.get(&index) != Some(&true)
        };
        let ill: Vec<_> = self.pool.devices().filter(ill).collect();
        ill.into_iter().try_for_each(|(slot, _)| self.lose(slot))
    }

    /// What was noticed while the pool was made is our own doing; whatever else happened then shows.
    pub(super) fn start_watching(&mut self) {
        self.links.drain(|_| {});
        self.tables.drain(|_| {});
        (self.doubts.everything, self.doubts.rules) = (true, true);
        self.doubts.uplinks = Some(Instant::now());
        self.settle_doubts();
    }

    /// Nothing is forwarded until the table is back.
    fn restore_rules(&mut self) {
        say!(error: "the table inet rvpn was changed or removed by somebody else: closing the way out and restoring it");
        self.peers.tell_all(&Reply::notice(Status::RulesLost, 0, 0));
        match apply::restore_rules(&mut self.kernel, &self.uplinks, &self.pool.live()) {
            Ok(rules) => {
                self.rules = rules;
                self.doubts.retry = None;
                say!(notice: "the table inet rvpn is back");
                let notice = Reply::notice(Status::RulesRestored, 0, 0);
                self.peers.tell_all(&notice);
            }
            Err(e) => {
                say!(error: "the table could not be restored, trying again: {e}");
                self.doubts.retry = Some(Instant::now() + RETRY);
            }
        }
    }

    fn follow_uplinks(&mut self) -> io::Result<()> {
        let k = &mut self.kernel;
        let uplinks = host::uplinks(k)?;
        if uplinks == self.uplinks {
            return Ok(());
        }
        match ruleset::set_uplinks(k, &uplinks).and_then(|()| apply::open_uplinks(k, &uplinks)) {
            Ok(()) => {
                say!(notice: "client traffic now leaves by {} uplink(s)", uplinks.len());
                self.uplinks = uplinks;
            }
            Err(e) => {
                say!(error: "the uplinks could not be followed, trying again: {e}");
                self.doubts.uplinks = Some(Instant::now() + RETRY);
            }
        }
        Ok(())
    }
}
