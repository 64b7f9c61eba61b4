//! The configuration, checked at once into types that need no further check.
//!
//! A key that does not exist is an error with the nearest one that does, so
//! that a slip of the pen never silently means the default.

mod acme;
pub(crate) mod check;
mod demo;
mod front;
pub mod import;
mod log;
mod nearest;
mod net;
mod raw;
mod secret;
pub mod serve;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rvpn_ipc::Class;
use rvpn_proto::control::Prefix;
use rvpn_proto::dialect::{Dialect as Variant, Padding};
use rvpn_proto::name::{Name, Pattern};
use rvpn_proto::packer::Profile;

pub use self::net::{Names, Network, host_of};
pub use self::secret::Secret;
pub use self::serve::Serve;

/// Everything the operator decides.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where keys made by the gateway, the store and the meter live.
    pub state_dir: PathBuf,
    /// Whom to become when started as root: user and group.
    pub user: Option<(u32, u32)>,
    /// Host names the gateway answers to, beside addresses.
    pub names: Names,
    /// Pages of other origins that may open a WebSocket, as `https://host[:port]`.
    pub allowed_origins: Vec<String>,
    /// Where clients come in.
    pub listeners: Vec<Listener>,
    /// Certificate files; without them one is made and kept in the state directory.
    pub certificate: Option<CertificateFiles>,
    /// Certificates to be got and renewed by themselves.
    pub acme: Option<Acme>,
    /// Certificates of more names.
    pub certificates: Vec<NamedCertificate>,
    /// Where visitors go who speak neither TLS nor HTTP.
    pub front: FrontSettings,
    /// Where operators come in.
    pub admin: AdminAddress,
    /// Host names of the admin listener, beside loopback addresses and `localhost`.
    pub admin_names: Vec<String>,
    /// Host names under which operators come in by the public port too.
    pub admin_public: Vec<String>,
    /// The helper.
    pub helper: HelperSettings,
    /// Whose tokens are accepted under the strict policy.
    pub keys: Vec<Key>,
    /// Whose tokens are accepted under the legacy policy, each for its own.
    pub legacy: Vec<Legacy>,
    /// Paths of older clients.
    pub dialects: Vec<Arc<Dialect>>,
    /// Whether browsers find the client page.
    pub page: bool,
    /// The first demonstration's endpoint; none unless asked for.
    pub demo: Option<Demo>,
    /// Older reverse tunnel clients.
    pub packer: Packer,
    /// What clients serve to the world.
    pub serve: Serve,
    /// Bounds.
    pub limits: Limits,
    /// About sessions.
    pub session: SessionSettings,
    /// About logs.
    pub log: Log,
    /// Whether the process locks itself in. Only ever off by explicit word.
    pub sandbox: bool,
}

/// A public listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where.
    pub address: SocketAddr,
    /// What is expected first.
    pub mode: Mode,
    /// Who may say, by PROXY v2, on whose behalf it connects.
    pub proxy_from: Vec<Network>,
    /// Who may say it by `X-Forwarded-For`, whose last entry counts.
    pub forwarded_from: Vec<Network>,
}

/// What a listener expects of a connection's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// TLS.
    Tls,
    /// HTTP, because a proxy in front does TLS.
    Plain,
    /// Either, by the first byte.
    Auto,
}

/// A certificate chain and its key, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The chain, leaf first.
    pub chain: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// An authority that signs certificates, and for which names it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acme {
    /// Where the authority's addresses are.
    pub directory: Arc<str>,
    /// Whom it may write to, as URLs.
    pub contact: Vec<String>,
    /// Whom to believe about the authority's own certificate, PEM.
    pub ca_file: PathBuf,
    /// The gateway's own names.
    pub names: Vec<Name>,
    /// Whether also names whose TLS is ended here for clients that serve them.
    pub served: bool,
    /// How the authority may check that a name leads here.
    pub challenge: Challenges,
}

/// Ways of checking a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Challenges {
    /// Nothing else.
    Only(ChallengeKind),
    /// By TLS first, then by HTTP.
    Both,
}

impl Challenges {
    /// In the order in which they are tried.
    pub fn kinds(self) -> Vec<ChallengeKind> {
        match self {
            Challenges::Only(kind) => vec![kind],
            Challenges::Both => vec![ChallengeKind::TlsAlpn01, ChallengeKind::Http01],
        }
    }
}

/// One way of checking a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChallengeKind {
    /// By TLS, on the port that serves everything (RFC 8737).
    TlsAlpn01,
    /// By HTTP in the clear, which authorities try on port 80 (RFC 8555, 8.3).
    Http01,
}

