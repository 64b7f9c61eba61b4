//! Who is let in.
//!
//! Two policies, never mixed: a path is under the *strict* one (a configured
//! key or a registered device signs, `exp` and `sub` are required) or under
//! exactly one `[[legacy]]` block (its own shared secret, `exp` optional). A
//! token never chooses the policy it is judged by. Older reverse tunnels have
//! one path for all: there a token that a strict key signed is strict, whatever
//! else it would be, and only others are compared with the blocks' secrets.
//!
//! Everything needed to judge is in memory. The store is asked only when an
//! invite is redeemed, and a store that fails does not stop those who are known.

pub(crate) mod base64;
pub mod credential;
pub mod devices;
pub mod jwks;
pub mod keys;
pub mod live;
pub mod rights;
pub mod token;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use rvpn_ipc::Class;
use tokio::sync::watch;

use self::credential::Credential;
use self::devices::Devices;
use self::keys::{KeyError, KeyRing};
use self::live::{Live, Pass};
use self::rights::Rights;
use self::token::{Accepted, Tunnel};
use crate::admit::TokenId;
use crate::config::{Config, Dialect};
use crate::store::{DeviceKey, Revocation, Scope, Store, StoreError};

/// The account of anonymous clients, unless their path names another.
const ANONYMOUS: &str = "anonymous";

/// Why somebody is not let in. The client learns no more than that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum Denied {
    /// No token where one is needed.
    #[error("no credential")]
    Missing,
    /// Not a token, or not one of ours to judge.
    #[error("malformed credential")]
    Malformed,
    /// Signed by nobody we know.
    #[error("unknown key")]
    UnknownKey,
    /// Not signed by whom it says.
    #[error("bad signature")]
    Signature,
    /// A claim is missing, of the wrong kind, or not meant for us.
    #[error("claims not acceptable")]
    Claims,
    /// Its time is over.
    #[error("expired")]
    Expired,
    /// Its time has not come.
    #[error("not valid yet")]
    Early,
    /// Taken back.
    #[error("revoked")]
    Revoked,
    /// Of an account that has no business on this path.
    #[error("account not allowed here")]
    Account,
    /// The account has as many connections as it may.
    #[error("too many connections of the account")]
    TooMany,
}

/// Which policy a path is under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy<'a> {
    /// Configured keys and devices.
    Strict,
    /// This `[[legacy]]` block only.
    Legacy(&'a str),
    /// Whoever signed it decides, and something to serve must be in it.
    Tunnel,
    /// Everybody.
    Anonymous,
}

/// A login that succeeded, holding its place among the account's connections.
#[derive(Debug)]
pub struct Grant {
    /// Who pays.
    pub account: Arc<str>,
    /// Who it is.
    pub subject: Arc<str>,
    /// See [`TokenId`].
    pub token_id: TokenId,
    /// When it ends.
    pub expires_at: Option<SystemTime>,
    /// The helper's policy class.
    pub class: Class,
    /// What it may serve.
    pub rights: Arc<Rights>,
    /// How it wants to serve, as far as the login says.
    pub tunnel: Tunnel,
    /// Turns true when taken back.
    pub revoked: watch::Receiver<bool>,
    /// The place. Dropping it gives it up.
    pub pass: Pass,
}

/// The judge. One for the process.
pub struct Gate {
    ring: ArcSwap<KeyRing>,
    devices: Devices,
    live: Arc<Live>,
    revocations: Mutex<Vec<Revocation>>,
    store: Store,
}

impl Gate {
    /// Loads keys and what the store knows, and proves that signing and
    /// verifying work with every key before any client depends on it.
    pub fn open(config: &Config, store: Store) -> Result<Gate, OpenError> {
        let ring = Gate::prepare(config)?;
        let now = now();
        let (devices, revocations) = store.run_blocking(move |engine| {
            engine.prune(now)?;
            Ok((engine.devices()?, engine.revocations()?))
        })?;
        Ok(Gate {
            ring: ArcSwap::from_pointee(ring),
            devices: Devices::new(devices),
            live: Arc::default(),
            revocations: Mutex::new(revocations),
            store,
        })
    }

    /// Loads and proves the keys of a configuration, without putting them in force yet.
    pub fn prepare(config: &Config) -> Result<KeyRing, KeyError> {
        let ring = KeyRing::load(config)?;
        ring.self_test()?;
        Ok(ring)
    }

    /// Puts keys in force: from here on those that are not among them count no more.
    pub fn commit(&self, ring: KeyRing) {
        ring.keep_fetched(&self.ring.load());
        self.ring.store(Arc::new(ring));
    }

    /// The keys in force.
    pub fn ring(&self) -> Arc<KeyRing> {
        self.ring.load_full()
    }

