//! From what is written to what is meant.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::control::{self, Prefix};
use rvpn_proto::dialect::{Dialect as Variant, Noise, Padding};
use rvpn_proto::name::Pattern;
use rvpn_proto::packer::Profile;

use super::raw::{self, Raw};
use super::{
    AdminAddress, Algorithm, CertificateFiles, Config, Dialect, HelperSettings, Key, KeySource,
    Legacy, Limits, Listener, Mode, Names, Network, Packer, Secret, SessionSettings, acme, demo,
    front, host_of, log, serve,
};

/// Where the system keeps the certificates that everybody believes.
pub(super) const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";
const STATE_DIR: &str = "/var/lib/rvpn";
const ADMIN: &str = "127.0.0.1:7980";
const HELPER_USER: &str = "rvpn-helper";
/// HS256 secrets of the strict policy are at least as long as its hash.
const SECRET_LEN: usize = 32;
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

fn key(raw: raw::Key, base: &Path) -> Checked<Key> {
    let name = name("key", &raw.name)?;
    let wrong = |why: &str| format!("key \"{name}\": {why}");
    let ca_file = raw.ca_file.as_ref().map(|f| base.join(f));
    let source = match (raw.file, raw.secret_file, raw.jwks_file, raw.jwks_url) {
        (Some(file), None, None, None) => {
            let algorithm = match raw.algorithm.as_deref() {
                Some("EdDSA") => Algorithm::EdDsa,
                Some("ES256") => Algorithm::Es256,
                Some("RS256") => Algorithm::Rs256,
                Some(_) | None => {
                    return Err(wrong("algorithm must be EdDSA, ES256 or RS256 beside file"));
                }
            };
            KeySource::Pem {
                algorithm,
                file: base.join(file),
            }
        }
        (None, Some(file), None, None) => {
            if raw.algorithm.as_deref().is_some_and(|a| a != "HS256") {
                return Err(wrong("algorithm must be HS256 beside secret-file"));
            }
            let secret = secret_file(&base.join(file)).map_err(|e| wrong(&e))?;
            if secret.bytes().len() < SECRET_LEN {
                return Err(wrong(&format!(
                    "the secret has {} bytes and needs {SECRET_LEN}; make one with: openssl rand -hex 32",
                    secret.bytes().len()
                )));
            }
            KeySource::Secret(secret)
        }
        (None, None, Some(file), None) => KeySource::JwksFile(base.join(file)),
        (None, None, None, Some(url)) => {
            if !url.starts_with("https://") {
                return Err(wrong("jwks-url must begin with https://"));
            }
            url.parse::<hyper::Uri>()
                .map_err(|e| wrong(&format!("jwks-url: {e}")))?;
            KeySource::JwksUrl {
                url: url.into(),
                ca_file: ca_file.unwrap_or_else(|| SYSTEM_CA.into()),
            }
        }
        _ => {
            return Err(wrong(
                "give exactly one of file, secret-file, jwks-file and jwks-url",
            ));
        }
    };
    if raw.algorithm.is_some()
        && matches!(source, KeySource::JwksFile(_) | KeySource::JwksUrl { .. })
    {
        return Err(wrong(
            "a JWK set names its algorithms itself; leave algorithm out",
        ));
    }
    Ok(Key {
        name,
        source,
        issuer: raw.issuer,
        audience: raw.audience,
        class: raw.class,
    })
}

fn secret_file(path: &Path) -> Checked<Secret> {
    let mut bytes =
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    // An editor's last newline is not part of it.
    while bytes.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
        bytes.pop();
    }
    Ok(Secret::new(bytes))
}

fn one_legacy(raw: raw::Legacy, base: &Path) -> Checked<Legacy> {
    let name = name("legacy", &raw.name)?;
    let wrong = |why: &str| format!("legacy \"{name}\": {why}");
    let secret = match (raw.secret, raw.secret_file) {
        (Some(secret), None) => secret,
        (None, Some(file)) => secret_file(&base.join(file)).map_err(|e| wrong(&e))?,
        _ => return Err(wrong("give exactly one of secret and secret-file")),
    };
    if secret.bytes().is_empty() {
        return Err(wrong("the secret is empty; anybody could sign with it"));
    }
    let mut domains = Vec::new();
    for domain in raw.domains {
        let pattern = Pattern::parse(&domain)
            .map_err(|why| wrong(&format!("\"{domain}\" is no domain: {why}")))?;
        domains.push(pattern);
    }
    let ports = ports(raw.ports).map_err(|e| wrong(&e))?;
    let profile = raw.profile.map(|p| profile(&p)).transpose();
    let profile = profile.map_err(|e| wrong(&e))?;
    Ok(Legacy {
        account: format!("legacy:{name}").into(),
        name,
        secret,
        domains,
        ports,
        profile,
        class: raw.class,
    })
}

