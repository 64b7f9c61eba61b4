//! What a request must look like before anybody asks who sent it.

use std::sync::Arc;

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, ORIGIN, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION, TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Version};
use rvpn_proto::control::PATH;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::answer::Refusal;
use crate::admit::Via;
use crate::auth::base64;
use crate::auth::credential::{MAX_TOKEN, subprotocols};
use crate::config::{Config, Demo, Dialect, Names, host_of};
use crate::demo;
use crate::page::{self, Part};

/// Where a device is registered.
pub const JOIN_PATH: &str = "/rvpn/v1/join";
/// Where a page asks whether its token is accepted, below its own path.
const CHECK: &str = "v1/check";
/// Longest header value: a token and the words around it.
const VALUE_LIMIT: usize = MAX_TOKEN + 128;
/// Longest path with query, likewise.
const URI_LIMIT: usize = MAX_TOKEN + 512;

/// What a path leads to.
#[derive(Clone, Debug)]
pub enum Target {
    /// The native protocol.
    Packets,
    /// An older client's.
    Dialect(Arc<Dialect>),
    /// Visitors of an older reverse tunnel client.
    Tunnel,
    /// Registering a device.
    Join,
    /// The demonstration.
    Demo(Demo),
    /// Whether a login would be accepted, for pages: a browser does not tell
    /// them why a WebSocket did not open.
    Check,
    /// What everybody sees.
    Landing,
    /// A part of the client page.
    Client(&'static Part),
    /// Another place.
    Moved(&'static str),
    /// Nothing.
    Nothing,
}

impl Target {
    /// Of a whole request: older reverse tunnel clients have no path of their
    /// own, and are known by wanting a WebSocket where others want a page.
    pub fn of_request(head: &Parts, config: &Config) -> Target {
        let target = Target::of(head.uri.path(), config);
        let free = matches!(target, Target::Landing | Target::Nothing);
        match free && config.packer.enabled && is_tunnel(head) {
            true => Target::Tunnel,
            false => target,
        }
    }

    /// Of a path as it was sent: whoever encodes a letter means another path.
    pub fn of(path: &str, config: &Config) -> Target {
        if let Some(dialect) = config.dialects.iter().find(|d| d.path == path) {
            return Target::Dialect(Arc::clone(dialect));
        }
        match path {
            PATH => return Target::Packets,
            JOIN_PATH => return Target::Join,
            "/" => return Target::Landing,
            _ => {}
        }
        if path == demo::PATH
            && let Some(demo) = config.demo
        {
            return Target::Demo(demo);
        }
        // With the page switched off nothing of it is there.
        if !config.page {
            return Target::Nothing;
        }
        match path.strip_prefix(page::BASE) {
            Some(CHECK) => Target::Check,
            Some(name) => page::part(name).map_or(Target::Nothing, Target::Client),
            // The page names its parts relative to itself.
            None if path == page::BASE.trim_end_matches('/') => Target::Moved(page::BASE),
            None => Target::Nothing,
        }
    }
}

/// The host that the request is for, if it is us.
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its port, if it is said.
    pub port: Option<u16>,
}

/// Whether an older reverse tunnel client asks.
fn is_tunnel(head: &Parts) -> bool {
    let path = head.uri.path();
    let query = head.uri.query().unwrap_or("");
    let versions = query.split('&').any(|p| p.starts_with("versions="));
    let likely = path == "/" || path.ends_with("/ws") || versions;
    likely && lists(&head.headers, &CONNECTION, "upgrade") && head.headers.contains_key(UPGRADE)
}

impl Host {
    /// How the request came, by what it says.
    pub(super) fn via(&self, tls: bool) -> Via {
        Via {
            host: self.name.clone(),
            port: self.port.unwrap_or(if tls { 443 } else { 80 }),
            tls,
        }
    }
}

impl Host {
    /// Without its port.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

/// Whom the request is for. It must say so once, and the same everywhere.
pub fn host(head: &Parts, names: &Names) -> Result<Host, Refusal> {
    let found = own_host(head)?;
    match names.answers_to(&found.name) {
        true => Ok(found),
        false => Err(elsewhere()),
    }
}

/// The host of a request, whether it is us or not.
pub(crate) fn own_host(head: &Parts) -> Result<Host, Refusal> {
    let wrong = || Refusal::new(StatusCode::BAD_REQUEST, "bad request");
    let value = single(&head.headers, &HOST)?.ok_or_else(wrong)?;
    let (name, port) = host_of(value).ok_or_else(wrong)?;
    if let Some(authority) = head.uri.authority()
        && host_of(authority.as_str()) != Some((name.clone(), port))
    {
        return Err(wrong());
    }
    Ok(Host { name, port })
}

/// The request is for somebody else: a rebound name, or a mistake.
pub(crate) fn elsewhere() -> Refusal {
    Refusal::new(StatusCode::MISDIRECTED_REQUEST, "misdirected request")
}

/// Whether all parts are of a size that has a reason.
pub fn sizes(head: &Parts) -> Result<(), Refusal> {
    let uri = head.uri.path_and_query().map_or(0, |p| p.as_str().len());
    if uri > URI_LIMIT {
        return Err(Refusal::new(StatusCode::URI_TOO_LONG, "URI too long"));
    }
    let long = |(_, value): (_, &hyper::header::HeaderValue)| value.len() > VALUE_LIMIT;
    if head.headers.iter().any(long) {
        return Err(Refusal::new(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "request header fields too large",
        ));
    }
    Ok(())
}

/// Checks that the request opens a WebSocket and nothing else, and returns the
/// value that answers its key.
pub fn upgrade(head: &Parts) -> Result<String, Refusal> {
    let headers = &head.headers;
    let wants = single(headers, &UPGRADE)?.is_some_and(|v| v.eq_ignore_ascii_case("websocket"))
        && lists(headers, &CONNECTION, "upgrade");
    if !wants {
        return Err(Refusal::upgrade_required());
    }
    let wrong = |why| Refusal::new(StatusCode::BAD_REQUEST, why);
    if head.method != Method::GET || head.version != Version::HTTP_11 {
        return Err(wrong("a WebSocket begins with GET in HTTP/1.1"));
    }
    if single(headers, &SEC_WEBSOCKET_VERSION)? != Some("13") {
        return Err(Refusal::upgrade_required());
    }
    // A body would be in the way of the first frame, and two readers could
    // disagree about where it ends.
    let length = single(headers, &CONTENT_LENGTH)?;
    if length.is_some_and(|l| l != "0")
        || headers.contains_key(TRANSFER_ENCODING)
        || headers.contains_key(EXPECT)
    {
        return Err(wrong("an upgrade has no body"));
    }
    let key = single(headers, &SEC_WEBSOCKET_KEY)?.unwrap_or("");
    if key.len() != 24 || base64::standard(key).is_none_or(|k| k.len() != 16) {
        return Err(wrong("bad Sec-WebSocket-Key"));
    }
    Ok(derive_accept_key(key.as_bytes()))
}

/// Whether the client speaks this protocol.
pub fn offers(headers: &HeaderMap, protocol: &str) -> bool {
    subprotocols(headers).any(|p| p == protocol)
}

/// Refuses what pages of others do in somebody's browser. Whoever is no
/// browser sends no origin.
pub fn origin(headers: &HeaderMap, host: &Host, tls: bool, config: &Config) -> Result<(), Refusal> {
    let Some(origin) = single(headers, &ORIGIN)? else {
        return Ok(());
    };
    if config.allowed_origins.iter().any(|a| a == origin) {
        return Ok(());
    }
    let (scheme, authority) = origin.split_once("://").ok_or_else(Refusal::forbidden)?;
    let default = match scheme {
        "https" => 443,
        // Behind a proxy that does TLS we cannot know what the browser saw.
        "http" if !tls => 80,
        _ => return Err(Refusal::forbidden()),
    };
    let (name, port) = host_of(authority).ok_or_else(Refusal::forbidden)?;
    let same_host = name == host.name && port.unwrap_or(default) == host.port.unwrap_or(default);
    // A proxy may put another host in the request than the browser did.
    let own_name = config.names.lists(&name) && port.is_none();
    match same_host || own_name {
        true => Ok(()),
        false => Err(Refusal::forbidden()),
    }
}

/// The value of a header that may be there once.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Refusal> {
    let wrong = || Refusal::new(StatusCode::BAD_REQUEST, "bad request");
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| wrong()),
        (Some(_), Some(_)) => Err(wrong()),
    }
}

/// Whether a header that is a list has this member.
fn lists(headers: &HeaderMap, name: &HeaderName, member: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .any(|v| v.trim().eq_ignore_ascii_case(member))
}
