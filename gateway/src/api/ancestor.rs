//! The API as the first reverse VPN had it, for tools that know it.
//!
//! Its names and its envelope, always status 200; but the two directions mean
//! the same everywhere, which they did not there: *in* is what came from the
//! client that serves, *out* is what went to it. Whoever asks shows the admin
//! token, like everybody here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use serde::Serialize;
use serde_json::{Value, json};

use super::Desk;
use super::count;
use crate::auth::now;
use crate::http::answer::common;
use crate::serve::count::Traffic;
use crate::serve::table::{Connections, ServerView, Snapshot, What};

/// Both spellings of the prefix: its code said one, its manual the other.
const PREFIXES: [&str; 2] = ["/api/com.daplie.tunnel", "/api/com.daplie.rvpn"];

/// Numbers the answers.
static LAST: AtomicU64 = AtomicU64::new(0);

/// Below both prefixes. A path with a slash too many or too few leads to the
/// right one.
pub(super) fn routes() -> Router<Arc<Desk>> {
    PREFIXES.into_iter().fold(Router::new(), |router, prefix| {
        let at = |path: &str| format!("{prefix}{path}");
        router
            .route(&at("/status/"), get(status))
            .route(&at("/status"), get(other_slash))
            .route(&at("/servers"), get(servers))
            .route(&at("/servers/"), get(other_slash))
            .route(&at("/server/"), get(no_server))
            .route(&at("/server"), get(other_slash))
            .route(&at("/server/{id}"), get(server))
            .route(&at("/server/{id}/"), get(other_slash))
            .route(&at("/domains"), get(domains))
            .route(&at("/domains/"), get(other_slash))
            .route(&at("/domain/"), get(no_domain))
            .route(&at("/domain"), get(other_slash))
            .route(&at("/domain/{name}"), get(domain))
            .route(&at("/domain/{name}/"), get(other_slash))
    })
}

async fn other_slash(uri: Uri) -> Response {
    let path = uri.path();
    let mut to = match path.strip_suffix('/') {
        Some(shorter) => shorter.to_owned(),
        None => format!("{path}/"),
    };
    if let Some(query) = uri.query() {
        to.push('?');
        to.push_str(query);
    }
    let mut response = StatusCode::MOVED_PERMANENTLY.into_response();
    common(response.headers_mut());
    if let Ok(to) = HeaderValue::from_str(&to) {
        response.headers_mut().insert(LOCATION, to);
    }
    response
}

#[derive(Serialize)]
struct Envelope {
    r#type: &'static str,
    schema: &'static str,
    txts: u64,
    txid: u64,
    error: &'static str,
    error_description: &'static str,
    error_uri: String,
    result: Value,
}

type Outcome = Result<Value, &'static str>;

fn envelope(kind: &'static str, uri: &Uri, outcome: Outcome) -> Response {
    let (error, result) = match outcome {
        Ok(result) => ("ok", result),
        Err(why) => (why, Value::Null),
    };
    let failed = result.is_null();
    respond(&Envelope {
        r#type: kind,
        schema: "",
        txts: now(),
        txid: LAST.fetch_add(1, Ordering::Relaxed) + 1,
        error,
        error_description: if failed { error } else { "" },
        error_uri: if failed {
            uri.path().to_owned()
        } else {
            String::new()
        },
        result,
    })
}

