//! Certificates and the account in the state directory.
//!
//! A certificate and its key are one file, so that one never stands there
//! without the other.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use instant_acme::AccountCredentials;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rvpn_proto::name::Name;
use serde::{Deserialize, Serialize};

use super::validity::{self, Validity};
use crate::tls::{Fingerprint, certified};

const ACCOUNT_FILE: &str = "acme-account.json";
/// Says in a certificate's file who issued it; text between PEM blocks is ignored.
const ORIGIN: &str = "# from ";

/// A certificate that can be served.
pub(super) struct Held {
    /// With its chain.
    pub(super) key: Arc<CertifiedKey>,
    /// When it is good.
    pub(super) validity: Validity,
    /// Of the leaf.
    pub(super) fingerprint: Fingerprint,
    /// The directory of who issued it.
    pub(super) origin: String,
}

impl Held {
    /// Out of the text of a file, for this name.
    pub(super) fn read(pem: &str, name: &Name) -> Result<Held, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let origin = pem.lines().find_map(|l| l.strip_prefix(ORIGIN));
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| text(&e))?;
        let leaf = chain.first().ok_or("it has no certificate")?;
        let validity = validity::of(leaf).ok_or("its validity cannot be read")?;
        let fingerprint = Fingerprint::of(leaf);
        let server = ServerName::try_from(name.as_str()).map_err(|e| text(&e))?;
        let parsed = ParsedCertificate::try_from(leaf).map_err(|e| text(&e))?;
        verify_server_name(&parsed, &server).map_err(|_| format!("it is not for {name}"))?;
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| text(&e))?;
        // Refuses a key that is another certificate's.
        let key = certified(chain, key).map_err(|e| text(&e))?;
        Ok(Held {
            key,
            validity,
            fingerprint,
            origin: origin.unwrap_or_default().to_owned(),
        })
    }
}

/// The text of a file.
pub(super) fn text(origin: &str, key: &str, chain: &str) -> String {
    format!("{ORIGIN}{origin}\n{key}{chain}")
}

fn path(dir: &Path, name: &Name) -> PathBuf {
    dir.join(format!("acme-{name}.pem"))
}

/// What was kept for the name, if anything.
pub(super) fn load(dir: &Path, name: &Name) -> Result<Option<Held>, String> {
    let path = path(dir, name);
    match fs::read_to_string(&path) {
        Ok(pem) => Held::read(&pem, name)
            .map(Some)
            .map_err(|why| format!("cannot use {}: {why}", path.display())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(format!("cannot read {}: {e}", path.display())),
    }
}

/// Keeps a certificate for the name.
pub(super) fn keep(dir: &Path, name: &Name, pem: &str) -> io::Result<()> {
    write_whole(&path(dir, name), pem.as_bytes())
}

/// The account with a directory.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Kept {
    pub(super) directory: String,
    pub(super) contact: Vec<String>,
    pub(super) credentials: AccountCredentials,
}

/// The account, if there is one with this directory.
pub(super) fn account(dir: &Path, directory: &str) -> Option<Kept> {
    let bytes = fs::read(dir.join(ACCOUNT_FILE)).ok()?;
    let kept: Kept = serde_json::from_slice(&bytes).ok()?;
    (kept.directory == directory).then_some(kept)
}

/// Makes it as if there had been none.
pub(super) fn forget_account(dir: &Path) {
    // Without a right to do so the next one cannot be written either, which is said.
    drop(fs::remove_file(dir.join(ACCOUNT_FILE)));
}

/// Keeps the account.
pub(super) fn keep_account(dir: &Path, kept: &Kept) -> io::Result<()> {
    let bytes = serde_json::to_vec(kept).map_err(io::Error::other)?;
    write_whole(&dir.join(ACCOUNT_FILE), &bytes)
}

/// Whole or not at all, and for nobody else to read.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(dir) => fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
