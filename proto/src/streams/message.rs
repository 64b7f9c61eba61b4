//! Control messages: who serves what, and under which address.

use serde::{Deserialize, Serialize};

use super::check;
use crate::control::{self, ControlError, ErrorNotice, Goodbye, Stage};

/// A control message of `rvpn.streams.1`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Message {
    /// The client's first message.
    Hello(Hello),
    /// The gateway's answer to it.
    Welcome(Welcome),
    /// Something that the client would like to serve.
    Serve(Serve),
    /// It is served, and where.
    Serving(Serving),
    /// It is not, and why.
    Refused(Turned),
    /// The client serves something no longer.
    Withdraw(Withdraw),
    /// How many visitors there are and were.
    Counts(Counts),
    /// The sender closes next, and why.
    Goodbye(Goodbye),
    /// A message could not be used; the connection goes on.
    Error(ErrorNotice),
}

/// Who a client is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol versions it speaks, best first.
    pub versions: Vec<u16>,
    /// Program and version, for people.
    pub name: String,
    /// Names this installation for good: its next connection takes over from the last.
    pub instance: String,
    /// How often it would like to ping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive_s: Option<u16>,
}

/// On which terms the client serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that is spoken from now on, one of the client's.
    pub version: u16,
    /// Program and version, for people.
    pub name: String,
    /// Names the session in logs and lists at both ends.
    pub session: String,
    /// How often the client must ping, or send anything else.
    pub keepalive_s: u16,
    /// What the gateway accepts.
    pub limits: Capacity,
    /// Names that this login may serve, `*.` for all below one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// TCP ports of the gateway that it may.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

/// What the gateway accepts of a client that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Streams at the same time.
    pub streams: u32,
    /// Things that are served at the same time.
    pub offers: u32,
    /// Bytes of a binary message.
    pub max_message: u32,
    /// Bytes of a text message.
    pub max_control: u32,
}

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offered {
    /// HTTP in the clear, as the client's own server speaks it.
    Http,
    /// TLS, passed on untouched: the client's server has the certificate.
    Tls,
    /// SSH on the shared port.
    Ssh,
    /// Anything, on a port of the gateway that is the client's own.
    Tcp,
}

impl Offered {
    /// Its word in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Offered::Http => "http",
            Offered::Tls => "tls",
            Offered::Ssh => "ssh",
            Offered::Tcp => "tcp",
        }
    }
}

/// Something that a client would like to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serve {
    /// Chosen by the client: comes back in answers, and with every visitor.
    pub id: u32,
    /// What.
    pub service: Offered,
    /// Under which name: a whole one, `*.` and a name, or a single label below
    /// what the login may serve. The gateway chooses if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// On which port of the gateway, for [`Offered::Tcp`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Where visitors' TLS ends; for HTTP at the gateway, for TLS at the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<Ending>,
}

/// Where TLS ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The gateway has the certificate.
    Gateway,
    /// The client has.
    Client,
}

/// Something is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// What.
    pub id: u32,
    /// Where visitors find it.
    pub at: ServedAs,
}

/// Where visitors find something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedAs {
    /// The name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The gateway's port, if it has one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// As visitors type it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}

/// Something is not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turned {
    /// What.
    pub id: u32,
    /// For programs: `claim`, `reserved`, `taken`, `port`, `name`, `limit` or a later one.
    pub code: String,
    /// For people.
    #[serde(default)]
    pub text: String,
    /// What to do about it, for people.
    #[serde(default)]
    pub remedy: String,
}

/// Something is served no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withdraw {
    /// What.
    pub id: u32,
}

/// Visitors as the gateway sees them, since the session began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// There now.
    pub open: u32,
    /// All that were let through.
    pub total: u64,
    /// Those that were not, because there were too many or nobody answered.
    pub turned_away: u64,
}

impl Message {
    /// Reads a text message.
    pub fn parse(text: &str, stage: Stage) -> Result<Self, ControlError> {
        let kind = control::envelope(text, stage)?;
        let message = match kind.as_str() {
            "hello" => Self::Hello(control::read(text)?),
            "welcome" => Self::Welcome(control::read(text)?),
            "serve" => Self::Serve(control::read(text)?),
            "serving" => Self::Serving(control::read(text)?),
            "refused" => Self::Refused(control::read(text)?),
            "withdraw" => Self::Withdraw(control::read(text)?),
            "counts" => Self::Counts(control::read(text)?),
            "goodbye" => Self::Goodbye(control::read(text)?),
            "error" => Self::Error(control::read(text)?),
            unknown => return Err(ControlError::unknown(unknown)),
        };
        check::message(&message)?;
        Ok(message)
    }

    /// Writes the message, if the other side would accept it.
    pub fn to_text(&self, stage: Stage) -> Result<String, ControlError> {
        check::message(self)?;
        control::write(self, stage)
    }
}
