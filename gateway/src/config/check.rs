//! From what is written to what is meant.

mod dialects;
mod keys;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::control::Prefix;

use self::dialects::{dialect, packer};
use self::keys::{key, one_legacy};
use super::raw::{self, Raw};
use super::{
    AdminAddress, CertificateFiles, Config, HelperSettings, Limits, Listener, Mode, Names, Network,
    SessionSettings, acme, demo, front, host_of, log, serve,
};

/// Where the system keeps the certificates that everybody believes.
pub(super) const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";
const STATE_DIR: &str = "/var/lib/rvpn";
const ADMIN: &str = "127.0.0.1:7980";
const HELPER_USER: &str = "rvpn-helper";
/// Names that end up in tables, logs and links.
const NAME_LEN: usize = 128;

pub(super) type Checked<T> = Result<T, String>;

pub(super) fn check(
    raw: Raw,
    base: &Path,
    env: impl Fn(&str) -> Option<String>,
) -> Checked<Config> {
    let state_dir = env("RVPN_STATE_DIR").map(PathBuf::from).or(raw.state_dir);
    let mut listeners = raw
        .listener
        .into_iter()
        .map(listener)
        .collect::<Checked<Vec<_>>>()?;
    if let Some(address) = env("RVPN_LISTEN") {
        let address = address.parse().map_err(|_| {
            format!("RVPN_LISTEN: \"{address}\" is not an address; write it like 0.0.0.0:443")
        })?;
        match listeners.as_mut_slice() {
            [only] => only.address = address,
            _ => {
                return Err(
                    "RVPN_LISTEN replaces the address of a single [[listener]]; there are others"
                        .to_owned(),
                );
            }
        }
    }
    if listeners.is_empty() {
        return Err("no [[listener]]: add one with an address such as \"[::]:443\"".to_owned());
    }
    let mut addresses = BTreeSet::new();
    for l in &listeners {
        if !addresses.insert(l.address) {
            return Err(format!("listener: {} is there twice", l.address));
        }
    }
    let legacy = unique("legacy", raw.legacy, |l| l.name.clone())?
        .into_iter()
        .map(|l| one_legacy(l, base))
        .collect::<Checked<Vec<_>>>()?;
    let keys = unique("key", raw.key, |k| k.name.clone())?
        .into_iter()
        .map(|k| key(k, base))
        .collect::<Checked<Vec<_>>>()?;
    let dialects = unique("dialect", raw.dialect, |d| d.path.clone())?
        .into_iter()
        .map(|d| dialect(d, &legacy).map(Arc::new))
        .collect::<Checked<Vec<_>>>()?;
    let demo = demo::check(&raw.demo, &dialects)?;
    let packer = packer(raw.packer, &legacy)?;
    let allowed_origins = raw
        .allowed_origins
        .into_iter()
        .map(origin)
        .collect::<Checked<Vec<_>>>()?;
    let helper = HelperSettings {
        socket: env("RVPN_HELPER_SOCKET")
            .map(PathBuf::from)
            .or(raw.helper.socket)
            .unwrap_or_else(|| rvpn_ipc::DEFAULT_SOCKET.into()),
        uid: user(
            "helper.user",
            raw.helper
                .user
                .unwrap_or(raw::User::Name(HELPER_USER.to_owned())),
        )?
        .0,
    };
    let names = Names::new(raw.names)?;
    let admin = env("RVPN_ADMIN").or(raw.admin.address);
    let admin_names = Names::new(raw.admin.names)?.all().to_vec();
    let admin_public = Names::new(raw.admin.public)?.all().to_vec();
    if let Some(name) = admin_public.iter().find(|n| names.lists(n)) {
        return Err(format!(
            "admin: public: \"{name}\" is among names already; operators need a name of their own"
        ));
    }
    let own = names.all().iter().chain(&admin_names).chain(&admin_public);
    let named: Vec<String> = names.all().iter().chain(&admin_public).cloned().collect();
    let acme = acme::check(raw.acme, base, &named, raw.tls.is_some())?;
    let serve = serve::check(raw.serve, raw.name, own)?;
    Ok(Config {
        state_dir: state_dir.unwrap_or_else(|| STATE_DIR.into()),
        user: raw.user.map(|u| user("user", u)).transpose()?,
        names,
        allowed_origins,
        listeners,
        certificate: raw.tls.map(|tls| CertificateFiles {
            chain: base.join(tls.certificate),
            key: base.join(tls.key),
        }),
        acme,
        certificates: front::certificates(raw.certificate, base)?,
        front: front::settings(&raw.front)?,
        admin: admin_address(admin.as_deref().unwrap_or(ADMIN))?,
        admin_names,
        admin_public,
        helper,
        keys,
        legacy,
        dialects,
        page: matches!(raw.page, raw::Switch::On),
        demo,
        packer,
        serve,
        limits: limits(&raw.limits)?,
        session: session(raw.session)?,
        log: log::check(raw.log, env("RVPN_LOG"), base)?,
        sandbox: matches!(raw.sandbox, raw::Switch::On),
    })
}

