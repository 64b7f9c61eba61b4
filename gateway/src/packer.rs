//! Older reverse tunnel clients: an adapter from packer v1 to what serving is
//! here.
//!
//! A client is one WebSocket and lives on one data core, with its visitors. It
//! is a carrier like any other, so names, limits, load balancing and metering
//! are not known here. What is: its frames, its commands, its tokens, and how
//! to keep a slow visitor from costing memory or the others their tunnel.

mod bell;
mod carrier;
pub mod desk;
mod ids;
mod pipe;
mod tokens;
mod tunnel;
mod turn;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rvpn_proto::packer::Profile;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{Instrument, debug, info, info_span, warn};

use self::carrier::Way;
use self::desk::Desk;
pub use self::tokens::{Print, print};
use self::tunnel::{Over, State};
use self::turn::Run;
use crate::admit::Io;
use crate::auth::Grant;
use crate::cores::Seat;
use crate::fd;
use crate::limits::PendingPass;
use crate::session::Shared;
use crate::session::hub::orders;
use crate::session::transport::Socket;
use crate::ticket::random;

/// What the session list and the meter call it.
pub const SERVICE: &str = "packer";

/// A client whose WebSocket is open.
pub struct Arrival {
    /// Which it is.
    pub profile: Profile,
    /// Where it shows tokens.
    pub desk: Arc<dyn Desk>,
    /// The login that its request was let in with. Without one it holds
    /// nothing until it has shown a token.
    pub login: Option<Login>,
    /// Its place among strangers, for as long as it is one.
    pub pending: Option<PendingPass>,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// The name by which it reached us, and the port.
    pub host: Arc<str>,
    /// That names are reached on.
    pub port: u16,
}

/// A token that was accepted.
#[derive(Debug)]
pub struct Login {
    /// Of the token, to know it again.
    pub print: Print,
    /// What it is worth.
    pub grant: Grant,
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrival")
            .field("profile", &self.profile)
            .field("login", &self.login)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// Takes a client for its whole life, on a data core. Does not block.
pub(crate) fn admit(shared: Arc<Shared>, arrival: Arrival, mut io: Io, read_ahead: Bytes) {
    let seat = shared.cores.least_loaded();
    let core = seat.core();
    let span = info_span!(
        "packer",
        account = arrival.login.as_ref().map(|l| &*l.grant.account),
        peer = %arrival.peer,
        profile = %arrival.profile,
    );
    let on = Arc::clone(&shared);
    let task = async move {
        if let Err(error) = io.rehome() {
            debug!(%error, "cannot move a connection to a data core");
            return;
        }
        if let Ok(socket) = io.socket()
            && let Err(error) = fd::tune(socket)
        {
            debug!(%error, "cannot set a socket's options");
        }
        let socket = Socket::accept(io, read_ahead).await;
        run(on, arrival, socket, seat).await;
    };
    shared.cores.spawn(core, task.instrument(span));
}

/// How long the farewell may take; the client may not be reading any more.
const FAREWELL: Duration = Duration::from_secs(2);

async fn run(shared: Arc<Shared>, arrival: Arrival, socket: Socket, seat: Seat) {
    let (asks_tx, asks) = mpsc::channel(carrier::ASKS);
    let (orders_tx, orders) = orders();
    let way = Arc::new(Way {
        asks: asks_tx,
        orders: orders_tx,
        core: seat.core(),
    });
    let Ok(instance) = random::<16>() else {
        return warn!("no random numbers: a client is turned away");
    };
    let instance = u128::from_le_bytes(instance);
    let mut state = State::new(
        shared,
        arrival.profile,
        arrival.desk,
        arrival.peer,
        arrival.host,
        arrival.port,
        way,
        format!("{SERVICE}:{instance:032x}").into(),
        arrival.pending,
    );
    let begun = match arrival.login {
        Some(Login { print, grant }) => match state.login(print, grant) {
            Ok(Ok(())) => {
                state.listen(print);
                Ok(())
            }
            Ok(Err(failure)) => Err(Over::Close(1008, failure.message)),
            Err(over) => Err(over),
        },
        None => Ok(()),
    };
    let mut run = Run::new(socket, state, asks, orders);
    let over = match begun {
        Ok(()) => run.run(seat.load()).await,
        Err(over) => over,
    };
    let known = !run.state.is_stranger();
    let mut socket = run.into_socket();
    match over {
        Over::Lost(why) if known => info!(why, "client lost"),
        Over::Lost(why) => debug!(why, "a stranger left"),
        Over::Close(code, reason) => {
            match known {
                true => info!(code, reason, "client sent away"),
                false => debug!(code, reason, "a stranger was sent away"),
            }
            drop(timeout(FAREWELL, socket.close(code, reason)).await);
        }
    }
}
