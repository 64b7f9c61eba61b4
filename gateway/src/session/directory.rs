//! What others may ask about sessions and do to them.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::{Instant, interval};

use super::Shared;
use super::hub::{Card, SessionId};
use crate::meter::Totals;

/// A session with its counters as of now.
#[derive(Clone, Debug)]
pub struct SessionView {
    /// Who and where.
    pub card: Card,
    /// How much.
    pub totals: Totals,
}

impl Shared {
    /// All sessions, by number.
    pub fn list(&self) -> Vec<SessionView> {
        let rows = self.meter.usage().into_iter();
        let mut totals: HashMap<_, _> = rows.map(|(_, u)| (u.session, u.totals)).collect();
        let cards = self.hub.cards().into_iter();
        cards
            .map(|card| SessionView {
                totals: totals.remove(&card.id).unwrap_or_default(),
                card,
            })
            .collect()
    }

    /// Ends one session for good. False if there is none of this number.
    pub fn kick(&self, id: SessionId) -> bool {
        self.kick_where(|card| card.id == id) > 0
    }

    /// Ends all sessions that `which` picks, for good, and says how many.
    pub fn kick_where(&self, which: impl Fn(&Card) -> bool) -> usize {
        self.hub
            .end(1008, "disconnected by the operator", || None, which)
    }

    /// Lets no session begin, tells all to come back later, each at another
    /// time, and waits until they are gone. Returns how many are not.
    pub async fn drain(&self, limit: Duration) -> usize {
        self.hub.close();
        self.hub.end(
            1012,
            "the gateway restarts",
            || Some(self.retry_after()),
            |_| true,
        );
        let end = Instant::now() + limit;
        let mut look = interval(Duration::from_millis(10));
        while self.hub.count() > 0 && Instant::now() < end {
            look.tick().await;
        }
        self.hub.count()
    }
}
