//! The first bytes of a stream: what it is for, and whether that is accepted.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::check;
use super::message::Offered;

/// Longest description of a stream, without the length before it.
pub const OPENING_MAX: usize = 1024;

/// What a stream is for. A kind that is not known is refused with
/// [`Status::Refused`], so that either side may learn new ones first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Opening {
    /// A visitor of something that is served.
    Visit(Visit),
}

/// A visitor, as its server is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visit {
    /// Which of the client's offers, by the number that the client gave it.
    pub offer: u32,
    /// Where the visitor comes from.
    pub peer: SocketAddr,
    /// The gateway's port that it came to.
    pub port: u16,
    /// Whom it asked for, if it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it speaks.
    pub service: Visitors,
}

/// What visitors speak on a stream.
pub type Visitors = Offered;

/// The answer to an [`Opening`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// What follows are the stream's own bytes.
    Accepted = 0,
    /// Not something that was offered, or not now.
    Refused = 1,
    /// What should answer cannot be reached.
    Unreachable = 2,
}

impl Status {
    /// Of the byte that came.
    pub fn of(byte: u8) -> Option<Status> {
        match byte {
            0 => Some(Status::Accepted),
            1 => Some(Status::Refused),
            2 => Some(Status::Unreachable),
            _ => None,
        }
    }
}

/// Why the beginning of a stream is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpeningError {
    /// Longer than [`OPENING_MAX`], or empty.
    Length(usize),
    /// It cannot be read, or breaks a bound.
    Malformed,
    /// Of a kind that this version does not know.
    Unknown,
}

impl fmt::Display for OpeningError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(n) => write!(
                f,
                "a stream's description has {n} bytes, 1 to {OPENING_MAX} are allowed"
            ),
            Self::Malformed => f.write_str("a stream's description cannot be read"),
            Self::Unknown => f.write_str("a stream is for something unknown"),
        }
    }
}

impl std::error::Error for OpeningError {}

impl Opening {
    /// With its length before it, as it is sent.
    pub fn to_bytes(&self) -> Result<Vec<u8>, OpeningError> {
        let mut bytes = vec![0; 2];
        serde_json::to_writer(&mut bytes, self).map_err(|_| OpeningError::Malformed)?;
        let length = bytes.len() - 2;
        let short = u16::try_from(length).ok();
        let short = short.filter(|_| length <= OPENING_MAX);
        let prefix = short.ok_or(OpeningError::Length(length))?.to_be_bytes();
        bytes[..2].copy_from_slice(&prefix);
        Ok(bytes)
    }

    /// How many bytes follow these two.
    pub fn length(prefix: [u8; 2]) -> Result<usize, OpeningError> {
        let length = usize::from(u16::from_be_bytes(prefix));
        match length {
            1..=OPENING_MAX => Ok(length),
            _ => Err(OpeningError::Length(length)),
        }
    }

    /// Of the bytes behind the length.
    pub fn read(bytes: &[u8]) -> Result<Opening, OpeningError> {
        #[derive(Deserialize)]
        struct Envelope {
            kind: String,
        }
        let text = std::str::from_utf8(bytes).map_err(|_| OpeningError::Malformed)?;
        if crate::control::depth(text) > crate::control::MAX_DEPTH {
            return Err(OpeningError::Malformed);
        }
        let malformed = |_| OpeningError::Malformed;
        let envelope: Envelope = serde_json::from_str(text).map_err(malformed)?;
        if envelope.kind != "visit" {
            return Err(OpeningError::Unknown);
        }
        let Opening::Visit(visit) = serde_json::from_str(text).map_err(malformed)?;
        if let Some(name) = &visit.name {
            check::name("name", name).map_err(|_| OpeningError::Malformed)?;
        }
        Ok(Opening::Visit(visit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit() -> Opening {
        Opening::Visit(Visit {
            offer: 7,
            peer: "[2606:4700::2]:4711".parse().unwrap(),
            port: 443,
            name: Some("app.example".to_owned()),
            service: Visitors::Http,
        })
    }

    #[test]
    fn there_and_back() {
        let bytes = visit().to_bytes().unwrap();
        let length = Opening::length([bytes[0], bytes[1]]).unwrap();
        assert_eq!(length, bytes.len() - 2);
        assert_eq!(Opening::read(&bytes[2..]), Ok(visit()));
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        for (prefix, good) in [
            ([0, 0], false),
            ([0, 1], true),
            ([4, 0], true),
            ([4, 1], false),
        ] {
            assert_eq!(Opening::length(prefix).is_ok(), good, "{prefix:?}");
        }
        let Opening::Visit(mut long) = visit();
        long.name = Some("a".repeat(2000));
        assert!(matches!(
            Opening::Visit(long).to_bytes(),
            Err(OpeningError::Length(_))
        ));
    }

    #[test]
    fn what_is_not_known_is_told_from_what_is_wrong() {
        for (text, error) in [
            (r#"{"kind":"connect","host":"x"}"#, OpeningError::Unknown),
            (r#"{"kind":"visit"}"#, OpeningError::Malformed),
            (r#"{"kind":1}"#, OpeningError::Malformed),
            ("", OpeningError::Malformed),
            ("{", OpeningError::Malformed),
            (
                r#"{"kind":"visit","offer":1,"peer":"x","port":1,"service":"http"}"#,
                OpeningError::Malformed,
            ),
            (
                r#"{"kind":"visit","offer":1,"peer":"1.1.1.1:1","port":1,"service":"gopher"}"#,
                OpeningError::Malformed,
            ),
            (
                "{\"kind\":\"visit\",\"offer\":1,\"peer\":\"1.1.1.1:1\",\"port\":1,\"service\":\"http\",\"name\":\"a\\u001b\"}",
                OpeningError::Malformed,
            ),
        ] {
            assert_eq!(Opening::read(text.as_bytes()), Err(error), "{text}");
        }
        assert_eq!(Opening::read(&[0xff]), Err(OpeningError::Malformed));
        let deep = "[".repeat(2000);
        assert_eq!(Opening::read(deep.as_bytes()), Err(OpeningError::Malformed));
    }

    #[test]
    fn unknown_answers_are_none() {
        for status in [Status::Accepted, Status::Refused, Status::Unreachable] {
            assert_eq!(Status::of(status as u8), Some(status));
        }
        assert_eq!(Status::of(3), None);
    }
}
