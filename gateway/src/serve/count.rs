//! What visitors move, counted where it counts: at the stream to the client.
//!
//! One byte is counted once for each who wants to know: the client's
//! connection, the name at it, the name, the whole gateway, and the account
//! that pays, whose row outlives the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::OpenError;
use super::account::Served;
use crate::meter::flush::now_ms;

/// Counters of one thing that is counted.
#[derive(Debug, Default)]
pub struct Counts {
    inbound: AtomicU64,
    outbound: AtomicU64,
    requests: AtomicU64,
    responses: AtomicU64,
    current: AtomicU64,
    total: AtomicU64,
    last_ms: AtomicU64,
}

/// The same at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes from visitors to the client.
    pub inbound: u64,
    /// Bytes from the client to visitors.
    pub outbound: u64,
    /// Requests: those of HTTP where we read it, else connections.
    pub requests: u64,
    /// Answers to them, likewise.
    pub responses: u64,
    /// Visitors now.
    pub current: u64,
    /// Visitors so far.
    pub total: u64,
    /// When something last passed, in milliseconds since 1970; zero if never.
    pub last_ms: u64,
}

impl Counts {
    /// As it stands.
    pub fn read(&self) -> Traffic {
        Traffic {
            inbound: self.inbound.load(Relaxed),
            outbound: self.outbound.load(Relaxed),
            requests: self.requests.load(Relaxed),
            responses: self.responses.load(Relaxed),
            current: self.current.load(Relaxed),
            total: self.total.load(Relaxed),
            last_ms: self.last_ms.load(Relaxed),
        }
    }

    /// Visitors now.
    pub(super) fn current(&self) -> u64 {
        self.current.load(Relaxed)
    }

    pub(super) fn begin(&self) {
        self.current.fetch_add(1, Relaxed);
        self.total.fetch_add(1, Relaxed);
    }

    pub(super) fn end(&self) {
        self.current.fetch_sub(1, Relaxed);
    }
}

/// Visitors of one account, for its limit.
#[derive(Debug, Default)]
pub struct Load {
    visitors: AtomicU64,
}

impl Load {
    fn enter(&self, most: u64) -> Result<(), OpenError> {
        let room = |now| (now < most).then_some(now + 1);
        match self.visitors.fetch_update(Relaxed, Relaxed, room) {
            Ok(_) => Ok(()),
            Err(_) => Err(OpenError::Full),
        }
    }

    /// How many there are.
    pub fn visitors(&self) -> u64 {
        self.visitors.load(Relaxed)
    }
}

/// All who want to know of what one client carries for one name.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// The client, the name at it, the name, the gateway.
    pub(super) all: [Arc<Counts>; 4],
    pub(super) row: Option<Arc<Served>>,
    pub(super) load: Arc<Load>,
}

/// A visitor that is counted; dropping it says that it has gone.
#[derive(Debug)]
pub struct Visiting {
    tally: Tally,
}

impl Visiting {
    pub(super) fn begin(tally: Tally, most: usize) -> Result<Visiting, OpenError> {
        tally.load.enter(most as u64)?;
        for counts in &tally.all {
            counts.begin();
        }
        Ok(Visiting { tally })
    }

    /// Bytes that the client was given, and that it gave.
    pub fn moved(&self, inbound: u64, outbound: u64) {
        let now = now_ms();
        for counts in &self.tally.all {
            if inbound > 0 {
                counts.inbound.fetch_add(inbound, Relaxed);
            }
            if outbound > 0 {
                counts.outbound.fetch_add(outbound, Relaxed);
            }
            counts.last_ms.store(now, Relaxed);
        }
        if let Some(row) = &self.tally.row {
            row.add(outbound, inbound);
        }
    }

    /// A request goes to the client.
    pub fn request(&self) {
        for counts in &self.tally.all {
            counts.requests.fetch_add(1, Relaxed);
        }
    }

    /// An answer came.
    pub fn response(&self) {
        for counts in &self.tally.all {
            counts.responses.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Visiting {
    fn drop(&mut self) {
        for counts in &self.tally.all {
            counts.end();
        }
        self.tally.load.visitors.fetch_sub(1, Relaxed);
    }
}
