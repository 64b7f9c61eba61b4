//! The configuration, checked at once into types that need no further check.

use std::sync::Arc;

use rvpn_ipc::Class;
use rvpn_proto::dialect::{Dialect as Variant, Padding};

/// A path on which older clients find their gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// The path, with its leading slash.
    pub path: String,
    /// Which of the four.
    pub variant: Variant,
    /// Who pays for everybody on this path, whatever the token says; `None`: the token's account.
    pub account: Option<Arc<str>>,
    /// Whether a token is not needed.
    pub anonymous: bool,
    /// Whose tokens are accepted: a `[[legacy]]` block's instead of the strict ones.
    pub legacy: Option<Arc<str>>,
    /// The helper's policy class.
    pub class: Class,
    /// What hides lengths and silences.
    pub padding: Padding,
}
