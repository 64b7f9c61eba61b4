//! A page for operators: who serves, with search and order, and a way to end
//! one. It holds no data itself; it asks the API with the token that it is given.

use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, LOCATION};

use crate::http::answer::common;
use crate::page::CLIENT_HEADERS;

fn part(kind: &'static str, text: &'static str) -> Response {
    let mut response = (StatusCode::OK, text).into_response();
    let headers = response.headers_mut();
    common(headers);
    // The same rules as for the client's page: nothing inline, nothing from elsewhere.
    for (name, value) in CLIENT_HEADERS {
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

pub(super) async fn page() -> Response {
    part(
        "text/html; charset=utf-8",
        include_str!("console/admin.html"),
    )
}

pub(super) async fn style() -> Response {
    part("text/css; charset=utf-8", include_str!("console/admin.css"))
}

pub(super) async fn script() -> Response {
    part(
        "text/javascript; charset=utf-8",
        include_str!("console/admin.js"),
    )
}

fn moved(to: &'static str) -> Response {
    let mut response = StatusCode::MOVED_PERMANENTLY.into_response();
    common(response.headers_mut());
    let to = HeaderValue::from_static(to);
    response.headers_mut().insert(LOCATION, to);
    response
}

pub(super) async fn root() -> Response {
    moved("/admin")
}

/// The page names its parts relative to itself.
pub(super) async fn without_slash() -> Response {
    moved("/admin/")
}
