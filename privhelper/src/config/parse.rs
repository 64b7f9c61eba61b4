//! Reading the configuration: `key = value`, a subset of TOML.
//!
//! Every refusal names the value, the reason and the remedy.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::{Class, Config, CtTimeouts, DeniedPorts, Net, Net4, Net6, Proto, Uplink};
use crate::plan;

/// What is wrong with the configuration or the host it is for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Invalid(pub(crate) String);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

fn invalid<T>(text: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid(text.into()))
}

const KEYS: [&str; 25] = [
    "pool4",
    "pool6",
    "stream4",
    "stream6",
    "slots",
    "grow",
    "max-slots",
    "helper-user",
    "gateway-user",
    "uplink",
    "nat-range",
    "flow-cap",
    "linger",
    "allow",
    "deny-ports",
    "ct-timeout.tcp-established",
    "ct-timeout.tcp-transitory",
    "ct-timeout.udp",
    "ct-timeout.udp-replied",
    "mtu",
    "txqueuelen",
    "socket",
    "state",
    "link-group",
    "offload",
];
const CLASS_KEYS: [&str; 3] = ["allow", "deny-ports", "flow-cap"];

/// What the values mean on this host.
pub(crate) struct Environment {
    pub(crate) machine_id: String,
    pub(crate) passwd: String,
}

impl Environment {
    pub(crate) fn read() -> Environment {
        let text = |p: &str| fs::read_to_string(p).unwrap_or_default();
        Environment {
            machine_id: text("/etc/machine-id"),
            passwd: text("/etc/passwd"),
        }
    }
}

