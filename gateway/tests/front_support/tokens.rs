//! Tokens, good and bad.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header, crypto};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};
use serde_json::{Value, json};

/// A private key and its public half.
pub(crate) struct Signer {
    pub(crate) algorithm: Algorithm,
    pub(crate) key: EncodingKey,
    pub(crate) public_pem: String,
    /// Raw, for Ed25519 the 32 bytes.
    pub(crate) public: Vec<u8>,
}

impl Signer {
    pub(crate) fn ed25519() -> Signer {
        let pair = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        Signer {
            algorithm: Algorithm::EdDSA,
            key: EncodingKey::from_ed_der(&pair.serialize_der()),
            public_pem: pair.public_key_pem(),
            public: pair.public_key_raw().to_vec(),
        }
    }

    pub(crate) fn es256() -> Signer {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        Signer {
            algorithm: Algorithm::ES256,
            key: EncodingKey::from_ec_der(&pair.serialize_der()),
            public_pem: pair.public_key_pem(),
            public: pair.public_key_raw().to_vec(),
        }
    }

    pub(crate) fn rs256() -> Signer {
        use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
        use aws_lc_rs::rsa::{KeyPair, KeySize};
        use aws_lc_rs::signature::KeyPair as _;
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let pkcs8: Pkcs8V1Der<'_> = pair.as_der().unwrap();
        let spki: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        // jsonwebtoken wants the PKCS #1 inside; its PEM reader takes PKCS #8.
        let key = EncodingKey::from_rsa_pem(pem("PRIVATE KEY", pkcs8.as_ref()).as_bytes());
        Signer {
            algorithm: Algorithm::RS256,
            key: key.unwrap(),
            public_pem: pem("PUBLIC KEY", spki.as_ref()),
            public: pair.public_key().as_ref().to_vec(),
        }
    }

    pub(crate) fn secret(secret: &[u8]) -> Signer {
        Signer {
            algorithm: Algorithm::HS256,
            key: EncodingKey::from_secret(secret),
            public_pem: String::new(),
            public: Vec::new(),
        }
    }

    pub(crate) fn write_public(&self, path: &Path) {
        std::fs::write(path, &self.public_pem).unwrap();
    }

    /// A token for alice that is good for five minutes.
    pub(crate) fn good(&self) -> String {
        self.claims(&claims("alice"))
    }

    pub(crate) fn claims(&self, claims: &Value) -> String {
        self.with_header(&json!({"alg": name(self.algorithm), "typ": "JWT"}), claims)
    }

    /// With this `kid`.
    pub(crate) fn named(&self, kid: &str, claims: &Value) -> String {
        self.with_header(&json!({"alg": name(self.algorithm), "kid": kid}), claims)
    }

    pub(crate) fn with_header(&self, header: &Value, claims: &Value) -> String {
        self.with_text(&header.to_string(), &claims.to_string())
    }

    /// Signs whatever it is.
    pub(crate) fn with_text(&self, header: &str, claims: &str) -> String {
        let message = format!("{}.{}", b64(header.as_bytes()), b64(claims.as_bytes()));
        let signature = crypto::sign(message.as_bytes(), &self.key, self.algorithm).unwrap();
        format!("{message}.{signature}")
    }
}

/// What a good token says.
pub(crate) fn claims(sub: &str) -> Value {
    json!({"sub": sub, "exp": now() + 300})
}

/// The same with one more or another claim; null removes it.
pub(crate) fn with(name: &str, value: Value) -> Value {
    let mut claims = claims("alice");
    claims[name] = value;
    claims
}

pub(crate) fn without(name: &str) -> Value {
    let mut claims = claims("alice");
    claims.as_object_mut().unwrap().remove(name);
    claims
}

pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

pub(crate) fn name(algorithm: Algorithm) -> String {
    let header = serde_json::to_value(Header::new(algorithm)).unwrap();
    header["alg"].as_str().unwrap().to_owned()
}

/// base64url without padding, slowly and plainly.
pub(crate) fn b64(bytes: &[u8]) -> String {
    encode(
        bytes,
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_",
    )
}

/// base64 as in PEM and Basic.
pub(crate) fn b64_standard(bytes: &[u8]) -> String {
    let mut text = encode(
        bytes,
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
    );
    while !text.len().is_multiple_of(4) {
        text.push('=');
    }
    text
}

fn encode(bytes: &[u8], letters: &[u8; 64]) -> String {
    let bits: Vec<u8> = bytes
        .iter()
        .flat_map(|b| (0..8).rev().map(move |i| b >> i & 1))
        .collect();
    bits.chunks(6)
        .map(|six| {
            let mut value = 0;
            for i in 0..6 {
                value = value << 1 | six.get(i).copied().unwrap_or(0);
            }
            char::from(letters[usize::from(value)])
        })
        .collect()
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let text = b64_standard(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).unwrap())
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}
