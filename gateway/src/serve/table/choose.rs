//! Finding a name, and choosing among those who serve it.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use rvpn_proto::name::{Name, Pattern};

use super::{Chosen, Ending, Entry, Inner, MOST_OFFERS, Member, Refused, Service, Table, What};
use crate::config::Serve;
use crate::config::serve::Balance;
use crate::serve::account::Served;
use crate::serve::count::{Counts, Tally};

/// Those of one account who serve the same.
pub(super) struct Group {
    pub(super) account: Arc<str>,
    pub(super) counts: Arc<Counts>,
    pub(super) row: Option<Arc<Served>>,
    pub(super) members: Vec<Member>,
    balance: Balance,
    turn: usize,
}

/// All that is served, by what.
#[derive(Default)]
pub(super) struct Groups {
    exact: HashMap<Name, Group>,
    below: HashMap<Name, Group>,
    ports: HashMap<u16, Group>,
}

/// Who asks, and what counts for the answer.
pub(super) struct Ask<'a> {
    pub(super) visitor: SocketAddr,
    pub(super) tried: &'a [u64],
    pub(super) now: Instant,
    pub(super) spread: &'a RandomState,
    pub(super) most: usize,
}

impl Groups {
    fn get_mut(&mut self, what: &What) -> Option<&mut Group> {
        match what {
            What::Name(p) if p.is_wildcard() => self.below.get_mut(p.name()),
            What::Name(p) => self.exact.get_mut(p.name()),
            What::Port(port) => self.ports.get_mut(port),
        }
    }

    fn insert(&mut self, what: &What, group: Group) {
        match what {
            What::Name(p) if p.is_wildcard() => self.below.insert(p.name().clone(), group),
            What::Name(p) => self.exact.insert(p.name().clone(), group),
            What::Port(port) => self.ports.insert(*port, group),
        };
    }

    /// Takes a client out of what it serves. The group itself, if it was the last.
    pub(super) fn leave(&mut self, what: &What, number: u64) -> Option<Group> {
        let group = self.get_mut(what)?;
        group.members.retain(|m| m.number != number);
        if !group.members.is_empty() {
            return None;
        }
        match what {
            What::Name(p) if p.is_wildcard() => self.below.remove(p.name()),
            What::Name(p) => self.exact.remove(p.name()),
            What::Port(port) => self.ports.remove(port),
        }
    }

    pub(super) fn nearest(&self, name: &Name) -> Option<What> {
        if self.exact.contains_key(name.as_str()) {
            return Some(What::Name(Pattern::exact(name.clone())));
        }
        let base = name.parents().find_map(|up| self.below.get_key_value(up));
        base.map(|(base, _)| What::Name(Pattern::below(base.clone())))
    }

    pub(super) fn has_port(&self, port: u16) -> bool {
        self.ports.contains_key(&port)
    }

    /// Everything, for those who look.
    pub(super) fn all(&self) -> impl Iterator<Item = (What, &Group)> {
        let exact = self.exact.iter();
        let exact = exact.map(|(n, g)| (What::Name(Pattern::exact(n.clone())), g));
        let below = self.below.iter();
        let below = below.map(|(n, g)| (What::Name(Pattern::below(n.clone())), g));
        let ports = self.ports.iter().map(|(p, g)| (What::Port(*p), g));
        exact.chain(below).chain(ports)
    }

    pub(super) fn balance_by(&mut self, settings: &Serve) {
        for (name, group) in &mut self.exact {
            group.balance = settings.balance_of(&Pattern::exact(name.clone()));
        }
        for (name, group) in &mut self.below {
            group.balance = settings.balance_of(&Pattern::below(name.clone()));
        }
        for group in self.ports.values_mut() {
            group.balance = settings.balance;
        }
    }

    /// Who ends TLS: the server, if any of those who serve the name wants to and
    /// can; else the gateway, for whoever speaks HTTP.
    pub(super) fn ending(&self, name: &Name) -> Option<Ending> {
        let mut owner: Option<&Arc<str>> = None;
        let mut here = None;
        let above = name.parents().filter_map(|up| self.below.get(up));
        for group in self.exact.get(name.as_str()).into_iter().chain(above) {
            if *owner.get_or_insert(&group.account) != &group.account {
                continue;
            }
            for member in &group.members {
                match member.ending {
                    Ending::There if member.fits(Service::Https) => return Some(Ending::There),
                    Ending::There | Ending::Here if member.fits(Service::Http) => {
                        here = Some(Ending::Here);
                    }
                    Ending::There | Ending::Here => {}
                }
            }
        }
        here
    }

    pub(super) fn find(
        &mut self,
        name: &Name,
        service: Service,
        ask: &Ask<'_>,
        servers: &HashMap<u64, Entry>,
    ) -> Option<Chosen> {
        let mut owner: Option<Arc<str>> = None;
        let mut look = |group: &mut Group, what: &dyn Fn() -> What| {
            // The nearest pattern decides whose the name is. What its owner
            // does not serve there may stand under a wildcard of its own.
            if owner.as_ref().is_some_and(|o| *o != group.account) {
                return None;
            }
            owner.get_or_insert_with(|| Arc::clone(&group.account));
            group.choose(service, ask, servers, what)
        };
        if let Some(group) = self.exact.get_mut(name.as_str()) {
            let what = || What::Name(Pattern::exact(name.clone()));
            if let Some(chosen) = look(group, &what) {
                return Some(chosen);
            }
        }
        for up in name.parents() {
            let Some((base, _)) = self.below.get_key_value(up) else {
                continue;
            };
            let pattern = Pattern::below(base.clone());
            let Some(group) = self.below.get_mut(up) else {
                continue;
            };
            if let Some(chosen) = look(group, &|| What::Name(pattern.clone())) {
                return Some(chosen);
            }
        }
        None
    }

