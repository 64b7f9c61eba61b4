//! What lets a client come back to its lease.
//!
//! A lease key names a lease towards the helper; it is derived with a secret,
//! so that neither a client nor whoever reads the helper's interface aliases
//! can make the key of another. A ticket carries a key to the client and back,
//! sealed and bound to its account, so it is worth nothing to anybody else and
//! nothing after its time. The login itself is never replaced by a ticket.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::{hmac, rand};
use rvpn_ipc::{Generation, Key};

const FILE_LEN: usize = 64;
const FORMAT: u8 = 1;
const CLAIMS_LEN: usize = 16 + 4 + 8 + 8;
const SEALED_LEN: usize = 1 + NONCE_LEN + CLAIMS_LEN + 16;

/// The secrets of this installation's tickets and lease keys.
pub struct TicketKey {
    seal: LessSafeKey,
    derive: hmac::Key,
}

/// What a ticket says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claims {
    /// The lease it leads to.
    pub key: Key,
    /// The generation it was given out with.
    pub generation: Generation,
    /// Counts the tickets of one lease; an older one is worth nothing.
    pub epoch: u64,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
}

/// Why a ticket is not accepted. The client is told no more than that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not a ticket of this installation and account.
    #[error("the ticket is not of this gateway and account")]
    Foreign,
    /// Its time is over.
    #[error("the ticket has expired")]
    Expired,
}

/// Why there is no key to work with.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file system said no.
    #[error("cannot use the ticket key {path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        error: io::Error,
    },
    /// Others can read it.
    #[error("{path} can be read by others (mode {mode:04o}); run `chmod 600 {path}`")]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is not a key.
    #[error("{path} is not a ticket key; remove it and clients reconnect with new leases")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

/// Who a lease belongs to when no ticket says so.
#[derive(Clone, Copy, Debug)]
pub enum Holder<'a> {
    /// A client's own name for one of its installations.
    Instance(&'a str),
    /// The token it logged in with.
    Token(&'a str),
}

impl TicketKey {
    /// Reads the key file, or makes it, so that tickets survive a restart.
    pub fn load_or_create(path: &Path) -> Result<TicketKey, KeyFileError> {
        let io_error = |error| KeyFileError::Io {
            path: path.to_owned(),
            error,
        };
        let mut file = match OpenOptions::new().read(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let secret = random::<FILE_LEN>().map_err(io_error)?;
                write_whole(path, &secret).map_err(io_error)?;
                return Ok(TicketKey::new(&secret));
            }
            Err(e) => return Err(io_error(e)),
        };
        let meta = file.metadata().map_err(io_error)?;
        let mode = meta.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyFileError::Readable {
                path: path.to_owned(),
                mode,
            });
        }
        let mut secret = [0; FILE_LEN];
        if meta.len() != FILE_LEN as u64 || file.read_exact(&mut secret).is_err() {
            return Err(KeyFileError::Damaged {
                path: path.to_owned(),
            });
        }
        Ok(TicketKey::new(&secret))
    }

    fn new(secret: &[u8; FILE_LEN]) -> TicketKey {
        let (seal, derive) = secret.split_at(32);
        let Ok(unbound) = UnboundKey::new(&AES_256_GCM, seal) else {
            unreachable!("AES-256 takes 32 bytes")
        };
        TicketKey {
            seal: LessSafeKey::new(unbound),
            derive: hmac::Key::new(hmac::HMAC_SHA256, derive),
        }
    }

    /// The lease key of this holder.
    pub fn lease_key(&self, account: &str, holder: Holder<'_>) -> Key {
        let (label, name) = match holder {
            Holder::Instance(name) => (b"instance", name),
            Holder::Token(name) => (b"token id", name),
        };
        let mut mac = hmac::Context::with_key(&self.derive);
        mac.update(label);
        // Lengths keep two pairs of names from running into the same bytes.
        mac.update(&(account.len() as u64).to_le_bytes());
        mac.update(account.as_bytes());
        mac.update(name.as_bytes());
        let tag = mac.sign();
        let mut key = [0; 16];
        key.copy_from_slice(&tag.as_ref()[..16]);
        // The all-zero key means "none" to the helper.
        key[0] |= 1;
        Key(key)
    }

    /// A key that nobody can come back with.
    pub fn throwaway_key() -> io::Result<Key> {
        let mut key = random::<16>()?;
        key[0] |= 1;
        Ok(Key(key))
    }

    /// Seals a ticket for this account.
    pub fn seal(&self, account: &str, claims: &Claims) -> io::Result<String> {
        let nonce = random::<NONCE_LEN>()?;
        let mut body = Vec::with_capacity(CLAIMS_LEN + 16);
        body.extend_from_slice(&claims.key.0);
        body.extend_from_slice(&claims.generation.to_be_bytes());
        body.extend_from_slice(&claims.epoch.to_be_bytes());
        body.extend_from_slice(&claims.expires.to_be_bytes());
        self.seal
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(account.as_bytes()),
                &mut body,
            )
            .map_err(|_| io::Error::other("sealing a ticket failed"))?;
        let mut text = String::with_capacity(2 * SEALED_LEN);
        for byte in [FORMAT].iter().chain(&nonce).chain(&body) {
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from(HEX[usize::from(nibble)]));
            }
        }
        Ok(text)
    }

    /// Opens a ticket presented by this account at `now` (seconds since 1970).
    pub fn open(&self, account: &str, text: &str, now: u64) -> Result<Claims, TicketError> {
        let mut bytes = unhex(text).ok_or(TicketError::Foreign)?;
        let (head, body) = bytes.split_at_mut(1 + NONCE_LEN);
        let (format, nonce) = head.split_at(1);
        let nonce = <[u8; NONCE_LEN]>::try_from(nonce).map_err(|_| TicketError::Foreign)?;
        if format != [FORMAT] {
            return Err(TicketError::Foreign);
        }
        let plain = self
            .seal
            .open_in_place(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(account.as_bytes()),
                body,
            )
            .map_err(|_| TicketError::Foreign)?;
        let claims = read_claims(plain).ok_or(TicketError::Foreign)?;
        if now >= claims.expires {
            return Err(TicketError::Expired);
        }
        Ok(claims)
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

fn read_claims(plain: &[u8]) -> Option<Claims> {
    let (key, rest) = plain.split_first_chunk::<16>()?;
    let (generation, rest) = rest.split_first_chunk::<4>()?;
    let (epoch, rest) = rest.split_first_chunk::<8>()?;
    let (expires, rest) = rest.split_first_chunk::<8>()?;
    rest.is_empty().then_some(Claims {
        key: Key(*key),
        generation: Generation::from_be_bytes(*generation),
        epoch: u64::from_be_bytes(*epoch),
        expires: u64::from_be_bytes(*expires),
    })
}

fn unhex(text: &str) -> Option<[u8; SEALED_LEN]> {
    let text = text.as_bytes();
    if text.len() != 2 * SEALED_LEN {
        return None;
    }
    let mut out = [0; SEALED_LEN];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        for &digit in pair {
            let value = HEX.iter().position(|&h| h == digit)?;
            *byte = (*byte << 4) | u8::try_from(value).ok()?;
        }
    }
    Some(out)
}

