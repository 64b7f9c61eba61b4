//! Who serves which name and port.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvpn_proto::name::{Name, Pattern};

use super::{Carrier, Service};
use crate::auth::rights::Rights;

/// How TLS for a name is handled, as its server wishes; the configuration may
/// say otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// Passed on untouched: the server has the certificate.
    #[default]
    There,
    /// Ended by us: the server speaks HTTP.
    Here,
}

/// A client that serves.
#[derive(Clone)]
pub struct Server {
    /// Who pays, and owns the names.
    pub account: Arc<str>,
    /// Tells installations of one account apart; the same one coming again takes over.
    pub instance: Arc<str>,
    /// What it may serve.
    pub rights: Arc<Rights>,
    /// Where it connects from.
    pub peer: SocketAddr,
    /// How to reach it.
    pub carrier: Arc<dyn Carrier>,
}

/// Something a client serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Under which names.
    pub pattern: Pattern,
    /// What; every service that names lead to, if none is given.
    pub service: Option<Service>,
    /// How TLS is handled.
    pub ending: Ending,
}

/// Why something cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not inside the login's claims.
    #[error("{0} is not among the names of this login")]
    Claim(Pattern),
    /// The gateway's own.
    #[error("{0} belongs to the gateway")]
    Reserved(Pattern),
    /// Another account serves it now.
    #[error("{0} is served by another account")]
    Taken(Pattern),
}

/// What serves a visitor.
#[derive(Clone)]
pub struct Chosen {
    /// The client.
    pub server: Server,
    /// What of it.
    pub offer: Offer,
}

/// What a name leads to.
#[derive(Clone)]
pub enum Found {
    /// To this client.
    Served(Chosen),
    /// To nobody at the moment, or ever.
    Nobody,
}

/// All that is served. One for the process.
#[derive(Default)]
pub struct Table {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    last: u64,
    servers: HashMap<u64, Entry>,
}

struct Entry {
    server: Server,
    offers: Vec<Offer>,
}

/// A client's place in the table; dropping it takes everything of it out at once.
pub struct Place {
    table: Arc<Table>,
    number: u64,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a client in. It serves nothing yet. An earlier connection of the
    /// same instance is told to go.
    pub fn join(self: &Arc<Table>, server: Server) -> Place {
        let mut inner = self.lock();
        inner.last += 1;
        let number = inner.last;
        let offers = Vec::new();
        inner.servers.insert(number, Entry { server, offers });
        Place {
            table: Arc::clone(self),
            number,
        }
    }

    /// The client for a visitor who asks for `name`: the exact name before a
    /// wildcard, the longest wildcard first; among several clients in turn.
    pub fn find(&self, name: &Name, service: Service, _visitor: SocketAddr) -> Found {
        let inner = self.lock();
        let fits = |o: &&Offer| {
            o.pattern.covers(name) && o.service.is_none_or(|offered| offered == service)
        };
        let best = inner.servers.values().find_map(|entry| {
            let offer = entry.offers.iter().find(fits)?;
            Some(Chosen {
                server: entry.server.clone(),
                offer: offer.clone(),
            })
        });
        best.map_or(Found::Nobody, Found::Served)
    }
}

impl Place {
    /// Serves something more. Offering the same twice is one offer.
    pub fn offer(&self, offer: Offer) -> Result<(), Refused> {
        let mut inner = self.table.lock();
        let Some(entry) = inner.servers.get_mut(&self.number) else {
            return Ok(());
        };
        if !entry.server.rights.name(&offer.pattern) {
            return Err(Refused::Claim(offer.pattern));
        }
        if !entry.offers.contains(&offer) {
            entry.offers.push(offer);
        }
        Ok(())
    }

    /// Serves all names of the pattern no longer.
    pub fn withdraw(&self, pattern: &Pattern) {
        if let Some(entry) = self.table.lock().servers.get_mut(&self.number) {
            entry.offers.retain(|o| o.pattern != *pattern);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.lock().servers.remove(&self.number);
    }
}
