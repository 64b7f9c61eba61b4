//! What operators see of certificates.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use rvpn_proto::name::Name;
use serde::Serialize;

use super::plan::Entry;

/// One name that is looked after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CertificateRow {
    /// The name.
    pub name: String,
    /// `own` or `served`.
    pub kind: &'static str,
    /// `none`, `valid`, `expired` or, while it is asked for, `asking`.
    pub state: &'static str,
    /// When it begins and ends, in seconds since 1970.
    pub not_before: Option<u64>,
    /// See there.
    pub not_after: Option<u64>,
    /// SHA-256 of the certificate.
    pub fingerprint: Option<String>,
    /// The directory of who issued it.
    pub directory: Option<String>,
    /// When it is asked for next.
    pub next: u64,
    /// Failures since the last success.
    pub failures: u32,
    /// The last of them.
    pub error: Option<String>,
    /// What to do about it.
    pub remedy: Option<&'static str>,
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

pub(super) fn rows(entries: &BTreeMap<Name, Entry>) -> Vec<CertificateRow> {
    let now = seconds(SystemTime::now());
    let row = |(name, entry): (&Name, &Entry)| {
        let has = entry.has.as_ref();
        CertificateRow {
            name: name.to_string(),
            kind: if entry.served { "served" } else { "own" },
            state: match has {
                _ if entry.busy => "asking",
                None => "none",
                Some(has) if has.validity.ends <= now => "expired",
                Some(_) => "valid",
            },
            not_before: has.map(|h| h.validity.begins),
            not_after: has.map(|h| h.validity.ends),
            fingerprint: has.map(|h| h.fingerprint.to_string()),
            directory: has.map(|h| h.origin.clone()),
            next: seconds(entry.due).max(now),
            failures: entry.failures,
            error: entry.failure.as_ref().map(|(text, _)| text.clone()),
            remedy: entry.failure.as_ref().map(|(_, remedy)| *remedy),
        }
    };
    entries.iter().map(row).collect()
}
