//! The cage from inside: what it refuses, and that the gateway's work goes on.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod child;
mod refused;
mod workload;
