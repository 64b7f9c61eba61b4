//! What the public port answers. None of it says what is behind it.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue, LOCATION, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};

use super::Whole;
use crate::config::Demo;
use crate::page::{self, Part};

/// An answer.
pub type Answer = Response<Whole>;

/// To whoever stopped in the middle of a request.
pub(super) const TIMEOUT: &[u8] =
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// No, and why, as far as that is anybody's business.
#[derive(Clone, Debug)]
pub struct Refusal {
    status: StatusCode,
    text: &'static str,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Refusal {
    /// With a word to whoever reads it.
    pub fn new(status: StatusCode, text: &'static str) -> Refusal {
        Refusal {
            status,
            text,
            header: None,
        }
    }

    /// Not let in; nobody is told why.
    pub fn forbidden() -> Refusal {
        Refusal::new(StatusCode::FORBIDDEN, "forbidden")
    }

    /// Too many tries.
    pub fn slow_down(wait: Duration) -> Refusal {
        Refusal::later(StatusCode::TOO_MANY_REQUESTS, "too many requests", wait)
    }

    /// Nobody can be let in now.
    pub fn busy(wait: Duration) -> Refusal {
        Refusal::later(StatusCode::SERVICE_UNAVAILABLE, "come back later", wait)
    }

    /// Not a WebSocket where one is expected.
    pub fn upgrade_required() -> Refusal {
        let thirteen = HeaderValue::from_static("13");
        Refusal {
            status: StatusCode::UPGRADE_REQUIRED,
            text: "Upgrade Required",
            header: Some((SEC_WEBSOCKET_VERSION, thirteen)),
        }
    }

    fn later(status: StatusCode, text: &'static str, wait: Duration) -> Refusal {
        let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
        Refusal {
            status,
            text,
            header: Some((RETRY_AFTER, HeaderValue::from(seconds))),
        }
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn into_answer(self) -> Answer {
        let mut answer = text(self.status, self.text);
        // What was sent behind a refused request is never looked at.
        let close = HeaderValue::from_static("close");
        answer.headers_mut().insert(CONNECTION, close);
        if self.status == StatusCode::UPGRADE_REQUIRED {
            let websocket = HeaderValue::from_static("websocket");
            answer.headers_mut().insert(UPGRADE, websocket);
        }
        if let Some((name, value)) = self.header {
            answer.headers_mut().insert(name, value);
        }
        answer
    }
}

/// The WebSocket begins. No extension is ever agreed to: compressing what
/// others encrypted hides nothing and leaks lengths.
pub(super) fn switching(accept: &str, protocol: Option<&'static str>) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    if let Ok(accept) = HeaderValue::from_str(accept) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(protocol) = protocol {
        let protocol = HeaderValue::from_static(protocol);
        headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    answer
}

/// The page for everybody.
pub(super) fn landing() -> Answer {
    let mut answer = whole(
        StatusCode::OK,
        "text/html; charset=utf-8",
        page::LANDING.into(),
    );
    let policy = HeaderValue::from_static(page::POLICY);
    answer.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
    answer
}

/// A part of the client page. Only what comes from here may run in it, and
/// nobody else may look into it.
pub(super) fn client(part: &Part, demo: Option<&Demo>) -> Answer {
    let mut answer = whole(StatusCode::OK, part.kind, part.body(demo));
    let headers = answer.headers_mut();
    for (name, value) in page::CLIENT_HEADERS {
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    answer
}

/// Elsewhere on this host.
pub(super) fn moved(to: &'static str) -> Answer {
    let mut answer = text(StatusCode::PERMANENT_REDIRECT, "moved");
    let to = HeaderValue::from_static(to);
    answer.headers_mut().insert(LOCATION, to);
    answer
}

/// Yes, and no more to say.
pub(super) fn nothing() -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::NO_CONTENT;
    common(answer.headers_mut());
    answer
}

fn text(status: StatusCode, text: &'static str) -> Answer {
    whole(
        status,
        "text/plain; charset=utf-8",
        format!("{text}\n").into(),
    )
}

/// A text as it is.
pub(super) fn plain(text: String) -> Answer {
    whole(StatusCode::OK, "application/octet-stream", text.into())
}

/// A JSON document.
pub(super) fn json(status: StatusCode, body: Vec<u8>) -> Answer {
    whole(status, "application/json", body.into())
}

fn whole(status: StatusCode, kind: &'static str, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body));
    *answer.status_mut() = status;
    common(answer.headers_mut());
    let kind = HeaderValue::from_static(kind);
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

/// On every answer but the 101.
pub(crate) fn common(headers: &mut HeaderMap) {
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}
