//! What the API shows.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::UNIX_EPOCH;

use serde::Serialize;

use super::SessionDirectory;
use crate::config::{AdminAddress, Config, Mode};
use crate::meter::{Side, Totals, Usage};
use crate::session::Sessions;

/// One way through the tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counts {
    /// Packets passed on.
    pub packets: u64,
    /// Their bytes.
    pub payload: u64,
    /// Bytes on the socket, everything included.
    pub wire: u64,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<&'static str, u64>,
}

impl From<&Side> for Counts {
    fn from(side: &Side) -> Counts {
        Counts {
            packets: side.packets,
            payload: side.payload,
            wire: side.wire,
            drops: side.dropped().map(|(why, n)| (why.name(), n)).collect(),
        }
    }
}

/// A session that is running.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SessionRow {
    /// Its number.
    #[serde(serialize_with = "hex")]
    pub id: u128,
    /// Who pays.
    pub account: String,
    /// What it speaks.
    pub service: String,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// Its addresses outside its own view.
    pub addresses: Vec<IpAddr>,
    /// Its slot of the pool; without one it holds no addresses.
    pub slot: Option<u32>,
    /// Client to Internet.
    pub outbound: Counts,
    /// Internet to client.
    pub inbound: Counts,
    /// What waits for the client.
    pub queue: QueueRow,
}

/// A session's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct QueueRow {
    /// Packets that wait, the parts of a super-packet singly.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Memory that is kept for them.
    pub memory: u64,
}

/// A session of the ledger.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct UsageRow {
    /// Its number.
    #[serde(serialize_with = "hex")]
    pub session: u128,
    /// Who pays.
    pub account: String,
    /// What it spoke.
    pub service: String,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// When it ended.
    pub ended_ms: Option<u64>,
    /// Client to Internet.
    pub outbound: Counts,
    /// Internet to client.
    pub inbound: Counts,
}

fn hex<S: serde::Serializer>(id: &u128, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{id:032x}"))
}

fn both(totals: &Totals) -> (Counts, Counts) {
    ((&totals.outbound).into(), (&totals.inbound).into())
}

impl From<Usage> for UsageRow {
    fn from(usage: Usage) -> UsageRow {
        let (outbound, inbound) = both(&usage.totals);
        UsageRow {
            session: usage.session,
            account: usage.account,
            service: usage.service,
            started_ms: usage.started_ms,
            ended_ms: usage.ended_ms,
            outbound,
            inbound,
        }
    }
}

impl SessionDirectory for Sessions {
    fn list(&self) -> Vec<SessionRow> {
        let rows = self.0.list().into_iter();
        rows.map(|one| {
            let (outbound, inbound) = both(&one.totals);
            let depth = one.card.gauge.depth();
            let since = one.card.started.duration_since(UNIX_EPOCH);
            SessionRow {
                id: one.card.id,
                account: one.card.account.to_string(),
                service: one.card.service.to_owned(),
                peer: one.card.peer,
                started_ms: since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
                addresses: one.card.addresses,
                slot: one.card.slot,
                outbound,
                inbound,
                queue: QueueRow {
                    packets: depth.packets,
                    bytes: depth.bytes,
                    memory: depth.memory,
                },
            }
        })
        .collect()
    }

    fn kick(&self, id: u128) -> bool {
        self.0.kick(id)
    }
}

/// The configuration without what must not be shown.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Summary {
    names: Vec<String>,
    listeners: Vec<String>,
    admin: String,
    self_signed: bool,
    fingerprint: String,
    keys: Vec<KeySummary>,
    legacy: Vec<String>,
    dialects: Vec<DialectSummary>,
    page: bool,
    demo: Option<DemoSummary>,
    sandbox: bool,
    limits: LimitSummary,
}

/// A key and what it is good for.
#[derive(Debug, Serialize)]
pub(super) struct KeySummary {
    pub(super) name: String,
    pub(super) algorithm: &'static str,
}

#[derive(Debug, Serialize)]
struct DialectSummary {
    path: String,
    kind: &'static str,
    access: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct DemoSummary {
    anonymous: bool,
    every_seconds: u64,
    clients: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct LimitSummary {
    max_clients: usize,
    sessions_per_account: usize,
    pending: usize,
    pending_per_address: usize,
    handshakes: usize,
    login_failures: u32,
    login_seconds: u64,
    drain_seconds: u64,
}

impl Summary {
    pub(super) fn of(
        config: &Config,
        keys: Vec<(String, &'static str)>,
        self_signed: bool,
        fingerprint: String,
    ) -> Summary {
        let listeners = config.listeners.iter().map(|l| {
            let mode = match l.mode {
                Mode::Tls => "tls",
                Mode::Plain => "plain",
                Mode::Auto => "auto",
            };
            format!("{} {mode}", l.address)
        });
        let dialects = config.dialects.iter().map(|d| DialectSummary {
            path: d.path.clone(),
            kind: d.variant.name(),
            access: match (&d.legacy, d.anonymous) {
                (Some(_), _) => "legacy",
                (None, true) => "anonymous",
                (None, false) => "strict",
            },
        });
        let limits = &config.limits;
        Summary {
            names: config.names.all().to_vec(),
            listeners: listeners.collect(),
            admin: match &config.admin {
                AdminAddress::Tcp(address) => address.to_string(),
                AdminAddress::Unix(path) => path.display().to_string(),
            },
            self_signed,
            fingerprint,
            keys: keys
                .into_iter()
                .map(|(name, algorithm)| KeySummary { name, algorithm })
                .collect(),
            legacy: config.legacy.iter().map(|l| l.name.to_string()).collect(),
            dialects: dialects.collect(),
            page: config.page,
            demo: config.demo.map(|demo| DemoSummary {
                anonymous: demo.anonymous,
                every_seconds: demo.every.as_secs(),
                clients: demo.clients,
            }),
            sandbox: config.sandbox,
            limits: LimitSummary {
                max_clients: limits.max_clients,
                sessions_per_account: limits.sessions_per_account,
                pending: limits.pending,
                pending_per_address: limits.pending_per_address,
                handshakes: limits.handshakes,
                login_failures: limits.login_failures,
                login_seconds: limits.login_time.as_secs(),
                drain_seconds: limits.drain_time.as_secs(),
            },
        }
    }
}
