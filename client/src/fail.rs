//! How a command fails: what, why, what to do, and a status that says which kind.

use std::fmt;
use std::process::ExitCode;

/// The ways in which a command fails, each an exit status of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Wrong usage.
    Usage,
    /// The gateway, a device or a file is not to be had now.
    Unavailable,
    /// A failure of this program or of the system.
    Internal,
    /// The other side does not speak as it should, or is not who it should be.
    Protocol,
    /// Not allowed: the login was refused, or rights are missing.
    Refused,
    /// A file that configures this program.
    Config,
}

impl Kind {
    fn status(self) -> u8 {
        match self {
            Kind::Usage => 1,
            Kind::Unavailable => 69,
            Kind::Internal => 70,
            Kind::Protocol => 76,
            Kind::Refused => 77,
            Kind::Config => 78,
        }
    }
}

/// Why a command failed, for its user.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// Which kind.
    pub(crate) kind: Kind,
    message: String,
}

/// What commands return.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// Of this kind. The message names the value and the remedy.
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure {
            kind,
            message: message.into(),
        }
    }

    /// Wrong usage.
    pub(crate) fn usage(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Usage, message)
    }

    /// Something is not to be had.
    pub(crate) fn unavailable(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Unavailable, message)
    }

    /// The system failed at what it should do.
    pub(crate) fn internal(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Internal, message)
    }

    /// Its exit status.
    pub(crate) fn exit(&self) -> ExitCode {
        ExitCode::from(self.kind.status())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Says what was being done when an error came.
pub(crate) trait While<T> {
    /// A failure of the system, with what was being done.
    fn while_doing(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: fmt::Display> While<T> for Result<T, E> {
    fn while_doing(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure::internal(format!("cannot {what}: {error}")))
    }
}