    /// Whom a dialect's path is for.
    pub fn policy_of(dialect: &Dialect) -> Policy<'_> {
        match (&dialect.legacy, dialect.anonymous) {
            (Some(name), _) => Policy::Legacy(name),
            (None, true) => Policy::Anonymous,
            (None, false) => Policy::Strict,
        }
    }

    /// Judges a login.
    pub async fn login(
        &self,
        credential: Option<&Credential>,
        policy: Policy<'_>,
        dialect: Option<&Dialect>,
        limit: usize,
    ) -> Result<Grant, Denied> {
        let accepted = match policy {
            Policy::Anonymous => Accepted::anonymous(
                dialect
                    .and_then(|d| d.account.clone())
                    .unwrap_or_else(|| ANONYMOUS.into()),
                dialect.map_or(0, |d| d.class),
            ),
            Policy::Strict => {
                let token = credential.ok_or(Denied::Missing)?;
                self.strict(token).await?
            }
            Policy::Legacy(name) => {
                let token = credential.ok_or(Denied::Missing)?;
                let ring = self.ring.load_full();
                ring.legacy(name, token.token(), now())?
            }
            Policy::Tunnel => {
                let token = credential.ok_or(Denied::Missing)?;
                self.tunnel(token).await?
            }
        };
        if policy == Policy::Strict
            && let Some(only) = dialect.and_then(|d| d.account.as_ref())
            && accepted.account != *only
        {
            return Err(Denied::Account);
        }
        let anonymous = policy == Policy::Anonymous;
        let limit = if anonymous { usize::MAX } else { limit };
        let (pass, revoked) = self.live.enter(&accepted, limit)?;
        // Only now: whoever is revoked from here on is found among the living.
        if self.is_revoked(&accepted.account, accepted.jti.as_deref())
            || self.is_revoked(&accepted.subject, None)
            || accepted
                .device
                .as_ref()
                .is_some_and(|id| !self.devices.knows(id))
        {
            return Err(Denied::Revoked);
        }
        Ok(Grant {
            account: accepted.account,
            subject: accepted.subject,
            token_id: accepted.token_id,
            expires_at: accepted.expires_at,
            class: accepted.class,
            rights: accepted.rights,
            tunnel: accepted.tunnel,
            revoked,
            pass,
        })
    }

    /// A token of either policy that is for serving.
    async fn tunnel(&self, credential: &Credential) -> Result<Accepted, Denied> {
        let accepted = match self.strict(credential).await {
            // Signed by nobody of the strict policy. Any other verdict is final:
            // a token that is strict is not looser elsewhere.
            Err(why @ (Denied::UnknownKey | Denied::Signature)) => self
                .ring
                .load()
                .any_legacy(credential.token(), now())
                .map_err(|later| {
                    if later == Denied::UnknownKey {
                        why
                    } else {
                        later
                    }
                })?,
            judged => judged?,
        };
        let serves = !(accepted.rights.names.is_empty() && accepted.rights.ports.is_empty());
        serves.then_some(accepted).ok_or(Denied::Claims)
    }

    async fn strict(&self, credential: &Credential) -> Result<Accepted, Denied> {
        let ring = self.ring.load_full();
        let mut accepted = match ring.strict(credential.token(), &self.devices, now()) {
            // A key that was added at the issuer since we last asked.
            Err(Denied::UnknownKey) if ring.fetch_missing().await => {
                ring.strict(credential.token(), &self.devices, now())
            }
            judged => judged,
        }?;
        if let Some(domain) = &ring.domain {
            let rights = (*accepted.rights).clone();
            accepted.rights = Arc::new(rights.at_home(&accepted.account, domain));
        }
        Ok(accepted)
    }

    /// Whether a subject, or a token of it, was taken back. A resume ticket is
    /// worth nothing to either.
    pub fn is_revoked(&self, subject: &str, jti: Option<&str>) -> bool {
        let now = now();
        let revocations = self.revocations.lock();
        let revocations = revocations.unwrap_or_else(PoisonError::into_inner);
        revocations.iter().any(|r| {
            r.until.is_none_or(|until| until > now)
                && match r.scope {
                    Scope::Subject => r.value == subject,
                    Scope::Jti => Some(r.value.as_str()) == jti,
                }
        })
    }

    /// Takes somebody's access back: first for good, then for all who are here.
    /// Returns how many connections that ends.
    pub async fn revoke(&self, revocation: Revocation) -> Result<usize, StoreError> {
        let stored = revocation.clone();
        self.store.run(move |e| e.revoke(&stored)).await?;
        let (scope, value) = (revocation.scope, revocation.value.clone());
        {
            let revocations = self.revocations.lock();
            let mut revocations = revocations.unwrap_or_else(PoisonError::into_inner);
            revocations.retain(|r| (r.scope, &r.value) != (scope, &value));
            revocations.push(revocation);
        }
        Ok(self.live.revoke(|one| match scope {
            Scope::Subject => *one.account == *value || *one.subject == *value,
            Scope::Jti => one.jti.as_deref() == Some(&value),
        }))
    }

    /// Undoes a revocation.
    pub async fn unrevoke(&self, scope: Scope, value: &str) -> Result<bool, StoreError> {
        let gone = value.to_owned();
        let found = self
            .store
            .run(move |e| e.remove_revocation(scope, &gone))
            .await?;
        let revocations = self.revocations.lock();
        let mut revocations = revocations.unwrap_or_else(PoisonError::into_inner);
        revocations.retain(|r| r.scope != scope || r.value != value);
        Ok(found)
    }

    /// Lets a device in from now on.
    pub fn device_joined(&self, device: DeviceKey) {
        self.devices.add(device);
    }

    /// Lets a device in no longer and ends its connections; `None` if there is no such device.
    pub async fn remove_device(&self, id: &str) -> Result<Option<usize>, StoreError> {
        let gone = id.to_owned();
        let found = self.store.run(move |e| e.remove_device(&gone)).await?;
        self.devices.remove(id);
        let ended = self.live.revoke(|one| one.device.as_deref() == Some(id));
        Ok(found.then_some(ended))
    }

    /// The store, for whoever manages what is in it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// How many connections are logged in.
    pub fn connections(&self) -> usize {
        self.live.count()
    }
}

/// Why the judge cannot take office.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

fn at(seconds: u64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}
