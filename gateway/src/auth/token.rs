//! Judging one token.

use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest::{Context, SHA256};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation, decode, decode_header};
use rvpn_ipc::Class;
use rvpn_proto::packer::Profile;
use serde::Deserialize;

use super::devices::Devices;
use super::keys::KeyRing;
use super::rights::Rights;
use super::{Denied, at, base64};
use crate::admit::TokenId;
use crate::config::check::is_name;

/// How far clocks may be apart, in seconds.
pub const LEEWAY: u64 = 5;
/// A device signs a token when it connects, so none is good for long.
pub const DEVICE_TOKEN_LIFE: u64 = 3600;
/// Keys that are tried for a token that names none, or a name that several sets use.
const TRIES: usize = 8;
/// Secrets of `[[legacy]]` blocks that are tried for a token that names none.
const BLOCKS: usize = 64;
/// Claims of some issuers are lists in objects; no more is needed.
const MAX_DEPTH: usize = 16;
/// Longest `sub` and `jti`.
const CLAIM_LEN: usize = 128;

/// What a token turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Who pays.
    pub account: Arc<str>,
    /// Who it is.
    pub subject: Arc<str>,
    /// The token's own name.
    pub jti: Option<Arc<str>>,
    /// The device that signed it.
    pub device: Option<Arc<str>>,
    /// See [`TokenId`].
    pub token_id: TokenId,
    /// When the right it gives ends.
    pub expires_at: Option<SystemTime>,
    /// The helper's policy class.
    pub class: Class,
    /// What it may serve.
    pub rights: Arc<Rights>,
    /// See [`Tunnel`].
    pub tunnel: Tunnel,
}

/// How somebody wants to serve, as far as a login says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// It cannot do TLS: we are to end it.
    pub decrypt: bool,
    /// Which older client it is, whatever its request looks like.
    pub profile: Option<Profile>,
}

/// The claims that count. Anything of another type than it should be is
/// refused, and so is a claim that is there twice.
#[derive(Debug, Deserialize)]
struct Claims {
    sub: Option<String>,
    exp: Option<u64>,
    nbf: Option<u64>,
    iat: Option<u64>,
    jti: Option<String>,
    domains: Option<Vec<String>>,
    name: Option<String>,
    ports: Option<Vec<u16>>,
    decrypt: Option<bool>,
}

/// A key and what it is good for.
pub(crate) struct Verifier {
    pub(crate) name: Arc<str>,
    pub(crate) kid: Option<String>,
    pub(crate) algorithm: Algorithm,
    pub(crate) key: DecodingKey,
    pub(crate) issuer: Option<String>,
    pub(crate) audience: Option<String>,
    pub(crate) class: Class,
}

impl Verifier {
    fn validation(&self) -> Validation {
        let mut validation = bare(self.algorithm);
        let mut required = vec!["exp", "sub"];
        if let Some(issuer) = &self.issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        validation.validate_aud = true;
        if let Some(audience) = &self.audience {
            validation.set_audience(&[audience]);
            required.push("aud");
        }
        validation.set_required_spec_claims(&required);
        validation
    }
}

/// One algorithm, the signature and nothing else: times are checked here, by
/// the clock that the caller gives.
fn bare(algorithm: Algorithm) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation.set_required_spec_claims::<&str>(&[]);
    validation
}

impl Accepted {
    pub(super) fn anonymous(account: Arc<str>, class: Class) -> Accepted {
        Accepted {
            subject: Arc::clone(&account),
            account,
            jti: None,
            device: None,
            token_id: TokenId([0; 16]),
            expires_at: None,
            class,
            rights: Arc::default(),
            tunnel: Tunnel::default(),
        }
    }
}

impl KeyRing {
    /// Judges a token under the strict policy.
    pub(super) fn strict(
        &self,
        token: &str,
        devices: &Devices,
        now: u64,
    ) -> Result<Accepted, Denied> {
        let header = head(token)?;
        if let Some(kid) = &header.kid {
            if !is_name(kid) {
                return Err(self.nobody(token, Denied::UnknownKey));
            }
            if let Some(device) = devices.find(kid) {
                return by_device(token, &header, &device, now);
            }
        }
        let fits = |v: &&Arc<Verifier>| v.algorithm == header.alg;
        let keys: Vec<Arc<Verifier>> = match &header.kid {
            Some(kid) => {
                let named = self.named(kid);
                if !named.is_empty() && !named.iter().any(|v| fits(&v)) {
                    // The key decides what it is used for, never the token.
                    return Err(Denied::Signature);
                }
                named
            }
            None => self.all(),
        };
        let mut verdict = Denied::UnknownKey;
        for key in keys.iter().filter(fits).take(TRIES) {
            match by_key(token, key, now) {
                Ok(accepted) => return Ok(accepted),
                Err(Denied::Signature) => verdict = Denied::Signature,
                Err(other) => return Err(other),
            }
        }
        if verdict == Denied::UnknownKey {
            return Err(self.nobody(token, verdict));
        }
        Err(verdict)
    }