/// Reads a file that nobody but root, or the user of a private namespace, can have written.
pub(crate) fn load(path: &Path) -> Result<Config, Invalid> {
    let shown = path.display();
    let failed = |e| {
        Invalid(format!(
            "{shown}: {e}; write it, or name another with --config (see privhelper.conf.example)"
        ))
    };
    // What is judged is what is read, whatever the path leads to meanwhile.
    let mut file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let me = nix::unistd::geteuid().as_raw();
    if meta.uid() != 0 && !(meta.uid() == me && crate::confine::in_user_namespace()) {
        return invalid(format!(
            "{shown}: owned by uid {}, must be root's: chown root {shown}",
            meta.uid()
        ));
    }
    if meta.mode() & 0o022 != 0 {
        return invalid(format!("{shown}: others may write it: chmod go-w {shown}"));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    parse(&text, &Environment::read()).map_err(|e| Invalid(format!("{shown}: {e}")))
}

/// A value and the line it stands on.
type Values = BTreeMap<String, (usize, String)>;

pub(crate) fn parse(text: &str, env: &Environment) -> Result<Config, Invalid> {
    let v = Reader {
        values: lines(text)?,
    };
    let pool4 = v.get("pool4", "10.64.0.0/10", net4)?;
    let pool6 = v.get("pool6", "auto", |s| {
        if s == "auto" { ula(env) } else { net6(s) }
    })?;
    let streams = Net6 {
        addr: (u128::from(pool6.addr) | 0xffff << 64).into(),
        len: 112,
    };
    let helper = v.get("helper-user", "rvpn-helper", |s| user(s, env))?;
    let gateway = v.get("gateway-user", "rvpn", |s| user(s, env))?;
    let (nat_low, nat_high) = v.get("nat-range", "16384-32767", range)?;
    let first = Class {
        number: 0,
        allow: v.get("allow", "", |s| list(s, net))?,
        deny_ports: v.get("deny-ports", "tcp/25", |s| list(s, ports))?,
        flow_cap: v.get("flow-cap", "1024", number)?,
    };
    let slots = v.get("slots", "64", number)?;
    let config = Config {
        pool4,
        pool6,
        stream4: v.get("stream4", "10.63.192.0/18", net4)?,
        stream6: v.get("stream6", "auto", |s| {
            if s == "auto" { Ok(streams) } else { net6(s) }
        })?,
        slots,
        grow: v.get("grow", "64", number)?,
        max_slots: v.get("max-slots", &slots.max(4096).to_string(), number)?,
        helper_uid: helper.0,
        helper_gid: helper.1,
        gateway_uid: gateway.0,
        gateway_gid: gateway.1,
        uplink: v.get("uplink", "default", uplink)?,
        nat_low,
        nat_high,
        linger: Duration::from_secs(v.get("linger", "60", number)?),
        ct_timeouts: CtTimeouts {
            tcp_established: v.get("ct-timeout.tcp-established", "7200", number)?,
            tcp_transitory: v.get("ct-timeout.tcp-transitory", "60", number)?,
            udp: v.get("ct-timeout.udp", "30", number)?,
            udp_replied: v.get("ct-timeout.udp-replied", "120", number)?,
        },
        classes: v.classes(first)?,
        mtu: v.get("mtu", "1500", number)?,
        txqueuelen: v.get("txqueuelen", "500", number)?,
        socket: v.get("socket", rvpn_ipc::DEFAULT_SOCKET, path)?,
        state: v.get("state", "/run/rvpn-helper", path)?,
        link_group: v.get("link-group", "21110", number)?,
        offload: v.get("offload", "on", |s| match s {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err("is neither on nor off".to_owned()),
        })?,
    };
    check(&config)?;
    Ok(config)
}

fn lines(text: &str) -> Result<Values, Invalid> {
    let mut values = Values::new();
    for (i, line) in text.lines().enumerate() {
        let n = i + 1;
        let line = line.split_once('#').map_or(line, |(l, _)| l).trim();
        if line.is_empty() {
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            return invalid(format!("line {n}: '{line}' is not 'key = value'"));
        };
        let key = key.trim();
        let value = value.trim().trim_matches('"').trim();
        if !known(key) {
            let near = nearest(key);
            return invalid(format!(
                "line {n}: unknown key '{key}'; did you mean '{near}'?"
            ));
        }
        if let Some((first, _)) = values.insert(key.to_owned(), (n, value.to_owned())) {
            return invalid(format!(
                "line {n}: '{key}' was set on line {first} already: keep one"
            ));
        }
    }
    Ok(values)
}

fn known(key: &str) -> bool {
    KEYS.contains(&key) || class_key(key).is_some()
}

/// `class.N.key`, for N from 1 to 15: class 0 is what the plain keys say.
fn class_key(key: &str) -> Option<(u8, &str)> {
    let (n, key) = key.strip_prefix("class.")?.split_once('.')?;
    let number: u8 = n.parse().ok().filter(|c| (1..16).contains(c))?;
    CLASS_KEYS.contains(&key).then_some((number, key))
}

fn nearest(key: &str) -> &'static str {
    KEYS.into_iter()
        .min_by_key(|k| distance(k.as_bytes(), key.as_bytes()))
        .unwrap_or("pool4")
}

/// Edits from one word to the other.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = replaced.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

struct Reader {
    values: Values,
}

