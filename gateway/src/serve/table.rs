//! Who serves which name and port.
//!
//! A name belongs to the account whose login says so, never to whoever asks
//! first. Of one account several installations share its visitors; the same
//! one coming again takes the place of its former connection in one step.
//! Looking a name up costs as many probes of a hash table as it has labels.

mod choose;
mod place;
mod terms;
mod view;

use std::collections::HashMap;
use std::hash::RandomState;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rvpn_proto::name::Name;
use tokio::sync::Notify;
use tokio::time::timeout_at;
use tracing::debug;

use self::choose::Groups;
pub use self::place::Place;
pub use self::terms::{Chosen, Doors, Ending, Found, Offer, Refused, Server, Wanted, What};
use self::view::Past;
pub use self::view::{Connections, NameView, ServerView, Snapshot};
use super::account::Books;
use super::count::{Counts, Load, Tally};
use super::{Carrier, Service};
use crate::config::Serve;
use crate::config::serve::Tls;
use crate::meter::Meter;

/// How long what a taken-over connection served is waited for: its successor
/// says it again at once.
const COMING: Duration = Duration::from_secs(1);
/// How long a client that was asked whether it is there is passed over, if
/// another one can serve.
const DOUBT: Duration = Duration::from_secs(2);
/// Names and ports that one connection serves.
const MOST_OFFERS: usize = 256;
/// What a connection is told whose place another one took.
const CONTINUED: (u16, &str) = (1000, "continued elsewhere");

/// All that is served. One for the process.
#[derive(Default)]
pub struct Table {
    inner: Mutex<Inner>,
    changed: Notify,
    whole: Arc<Counts>,
    tunnels: AtomicU64,
    books: Books,
    doors: OnceLock<Arc<dyn Doors>>,
    /// Ports are opened one at a time, so that each caller learns how it went.
    opening: tokio::sync::Mutex<()>,
    spread: RandomState,
}

#[derive(Default)]
struct Inner {
    settings: Arc<Serve>,
    last: u64,
    servers: HashMap<u64, Entry>,
    instances: HashMap<(Arc<str>, Arc<str>), u64>,
    groups: Groups,
    loads: HashMap<Arc<str>, Arc<Load>>,
    past: Past,
}

struct Entry {
    server: Server,
    /// Without a name of its own: it joins the others of its account.
    older: bool,
    doubted_until: Option<Instant>,
    started: SystemTime,
    counts: Arc<Counts>,
    load: Arc<Load>,
    offers: Vec<(What, Arc<Counts>)>,
}

/// One client's part in what is served under a name or on a port.
struct Member {
    number: u64,
    service: Option<Service>,
    ending: Ending,
    proxy: bool,
    tally: Tally,
}

impl Member {
    fn fits(&self, service: Service) -> bool {
        self.service.is_none_or(|offered| offered == service)
    }
}

impl Table {
    /// With a meter that has a row for each account's names.
    pub fn metered(meter: Arc<Meter>) -> Table {
        Table {
            books: Books::of(meter),
            ..Table::default()
        }
    }

    /// Puts settings in force, for what is looked up and offered from now on.
    pub fn configure(&self, settings: Serve) {
        let mut inner = self.lock();
        inner.settings = Arc::new(settings);
        let settings = Arc::clone(&inner.settings);
        inner.groups.balance_by(&settings);
    }

