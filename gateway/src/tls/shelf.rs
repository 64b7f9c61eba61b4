//! Certificates that are in no file: put here by whoever got them, or made for
//! a name when it is asked for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use rvpn_proto::name::Name;

use super::{HTTP, TlsError, certified, server};

/// Certificates made for the moment at once. Only names that are served get one.
const MADE: usize = 1024;
/// Checks of names under way at once.
const CHALLENGES: usize = 1024;

#[derive(Default)]
pub(super) struct Shelf {
    put: HashMap<Name, Held>,
    challenges: HashMap<Name, Held>,
    made: HashMap<Name, Made>,
    /// Counts uses, so that the least recent one is known.
    turn: u64,
}

struct Held {
    config: Arc<ServerConfig>,
    until: SystemTime,
}

struct Made {
    config: Arc<ServerConfig>,
    used: u64,
}

fn valid(held: Option<&Held>, now: SystemTime) -> Option<Arc<ServerConfig>> {
    let held = held.filter(|h| h.until > now)?;
    Some(Arc::clone(&held.config))
}

impl Shelf {
    pub(super) fn put(&self, name: &Name, now: SystemTime) -> Option<Arc<ServerConfig>> {
        valid(self.put.get(name), now)
    }

    pub(super) fn keep(&mut self, name: Name, config: Arc<ServerConfig>, until: SystemTime) {
        self.made.remove(&name);
        self.put.insert(name, Held { config, until });
    }

    pub(super) fn remove(&mut self, name: &Name) -> bool {
        self.put.remove(name).is_some()
    }

    pub(super) fn until(&self, name: &Name) -> Option<SystemTime> {
        self.put.get(name).map(|held| held.until)
    }

    pub(super) fn challenged(&self, name: &Name, now: SystemTime) -> Option<Arc<ServerConfig>> {
        valid(self.challenges.get(name), now)
    }

    pub(super) fn begin_challenge(
        &mut self,
        name: Name,
        config: Arc<ServerConfig>,
        until: SystemTime,
    ) {
        if self.challenges.len() >= CHALLENGES {
            let now = SystemTime::now();
            self.challenges.retain(|_, held| held.until > now);
        }
        if self.challenges.len() < CHALLENGES || self.challenges.contains_key(&name) {
            self.challenges.insert(name, Held { config, until });
        }
    }

    pub(super) fn end_challenge(&mut self, name: &Name) {
        self.challenges.remove(name);
    }

    pub(super) fn made(&mut self, name: &Name) -> Result<Arc<ServerConfig>, TlsError> {
        self.turn += 1;
        let turn = self.turn;
        if let Some(made) = self.made.get_mut(name) {
            made.used = turn;
            return Ok(Arc::clone(&made.config));
        }
        let config = Arc::new(make(name)?);
        if self.made.len() >= MADE {
            let oldest = self.made.iter().min_by_key(|(_, m)| m.used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.made.remove(&oldest);
            }
        }
        let kept = Arc::clone(&config);
        self.made.insert(name.clone(), Made { config, used: turn });
        Ok(kept)
    }
}

fn make(name: &Name) -> Result<ServerConfig, TlsError> {
    let made = rcgen::generate_simple_self_signed(vec![name.as_str().to_owned()])?;
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let key = certified(vec![made.cert.der().clone()], key).map_err(|error| TlsError::Pair {
        path: name.as_str().into(),
        error,
    })?;
    Ok(server(key, HTTP))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize) -> Name {
        Name::parse(&format!("n{n}.example")).unwrap()
    }

    #[test]
    fn certificates_for_the_moment_are_kept_and_few() {
        let mut shelf = Shelf::default();
        let first = shelf.made(&name(0)).unwrap();
        for n in 1..=MADE {
            // The first one is in use all the time, the second never again.
            assert!(Arc::ptr_eq(&first, &shelf.made(&name(0)).unwrap()));
            shelf.made(&name(n)).unwrap();
        }
        assert_eq!(shelf.made.len(), MADE);
        assert!(shelf.made.contains_key(&name(0)) && !shelf.made.contains_key(&name(1)));
    }

    #[test]
    fn what_has_expired_is_not_shown() {
        let mut shelf = Shelf::default();
        let config = shelf.made(&name(0)).unwrap();
        let now = SystemTime::UNIX_EPOCH;
        let until = now + std::time::Duration::from_secs(9);
        shelf.keep(name(1), Arc::clone(&config), until);
        shelf.begin_challenge(name(1), config, until);
        assert!(shelf.put(&name(1), now).is_some() && shelf.challenged(&name(1), now).is_some());
        assert!(shelf.put(&name(1), until).is_none());
        assert!(shelf.challenged(&name(1), until).is_none());
        assert!(shelf.remove(&name(1)) && !shelf.remove(&name(1)));
    }
}
