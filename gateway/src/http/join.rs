//! Registering a device with a one-time code.

use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use http_body_util::{BodyExt, Limited};
use hyper::StatusCode;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::http::request::Parts;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tracing::{info, warn};

use super::Front;
use super::answer::{Answer, Refusal, json};
use crate::auth::{base64, devices, now, token};
use crate::limits::Place;
use crate::store::{NewDevice, StoreError};

const BODY_LIMIT: usize = 4096;
const BODY_TIME: Duration = Duration::from_secs(5);
/// Longest name that a device may call itself.
const NAME_LEN: usize = 64;
/// Bytes of a code.
pub const CODE_LEN: usize = 16;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Ask {
    /// From the invite's link.
    code: String,
    /// The device's public Ed25519 key, 32 bytes in base64url.
    public_key: String,
    /// What its owner calls it.
    #[serde(default)]
    name: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Joined<'a> {
    key_id: &'a str,
    account: &'a str,
    expires: Option<u64>,
    token_life: u64,
}

/// A new code and the hash under which it is kept.
pub fn new_code() -> std::io::Result<(String, [u8; 32])> {
    let code = base64::to_url(&crate::ticket::random::<CODE_LEN>()?);
    let hash = hash_of(&code);
    Ok((code, hash))
}

fn hash_of(code: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, code.as_bytes()).as_ref());
    hash
}

pub(super) async fn respond(
    front: &Front,
    head: &Parts,
    body: Incoming,
    place: Place,
) -> Result<Answer, Refusal> {
    let limit = front.config().limits.login_failures;
    let start = Instant::now();
    if let Some(wait) = front.failures.blocked(place, limit, start) {
        return Err(Refusal::slow_down(wait));
    }
    // What a page of another origin can send without being asked first is not this.
    let kind = head.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let kind = kind.and_then(|k| k.split(';').next()).map(str::trim);
    if kind != Some("application/json") {
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "send application/json",
        ));
    }
    let wrong = || Refusal::new(StatusCode::BAD_REQUEST, "bad request");
    let body = timeout(BODY_TIME, Limited::new(body, BODY_LIMIT).collect()).await;
    let body = body
        .map_err(|_| Refusal::new(StatusCode::REQUEST_TIMEOUT, "request timeout"))?
        .map_err(|_| Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "payload too large"))?
        .to_bytes();
    let ask: Ask = serde_json::from_slice(&body).map_err(|_| wrong())?;
    let public = base64::url(&ask.public_key).ok_or_else(wrong)?;
    let id = devices::id_of(&public).ok_or_else(wrong)?;
    let name_fits = ask.name.len() <= NAME_LEN && !ask.name.chars().any(char::is_control);
    if !name_fits || base64::url(&ask.code).is_none_or(|c| c.len() != CODE_LEN) {
        return Err(wrong());
    }
    let hash = hash_of(&ask.code);
    let device = NewDevice {
        id,
        name: ask.name,
        public,
    };
    let redeemed = front
        .gate
        .store()
        .run(move |e| e.redeem(&hash, &device, now()))
        .await;
    match redeemed {
        Ok(Some(key)) => {
            info!(account = %key.account, device = %key.id, "a device joined");
            let joined = Joined {
                key_id: &key.id,
                account: &key.account,
                expires: key.expires,
                token_life: token::DEVICE_TOKEN_LIFE,
            };
            let body = serde_json::to_vec(&joined).map_err(|_| wrong())?;
            front.gate.device_joined(key);
            Ok(json(StatusCode::OK, body))
        }
        Ok(None) | Err(StoreError::Exists) => {
            front.failures.note(place, limit, start);
            Err(Refusal::forbidden())
        }
        Err(error) => {
            warn!(%error, "cannot register a device");
            Err(Refusal::busy(Duration::from_secs(5)))
        }
    }
}

/// The link that carries a code to a device.
pub fn link(authority: &str, fingerprint: Option<&str>, code: &str) -> String {
    match fingerprint {
        Some(fp) => format!("rvpn://{authority}/?fp={fp}&code={code}"),
        None => format!("rvpn://{authority}/?code={code}"),
    }
}

/// Whether the text can be the authority of a link.
pub fn is_authority(text: &str) -> bool {
    crate::config::host_of(text).is_some()
}
