//! Commands and their answers: JSON arrays beside the visitors.

use serde_json::{Value, json};

use super::code;
use super::profile::Profile;

/// What a control frame says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Do something, and answer to this number.
    Request {
        /// The number.
        id: i64,
        /// What.
        command: Command,
    },
    /// The answer to one of ours.
    Reply {
        /// Its number.
        id: i64,
        /// Whether it is yes.
        good: bool,
    },
    /// Something went wrong over there.
    Notice,
}

/// What a client may want.
#[derive(Clone, PartialEq, Eq)]
pub enum Command {
    /// To log in, or to serve more.
    AddToken(String),
    /// To serve less: what this token was for, or everything.
    DeleteToken(Option<String>),
    /// To be given a token by the gateway.
    Pair,
    /// To know whether we are there.
    Hello,
    /// Something that we do not know.
    Unknown,
    /// Something that we do, but not like this.
    Malformed,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Command::AddToken(_) => "AddToken(…)",
            Command::DeleteToken(Some(_)) => "DeleteToken(…)",
            Command::DeleteToken(None) => "DeleteToken(*)",
            Command::Pair => "Pair",
            Command::Hello => "Hello",
            Command::Unknown => "Unknown",
            Command::Malformed => "Malformed",
        })
    }
}

/// Why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs: see [`code`].
    pub code: &'static str,
    /// For people.
    pub message: &'static str,
}

impl Failure {
    /// The body of an `error` frame.
    pub fn body(&self) -> String {
        self.json().to_string()
    }

    fn json(&self) -> Value {
        json!({ "message": self.message, "code": self.code })
    }
}

impl Heard {
    /// Reads the body of a control frame.
    pub fn parse(body: &[u8]) -> Result<Heard, Failure> {
        let malformed = Failure {
            code: code::BAD_COMMAND,
            message: "a command is an array of its number, its name and what belongs to it",
        };
        let fields: Vec<Value> = serde_json::from_slice(body).map_err(|_| malformed)?;
        let id = fields.first().and_then(number).ok_or(malformed)?;
        match id {
            0 => Ok(Heard::Notice),
            ..0 => Ok(Heard::Reply {
                id: id.checked_neg().ok_or(malformed)?,
                good: fields.get(1).is_none_or(Value::is_null),
            }),
            1.. => {
                let name = fields.get(1).and_then(Value::as_str).ok_or(malformed)?;
                let command = Command::of(name, fields.get(2));
                Ok(Heard::Request { id, command })
            }
        }
    }
}

impl Command {
    fn of(name: &str, argument: Option<&Value>) -> Command {
        let text = argument.and_then(Value::as_str);
        match name {
            "add_token" => text.map_or(Command::Malformed, |t| Command::AddToken(t.to_owned())),
            "auth" | "authn" | "authz" => match (text, argument.and_then(Value::as_object)) {
                (Some(token), _) => Command::AddToken(token.to_owned()),
                (None, Some(object)) => ["token", "jwt", "access_token"]
                    .iter()
                    .find_map(|key| object.get(*key)?.as_str())
                    .map_or(Command::Pair, |t| Command::AddToken(t.to_owned())),
                (None, None) => Command::Malformed,
            },
            "delete_token" => match text {
                Some("*") => Command::DeleteToken(None),
                Some(token) => Command::DeleteToken(Some(token.to_owned())),
                None => Command::Malformed,
            },
            "hello" => Command::Hello,
            _ => Command::Unknown,
        }
    }
}

/// Numbers are made with care or by chance, but are whole and not large.
fn number(value: &Value) -> Option<i64> {
    const LARGEST: i64 = 1 << 53;
    let whole = value.as_i64().or_else(|| {
        let float = value.as_f64()?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "whole and small, as checked"
        )]
        (float.fract() == 0.0 && float.abs() < LARGEST as f64).then_some(float as i64)
    })?;
    (-LARGEST..=LARGEST).contains(&whole).then_some(whole)
}

/// Our greeting, and the commands that we take.
pub fn hello(profile: Profile) -> String {
    let all = ["add_token", "delete_token", "auth", "authn", "authz"];
    let known = match profile {
        Profile::Node2018 => &all[..],
        Profile::Node2017 | Profile::Go2017 | Profile::Go2020 => &all[..2],
    };
    json!([1, "hello", [1], known]).to_string()
}

/// Yes.
pub fn succeeded(id: i64) -> String {
    json!([-id, null]).to_string()
}

/// No, and why.
pub fn failed(id: i64, failure: Failure) -> String {
    json!([-id, failure.json()]).to_string()
}

/// Something went wrong that nobody asked for.
pub fn notice(failure: Failure) -> String {
    json!([0, failure.json()]).to_string()
}

/// What a client is told that it may serve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// What it is reached by, where that is not a name of its own.
    pub host: String,
    /// Names.
    pub names: Vec<String>,
    /// The port that names are reached on.
    pub port: u16,
    /// TCP ports of its own.
    pub ports: Vec<u16>,
}

impl Grant {
    /// As a command.
    pub fn command(&self) -> String {
        let Grant { host, ports, .. } = self;
        let mut list = Vec::new();
        for name in &self.names {
            list.push(json!(["ssh+https", name, self.port]));
            list.push(json!(["https", name]));
        }
        if !ports.is_empty() {
            list.push(json!(["ssh", host, ports]));
            list.push(json!(["tcp", host, ports]));
        }
        json!([2, "grant", list]).to_string()
    }
}