fn ports(raw: Vec<raw::Ports>) -> Checked<Vec<RangeInclusive<u16>>> {
    let several = |text: &str| {
        let (first, last) = text.split_once('-')?;
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (0 < first && first <= last).then_some(first..=last)
    };
    raw.into_iter()
        .map(|ports| match ports {
            raw::Ports::One(port @ 1..) => Ok(port..=port),
            raw::Ports::One(0) => Err("port 0 is none".to_owned()),
            raw::Ports::Several(text) => several(&text)
                .ok_or_else(|| format!("\"{text}\" is no range of ports; write it like 2000-2999")),
        })
        .collect()
}

fn packer(raw: raw::Packer, legacy: &[Legacy]) -> Checked<Packer> {
    let some = legacy.iter().any(|l| !l.domains.is_empty());
    Ok(Packer {
        enabled: raw.enabled.unwrap_or(some),
        profile: raw
            .profile
            .map(|p| profile(&p))
            .transpose()
            .map_err(|why| format!("packer: {why}"))?,
    })
}

fn profile(text: &str) -> Checked<Profile> {
    text.parse()
        .map_err(|why| format!("profile \"{text}\" is {why}"))
}

fn dialect(raw: raw::Dialect, legacy: &[Legacy]) -> Checked<Dialect> {
    let wrong = |why: &str| format!("dialect \"{}\": {why}", raw.path);
    let is_path = raw.path.starts_with('/')
        && raw.path.len() <= NAME_LEN
        && raw
            .path
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"?#%\\".contains(&b));
    if !is_path {
        return Err(wrong("the path must begin with / and have no ?, # or %"));
    }
    if raw.path == control::PATH || raw.path.starts_with("/rvpn/") {
        return Err(wrong("paths under /rvpn/ belong to the gateway itself"));
    }
    let variant = match raw.kind {
        raw::DialectKind::Raw => Variant::SnatRaw,
        raw::DialectKind::Text4 => Variant::TextV4,
        raw::DialectKind::Text46 => Variant::TextDual,
        raw::DialectKind::Padded => Variant::Padded,
    };
    if raw.anonymous && raw.legacy.is_some() {
        return Err(wrong("anonymous and legacy exclude each other"));
    }
    let account = raw.account.as_deref();
    let account = account.map(|a| name("dialect: account", a)).transpose()?;
    let by_name = |n: &String| legacy.iter().find(|l| *l.name == **n);
    let legacy = match &raw.legacy {
        Some(name) => match by_name(name) {
            Some(found) => Some(Arc::clone(&found.name)),
            None => return Err(wrong(&format!("there is no [[legacy]] named \"{name}\""))),
        },
        None => None,
    };
    if account.is_some() && legacy.is_some() {
        return Err(wrong(
            "with legacy the account is that of the [[legacy]] block; leave account out",
        ));
    }
    let padding = match &raw.padding {
        None => Padding::NONE,
        Some(_) if variant != Variant::Padded => {
            return Err(wrong("only the kind \"padded\" knows padding"));
        }
        Some(raw::Padding::Named(preset)) => match preset.as_str() {
            "none" => Padding::NONE,
            "slight" => Padding::SLIGHT,
            "broad" => Padding::BROAD,
            _ => {
                return Err(wrong(
                    "padding is \"none\", \"slight\", \"broad\" or a table of its own",
                ));
            }
        },
        Some(raw::Padding::Own(own)) => own_padding(own).map_err(|e| wrong(&e))?,
    };
    Ok(Dialect {
        variant,
        account,
        anonymous: raw.anonymous,
        legacy,
        class: raw.class,
        padding,
        path: raw.path,
    })
}

fn own_padding(own: &raw::OwnPadding) -> Checked<Padding> {
    let noise = match (own.noise_bytes, own.noise_every_ms) {
        (Some(bytes), Some(every_ms)) => Some(Noise { bytes, every_ms }),
        (None, None) => None,
        _ => return Err("noise needs both noise-bytes and noise-every-ms".to_owned()),
    };
    let padding = Padding {
        bytes: own.bytes,
        noise,
    };
    let ordered = |(low, high): (u16, u16)| low <= high && high <= 2048;
    let fits = ordered(padding.bytes)
        && padding.noise.is_none_or(|n| {
            ordered(n.bytes)
                && n.every_ms.0 <= n.every_ms.1
                && (10..=60_000).contains(&n.every_ms.0)
        });
    match fits {
        true => Ok(padding),
        false => Err(
            "ranges are [least, most]; bytes at most 2048, noise at least every 60 s and at most every 10 ms"
                .to_owned(),
        ),
    }
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