    pub(super) fn find_port(
        &mut self,
        port: u16,
        ask: &Ask<'_>,
        servers: &HashMap<u64, Entry>,
    ) -> Option<Chosen> {
        let group = self.ports.get_mut(&port)?;
        group.choose(Service::Tcp, ask, servers, &|| What::Port(port))
    }
}

impl Group {
    fn choose(
        &mut self,
        service: Service,
        ask: &Ask<'_>,
        servers: &HashMap<u64, Entry>,
        what: &dyn Fn() -> What,
    ) -> Option<Chosen> {
        let mut able: Vec<(&Member, &Entry)> = Vec::with_capacity(self.members.len());
        for member in self.members.iter().filter(|m| m.fits(service)) {
            let Some(entry) = servers.get(&member.number) else {
                continue;
            };
            if ask.tried.contains(&member.number) {
                continue;
            }
            // Who offers this service and everything else is there once.
            match able.iter_mut().find(|(m, _)| m.number == member.number) {
                Some(known) if known.0.service.is_none() => *known = (member, entry),
                Some(_) => {}
                None => able.push((member, entry)),
            }
        }
        let sure = |(_, e): &&(&Member, &Entry)| e.doubted_until.is_none_or(|t| t <= ask.now);
        if able.iter().any(|one| sure(&one)) {
            able.retain(|one| sure(&one));
        }
        let count = able.len().max(1);
        let turn = self.turn % count;
        let in_turn = able.iter().cycle().skip(turn).take(able.len());
        let best = match self.balance {
            Balance::RoundRobin => in_turn.copied().next(),
            Balance::LeastConnections => {
                let mut best: Option<(&Member, &Entry)> = None;
                for one in in_turn.copied() {
                    if best.is_none_or(|b| one.1.counts.current() < b.1.counts.current()) {
                        best = Some(one);
                    }
                }
                best
            }
            // The highest of all: when one leaves, only its own visitors move.
            Balance::BySource => able.iter().copied().max_by_key(|(_, entry)| {
                let who = (ask.visitor.ip().to_canonical(), &entry.server.instance);
                hash(ask.spread, &who)
            }),
        };
        let (member, entry) = best?;
        let chosen = Chosen {
            server: entry.server.clone(),
            number: member.number,
            what: what(),
            ending: member.ending,
            proxy: member.proxy,
            tally: member.tally.clone(),
            most: ask.most,
        };
        self.turn = turn + 1;
        Some(chosen)
    }
}

fn hash(spread: &RandomState, who: &impl Hash) -> u64 {
    spread.hash_one(who)
}

impl Inner {
    /// Adds a part of a client to what is served; `Err(None)` if it is
    /// another account's.
    pub(super) fn add(
        &mut self,
        number: u64,
        what: What,
        (service, ending, proxy): (Option<Service>, Ending, bool),
        table: &Table,
    ) -> Result<(), Option<Refused>> {
        let Some(entry) = self.servers.get_mut(&number) else {
            return Ok(());
        };
        let account = &entry.server.account;
        let known = entry.offers.iter().find(|(w, _)| *w == what);
        if known.is_none() && entry.offers.len() >= MOST_OFFERS {
            return Err(Some(Refused::TooMany(what)));
        }
        let at_client = known.map_or_else(Arc::default, |(_, counts)| Arc::clone(counts));
        let first = known.is_none();
        if self.groups.get_mut(&what).is_none() {
            let now = Instant::now();
            if self.past.is_kept_for_another(&what, account, now) {
                return Err(None);
            }
            let row = table.books.served(account, &what);
            let row = row.map_err(|_| Some(Refused::NoRoom(what.clone())))?;
            let counts = self.past.take(&what, account);
            let balance = match &what {
                What::Name(pattern) => self.settings.balance_of(pattern),
                What::Port(_) => self.settings.balance,
            };
            let group = Group {
                account: Arc::clone(account),
                counts,
                row,
                members: Vec::new(),
                balance,
                turn: 0,
            };
            self.groups.insert(&what, group);
        }
        let Some(group) = self.groups.get_mut(&what) else {
            return Ok(());
        };
        if group.account != *account {
            return Err(None);
        }
        let tally = Tally {
            all: [
                Arc::clone(&entry.counts),
                Arc::clone(&at_client),
                Arc::clone(&group.counts),
                Arc::clone(&table.whole),
            ],
            row: group.row.clone(),
            load: Arc::clone(&entry.load),
        };
        let member = Member {
            number,
            service,
            ending,
            proxy,
            tally,
        };
        let same = |m: &&mut Member| m.number == number && m.service == service;
        match group.members.iter_mut().find(same) {
            Some(known) => *known = member,
            None => group.members.push(member),
        }
        if first {
            entry.offers.push((what, at_client));
        }
        Ok(())
    }
}

impl Serve {
    /// Whether visitors of the name never reach a client.
    pub fn is_reserved(&self, name: &Name) -> bool {
        self.domain.as_ref().is_some_and(|d| d == name)
            || self.reserved.iter().any(|p| p.covers(name))
    }

    /// Whether the whole pattern is reserved. One that merely contains a
    /// reserved name may be served; that name is not found by it.
    pub fn reserves(&self, pattern: &Pattern) -> bool {
        match pattern.is_wildcard() {
            false => self.is_reserved(pattern.name()),
            true => self.reserved.iter().any(|p| p.contains(pattern)),
        }
    }
}
