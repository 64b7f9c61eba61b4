//! From a visitor to a stream of the client that serves it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tracing::debug;

use super::splice::{Metered, splice};
use super::table::{Chosen, Table, Wanted};
use super::{OpenError, Service, Stream, Visit};
use crate::admit::Io;
use crate::front::not_taken;
use crate::http::Front;
use crate::limits::PendingPass;

/// How long a client may take to open a stream.
const OPENING: Duration = Duration::from_secs(10);
/// After which it is asked whether it is there at all.
const DOUBT: Duration = Duration::from_secs(1);
/// When the kernel asks a silent visitor whether it is there, and then how
/// often, in seconds.
const KEEPALIVE: u32 = 60;
const KEEPALIVE_STEP: u32 = 15;
/// Clients that are tried for one visitor.
const TRIES: usize = 4;

/// Why a visitor is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// Nobody serves what it asked for.
    #[error("nobody serves it")]
    Nobody,
    /// Its server has as many visitors as it may.
    #[error("too many visitors")]
    Full,
    /// Its server cannot, or does not, take it.
    #[error("not taken")]
    Failed,
}

/// A stream, and whose it is.
pub struct Reached {
    /// The client.
    pub chosen: Chosen,
    /// Bytes to it and from it.
    pub stream: Metered,
}

impl Visit {
    /// Whom it asks for.
    pub fn wanted(&self) -> Wanted {
        match &self.name {
            Some(name) => Wanted::Name(name.clone(), self.service),
            None => Wanted::Port(self.port),
        }
    }
}

/// Opens a stream for a visitor at one of the clients that serve what it asks
/// for: at another one, if the first is going. `first` was chosen already;
/// `count` says what is counted.
pub async fn reach(
    table: &Table,
    visit: &Visit,
    first: Option<Chosen>,
    count: fn(Stream, super::count::Visiting) -> Metered,
) -> Result<Reached, Unserved> {
    let wanted = visit.wanted();
    let mut first = first;
    let mut tried = Vec::new();
    let mut why = Unserved::Nobody;
    while tried.len() < TRIES {
        let chosen = match first.take() {
            Some(chosen) => Some(chosen),
            None => table.seek(&wanted, visit.peer, &tried).await,
        };
        let Some(chosen) = chosen else { break };
        tried.push(chosen.number);
        let visiting = chosen.begin().map_err(|_| Unserved::Full)?;
        match open(&chosen, visit).await {
            Ok(stream) => {
                let stream = count(stream, visiting);
                return Ok(Reached { chosen, stream });
            }
            Err(error) => {
                debug!(%error, what = %chosen.what, "a client did not take a visitor");
                why = match error {
                    OpenError::Full => Unserved::Full,
                    // It was there and is not: as if it had never been.
                    OpenError::Gone if why == Unserved::Nobody => Unserved::Nobody,
                    OpenError::Gone => why,
                    OpenError::Refused | OpenError::Silent => Unserved::Failed,
                };
            }
        }
    }
    Err(why)
}

async fn open(chosen: &Chosen, visit: &Visit) -> Result<Stream, OpenError> {
    let carrier = &chosen.server.carrier;
    let mut opening = carrier.open(visit.clone());
    match timeout(DOUBT, &mut opening).await {
        Ok(opened) => opened,
        Err(_) => {
            carrier.probe();
            let rest = OPENING.saturating_sub(DOUBT);
            timeout(rest, opening)
                .await
                .map_err(|_| OpenError::Silent)?
        }
    }
}

/// Brings a visitor to its server and stays until one of them ends. Nothing of
/// what it sends is looked at.
pub async fn pass(front: Arc<Front>, io: Io, visit: Visit, pass: PendingPass) {
    let reached = match reach(&front.table, &visit, None, Metered::connection).await {
        Ok(reached) => reached,
        Err(why) => {
            debug!(%why, service = %visit.service, "a visitor is sent away");
            if visit.service == Service::Https {
                not_taken(io).await;
            }
            return;
        }
    };
    drop(pass);
    let idle = front.config().serve.idle;
    let core = reached.chosen.server.carrier.core();
    front
        .sessions
        .run(core, Box::pin(carry(io, reached, visit, idle)));
}

/// Finds out about visitors who have gone without a word: nothing may pass for
/// a long time on connections that are none.
pub(super) fn watch_over(io: &Io) {
    let set = || -> std::io::Result<()> {
        let socket = io.socket()?;
        setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE)?;
        setsockopt(&socket, sockopt::TcpKeepInterval, &KEEPALIVE_STEP)?;
        setsockopt(&socket, sockopt::KeepAlive, &true)?;
        Ok(())
    };
    if let Err(error) = set() {
        debug!(%error, "cannot watch over a visitor's connection");
    }
}

async fn carry(mut io: Io, reached: Reached, visit: Visit, idle: Duration) {
    let Reached { chosen, mut stream } = reached;
    if let Err(error) = io.rehome() {
        return debug!(%error, "cannot move a visitor to its server's core");
    }
    watch_over(&io);
    if chosen.proxy
        && let Err(error) = stream
            .write_all(&proxy_header(visit.peer, visit.port))
            .await
    {
        return debug!(%error, "a client ended at once");
    }
    let end = splice(io, stream, idle).await;
    debug!(?end, service = %visit.service, "a visitor has gone");
}

/// PROXY v2: where the visitor comes from, and the port it came to. Which of
/// our addresses that was is nobody's business.
pub fn proxy_header(peer: SocketAddr, port: u16) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    match peer.ip().to_canonical() {
        IpAddr::V4(ip) => {
            header.extend([0x11, 0, 12]);
            header.extend(ip.octets());
            header.extend([0; 4]);
        }
        IpAddr::V6(ip) => {
            header.extend([0x21, 0, 36]);
            header.extend(ip.octets());
            header.extend([0; 16]);
        }
    }
    header.extend(peer.port().to_be_bytes());
    header.extend(port.to_be_bytes());
    header
}
