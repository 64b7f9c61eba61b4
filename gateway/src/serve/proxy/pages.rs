//! Pages for visitors who are not served. They tell what the visitor should
//! do, and nothing about who exists: all have one length and no name in them.

use http_body_util::{BodyExt, Full};
use hyper::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, LOCATION,
    RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode};
use rvpn_proto::name::Name;

use super::{Answer, Body};

/// Every page is filled up to this.
const LENGTH: usize = 512;

/// A fixed page.
pub(super) fn page(status: StatusCode) -> Answer {
    let (title, text) = match status {
        StatusCode::BAD_REQUEST => ("Bad request", "This request could not be understood."),
        StatusCode::NOT_FOUND => ("Not found", "There is nothing here."),
        StatusCode::MISDIRECTED_REQUEST => (
            "Misdirected request",
            "This connection was made for another name. Try again on a new one.",
        ),
        StatusCode::EXPECTATION_FAILED => (
            "Expectation failed",
            "What this request expects is not done here.",
        ),
        StatusCode::SERVICE_UNAVAILABLE => (
            "Too many visitors",
            "There are too many visitors at the moment. Try again soon.",
        ),
        _ => (
            "Not connected",
            "Nothing answers under this name at the moment. Try again later.",
        ),
    };
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n\
         <h1>{title}</h1>\n<p>{text}</p>\n"
    );
    let missing = LENGTH.saturating_sub(html.len() + 1);
    html.extend(std::iter::repeat_n(' ', missing));
    html.push('\n');
    let mut answer = Response::new(whole(html));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    headers.insert(CONTENT_TYPE, html);
    let nothing = HeaderValue::from_static("default-src 'none'");
    headers.insert(CONTENT_SECURITY_POLICY, nothing);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    answer
}

/// The same, after which nothing of the connection is read.
pub(super) fn closing(status: StatusCode) -> Answer {
    close(page(status))
}

/// The same place by https.
pub(super) fn moved(parts: &Parts, name: &Name) -> Answer {
    let host = match name.as_str().contains(':') {
        true => format!("[{name}]"),
        false => name.to_string(),
    };
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    // `*` is the only path without a slash.
    let path = path.strip_prefix('*').unwrap_or(path);
    let Ok(to) = HeaderValue::from_str(&format!("https://{host}{path}")) else {
        return closing(StatusCode::BAD_REQUEST);
    };
    let mut answer = Response::new(whole(String::new()));
    *answer.status_mut() = match parts.method {
        Method::GET | Method::HEAD => StatusCode::MOVED_PERMANENTLY,
        // Nothing else may become a GET on the way.
        _ => StatusCode::PERMANENT_REDIRECT,
    };
    answer.headers_mut().insert(LOCATION, to);
    close(answer)
}

/// A text as it is.
pub(super) fn plain(text: String) -> Answer {
    let mut answer = Response::new(whole(text));
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let kind = HeaderValue::from_static("text/plain");
    headers.insert(CONTENT_TYPE, kind);
    answer
}

/// After it nothing of the connection is read.
pub(super) fn close(mut answer: Answer) -> Answer {
    let close = HeaderValue::from_static("close");
    answer.headers_mut().insert(CONNECTION, close);
    answer
}

fn whole(text: String) -> Body {
    let body = Full::new(text.into_bytes().into());
    body.map_err(|never| match never {}).boxed_unsync()
}
