//! Why a control message is not accepted.

use std::error::Error;
use std::fmt;

/// What is wrong with a control message. All of these are the peer's fault,
/// except on the way out, where they are ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlError {
    /// Longer than the stage allows.
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// Nested deeper than any message of ours.
    TooDeep,
    /// Not JSON, a field missing, twice or of the wrong type.
    Malformed {
        /// Where, counted from 1; all is one line as a rule.
        column: usize,
        /// The parser's words, shortened.
        reason: Box<str>,
    },
    /// A kind that this version does not know. The connection may go on.
    Unknown {
        /// Its name, shortened.
        kind: Box<str>,
    },
    /// A field has a value that it must not have.
    Field {
        /// Its name.
        field: &'static str,
        /// What is wrong with it.
        what: What,
    },
}

/// What can be wrong with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It must not be empty.
    Empty,
    /// A text too long.
    Long {
        /// Bytes allowed.
        limit: usize,
    },
    /// A list too long.
    Many {
        /// Elements allowed.
        limit: usize,
    },
    /// Characters outside the set: a control character in a text for people,
    /// or anything but letters, digits and `._-` in an identifier.
    Characters,
    /// A number out of its range.
    Range {
        /// The number.
        value: u64,
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
}

impl ControlError {
    pub(crate) fn unknown(kind: &str) -> Self {
        let kind = excerpt(kind);
        Self::Unknown { kind }
    }

    pub(crate) fn malformed(error: serde_json::Error) -> Self {
        Self::Malformed {
            column: error.column(),
            reason: excerpt(&error.to_string()),
        }
    }
}

/// What may be repeated of a stranger's text: short, and nothing that moves a
/// terminal's cursor.
pub(super) fn excerpt(text: &str) -> Box<str> {
    text.chars()
        .take(120)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { length, limit } => {
                write!(
                    f,
                    "the control message has {length} bytes, {limit} are allowed"
                )
            }
            Self::TooDeep => f.write_str("the control message is nested too deep"),
            Self::Malformed { reason, .. } => {
                write!(f, "the control message cannot be read: {reason}")
            }
            Self::Unknown { kind } => write!(f, "control messages of kind {kind:?} are not known"),
            Self::Field { field, what } => write!(f, "`{field}` {what}"),
        }
    }
}

impl Error for ControlError {}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("is empty"),
            Self::Long { limit } => write!(f, "is longer than {limit} bytes"),
            Self::Many { limit } => write!(f, "has more than {limit} elements"),
            Self::Characters => f.write_str("has characters that it must not have"),
            Self::Range { value, min, max } => {
                write!(f, "is {value}, but must be {min} to {max}")
            }
        }
    }
}
