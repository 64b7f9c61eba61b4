//! TLS for the public listeners.
//!
//! With certificate files, or with a certificate that the gateway makes once
//! and keeps: clients pin its fingerprint, so it must survive everything but
//! the loss of the state directory.

use std::fmt;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use aws_lc_rs::digest::{SHA256, digest};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};

use crate::config::Config;

const CERTIFICATE_FILE: &str = "tls.crt";
const KEY_FILE: &str = "tls.key";

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

/// A certificate that could be put in force.
pub struct Prepared(Current);

struct Current {
    config: Arc<ServerConfig>,
    fingerprint: Fingerprint,
    own: bool,
}

/// The certificate in force, exchanged without disturbing anybody.
pub struct Tls {
    current: ArcSwap<Current>,
}

impl Tls {
    /// Loads the certificate, or makes one.
    pub fn load(config: &Config) -> Result<Tls, TlsError> {
        Ok(Tls {
            current: ArcSwap::from_pointee(current(config)?),
        })
    }

    /// Loads it anew, without putting it in force yet.
    pub fn prepare(config: &Config) -> Result<Prepared, TlsError> {
        current(config).map(Prepared)
    }

    /// Puts what was prepared in force.
    pub fn commit(&self, prepared: Prepared) {
        self.current.store(Arc::new(prepared.0));
    }

    /// For the next handshake.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().config)
    }

    /// What clients see.
    pub fn fingerprint(&self) -> Fingerprint {
        self.current.load().fingerprint
    }

    /// Whether clients must pin it, because nobody else vouches for it.
    pub fn self_signed(&self) -> bool {
        self.current.load().own
    }
}

fn current(config: &Config) -> Result<Current, TlsError> {
    let (chain_path, key_path, own) = match &config.certificate {
        Some(files) => (files.chain.clone(), files.key.clone(), false),
        None => {
            let (chain, key) = (
                config.state_dir.join(CERTIFICATE_FILE),
                config.state_dir.join(KEY_FILE),
            );
            if !key.exists() || !chain.exists() {
                make(config, &chain, &key)?;
            }
            (chain, key, true)
        }
    };
    let file = |path: &Path, why: &dyn fmt::Display| TlsError::File {
        path: path.to_owned(),
        why: why.to_string(),
    };
    let chain = CertificateDer::pem_file_iter(&chain_path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| file(&chain_path, &e))?;
    let leaf = chain
        .first()
        .ok_or_else(|| file(&chain_path, &"it has no certificate"))?;
    let fingerprint = Fingerprint::of(leaf);
    let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|e| file(&key_path, &e))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| TlsError::Pair {
            path: chain_path,
            error,
        })?;
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Early data can be replayed, and with it a login.
    server.max_early_data_size = 0;
    Ok(Current {
        config: Arc::new(server),
        fingerprint,
        own,
    })
}

fn make(config: &Config, chain: &Path, key: &Path) -> Result<(), TlsError> {
    let mut names = config.names.all().to_vec();
    let addresses = config.listeners.iter().map(|l| l.address.ip());
    names.extend(
        addresses
            .filter(|a| !a.is_unspecified())
            .map(|a| a.to_string()),
    );
    if names.is_empty() {
        names.push("rvpn-gateway".to_owned());
    }
    let made = rcgen::generate_simple_self_signed(names)?;
    // The key first: a certificate without its key would be kept for good.
    write_new(key, made.signing_key.serialize_pem().as_bytes(), 0o600)?;
    write_new(chain, made.cert.pem().as_bytes(), 0o644)
}

/// Whole or not at all, whatever happens meanwhile.
fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    let temporary = path.with_extension("new");
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| TlsError::File {
        path: path.to_owned(),
        why: error.to_string(),
    })
}
