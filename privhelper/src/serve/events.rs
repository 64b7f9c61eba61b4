//! What others do to our devices, rules and uplinks: noticed by notification,
//! confirmed by asking the kernel, then repaired.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use rvpn_ipc::{Reply, Status};

use super::{Server, Task};
use crate::apply;
use crate::kernel::netlink::{attr_of, text_of, u32_at};
use crate::kernel::{link, nft, ruleset};
use crate::plan;

/// Links, addresses of both families, routes of both families.
pub(super) const LINK_GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
/// nf_tables, the seventh group.
pub(super) const TABLE_GROUPS: u32 = 1 << 6;
/// From so many doubtful slots on, all are looked at in one go.
const MANY: usize = 16;
/// Routes flap in bursts; one look at them afterwards is enough.
const SETTLE: Duration = Duration::from_millis(200);

impl Server {
    pub(super) fn read_links(&mut self) {
        let (config, entries) = (&self.config, &self.pool.entries);
        let (doubted, mut moved) = (&mut self.doubted, false);
        let mut doubt = |index| {
            let found = entries.iter().find(|e| e.device.index == index);
            doubted.extend(found.map(|e| e.device.slot));
        };
        let lost = self.links.drain(|m| match m.kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                let Some(l) = link::parse_link(m.body) else {
                    return;
                };
                if plan::slot_of(&l.name).is_none() {
                    moved |= !config.uplink.is_empty();
                } else if m.kind == libc::RTM_DELLINK || !apply::is_sound(config, &l) {
                    doubt(l.index);
                }
            }
            libc::RTM_DELADDR => doubt(u32_at(m.body, 4).unwrap_or(0)),
            // A default route came or went.
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => moved |= m.body.get(1) == Some(&0),
            _ => {}
        });
        if lost {
            self.doubted = (0..self.pool.len()).collect();
        }
        if !self.doubted.is_empty() {
            self.after(Duration::ZERO, Task::Look);
        }
        if lost || moved {
            self.after(SETTLE, Task::Uplinks);
        }
    }

    pub(super) fn read_tables(&mut self) {
        let (own, mut tampered) = ([self.kernel.filter.port, self.cleaner.port], false);
        let lost = self.tables.drain(|m| {
            let table = m.body.get(4..).and_then(|b| attr_of(b, nft::TABLE));
            let ours = table.map(text_of).as_deref() == Some(nft::NAME);
            tampered |= ours && !own.contains(&m.port);
        });
        if tampered {
            self.after(Duration::ZERO, Task::Restore);
        } else if lost {
            self.after(Duration::ZERO, Task::Verify);
        }
    }

    /// A notification may be old news, or our own doing: what counts is how it is now.
    pub(super) fn look(&mut self) -> io::Result<()> {
        let index = |slot| self.pool.get(slot).map(|e| e.device.index);
        let indexes: Vec<u32> = self.doubted.iter().filter_map(|s| index(*s)).collect();
        let k = &mut self.kernel;
        let found = if indexes.len() > MANY {
            apply::survey(k, None)?.ours
        } else {
            let one = |i: &u32| Ok(apply::survey(k, Some(*i))?.ours);
            let each: io::Result<Vec<_>> = indexes.iter().map(one).collect();
            each?.concat()
        };
        let sound = found.iter().filter(|(_, sound)| *sound);
        let sound: BTreeSet<u32> = sound.map(|(d, _)| d.index).collect();
        for slot in std::mem::take(&mut self.doubted) {
            let device = self.pool.get(slot).map(|e| e.device);
            if device.is_some_and(|d| !sound.contains(&d.index)) {
                self.lose(slot);
            }
        }
        Ok(())
    }

    /// Nothing is forwarded until the table is back.
    pub(super) fn restore_rules(&mut self) -> io::Result<()> {
        say!(error: "the table inet rvpn was changed or removed by somebody else: closing the way out and restoring it");
        self.peers.tell_all(&Reply::notice(Status::RulesLost, 0, 0));
        let live = self.pool.live();
        self.rules = apply::restore_rules(&mut self.kernel, &self.uplinks, &live)?;
        say!(notice: "the table inet rvpn is back");
        let notice = Reply::notice(Status::RulesRestored, 0, 0);
        self.peers.tell_all(&notice);
        Ok(())
    }

    pub(super) fn follow_uplinks(&mut self) -> io::Result<()> {
        let k = &mut self.kernel;
        let uplinks = apply::uplinks(k)?;
        if uplinks != self.uplinks {
            ruleset::set_uplinks(k, &uplinks)?;
            apply::open_uplinks(k, &uplinks)?;
            say!(notice: "client traffic now leaves by {} uplink(s)", uplinks.len());
            self.uplinks = uplinks;
        }
        Ok(())
    }
}