impl ChallengeKind {
    /// As the standards call it.
    pub fn as_str(self) -> &'static str {
        match self {
            ChallengeKind::TlsAlpn01 => "tls-alpn-01",
            ChallengeKind::Http01 => "http-01",
        }
    }
}

/// A certificate for some names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedCertificate {
    /// Exact or with a wildcard.
    pub names: Vec<Pattern>,
    /// Where it is.
    pub files: CertificateFiles,
}

/// Who serves visitors that do not say for whom they come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrontSettings {
    /// Those who speak SSH.
    pub ssh: Option<Name>,
    /// Those who speak something else.
    pub other: Option<Name>,
    /// Those who wait to be spoken to.
    pub silent: Option<Name>,
    /// What those hear whom nobody serves.
    pub unknown: Unknown,
}

/// What is said to whoever speaks something that nobody here understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unknown {
    /// Nothing.
    #[default]
    Close,
    /// That it is not understood, in JSON.
    Json,
}

/// Where the admin API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddress {
    /// A loopback address. Callers need the admin token.
    Tcp(SocketAddr),
    /// A socket file. Whoever may open it may do everything.
    Unix(PathBuf),
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminAddress::Tcp(address) => write!(f, "http://{address}"),
            AdminAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// How to find the helper and know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperSettings {
    /// Its socket.
    pub socket: PathBuf,
    /// The user it runs as.
    pub uid: u32,
}

/// Keys of one issuer.
#[derive(Clone, Debug)]
pub struct Key {
    /// Its `kid`, and what it is called in logs.
    pub name: Arc<str>,
    /// Where the key is.
    pub source: KeySource,
    /// `iss` that its tokens must have.
    pub issuer: Option<String>,
    /// `aud` that its tokens must have. Without it they must have none.
    pub audience: Option<String>,
    /// The helper's policy class for those who log in with it.
    pub class: Class,
}

/// Where keys come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// One public key, PEM.
    Pem {
        /// The only algorithm it is good for.
        algorithm: Algorithm,
        /// The file.
        file: PathBuf,
    },
    /// A shared secret for HS256, at least 32 bytes.
    Secret(Secret),
    /// A JWK set in a file.
    JwksFile(PathBuf),
    /// A JWK set fetched by HTTPS, and again when a token names a key it has not.
    JwksUrl {
        /// Where.
        url: Arc<str>,
        /// Whom to believe about it, PEM.
        ca_file: PathBuf,
    },
}

/// Signatures that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Ed25519.
    EdDsa,
    /// ECDSA on P-256.
    Es256,
    /// RSA, PKCS #1 v1.5.
    Rs256,
}

/// Older clients whose tokens are looser: a shared secret of any length, no expiry needed.
#[derive(Clone, Debug)]
pub struct Legacy {
    /// Its name; its account is `legacy:<name>`.
    pub name: Arc<str>,
    /// The account.
    pub account: Arc<str>,
    /// HS256.
    pub secret: Secret,
    /// Names that its tokens may speak for.
    pub domains: Vec<Pattern>,
    /// TCP ports of the gateway that its tokens may ask for.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Which older reverse tunnel client its users have, if that is to be
    /// known without looking.
    pub profile: Option<Profile>,
    /// The helper's policy class.
    pub class: Class,
}

/// A path on which older clients find their gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// The path, with its leading slash.
    pub path: String,
    /// Which of the four.
    pub variant: Variant,
    /// With a token: the only account let in. Anonymous: who pays.
    pub account: Option<Arc<str>>,
    /// Whether a token is not needed.
    pub anonymous: bool,
    /// Whose tokens are accepted: a `[[legacy]]` block's instead of the strict ones.
    pub legacy: Option<Arc<str>>,
    /// The helper's policy class for anonymous clients.
    pub class: Class,
    /// What hides lengths and silences.
    pub padding: Padding,
}

/// The first demonstration: a text to everybody who listens, every few seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demo {
    /// Whether a token is not needed.
    pub anonymous: bool,
    /// The time between two texts.
    pub every: Duration,
    /// How many may listen at once.
    pub clients: usize,
}

/// How older reverse tunnel clients are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packer {
    /// Whether they are.
    pub enabled: bool,
    /// Which all of them are, where a proxy hides what tells them apart.
    pub profile: Option<Profile>,
}

