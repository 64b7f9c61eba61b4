//! For which names certificates are wished now.

use rvpn_proto::name::Name;

use crate::config;
use crate::http::Front;
use crate::serve::table::{Ending, What};

/// What is to have a certificate now.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// How, if at all.
    pub settings: Option<config::Acme>,
    /// Names of others.
    pub served: Vec<Name>,
}

impl Wish {
    /// As the configuration and the clients that serve have it.
    pub fn of(front: &Front) -> Wish {
        let settings = front.config().acme.clone();
        let served = match &settings {
            Some(settings) if settings.served => served_here(front),
            _ => Vec::new(),
        };
        Wish { settings, served }
    }
}

/// Names of clients that are here and whose TLS we end. Nobody gets a
/// certificate for a name that only might be served.
fn served_here(front: &Front) -> Vec<Name> {
    let snapshot = front.table.snapshot();
    let live = snapshot.names.into_iter().filter(|n| !n.servers.is_empty());
    live.filter_map(|view| match view.what {
        What::Name(pattern) if !pattern.is_wildcard() => Some(pattern.name().clone()),
        What::Name(_) | What::Port(_) => None,
    })
    .filter(|name| front.table.ending(name) == Some(Ending::Here))
    .collect()
}
