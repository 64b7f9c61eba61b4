//! Sessions: what happens to a connection after its login.

pub mod begin;
pub mod directory;
pub mod drive;
pub mod hub;
pub mod lease;
pub mod transport;
pub mod whose;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rvpn_ipc::Class;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use self::hub::Hub;
use crate::cores::Cores;
use crate::helper::Helper;
use crate::meter::Meter;
use crate::ticket::TicketKey;

/// Who was let in.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Who pays.
    pub account: Arc<str>,
    /// The token it logged in with; empty for an anonymous client.
    pub token_id: Arc<str>,
    /// When the token ends.
    pub expires: Option<Instant>,
    /// Turns true when the token or the account is revoked.
    pub revoked: watch::Receiver<bool>,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// The helper's policy class for it.
    pub class: Class,
}

/// What the operator decides about sessions.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a ticket may be used.
    pub ticket_life: Duration,
}

/// What all sessions work with.
pub struct Shared {
    pub hub: Arc<Hub>,
    pub cores: Cores,
    pub helper: Helper,
    pub meter: Arc<Meter>,
    pub tickets: TicketKey,
    pub settings: Settings,
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
        Arc::new(Shared {
            hub: Arc::default(),
            cores,
            helper,
            meter,
            tickets,
            settings,
            control: Handle::current(),
            spread: AtomicU64::new(0),
        })
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
