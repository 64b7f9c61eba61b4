//! Certificates from an authority that speaks ACME (RFC 8555), for the
//! gateway's own names and for names whose TLS it ends for others.
//!
//! One task looks after all names, one at a time: nothing here is in a hurry,
//! and authorities count what is asked of them. What it gets is in force from
//! the next handshake on; nobody's connection notices.

mod files;
mod order;
mod plan;
mod validity;
mod view;
mod wish;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use instant_acme::{Account, Error, Problem};
use rustls::sign::CertifiedKey;
use rvpn_proto::name::Name;
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::{info, warn};

use self::files::Held;
use self::plan::Entry;
pub(crate) use self::plan::can_have;
pub use self::view::CertificateRow;
pub use self::wish::Wish;
use crate::config::{self, ChallengeKind};
use crate::tls::Tls;

/// Names of others that are looked after at once.
const SERVED: usize = 1024;
/// How often the names that are served are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Where an authority looks for the text of a challenge.
pub const CHALLENGE_PATH: &str = "/.well-known/acme-challenge/";

/// Everything about certificates that are got and renewed by themselves.
pub struct Acme {
    dir: PathBuf,
    tls: Arc<Tls>,
    entries: Mutex<BTreeMap<Name, Entry>>,
    /// Texts shown by HTTP, by name and token.
    texts: Mutex<HashMap<(Name, String), String>>,
    wake: Notify,
}

/// Why there is no certificate this time.
#[derive(Clone, Debug)]
struct Failure {
    text: String,
    remedy: &'static str,
    /// Whether only the challenge was not met.
    challenge: bool,
    /// Whether the authority asked to be left alone.
    limited: bool,
    /// Whether the authority does not know our account any more.
    lost: bool,
}

impl Failure {
    fn new(text: impl Into<String>, remedy: &'static str) -> Failure {
        Failure {
            text: text.into(),
            remedy,
            challenge: false,
            limited: false,
            lost: false,
        }
    }

    fn of(error: &Error, settings: &config::Acme) -> Failure {
        match error {
            Error::Api(problem) => {
                let kind = problem.r#type.as_deref().unwrap_or_default();
                Failure {
                    limited: kind.ends_with(":rateLimited"),
                    lost: kind.ends_with(":accountDoesNotExist"),
                    ..Failure::new(said(problem), remedy(kind))
                }
            }
            other => {
                let mut text = format!("{} does not help: {other}", settings.directory);
                let mut cause = std::error::Error::source(other);
                while let Some(why) = cause {
                    text.push_str(&format!(": {why}"));
                    cause = why.source();
                }
                let remedy =
                    "check acme.directory, acme.ca-file, and that this machine may connect to it";
                Failure::new(text, remedy)
            }
        }
    }

    fn challenge(kind: ChallengeKind, text: String) -> Failure {
        let remedy = match kind {
            ChallengeKind::TlsAlpn01 => {
                "let the name lead to this gateway, and port 443 reach a TLS listener of it without a proxy that ends TLS; or set acme.challenge to \"http-01\""
            }
            ChallengeKind::Http01 => {
                "let the name lead to this gateway, and port 80 reach a listener of it with mode \"auto\" or \"plain\""
            }
        };
        Failure {
            challenge: true,
            ..Failure::new(format!("{}: {text}", kind.as_str()), remedy)
        }
    }

    fn unmet(kind: ChallengeKind, problem: &Problem) -> Failure {
        let mut failure = Failure::challenge(kind, said(problem));
        match problem.r#type.as_deref() {
            Some(k) if k.ends_with(":dns") || k.ends_with(":caa") => failure.remedy = remedy(k),
            _ => {}
        }
        failure
    }
}

/// In the authority's words, as far as they can stand in one line of a log.
fn said(problem: &Problem) -> String {
    let words = problem.to_string();
    let words = words.strip_prefix("API error").unwrap_or(&words);
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let short: String = words.chars().map(plain).take(400).collect();
    format!("the authority says{short}")
}

fn remedy(kind: &str) -> &'static str {
    match kind.rsplit(':').next().unwrap_or_default() {
        "rateLimited" => "nothing: it is asked again later, and less often",
        "dns" => "let the name have an address record that leads to this gateway",
        "caa" => "allow the authority in the name's CAA record",
        "rejectedIdentifier" => {
            "take the name out of acme.names: the authority does not sign for it"
        }
        "invalidContact" | "unsupportedContact" => "correct acme.contact",
        "externalAccountRequired" => {
            "use an authority that does not ask for an account made elsewhere"
        }
        _ => "see what it says; it is asked again later",
    }
}

impl Acme {
    /// For certificates kept in this directory and shown by this.
    pub fn new(dir: PathBuf, tls: Arc<Tls>) -> Arc<Acme> {
        Arc::new(Acme {
            dir,
            tls,
            entries: Mutex::default(),
            texts: Mutex::default(),
            wake: Notify::new(),
        })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<Name, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn texts(&self) -> MutexGuard<'_, HashMap<(Name, String), String>> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an authority that looks for a challenge under this name and path
    /// is to find, if the challenge is ours.
    pub fn answer(&self, name: &Name, path: &str) -> Option<String> {
        let token = path.strip_prefix(CHALLENGE_PATH)?;
        let texts = self.texts();
        // Cheap when there is nothing to look for, which is almost always.
        match texts.is_empty() {
            true => None,
            false => texts.get(&(name.clone(), token.to_owned())).cloned(),
        }
    }

    /// Shows a text by HTTP as long as what is returned lives.
    fn show_text(&self, name: &Name, token: &str, text: &str) -> Shown<'_> {
        let key = (name.clone(), token.to_owned());
        self.texts().insert(key.clone(), text.to_owned());
        Shown {
            acme: self,
            what: Challenge::Text(key),
        }
    }

