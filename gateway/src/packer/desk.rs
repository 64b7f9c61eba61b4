//! Where clients show their tokens, also after the upgrade.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::auth::credential::Credential;
use crate::auth::{Denied, Grant, Policy};
use crate::http::Front;
use crate::limits::Place;

/// The promise of a verdict.
pub type Judged = Pin<Box<dyn Future<Output = Result<Grant, Denied>> + Send>>;

/// Judges tokens for one client.
pub trait Desk: Send + Sync + 'static {
    /// Judges one. Runs on the control runtime.
    fn judge(&self, token: &str) -> Judged;

    /// How long a client may be here without having shown one.
    fn patience(&self) -> Duration;
}

/// The front's, which counts failures by where they come from.
pub struct FrontDesk {
    /// The front.
    pub front: Arc<Front>,
    /// Where the client comes from.
    pub address: IpAddr,
}

/// Longest time a client has for its login after the upgrade.
const LOGIN: Duration = Duration::from_secs(10);

impl Desk for FrontDesk {
    fn judge(&self, token: &str) -> Judged {
        let (front, address) = (Arc::clone(&self.front), self.address);
        let credential = Credential::new(token);
        Box::pin(async move {
            let limits = front.config().limits;
            let place = Place::of(address);
            let now = Instant::now();
            if front
                .failures
                .blocked(place, limits.login_failures, now)
                .is_some()
            {
                return Err(Denied::TooMany);
            }
            let judged = async {
                let credential = credential?;
                let limit = limits.sessions_per_account;
                let policy = Policy::Tunnel;
                front
                    .gate
                    .login(Some(&credential), policy, None, limit)
                    .await
            };
            judged.await.inspect_err(|why| {
                front.refusals.note(*why, address, now);
                if !matches!(why, Denied::TooMany) {
                    front.failures.note(place, limits.login_failures, now);
                }
            })
        })
    }

    fn patience(&self) -> Duration {
        self.front.config().limits.login_time.min(LOGIN)
    }
}
