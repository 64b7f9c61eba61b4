//! `[serve]` and `[[name]]`: what clients serve to the world, and how.

use std::collections::HashMap;
use std::time::Duration;

use rvpn_proto::name::{Name, Pattern};
use serde::{Deserialize, Serialize};

use super::check::Checked;
use super::raw;

/// How visitors are spread over several clients of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// In turn.
    #[default]
    RoundRobin,
    /// To the one with the fewest visitors.
    LeastConnections,
    /// Those of one address to the same one.
    BySource,
}

impl Balance {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Balance::RoundRobin => "round-robin",
            Balance::LeastConnections => "least-connections",
            Balance::BySource => "by-source",
        }
    }
}

/// What happens to plain HTTP for a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Http {
    /// It goes to the client.
    #[default]
    Forward,
    /// Visitors are sent to https; challenges of certificate issuers go to the client.
    Redirect,
    /// Only those challenges are answered.
    AcmeOnly,
}

/// What happens to TLS for a name, whatever its server wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tls {
    /// Passed on untouched.
    Passthrough,
    /// Ended here.
    Terminate,
}

/// How names are treated that match a pattern.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Plain HTTP.
    pub http: Http,
    /// TLS; as its server wishes, if absent.
    pub tls: Option<Tls>,
    /// How visitors are spread; as for all names, if absent.
    pub balance: Option<Balance>,
}

/// The ancestor's three times, for those who look at the list of servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadTime {
    /// How often the list is tidied.
    pub dwell: Duration,
    /// How long one that has gone stays in it.
    pub idle: Duration,
    /// How soon a listener that was taken back ends.
    pub cancel_check: Duration,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Serve {
    /// Below it every account has a name of its own.
    pub domain: Option<Name>,
    /// Names that nobody serves, beside the gateway's own.
    pub reserved: Vec<Pattern>,
    /// How visitors are spread.
    pub balance: Balance,
    /// Visitors of one account at once.
    pub visitors_per_account: usize,
    /// How long nothing may pass between a visitor and its server.
    pub idle: Duration,
    /// Whether ports of a client's own refuse what names are for.
    pub strict_ports: bool,
    /// See there.
    pub dead_time: DeadTime,
    policies: HashMap<Pattern, Policy>,
}

impl Serve {
    /// How a name is treated: the exact entry, else the longest wildcard.
    pub fn policy(&self, name: &Name) -> Policy {
        if self.policies.is_empty() {
            return Policy::default();
        }
        let exact = Pattern::exact(name.clone());
        let above = name.parents().filter_map(|up| up.parse().ok());
        std::iter::once(exact)
            .chain(above.map(Pattern::below))
            .find_map(|p| self.policies.get(&p).copied())
            .unwrap_or_default()
    }

    /// How visitors of what is served under a pattern are spread.
    pub fn balance_of(&self, pattern: &Pattern) -> Balance {
        let own = match pattern.is_wildcard() {
            false => self.policy(pattern.name()).balance,
            true => self.policies.get(pattern).and_then(|p| p.balance),
        };
        own.unwrap_or(self.balance)
    }

    /// Names that end TLS here, for whoever gets certificates for them.
    pub fn terminated(&self) -> impl Iterator<Item = &Pattern> {
        let here = |(_, policy): &(&Pattern, &Policy)| policy.tls == Some(Tls::Terminate);
        self.policies.iter().filter(here).map(|(p, _)| p)
    }
}

impl Default for Serve {
    fn default() -> Serve {
        Serve {
            domain: None,
            reserved: Vec::new(),
            balance: Balance::default(),
            visitors_per_account: VISITORS,
            idle: Duration::from_secs(IDLE),
            strict_ports: true,
            dead_time: DeadTime {
                dwell: Duration::from_secs(DWELL),
                idle: Duration::from_secs(DEAD),
                cancel_check: Duration::from_secs(CANCEL),
            },
            policies: HashMap::new(),
        }
    }
}

const VISITORS: usize = 1024;
const MOST_VISITORS: usize = 1 << 20;
/// A day: whoever holds a connection open says something that often.
const IDLE: u64 = 24 * 3600;
const DWELL: u64 = 120;
const DEAD: u64 = 60;
const CANCEL: u64 = 10;

pub(super) fn check<'a>(
    raw: raw::Serve,
    names: Vec<raw::Name>,
    own: impl Iterator<Item = &'a String>,
) -> Checked<Serve> {
    let wrong = |what: &str, text: &str, why| format!("serve: {what}: \"{text}\": {why}");
    let name = |what: &'static str, text: String| {
        Name::parse(&text)
            .map_err(|why| wrong(what, &text, why))
            .and_then(|name| match name.is_address() {
                true => Err(format!(
                    "serve: {what}: \"{text}\" is an address; give a name"
                )),
                false => Ok(name),
            })
    };
    let domain = raw.domain.map(|text| name("domain", text)).transpose()?;
    if let Some(domain) = &domain
        && !domain.as_str().contains('.')
    {
        return Err(format!(
            "serve: domain: \"{domain}\" has one label only; give something like tunnel.example.org"
        ));
    }
    let mut reserved = Vec::new();
    for text in &raw.reserved {
        reserved.push(Pattern::parse(text).map_err(|why| wrong("reserved", text, why))?);
    }
    for text in own {
        reserved.push(Pattern::parse(text).map_err(|why| wrong("names", text, why))?);
    }
    let visitors = raw.visitors_per_account.unwrap_or(VISITORS);
    if !(1..=MOST_VISITORS).contains(&visitors) {
        return Err(format!(
            "serve: visitors-per-account must be between 1 and {MOST_VISITORS}"
        ));
    }
    let seconds = |what: &str, value: Option<u64>, default, most| {
        let value = value.unwrap_or(default);
        match (1..=most).contains(&value) {
            true => Ok(Duration::from_secs(value)),
            false => Err(format!("serve: {what} must be between 1 and {most}")),
        }
    };
    let mut policies = HashMap::new();
    for one in names {
        let pattern = Pattern::parse(&one.pattern)
            .map_err(|why| format!("name: \"{}\": {why}", one.pattern))?;
        let policy = Policy {
            http: one.http.unwrap_or_default(),
            tls: one.tls,
            balance: one.balance,
        };
        if policies.insert(pattern.clone(), policy).is_some() {
            return Err(format!("name: \"{pattern}\" is there twice"));
        }
    }
    let dead = raw.dead_time;
    Ok(Serve {
        domain,
        reserved,
        balance: raw.balance.unwrap_or_default(),
        visitors_per_account: visitors,
        idle: seconds("idle-seconds", raw.idle_seconds, IDLE, 30 * 24 * 3600)?,
        strict_ports: raw.strict_ports.unwrap_or(true),
        dead_time: DeadTime {
            dwell: seconds("dead-time.dwell", dead.dwell, DWELL, 3600)?,
            idle: seconds("dead-time.idle", dead.idle, DEAD, 24 * 3600)?,
            cancel_check: seconds("dead-time.cancel-check", dead.cancel_check, CANCEL, 3600)?,
        },
        policies,
    })
}