/// Bytes nobody can guess.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| io::Error::other("the system has no random numbers"))?;
    Ok(bytes)
}

/// Writes under another name first: a key file is whole or not there.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> TicketKey {
        TicketKey::new(&[7; FILE_LEN])
    }

    fn claims() -> Claims {
        Claims {
            key: Key([3; 16]),
            generation: 9,
            epoch: 2,
            expires: 1_000,
        }
    }

    #[test]
    fn a_ticket_opens_for_its_account_until_its_time() {
        let text = key().seal("alice", &claims()).unwrap();
        assert_eq!(key().open("alice", &text, 999), Ok(claims()));
        assert_eq!(key().open("alice", &text, 1_000), Err(TicketError::Expired));
        assert_eq!(key().open("bob", &text, 999), Err(TicketError::Foreign));
        let other = TicketKey::new(&[8; FILE_LEN]);
        assert_eq!(other.open("alice", &text, 999), Err(TicketError::Foreign));
    }

    #[test]
    fn aut_20_no_changed_or_cut_ticket_opens() {
        let text = key().seal("alice", &claims()).unwrap();
        for at in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            let changed = String::from_utf8(changed).unwrap();
            let opened = key().open("alice", &changed, 1);
            assert_eq!(opened, Err(TicketError::Foreign), "digit {at}");
            let opened = key().open("alice", &text[..at], 1);
            assert_eq!(opened, Err(TicketError::Foreign), "first {at}");
        }
        let long = format!("{text}00");
        assert_eq!(key().open("alice", &long, 1), Err(TicketError::Foreign));
    }

    #[test]
    fn lease_keys_differ_by_account_and_holder() {
        let k = key();
        let all = [
            k.lease_key("alice", Holder::Instance("phone")),
            k.lease_key("alice", Holder::Token("phone")),
            k.lease_key("alicep", Holder::Instance("hone")),
            k.lease_key("bob", Holder::Instance("phone")),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
        assert_eq!(all[0], k.lease_key("alice", Holder::Instance("phone")));
    }

    #[test]
    fn the_key_file_is_kept_private_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ticket.key");
        let text = TicketKey::load_or_create(&path)
            .unwrap()
            .seal("alice", &claims())
            .unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let again = TicketKey::load_or_create(&path).unwrap();
        assert_eq!(again.open("alice", &text, 1), Ok(claims()));

        let open = std::os::unix::fs::PermissionsExt::from_mode(0o640);
        fs::set_permissions(&path, open).unwrap();
        let refused = TicketKey::load_or_create(&path).map(drop).unwrap_err();
        assert!(refused.to_string().contains("chmod 600"), "{refused}");

        fs::remove_file(&path).unwrap();
        write_whole(&path, b"short").unwrap();
        assert!(matches!(
            TicketKey::load_or_create(&path),
            Err(KeyFileError::Damaged { .. })
        ));
    }
}
