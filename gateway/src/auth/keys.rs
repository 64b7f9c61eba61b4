//! The keys that tokens are judged by.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeySize, PublicKeyComponents};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ED25519, EcdsaKeyPair,
    Ed25519KeyPair, KeyPair as _, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
};
use jsonwebtoken::jwk::{Jwk, JwkSet, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey, crypto};
use rvpn_ipc::Class;
use rvpn_proto::name::{Name, Pattern};
use rvpn_proto::packer::Profile;

use super::jwks::Remote;
use super::token::Verifier;
use crate::config::{self, Config, KeySource};

/// Keys of one set; more are not looked at.
const SET_LIMIT: usize = 64;
/// A key file is small; what is larger is not one.
const FILE_LIMIT: u64 = 1 << 20;

/// Why the keys of a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("key \"{name}\": cannot read {path}: {error}")]
    Read {
        /// Whose.
        name: Arc<str>,
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is not such a key.
    #[error("key \"{name}\": {why}")]
    Bad {
        /// Whose.
        name: Arc<str>,
        /// What it is not.
        why: String,
    },
    /// Signing or verifying does not work at all.
    #[error("self-test of {what} failed: {why}; this build cannot judge tokens")]
    SelfTest {
        /// The algorithm or key.
        what: String,
        /// What went wrong.
        why: String,
    },
}

/// A `[[legacy]]` block, ready for use.
pub(super) struct Block {
    name: Arc<str>,
    pub(super) account: Arc<str>,
    pub(super) key: DecodingKey,
    pub(super) class: Class,
    pub(super) names: Vec<Pattern>,
    pub(super) ports: Vec<RangeInclusive<u16>>,
    pub(super) profile: Option<Profile>,
    secret: config::Secret,
}

/// All keys of a configuration.
pub struct KeyRing {
    fixed: Vec<Arc<Verifier>>,
    remote: Vec<Remote>,
    blocks: Vec<Block>,
    secrets: Vec<(Arc<str>, config::Secret)>,
    decoy: DecodingKey,
    /// Below it every account of the strict policy has a name of its own.
    pub(super) domain: Option<Name>,
}

impl KeyRing {
    /// Reads all key files.
    pub fn load(config: &Config) -> Result<KeyRing, KeyError> {
        let mut ring = KeyRing {
            fixed: Vec::new(),
            remote: Vec::new(),
            blocks: Vec::new(),
            secrets: Vec::new(),
            decoy: decoy()?,
            domain: config.serve.domain.clone(),
        };
        for key in &config.keys {
            ring.add(key)?;
        }
        for block in &config.legacy {
            ring.blocks.push(Block {
                name: Arc::clone(&block.name),
                account: Arc::clone(&block.account),
                key: DecodingKey::from_secret(block.secret.bytes()),
                class: block.class,
                names: block.domains.clone(),
                ports: block.ports.clone(),
                profile: block.profile,
                secret: block.secret.clone(),
            });
        }
        Ok(ring)
    }

    fn add(&mut self, config: &config::Key) -> Result<(), KeyError> {
        let bad = |why: String| KeyError::Bad {
            name: Arc::clone(&config.name),
            why,
        };
        let verifier = |algorithm, key| {
            Arc::new(Verifier {
                name: Arc::clone(&config.name),
                kid: Some(config.name.to_string()),
                algorithm,
                key,
                issuer: config.issuer.clone(),
                audience: config.audience.clone(),
                class: config.class,
            })
        };
        match &config.source {
            KeySource::Pem { algorithm, file } => {
                let pem = read(&config.name, file)?;
                if pem.windows(7).any(|w| w == b"PRIVATE") {
                    return Err(bad(format!(
                        "{} holds a private key; the gateway needs only the public one, keep the other away from it",
                        file.display()
                    )));
                }
                let (algorithm, key) = match algorithm {
                    config::Algorithm::EdDsa => (Algorithm::EdDSA, DecodingKey::from_ed_pem(&pem)),
                    config::Algorithm::Es256 => (Algorithm::ES256, DecodingKey::from_ec_pem(&pem)),
                    config::Algorithm::Rs256 => (Algorithm::RS256, DecodingKey::from_rsa_pem(&pem)),
                };
                let key = key
                    .map_err(|e| e.to_string())
                    .and_then(|key| usable(algorithm, &key).map(|()| key))
                    .map_err(|e| {
                        bad(format!(
                            "{} is not a public key for {algorithm:?}: {e}",
                            file.display()
                        ))
                    })?;
                self.fixed.push(verifier(algorithm, key));
            }
            KeySource::Secret(secret) => {
                let key = DecodingKey::from_secret(secret.bytes());
                self.secrets
                    .push((Arc::clone(&config.name), secret.clone()));
                self.fixed.push(verifier(Algorithm::HS256, key));
            }
            KeySource::JwksFile(file) => {
                let text = read(&config.name, file)?;
                let set = parse_set(config, &text).map_err(bad)?;
                self.fixed.extend(set);
            }
            KeySource::JwksUrl { url, ca_file } => {
                let remote = Remote::new(config.clone(), url, ca_file).map_err(bad)?;
                self.remote.push(remote);
            }
        }
        Ok(())
    }