    /// Judges a token under the policy of one `[[legacy]]` block.
    pub(super) fn legacy(&self, name: &str, token: &str, now: u64) -> Result<Accepted, Denied> {
        let header = head(token)?;
        let block = self.block(name).ok_or(Denied::UnknownKey)?;
        if header.alg != Algorithm::HS256 {
            return Err(Denied::Signature);
        }
        let claims = read(token, &block.key, &bare(Algorithm::HS256))?;
        check_times(&claims, now)?;
        let subject = claims.sub.as_deref().map(subject).transpose()?;
        let Claims {
            domains,
            name,
            ports,
            ..
        } = &claims;
        let rights = Rights::claimed(domains.as_deref(), name.as_deref(), ports.as_deref())?;
        let mut rights = rights.within(&block.names);
        let inside = |port: &u16| block.ports.iter().any(|range| range.contains(port));
        rights.ports.retain(inside);
        Ok(Accepted {
            account: Arc::clone(&block.account),
            subject: subject.unwrap_or_else(|| Arc::clone(&block.account)),
            token_id: token_id(token, &block.account, claims.jti.as_deref()),
            jti: claims.jti.map(Arc::from),
            device: None,
            expires_at: claims.exp.and_then(|exp| at(exp.saturating_add(LEEWAY))),
            class: block.class,
            rights: Arc::new(rights),
            tunnel: Tunnel {
                decrypt: claims.decrypt.unwrap_or(false),
                profile: block.profile,
            },
        })
    }

    /// Judges a token under the policy of the `[[legacy]]` block whose secret
    /// signed it, of those that have something to serve.
    pub(super) fn any_legacy(&self, token: &str, now: u64) -> Result<Accepted, Denied> {
        let mut verdict = Denied::UnknownKey;
        for name in self.tunnel_blocks().take(BLOCKS) {
            match self.legacy(name, token, now) {
                Err(Denied::Signature) => verdict = Denied::Signature,
                judged => return judged,
            }
        }
        Err(verdict)
    }

    /// Takes as long to refuse as a bad signature does, so that the time does
    /// not tell which keys exist.
    fn nobody(&self, token: &str, verdict: Denied) -> Denied {
        let decoy = read(token, self.decoy(), &bare(Algorithm::EdDSA));
        drop(std::hint::black_box(decoy));
        verdict
    }
}

/// The header of a token that does not ask for anything strange.
fn head(token: &str) -> Result<Header, Denied> {
    let mut parts = token.split('.');
    let (Some(first), Some(second), Some(_), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Denied::Malformed);
    };
    let shallow = |part| base64::url(part).is_some_and(|json| depth(&json) <= MAX_DEPTH);
    if first.len() > 1024 || !shallow(first) || !shallow(second) {
        return Err(Denied::Malformed);
    }
    let header = decode_header(token).map_err(|_| Denied::Malformed)?;
    // Where a key could be fetched from, or what would change how the rest is
    // read: nobody who should log in here sends these.
    let strange = header.jku.is_some()
        || header.jwk.is_some()
        || header.x5u.is_some()
        || header.x5c.is_some()
        || header.crit.is_some()
        || header.enc.is_some()
        || header.zip.is_some()
        || header.extras.inner().contains_key("b64");
    match strange {
        true => Err(Denied::UnknownKey),
        false => Ok(header),
    }
}

