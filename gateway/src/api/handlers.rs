//! One function per thing that can be asked for.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::response::IntoResponse;
use hyper::StatusCode;
use rvpn_proto::name::Pattern;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Desk;
use super::answer::{Json, Problem, ok};
use super::view::{KeySummary, Summary, UsageRow};
use crate::auth::{base64, now, rights, token};
use crate::config::check::is_name;
use crate::http::join;
use crate::store::{DeviceKey, Invite, Revocation, Scope, UsageQuery};

pub(super) type Answer<T> = Result<Json<T>, Problem>;
type Asked<T> = Result<Query<T>, QueryRejection>;
pub(super) type Sent = Result<Bytes, BytesRejection>;

/// Longest list of the ledger.
const MOST_ROWS: u32 = 10_000;
const SOME_ROWS: u32 = 1000;
/// How long an invite is good unless said otherwise, and at most.
const INVITE_LIFE: u64 = 24 * 3600;
const LONGEST: u64 = 10 * 365 * 24 * 3600;
/// Devices of one invite.
const MOST_USES: u32 = 1000;

#[derive(Serialize)]
struct Status {
    status: &'static str,
}

pub(super) async fn live() -> impl IntoResponse {
    ok(Status { status: "live" })
}

pub(super) async fn ready(State(desk): State<Arc<Desk>>) -> impl IntoResponse {
    match desk.front.ready() {
        Ok(()) => ok(Status { status: "ready" }).into_response(),
        Err(why) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
    }
}

pub(super) async fn nowhere() -> impl IntoResponse {
    Problem::missing("resource")
}

