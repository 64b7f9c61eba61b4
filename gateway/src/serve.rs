//! The other direction: visitors of clients that serve.
//!
//! A client that serves is a [`Carrier`], whatever it speaks: it is asked for a
//! [`Stream`] per visitor. Who serves which name stands in one [`table::Table`];
//! names come from signed claims, streams belong to one client and are found by
//! nobody else.

pub mod account;
pub mod count;
pub mod names;
pub mod proxy;
pub mod splice;
pub mod table;
pub mod visit;

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;

use rvpn_proto::name::Name;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::cores::CoreId;

/// What a visitor speaks, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// HTTP, in the clear: it was, or TLS ended here.
    Http,
    /// TLS, passed on untouched.
    Https,
    /// SSH on the shared port.
    Ssh,
    /// Anything, on a port of the client's own.
    Tcp,
}

impl Service {
    /// As old clients, tables and logs call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Service::Http => "http",
            Service::Https => "https",
            Service::Ssh => "ssh",
            Service::Tcp => "tcp",
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A visitor, as its server is told of it.
#[derive(Clone, Debug)]
pub struct Visit {
    /// Where the visitor comes from.
    pub peer: SocketAddr,
    /// The port it came to.
    pub port: u16,
    /// Whom it asked for, if it said so.
    pub name: Option<Name>,
    /// What it speaks.
    pub service: Service,
}

/// Bytes both ways between a visitor and its server.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A visitor's stream, as its carrier made it. Shutting it down says that the
/// visitor has ended; dropping it before says that it was cut off.
pub type Stream = Box<dyn Duplex>;

/// Why there is no stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The client is going or gone: another one may serve.
    #[error("the client has gone")]
    Gone,
    /// It has as many visitors as it may.
    #[error("too many visitors at once")]
    Full,
    /// It does not serve this, or cannot reach what it serves.
    #[error("the client refused")]
    Refused,
    /// It did not answer in time.
    #[error("the client did not answer")]
    Silent,
}

/// A promise of a stream.
pub type Opening = Pin<Box<dyn Future<Output = Result<Stream, OpenError>> + Send>>;

/// A connected client that serves.
pub trait Carrier: Send + Sync + 'static {
    /// Asks for a stream. It may be used on any runtime, best on the client's own.
    fn open(&self, visit: Visit) -> Opening;

    /// The core that the client's connection lives on, where its visitors
    /// should live too.
    fn core(&self) -> CoreId;

    /// Asks whether the client is still there: it has two seconds to show it,
    /// or it ends.
    fn probe(&self);

    /// Ends the client: what it is told.
    fn end(&self, code: u16, reason: &'static str);
}
