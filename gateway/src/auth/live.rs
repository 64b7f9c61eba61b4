//! Who is here, so that it can be counted and sent away.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::Denied;
use super::token::Accepted;

/// What is known of a connection that is logged in.
#[derive(Debug)]
pub struct One {
    /// Who pays.
    pub account: Arc<str>,
    /// Who it is.
    pub subject: Arc<str>,
    /// The token's own name.
    pub jti: Option<Arc<str>>,
    /// The device, if one signed.
    pub device: Option<Arc<str>>,
    revoked: watch::Sender<bool>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Live {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    last: u64,
    by_number: HashMap<u64, One>,
    by_account: HashMap<Arc<str>, usize>,
}

/// A place among an account's connections.
#[derive(Debug)]
pub struct Pass {
    live: Arc<Live>,
    number: u64,
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place, if the account has one left. Counting and taking are one act.
    pub(super) fn enter(
        self: &Arc<Live>,
        who: &Accepted,
        limit: usize,
    ) -> Result<(Pass, watch::Receiver<bool>), Denied> {
        let (revoked, receiver) = watch::channel(false);
        let mut inner = self.lock();
        let count = inner
            .by_account
            .entry(Arc::clone(&who.account))
            .or_default();
        if *count >= limit {
            return Err(Denied::TooMany);
        }
        *count += 1;
        inner.last += 1;
        let number = inner.last;
        let one = One {
            account: Arc::clone(&who.account),
            subject: Arc::clone(&who.subject),
            jti: who.jti.clone(),
            device: who.device.clone(),
            revoked,
        };
        inner.by_number.insert(number, one);
        let live = Arc::clone(self);
        Ok((Pass { live, number }, receiver))
    }

    /// Tells all whom `which` picks that they must go, and counts them.
    pub fn revoke(&self, which: impl Fn(&One) -> bool) -> usize {
        let inner = self.lock();
        let picked = inner.by_number.values().filter(|one| which(one));
        picked
            .map(|one| one.revoked.send_replace(true))
            .filter(|already| !already)
            .count()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().by_number.len()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut inner = self.live.lock();
        let Some(one) = inner.by_number.remove(&self.number) else {
            return;
        };
        if let Some(count) = inner.by_account.get_mut(&one.account) {
            *count -= 1;
            if *count == 0 {
                inner.by_account.remove(&one.account);
            }
        }
    }
}
