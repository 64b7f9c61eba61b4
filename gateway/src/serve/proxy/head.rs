//! What a head may say, and what of it is passed on.

use std::net::{IpAddr, SocketAddr};

use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName,
    HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, SEC_WEBSOCKET_KEY, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Uri, Version};
use rvpn_proto::name::Name;

/// Headers that speak for the visitor, however they are spelt. Programs that
/// pass headers on as variables make one of `-` and `_`.
const SPEAKING: [&str; 12] = [
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-forwarded-server",
    "x-forwarded-ssl",
    "x-forwarded-by",
    "x-real-ip",
    "x-client-ip",
    "true-client-ip",
    "x-cluster-client-ip",
];
/// What must reach the other side whatever `Connection` lists.
const KEPT: [HeaderName; 3] = [HOST, CONTENT_LENGTH, AUTHORIZATION];

/// What a client is told of a visitor.
pub(super) struct Told {
    pub(super) peer: SocketAddr,
    /// Whether the visitor came by TLS.
    pub(super) secure: bool,
    /// The host it asked for, with its port if it said one.
    pub(super) host: String,
}

/// Whom the request is for: its name, and how it is passed on. `None` unless it
/// says so once, and the same everywhere.
pub(super) fn host(parts: &Parts) -> Option<(Name, String)> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return None;
    };
    let (name, port) = Name::with_port(host.to_str().ok()?).ok()?;
    if let Some(authority) = parts.uri.authority()
        && Name::with_port(authority.as_str()).ok()? != (name.clone(), port)
    {
        return None;
    }
    let shown = match name.as_str().contains(':') {
        true => format!("[{name}]"),
        false => name.to_string(),
    };
    let shown = match port {
        Some(port) => format!("{shown}:{port}"),
        None => shown,
    };
    Some((name, shown))
}

/// Whether nobody could read the request in another way.
pub(super) fn is_sound(parts: &Parts) -> bool {
    let headers = &parts.headers;
    let coded = headers.get_all(TRANSFER_ENCODING).iter().count();
    let sized = headers.get_all(CONTENT_LENGTH).iter().count();
    let chunked = headers
        .get(TRANSFER_ENCODING)
        .is_none_or(|v| v.as_bytes().eq_ignore_ascii_case(b"chunked"));
    let known = match parts.uri.path_and_query() {
        // Absolute form without a path is the root.
        None => parts.uri.authority().is_some(),
        Some(path) => path.as_str().starts_with('/') || parts.method == Method::OPTIONS,
    };
    coded <= 1
        && sized <= 1
        && (coded == 0 || (sized == 0 && chunked && parts.version == Version::HTTP_11))
        && known
        && headers.iter().all(|(_, v)| is_printable(v.as_bytes()))
        && matches!(parts.version, Version::HTTP_10 | Version::HTTP_11)
}

/// Control characters have no business in a header, not even where a parser
/// lets them through.
fn is_printable(value: &[u8]) -> bool {
    value
        .iter()
        .all(|b| *b == b'\t' || (*b >= b' ' && *b != 0x7f))
}

/// The request asks for a WebSocket.
#[derive(Clone, Copy)]
pub(super) struct WebSocket;

/// Whether the request asks for a WebSocket. Other upgrades are not passed on:
/// what they lead to could not be routed.
pub(super) fn upgrade(parts: &Parts) -> Option<WebSocket> {
    let headers = &parts.headers;
    let mut upgrades = headers.get_all(UPGRADE).iter();
    let websocket = match (upgrades.next(), upgrades.next()) {
        (Some(only), None) => only.as_bytes().eq_ignore_ascii_case(b"websocket"),
        _ => false,
    };
    let bodiless = !headers.contains_key(TRANSFER_ENCODING)
        && headers.get(CONTENT_LENGTH).is_none_or(|v| v == "0");
    let asks = websocket
        && bodiless
        && parts.method == Method::GET
        && headers.contains_key(SEC_WEBSOCKET_KEY)
        && listed(headers).any(|option| option == "upgrade");
    asks.then_some(WebSocket)
}

/// Whether a proxy says that its visitor came by TLS.
pub(super) fn says_https(headers: &HeaderMap) -> bool {
    let last = headers.get_all("x-forwarded-proto").iter().next_back();
    last.and_then(|v| v.to_str().ok())
        .and_then(|v| v.rsplit(',').next())
        .is_some_and(|v| v.trim().eq_ignore_ascii_case("https"))
}

/// Options of `Connection`, in lower case.
fn listed(headers: &HeaderMap) -> impl Iterator<Item = String> {
    let values = headers.get_all(CONNECTION).iter();
    let values = values.filter_map(|v| v.to_str().ok());
    values
        .flat_map(|v| v.split(','))
        .map(|option| option.trim().to_ascii_lowercase())
}

/// Removes what is between two neighbours only.
fn strip(headers: &mut HeaderMap) {
    let options: Vec<HeaderName> = listed(headers)
        .filter_map(|option| option.parse().ok())
        .filter(|name| !KEPT.contains(name))
        .collect();
    for name in options {
        headers.remove(name);
    }
    for name in [
        CONNECTION,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
        HeaderName::from_static("http2-settings"),
    ] {
        headers.remove(name);
    }
}