    /// Says who listens on ports. Once.
    pub fn listen_by(&self, doors: Arc<dyn Doors>) {
        if self.doors.set(doors).is_err() {
            debug!("there are doors already");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a client in. It serves nothing yet. An earlier connection of the
    /// same instance is told to go, and what it served is served by nobody else
    /// meanwhile.
    pub fn join(self: &Arc<Table>, server: Server) -> Place {
        let key = (Arc::clone(&server.account), Arc::clone(&server.instance));
        let mut inner = self.lock();
        let number = inner.enter(server, false);
        let former = inner.instances.insert(key, number);
        let (former, ports) = match former {
            Some(former) => inner.leave(former, Some(COMING)),
            None => (None, Vec::new()),
        };
        drop(inner);
        self.joined(&ports);
        if let Some(former) = former {
            former.end(CONTINUED.0, CONTINUED.1);
        }
        self.place(number)
    }

    /// Puts a client in that has no name for itself. It may be one that is here
    /// already and came again, so the others of its account are asked whether
    /// they are still there; until they show it, this one comes first.
    pub fn join_beside(self: &Arc<Table>, server: Server) -> Place {
        let account = Arc::clone(&server.account);
        let until = Instant::now() + DOUBT;
        let mut inner = self.lock();
        let mut asked = Vec::new();
        for other in inner.servers.values_mut() {
            if other.older && other.server.account == account {
                other.doubted_until = Some(until);
                asked.push(Arc::clone(&other.server.carrier));
            }
        }
        let number = inner.enter(server, true);
        drop(inner);
        self.joined(&[]);
        for carrier in asked {
            carrier.probe();
        }
        self.place(number)
    }

    fn joined(&self, ports: &[u16]) {
        self.tunnels.fetch_add(1, Ordering::Relaxed);
        self.close_doors(ports);
        self.changed.notify_waiters();
    }

    fn place(self: &Arc<Table>, number: u64) -> Place {
        Place {
            table: Arc::clone(self),
            number,
        }
    }

    /// The client for a visitor who asks for `name`: the exact name before a
    /// wildcard, the longest wildcard first; among several clients as the
    /// configuration says.
    pub fn find(&self, name: &Name, service: Service, visitor: SocketAddr) -> Found {
        let wanted = Wanted::Name(name.clone(), service);
        match self.look(&wanted, visitor, &[]).0 {
            Some(chosen) => Found::Served(chosen),
            None => Found::Nobody,
        }
    }

    /// The same, passing over clients that were tried, and waiting a moment for
    /// one that is just being replaced by its next connection.
    pub async fn seek(
        &self,
        wanted: &Wanted,
        visitor: SocketAddr,
        tried: &[u64],
    ) -> Option<Chosen> {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            let (found, coming) = self.look(wanted, visitor, tried);
            if found.is_some() {
                return found;
            }
            timeout_at(coming?.into(), changed).await.ok()?;
        }
    }

    fn look(
        &self,
        wanted: &Wanted,
        visitor: SocketAddr,
        tried: &[u64],
    ) -> (Option<Chosen>, Option<Instant>) {
        let now = Instant::now();
        let mut inner = self.lock();
        let inner = &mut *inner;
        let ask = choose::Ask {
            visitor,
            tried,
            now,
            spread: &self.spread,
            most: inner.settings.visitors_per_account,
        };
        let found = match wanted {
            Wanted::Name(name, _) if inner.settings.is_reserved(name) => return (None, None),
            Wanted::Name(name, service) => inner.groups.find(name, *service, &ask, &inner.servers),
            Wanted::Port(port) => inner.groups.find_port(*port, &ask, &inner.servers),
        };
        let coming = match found {
            Some(_) => None,
            None => inner.past.coming(wanted, now),
        };
        (found, coming)
    }

    /// Waits while the name is between two connections of who serves it.
    pub async fn arrived(&self, name: &Name) {
        let wanted = Wanted::Name(name.clone(), Service::Https);
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            let coming = {
                let inner = self.lock();
                match inner.groups.ending(name) {
                    Some(_) => None,
                    None => inner.past.coming(&wanted, Instant::now()),
                }
            };
            let Some(until) = coming else { return };
            if timeout_at(until.into(), changed).await.is_err() {
                return;
            }
        }
    }

