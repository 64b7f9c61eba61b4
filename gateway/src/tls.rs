//! TLS for the public listeners.
//!
//! With certificate files, or with a certificate that the gateway makes once
//! and keeps: clients pin its fingerprint, so it must survive everything but
//! the loss of the state directory. Other names may have certificates of their
//! own: from files, put here while the gateway runs, or made for the moment.
//!
//! Every certificate has a server configuration of its own, so that a session
//! begun under one name is never resumed under another.

mod own;
mod shelf;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use aws_lc_rs::digest::{SHA256, digest};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rvpn_proto::name::{Name, Pattern};

use self::shelf::Shelf;
use crate::config::{CertificateFiles, Config};

/// What web servers and clients agree on.
const HTTP: &[u8] = b"http/1.1";
/// What a certificate authority asks for when it checks a name (RFC 8737).
const ACME: &[u8] = b"acme-tls/1";
/// How long an authority may take to come and look.
const CHALLENGE_LIFE: Duration = Duration::from_secs(600);

/// SHA-256 of a certificate, as clients pin it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Fingerprint {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, certificate).as_ref());
        Fingerprint(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not what it should be.
    #[error("cannot use {path}: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Certificate and key do not go together, or are of a kind that is not known.
    #[error("cannot use the certificate {path} with its key: {error}")]
    Pair {
        /// The certificate.
        path: PathBuf,
        /// Why.
        error: rustls::Error,
    },
    /// No certificate could be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// Certificates that could be put in force.
pub struct Prepared(Current);

struct Current {
    config: Arc<ServerConfig>,
    fingerprint: Fingerprint,
    own: bool,
    /// The name that is shown to clients.
    first: Option<Name>,
    /// Exact names first, then the longer wildcards.
    named: Vec<(Pattern, Arc<ServerConfig>)>,
}

impl Current {
    fn named(&self, name: &Name) -> Option<Arc<ServerConfig>> {
        let found = self.named.iter().find(|(p, _)| p.covers(name));
        found.map(|(_, config)| Arc::clone(config))
    }
}

/// The certificates in force, exchanged without disturbing anybody.
pub struct Tls {
    current: ArcSwap<Current>,
    shelf: Mutex<Shelf>,
}

impl Tls {
    /// Loads the certificates, or makes one.
    pub fn load(config: &Config) -> Result<Tls, TlsError> {
        Ok(Tls {
            current: ArcSwap::from_pointee(current(config)?),
            shelf: Mutex::default(),
        })
    }

    /// Whether all files are usable, without making anything.
    pub fn check(config: &Config) -> Result<(), TlsError> {
        let named = config.certificates.iter().map(|c| &c.files);
        let mut all = config.certificate.iter().chain(named);
        all.try_for_each(|files| load(files).map(drop))
    }

    /// Loads them anew, without putting them in force yet.
    pub fn prepare(config: &Config) -> Result<Prepared, TlsError> {
        current(config).map(Prepared)
    }

    /// Puts what was prepared in force.
    pub fn commit(&self, prepared: Prepared) {
        self.current.store(Arc::new(prepared.0));
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a handshake with the gateway itself, or with nobody in particular:
    /// the certificate of the name if there is one, else the gateway's own.
    pub fn of(&self, name: Option<&Name>) -> Arc<ServerConfig> {
        let current = self.current.load();
        name.and_then(|name| self.known(&current, name))
            .unwrap_or_else(|| Arc::clone(&current.config))
    }

    /// For a handshake in the place of a client that serves the name: its
    /// certificate, or one made for the moment, which nobody vouches for.
    pub fn served(&self, name: &Name) -> Result<Arc<ServerConfig>, TlsError> {
        let known = self.known(&self.current.load(), name);
        known.map_or_else(|| self.shelf().made(name), Ok)
    }

    /// For an authority that checks the name, if a check is under way.
    pub fn challenged(&self, name: &Name) -> Option<Arc<ServerConfig>> {
        self.shelf().challenged(name, SystemTime::now())
    }

    fn known(&self, current: &Current, name: &Name) -> Option<Arc<ServerConfig>> {
        let put = self.shelf().put(name, SystemTime::now());
        put.or_else(|| current.named(name))
    }

    /// Uses a certificate for a name from the next handshake on, until it
    /// expires. It goes before the ones in files.
    pub fn put(&self, name: Name, key: Arc<CertifiedKey>, until: SystemTime) {
        let config = Arc::new(server(key, HTTP));
        self.shelf().keep(name, config, until);
    }

    /// Uses it no longer; whether there was one.
    pub fn remove(&self, name: &Name) -> bool {
        self.shelf().remove(name)
    }

    /// When the certificate that was put here for a name expires.
    pub fn until(&self, name: &Name) -> Option<SystemTime> {
        self.shelf().until(name)
    }

    /// Answers an authority's check of a name with this certificate, for as
    /// long as such checks take at most.
    pub fn challenge(&self, name: Name, key: Arc<CertifiedKey>) {
        let config = Arc::new(server(key, ACME));
        let until = SystemTime::now() + CHALLENGE_LIFE;
        self.shelf().begin_challenge(name, config, until);
    }

    /// The check is over.
    pub fn end_challenge(&self, name: &Name) {
        self.shelf().end_challenge(name);
    }

    /// What clients of the gateway see, unless its name has a certificate of its own.
    pub fn fingerprint(&self) -> Fingerprint {
        self.current.load().fingerprint
    }

    /// Whether clients must pin it, because nobody else vouches for it.
    pub fn self_signed(&self) -> bool {
        let current = self.current.load();
        let first = current.first.as_ref();
        let vouched = first.is_some_and(|name| self.known(&current, name).is_some());
        current.own && !vouched
    }
}

/// A chain and its key, leaf first, if they go together.
pub fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, rustls::Error> {
    CertifiedKey::from_der(chain, key, &provider()).map(Arc::new)
}

fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// TLS 1.3 and 1.2, whose suites here all authenticate what they encrypt.
fn server(key: Arc<CertifiedKey>, protocol: &[u8]) -> ServerConfig {
    let mut server = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .unwrap_or_else(|error| unreachable!("the provider knows both versions: {error}"))
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    server.alpn_protocols = vec![protocol.to_vec()];
    // Early data can be replayed, and with it a login.
    server.max_early_data_size = 0;
    // Nothing is kept for a visitor who may never come again.
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    server
}

fn current(config: &Config) -> Result<Current, TlsError> {
    let (files, own) = match &config.certificate {
        Some(files) => (files.clone(), false),
        None => (own::files(config)?, true),
    };
    let key = load(&files)?;
    let leaf = key.cert.first().ok_or_else(|| TlsError::File {
        path: files.chain.clone(),
        why: "it has no certificate".to_owned(),
    })?;
    let fingerprint = Fingerprint::of(leaf);
    let mut named = Vec::new();
    for certificate in &config.certificates {
        let config = Arc::new(server(load(&certificate.files)?, HTTP));
        let each = certificate.names.iter().cloned();
        named.extend(each.map(|pattern| (pattern, Arc::clone(&config))));
    }
    named.sort_by_key(|(p, _)| (p.is_wildcard(), usize::MAX - p.name().as_str().len()));
    Ok(Current {
        config: Arc::new(server(key, HTTP)),
        fingerprint,
        own,
        first: config.names.first().and_then(|n| Name::parse(n).ok()),
        named,
    })
}

fn load(files: &CertificateFiles) -> Result<Arc<CertifiedKey>, TlsError> {
    let file = |path: &Path, why: &dyn fmt::Display| TlsError::File {
        path: path.to_owned(),
        why: why.to_string(),
    };
    let chain = CertificateDer::pem_file_iter(&files.chain)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| file(&files.chain, &e))?;
    if chain.is_empty() {
        return Err(file(&files.chain, &"it has no certificate"));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| file(&files.key, &e))?;
    certified(chain, key).map_err(|error| TlsError::Pair {
        path: files.chain.clone(),
        error,
    })
}
