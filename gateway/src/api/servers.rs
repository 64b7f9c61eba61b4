//! Clients that serve, and the names and ports that they serve.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use axum::extract::{Path, State};
use hyper::StatusCode;
use serde::Serialize;

use super::Desk;
use super::answer::{Json, Problem, ok};
use crate::serve::count::Traffic;
use crate::serve::table::{NameView, ServerView, What};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Counts {
    /// Visitors now, and so far.
    visitors: u64,
    visitors_total: u64,
    requests: u64,
    responses: u64,
    /// Bytes from visitors to the client.
    inbound: u64,
    /// Bytes from the client to visitors.
    outbound: u64,
    /// When something last passed; absent if never.
    last_ms: Option<u64>,
}

impl From<&Traffic> for Counts {
    fn from(traffic: &Traffic) -> Counts {
        Counts {
            visitors: traffic.current,
            visitors_total: traffic.total,
            requests: traffic.requests,
            responses: traffic.responses,
            inbound: traffic.inbound,
            outbound: traffic.outbound,
            last_ms: (traffic.last_ms > 0).then_some(traffic.last_ms),
        }
    }
}

/// A name or a port; the other is absent.
#[derive(Serialize)]
struct Which {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

impl From<&What> for Which {
    fn from(what: &What) -> Which {
        match what {
            What::Name(pattern) => Which {
                name: Some(pattern.to_string()),
                port: None,
            },
            What::Port(port) => Which {
                name: None,
                port: Some(*port),
            },
        }
    }
}

#[derive(Serialize)]
struct OfferRow {
    #[serde(flatten)]
    which: Which,
    #[serde(flatten)]
    counts: Counts,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ServerRow {
    id: u64,
    account: String,
    instance: String,
    peer: SocketAddr,
    started_ms: u64,
    live: bool,
    offers: Vec<OfferRow>,
    #[serde(flatten)]
    counts: Counts,
}

impl From<&ServerView> for ServerRow {
    fn from(view: &ServerView) -> ServerRow {
        let since = view.started.duration_since(UNIX_EPOCH);
        ServerRow {
            id: view.id,
            account: view.account.to_string(),
            instance: view.instance.to_string(),
            peer: view.peer,
            started_ms: since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            live: view.live,
            offers: view
                .offers
                .iter()
                .map(|(what, counts)| OfferRow {
                    which: what.into(),
                    counts: counts.into(),
                })
                .collect(),
            counts: (&view.traffic).into(),
        }
    }
}

#[derive(Serialize)]
struct NameRow {
    #[serde(flatten)]
    which: Which,
    account: String,
    servers: Vec<u64>,
    #[serde(flatten)]
    counts: Counts,
}

impl From<&NameView> for NameRow {
    fn from(view: &NameView) -> NameRow {
        NameRow {
            which: (&view.what).into(),
            account: view.account.to_string(),
            servers: view.servers.clone(),
            counts: (&view.traffic).into(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Servers {
    servers: Vec<ServerRow>,
}

pub(super) async fn list(State(desk): State<Arc<Desk>>) -> Json<Servers> {
    let table = desk.front.table.snapshot();
    ok(Servers {
        servers: table.servers.iter().map(ServerRow::from).collect(),
    })
}

#[derive(Serialize)]
pub(super) struct Names {
    names: Vec<NameRow>,
}

pub(super) async fn names(State(desk): State<Arc<Desk>>) -> Json<Names> {
    let table = desk.front.table.snapshot();
    ok(Names {
        names: table.names.iter().map(NameRow::from).collect(),
    })
}

pub(super) async fn kick(
    State(desk): State<Arc<Desk>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    let id: u64 = id
        .parse()
        .map_err(|_| Problem::bad("a server's id is a number: see /api/v1/servers"))?;
    match desk.front.table.kick(id) {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::missing("server")),
    }
}
