//! The privileged helper of RVPN.
#![expect(dead_code, reason = "the daemon is being put together")]
mod config;
mod kernel;
mod plan;
fn main() {}
