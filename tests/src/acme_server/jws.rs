//! Signed requests (RFC 8555, section 6.2), checked for real.

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use serde_json::Value;

use crate::token::{base64url, unbase64url};

/// The public half of an account's key.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Public {
    x: String,
    y: String,
}

impl Public {
    fn of(jwk: &Value) -> Option<Public> {
        let text = |key: &str| jwk[key].as_str().map(str::to_owned);
        let fits = jwk["kty"] == "EC" && jwk["crv"] == "P-256";
        let (x, y) = (text("x")?, text("y")?);
        fits.then_some(Public { x, y })
    }

    /// RFC 7638.
    pub(super) fn thumbprint(&self) -> String {
        let text = format!(
            r#"{{"crv":"P-256","kty":"EC","x":"{}","y":"{}"}}"#,
            self.x, self.y
        );
        base64url(digest(&SHA256, text.as_bytes()).as_ref())
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let mut point = vec![4];
        for half in [&self.x, &self.y] {
            point.extend(unbase64url(half).unwrap_or_default());
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
            .verify(message, signature)
            .is_ok()
    }
}

/// Who signed.
pub(super) enum By {
    /// Somebody new.
    Key(Public),
    /// The account at this address.
    Account(String),
}

/// A request whose form is right; the signature is checked when the key is known.
pub(super) struct Signed {
    pub(super) by: By,
    pub(super) nonce: String,
    pub(super) url: String,
    /// Null when there is none: a question.
    pub(super) payload: Value,
    message: String,
    signature: Vec<u8>,
}

impl Signed {
    pub(super) fn read(body: &[u8]) -> Option<Signed> {
        let outer: Value = serde_json::from_slice(body).ok()?;
        let text = |key: &str| outer[key].as_str();
        let (protected, payload) = (text("protected")?, text("payload")?);
        let header: Value = serde_json::from_slice(&unbase64url(protected)?).ok()?;
        if header["alg"] != "ES256" {
            return None;
        }
        let by = match (&header["jwk"], header["kid"].as_str()) {
            (Value::Null, Some(kid)) => By::Account(kid.to_owned()),
            (jwk, None) => By::Key(Public::of(jwk)?),
            _ => return None,
        };
        let said = match payload.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&unbase64url(payload)?).ok()?,
        };
        Some(Signed {
            by,
            nonce: header["nonce"].as_str()?.to_owned(),
            url: header["url"].as_str()?.to_owned(),
            payload: said,
            message: format!("{protected}.{payload}"),
            signature: unbase64url(text("signature")?)?,
        })
    }

    pub(super) fn is_by(&self, key: &Public) -> bool {
        key.verifies(self.message.as_bytes(), &self.signature)
    }
}
