//! Who may speak to the API.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HOST, ORIGIN};

use super::Desk;
use super::answer::Problem;
use crate::config::host_of;

/// Refuses requests that were made for another host: a name that resolves to
/// loopback is how a page in a browser gets here.
pub(super) async fn host(State(desk): State<Arc<Desk>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (hosts.next().map(|h| h.to_str()), hosts.next()) {
        (Some(Ok(host)), None) => host_of(host),
        _ => None,
    };
    let Some((name, _)) = host else {
        return Problem::bad("a single Host header is needed").into_response();
    };
    let same = match request.uri().authority() {
        Some(authority) => host_of(authority.as_str()).is_some_and(|(n, _)| n == name),
        None => true,
    };
    if !same || !is_ours(&name, &desk) {
        let status = StatusCode::MISDIRECTED_REQUEST;
        return Problem::new(status, "this host is not served here").into_response();
    }
    let foreign = headers.get_all(ORIGIN).iter().any(|origin| {
        let origin = origin.to_str().unwrap_or("");
        let bare = origin.strip_prefix("http://");
        let authority = bare
            .or_else(|| origin.strip_prefix("https://"))
            .unwrap_or("");
        Some(authority) != headers.get(HOST).and_then(|h| h.to_str().ok())
    });
    if foreign {
        let status = StatusCode::FORBIDDEN;
        return Problem::new(status, "pages of other origins are not served").into_response();
    }
    next.run(request).await
}

fn is_ours(name: &str, desk: &Desk) -> bool {
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost"
        || bare.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
        || desk.config().is_admin_name(name)
}

/// Asks for the admin token.
pub(super) async fn token(
    State(desk): State<Arc<Desk>>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let Some(token) = &desk.token else {
        return next.run(request).await;
    };
    let shown = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, shown)| shown.trim());
    match shown {
        Some(shown) if token.is(shown.as_bytes()) => next.run(request).await,
        _ => {
            let detail = "show the token from admin.token in the state directory as a bearer token";
            Problem::new(StatusCode::UNAUTHORIZED, detail).into_response()
        }
    }
}