    /// The same by TLS.
    fn show_key(&self, name: &Name, key: Arc<CertifiedKey>) -> Shown<'_> {
        self.tls.challenge(name.clone(), key);
        Shown {
            acme: self,
            what: Challenge::Key(name.clone()),
        }
    }

    /// All names, for operators.
    pub fn list(&self) -> Vec<CertificateRow> {
        view::rows(&self.entries())
    }

    /// Tries at once what waits for its time after a failure. False if the
    /// name is not looked after.
    pub fn retry(&self, name: &Name) -> bool {
        let found = match self.entries().get_mut(name) {
            Some(entry) => {
                entry.hurry();
                true
            }
            None => false,
        };
        self.wake.notify_one();
        found
    }

    /// Puts in force what was kept, and forgets who is not wished for any more.
    pub fn prepare(&self, wish: &Wish) {
        let mut wanted: BTreeMap<Name, bool> = BTreeMap::new();
        if let Some(settings) = &wish.settings {
            if settings.served {
                let names = wish.served.iter().filter(|n| can_have(n));
                wanted.extend(names.take(SERVED).map(|n| (n.clone(), true)));
            }
            wanted.extend(settings.names.iter().map(|n| (n.clone(), false)));
        }
        let mut entries = self.entries();
        entries.retain(|name, _| {
            let stays = wanted.contains_key(name);
            if !stays {
                self.tls.remove(name);
            }
            stays
        });
        let directory = wish.settings.as_ref().map(|s| &*s.directory);
        for (name, served) in wanted {
            let entry = entries.entry(name.clone()).or_insert_with(|| {
                let mut entry = Entry::new(served);
                match files::load(&self.dir, &name) {
                    Ok(Some(held)) => {
                        self.put(&name, &held);
                        entry.hold(&held);
                    }
                    Ok(None) => {}
                    Err(why) => {
                        warn!(%name, %why, "a kept certificate is of no use; getting another")
                    }
                }
                entry
            });
            entry.served = served;
            // Whoever changes the authority wants certificates of the new one.
            if directory.is_some_and(|d| entry.is_from_another(d)) {
                entry.due = entry.due.min(SystemTime::now());
            }
        }
    }

    fn put(&self, name: &Name, held: &Held) {
        let until = UNIX_EPOCH + Duration::from_secs(held.validity.ends);
        self.tls.put(name.clone(), Arc::clone(&held.key), until);
    }

    /// Looks after everything for as long as it is polled. `wish` is asked
    /// again and again.
    pub async fn run(self: Arc<Self>, wish: impl Fn() -> Wish + Send) {
        let mut account: Option<(config::Acme, Account)> = None;
        let mut quota = plan::Quota::default();
        loop {
            let now = wish();
            self.prepare(&now);
            let due = match &now.settings {
                Some(settings) => self.due(&mut quota).map(|name| (name, settings.clone())),
                None => None,
            };
            let Some((name, settings)) = due else {
                // Either something changes or its time comes.
                drop(timeout(LOOK, self.wake.notified()).await);
                continue;
            };
            if account.as_ref().is_some_and(|(with, _)| *with != settings) {
                account = None;
            }
            let got = self.get(&settings, &name, &mut account).await;
            if got.is_err() {
                // The directory may have moved, the account may be gone.
                account = None;
            }
            self.note(&name, got);
        }
    }

    /// A name whose time has come: the gateway's own first.
    fn due(&self, quota: &mut plan::Quota) -> Option<Name> {
        let now = SystemTime::now();
        let mut entries = self.entries();
        let due = |served: bool| {
            let mut fitting = entries
                .iter()
                .filter(|(_, e)| e.served == served && e.due <= now);
            fitting.next().map(|(name, _)| name.clone())
        };
        let name = due(false).or_else(|| due(true).filter(|_| quota.take(now)))?;
        entries.get_mut(&name)?.busy = true;
        Some(name)
    }

    async fn get(
        &self,
        settings: &config::Acme,
        name: &Name,
        account: &mut Option<(config::Acme, Account)>,
    ) -> Result<Held, Failure> {
        let with = match account {
            Some((_, account)) => &*account,
            None => {
                let made = order::account(self, settings).await?;
                &account.insert((settings.clone(), made)).1
            }
        };
        match order::certificate(self, settings, with, name).await {
            Err(failure) if failure.lost => {
                info!("the authority has forgotten the account; making another");
                files::forget_account(&self.dir);
                let made = order::account(self, settings).await?;
                let with = &account.insert((settings.clone(), made)).1;
                order::certificate(self, settings, with, name).await
            }
            got => got,
        }
    }

    /// Each outcome is said once.
    fn note(&self, name: &Name, got: Result<Held, Failure>) {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(name) else {
            return;
        };
        entry.busy = false;
        match got {
            Ok(held) => {
                self.put(name, &held);
                entry.hold(&held);
                info!(%name, days = held.validity.days(), fingerprint = %held.fingerprint, "got a certificate");
            }
            Err(failure) => {
                let wait = entry.fail(&failure);
                warn!(
                    %name,
                    why = %failure.text,
                    remedy = failure.remedy,
                    again_in = %format_args!("{} s", wait.as_secs()),
                    "got no certificate"
                );
            }
        }
    }
}

/// A challenge that is answered until this is dropped.
struct Shown<'a> {
    acme: &'a Acme,
    what: Challenge,
}

enum Challenge {
    Text((Name, String)),
    Key(Name),
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        match &self.what {
            Challenge::Text(key) => drop(self.acme.texts().remove(key)),
            Challenge::Key(name) => self.acme.tls.end_challenge(name),
        }
    }
}
