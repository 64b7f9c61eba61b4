//! What is shown of the table, and what it remembers of those who have gone.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use rvpn_proto::name::Pattern;

use super::choose::Group;
use super::{Entry, Table, Wanted, What};
use crate::serve::count::{Counts, Traffic};

/// Those who have gone that are remembered at once.
const MOST_PAST: usize = 16_384;

/// How many there are and were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Now.
    pub current: u64,
    /// So far.
    pub total: u64,
}

/// A client that serves, or served a short time ago.
#[derive(Clone, Debug)]
pub struct ServerView {
    /// From 1 upward, in the order they came.
    pub id: u64,
    /// Whose it is.
    pub account: Arc<str>,
    /// Which of the account's installations.
    pub instance: Arc<str>,
    /// Where it connects from.
    pub peer: SocketAddr,
    /// When it came.
    pub started: SystemTime,
    /// Whether it is here.
    pub live: bool,
    /// All it carries.
    pub traffic: Traffic,
    /// The same by name and port, in the order they were offered.
    pub offers: Vec<(What, Traffic)>,
}

impl ServerView {
    /// The names it serves.
    pub fn names(&self) -> impl Iterator<Item = &Pattern> {
        self.offers.iter().filter_map(|(what, _)| match what {
            What::Name(pattern) => Some(pattern),
            What::Port(_) => None,
        })
    }
}

/// A name or port that is served, or was a short time ago.
#[derive(Clone, Debug)]
pub struct NameView {
    /// Which.
    pub what: What,
    /// Whose.
    pub account: Arc<str>,
    /// By which clients; none if they have gone.
    pub servers: Vec<u64>,
    /// All of them together, those that have gone included.
    pub traffic: Traffic,
}

/// All of it at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// By number.
    pub servers: Vec<ServerView>,
    /// By name.
    pub names: Vec<NameView>,
    /// Everything together since the start.
    pub traffic: Traffic,
    /// Visitors.
    pub visitors: Connections,
    /// Connections of clients that serve.
    pub tunnels: Connections,
}

/// What was served and by whom, for as long as it is of use.
#[derive(Default)]
pub(super) struct Past {
    servers: VecDeque<(Instant, ServerView, Arc<Counts>)>,
    names: HashMap<What, Emptied>,
}

struct Emptied {
    account: Arc<str>,
    counts: Arc<Counts>,
    forget: Instant,
    coming: Option<Instant>,
}

impl Past {
    fn tidy(&mut self, now: Instant) {
        while self.servers.front().is_some_and(|(t, _, _)| *t <= now)
            || self.servers.len() > MOST_PAST
        {
            self.servers.pop_front();
        }
        if self.names.len() > MOST_PAST {
            self.names.retain(|_, e| e.forget > now);
        }
        if self.names.len() > MOST_PAST {
            // Better to forget the counts than to grow; whom a name is kept for counts.
            self.names.retain(|_, e| e.coming.is_some_and(|t| t > now));
        }
    }

    pub(super) fn left(&mut self, id: u64, entry: Entry, now: Instant, keep: Duration) {
        self.tidy(now);
        let counts = Arc::clone(&entry.counts);
        self.servers
            .push_back((now + keep, view(id, &entry, false), counts));
    }

    pub(super) fn emptied(
        &mut self,
        what: &What,
        group: Group,
        coming: Option<Instant>,
        now: Instant,
        keep: Duration,
    ) {
        let forget = coming.map_or(now + keep, |c| c.max(now + keep));
        let one = Emptied {
            account: group.account,
            counts: group.counts,
            forget,
            coming,
        };
        self.names.insert(what.clone(), one);
        self.tidy(now);
    }

    /// Until when the name is kept for the next connection of who served it.
    pub(super) fn coming(&self, wanted: &Wanted, now: Instant) -> Option<Instant> {
        let until = |what: What| {
            let until = self.names.get(&what)?.coming?;
            (until > now).then_some(until)
        };
        if self.names.is_empty() {
            return None;
        }
        match wanted {
            Wanted::Port(port) => until(What::Port(*port)),
            Wanted::Name(name, _) => {
                let exact = Pattern::exact(name.clone());
                let above = name.parents().filter_map(|up| up.parse().ok());
                std::iter::once(exact)
                    .chain(above.map(Pattern::below))
                    .find_map(|pattern| until(What::Name(pattern)))
            }
        }
    }

    pub(super) fn is_kept_for_another(&self, what: &What, account: &str, now: Instant) -> bool {
        self.names
            .get(what)
            .is_some_and(|e| *e.account != *account && e.coming.is_some_and(|t| t > now))
    }

    /// The counts of a name go on if the same account serves it again.
    pub(super) fn take(&mut self, what: &What, account: &str) -> Arc<Counts> {
        match self.names.remove(what) {
            Some(one) if *one.account == *account => one.counts,
            _ => Arc::default(),
        }
    }
}

fn view(id: u64, entry: &Entry, live: bool) -> ServerView {
    let offers = entry.offers.iter();
    ServerView {
        id,
        account: Arc::clone(&entry.server.account),
        instance: Arc::clone(&entry.server.instance),
        peer: entry.server.peer,
        started: entry.started,
        live,
        traffic: entry.counts.read(),
        offers: offers.map(|(w, c)| (w.clone(), c.read())).collect(),
    }
}

impl Table {
    /// Who serves what, and how much; those who have gone stay for the
    /// configured time.
    pub fn snapshot(&self) -> Snapshot {
        let now = Instant::now();
        let inner = self.lock();
        let gone = inner.past.servers.iter().filter(|(t, _, _)| *t > now);
        let mut servers: Vec<ServerView> = gone
            .map(|(_, shown, counts)| ServerView {
                traffic: counts.read(),
                ..shown.clone()
            })
            .collect();
        let live = inner.servers.iter();
        servers.extend(live.map(|(id, entry)| view(*id, entry, true)));
        servers.sort_by_key(|s| s.id);
        let served = inner.groups.all().map(|(what, group)| {
            let mut by: Vec<u64> = group.members.iter().map(|m| m.number).collect();
            by.sort_unstable();
            by.dedup();
            NameView {
                what,
                account: Arc::clone(&group.account),
                servers: by,
                traffic: group.counts.read(),
            }
        });
        let past = inner.past.names.iter().filter(|(_, e)| e.forget > now);
        let past = past.map(|(what, e)| NameView {
            what: what.clone(),
            account: Arc::clone(&e.account),
            servers: Vec::new(),
            traffic: e.counts.read(),
        });
        let mut names: Vec<NameView> = served.chain(past).collect();
        names.sort_by(|a, b| a.what.cmp(&b.what));
        let traffic = self.whole.read();
        Snapshot {
            servers,
            names,
            traffic,
            visitors: Connections {
                current: traffic.current,
                total: traffic.total,
            },
            tunnels: Connections {
                current: inner.servers.len() as u64,
                total: self.tunnels.load(Ordering::Relaxed),
            },
        }
    }
}
