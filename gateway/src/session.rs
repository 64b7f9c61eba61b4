//! Sessions.
pub mod transport;