/// How deep brackets are nested, those in texts left out.
fn depth(json: &[u8]) -> usize {
    let (mut now, mut most, mut text, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if text => escaped = true,
            b'"' => text = !text,
            _ if text => {}
            b'[' | b'{' => {
                now += 1;
                most = most.max(now);
            }
            b']' | b'}' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

fn by_key(token: &str, key: &Verifier, now: u64) -> Result<Accepted, Denied> {
    let claims = read(token, &key.key, &key.validation())?;
    check_times(&claims, now)?;
    let (Some(exp), Some(sub)) = (claims.exp, &claims.sub) else {
        return Err(Denied::Claims);
    };
    let account = subject(sub)?;
    if account.starts_with("legacy:") || account.starts_with("anonymous") {
        // Accounts that others have without a token of this kind.
        return Err(Denied::Claims);
    }
    // `name` is a person's with many issuers.
    let rights = Rights::claimed(claims.domains.as_deref(), None, claims.ports.as_deref())?;
    Ok(Accepted {
        subject: Arc::clone(&account),
        account,
        token_id: token_id(token, &key.name, claims.jti.as_deref()),
        jti: claims.jti.map(Arc::from),
        device: None,
        expires_at: at(exp.saturating_add(LEEWAY)),
        class: key.class,
        rights: Arc::new(rights),
        tunnel: Tunnel {
            decrypt: claims.decrypt.unwrap_or(false),
            profile: None,
        },
    })
}

fn by_device(
    token: &str,
    header: &Header,
    device: &super::devices::Device,
    now: u64,
) -> Result<Accepted, Denied> {
    if header.alg != Algorithm::EdDSA {
        return Err(Denied::Signature);
    }
    let mut validation = bare(Algorithm::EdDSA);
    validation.validate_aud = true;
    validation.set_required_spec_claims(&["exp", "sub"]);
    let claims = read(token, &device.key, &validation)?;
    check_times(&claims, now)?;
    let stored = &device.stored;
    let short = claims
        .exp
        .is_some_and(|exp| exp <= now.saturating_add(DEVICE_TOKEN_LIFE + LEEWAY));
    if claims.sub.as_deref() != Some(&stored.account) || !short {
        return Err(Denied::Claims);
    }
    if stored.expires.is_some_and(|end| end <= now) {
        return Err(Denied::Expired);
    }
    Ok(Accepted {
        account: stored.account.as_str().into(),
        subject: stored.id.as_str().into(),
        token_id: token_id(token, &stored.id, claims.jti.as_deref()),
        jti: claims.jti.map(Arc::from),
        device: Some(stored.id.as_str().into()),
        // The token proved that the device is here. How long it may stay is
        // up to its registration.
        expires_at: stored.expires.and_then(at),
        class: stored.class,
        // What a device signs itself gives it no names; its registration does.
        rights: Arc::new(device.rights.clone()),
        tunnel: Tunnel::default(),
    })
}

fn read(token: &str, key: &DecodingKey, validation: &Validation) -> Result<Claims, Denied> {
    let claims = match decode::<Claims>(token, key, validation) {
        Ok(data) => data.claims,
        Err(error) => {
            return Err(match error.kind() {
                ErrorKind::InvalidSignature | ErrorKind::InvalidAlgorithm => Denied::Signature,
                ErrorKind::MissingRequiredClaim(_)
                | ErrorKind::InvalidClaimFormat(_)
                | ErrorKind::InvalidIssuer
                | ErrorKind::InvalidAudience
                | ErrorKind::InvalidSubject
                | ErrorKind::Json(_) => Denied::Claims,
                _ => Denied::Malformed,
            });
        }
    };
    if claims.jti.as_deref().is_some_and(|jti| !is_plain(jti)) {
        return Err(Denied::Claims);
    }
    Ok(claims)
}

fn check_times(claims: &Claims, now: u64) -> Result<(), Denied> {
    let late = now.saturating_sub(LEEWAY);
    let early = now.saturating_add(LEEWAY);
    if claims.exp.is_some_and(|exp| exp <= late) {
        return Err(Denied::Expired);
    }
    if claims.nbf.is_some_and(|nbf| nbf > early) || claims.iat.is_some_and(|iat| iat > early) {
        return Err(Denied::Early);
    }
    Ok(())
}

fn subject(sub: &str) -> Result<Arc<str>, Denied> {
    match is_plain(sub) {
        true => Ok(sub.into()),
        false => Err(Denied::Claims),
    }
}

/// What can go into logs, tables and lists as it is.
pub(crate) fn is_plain(text: &str) -> bool {
    (1..=CLAIM_LEN).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"\"'\\<>`".contains(&b))
}

/// A `jti` is unique for its issuer only, so the key's name is part of it.
fn token_id(token: &str, key: &str, jti: Option<&str>) -> TokenId {
    let mut hash = Context::new(&SHA256);
    let parts = match jti {
        Some(jti) => ["jti", key, jti],
        None => ["token", key, token],
    };
    for part in parts {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finish().as_ref()[..16]);
    TokenId(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_count_outside_of_texts_only() {
        assert_eq!(depth(br#"{"a":[1,{"b":2}],"c":[]}"#), 3);
        assert_eq!(depth(br#"{"a":"[[[\"[[["}"#), 1);
        assert_eq!(depth(b"]]]]["), 1);
    }

    #[test]
    fn a_jti_names_a_token_of_one_key_only() {
        let same = token_id("x", "key", Some("1"));
        assert_eq!(same, token_id("y", "key", Some("1")));
        assert_ne!(same, token_id("x", "other", Some("1")));
        assert_ne!(token_id("x", "key", None), token_id("y", "key", None));
        // Lengths count, so that no two lists of parts look the same.
        assert_ne!(
            token_id("x", "ab", Some("c")),
            token_id("x", "a", Some("bc"))
        );
    }
}
