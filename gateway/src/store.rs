//! What outlives the process: device keys, invites, revocations, the usage ledger.
//!
//! An [`Engine`] is a plain, blocking thing. It lives on one thread of its own,
//! and everybody else holds a [`Store`], which sends it closures; so no event
//! loop ever waits for a disk, and an engine needs no lock. What a login needs
//! to know is not asked here but kept in memory beside it.

mod sqlite;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::thread::JoinHandle;

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

pub use self::sqlite::Sqlite;
use crate::meter::Usage;
use crate::meter::flush::UsageStore;

/// Requests that may wait; beyond it callers wait for a place.
const WAITING: usize = 256;

/// Why something was not stored or found out.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The engine failed.
    #[error("the store failed: {0}")]
    Engine(String),
    /// The store's thread has ended.
    #[error("the store is closed")]
    Closed,
    /// What is stored already says otherwise.
    #[error("there is one already")]
    Exists,
}

/// A device that may log in with tokens it signs itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceKey {
    /// Derived from the key; the `kid` of its tokens.
    pub id: String,
    /// On whose behalf.
    pub account: String,
    /// What its owner calls it.
    pub name: String,
    /// Ed25519, 32 bytes.
    #[serde(skip)]
    pub public: Vec<u8>,
    /// When it was registered, in seconds since 1970.
    pub created: u64,
    /// When it ends.
    pub expires: Option<u64>,
    /// The helper's policy class.
    pub class: u8,
    /// Names it may serve to the world.
    pub names: Vec<String>,
    /// Ports of the gateway it may have.
    pub ports: Vec<u16>,
}

/// A right to register device keys. Its code is not kept, only a hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Invite {
    /// To speak of it; of no use to whoever has no code.
    pub id: String,
    /// Who the devices will belong to.
    pub account: String,
    /// Devices it is still good for.
    pub left: u32,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// When it ends.
    pub expires: u64,
    /// How long a device registered by it may log in, in seconds.
    pub device_life: Option<u64>,
    /// The helper's policy class of its devices.
    pub class: u8,
    /// Names it may serve to the world.
    pub names: Vec<String>,
    /// Ports of the gateway it may have.
    pub ports: Vec<u16>,
}

/// What a revocation is about.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// One token, by its `jti`.
    Jti,
    /// Everything of a subject.
    Subject,
}

impl Scope {
    fn name(self) -> &'static str {
        match self {
            Scope::Jti => "jti",
            Scope::Subject => "subject",
        }
    }
}

/// Somebody who is let in no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Revocation {
    /// What kind of name follows.
    pub scope: Scope,
    /// Whose.
    pub value: String,
    /// Why, for the operator.
    pub reason: String,
    /// Since when, in seconds since 1970.
    pub created: u64,
    /// Until when; without end if absent.
    pub until: Option<u64>,
}

/// A device to register.
#[derive(Clone, Debug)]
pub struct NewDevice {
    /// See [`DeviceKey::id`].
    pub id: String,
    /// Its own name.
    pub name: String,
    /// Its key.
    pub public: Vec<u8>,
}

/// Which rows of the ledger.
#[derive(Clone, Debug, Default)]
pub struct UsageQuery {
    /// Of this account only.
    pub account: Option<String>,
    /// That were still running at this time or later, in milliseconds since 1970.
    pub since_ms: Option<u64>,
    /// At most so many, newest first.
    pub limit: u32,
}

/// One way through the tunnel, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Flow {
    /// Packets passed on.
    pub packets: u64,
    /// Their bytes.
    pub payload: u64,
    /// Bytes on the socket.
    pub wire: u64,
    /// Packets dropped.
    pub dropped: u64,
}

/// What an account has used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AccountUsage {
    /// Whose.
    pub account: String,
    /// In how many sessions.
    pub sessions: u64,
    /// Client to Internet.
    pub outbound: Flow,
    /// Internet to client.
    pub inbound: Flow,
}

