//! Who is connected, and who takes over from whom.
//!
//! The only state that sessions share. It is touched when one begins, ends or
//! is asked to, never for a packet.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rvpn_ipc::Key;
use tokio::sync::oneshot;

use super::mailbox::{Mailbox, Slot, mailbox};
use crate::admit::TokenId;
use crate::cores::CoreId;
use crate::helper::Lease;
use crate::pump::budget::Gauge;

/// Orders one session may have waiting; more are of no use.
const ORDERS: usize = 4;
/// How many keys are remembered beside those in use before old ones are looked for.
const SPARE_KEYS: usize = 1024;

/// A session's number, random, so that it can be shown and stored.
pub type SessionId = u128;

/// What a session is told from outside.
#[derive(Debug)]
pub enum Order {
    /// End, with this code and reason for the client.
    End {
        /// WebSocket close code.
        code: u16,
        /// What the client is told, and may show.
        reason: &'static str,
        /// When coming back makes sense; never, if none.
        retry_after: Option<Duration>,
    },
    /// Another connection of the same client takes over: hand it what the lease consists of.
    HandOver(oneshot::Sender<Handed>),
}

/// What passes from a client's old connection to its new one.
#[derive(Debug)]
pub struct Handed {
    /// The device.
    pub tun: OwnedFd,
    /// The lease.
    pub lease: Lease,
}

/// What is known of a session without asking it.
#[derive(Clone, Debug)]
pub struct Card {
    /// Its number.
    pub id: SessionId,
    /// Who pays.
    pub account: Arc<str>,
    /// The token it logged in with.
    pub token_id: TokenId,
    /// Who within the account.
    pub subject: Arc<str>,
    /// What it speaks: `packets`, or the name of an older dialect.
    pub service: &'static str,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// When it began.
    pub started: SystemTime,
    /// The lease's addresses; none without a lease.
    pub addresses: Vec<IpAddr>,
    /// The lease's slot.
    pub slot: Option<u32>,
    /// Where its task runs.
    pub core: CoreId,
    /// What waits for it, if packets do.
    pub gauge: Arc<Gauge>,
}

/// The shared list.
#[derive(Debug, Default)]
pub struct Hub {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    live: BTreeMap<SessionId, Live>,
    by_key: HashMap<Key, Place>,
    claims: u64,
    closed: bool,
}

#[derive(Debug)]
struct Live {
    card: Card,
    orders: Orders,
}

/// What is remembered of a lease key.
#[derive(Debug)]
struct Place {
    holder: Option<Holder>,
    /// Number of the newest ticket, and whether its receiver was heard from.
    epoch: u64,
    heard: bool,
    /// When the last holder left.
    left: Instant,
}

#[derive(Debug)]
struct Holder {
    claim: u64,
    core: CoreId,
    orders: Orders,
}

/// A connection's hold on its lease key, given up by dropping it.
#[derive(Debug)]
pub struct Claim {
    hub: Arc<Hub>,
    key: Key,
    claim: u64,
}

/// Whom a new connection takes over from.
#[derive(Debug)]
pub struct Former {
    /// Where the client lives.
    pub core: CoreId,
    /// How to reach it.
    pub orders: Orders,
}

/// Where a session takes orders.
pub type Orders = Slot<Order>;

/// A new session's slot for orders, and where they arrive.
pub fn orders() -> (Orders, Mailbox<Order>) {
    mailbox(ORDERS)
}

/// No session may begin any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a client with this key lives, so that its next connection goes there.
    pub fn core_of(&self, key: Key) -> Option<CoreId> {
        let inner = self.lock();
        let holder = inner.by_key.get(&key)?.holder.as_ref()?;
        Some(holder.core)
    }

    /// Makes the caller the holder of `key`, at once and whoever held it. The
    /// former holder, if any, is to be asked to hand over. `forget_after` is
    /// how long a key without holder can be of use.
    pub fn claim(
        self: &Arc<Hub>,
        key: Key,
        core: CoreId,
        orders: Orders,
        forget_after: Duration,
    ) -> Result<(Claim, Option<Former>), Closed> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(Closed);
        }
        if inner.by_key.len() >= 2 * inner.live.len() + SPARE_KEYS {
            inner
                .by_key
                .retain(|_, p| p.holder.is_some() || p.left.elapsed() < forget_after);
        }
        inner.claims += 1;
        let claim = inner.claims;
        let place = inner.by_key.entry(key).or_insert_with(|| Place {
            holder: None,
            epoch: 0,
            heard: true,
            left: Instant::now(),
        });
        let former = place.holder.take();
        place.holder = Some(Holder {
            claim,
            core,
            orders,
        });
        let claim = Claim {
            hub: Arc::clone(self),
            key,
            claim,
        };
        let former = former.map(|h| Former {
            core: h.core,
            orders: h.orders,
        });
        Ok((claim, former))
    }

    /// Whether a ticket with this number may still be used. The last one may,
    /// and the one before it as long as the last was perhaps never received.
    pub fn admits_ticket(&self, key: Key, epoch: u64) -> bool {
        match self.lock().by_key.get(&key) {
            // Nothing known: we restarted, or it was long ago. The seal and
            // the helper's generation decide.
            None => true,
            Some(p) => epoch == p.epoch || (!p.heard && epoch + 1 == p.epoch),
        }
    }

    /// Shows a session in the list. Returns what removes it.
    pub fn enter(self: &Arc<Hub>, card: Card, orders: Orders) -> Entry {
        let id = card.id;
        self.lock().live.insert(id, Live { card, orders });
        Entry {
            hub: Arc::clone(self),
            id,
        }
    }

    /// All sessions, by number.
    pub fn cards(&self) -> Vec<Card> {
        self.lock().live.values().map(|l| l.card.clone()).collect()
    }

    /// How many have begun since the start.
    pub fn came(&self) -> u64 {
        self.lock().claims
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().live.len()
    }

    /// Gives every session that `which` picks an order to end. Returns how many.
    pub fn end(
        &self,
        code: u16,
        reason: &'static str,
        mut retry_after: impl FnMut() -> Option<Duration>,
        which: impl Fn(&Card) -> bool,
    ) -> usize {
        let inner = self.lock();
        let mut asked = 0;
        for live in inner.live.values().filter(|l| which(&l.card)) {
            // A full mailbox means that it is ending already.
            drop(live.orders.leave(Order::End {
                code,
                reason,
                retry_after: retry_after(),
            }));
            asked += 1;
        }
        asked
    }

    /// Whether no further session may begin.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Lets no further session begin.
    pub fn close(&self) {
        self.lock().closed = true;
    }
}

