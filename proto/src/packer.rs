//! Packer v1: how the older reverse tunnels carry visitors.
//!
//! One WebSocket holds all visitors of a client. Its binary messages are one
//! stream of bytes, in which every frame names its visitor by address and says
//! in a few letters what it is: bytes of the visitor, or a word about them.
//! Several clients speak it, none says which it is, and what one needs kills
//! another; [`Profile`] knows what each can bear.

mod control;
mod decode;
mod encode;
mod flow;
mod head;
mod profile;

pub use self::control::{Command, Failure, Grant, Heard, failed, hello, notice, succeeded};
pub use self::decode::{Decoder, Limits, Piece};
pub use self::encode::{Frame, TooLong};
pub use self::flow::{CAPACITY, Gauge, ON_ITS_WAY, PAUSE_ABOVE, RESUME_BELOW, Turn};
pub use self::head::{Fault, Head, Word};
pub use self::profile::{Asked, Bodies, Profile, Token};

/// First byte of every frame: 255 less the version.
const VERSION: u8 = 0xfe;
/// The id of frames that are about the connection itself.
pub const NO_STREAM: &str = ",,";

/// Codes of errors, as these clients know them.
pub mod code {
    /// The token is not accepted.
    pub const INVALID_TOKEN: &str = "E_INVALID_TOKEN";
    /// A command that makes no sense.
    pub const BAD_COMMAND: &str = "E_BAD_COMMAND";
    /// A command that is not known.
    pub const UNKNOWN_COMMAND: &str = "E_UNKNOWN_COMMAND";
    /// There is no such visitor, or no longer.
    pub const NO_CONNECTION: &str = "E_NO_CONN";
    /// The visitor's connection broke.
    pub const CLOSED: &str = "E_CONN_CLOSED";
    /// The visitor took too long over what was sent.
    pub const TIMEOUT: &str = "E_TIMEOUT";
}