fn unique<T>(what: &str, items: Vec<T>, name: impl Fn(&T) -> String) -> Checked<Vec<T>> {
    let mut seen = BTreeSet::new();
    for item in &items {
        let name = name(item);
        if !seen.insert(name.clone()) {
            return Err(format!("{what}: \"{name}\" is there twice"));
        }
    }
    Ok(items)
}

fn listener(raw: raw::Listener) -> Checked<Listener> {
    let networks = |what: &str, from: &[String]| {
        let parsed = from.iter().map(|n| n.parse::<Network>());
        parsed
            .collect::<Checked<Vec<_>>>()
            .map_err(|e| format!("listener {}: {what}: {e}", raw.address))
    };
    Ok(Listener {
        address: raw.address,
        mode: match raw.mode {
            raw::Mode::Tls => Mode::Tls,
            raw::Mode::Plain => Mode::Plain,
            raw::Mode::Auto => Mode::Auto,
        },
        proxy_from: networks("proxy-from", &raw.proxy_from)?,
        forwarded_from: networks("forwarded-from", &raw.forwarded_from)?,
    })
}

fn admin_address(text: &str) -> Checked<AdminAddress> {
    if let Some(path) = text.strip_prefix("unix:") {
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(format!(
                "admin: \"{text}\" needs an absolute path behind unix:"
            ));
        }
        return Ok(AdminAddress::Unix(path));
    }
    let address: SocketAddr = text.parse().map_err(|_| {
        format!("admin: \"{text}\" is neither an address such as {ADMIN} nor unix:/a/path")
    })?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "admin: {address} is not a loopback address; reach it through ssh -L instead of opening it to the network"
        ));
    }
    Ok(AdminAddress::Tcp(address))
}

/// User and group of a name or number.
fn user(what: &str, user: raw::User) -> Checked<(u32, u32)> {
    use nix::unistd::{Uid, User};
    let (name, found) = match &user {
        raw::User::Uid(uid) => (uid.to_string(), User::from_uid(Uid::from_raw(*uid))),
        raw::User::Name(name) => (name.clone(), User::from_name(name)),
    };
    match (found, user) {
        (Ok(Some(found)), _) => Ok((found.uid.as_raw(), found.gid.as_raw())),
        // A number needs no name.
        (Ok(None), raw::User::Uid(uid)) => Ok((uid, uid)),
        (Ok(None), _) => Err(format!(
            "{what}: there is no user \"{name}\"; make it, or name another"
        )),
        (Err(error), _) => Err(format!(
            "{what}: cannot look up the user \"{name}\": {error}"
        )),
    }
}

/// Names that are also key ids, accounts and file names.
fn name(what: &str, name: &str) -> Checked<Arc<str>> {
    if is_name(name) {
        return Ok(name.into());
    }
    Err(format!(
        "{what}: \"{name}\" is not a name; use up to {NAME_LEN} letters, digits and any of . _ : @ -"
    ))
}

