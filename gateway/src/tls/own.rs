//! The gateway's own certificate, made once.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::TlsError;
use crate::config::{CertificateFiles, Config};

const CERTIFICATE_FILE: &str = "tls.crt";
const KEY_FILE: &str = "tls.key";

/// Where it is; if it is not there yet it is made.
pub(super) fn files(config: &Config) -> Result<CertificateFiles, TlsError> {
    let files = CertificateFiles {
        chain: config.state_dir.join(CERTIFICATE_FILE),
        key: config.state_dir.join(KEY_FILE),
    };
    if !files.key.exists() || !files.chain.exists() {
        make(config, &files.chain, &files.key)?;
    }
    Ok(files)
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