/// Makes the request that the client receives.
pub(super) fn forward(parts: &mut Parts, told: &Told, upgrade: Option<WebSocket>) {
    let path = parts.uri.path_and_query().cloned();
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    parts.version = Version::HTTP_11;
    let headers = &mut parts.headers;
    let trailers = headers
        .get_all(TE)
        .iter()
        .any(|v| v.as_bytes().eq_ignore_ascii_case(b"trailers"));
    strip(headers);
    let speaking: Vec<HeaderName> = headers
        .keys()
        .filter(|name| SPEAKING.contains(&name.as_str().replace('_', "-").as_str()))
        .cloned()
        .collect();
    for name in speaking {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    if upgrade.is_some() {
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
    let address = told.peer.ip().to_canonical();
    let proto = if told.secure { "https" } else { "http" };
    let node = match address {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("\"[{ip}]\""),
    };
    let forwarded = format!("for={node};host=\"{}\";proto={proto}", told.host);
    for (name, value) in [
        ("host", told.host.clone()),
        ("x-forwarded-for", address.to_string()),
        ("x-forwarded-host", told.host.clone()),
        ("x-forwarded-proto", proto.to_owned()),
        ("x-real-ip", address.to_string()),
        (FORWARDED.as_str(), forwarded),
    ] {
        // All are of letters, digits and a few signs.
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse()) {
            headers.insert(name, value);
        }
    }
}

/// Whether the request expects nothing but what is always done.
pub(super) fn expects_too_much(headers: &HeaderMap) -> bool {
    let continues = |v: &HeaderValue| v.as_bytes().eq_ignore_ascii_case(b"100-continue");
    !headers.get_all(EXPECT).iter().all(continues)
}

/// Makes the answer that the visitor receives.
pub(super) fn back(headers: &mut HeaderMap) {
    strip(headers);
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::Request;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::get("/a?b");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn told() -> Told {
        Told {
            peer: "[2001:db8::7]:99".parse().unwrap(),
            secure: true,
            host: "a.ex:8443".into(),
        }
    }

    #[test]
    fn pro_10_hop_by_hop_rules_cannot_strip_ours_and_forged_ones_are_replaced() {
        let mut parts = parts(&[
            ("Host", "A.ex:8443"),
            ("Connection", "authorization, x-forwarded-for, x-mine, host"),
            ("X-Forwarded-For", "1.1.1.1"),
            ("X_Forwarded_For", "1.1.1.1"),
            ("X-Forwarded-Proto", "http"),
            ("Forwarded", "for=1.1.1.1"),
            ("Forwarded", "for=2.2.2.2"),
            ("X-Real-IP", "1.1.1.1"),
            ("X-Mine", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Proxy-Authorization", "x"),
            ("Authorization", "Bearer x"),
            ("X-Other", "2"),
        ]);
        forward(&mut parts, &told(), None);
        let headers = &parts.headers;
        let all = |name: &str| -> Vec<&str> {
            let values = headers.get_all(name).iter();
            values.map(|v| v.to_str().unwrap()).collect()
        };
        assert_eq!(all("host"), ["a.ex:8443"]);
        assert_eq!(all("x-forwarded-for"), ["2001:db8::7"]);
        assert_eq!(all("x-real-ip"), ["2001:db8::7"]);
        assert_eq!(all("x-forwarded-proto"), ["https"]);
        assert_eq!(
            all("forwarded"),
            ["for=\"[2001:db8::7]\";host=\"a.ex:8443\";proto=https"]
        );
        assert_eq!(all("authorization"), ["Bearer x"]);
        assert_eq!(all("x-other"), ["2"]);
        for gone in [
            "connection",
            "x-mine",
            "keep-alive",
            "proxy-authorization",
            "x_forwarded_for",
        ] {
            assert_eq!(all(gone), [""; 0], "{gone}");
        }
    }

    #[test]
    fn rev_04_a_host_is_said_once_and_the_same_everywhere() {
        let of = |headers: &[(&str, &str)]| host(&parts(headers)).map(|(n, h)| (n.to_string(), h));
        assert_eq!(
            of(&[("Host", "A.ex.:8443")]),
            Some(("a.ex".into(), "a.ex:8443".into()))
        );
        assert_eq!(
            of(&[("Host", "[::1]:80")]),
            Some(("::1".into(), "[::1]:80".into()))
        );
        for wrong in [
            "a.ex@b.ex",
            "a.ex%00",
            "",
            "a.ex:x",
            "b\u{fc}cher.ex",
            "a ex",
        ] {
            assert_eq!(of(&[("Host", wrong)]), None, "{wrong}");
        }
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("Host", "a.ex"), ("Host", "a.ex")]), None);
        let mut absolute = parts(&[("Host", "a.ex")]);
        absolute.uri = "http://b.ex/".parse().unwrap();
        assert!(host(&absolute).is_none());
        absolute.uri = "http://A.ex/".parse().unwrap();
        assert!(host(&absolute).is_some());
    }

    #[test]
    fn only_websockets_are_upgrades() {
        let of = |upgrade: &str, connection: &str| {
            let headers = [
                ("Upgrade", upgrade),
                ("Connection", connection),
                ("Sec-WebSocket-Key", "x"),
            ];
            upgrade_of(&headers)
        };
        assert!(of("WebSocket", "keep-alive, Upgrade"));
        assert!(!of("h2c", "Upgrade, HTTP2-Settings"));
        assert!(!of("websocket, h2c", "Upgrade"));
        assert!(!of("websocket", "close"));
    }

    fn upgrade_of(headers: &[(&str, &str)]) -> bool {
        upgrade(&parts(headers)).is_some()
    }
}
