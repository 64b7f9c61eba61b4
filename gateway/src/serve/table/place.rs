//! A client's place in the table: what it adds and takes back.

use std::sync::Arc;
use std::time::Instant;

use rvpn_proto::name::Pattern;

use super::{Ending, Offer, Refused, Table, What};
use crate::serve::Service;

/// A client's place in the table; dropping it takes everything of it out at once.
pub struct Place {
    pub(super) table: Arc<Table>,
    pub(super) number: u64,
}

impl Place {
    /// Serves something more. Offering the same twice is one offer.
    pub fn offer(&self, offer: Offer) -> Result<(), Refused> {
        let mut inner = self.table.lock();
        let inner = &mut *inner;
        let Some(entry) = inner.servers.get(&self.number) else {
            // Taken over: what it serves now is of no interest.
            return Ok(());
        };
        let Offer {
            pattern,
            service,
            ending,
            proxy,
        } = offer;
        if !entry.server.rights.name(&pattern) {
            return Err(Refused::Claim(pattern));
        }
        if inner.settings.reserves(&pattern) {
            return Err(Refused::Reserved(pattern));
        }
        let what = What::Name(pattern.clone());
        inner
            .add(self.number, what, (service, ending, proxy), &self.table)
            .map_err(|refused| refused.unwrap_or(Refused::Taken(pattern)))?;
        self.table.changed.notify_waiters();
        Ok(())
    }

    /// Serves a TCP port of the gateway.
    pub async fn listen(&self, port: u16) -> Result<(), Refused> {
        let _one_at_a_time = self.table.opening.lock().await;
        let doors = {
            let mut inner = self.table.lock();
            let Some(entry) = inner.servers.get(&self.number) else {
                return Ok(());
            };
            if port == 0 || !entry.server.rights.port(port) {
                return Err(Refused::Port(port));
            }
            let Some(doors) = self.table.doors.get() else {
                let why = "this gateway opens no ports for clients".to_owned();
                return Err(Refused::PortFault(port, why));
            };
            let how = (Some(Service::Tcp), Ending::There, false);
            inner
                .add(self.number, What::Port(port), how, &self.table)
                .map_err(|refused| refused.unwrap_or(Refused::PortTaken(port)))?;
            doors
        };
        self.table.changed.notify_waiters();
        let opened = doors.open(port).await;
        if opened.is_err() {
            self.withdraw_what(&What::Port(port));
        }
        opened
    }

    /// Serves all names of the pattern no longer.
    pub fn withdraw(&self, pattern: &Pattern) {
        self.withdraw_what(&What::Name(pattern.clone()));
    }

    /// Serves the port no longer.
    pub fn withdraw_port(&self, port: u16) {
        self.withdraw_what(&What::Port(port));
    }

    fn withdraw_what(&self, what: &What) {
        let mut inner = self.table.lock();
        let inner = &mut *inner;
        let Some(entry) = inner.servers.get_mut(&self.number) else {
            return;
        };
        entry.offers.retain(|(w, _)| w != what);
        let emptied = inner.groups.leave(what, self.number);
        let closed = match (&emptied, what) {
            (Some(_), What::Port(port)) => vec![*port],
            _ => Vec::new(),
        };
        if let Some(group) = emptied {
            let keep = inner.settings.dead_time.idle;
            inner.past.emptied(what, group, None, Instant::now(), keep);
        }
        self.table.close_doors(&closed);
    }

    /// Its number in the table.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (_, ports) = self.table.lock().leave(self.number, None);
        self.table.close_doors(&ports);
        self.table.changed.notify_waiters();
    }
}
