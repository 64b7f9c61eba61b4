//! Listeners that are opened and closed while the gateway runs.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Path, State};
use hyper::StatusCode;
use rvpn_proto::name::Name;
use serde::{Deserialize, Serialize};

use super::Desk;
use super::answer::{Json, Problem, ok};
use super::handlers::{Answer, Sent, body};
use crate::config::{Listener, Mode, Network};
use crate::front::listeners::{Added, Fault, Origin, Purpose, View, everywhere};
use crate::front::named::Named;

#[derive(Serialize)]
pub(super) struct Rows {
    listeners: Vec<Row>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    address: SocketAddr,
    mode: &'static str,
    /// The name or client that all visitors go to, if it is not for everything.
    r#for: Option<String>,
    /// `config`, `service-manager` or `api`.
    origin: &'static str,
}

impl From<View> for Row {
    fn from(view: View) -> Row {
        Row {
            address: view.address,
            mode: match view.mode {
                Mode::Auto => "auto",
                Mode::Tls => "tls",
                Mode::Plain => "plain",
            },
            r#for: view.of,
            origin: match view.origin {
                Origin::Config => "config",
                Origin::Inherited => "service-manager",
                Origin::Asked => "api",
            },
        }
    }
}

pub(super) async fn list(State(desk): State<Arc<Desk>>) -> Json<Rows> {
    let all = desk.front.listeners.list().into_iter();
    ok(Rows {
        listeners: all.map(Row::from).collect(),
    })
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ModeAsk {
    Auto,
    Tls,
    Plain,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Ask {
    address: Option<SocketAddr>,
    /// Instead of an address: on all of them.
    port: Option<u16>,
    mode: Option<ModeAsk>,
    #[serde(default)]
    proxy_from: Vec<String>,
    #[serde(default)]
    forwarded_from: Vec<String>,
    /// Whom all visitors go to, whatever they speak.
    r#for: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Outcome {
    status: &'static str,
    address: SocketAddr,
}

pub(super) async fn add(State(desk): State<Arc<Desk>>, sent: Sent) -> Answer<Outcome> {
    let ask: Ask = body(sent)?;
    let address = match (ask.address, ask.port) {
        (Some(address), None) => address,
        (None, Some(port)) => everywhere(port),
        _ => return Err(Problem::bad("give either address or port")),
    };
    let networks = |texts: &[String]| {
        let parsed = texts.iter().map(|n| n.parse::<Network>());
        parsed.collect::<Result<Vec<_>, _>>().map_err(Problem::bad)
    };
    let settings = Listener {
        address,
        mode: match ask.mode {
            None | Some(ModeAsk::Auto) => Mode::Auto,
            Some(ModeAsk::Tls) => Mode::Tls,
            Some(ModeAsk::Plain) => Mode::Plain,
        },
        proxy_from: networks(&ask.proxy_from)?,
        forwarded_from: networks(&ask.forwarded_from)?,
    };
    let purpose = match ask.r#for {
        None => Purpose::Front,
        Some(text) => {
            let wrong = |why| Problem::bad(format!("for: \"{text}\" is no name: {why}"));
            let name = Name::parse(&text).map_err(wrong)?;
            Purpose::Taken(Arc::new(Named(name)))
        }
    };
    let front = &desk.front;
    let (code, status, address) = match front.listeners.add(front, settings, purpose) {
        Added::Added(at) => (StatusCode::CREATED, "added", at),
        Added::Exists(at) => (StatusCode::OK, "exists", at),
        Added::Fault(fault) => return Err(problem(&fault)),
    };
    Ok(Json(code, Outcome { status, address }))
}

fn problem(fault: &Fault) -> Problem {
    let code = match fault {
        Fault::Translated { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        Fault::Taken { .. } | Fault::TooMany => StatusCode::CONFLICT,
        Fault::System { in_use: true, .. } => StatusCode::CONFLICT,
        Fault::System { in_use: false, .. } => StatusCode::UNPROCESSABLE_ENTITY,
        Fault::Closed => StatusCode::SERVICE_UNAVAILABLE,
    };
    Problem::new(code, fault.to_string())
}

pub(super) async fn remove(
    State(desk): State<Arc<Desk>>,
    Path(text): Path<String>,
) -> Result<StatusCode, Problem> {
    let listeners = &desk.front.listeners;
    let address: SocketAddr = match text.parse::<u16>() {
        Ok(port) => {
            let mut all = listeners.list().into_iter().map(|view| view.address);
            all.find(|at| at.port() == port)
                .ok_or_else(|| Problem::missing("listener"))?
        }
        Err(_) => text.parse().map_err(|_| {
            Problem::bad("a listener is named by its address, like 0.0.0.0:9001, or its port")
        })?,
    };
    match listeners.remove(address).await {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::missing("listener")),
    }
}
