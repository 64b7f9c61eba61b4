//! Tokens as an operator's own tool would sign them.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};

/// What comes before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo.
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// An Ed25519 key made for one test.
pub struct Signer(Ed25519KeyPair);

impl Default for Signer {
    fn default() -> Signer {
        Signer::new()
    }
}

impl Signer {
    pub fn new() -> Signer {
        Signer(Ed25519KeyPair::generate().expect("a key"))
    }

    /// The public half, raw.
    pub fn public(&self) -> &[u8] {
        self.0.public_key().as_ref()
    }

    /// The public half as the gateway's configuration wants it.
    pub fn public_pem(&self) -> String {
        let der: Vec<u8> = SPKI_PREFIX.iter().chain(self.public()).copied().collect();
        let text = base64(&der, b"+/", true);
        format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
    }

    /// A token with these claims; `kid` names the key.
    pub fn sign(&self, kid: &str, claims: &Value) -> String {
        let header = json!({"alg": "EdDSA", "kid": kid}).to_string();
        let message = format!(
            "{}.{}",
            base64url(header.as_bytes()),
            base64url(claims.to_string().as_bytes())
        );
        let signature = self.0.sign(message.as_bytes());
        format!("{message}.{}", base64url(signature.as_ref()))
    }
}

/// What every good token says: whose it is, and until when.
pub fn claims(account: &str) -> Value {
    json!({"sub": account, "exp": now() + 1800})
}

pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_secs()
}

/// base64url without padding.
pub fn base64url(bytes: &[u8]) -> String {
    base64(bytes, b"-_", false)
}

/// Reads it back; nothing if it is anything else.
pub fn unbase64url(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0_u32, 0);
    for letter in text.bytes() {
        let six = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).ok()?);
        }
    }
    Some(bytes)
}

fn base64(bytes: &[u8], last: &[u8; 2], pad: bool) -> String {
    let mut letters: Vec<u8> = (b'A'..=b'Z')
        .chain(b'a'..=b'z')
        .chain(b'0'..=b'9')
        .collect();
    letters.extend(last);
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..=three.len() {
            let six = usize::try_from(bits >> (18 - 6 * i) & 63).expect("six bits");
            text.push(char::from(letters[six]));
        }
        if pad {
            text.extend(std::iter::repeat_n('=', 3 - three.len()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_usual_one() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v")] {
            assert_eq!(base64(bytes.as_bytes(), b"+/", true), text);
        }
        assert_eq!(base64(&[0xfb, 0xff], b"+/", true), "+/8=");
        assert_eq!(base64url(&[0xfb, 0xff]), "-_8");
        assert_eq!(unbase64url("-_8"), Some(vec![0xfb, 0xff]));
        assert_eq!(unbase64url("Zm8="), None);
    }
}