    /// Proves that this build can sign and verify with every algorithm it may
    /// meet, and with every secret it was given.
    pub fn self_test(&self) -> Result<(), KeyError> {
        let failed = |what: &str, why: String| KeyError::SelfTest {
            what: what.to_owned(),
            why,
        };
        for algorithm in [Algorithm::EdDSA, Algorithm::ES256, Algorithm::RS256] {
            // Devices sign with EdDSA whatever is configured.
            let met = algorithm == Algorithm::EdDSA
                || !self.remote.is_empty()
                || self.fixed.iter().any(|v| v.algorithm == algorithm);
            if !met {
                continue;
            }
            let what = format!("{algorithm:?}");
            let (sign, verify) = pair(algorithm).map_err(|e| failed(&what, e))?;
            round_trip(algorithm, &sign, &verify).map_err(|e| failed(&what, e))?;
        }
        let blocks = self.blocks.iter().map(|b| (&b.name, &b.secret));
        let own = self.secrets.iter().map(|(name, secret)| (name, secret));
        for (name, secret) in own.chain(blocks) {
            let sign = EncodingKey::from_secret(secret.bytes());
            let verify = DecodingKey::from_secret(secret.bytes());
            round_trip(Algorithm::HS256, &sign, &verify)
                .map_err(|e| failed(&format!("the secret \"{name}\""), e))?;
        }
        for key in &self.fixed {
            usable(key.algorithm, &key.key)
                .map_err(|e| failed(&format!("the key \"{}\"", key.name), e))?;
        }
        Ok(())
    }

    /// Takes over what the same sources had fetched before a reload.
    pub(super) fn keep_fetched(&self, old: &KeyRing) {
        for remote in &self.remote {
            if let Some(before) = old.remote.iter().find(|r| r.same_as(remote)) {
                remote.take_over(before);
            }
        }
    }

    /// Asks issuers for keys that were missing. False if none could be asked
    /// again yet or none answered.
    pub(super) async fn fetch_missing(&self) -> bool {
        let mut any = false;
        for remote in &self.remote {
            any |= remote.fetch().await;
        }
        any
    }

    /// The blocks whose tokens can be for serving.
    pub(super) fn tunnel_blocks(&self) -> impl Iterator<Item = &str> {
        let some = self.blocks.iter().filter(|b| !b.names.is_empty());
        some.map(|b| &*b.name)
    }

    /// Fetches all sets once, so that the first client need not wait for it.
    pub async fn warm_up(&self) {
        self.fetch_missing().await;
    }

    pub(super) fn named(&self, kid: &str) -> Vec<Arc<Verifier>> {
        let mut found = self.all();
        found.retain(|v| v.kid.as_deref() == Some(kid));
        found
    }

    pub(super) fn all(&self) -> Vec<Arc<Verifier>> {
        let mut all = self.fixed.clone();
        for remote in &self.remote {
            all.extend(remote.keys().iter().cloned());
        }
        all
    }

    pub(super) fn block(&self, name: &str) -> Option<&Block> {
        self.blocks.iter().find(|b| &*b.name == name)
    }

    pub(super) fn decoy(&self) -> &DecodingKey {
        &self.decoy
    }

    /// Name and algorithm of every key, for the operator.
    pub fn summary(&self) -> Vec<(String, &'static str)> {
        let all = self.all();
        let keys = all.iter().map(|v| {
            let kid = v.kid.as_deref().unwrap_or("-");
            let name = match kid == &*v.name {
                true => v.name.to_string(),
                false => format!("{}/{kid}", v.name),
            };
            (name, name_of(v.algorithm))
        });
        keys.collect()
    }
}

fn name_of(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::EdDSA => "EdDSA",
        Algorithm::ES256 => "ES256",
        Algorithm::RS256 => "RS256",
        Algorithm::HS256 => "HS256",
        _ => "other",
    }
}

fn read(name: &Arc<str>, path: &Path) -> Result<Vec<u8>, KeyError> {
    let limited = || {
        if std::fs::metadata(path)?.len() > FILE_LIMIT {
            return Err(std::io::Error::other("larger than any key"));
        }
        std::fs::read(path)
    };
    limited().map_err(|error| KeyError::Read {
        name: Arc::clone(name),
        path: path.to_owned(),
        error,
    })
}

/// The keys of a JWK set that we know how to use. Others beside them are no
/// fault; a set without any is one.
pub(super) fn parse_set(config: &config::Key, text: &[u8]) -> Result<Vec<Arc<Verifier>>, String> {
    let set: JwkSet =
        serde_json::from_slice(text).map_err(|e| format!("it is not a JWK set: {e}"))?;
    let mut keys = Vec::new();
    for jwk in set.keys.iter().take(SET_LIMIT) {
        let Some((algorithm, key)) = one_of_set(jwk) else {
            continue;
        };
        keys.push(Arc::new(Verifier {
            name: Arc::clone(&config.name),
            kid: jwk.common.key_id.clone(),
            algorithm,
            key,
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            class: config.class,
        }));
    }
    match keys.is_empty() {
        true => Err("the JWK set has no EdDSA, ES256 or RS256 signing key".to_owned()),
        false => Ok(keys),
    }
}

