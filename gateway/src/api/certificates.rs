//! Certificates that the gateway gets by itself.

use std::sync::Arc;

use axum::extract::{Path, State};
use hyper::StatusCode;
use rvpn_proto::name::Name;
use serde::Serialize;

use super::Desk;
use super::answer::{Json, Problem, ok};
use crate::acme::CertificateRow;

#[derive(Serialize)]
pub(super) struct Certificates {
    certificates: Vec<CertificateRow>,
}

pub(super) async fn list(State(desk): State<Arc<Desk>>) -> Json<Certificates> {
    ok(Certificates {
        certificates: desk.front.acme.list(),
    })
}

pub(super) async fn retry(
    State(desk): State<Arc<Desk>>,
    Path(name): Path<String>,
) -> Result<StatusCode, Problem> {
    let name = Name::parse(&name).map_err(|e| Problem::bad(e.to_string()))?;
    match desk.front.acme.retry(&name) {
        true => Ok(StatusCode::ACCEPTED),
        false => Err(Problem::missing("certificate")),
    }
}
