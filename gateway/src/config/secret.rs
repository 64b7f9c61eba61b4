//! What must not be shown.

use std::fmt;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Deserializer};

/// Bytes that no log, error or debug output shows.
#[derive(Clone)]
pub struct Secret(Box<[u8]>);

impl Secret {
    /// Keeps them.
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Secret {
        Secret(bytes.into())
    }

    /// For whoever computes with them.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether it is this one, in a time that does not tell where they differ,
    /// nor how long the secret is.
    pub fn is(&self, guess: &[u8]) -> bool {
        let (ours, theirs) = (digest(&SHA256, &self.0), digest(&SHA256, guess));
        verify_slices_are_equal(ours.as_ref(), theirs.as_ref()).is_ok()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.is(&other.0)
    }
}

impl Eq for Secret {}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Secret, D::Error> {
        let text = String::deserialize(from)?;
        Ok(Secret(text.into_bytes().into()))
    }
}