fn respond(body: &impl Serialize) -> Response {
    let body = serde_json::to_vec(body).unwrap_or_default();
    let mut response = (StatusCode::OK, body).into_response();
    common(response.headers_mut());
    let kind = HeaderValue::from_static("application/json; charset=UTF-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

async fn status(State(desk): State<Arc<Desk>>, uri: Uri) -> Response {
    let config = desk.config();
    let table = desk.front.table.snapshot();
    let dead = config.serve.dead_time;
    let admin = config.admin_public.iter().chain(&config.admin_names).next();
    let result = json!({
        "name": "rvpn-gateway",
        "uptime": desk.started.elapsed().as_secs_f64(),
        "wss_domain": config.names.first().unwrap_or_default(),
        "admin_domain": admin.map_or("", String::as_str),
        "loadbalance_default_method": config.serve.balance.as_str(),
        "dead_time": {
            "dwell": dead.dwell.as_secs(),
            "idle": dead.idle.as_secs(),
            "cancel_check": dead.cancel_check.as_secs(),
        },
        "admin_traffic": count::ADMIN.read(),
        "traffic": traffic(&table.traffic),
        "ext_connections": connections(table.visitors),
        "wss_connections": connections(table.tunnels),
    });
    envelope("status/GET", &uri, Ok(result))
}

fn connections(of: Connections) -> Value {
    json!({"current_connections": of.current, "total_connections": of.total})
}

/// As it stood there, in capitals.
fn traffic(of: &Traffic) -> Value {
    json!({
        "Requests": of.requests,
        "Responses": of.responses,
        "BytesIn": of.outbound,
        "BytesOut": of.inbound,
    })
}

/// The first of its names, by which it was known.
fn name_of(server: &ServerView) -> String {
    let first = server.names().next();
    first.map_or_else(|| server.account.to_string(), ToString::to_string)
}

fn one_domain(server: &ServerView, what: &What, counts: &Traffic) -> Value {
    json!({
        "domain_name": what.to_string(),
        "server_id": server.id,
        "bytes_in": counts.outbound,
        "bytes_out": counts.inbound,
        "requests": counts.requests,
        "responses": counts.responses,
        "source_addr": server.peer.to_string(),
    })
}

fn one_server(server: &ServerView) -> Value {
    let counts = &server.traffic;
    let now = SystemTime::now();
    let since = |at: SystemTime| now.duration_since(at).map_or(0.0, |d| d.as_secs_f64());
    let last = UNIX_EPOCH + std::time::Duration::from_millis(counts.last_ms);
    let offers = server.offers.iter();
    let domains: Vec<_> = offers.map(|(w, c)| one_domain(server, w, c)).collect();
    json!({
        "server_name": name_of(server),
        "server_id": server.id,
        "domains": domains,
        "duration": since(server.started),
        "idle": since(last.max(server.started)),
        "bytes_in": counts.outbound,
        "bytes_out": counts.inbound,
        "requests": counts.requests,
        "responses": counts.responses,
        "source_address": server.peer.to_string(),
        "server_state": server.live,
    })
}

async fn servers(State(desk): State<Arc<Desk>>, uri: Uri) -> Response {
    let table = desk.front.table.snapshot();
    let all: Vec<_> = table.servers.iter().map(one_server).collect();
    envelope("servers/GET", &uri, Ok(json!({"servers": all})))
}

async fn no_server(uri: Uri) -> Response {
    envelope("server/GET", &uri, Err("server-id is missing"))
}

async fn server(State(desk): State<Arc<Desk>>, Path(id): Path<String>, uri: Uri) -> Response {
    let find = || {
        let id: u64 = id.parse().map_err(|_| "server-id is not an integer")?;
        let table = desk.front.table.snapshot();
        let found = table.servers.iter().find(|s| s.id == id);
        let mut one = one_server(found.ok_or("server-id was not found")?);
        if let Some(fields) = one.as_object_mut() {
            fields.remove("requests");
            fields.remove("responses");
        }
        Ok(one)
    };
    envelope("server/GET", &uri, find())
}

async fn domains(State(desk): State<Arc<Desk>>, uri: Uri) -> Response {
    let table = desk.front.table.snapshot();
    let all: Vec<_> = table
        .names
        .iter()
        .map(|name| {
            let by: Vec<_> = offers(&table, &name.what)
                .map(|(server, counts)| {
                    json!({"server_name": name_of(server), "traffic": traffic(counts)})
                })
                .collect();
            json!({
                "domain_name": name.what.to_string(),
                "server_total": by.len(),
                "servers": by,
                "traffic": traffic(&name.traffic),
            })
        })
        .collect();
    let result = json!({
        "domain_total": all.len(),
        "domains": all,
        "traffic": traffic(&table.traffic),
    });
    envelope("domains/GET", &uri, Ok(result))
}

/// Who serves it, and how much of it.
fn offers<'a>(
    table: &'a Snapshot,
    what: &'a What,
) -> impl Iterator<Item = (&'a ServerView, &'a Traffic)> {
    table.servers.iter().filter_map(move |server| {
        let found = server.offers.iter().find(|(w, _)| w == what);
        found.map(|(_, counts)| (server, counts))
    })
}

async fn no_domain(uri: Uri) -> Response {
    envelope("domain/GET", &uri, Err("domain-name is missing"))
}

async fn domain(State(desk): State<Arc<Desk>>, Path(name): Path<String>, uri: Uri) -> Response {
    let table = desk.front.table.snapshot();
    let wanted = name.to_ascii_lowercase();
    let found = table.names.iter().find(|n| n.what.to_string() == wanted);
    let outcome = found.ok_or("domain-name was not found").map(|found| {
        let by = offers(&table, &found.what);
        by.map(|(server, counts)| one_domain(server, &found.what, counts))
            .collect()
    });
    envelope("domain/GET", &uri, outcome)
}

/// The form of February 2017, without an envelope.
pub(super) async fn first_servers(State(desk): State<Arc<Desk>>) -> Response {
    let table = desk.front.table.snapshot();
    let live = table.servers.iter().filter(|s| s.live);
    let all: Vec<_> = live
        .map(|server| {
            let offers = server.offers.iter();
            let domains: Vec<_> = offers
                .map(|(what, counts)| {
                    json!({
                        "domain": what.to_string(),
                        "bytes_in": counts.outbound,
                        "bytes_out": counts.inbound,
                    })
                })
                .collect();
            let whole = one_server(server);
            json!({
                "server_name": whole["server_name"],
                "domains": domains,
                "duration": whole["duration"],
                "bytes_in": whole["bytes_in"],
                "bytes_out": whole["bytes_out"],
            })
        })
        .collect();
    respond(&json!({"servers": all}))
}
