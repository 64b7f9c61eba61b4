//! Sessions: what happens to a connection after its login.

pub mod begin;
pub mod carriage;
mod control;
pub mod directory;
pub mod drive;
pub mod hub;
pub mod lease;
pub mod mailbox;
mod native;
mod packets;
pub mod transport;
pub mod whose;

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rvpn_ipc::Key;
use rvpn_proto::control::Prefix;
use tokio::runtime::Handle;
use tracing::debug;

use self::begin::Arrival;
use self::hub::Hub;
use self::transport::{LIMIT, Socket};
use crate::admit::{self, Admission, Io, Kind};
use crate::cores::{CoreId, Cores, Seat};
use crate::dialects::Older;
use crate::fd;
use crate::helper::Helper;
use crate::meter::Meter;
use crate::packer;
use crate::serve::table::Table;
use crate::streams;
use crate::ticket::{Holder, TicketKey};

/// What the operator decides about sessions.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a ticket may be used.
    pub ticket_life: Duration,
    /// Resolvers that clients are told to use.
    pub dns: Vec<IpAddr>,
    /// Destinations that clients are told to send here.
    pub routes: Vec<Prefix>,
}

/// What all sessions work with.
pub struct Shared {
    pub hub: Arc<Hub>,
    pub cores: Cores,
    pub helper: Helper,
    pub meter: Arc<Meter>,
    pub tickets: TicketKey,
    pub settings: Arc<Settings>,
    /// Who serves what to the world.
    pub table: Arc<Table>,
    /// For what must not run on a data core, such as resolving names.
    pub control: Handle,
    spread: AtomicU64,
}

impl Shared {
    /// Puts the parts together, on the control runtime.
    pub fn new(
        cores: Cores,
        helper: Helper,
        meter: Arc<Meter>,
        tickets: TicketKey,
        settings: Settings,
    ) -> Arc<Shared> {
        let table = Arc::new(Table::metered(Arc::clone(&meter)));
        Arc::new(Shared {
            hub: Arc::default(),
            cores,
            helper,
            meter,
            tickets,
            settings: Arc::new(settings),
            table,
            control: Handle::current(),
            spread: AtomicU64::new(0),
        })
    }

    async fn begin(self: Arc<Shared>, admission: Admission, socket: Socket, seat: Seat) {
        match admission.kind.clone() {
            Kind::Native => native::greet(self, admission, socket, seat).await,
            Kind::Streams(via) => streams::greet(self, admission, via, socket, seat).await,
            Kind::Dialect(dialect) => {
                let lingers = !admission.anonymous;
                match self.key_of_older(&admission, lingers) {
                    Ok(key) => Arrival {
                        socket,
                        protocol: Older {
                            dialect: dialect.variant,
                            padding: dialect.padding,
                            lingers,
                        },
                        admission,
                        key,
                        epoch: 0,
                        seat,
                    }
                    .settle(self),
                    Err(error) => debug!(%error, "no key for a client"),
                }
            }
        }
    }

    /// These clients have no name of their own, and several may share a token.
    /// The token's lease is for the one that comes back to it, never taken from
    /// one that is still there.
    fn key_of_older(&self, admission: &Admission, lingers: bool) -> io::Result<Key> {
        let token_id = admission.token_id.to_string();
        let key = self
            .tickets
            .lease_key(&admission.account, Holder::Token(&token_id));
        if lingers && self.hub.core_of(key).is_none() {
            Ok(key)
        } else {
            TicketKey::throwaway_key()
        }
    }

    /// When a client that is sent away comes back: not all at once.
    pub fn retry_after(&self) -> Duration {
        // Golden-ratio steps spread any number of clients evenly.
        let n = self
            .spread
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        Duration::from_millis(500 + (n >> 32) * 4_000 / (1 << 32))
    }
}

/// The sessions, as the front knows them.
#[derive(Clone)]
pub struct Sessions(pub Arc<Shared>);

impl admit::Sessions for Sessions {
    fn admit(&self, admission: Admission, mut io: Io, read_ahead: Bytes) {
        let shared = Arc::clone(&self.0);
        let seat = shared.cores.least_loaded();
        let core = seat.core();
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
            let streams = matches!(admission.kind, Kind::Streams(_));
            if !streams && let Ok(socket) = io.socket() {
                fd::stay_near(socket);
            }
            let limit = if streams {
                rvpn_proto::streams::MAX_RECEIVED
            } else {
                LIMIT
            };
            let socket = Socket::limited(io, read_ahead, limit).await;
            shared.begin(admission, socket, seat).await;
        };
        // Boxed: what the connection remembers of this task, as one that waited
        // for it, must not keep the memory of a login.
        self.0.cores.spawn(core, Box::pin(task));
    }

    fn tunnel(&self, arrival: packer::Arrival, io: Io, read_ahead: Bytes) {
        packer::admit(Arc::clone(&self.0), arrival, io, read_ahead);
    }

    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.0.table)
    }

    fn run(&self, core: CoreId, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.cores.spawn(core, task);
    }

    fn ready(&self) -> Result<(), String> {
        let state = *self.0.helper.state().borrow();
        match state.pool {
            None => Err("the helper does not answer".to_owned()),
            Some(_) if state.rules_lost => {
                Err("the packet rules were removed; the helper restores them".to_owned())
            }
            Some(_) => Ok(()),
        }
    }

    fn drain(&self, limit: Duration) -> Pin<Box<dyn Future<Output = usize> + Send + '_>> {
        Box::pin(self.0.drain(limit))
    }
}
