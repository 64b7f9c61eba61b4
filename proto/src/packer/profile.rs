//! Who speaks it, and what each can bear.

use std::fmt;
use std::str::FromStr;

/// A kind of client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Profile {
    /// The clients for Node of 2017: a token in the address, five fields.
    Node2017,
    /// The one of 2018 and later: logs in after the upgrade, seven fields.
    Node2018,
    /// The one in Go of 2017: whatever it does not know makes it drop the connection.
    Go2017,
    /// The one in Go of 2020: seven fields, no commands.
    Go2020,
}

/// The body of a word that has nothing to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bodies {
    /// None.
    Empty,
    /// One space: a frame without a body is not seen until the next one.
    Space,
}

/// Where a request carried a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// In its query.
    Query,
    /// In a header.
    Header,
    /// Nowhere.
    None,
}

/// What is known of a client from its request to upgrade.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The path.
    pub path: &'a str,
    /// The query, without its question mark.
    pub query: &'a str,
    /// `User-Agent`.
    pub agent: &'a str,
    /// Where a token was.
    pub token: Token,
}

impl Asked<'_> {
    /// Who it is.
    pub fn profile(&self) -> Profile {
        let versions = self.query.split('&').any(|p| p.starts_with("versions="));
        let path = self.path.trim_end_matches('/');
        let go = self.agent.starts_with("Go-http-client");
        match self.token {
            _ if versions || path == "/ws" || path.ends_with("/ws") => Profile::Go2020,
            Token::Query if go => Profile::Go2017,
            Token::Query => Profile::Node2017,
            Token::Header if go => Profile::Go2020,
            Token::Header | Token::None => Profile::Node2018,
        }
    }
}

impl Profile {
    /// All of them.
    pub const ALL: [Profile; 4] = [
        Profile::Node2017,
        Profile::Node2018,
        Profile::Go2017,
        Profile::Go2020,
    ];

    /// Whether frames say which port and name a visitor asked for.
    pub fn names_visitors(self) -> bool {
        match self {
            Profile::Node2018 | Profile::Go2020 => true,
            Profile::Node2017 | Profile::Go2017 => false,
        }
    }

    /// Whether it takes commands and answers, `hello` first.
    pub fn commands(self) -> bool {
        match self {
            Profile::Node2017 | Profile::Node2018 => true,
            Profile::Go2017 | Profile::Go2020 => false,
        }
    }

    /// Whether it is told of a visitor before the visitor says anything.
    pub fn announces(self) -> bool {
        self == Profile::Node2018
    }

    /// Whether it knows what it was granted.
    pub fn takes_grants(self) -> bool {
        self == Profile::Node2018
    }

    /// Whether it stops and goes on when told so.
    pub fn pauses(self) -> bool {
        self.commands()
    }

    /// How it takes words that have nothing to say.
    pub fn bodies(self) -> Bodies {
        match self {
            Profile::Node2017 => Bodies::Space,
            Profile::Node2018 | Profile::Go2017 | Profile::Go2020 => Bodies::Empty,
        }
    }

    /// As configurations and lists call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Profile::Node2017 => "node-2017",
            Profile::Node2018 => "node-2018",
            Profile::Go2017 => "go-2017",
            Profile::Go2020 => "go-2020",
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No client is called this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown;

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not one of node-2017, node-2018, go-2017, go-2020")
    }
}

impl std::error::Error for Unknown {}

impl FromStr for Profile {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Profile, Unknown> {
        let found = Profile::ALL.into_iter().find(|p| p.as_str() == text);
        found.ok_or(Unknown)
    }
}