/// Whether the text can be an account, a subject or a key id.
pub(crate) fn is_name(text: &str) -> bool {
    (1..=NAME_LEN).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".:_@-".contains(&b))
}

fn origin(text: String) -> Checked<String> {
    let wrong = || {
        format!(
            "allowed-origins: \"{text}\" is not an origin; write it like https://page.example.org"
        )
    };
    let (scheme, authority) = text.split_once("://").ok_or_else(wrong)?;
    let known = matches!(
        scheme,
        "http" | "https" | "chrome-extension" | "moz-extension"
    );
    let (host, port) = host_of(authority).filter(|_| known).ok_or_else(wrong)?;
    Ok(match port {
        Some(port) => format!("{scheme}://{host}:{port}"),
        None => format!("{scheme}://{host}"),
    })
}

const MIB: usize = 1 << 20;

fn limits(raw: &raw::Limits) -> Checked<Limits> {
    let limits = Limits {
        max_clients: raw.max_clients.unwrap_or(1024),
        sessions_per_account: raw.sessions_per_account.unwrap_or(64),
        pending: raw.pending.unwrap_or(8192),
        pending_per_address: raw.pending_per_address.unwrap_or(1024),
        handshakes: raw.handshakes.unwrap_or(256),
        login_failures: raw.login_failures.unwrap_or(30),
        login_time: Duration::from_secs(raw.login_seconds.unwrap_or(10)),
        drain_time: Duration::from_secs(raw.drain_seconds.unwrap_or(10)),
        queue_memory: raw
            .queue_mib
            .map_or(crate::pump::budget::DEFAULT, |mib| mib.saturating_mul(MIB)),
    };
    let bounds: [(&str, u64, u64); 9] = [
        ("queue-mib", (limits.queue_memory / MIB) as u64, 1 << 20),
        ("max-clients", limits.max_clients as u64, 65_536),
        (
            "sessions-per-account",
            limits.sessions_per_account as u64,
            65_536,
        ),
        ("pending", limits.pending as u64, 1 << 20),
        (
            "pending-per-address",
            limits.pending_per_address as u64,
            1 << 20,
        ),
        ("handshakes", limits.handshakes as u64, 65_536),
        ("login-failures", limits.login_failures.into(), 1 << 20),
        ("login-seconds", limits.login_time.as_secs(), 60),
        ("drain-seconds", limits.drain_time.as_secs() + 1, 601),
    ];
    for (what, value, most) in bounds {
        if !(1..=most).contains(&value) {
            return Err(format!("limits: {what} must be between 1 and {most}"));
        }
    }
    Ok(limits)
}

/// What a welcome can hold.
const ROUTES: usize = 256;

fn session(raw: raw::Session) -> Checked<SessionSettings> {
    let ticket = raw.ticket_seconds.unwrap_or(24 * 3600);
    if !(1..=30 * 24 * 3600).contains(&ticket) {
        return Err("session: ticket-seconds must be between 1 and 2592000".to_owned());
    }
    let cores = raw.cores.unwrap_or(0);
    if cores > 256 {
        return Err("session: cores must be at most 256; 0 is one per CPU".to_owned());
    }
    let routes = match raw.routes {
        None => vec![Prefix::ALL_V4, Prefix::ALL_V6],
        Some(texts) => texts
            .iter()
            .map(|t| {
                t.parse()
                    .map_err(|e| format!("session: routes: '{t}': {e}"))
            })
            .collect::<Checked<Vec<Prefix>>>()?,
    };
    if routes.len() > ROUTES {
        return Err(format!("session: at most {ROUTES} routes are suggested"));
    }
    Ok(SessionSettings {
        ticket_life: Duration::from_secs(ticket),
        dns: raw.dns,
        routes,
        cores,
        pin: raw.pin.unwrap_or(false),
    })
}
