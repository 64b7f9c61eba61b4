//! What passes from the front to the sessions: who was let in, and the
//! connection itself.
//!
//! Everything before this point handles strangers and lives on the control
//! runtime; everything after it is one client's own and lives on a data core.
//! The stream is a concrete type, so that no packet pays for a boxed one.

mod io;

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rvpn_ipc::Class;
use tokio::sync::watch;

pub use self::io::{Counted, Io, Prefixed, Raw};
use crate::auth::rights::Rights;
use crate::config::Dialect;
use crate::cores::CoreId;
use crate::packer;
use crate::serve::table::Table;

/// Names a token without being one: a hash of its `jti`, or of the token
/// itself if it has none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub [u8; 16]);

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the connection speaks from here on.
#[derive(Clone, Debug)]
pub enum Kind {
    /// `rvpn.packets.1`.
    Native,
    /// `rvpn.streams.1`.
    Streams(Arc<Via>),
    /// One of the older clients' dialects, by its path.
    Dialect(Arc<Dialect>),
}

/// How a client came to us, and its visitors will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Via {
    /// The gateway's name, as the client wrote it.
    pub host: String,
    /// Its port, likewise.
    pub port: u16,
    /// Whether there is TLS, here or at a proxy before us.
    pub tls: bool,
}

/// A login that succeeded.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Who pays, and whose limits apply.
    pub account: Arc<str>,
    /// Who it is within the account: the token's `sub`, or a device key.
    pub subject: Arc<str>,
    /// The token it logged in with.
    pub token_id: TokenId,
    /// When the right to be here ends by itself.
    pub expires_at: Option<SystemTime>,
    /// What it speaks.
    pub kind: Kind,
    /// Nobody in particular: the dialect's path is open to all.
    pub anonymous: bool,
    /// The helper's policy class for it.
    pub class: Class,
    /// Where it comes from, as far as is known behind a proxy.
    pub peer: SocketAddr,
    /// The listener it came through, counted from zero in the configuration.
    pub listener: usize,
    /// What it may serve to the world.
    pub rights: Arc<Rights>,
    /// Turns true when the token, its key or its subject is revoked.
    pub revoked: watch::Receiver<bool>,
}

/// The other side of the contract.
pub trait Sessions: Send + Sync + 'static {
    /// Takes a connection for its whole life. The 101 is sent; `read_ahead` is
    /// what already arrived behind the upgrade. Must not block.
    fn admit(&self, admission: Admission, io: Io, read_ahead: Bytes);

    /// The same for an older reverse tunnel client, which may have to log in yet.
    fn tunnel(&self, arrival: packer::Arrival, io: Io, read_ahead: Bytes);

    /// Who among them serves what.
    fn table(&self) -> Arc<Table>;

    /// Runs a visitor's task on the core of the client that serves it.
    fn run(&self, core: CoreId, task: Pin<Box<dyn Future<Output = ()> + Send>>);

    /// Whether a client that comes now can be served, and if not, why.
    fn ready(&self) -> Result<(), String>;

    /// Lets nobody begin, tells all to come back later, and waits until they
    /// have gone. Returns how many have not.
    fn drain(&self, limit: Duration) -> Pin<Box<dyn Future<Output = usize> + Send + '_>>;
}
