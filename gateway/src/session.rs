//! Sessions: what happens to a connection after its login.

pub mod drive;
pub mod hub;
pub mod lease;
pub mod transport;
