//! Keys that an issuer publishes by HTTPS.
//!
//! They are asked for when a token names a key that is not known, at most once
//! a minute whatever strangers send, and kept until a newer answer comes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, HOST};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tracing::{info, warn};

use super::keys::parse_set;
use super::token::Verifier;
use crate::config::{self, KeySource};

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
    host: String,
    tls: TlsConnector,
    keys: ArcSwap<Vec<Arc<Verifier>>>,
    /// When it was asked last. Held while asking, so that many clients wait
    /// for one answer.
    asked: Mutex<Option<Instant>>,
}

impl Remote {
    pub(super) fn new(config: config::Key, url: &str, ca_file: &Path) -> Result<Remote, String> {
        let uri: Uri = url.parse().map_err(|e| format!("jwks-url: {e}"))?;
        let host = uri.host().ok_or("jwks-url has no host")?.to_owned();
        let mut roots = RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(ca_file)
            .map_err(|e| format!("cannot read {}: {e}", ca_file.display()))?;
        roots.add_parsable_certificates(certificates.filter_map(Result::ok));
        if roots.is_empty() {
            return Err(format!("{} has no certificate", ca_file.display()));
        }
        let tls = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Remote {
            config,
            uri,
            host,
            tls: TlsConnector::from(Arc::new(tls)),
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
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let port = self.uri.port_u16().unwrap_or(443);
        let bare = self.host.trim_start_matches('[').trim_end_matches(']');
        let tcp = TcpStream::connect((bare, port))
            .await
            .map_err(|e| text(&e))?;
        let name = ServerName::try_from(bare.to_owned()).map_err(|e| text(&e))?;
        let tls = self.tls.connect(name, tcp).await.map_err(|e| text(&e))?;
        let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
            .await
            .map_err(|e| text(&e))?;
        let path = self.uri.path_and_query().map_or("/", |p| p.as_str());
        let request = Request::get(path)
            .header(HOST, self.uri.authority().map_or("", |a| a.as_str()))
            .header(ACCEPT, "application/jwk-set+json, application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|e| text(&e))?;
        let answer = async {
            let response = send.send_request(request).await.map_err(|e| text(&e))?;
            if response.status() != StatusCode::OK {
                return Err(format!("it answered {}", response.status()));
            }
            let body = Limited::new(response.into_body(), LIMIT).collect().await;
            let body = body.map_err(|e| e.to_string())?.to_bytes();
            parse_set(&self.config, &body)
        };
        tokio::select! {
            answer = answer => answer,
            ended = connection => Err(match ended {
                Ok(()) => "it closed the connection".to_owned(),
                Err(e) => e.to_string(),
            }),
        }
    }
}