impl Reader {
    fn get<T>(
        &self,
        key: &str,
        default: &str,
        f: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, Invalid> {
        let (place, value) = match self.values.get(key) {
            Some((n, v)) => (format!("line {n}"), v.as_str()),
            None => ("default".to_owned(), default),
        };
        f(value).map_err(|why| Invalid(format!("{place}: {key} = '{value}' {why}")))
    }

    /// Class 0, and every numbered one: what it does not say is as in class 0.
    fn classes(&self, first: Class) -> Result<Vec<Class>, Invalid> {
        let mut all = BTreeMap::from([(0, first.clone())]);
        for key in self.values.keys() {
            let Some((n, what)) = class_key(key) else {
                continue;
            };
            let class = all.entry(n).or_insert_with(|| Class {
                number: n,
                ..first.clone()
            });
            match what {
                "allow" => class.allow = self.get(key, "", |s| list(s, net))?,
                "deny-ports" => class.deny_ports = self.get(key, "", |s| list(s, ports))?,
                _ => class.flow_cap = self.get(key, "", number)?,
            }
        }
        Ok(all.into_values().collect())
    }
}

fn number<T: FromStr>(s: &str) -> Result<T, String> {
    s.parse()
        .map_err(|_| "is not a number that fits here".to_owned())
}

fn list<T>(s: &str, f: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    s.split(',')
        .map(str::trim)
        .filter(|w| !w.is_empty())
        .map(f)
        .collect()
}

fn net(s: &str) -> Result<Net, String> {
    let bad = || "is not a prefix such as 10.0.0.0/8 or fd00::/8".to_owned();
    let (addr, len) = s.split_once('/').ok_or_else(bad)?;
    let addr: IpAddr = addr.parse().map_err(|_| bad())?;
    let len: u8 = len.parse().map_err(|_| bad())?;
    let (value, width) = match addr {
        IpAddr::V4(a) => (u128::from(u32::from(a)) << 96, 32),
        IpAddr::V6(a) => (u128::from(a), 128),
    };
    if len == 0 || len > width {
        return Err(format!("has length {len}: it must be from 1 to {width}"));
    }
    if value << (len - 1) << 1 != 0 {
        return Err(format!("has bits set beyond its length of {len}"));
    }
    Ok(match addr {
        IpAddr::V4(addr) => Net::V4(Net4 { addr, len }),
        IpAddr::V6(addr) => Net::V6(Net6 { addr, len }),
    })
}

fn net4(s: &str) -> Result<Net4, String> {
    match net(s)? {
        Net::V4(n) => Ok(n),
        Net::V6(_) => Err("is not IPv4".to_owned()),
    }
}

fn net6(s: &str) -> Result<Net6, String> {
    match net(s)? {
        Net::V6(n) => Ok(n),
        Net::V4(_) => Err("is not IPv6".to_owned()),
    }
}

/// A private /48 that is this machine's own and the same at every start.
fn ula(env: &Environment) -> Result<Net6, String> {
    let id = env.machine_id.trim();
    if id.len() < 16 {
        return Err(
            "needs /etc/machine-id, which is missing or empty: give a /48 out of fd00::/8"
                .to_owned(),
        );
    }
    // FNV-1a, folded to the forty bits a private prefix has.
    let hash = id
        .bytes()
        .chain(*b"rvpn")
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
    let global = (hash >> 40 ^ hash) & 0xff_ffff_ffff;
    Ok(Net6 {
        addr: (0xfd << 120 | u128::from(global) << 80).into(),
        len: 48,
    })
}

/// Uid and gid of a user by name or number; a bare number is both.
fn user(s: &str, env: &Environment) -> Result<(u32, u32), String> {
    if let Ok(id) = s.parse() {
        return Ok((id, id));
    }
    let mut found = env.passwd.lines().filter_map(|l| {
        let mut f = l.split(':');
        (f.next() == Some(s)).then(|| Some((f.nth(1)?.parse().ok()?, f.next()?.parse().ok()?)))?
    });
    found.next().ok_or_else(|| {
        format!("is no user here: create it (useradd --system {s}) or give a number")
    })
}

fn range(s: &str) -> Result<(u16, u16), String> {
    let (low, high) = s
        .split_once('-')
        .ok_or("is not a range such as 16384-32767")?;
    let (low, high) = (number(low.trim())?, number(high.trim())?);
    if low < 1024 || high < low || high - low < 1023 {
        return Err("is too small: it must hold at least 1024 ports from 1024 up".to_owned());
    }
    Ok((low, high))
}

fn ports(s: &str) -> Result<DeniedPorts, String> {
    let bad = || "is not a port such as tcp/25 or udp/1-1023".to_owned();
    let (proto, span) = s.split_once('/').ok_or_else(bad)?;
    let proto = match proto {
        "tcp" => Proto::Tcp,
        "udp" => Proto::Udp,
        _ => return Err(bad()),
    };
    let (low, high) = span.split_once('-').unwrap_or((span, span));
    match (low.parse(), high.parse()) {
        (Ok(low), Ok(high)) if low <= high => Ok(DeniedPorts { proto, low, high }),
        _ => Err(bad()),
    }
}

fn uplink(s: &str) -> Result<Uplink, String> {
    if s == "default" {
        return Ok(Uplink::DefaultRoute);
    }
    let names = list(s, |n| {
        let fits = n.len() < 16 && !n.contains(['/', ' ']) && plan::slot_of(n).is_none();
        if fits {
            Ok(n.to_owned())
        } else {
            Err(format!("names '{n}', which cannot be an uplink"))
        }
    })?;
    if names.is_empty() {
        Err("names no interface: give one, or default".to_owned())
    } else {
        Ok(Uplink::Named(names))
    }
}

fn path(s: &str) -> Result<PathBuf, String> {
    let p = PathBuf::from(s);
    if p.is_absolute() {
        Ok(p)
    } else {
        Err("is not an absolute path".to_owned())
    }
}

/// What the values must be to each other.
fn check(c: &Config) -> Result<(), Invalid> {
    let own = crate::kernel::ruleset::own_nets(c);
    for (i, a) in own.iter().enumerate() {
        for b in &own[i + 1..] {
            // The streams' last subnet of the pool's own /48 is meant to be inside it.
            let meant = *a == Net::V6(c.pool6) && *b == Net::V6(c.stream6) && in_last_subnet(c);
            if a.overlaps(*b) && !meant {
                return invalid(format!("prefixes {a} and {b} overlap: move one of them"));
            }
        }
        for class in &c.classes {
            if let Some(n) = class.allow.iter().find(|n| n.overlaps(*a)) {
                return invalid(format!(
                    "allow = '{n}' opens {a}, the clients' own range: remove it"
                ));
            }
        }
    }
    let rules: [(bool, String); 8] = [
        (
            c.pool6.len == 48,
            format!("pool6 = '{}' is not a /48", Net::V6(c.pool6)),
        ),
        (
            c.max_slots <= room(c),
            format!(
                "max-slots = {} does not fit: pool4 {} and stream4 {} have room for {}; enlarge them or lower max-slots",
                c.max_slots,
                Net::V4(c.pool4),
                Net::V4(c.stream4),
                room(c)
            ),
        ),
        (
            c.slots >= 1 && c.slots <= c.max_slots,
            format!(
                "slots = {} is not from 1 to max-slots = {}",
                c.slots, c.max_slots
            ),
        ),
        (
            c.grow >= 1,
            "grow = 0 would never grow: give at least 1".to_owned(),
        ),
        (
            (1280..=65_535).contains(&c.mtu),
            format!("mtu = {} is below 1280, the least IPv6 needs", c.mtu),
        ),
        (
            c.link_group != 0,
            "link-group = 0 is every interface's own: give another number".to_owned(),
        ),
        (
            c.classes.iter().all(|k| k.flow_cap > 0),
            "flow-cap = 0 lets no flow through: give at least 1".to_owned(),
        ),
        (
            c.txqueuelen > 0,
            "txqueuelen = 0 drops every packet: give at least 1".to_owned(),
        ),
    ];
    match rules.into_iter().find(|(ok, _)| !ok) {
        Some((_, why)) => invalid(why),
        None => Ok(()),
    }
}

fn in_last_subnet(c: &Config) -> bool {
    let subnet = Net6 {
        addr: (u128::from(c.pool6.addr) | 0xffff << 64).into(),
        len: 64,
    };
    c.stream6.len >= 64 && subnet.overlaps(c.stream6)
}

/// How many slots the IPv4 ranges number.
fn room(c: &Config) -> u32 {
    let pool = 1_u64 << 24_u8.saturating_sub(c.pool4.len);
    let streams = 1_u64 << (32 - c.stream4.len);
    let pool = if c.pool4.len > 24 { 0 } else { pool };
    u32::try_from(pool.min(streams))
        .unwrap_or(u32::MAX)
        .min(plan::MAX_SLOTS)
}

#[cfg(test)]
mod tests;