fn one_of_set(jwk: &Jwk) -> Option<(Algorithm, DecodingKey)> {
    if matches!(
        jwk.common.public_key_use,
        Some(PublicKeyUse::Encryption | PublicKeyUse::Other(_))
    ) {
        return None;
    }
    let key = DecodingKey::from_jwk(jwk).ok()?;
    // A symmetric key in a published set is not a secret.
    let candidates: &[Algorithm] = match jwk.common.key_algorithm {
        Some(KeyAlgorithm::EdDSA) => &[Algorithm::EdDSA],
        Some(KeyAlgorithm::ES256) => &[Algorithm::ES256],
        Some(KeyAlgorithm::RS256) => &[Algorithm::RS256],
        Some(_) => &[],
        None => &[Algorithm::EdDSA, Algorithm::ES256, Algorithm::RS256],
    };
    let algorithm = candidates
        .iter()
        .copied()
        .find(|a| a.family() == key.family() && usable(*a, &key).is_ok())?;
    Some((algorithm, key))
}

/// Whether the backend takes the key for this algorithm.
fn usable(algorithm: Algorithm, key: &DecodingKey) -> Result<(), String> {
    if key.family() != algorithm.family() {
        return Err("it is a key of another kind".to_owned());
    }
    if algorithm == Algorithm::HS256 {
        return Ok(());
    }
    if let DecodingKeyKind::RsaModulusExponent { n, e } = key.kind() {
        if !(256..=1024).contains(&n.len()) {
            return Err("RSA keys need 2048 to 8192 bits".to_owned());
        }
        let der: Result<PublicKeyX509Der<'_>, _> = PublicKeyComponents { n, e }.as_der();
        return der
            .map(drop)
            .map_err(|_| "it is not a valid RSA key".to_owned());
    }
    let bytes = key.try_get_as_bytes().map_err(|e| e.to_string())?;
    let parsed = match algorithm {
        Algorithm::EdDSA => ParsedPublicKey::new(&ED25519, bytes),
        Algorithm::ES256 => ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, bytes),
        _ => ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, bytes),
    };
    parsed.map(drop).map_err(|e| e.to_string())
}

/// A key pair made for the moment.
fn pair(algorithm: Algorithm) -> Result<(EncodingKey, DecodingKey), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    match algorithm {
        Algorithm::EdDSA => {
            let doc = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|e| text(&e))?;
            let pair = Ed25519KeyPair::from_pkcs8(doc.as_ref()).map_err(|e| text(&e))?;
            let public = DecodingKey::from_ed_der(pair.public_key().as_ref());
            Ok((EncodingKey::from_ed_der(doc.as_ref()), public))
        }
        Algorithm::ES256 => {
            let signing = &ECDSA_P256_SHA256_FIXED_SIGNING;
            let doc = EcdsaKeyPair::generate_pkcs8(signing, &SystemRandom::new())
                .map_err(|e| text(&e))?;
            let pair = EcdsaKeyPair::from_pkcs8(signing, doc.as_ref()).map_err(|e| text(&e))?;
            let public = DecodingKey::from_ec_der(pair.public_key().as_ref());
            Ok((EncodingKey::from_ec_der(doc.as_ref()), public))
        }
        _ => {
            let pair = aws_lc_rs::rsa::KeyPair::generate(KeySize::Rsa2048).map_err(|e| text(&e))?;
            let der: Pkcs8V1Der<'_> = pair.as_der().map_err(|e| text(&e))?;
            let public = DecodingKey::from_rsa_der(pair.public_key().as_ref());
            // Of all forms only PEM is read with the wrapping that this one has.
            let pem = format!(
                "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
                super::base64::to_standard(der.as_ref())
            );
            let private = EncodingKey::from_rsa_pem(pem.as_bytes()).map_err(|e| text(&e))?;
            Ok((private, public))
        }
    }
}

fn round_trip(a: Algorithm, sign: &EncodingKey, verify: &DecodingKey) -> Result<(), String> {
    let message = b"rvpn self-test";
    let signature = crypto::sign(message, sign, a).map_err(|e| e.to_string())?;
    let good = crypto::verify(&signature, message, verify, a).map_err(|e| e.to_string())?;
    let bad = crypto::verify(&signature, b"another", verify, a).map_err(|e| e.to_string())?;
    match (good, bad) {
        (true, false) => Ok(()),
        (false, _) => Err("a good signature was refused".to_owned()),
        (true, true) => Err("a bad signature was accepted".to_owned()),
    }
}

/// A public key whose private half was never kept.
fn decoy() -> Result<DecodingKey, KeyError> {
    let made = pair(Algorithm::EdDSA).map_err(|why| KeyError::SelfTest {
        what: "EdDSA".to_owned(),
        why,
    })?;
    Ok(made.1)
}
