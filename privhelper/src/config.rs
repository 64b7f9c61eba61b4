//! What the administrator decides, and nobody else can: `key = value`, a subset of TOML.
//!
//! Every refusal names the value, the reason and the remedy.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::net::Net;
use crate::{confine, plan};

/// Ports clients may not reach, ends included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeniedPorts {
    /// `tcp` or `udp`.
    pub(crate) proto: String,
    pub(crate) low: u16,
    pub(crate) high: u16,
}

/// What the clients of one policy class may do. Class 0 always exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) number: u8,
    /// Special-purpose prefixes opened to this class; all others stay refused.
    pub(crate) allow: Vec<Net>,
    pub(crate) deny_ports: Vec<DeniedPorts>,
    /// Concurrent flows per client.
    pub(crate) flow_cap: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The whole configuration, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) pool4: Net,
    pub(crate) pool6: Net,
    pub(crate) stream4: Net,
    pub(crate) stream6: Net,
    /// Devices created before the socket opens.
    pub(crate) slots: u32,
    /// Devices created at a time when fewer than this are free.
    pub(crate) grow: u32,
    pub(crate) max_slots: u32,
    pub(crate) helper: User,
    pub(crate) gateway: User,
    /// Interfaces clients leave by; none named means whatever holds the default routes.
    pub(crate) uplink: Vec<String>,
    pub(crate) nat_low: u16,
    pub(crate) nat_high: u16,
    pub(crate) linger: Duration,
    /// Seconds after which an idle flow of ours is forgotten.
    pub(crate) tcp_established: u32,
    pub(crate) tcp_transitory: u32,
    pub(crate) udp: u32,
    pub(crate) udp_replied: u32,
    /// Sorted by number, at most 16, the first is class 0.
    pub(crate) classes: Vec<Class>,
    pub(crate) mtu: u16,
    pub(crate) txqueuelen: u32,
    pub(crate) socket: PathBuf,
    /// Directory of the sysctl journal.
    pub(crate) state: PathBuf,
    pub(crate) link_group: u32,
    pub(crate) offload: bool,
}

impl Config {
    /// Every network whose addresses are ours to give out.
    pub(crate) fn own_nets(&self) -> [Net; 4] {
        [self.pool4, self.pool6, self.stream4, self.stream6]
    }

    /// Held by the one helper that serves.
    pub(crate) fn lock_path(&self) -> PathBuf {
        self.state.join("lock")
    }
}

/// What the values mean on this host.
pub(crate) struct Environment {
    pub(crate) machine_id: String,
    pub(crate) passwd: String,
}

/// Reads a file that nobody but root, or the user of a private namespace, can have written.
pub(crate) fn load(path: &Path) -> Result<Config, String> {
    let shown = path.display();
    let hint = "write it, or name another with --config (see privhelper.conf.example)";
    let failed = |e| format!("{shown}: {e}; {hint}");
    // What is judged is what is read, whatever the path leads to meanwhile.
    let mut file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let (uid, me) = (meta.uid(), nix::unistd::geteuid().as_raw());
    if uid != 0 && !(uid == me && confine::in_user_namespace()) {
        return Err(format!(
            "{shown}: owned by uid {uid}, must be root's: chown root {shown}"
        ));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!("{shown}: others may write it: chmod go-w {shown}"));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    let read = |p| fs::read_to_string(p).unwrap_or_default();
    let env = Environment {
        machine_id: read("/etc/machine-id"),
        passwd: read("/etc/passwd"),
    };
    parse(&text, &env).map_err(|e| format!("{shown}: {e}"))
}

pub(crate) fn parse(text: &str, env: &Environment) -> Result<Config, String> {
    let mut v = Reader::new(text)?;
    let config = values(&mut v, env)?;
    v.refuse_unknown()?;
    check(&config)?;
    Ok(config)
}

fn values(v: &mut Reader, env: &Environment) -> Result<Config, String> {
    let pool6 = v.get("pool6", "auto", |s| {
        if s == "auto" { ula(env) } else { net(s, 128) }
    })?;
    let streams = pool6.at(0xffff << 64, 112);
    let (nat_low, nat_high) = v.get("nat-range", "16384-32767", range)?;
    let slots = v.get("slots", "64", number)?;
    let config = Config {
        pool4: v.get("pool4", "10.64.0.0/10", |s| net(s, 32))?,
        pool6,
        stream4: v.get("stream4", "10.63.192.0/18", |s| net(s, 32))?,
        stream6: v.get("stream6", "auto", |s| {
            if s == "auto" {
                Ok(streams)
            } else {
                net(s, 128)
            }
        })?,
        slots,
        grow: v.get("grow", "64", least(1, "would never grow: give at least 1"))?,
        max_slots: v.get("max-slots", &slots.max(4096).to_string(), number)?,
        helper: v.get("helper-user", "rvpn-helper", |s| user(s, env))?,
        gateway: v.get("gateway-user", "rvpn", |s| user(s, env))?,
        uplink: v.get("uplink", "default", uplink)?,
        nat_low,
        nat_high,
        linger: Duration::from_secs(v.get("linger", "60", number)?),
        tcp_established: v.get("ct-timeout.tcp-established", "7200", number)?,
        tcp_transitory: v.get("ct-timeout.tcp-transitory", "60", number)?,
        udp: v.get("ct-timeout.udp", "30", number)?,
        udp_replied: v.get("ct-timeout.udp-replied", "120", number)?,
        classes: v.classes()?,
        mtu: v.get(
            "mtu",
            "1500",
            least(1280, "is below 1280, the least IPv6 needs"),
        )?,
        txqueuelen: v.get(
            "txqueuelen",
            "500",
            least(1, "drops every packet: give at least 1"),
        )?,
        socket: v.get("socket", rvpn_ipc::DEFAULT_SOCKET, path)?,
        state: v.get("state", "/run/rvpn-helper", path)?,
        link_group: v.get(
            "link-group",
            "21110",
            least(1, "is every interface's own: give another"),
        )?,
        offload: v.get("offload", "on", |s| match s {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err("is neither on nor off".to_owned()),
        })?,
    };
    Ok(config)
}