    /// Who ends TLS for a name; `None` if nobody serves it.
    pub fn ending(&self, name: &Name) -> Option<Ending> {
        let inner = self.lock();
        if inner.settings.is_reserved(name) {
            return None;
        }
        let wished = inner.groups.ending(name)?;
        Some(match inner.settings.policy(name).tls {
            Some(Tls::Passthrough) => Ending::There,
            Some(Tls::Terminate) => Ending::Here,
            None => wished,
        })
    }

    /// Ends a client for good, at an operator's word. False if there is none
    /// of this number now.
    pub fn kick(&self, number: u64) -> bool {
        let (carrier, ports) = self.lock().leave(number, None);
        self.close_doors(&ports);
        self.changed.notify_waiters();
        match carrier {
            Some(carrier) => {
                carrier.end(1008, "disconnected by the operator");
                true
            }
            None => false,
        }
    }

    /// Whether somebody serves the name, whatever of it.
    pub fn serves(&self, name: &Name) -> bool {
        self.nearest(name).is_some()
    }

    /// The nearest pattern that is served and covers the name.
    pub fn nearest(&self, name: &Name) -> Option<What> {
        let inner = self.lock();
        match inner.settings.is_reserved(name) {
            true => None,
            false => inner.groups.nearest(name),
        }
    }

    /// Whether the client is here and serves this.
    pub fn still(&self, number: u64, what: &What) -> bool {
        let inner = self.lock();
        let entry = inner.servers.get(&number);
        entry.is_some_and(|e| e.offers.iter().any(|(w, _)| w == what))
    }

    /// Whether somebody serves the port.
    pub fn serves_port(&self, port: u16) -> bool {
        let wanted = Wanted::Port(port);
        let inner = self.lock();
        inner.groups.has_port(port) || inner.past.coming(&wanted, Instant::now()).is_some()
    }

    fn close_doors(&self, ports: &[u16]) {
        if let Some(doors) = self.doors.get() {
            ports.iter().for_each(|port| doors.close(*port));
        }
    }
}

impl Inner {
    fn enter(&mut self, server: Server, older: bool) -> u64 {
        self.last += 1;
        let load = self.loads.entry(Arc::clone(&server.account));
        let load = Arc::clone(load.or_default());
        let entry = Entry {
            server,
            older,
            doubted_until: None,
            started: SystemTime::now(),
            counts: Arc::default(),
            load,
            offers: Vec::new(),
        };
        self.servers.insert(self.last, entry);
        self.last
    }

    /// Takes a client out with all it serves, which is waited for a while if
    /// its successor is here. Returns how to reach it and what ports nobody serves.
    fn leave(
        &mut self,
        number: u64,
        coming: Option<Duration>,
    ) -> (Option<Arc<dyn Carrier>>, Vec<u16>) {
        let Some(entry) = self.servers.remove(&number) else {
            return (None, Vec::new());
        };
        let key = (
            Arc::clone(&entry.server.account),
            Arc::clone(&entry.server.instance),
        );
        if self.instances.get(&key) == Some(&number) {
            self.instances.remove(&key);
        }
        let now = Instant::now();
        let keep = self.settings.dead_time.idle;
        let mut ports = Vec::new();
        for (what, _) in &entry.offers {
            if let Some(group) = self.groups.leave(what, number) {
                if let What::Port(port) = what {
                    ports.push(*port);
                }
                let coming = coming.map(|c| now + c);
                self.past.emptied(what, group, coming, now, keep);
            }
        }
        let carrier = Arc::clone(&entry.server.carrier);
        let account = Arc::clone(&entry.server.account);
        self.past.left(number, entry, now, keep);
        self.tidy_load(&account);
        (Some(carrier), ports)
    }

    /// Forgets the load of an account that has neither clients nor visitors.
    fn tidy_load(&mut self, account: &Arc<str>) {
        let idle = |load: &Arc<Load>| Arc::strong_count(load) == 1 && load.visitors() == 0;
        if self.loads.get(account).is_some_and(idle) {
            self.loads.remove(account);
        }
    }
}