pub(super) async fn not_so() -> impl IntoResponse {
    let status = StatusCode::METHOD_NOT_ALLOWED;
    Problem::new(status, "this resource knows other methods")
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Health {
    version: &'static str,
    ready: bool,
    reason: Option<String>,
    uptime_seconds: u64,
    connections: usize,
    pending: usize,
    refused_logins: u64,
}

pub(super) async fn health(State(desk): State<Arc<Desk>>) -> Json<Health> {
    let front = &desk.front;
    let reason = front.ready().err();
    ok(Health {
        version: env!("CARGO_PKG_VERSION"),
        ready: reason.is_none(),
        reason,
        uptime_seconds: desk.started.elapsed().as_secs(),
        connections: front.gate.connections(),
        pending: front.pending.count(),
        refused_logins: front.refusals.total(),
    })
}

pub(super) async fn config(State(desk): State<Arc<Desk>>) -> Json<Summary> {
    let front = &desk.front;
    ok(Summary::of(
        &desk.config(),
        front.gate.ring().summary(),
        front.tls.self_signed(),
        front.tls.fingerprint().to_string(),
    ))
}

#[derive(Serialize)]
pub(super) struct Sessions {
    sessions: Vec<super::SessionRow>,
}

pub(super) async fn sessions(State(desk): State<Arc<Desk>>) -> Json<Sessions> {
    ok(Sessions {
        sessions: desk.directory.list(),
    })
}

pub(super) async fn kick(
    State(desk): State<Arc<Desk>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    let digits = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
    let number = u128::from_str_radix(&id, 16)
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| Problem::bad("a session's id has 32 hexadecimal digits"))?;
    match desk.directory.kick(number) {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::missing("session")),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct UsageAsk {
    account: Option<String>,
    since_ms: Option<u64>,
    limit: Option<u32>,
}

impl UsageAsk {
    fn query(asked: Asked<UsageAsk>) -> Result<UsageQuery, Problem> {
        let Query(ask) = asked.map_err(|e| Problem::bad(e.body_text()))?;
        let limit = ask.limit.unwrap_or(SOME_ROWS);
        if !(1..=MOST_ROWS).contains(&limit) {
            return Err(Problem::bad(format!("limit is between 1 and {MOST_ROWS}")));
        }
        Ok(UsageQuery {
            account: ask.account,
            since_ms: ask.since_ms,
            limit,
        })
    }
}

#[derive(Serialize)]
pub(super) struct Usages {
    usage: Vec<UsageRow>,
}

pub(super) async fn usage(State(desk): State<Arc<Desk>>, asked: Asked<UsageAsk>) -> Answer<Usages> {
    let query = UsageAsk::query(asked)?;
    let store = desk.front.gate.store();
    let rows = store.run(move |e| e.usage(&query)).await?;
    Ok(ok(Usages {
        usage: rows.into_iter().map(UsageRow::from).collect(),
    }))
}

#[derive(Serialize)]
pub(super) struct Accounts {
    accounts: Vec<crate::store::AccountUsage>,
}

pub(super) async fn usage_by_account(
    State(desk): State<Arc<Desk>>,
    asked: Asked<UsageAsk>,
) -> Answer<Accounts> {
    let query = UsageAsk::query(asked)?;
    let store = desk.front.gate.store();
    let accounts = store.run(move |e| e.usage_by_account(&query)).await?;
    Ok(ok(Accounts { accounts }))
}

#[derive(Serialize)]
pub(super) struct Invites {
    invites: Vec<Invite>,
}

pub(super) async fn invites(State(desk): State<Arc<Desk>>) -> Answer<Invites> {
    let invites = desk.front.gate.store().run(|e| e.invites()).await?;
    Ok(ok(Invites { invites }))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct InviteAsk {
    /// Who the device will belong to.
    account: String,
    /// How many devices.
    uses: Option<u32>,
    /// How long the code is good, in seconds.
    valid_seconds: Option<u64>,
    /// How long a device may log in, in seconds; without end if absent.
    device_seconds: Option<u64>,
    /// The helper's policy class.
    #[serde(default)]
    class: u8,
    /// Names that the device may serve.
    #[serde(default)]
    names: Vec<String>,
    /// TCP ports of the gateway that it may have.
    #[serde(default)]
    ports: Vec<u16>,
    /// What clients connect to, `host[:port]`; the first name or address of the
    /// configuration if absent.
    address: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Invited {
    link: String,
    code: String,
    invite: Invite,
}

pub(super) fn body<T: DeserializeOwned>(sent: Sent) -> Result<T, Problem> {
    let bytes = sent.map_err(|e| Problem::new(e.status(), e.body_text()))?;
    serde_json::from_slice(&bytes).map_err(|e| Problem::bad(e.to_string()))
}

pub(super) async fn invite(State(desk): State<Arc<Desk>>, sent: Sent) -> Answer<Invited> {
    let ask: InviteAsk = body(sent)?;
    if !is_name(&ask.account) || ask.account.starts_with("legacy:") {
        return Err(Problem::bad(
            "account: up to 128 letters, digits and any of . _ : @ -, and not of a legacy block",
        ));
    }
    let uses = ask.uses.unwrap_or(1);
    let life = ask.valid_seconds.unwrap_or(INVITE_LIFE);
    let lasts = |s: u64| (1..=LONGEST).contains(&s);
    if !(1..=MOST_USES).contains(&uses) || !lasts(life) || !ask.device_seconds.is_none_or(lasts) {
        return Err(Problem::bad(format!(
            "uses is between 1 and {MOST_USES}, times are between 1 and {LONGEST} seconds"
        )));
    }
    let (names, ports) = served(&desk, &ask.names, ask.ports)?;
    let authority = match ask.address {
        Some(address) if join::is_authority(&address) => address,
        Some(_) => return Err(Problem::bad("address is not of the form host[:port]")),
        None => authority(&desk).ok_or_else(|| {
            Problem::bad("say in address what clients connect to; the configuration has no name")
        })?,
    };
    let made = || -> std::io::Result<_> {
        let (code, hash) = join::new_code()?;
        // In a command it could be taken for an option if it began with a '-'.
        let id = format!("v.{}", base64::to_url(&crate::ticket::random::<9>()?));
        Ok((code, hash, id))
    };
    let (code, hash, id) =
        made().map_err(|e| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
    let created = now();
    let invite = Invite {
        id,
        account: ask.account,
        left: uses,
        created,
        expires: created + life,
        device_life: ask.device_seconds,
        class: ask.class,
        names,
        ports,
    };
    let stored = invite.clone();
    let store = desk.front.gate.store();
    store.run(move |e| e.add_invite(&hash, &stored)).await?;
    let pin = desk.pin().map(|f| f.to_string());
    Ok(Json(
        StatusCode::CREATED,
        Invited {
            link: join::link(&authority, pin.as_deref(), &code),
            code,
            invite,
        },
    ))
}

/// What a device may serve, in the one form that names have.
fn served(
    desk: &Desk,
    names: &[String],
    ports: Vec<u16>,
) -> Result<(Vec<String>, Vec<u16>), Problem> {
    if names.len() > rights::MOST || ports.len() > rights::MOST || ports.contains(&0) {
        return Err(Problem::bad(format!(
            "at most {} names and ports, and no port 0",
            rights::MOST
        )));
    }
    let config = desk.config();
    let one = |text: &String| {
        let pattern = Pattern::parse(text)
            .map_err(|why| Problem::bad(format!("names: {text:?} cannot be served: {why}")))?;
        match config.serve.reserves(&pattern) {
            true => Err(Problem::bad(format!(
                "names: {pattern} belongs to the gateway"
            ))),
            false => Ok(pattern.to_string()),
        }
    };
    Ok((names.iter().map(one).collect::<Result<_, _>>()?, ports))
}

/// What clients connect to, as far as the configuration tells.
fn authority(desk: &Desk) -> Option<String> {
    let config = desk.config();
    let listener = config.listeners.first()?;
    let ip = listener.address.ip();
    let host = match config.names.first() {
        Some(name) => name.to_owned(),
        None if ip.is_unspecified() => return None,
        None if ip.is_ipv6() => format!("[{ip}]"),
        None => ip.to_string(),
    };
    Some(match listener.address.port() {
        443 => host,
        port => format!("{host}:{port}"),
    })
}

pub(super) async fn remove_invite(
    State(desk): State<Arc<Desk>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    let store = desk.front.gate.store();
    match store.run(move |e| e.remove_invite(&id)).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::missing("invite")),
    }
}

#[derive(Serialize)]
pub(super) struct Revocations {
    revocations: Vec<Revocation>,
}

pub(super) async fn revocations(State(desk): State<Arc<Desk>>) -> Answer<Revocations> {
    let store = desk.front.gate.store();
    let revocations = store.run(|e| e.revocations()).await?;
    Ok(ok(Revocations { revocations }))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RevokeAsk {
    scope: Scope,
    value: String,
    #[serde(default)]
    reason: String,
    /// Until when, in seconds since 1970; for good if absent.
    until: Option<u64>,
}

#[derive(Serialize)]
pub(super) struct Revoked {
    revocation: Revocation,
    ended: usize,
}

pub(super) async fn revoke(State(desk): State<Arc<Desk>>, sent: Sent) -> Answer<Revoked> {
    let ask: RevokeAsk = body(sent)?;
    if !token::is_plain(&ask.value) {
        return Err(Problem::bad(
            "value is not a jti or subject that a token can have",
        ));
    }
    if ask.reason.len() > 200 || ask.reason.chars().any(char::is_control) {
        return Err(Problem::bad("reason is one line of at most 200 bytes"));
    }
    let revocation = Revocation {
        scope: ask.scope,
        value: ask.value,
        reason: ask.reason,
        created: now(),
        until: ask.until,
    };
    let ended = desk.front.gate.revoke(revocation.clone()).await?;
    Ok(Json(StatusCode::CREATED, Revoked { revocation, ended }))
}

pub(super) async fn remove_revocation(
    State(desk): State<Arc<Desk>>,
    Path((scope, value)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let scope = match scope.as_str() {
        "jti" => Scope::Jti,
        "subject" => Scope::Subject,
        _ => return Err(Problem::bad("a revocation is of a jti or a subject")),
    };
    match desk.front.gate.unrevoke(scope, &value).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::missing("revocation")),
    }
}

#[derive(Serialize)]
pub(super) struct Keys {
    configured: Vec<KeySummary>,
    devices: Vec<DeviceKey>,
}

pub(super) async fn keys(State(desk): State<Arc<Desk>>) -> Answer<Keys> {
    let gate = &desk.front.gate;
    let devices = gate.store().run(|e| e.devices()).await?;
    let configured = gate.ring().summary().into_iter();
    Ok(ok(Keys {
        configured: configured
            .map(|(name, algorithm)| KeySummary { name, algorithm })
            .collect(),
        devices,
    }))
}

#[derive(Serialize)]
pub(super) struct Removed {
    ended: usize,
}

pub(super) async fn remove_key(
    State(desk): State<Arc<Desk>>,
    Path(id): Path<String>,
) -> Answer<Removed> {
    match desk.front.gate.remove_device(&id).await? {
        Some(ended) => Ok(ok(Removed { ended })),
        None => Err(Problem::missing("device key")),
    }
}
