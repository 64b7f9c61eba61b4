//! Keys that an issuer publishes by HTTPS.
//!
//! They are asked for when a token names a key that is not known, at most once
//! a minute whatever strangers send, and kept until a newer answer comes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header::ACCEPT;
use hyper::{Request, StatusCode, Uri};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::keys::parse_set;
use super::token::Verifier;
use crate::config::{self, KeySource};
use crate::https::Https;

/// How often an issuer is asked at most.
const EVERY: Duration = Duration::from_secs(60);
/// How long it may take; a client is waiting.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer that is read.
const LIMIT: usize = 256 * 1024;

/// One issuer.
pub struct Remote {
    config: config::Key,
    uri: Uri,
    https: Https,
    keys: ArcSwap<Vec<Arc<Verifier>>>,
    /// When it was asked last. Held while asking, so that many clients wait
    /// for one answer.
    asked: Mutex<Option<Instant>>,
}

impl Remote {
    pub(super) fn new(config: config::Key, url: &str, ca_file: &Path) -> Result<Remote, String> {
        let uri: Uri = url.parse().map_err(|e| format!("jwks-url: {e}"))?;
        let https = Https::new(ca_file).map_err(|e| e.to_string())?;
        Ok(Remote {
            config,
            uri,
            https,
            keys: ArcSwap::default(),
            asked: Mutex::new(None),
        })
    }

    pub(super) fn keys(&self) -> Arc<Vec<Arc<Verifier>>> {
        self.keys.load_full()
    }

    pub(super) fn same_as(&self, other: &Remote) -> bool {
        let source = |r: &Remote| match &r.config.source {
            KeySource::JwksUrl { url, .. } => Some(Arc::clone(url)),
            _ => None,
        };
        self.config.name == other.config.name
            && self.config.issuer == other.config.issuer
            && self.config.audience == other.config.audience
            && self.config.class == other.config.class
            && source(self) == source(other)
    }

    pub(super) fn take_over(&self, before: &Remote) {
        self.keys.store(before.keys());
    }

    /// Asks, unless it was asked just now. True if there are keys of an answer
    /// that the caller may not have seen.
    pub(super) async fn fetch(&self) -> bool {
        let waiting_since = Instant::now();
        let mut asked = self.asked.lock().await;
        if let Some(at) = *asked {
            if at >= waiting_since {
                return true;
            }
            if at.elapsed() < EVERY {
                return false;
            }
        }
        let name = &self.config.name;
        let answer = timeout(PATIENCE, self.ask()).await;
        // Those who waited meanwhile have the answer as well.
        *asked = Some(Instant::now());
        match answer {
            Ok(Ok(keys)) => {
                info!(key = %name, keys = keys.len(), "fetched a JWK set");
                self.keys.store(Arc::new(keys));
                true
            }
            Ok(Err(why)) => {
                warn!(key = %name, %why, "cannot fetch a JWK set; the former one stays");
                false
            }
            Err(_) => {
                warn!(key = %name, "the issuer of a JWK set does not answer; the former one stays");
                false
            }
        }
    }

    async fn ask(&self) -> Result<Vec<Arc<Verifier>>, String> {
        let request = Request::get(self.uri.clone())
            .header(ACCEPT, "application/jwk-set+json, application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|e| e.to_string())?;
        let answer = self.https.ask(request, LIMIT).await;
        let answer = answer.map_err(|e| e.to_string())?;
        if answer.status() != StatusCode::OK {
            return Err(format!("it answered {}", answer.status()));
        }
        parse_set(&self.config, answer.body())
    }
}
