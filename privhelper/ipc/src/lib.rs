//! The protocol between the gateway and its privileged helper.
//!
//! One `SOCK_SEQPACKET` Unix socket, one frame per packet, both of fixed size,
//! little-endian, with at most one file descriptor beside an answer. No frame
//! carries a name, an address chosen by the gateway, or a rule: a compromised
//! gateway can ask for a slot of the pool and give it back, nothing else.
//!
//! [`frame`] is the whole format, [`seqpacket`] the only unsafe code, and
//! [`client`] a blocking client half for tests and tools. The gateway drives
//! the same two modules from its event loop.

pub mod client;
pub mod frame;
pub mod seqpacket;

pub use client::{Client, ClientError, Lease};
pub use frame::{Class, FrameError, Generation, Key, Kind, Op, Reply, Request, Slot, Status};

/// How long either side waits for the other inside one exchange.
pub const EXCHANGE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(1);

/// Where the helper listens unless its configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/rvpn/helper.sock";
