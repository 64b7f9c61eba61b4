//! The operators' API under a name of its own on the public port, if the
//! configuration says so: by TLS only, and always with the admin token.

use std::time::Instant;

use axum::Router;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode};
use rvpn_proto::name::Name;
use tower::ServiceExt;

use super::answer::{Answer, Refusal};
use super::{Front, Visitor, request};
use crate::config::Config;
use crate::limits::Place;

/// Largest answer.
const LIMIT: usize = 64 * 1024 * 1024;

/// Whether the request is for an operator's name. It counts only when the
/// visitor asked for the same name by TLS: then nobody in between has read the
/// token, or put the name there.
pub(super) fn is_asked(head: &Parts, visitor: &Visitor, tls: bool, config: &Config) -> bool {
    if config.admin_public.is_empty() || !tls {
        return false;
    }
    let Ok(host) = request::own_host(head) else {
        return false;
    };
    let lists = config.admin_public.iter().any(|n| n == host.name());
    lists && visitor.asked.as_ref().map(Name::as_str) == Some(host.name())
}

/// Asks the API, and counts tokens that are none.
pub(super) async fn respond(
    front: &Front,
    router: Router,
    request: Request<Incoming>,
    place: Place,
) -> Result<Answer, Refusal> {
    let limit = front.config().limits.login_failures;
    let start = Instant::now();
    if let Some(wait) = front.failures.blocked(place, limit, start) {
        return Err(Refusal::slow_down(wait));
    }
    let request = request.map(axum::body::Body::new);
    let answer = router.oneshot(request).await;
    let (head, body) = answer.unwrap_or_else(|never| match never {}).into_parts();
    if head.status == StatusCode::UNAUTHORIZED {
        front.failures.note(place, limit, start);
    }
    let body = Limited::new(body, LIMIT).collect().await;
    let wrong = |_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the answer is too long");
    Ok(Response::from_parts(
        head,
        Full::new(body.map_err(wrong)?.to_bytes()),
    ))
}