impl Claim {
    /// Numbers the ticket this connection is about to be given. `after` is the
    /// number of the one it came with.
    pub fn next_epoch(&self, after: u64) -> u64 {
        let mut inner = self.hub.lock();
        let Some(place) = inner.by_key.get_mut(&self.key) else {
            return after + 1;
        };
        place.epoch = place.epoch.max(after) + 1;
        place.heard = false;
        place.epoch
    }

    /// The client has shown that it received what it was sent last.
    pub fn heard(&self) {
        let mut inner = self.hub.lock();
        if let Some(place) = inner.by_key.get_mut(&self.key)
            && place.holder.as_ref().is_some_and(|h| h.claim == self.claim)
        {
            place.heard = true;
        }
    }

    /// The client is done: no ticket it ever had leads back.
    pub fn void_tickets(&self) {
        let mut inner = self.hub.lock();
        if let Some(place) = inner.by_key.get_mut(&self.key) {
            place.epoch += 1;
            place.heard = true;
        }
    }

    /// The key held.
    pub fn key(&self) -> Key {
        self.key
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut inner = self.hub.lock();
        if let Some(place) = inner.by_key.get_mut(&self.key)
            && place.holder.as_ref().is_some_and(|h| h.claim == self.claim)
        {
            place.holder = None;
            place.left = Instant::now();
        }
    }
}

/// A session's place in the list.
#[derive(Debug)]
pub struct Entry {
    hub: Arc<Hub>,
    id: SessionId,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.hub.lock().live.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cores::Cores;

    const KEY: Key = Key([9; 16]);
    const FOREVER: Duration = Duration::from_secs(3600);

    fn core() -> CoreId {
        Cores::start(1, false).unwrap().least_loaded().core()
    }

    #[test]
    fn the_newest_connection_holds_the_key_and_learns_of_the_former() {
        let hub = Arc::new(Hub::default());
        let (tx, _rx) = orders();
        let (first, none) = hub.claim(KEY, core(), tx.clone(), FOREVER).unwrap();
        assert!(none.is_none());
        let (second, former) = hub.claim(KEY, core(), tx.clone(), FOREVER).unwrap();
        assert!(former.is_some());
        // The former's end does not take the key from its successor.
        drop(first);
        assert!(hub.core_of(KEY).is_some());
        drop(second);
        assert!(hub.core_of(KEY).is_none());
        hub.close();
        assert_eq!(hub.claim(KEY, core(), tx, FOREVER).unwrap_err(), Closed);
    }

    #[test]
    fn a_ticket_is_good_until_its_successor_was_received() {
        let hub = Arc::new(Hub::default());
        let (tx, _rx) = orders();
        let (claim, _) = hub.claim(KEY, core(), tx, FOREVER).unwrap();
        let first = claim.next_epoch(0);
        claim.heard();
        assert!(hub.admits_ticket(KEY, first));
        // The client used it, but the answer with the next one may be lost.
        let second = claim.next_epoch(first);
        assert!(hub.admits_ticket(KEY, first) && hub.admits_ticket(KEY, second));
        claim.heard();
        assert!(!hub.admits_ticket(KEY, first) && hub.admits_ticket(KEY, second));
        claim.void_tickets();
        assert!(!hub.admits_ticket(KEY, first) && !hub.admits_ticket(KEY, second));
    }

    #[test]
    fn tickets_from_before_a_restart_count_on() {
        let hub = Arc::new(Hub::default());
        let (tx, _rx) = orders();
        assert!(hub.admits_ticket(KEY, 41));
        let (claim, _) = hub.claim(KEY, core(), tx, FOREVER).unwrap();
        assert_eq!(claim.next_epoch(41), 42);
        claim.heard();
        assert!(!hub.admits_ticket(KEY, 41));
    }

    #[test]
    fn forgotten_keys_do_not_pile_up() {
        let hub = Arc::new(Hub::default());
        let (tx, _rx) = orders();
        for n in 0..10_000_u32 {
            let mut key = [1; 16];
            key[..4].copy_from_slice(&n.to_le_bytes());
            drop(hub.claim(Key(key), core_zero(), tx.clone(), Duration::ZERO));
        }
        assert!(hub.lock().by_key.len() <= SPARE_KEYS + 1);
    }

    fn core_zero() -> CoreId {
        use std::sync::OnceLock;
        static CORE: OnceLock<CoreId> = OnceLock::new();
        *CORE.get_or_init(core)
    }
}
