//! The file as it is written.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;

use super::secret::Secret;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) state_dir: Option<PathBuf>,
    pub(super) user: Option<User>,
    #[serde(default)]
    pub(super) names: Vec<String>,
    #[serde(default)]
    pub(super) allowed_origins: Vec<String>,
    #[serde(default)]
    pub(super) sandbox: Switch,
    #[serde(default)]
    pub(super) page: Switch,
    #[serde(default)]
    pub(super) listener: Vec<Listener>,
    pub(super) tls: Option<Tls>,
    pub(super) acme: Option<Acme>,
    #[serde(default)]
    pub(super) certificate: Vec<Certificate>,
    #[serde(default)]
    pub(super) front: Front,
    #[serde(default)]
    pub(super) admin: Admin,
    #[serde(default)]
    pub(super) helper: Helper,
    #[serde(default)]
    pub(super) key: Vec<Key>,
    #[serde(default)]
    pub(super) legacy: Vec<Legacy>,
    #[serde(default)]
    pub(super) dialect: Vec<Dialect>,
    #[serde(default)]
    pub(super) demo: Demo,
    #[serde(default)]
    pub(super) packer: Packer,
    #[serde(default)]
    pub(super) serve: Serve,
    #[serde(default)]
    pub(super) name: Vec<Name>,
    #[serde(default)]
    pub(super) limits: Limits,
    #[serde(default)]
    pub(super) session: Session,
    #[serde(default)]
    pub(super) log: Log,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Switch {
    #[default]
    On,
    Off,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Listener {
    pub(super) address: SocketAddr,
    #[serde(default)]
    pub(super) mode: Mode,
    #[serde(default)]
    pub(super) proxy_from: Vec<String>,
    #[serde(default)]
    pub(super) forwarded_from: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    #[default]
    Auto,
    Tls,
    Plain,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Tls {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Certificate {
    pub(super) names: Vec<String>,
    pub(super) chain: PathBuf,
    pub(super) key: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Front {
    pub(super) default_service: Option<String>,
    pub(super) ssh: Option<String>,
    pub(super) silent: Option<String>,
    #[serde(default)]
    pub(super) unknown: Unknown,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Unknown {
    #[default]
    Close,
    Json,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Acme {
    pub(super) directory: Option<String>,
    pub(super) contact: Option<OneOrMany>,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) names: Option<Vec<String>>,
    #[serde(default)]
    pub(super) served: bool,
    #[serde(default)]
    pub(super) challenge: Challenge,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub(super) fn many(self) -> Vec<String> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Challenge {
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn01,
    #[serde(rename = "http-01")]
    Http01,
    #[default]
    Both,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Admin {
    pub(super) address: Option<String>,
    #[serde(default)]
    pub(super) names: Vec<String>,
    #[serde(default)]
    pub(super) public: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Helper {
    pub(super) socket: Option<PathBuf>,
    pub(super) user: Option<User>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum User {
    Uid(u32),
    Name(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) algorithm: Option<String>,
    pub(super) file: Option<PathBuf>,
    pub(super) secret_file: Option<PathBuf>,
    pub(super) jwks_file: Option<PathBuf>,
    pub(super) jwks_url: Option<String>,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) issuer: Option<String>,
    pub(super) audience: Option<String>,
    #[serde(default)]
    pub(super) class: u8,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Legacy {
    pub(super) name: String,
    pub(super) secret: Option<Secret>,
    pub(super) secret_file: Option<PathBuf>,
    #[serde(default)]
    pub(super) domains: Vec<String>,
    #[serde(default)]
    pub(super) ports: Vec<Ports>,
    pub(super) profile: Option<String>,
    #[serde(default)]
    pub(super) class: u8,
}

/// One port, or several as `first-last`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Ports {
    One(u16),
    Several(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Packer {
    pub(super) enabled: Option<bool>,
    pub(super) profile: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Dialect {
    pub(super) path: String,
    #[serde(default)]
    pub(super) kind: DialectKind,
    pub(super) account: Option<String>,
    #[serde(default)]
    pub(super) anonymous: bool,
    pub(super) legacy: Option<String>,
    #[serde(default)]
    pub(super) class: u8,
    pub(super) padding: Option<Padding>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum DialectKind {
    #[serde(alias = "snat-raw")]
    Raw,
    #[serde(alias = "text-v4")]
    Text4,
    #[serde(alias = "text-dual")]
    Text46,
    #[default]
    Padded,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Padding {
    Named(String),
    Own(OwnPadding),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct OwnPadding {
    pub(super) bytes: (u16, u16),
    pub(super) noise_bytes: Option<(u16, u16)>,
    pub(super) noise_every_ms: Option<(u32, u32)>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Limits {
    pub(super) max_clients: Option<usize>,
    pub(super) sessions_per_account: Option<usize>,
    pub(super) pending: Option<usize>,
    pub(super) pending_per_address: Option<usize>,
    pub(super) handshakes: Option<usize>,
    pub(super) login_failures: Option<u32>,
    pub(super) login_seconds: Option<u64>,
    pub(super) drain_seconds: Option<u64>,
    pub(super) queue_mib: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Demo {
    #[serde(default)]
    pub(super) echo: bool,
    #[serde(default)]
    pub(super) anonymous: bool,
    pub(super) every_seconds: Option<u64>,
    pub(super) clients: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Serve {
    pub(super) domain: Option<String>,
    #[serde(default)]
    pub(super) reserved: Vec<String>,
    pub(super) balance: Option<super::serve::Balance>,
    pub(super) visitors_per_account: Option<usize>,
    pub(super) idle_seconds: Option<u64>,
    pub(super) strict_ports: Option<bool>,
    #[serde(default)]
    pub(super) dead_time: DeadTime,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct DeadTime {
    pub(super) dwell: Option<u64>,
    pub(super) idle: Option<u64>,
    pub(super) cancel_check: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Name {
    pub(super) pattern: String,
    pub(super) http: Option<super::serve::Http>,
    pub(super) tls: Option<super::serve::Tls>,
    pub(super) balance: Option<super::serve::Balance>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Session {
    pub(super) ticket_seconds: Option<u64>,
    #[serde(default)]
    pub(super) dns: Vec<IpAddr>,
    pub(super) routes: Option<Vec<String>>,
    pub(super) cores: Option<usize>,
    pub(super) pin: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Log {
    pub(super) level: Option<String>,
    pub(super) format: Option<LogFormat>,
    pub(super) file: Option<String>,
    pub(super) rotate_mb: Option<u64>,
    pub(super) keep: Option<u64>,
    pub(super) keep_days: Option<u64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LogFormat {
    Text,
    Json,
}