struct Reader {
    /// Each key's value and the line it stands on.
    values: BTreeMap<String, (usize, String)>,
    /// Every key that was asked for: there is no other.
    known: Vec<String>,
}

impl Reader {
    fn new(text: &str) -> Result<Reader, String> {
        let mut values = BTreeMap::new();
        for (n, line) in (1..).zip(text.lines()) {
            let line = line.split_once('#').map_or(line, |(l, _)| l).trim();
            if line.is_empty() {
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                return Err(format!("line {n}: '{line}' is not 'key = value'"));
            };
            let (key, value) = (key.trim(), value.trim().trim_matches('"').trim());
            if let Some((first, _)) = values.insert(key.to_owned(), (n, value.to_owned())) {
                return Err(format!(
                    "line {n}: '{key}' was set on line {first} already: keep one"
                ));
            }
        }
        let known = Vec::new();
        Ok(Reader { values, known })
    }

    fn get<T>(
        &mut self,
        key: &str,
        default: &str,
        f: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, String> {
        self.known.push(key.to_owned());
        // What a class does not say is as in class 0, which the plain keys describe.
        let plain = key.strip_prefix("class.").and_then(|k| k.split_once('.'));
        let found = self.values.get(key).or_else(|| self.values.get(plain?.1));
        let (place, value) = match found {
            Some((n, v)) => (format!("line {n}"), v.as_str()),
            None => ("default".to_owned(), default),
        };
        f(value).map_err(|why| format!("{place}: {key} = '{value}' {why}"))
    }

    /// Class 0, and each from 1 to 15 that `class.N.key` says something about.
    fn classes(&mut self) -> Result<Vec<Class>, String> {
        let mut all = Vec::new();
        for number in 0..16 {
            let prefix = if number == 0 {
                String::new()
            } else {
                format!("class.{number}.")
            };
            if !self.values.keys().any(|k| k.starts_with(&prefix)) && number > 0 {
                continue;
            }
            let key = |name| format!("{prefix}{name}");
            let cap = least(1, "lets no flow through: give at least 1");
            all.push(Class {
                number,
                allow: self.get(&key("allow"), "", |s| list(s, Net::from_str))?,
                deny_ports: self.get(&key("deny-ports"), "tcp/25", |s| list(s, ports))?,
                flow_cap: self.get(&key("flow-cap"), "1024", cap)?,
            });
        }
        Ok(all)
    }

    fn refuse_unknown(&self) -> Result<(), String> {
        let Some((key, (n, _))) = self.values.iter().find(|(k, _)| !self.known.contains(k)) else {
            return Ok(());
        };
        let near = self
            .known
            .iter()
            .min_by_key(|k| distance(k.as_bytes(), key.as_bytes()));
        let near = near.map_or("", String::as_str);
        Err(format!(
            "line {n}: unknown key '{key}'; did you mean '{near}'?"
        ))
    }
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

fn number<T: FromStr>(s: &str) -> Result<T, String> {
    s.parse()
        .map_err(|_| "is not a number that fits here".to_owned())
}

/// A number not below this.
fn least<T: FromStr + PartialOrd>(low: T, why: &str) -> impl Fn(&str) -> Result<T, String> {
    move |s| number(s).and_then(|n| if n < low { Err(why.to_owned()) } else { Ok(n) })
}

fn list<T>(s: &str, f: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    s.split(',')
        .map(str::trim)
        .filter(|w| !w.is_empty())
        .map(f)
        .collect()
}

fn net(s: &str, width: u8) -> Result<Net, String> {
    let net: Net = s.parse()?;
    let family = if width == 32 { "IPv4" } else { "IPv6" };
    if net.width() == width {
        Ok(net)
    } else {
        Err(format!("is not {family}"))
    }
}

/// FNV-1a: tells values apart, and hides nothing.
pub(crate) fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// A private /48 that is this machine's own and the same at every start.
fn ula(env: &Environment) -> Result<Net, String> {
    let id = env.machine_id.trim();
    if id.len() < 16 {
        return Err(
            "needs /etc/machine-id, which is missing or empty: give a /48 out of fd00::/8".into(),
        );
    }
    // Folded to the forty bits a private prefix has.
    let hash = hash(id.bytes().chain(*b"rvpn"));
    let global = (hash >> 40 ^ hash) & 0xff_ffff_ffff;
    net("fd00::/48", 128).map(|n| n.at(u128::from(global) << 80, 48))
}

/// A user by name or number; a bare number is both ids.
fn user(s: &str, env: &Environment) -> Result<User, String> {
    if let Ok(id) = s.parse() {
        return Ok(User { uid: id, gid: id });
    }
    let mut entries = env.passwd.lines().map(|l| l.split(':').collect::<Vec<_>>());
    let ids = entries.find_map(|f| match f[..] {
        [name, _, uid, gid, ..] if name == s => Some((uid.parse().ok()?, gid.parse().ok()?)),
        _ => None,
    });
    let (uid, gid) = ids.ok_or_else(|| {
        format!("is no user here: create it (useradd --system {s}) or give a number")
    })?;
    Ok(User { uid, gid })
}

fn range(s: &str) -> Result<(u16, u16), String> {
    let (low, high) = s
        .split_once('-')
        .ok_or("is not a range such as 16384-32767")?;
    let (low, high): (u16, u16) = (number(low.trim())?, number(high.trim())?);
    if low < 1024 || u32::from(high) < u32::from(low) + 1023 {
        return Err("is too small: it must hold at least 1024 ports from 1024 up".to_owned());
    }
    Ok((low, high))
}

fn ports(s: &str) -> Result<DeniedPorts, String> {
    let parts = s.split_once('/').and_then(|(proto, span)| {
        let (low, high) = span.split_once('-').unwrap_or((span, span));
        Some(DeniedPorts {
            proto: proto.to_owned(),
            low: low.parse().ok()?,
            high: high.parse().ok()?,
        })
    });
    parts
        .filter(|p| p.low <= p.high && ["tcp", "udp"].contains(&p.proto.as_str()))
        .ok_or_else(|| "is not a port such as tcp/25 or udp/1-1023".to_owned())
}

fn uplink(s: &str) -> Result<Vec<String>, String> {
    let fits = |n: &str| n.len() < 16 && !n.contains(['/', ' ']) && plan::slot_of(n).is_none();
    match list(s, |n| Ok(n.to_owned()))? {
        _ if s == "default" => Ok(Vec::new()),
        names if names.is_empty() => Err("names no interface: give one, or default".to_owned()),
        names => match names.iter().find(|n| !fits(n)) {
            Some(n) => Err(format!("names '{n}', which cannot be an uplink")),
            None => Ok(names),
        },
    }
}

fn path(s: &str) -> Result<PathBuf, String> {
    if s.starts_with('/') {
        Ok(s.into())
    } else {
        Err("is not an absolute path".to_owned())
    }
}

/// What the values must be to each other.
fn check(c: &Config) -> Result<(), String> {
    let (pool4, pool6, stream4, own) = (c.pool4, c.pool6, c.stream4, c.own_nets());
    // The streams' last subnet of the pool's own /48 is meant to be inside it.
    let last = pool6.at(0xffff << 64, 64);
    let meant = c.stream6.len >= 64 && last.overlaps(c.stream6);
    for (i, a) in own.into_iter().enumerate() {
        let clash = |b: &&Net| a.overlaps(**b) && !(meant && a == pool6 && **b == c.stream6);
        if let Some(b) = own[i + 1..].iter().find(clash) {
            return Err(format!("prefixes {a} and {b} overlap: move one of them"));
        }
        if let Some(n) = c
            .classes
            .iter()
            .flat_map(|k| &k.allow)
            .find(|n| n.overlaps(a))
        {
            return Err(format!(
                "allow = '{n}' opens {a}, the clients' own range: remove it"
            ));
        }
    }
    if pool6.len != 48 {
        return Err(format!("pool6 = '{pool6}' is not a /48"));
    }
    // Slots the IPv4 ranges number: a /24 of the pool and one stream address each.
    let pool = if pool4.len > 24 {
        0
    } else {
        1 << (24 - pool4.len)
    };
    let room = pool
        .min(1_u64 << (32 - stream4.len))
        .min(plan::MAX_SLOTS.into());
    let (slots, most) = (c.slots, c.max_slots);
    if u64::from(most) > room {
        return Err(format!(
            "max-slots = {most} does not fit: pool4 {pool4} and stream4 {stream4} have room for {room}; enlarge them or lower max-slots"
        ));
    }
    if slots < 1 || slots > most {
        return Err(format!(
            "slots = {slots} is not from 1 to max-slots = {most}"
        ));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests_support {
    pub(crate) fn example() -> super::Config {
        let env = super::Environment {
            machine_id: String::new(),
            passwd: String::new(),
        };
        let text = "
            pool6 = fd52:5650:1::/48
            slots = 4
            grow = 4
            max-slots = 16
            helper-user = 0
            gateway-user = 0
            deny-ports =
        ";
        super::parse(text, &env).unwrap()
    }
}

#[cfg(test)]
mod tests;
