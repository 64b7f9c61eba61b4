//! Control messages: the text messages beside the packets, in JSON.
//!
//! Every message is an object with a `kind`. Fields that a side does not know
//! are ignored, so that either may learn new ones first; kinds that it does not
//! know are refused by name, so that the other learns what it cannot rely on.
//! Everything is bounded before it is looked at: length, depth, every text and
//! every list, because the other side may be hostile in both directions.

mod check;
mod error;
mod message;
mod prefix;
mod welcome;

/// The bounds that the streams' messages share.
pub(crate) mod bounds {
    pub(crate) use super::check::{
        NAME, TEXT, VERSIONS, check_goodbye as goodbye, check_notice as notice, fault, filled,
        identifier, list, range, text,
    };
}

pub use self::error::{ControlError, What};
pub use self::message::{
    Counters, ErrorNotice, Goodbye, Hello, Limits, Message, Pair, Quota, Resolve, Resolved, Stats,
    Ticket, Welcome,
};
pub use self::prefix::{Prefix, PrefixError};
pub use self::welcome::{Policy, Refusal, RouteFault};

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The protocol versions that this code speaks, best first.
pub const VERSIONS: &[u16] = &[1];
/// The path on which a gateway answers.
pub const PATH: &str = "/rvpn/v1/packets";
/// The WebSocket subprotocol.
pub const SUBPROTOCOL: &str = "rvpn.packets.1";
/// Before a token, as a second subprotocol, for browsers, which cannot set headers.
pub const BEARER_SUBPROTOCOL: &str = "rvpn.bearer.";
/// Capability: super-packets and partial checksums, in both directions.
pub const OFFLOAD: &str = "offload";
/// Nesting that a message may have; ours have three levels.
pub const MAX_DEPTH: usize = 16;
/// How often a client pings unless both agree on something else.
pub const KEEPALIVE: Duration = Duration::from_secs(12);
/// What a client may ask for instead, for its battery.
pub const KEEPALIVE_MAX: Duration = Duration::from_secs(50);

/// Why a connection is closed, as its close frame says.
pub mod close {
    /// Done; the client said goodbye, or continues on another connection.
    pub const NORMAL: u16 = 1000;
    /// The gateway or the browser page goes away.
    pub const GOING_AWAY: u16 = 1001;
    /// The WebSocket protocol was broken.
    pub const PROTOCOL: u16 = 1002;
    /// Refused by policy: revoked, expired, flooding, malformed messages. Coming back is of no use.
    pub const POLICY: u16 = 1008;
    /// A message over the limit.
    pub const TOO_BIG: u16 = 1009;
    /// The gateway failed at something of its own.
    pub const INTERNAL: u16 = 1011;
    /// The gateway restarts; come back when `goodbye` said.
    pub const RESTART: u16 = 1012;
    /// No lease is free; come back when `goodbye` said.
    pub const POOL_FULL: u16 = 1013;
}

/// How much is believed of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Not logged in, or `hello` not seen yet.
    BeforeLogin,
    /// A session.
    Session,
}

impl Stage {
    /// The longest control message, in bytes.
    pub fn limit(self) -> usize {
        match self {
            Self::BeforeLogin => 4 * 1024,
            Self::Session => 16 * 1024,
        }
    }
}

impl Message {
    /// Reads a text message.
    pub fn parse(text: &str, stage: Stage) -> Result<Self, ControlError> {
        let kind = envelope(text, stage)?;
        let message = match kind.as_str() {
            "hello" => Self::Hello(read(text)?),
            "welcome" => Self::Welcome(Box::new(read(text)?)),
            "ticket" => Self::Ticket(read(text)?),
            "stats" => Self::Stats(read(text)?),
            "quota" => Self::Quota(read(text)?),
            "resolve" => Self::Resolve(read(text)?),
            "resolved" => Self::Resolved(read(text)?),
            "goodbye" => Self::Goodbye(read(text)?),
            "error" => Self::Error(read(text)?),
            unknown => return Err(ControlError::unknown(unknown)),
        };
        message.check()?;
        Ok(message)
    }

    /// Writes the message, if the other side would accept it.
    pub fn to_text(&self, stage: Stage) -> Result<String, ControlError> {
        self.check()?;
        write(self, stage)
    }
}

/// The best version that both speak.
pub fn negotiate(offered: &[u16]) -> Option<u16> {
    VERSIONS.iter().copied().find(|v| offered.contains(v))
}

/// How long a gateway hears nothing before it gives a client up: 2.5 intervals.
pub fn patience(keepalive: Duration) -> Duration {
    keepalive * 5 / 2
}

/// What every message has.
#[derive(Deserialize)]
struct Envelope {
    kind: String,
}

/// What kind of message a text is, once its length and depth are bounded.
pub(crate) fn envelope(text: &str, stage: Stage) -> Result<String, ControlError> {
    fits(text, stage)?;
    if depth(text) > MAX_DEPTH {
        return Err(ControlError::TooDeep);
    }
    read(text).map(|envelope: Envelope| envelope.kind)
}

pub(crate) fn read<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, ControlError> {
    serde_json::from_str(text).map_err(ControlError::malformed)
}

/// The text of a message whose fields were checked.
pub(crate) fn write(message: &impl Serialize, stage: Stage) -> Result<String, ControlError> {
    let text = serde_json::to_string(message).map_err(ControlError::malformed)?;
    fits(&text, stage).map(|()| text)
}

fn fits(text: &str, stage: Stage) -> Result<(), ControlError> {
    let (length, limit) = (text.len(), stage.limit());
    match length > limit {
        true => Err(ControlError::TooLong { length, limit }),
        false => Ok(()),
    }
}

/// How deep objects and lists are nested, without recursion: an unknown field
/// may be of any shape, and its reader must not run out of stack.
pub(crate) fn depth(text: &str) -> usize {
    let (mut now, mut most) = (0_usize, 0);
    let (mut quoted, mut escaped) = (false, false);
    for byte in text.bytes() {
        if quoted {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => quoted = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'{' | b'[' => {
                now += 1;
                most = most.max(now);
            }
            b'}' | b']' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}
