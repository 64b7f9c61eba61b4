//! What clients offer and visitors want.

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use rvpn_proto::name::{Name, Pattern};

use crate::auth::rights::Rights;
use crate::serve::count::{Tally, Visiting};
use crate::serve::{Carrier, OpenError, Service};

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
    /// Whether each stream begins with a PROXY v2 header about its visitor.
    pub proxy: bool,
}

impl Offer {
    /// Everything under these names, TLS untouched.
    pub fn of(pattern: Pattern) -> Offer {
        Offer {
            pattern,
            service: None,
            ending: Ending::There,
            proxy: false,
        }
    }
}

/// What visitors can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// A name, or all below one.
    Name(Pattern),
    /// A port of the client's own.
    Port(u16),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Name(pattern) => pattern.fmt(f),
            What::Port(port) => write!(f, "port {port}"),
        }
    }
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
    /// Not among the login's ports.
    #[error("port {0} is not among the ports of this login")]
    Port(u16),
    /// Another account, or the gateway itself, listens there.
    #[error("port {0} is in use")]
    PortTaken(u16),
    /// The port cannot be listened on.
    #[error("cannot listen on port {0}: {1}")]
    PortFault(u16, String),
    /// One connection serves so many and no more.
    #[error("{0} is one too many: a connection serves at most 256 names and ports")]
    TooMany(What),
    /// The meter has no row for it.
    #[error("{0} cannot be served now: the gateway's meter is full")]
    NoRoom(What),
}

/// What serves a visitor.
#[derive(Clone)]
pub struct Chosen {
    /// The client.
    pub server: Server,
    /// Its number in the table, to pass it over the next time.
    pub number: u64,
    /// As what it was found.
    pub what: What,
    /// How it wants TLS.
    pub ending: Ending,
    /// Whether it wants a PROXY v2 header.
    pub proxy: bool,
    pub(super) tally: Tally,
    pub(super) most: usize,
}

impl Chosen {
    /// Counts a visitor in, if the account has room for one.
    pub fn begin(&self) -> Result<Visiting, OpenError> {
        Visiting::begin(self.tally.clone(), self.most)
    }
}

/// What a name leads to.
#[derive(Clone)]
pub enum Found {
    /// To this client.
    Served(Chosen),
    /// To nobody at the moment, or ever.
    Nobody,
}

impl Found {
    /// The client, if any.
    pub fn served(self) -> Option<Chosen> {
        match self {
            Found::Served(chosen) => Some(chosen),
            Found::Nobody => None,
        }
    }
}

/// Whom a visitor asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A name and what it is to speak.
    Name(Name, Service),
    /// Whoever has the port.
    Port(u16),
}

/// Who listens on ports of the clients' own.
pub trait Doors: Send + Sync + 'static {
    /// Listens, if it does not yet.
    fn open(&self, port: u16) -> Pin<Box<dyn Future<Output = Result<(), Refused>> + Send>>;

    /// Nobody serves the port any more. Somebody may again in a moment.
    fn close(&self, port: u16);
}