/// Bounds on what others can make us hold or do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once.
    pub max_clients: usize,
    /// Connections of one account at once. One that was lost without a word
    /// counts until its keepalive runs out.
    pub sessions_per_account: usize,
    /// Connections that have not logged in yet.
    pub pending: usize,
    /// Of these, from one IPv4 address or IPv6 /64.
    pub pending_per_address: usize,
    /// TLS handshakes at once.
    pub handshakes: usize,
    /// Failed logins from one IPv4 address or IPv6 /64, at once and then per minute.
    pub login_failures: u32,
    /// How long a connection may take to each of: first bytes, TLS, a whole request head.
    pub login_time: Duration,
    /// How long a shutdown waits for clients to leave.
    pub drain_time: Duration,
    /// Bytes that packets waiting for all clients together may take.
    pub queue_memory: usize,
}

/// What sessions are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSettings {
    /// How long a resume ticket is good.
    pub ticket_life: Duration,
    /// Resolvers for clients.
    pub dns: Vec<IpAddr>,
    /// Destinations that clients are told to send here.
    pub routes: Vec<Prefix>,
    /// Data threads; 0 is one per CPU.
    pub cores: usize,
    /// Whether each is kept on a CPU.
    pub pin: bool,
}

/// What is logged and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// A filter in the manner of `info,rvpn_gateway=debug`.
    pub filter: String,
    /// One JSON object a line.
    pub json: bool,
    /// Where it goes.
    pub to: LogTo,
}

/// Where a log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTo {
    /// Where a service manager collects it.
    Stderr,
    /// For a pipe.
    Stdout,
    /// Nowhere.
    Nowhere,
    /// Into a file that is set aside when it is large.
    File(LogFile),
}

/// A file and those before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFile {
    /// Its name; those set aside have a time behind it.
    pub path: PathBuf,
    /// How large it may become, in bytes.
    pub rotate: u64,
    /// How many are kept beside it; all if 0.
    pub keep: usize,
    /// How long they are kept; without end if there is none.
    pub keep_for: Option<Duration>,
}

/// Why a configuration is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is not TOML, or not of our kind.
    #[error("{path}{line}: {message}")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where, as `:line`.
        line: String,
        /// What and what instead.
        message: String,
    },
    /// It is, but says what cannot be.
    #[error("{0}")]
    Invalid(String),
}

impl Config {
    /// Reads and checks a file. `env` gives the values of the few `RVPN_…`
    /// variables that win over it.
    pub fn load(path: &Path, env: impl Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read {
            path: path.to_owned(),
            error,
        })?;
        Config::parse(&text, path, env)
    }

    /// Checks the text of a file. Relative paths in it are relative to it.
    pub fn parse(
        text: &str,
        path: &Path,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigError> {
        let raw: raw::Raw = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            line: error.span().map_or_else(String::new, |span| {
                let before = text.get(..span.start).unwrap_or(text);
                format!(":{}", before.matches('\n').count() + 1)
            }),
            message: nearest::suggest(error.message()),
        })?;
        let base = path.parent().unwrap_or(Path::new(""));
        check::check(raw, base, env).map_err(ConfigError::Invalid)
    }

    /// Whether operators may ask for this host.
    pub fn is_admin_name(&self, name: &str) -> bool {
        let mut names = self.admin_names.iter().chain(&self.admin_public);
        names.any(|n| n == name)
    }

    /// Puts back what cannot change while the process runs, and names it.
    pub fn keep_fixed(&mut self, old: &Config) -> Vec<&'static str> {
        fn keep<T: Clone + PartialEq>(
            new: &mut T,
            old: &T,
            what: &'static str,
            found: &mut Vec<&'static str>,
        ) {
            if new != old {
                new.clone_from(old);
                found.push(what);
            }
        }
        let mut found = Vec::new();
        keep(&mut self.state_dir, &old.state_dir, "state-dir", &mut found);
        keep(&mut self.user, &old.user, "user", &mut found);
        keep(&mut self.admin, &old.admin, "admin", &mut found);
        keep(&mut self.helper, &old.helper, "helper", &mut found);
        keep(&mut self.session, &old.session, "session", &mut found);
        keep(&mut self.log, &old.log, "log", &mut found);
        keep(&mut self.sandbox, &old.sandbox, "sandbox", &mut found);
        let (new, old) = (&mut self.limits, &old.limits);
        keep(
            &mut new.max_clients,
            &old.max_clients,
            "limits.max-clients",
            &mut found,
        );
        keep(
            &mut new.handshakes,
            &old.handshakes,
            "limits.handshakes",
            &mut found,
        );
        keep(
            &mut new.queue_memory,
            &old.queue_memory,
            "limits.queue-mib",
            &mut found,
        );
        found
    }
}

#[cfg(test)]
mod tests;