/// A store, blocking, for one thread. All writes are durable when they return.
pub trait Engine: Send + 'static {
    /// Adds an invite under the hash of its code.
    fn add_invite(&mut self, hash: &[u8; 32], invite: &Invite) -> Result<(), StoreError>;
    /// Invites not used up, newest first.
    fn invites(&mut self) -> Result<Vec<Invite>, StoreError>;
    /// Withdraws an invite; false if there is none.
    fn remove_invite(&mut self, id: &str) -> Result<bool, StoreError>;
    /// Uses up one use of an invite and registers a device, both or neither.
    /// `None` if there is no such invite now. A device that is registered for
    /// the same account already costs no use.
    fn redeem(
        &mut self,
        hash: &[u8; 32],
        device: &NewDevice,
        now: u64,
    ) -> Result<Option<DeviceKey>, StoreError>;
    /// All devices, newest first.
    fn devices(&mut self) -> Result<Vec<DeviceKey>, StoreError>;
    /// Forgets a device; false if there is none.
    fn remove_device(&mut self, id: &str) -> Result<bool, StoreError>;
    /// Adds a revocation, or replaces that of the same name.
    fn revoke(&mut self, revocation: &Revocation) -> Result<(), StoreError>;
    /// All revocations, newest first.
    fn revocations(&mut self) -> Result<Vec<Revocation>, StoreError>;
    /// Takes a revocation back; false if there is none.
    fn remove_revocation(&mut self, scope: Scope, value: &str) -> Result<bool, StoreError>;
    /// Removes what has ended: invites and revocations.
    fn prune(&mut self, now: u64) -> Result<(), StoreError>;
    /// Writes totals of sessions. Writing any again, or older ones after newer
    /// ones, changes nothing.
    fn put_usage(&mut self, rows: &[Usage]) -> Result<(), StoreError>;
    /// Totals of sessions.
    fn usage(&mut self, query: &UsageQuery) -> Result<Vec<Usage>, StoreError>;
    /// The same, added up by account.
    fn usage_by_account(&mut self, query: &UsageQuery) -> Result<Vec<AccountUsage>, StoreError>;
}

type Job = Box<dyn FnOnce(&mut dyn Engine) + Send>;

/// A handle on the store's thread, which ends with the last of them.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Gives the engine its thread.
    pub fn start(mut engine: impl Engine) -> std::io::Result<Store> {
        let (jobs, mut queue) = mpsc::channel::<Job>(WAITING);
        let thread = std::thread::Builder::new()
            .name("rvpn-store".to_owned())
            .spawn(move || {
                while let Some(job) = queue.blocking_recv() {
                    job(&mut engine);
                }
            })?;
        let inner = Inner {
            jobs: Some(jobs),
            thread: Some(thread),
        };
        Ok(Store {
            inner: Arc::new(inner),
        })
    }

    /// Has the engine do something, and waits for it.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Engine) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, got) = oneshot::channel();
        let jobs = self.inner.jobs.as_ref().ok_or(StoreError::Closed)?;
        // Nobody may be waiting any more; the job is done all the same.
        let job: Job = Box::new(move |engine| drop(answer.send(job(engine))));
        jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        got.await.map_err(|_| StoreError::Closed)?
    }

    /// The same for callers that may block.
    pub fn run_blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Engine) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, got) = oneshot::channel();
        let jobs = self.inner.jobs.as_ref().ok_or(StoreError::Closed)?;
        let job: Job = Box::new(move |engine| drop(answer.send(job(engine))));
        jobs.blocking_send(job).map_err(|_| StoreError::Closed)?;
        got.blocking_recv().map_err(|_| StoreError::Closed)?
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What is queued is done before the thread ends.
        self.jobs = None;
        let here = std::thread::current().id();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != here
            && thread.join().is_err()
        {
            tracing::error!("the store's thread ended by a panic");
        }
    }
}

impl UsageStore for Store {
    fn put_usage(&self, rows: &[Usage]) -> Result<(), String> {
        let rows = rows.to_vec();
        self.run_blocking(move |engine| engine.put_usage(&rows))
            .map_err(|error| error.to_string())
    }
}
