//! `rvpn.streams.1`: TCP streams over one WebSocket, in either direction.
//!
//! Text messages are control (see [`Message`]), binary messages are a yamux
//! byte stream (see [`mux`]). Whoever opens a stream says first what it is for
//! (see [`Opening`]), the other side answers with one byte, and from then on
//! the stream is whoever's it connects.

mod check;
mod message;
pub mod mux;
mod opening;

pub use self::message::{
    Capacity, Counts, Ending, Hello, Message, Offered, Serve, ServedAs, Serving, Turned, Welcome,
    Withdraw,
};
pub use self::opening::{OPENING_MAX, Opening, OpeningError, Status, Visit, Visitors};

/// The protocol versions that this code speaks, best first.
pub const VERSIONS: &[u16] = &[1];
/// The WebSocket subprotocol. The path is that of the packets.
pub const SUBPROTOCOL: &str = "rvpn.streams.1";
/// Bytes of a binary message that a sender fills at most: with all headers it is
/// four TLS records and one unit of the kernel's, which takes 45 segments of
/// 1448 bytes. A few bytes more would be a fifth record and a packet of their own.
pub const MAX_SENT: usize = 64_980;
/// Bytes of a message that a receiver takes at most.
pub const MAX_RECEIVED: usize = 64 * 1024;
/// Things that one connection may serve.
pub const OFFERS: usize = 64;
/// Streams that one connection may have open.
pub const STREAMS: usize = 1024;
