//! What the administrator decides, and nobody else can: `key = value`, a subset of TOML.
//!
//! Every refusal names the value, the reason and the remedy.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{confine, plan};

/// Refuses, with a reason, what does not hold.
macro_rules! ensure {
    ($holds:expr, $($why:tt)*) => {
        if !$holds {
            return Err(format!($($why)*));
        }
    };
}

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
    pub(crate) allow: Vec<IpNet>,
    pub(crate) deny_ports: Vec<DeniedPorts>,
    /// Concurrent flows per client.
    pub(crate) flow_cap: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The configuration by its keys: each gives a field its type, and what reads the
/// value. What stands above can be used below. The defaults are in the example.
macro_rules! config {
    (|$v:ident, $env:ident| $($(#[$doc:meta])* $field:ident: $kind:ty = $key:literal, $read:expr;)*) => {
        /// The whole configuration, checked.
        #[derive(Clone, Debug)]
        pub(crate) struct Config {
            $($(#[$doc])* pub(crate) $field: $kind,)*
            /// Sorted by number, at most 16, the first is class 0.
            pub(crate) classes: Vec<Class>,
        }

        fn read($v: &Values, $env: &Environment) -> Result<Config, String> {
            $(let $field: $kind = $v.get($key, $read)?;)*
            Ok(Config { $($field,)* classes: $v.classes()? })
        }
    };
}

config! { |v, env|
    pool4: Ipv4Net = "pool4", |s| net(s, NO4);
    pool6: Ipv6Net = "pool6", |s| pool6(s, env);
    stream4: Ipv4Net = "stream4", |s| net(s, NO4);
    stream6: Ipv6Net = "stream6", |s| if s == "auto" { Ok(last_subnet(pool6, 112)) } else { net(s, NO6) };
    /// Devices created before the socket opens.
    slots: u32 = "slots", number;
    /// Devices created at a time when fewer than this are free.
    grow: u32 = "grow", least(1, "would never grow: give at least 1");
    max_slots: u32 = "max-slots", |s| {
        // The default one is never below the slots there are to be.
        let said = v.said.contains_key("max-slots");
        number(s).map(|n| if said { n } else { slots.max(n) })
    };
    helper: User = "helper-user", |s| user(s, env);
    gateway: User = "gateway-user", |s| user(s, env);
    /// Interfaces clients leave by; none named means whatever holds the default routes.
    uplink: Vec<String> = "uplink", uplink;
    /// Lowest and highest port client traffic is translated to.
    nat: (u16, u16) = "nat-range", range;
    linger: Duration = "linger", |s| number(s).map(Duration::from_secs);
    /// Seconds after which an idle flow of ours is forgotten, as the three below.
    tcp_established: u32 = "ct-timeout.tcp-established", number;
    tcp_transitory: u32 = "ct-timeout.tcp-transitory", number;
    udp: u32 = "ct-timeout.udp", number;
    udp_replied: u32 = "ct-timeout.udp-replied", number;
    mtu: u16 = "mtu", least(1280, "is below 1280, the least IPv6 needs");
    txqueuelen: u32 = "txqueuelen", least(1, "drops every packet: give at least 1");
    socket: PathBuf = "socket", path;
    /// Directory of the sysctl journal.
    state: PathBuf = "state", path;
    link_group: u32 = "link-group", least(1, "is every interface's own: give another number");
    offload: bool = "offload", on;
}

impl Config {
    /// Every network whose addresses are ours to give out; the last two are for streams.
    pub(crate) fn own_nets(&self) -> [IpNet; 4] {
        let (pool4, pool6) = (self.pool4.into(), self.pool6.into());
        [pool4, pool6, self.stream4.into(), self.stream6.into()]
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

/// The defaults are what the example says they are.
const EXAMPLE: &str = include_str!("../privhelper.conf.example");

/// Reads a file that nobody but root, or the user of a private namespace, can have written.
pub(crate) fn load(path: &Path) -> Result<Config, String> {
    let shown = path.display();
    let hint = "write it, or name another with --config (see privhelper.conf.example)";
    let failed = |e| format!("{shown}: {e}; {hint}");
    // What is judged is what is read, whatever the path leads to meanwhile.
    let mut file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let (uid, me) = (meta.uid(), nix::unistd::geteuid().as_raw());
    let trusted = uid == 0 || uid == me && confine::in_user_namespace();
    let owner = format!("owned by uid {uid}, must be root's");
    ensure!(trusted, "{shown}: {owner}: chown root {shown}");
    let closed = meta.mode() & 0o022 == 0;
    ensure!(closed, "{shown}: others may write it: chmod go-w {shown}");
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let (machine_id, passwd) = (read("/etc/machine-id"), read("/etc/passwd"));
    let env = Environment { machine_id, passwd };
    parse(&text, &env).map_err(|e| format!("{shown}: {e}"))
}

pub(crate) fn parse(text: &str, env: &Environment) -> Result<Config, String> {
    let config = read(&Values::new(text)?, env)?;
    check(&config)?;
    Ok(config)
}

/// Where the streams' addresses are, within the pool's own /48.
fn last_subnet(pool6: Ipv6Net, len: u8) -> Ipv6Net {
    let first = u128::from(pool6.addr()) | 0xffff << 64;
    Ipv6Net::new_assert(first.into(), len)
}

/// Whether two networks have an address in common.
pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// Each key's value and the line it stands on.
type Lines = BTreeMap<String, (usize, String)>;

fn lines<'a>(text: impl Iterator<Item = &'a str>) -> Result<Lines, String> {
    let mut values = Lines::new();
    for (n, line) in (1..).zip(text) {
        let line = line.split_once('#').map_or(line, |(l, _)| l).trim();
        if line.is_empty() {
            continue;
        }
        let parts = line.split_once('=');
        let (key, value) = parts.ok_or(format!("line {n}: '{line}' is not 'key = value'"))?;
        let (key, value) = (key.trim(), value.trim().trim_matches('"').trim());
        if let Some((first, _)) = values.insert(key.to_owned(), (n, value.to_owned())) {
            let again = format!("'{key}' was set on line {first} already");
            return Err(format!("line {n}: {again}: keep one"));
        }
    }
    Ok(values)
}

/// `class.N.key` for N from 1 to 15: the number and the key.
fn class_key(key: &str) -> Option<(u8, &str)> {
    let (n, key) = key.strip_prefix("class.")?.split_once('.')?;
    Some(((1..16).find(|c| c.to_string() == n)?, key))
}

struct Values {
    said: Lines,
    defaults: Lines,
}

impl Values {
    fn new(text: &str) -> Result<Values, String> {
        let defaults = lines(EXAMPLE.lines().filter_map(|l| l.strip_prefix("#= ")))?;
        let said = lines(text.lines())?;
        let model = |key: &str| match class_key(key) {
            Some((_, key)) => format!("class.1.{key}"),
            None => key.to_owned(),
        };
        if let Some((key, (n, _))) = said.iter().find(|(k, _)| !defaults.contains_key(&model(k))) {
            let far = |k: &&String| strsim::levenshtein(k, key);
            let near = defaults.keys().min_by_key(far).map_or("", String::as_str);
            let why = format!("unknown key '{key}'; did you mean '{near}'?");
            return Err(format!("line {n}: {why}"));
        }
        Ok(Values { said, defaults })
    }

    fn get<T>(&self, key: &str, f: impl Fn(&str) -> Result<T, String>) -> Result<T, String> {
        // What a class does not say is as in class 0, which the plain keys describe.
        let plain = class_key(key).map_or(key, |k| k.1);
        let said = self.said.get(key).or(self.said.get(plain));
        let (place, value) = match said.ok_or(self.defaults.get(plain)) {
            Ok((n, value)) => (format!("line {n}"), value.as_str()),
            Err(default) => ("default".to_owned(), default.map_or("", |d| d.1.as_str())),
        };
        f(value).map_err(|why| format!("{place}: {key} = '{value}' {why}"))
    }

    /// Class 0, and each that `class.N.key` says something about.
    fn classes(&self) -> Result<Vec<Class>, String> {
        let named = self.said.keys().filter_map(|k| class_key(k)).map(|k| k.0);
        let numbers: BTreeSet<u8> = named.chain([0]).collect();
        let class = |number| {
            let prefix = format!("class.{number}.");
            let key = |name| if number == 0 { String::new() } else { prefix.clone() } + name;
            let cap = least(1, "lets no flow through: give at least 1");
            Ok(Class {
                number,
                allow: self.get(&key("allow"), |s| list(s, |s| net(s, NO_NET)))?,
                deny_ports: self.get(&key("deny-ports"), |s| list(s, ports))?,
                flow_cap: self.get(&key("flow-cap"), cap)?,
            })
        };
        numbers.into_iter().map(class).collect()
    }
}

fn number<T: FromStr>(s: &str) -> Result<T, String> {
    s.parse().or(Err("is not a number that fits here".into()))
}

/// A number not below this.
fn least<T: FromStr + PartialOrd>(low: T, why: &str) -> impl Fn(&str) -> Result<T, String> {
    move |s| {
        let n = number(s)?;
        let enough = n >= low;
        ensure!(enough, "{why}");
        Ok(n)
    }
}

fn on(s: &str) -> Result<bool, String> {
    ensure!(["on", "off"].contains(&s), "is neither on nor off");
    Ok(s == "on")
}

fn list<T>(s: &str, f: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let words = s.split(',').map(str::trim);
    words.filter(|w| !w.is_empty()).map(f).collect()
}

/// What is wrong with a value that is no prefix of its family.
const NO4: &str = "is not IPv4, a prefix such as 10.0.0.0/8";
const NO6: &str = "is not IPv6, a prefix such as fd00::/8";
const NO_NET: &str = "is not a prefix such as 10.0.0.0/8 or fd00::/8";

/// A prefix of at least one bit, with none set beyond its length.
fn net<N: FromStr + Copy + Into<IpNet>>(s: &str, bad: &str) -> Result<N, String> {
    let given: N = s.parse().map_err(|_| bad)?;
    let net = given.into();
    let (len, clean) = (net.prefix_len(), net == net.trunc());
    ensure!(len > 0, "has length 0: it must be 1 at least");
    ensure!(clean, "has bits set beyond its length of {len}");
    Ok(given)
}

fn pool6(s: &str, env: &Environment) -> Result<Ipv6Net, String> {
    let net = if s == "auto" { ula(env) } else { net(s, NO6) }?;
    ensure!(net.prefix_len() == 48, "is not a /48");
    Ok(net)
}

/// FNV-1a: tells values apart, and hides nothing.
pub(crate) fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// A private /48 that is this machine's own and the same at every start.
fn ula(env: &Environment) -> Result<Ipv6Net, String> {
    let id = env.machine_id.trim();
    let missing = "/etc/machine-id, which is missing or empty";
    let known = id.len() >= 16;
    ensure!(known, "needs {missing}: give a /48 out of fd00::/8");
    // Folded to the forty bits a private prefix has.
    let hash = hash(id.bytes().chain(*b"rvpn"));
    let global = u128::from((hash >> 40 ^ hash) & 0xff_ffff_ffff);
    let first = 0xfd << 120 | global << 80;
    Ok(Ipv6Net::new_assert(first.into(), 48))
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
    let remedy = format!("create it (useradd --system {s}) or give a number");
    let (uid, gid) = ids.ok_or(format!("is no user here: {remedy}"))?;
    Ok(User { uid, gid })
}

fn range(s: &str) -> Result<(u16, u16), String> {
    let ends = s.split_once('-');
    let (low, high) = ends.ok_or("is not a range such as 16384-32767")?;
    let (low, high): (u16, u16) = (number(low.trim())?, number(high.trim())?);
    let large = low >= 1024 && u32::from(high) >= u32::from(low) + 1023;
    let wanted = "it must hold at least 1024 ports from 1024 up";
    ensure!(large, "is too small: {wanted}");
    Ok((low, high))
}

fn ports(s: &str) -> Result<DeniedPorts, String> {
    let (proto, span) = s.split_once('/').unwrap_or_default();
    let (low, high) = span.split_once('-').unwrap_or((span, span));
    let ends = low.parse().ok().zip(high.parse().ok());
    let known = |(low, high): &(u16, u16)| low <= high && ["tcp", "udp"].contains(&proto);
    let bad = "is not a port such as tcp/25 or udp/1-1023";
    let (low, high) = ends.filter(known).ok_or(bad)?;
    let proto = proto.to_owned();
    Ok(DeniedPorts { proto, low, high })
}

fn uplink(s: &str) -> Result<Vec<String>, String> {
    if s == "default" {
        return Ok(Vec::new());
    }
    let names = list(s, |n| {
        let fits = n.len() < 16 && !n.contains(['/', ' ']) && plan::slot_of(n).is_none();
        ensure!(fits, "names '{n}', which cannot be an uplink");
        Ok(n.to_owned())
    })?;
    let some = !names.is_empty();
    ensure!(some, "names no interface: give one, or default");
    Ok(names)
}

fn path(s: &str) -> Result<PathBuf, String> {
    ensure!(s.starts_with('/'), "is not an absolute path");
    Ok(s.into())
}

/// What the values must be to each other.
fn check(c: &Config) -> Result<(), String> {
    let (slots, most, own) = (c.slots, c.max_slots, c.own_nets());
    // The streams' last subnet of the pool's own /48 is meant to be inside it.
    let meant = last_subnet(c.pool6, 64).contains(&c.stream6);
    for (i, a) in own.iter().enumerate() {
        for (j, b) in own.iter().enumerate().skip(i + 1) {
            let apart = !overlap(a, b) || meant && (i, j) == (1, 3);
            ensure!(apart, "prefixes {a} and {b} overlap: move one of them");
        }
        for n in c.classes.iter().flat_map(|k| &k.allow) {
            let what = format!("'{n}' opens {a}, the clients' own range");
            ensure!(!overlap(n, a), "allow = {what}: remove it");
        }
    }
    // Slots the IPv4 ranges number: a /24 of the pool and one stream address each.
    let (pool, streams) = (c.pool4.prefix_len(), c.stream4.prefix_len());
    let pool = (1_u64 << (32 - pool)) >> 8;
    let room = pool.min(1 << (32 - streams)).min(plan::MAX_SLOTS.into());
    let why = format!("pool4 {} and stream4 {} have room", c.pool4, c.stream4);
    let remedy = format!("{why} for {room}; enlarge them or lower max-slots");
    let fits = u64::from(most) <= room;
    ensure!(fits, "max-slots = {most} does not fit: {remedy}");
    let fits = (1..=most).contains(&slots);
    ensure!(fits, "slots = {slots} is not from 1 to max-slots = {most}");
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
