//! Where a request carries its token.
//!
//! The first place that has one counts, and if that one is not accepted no
//! other is tried. Cookies are never looked at: a browser sends them along
//! with requests that its user did not mean.

use std::fmt;

use hyper::header::{AUTHORIZATION, HeaderMap, SEC_WEBSOCKET_PROTOCOL};
use rvpn_proto::control::BEARER_SUBPROTOCOL;

use super::{Denied, base64};

/// Longest token that is looked at.
pub const MAX_TOKEN: usize = 4096;
/// Its names in a query, as the older clients write them.
const QUERY_NAMES: [&str; 2] = ["access_token", "token"];

/// A token that nobody has judged yet. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential(String);

impl Credential {
    /// The bytes that are judged.
    pub fn token(&self) -> &str {
        &self.0
    }

    /// Takes a token that can be one.
    pub fn new(token: &str) -> Result<Credential, Denied> {
        let fits = !token.is_empty()
            && token.len() <= MAX_TOKEN
            && token
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        match fits {
            true => Ok(Credential(token.to_owned())),
            false => Err(Denied::Malformed),
        }
    }

    /// Finds the token of a request; `None` if it has none. The query counts
    /// only where older clients are expected.
    pub fn find(
        headers: &HeaderMap,
        query: Option<&str>,
        query_allowed: bool,
    ) -> Result<Option<Credential>, Denied> {
        let mut basic = None;
        let mut values = headers.get_all(AUTHORIZATION).iter();
        if let Some(value) = values.next() {
            if values.next().is_some() {
                return Err(Denied::Malformed);
            }
            let value = value.to_str().map_err(|_| Denied::Malformed)?;
            let (scheme, rest) = value.split_once(' ').ok_or(Denied::Malformed)?;
            let rest = rest.trim_matches(' ');
            if scheme.eq_ignore_ascii_case("bearer") {
                return Credential::new(rest).map(Some);
            }
            if !scheme.eq_ignore_ascii_case("basic") {
                return Err(Denied::Malformed);
            }
            basic = Some(rest);
        }
        if let Some(token) = subprotocols(headers).find_map(|p| p.strip_prefix(BEARER_SUBPROTOCOL))
        {
            return Credential::new(token).map(Some);
        }
        if let Some(basic) = basic {
            let pair = base64::standard(basic).and_then(|b| String::from_utf8(b).ok());
            let pair = pair.ok_or(Denied::Malformed)?;
            let (user, password) = pair.split_once(':').ok_or(Denied::Malformed)?;
            let token = if password.is_empty() { user } else { password };
            return Credential::new(token).map(Some);
        }
        if !query_allowed {
            return Ok(None);
        }
        let pairs = query.unwrap_or("").split('&');
        let mut tokens = pairs
            .filter_map(|pair| pair.split_once('='))
            .filter(|(name, _)| QUERY_NAMES.contains(name))
            .map(|(_, value)| value);
        match (tokens.next(), tokens.next()) {
            (Some(token), None) => Credential::new(token).map(Some),
            (Some(_), Some(_)) => Err(Denied::Malformed),
            (None, _) => Ok(None),
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(…)")
    }
}

/// What the client offers to speak, over all headers that say so.
pub fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::{COOKIE, HeaderValue};

    fn headers(pairs: &[(hyper::header::HeaderName, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    fn found(map: &HeaderMap, query: &str) -> Result<Option<String>, Denied> {
        Credential::find(map, Some(query), true).map(|c| c.map(|c| c.token().to_owned()))
    }

    #[test]
    fn the_first_place_counts() {
        let all = headers(&[
            (AUTHORIZATION, "Bearer a.b.c"),
            (SEC_WEBSOCKET_PROTOCOL, "rvpn.packets.1, rvpn.bearer.d.e.f"),
        ]);
        assert_eq!(found(&all, "token=g.h.i"), Ok(Some("a.b.c".into())));
        let basic = (AUTHORIZATION, "Basic dTpqLmsubA==");
        let two = headers(&[
            basic.clone(),
            (SEC_WEBSOCKET_PROTOCOL, "rvpn.packets.1, rvpn.bearer.d.e.f"),
        ]);
        assert_eq!(found(&two, "token=g.h.i"), Ok(Some("d.e.f".into())));
        assert_eq!(
            found(&headers(&[basic]), "token=g.h.i"),
            Ok(Some("j.k.l".into()))
        );
        assert_eq!(
            found(&headers(&[]), "x=1&access_token=g.h.i"),
            Ok(Some("g.h.i".into()))
        );
        assert_eq!(found(&headers(&[]), "x=1"), Ok(None));
    }

    #[test]
    fn a_broken_one_is_not_passed_over() {
        for wrong in [
            "Bearer",
            "Bearer a b",
            "Digest x=1",
            "Basic !!",
            "Basic YQ==",
        ] {
            let map = headers(&[(AUTHORIZATION, wrong)]);
            assert_eq!(
                found(&map, "token=a.b.c"),
                Err(Denied::Malformed),
                "{wrong}"
            );
        }
        let twice = headers(&[(AUTHORIZATION, "Bearer a"), (AUTHORIZATION, "Bearer a")]);
        assert_eq!(found(&twice, ""), Err(Denied::Malformed));
        assert_eq!(
            found(&headers(&[]), "token=a&token=b"),
            Err(Denied::Malformed)
        );
        let long = format!("Bearer {}", "a".repeat(MAX_TOKEN + 1));
        assert_eq!(
            found(&headers(&[(AUTHORIZATION, &long)]), ""),
            Err(Denied::Malformed)
        );
    }

    #[test]
    fn aut_17_cookies_never_count_and_the_query_only_where_allowed() {
        let map = headers(&[(COOKIE, "token=a.b.c; access_token=a.b.c")]);
        assert_eq!(found(&map, ""), Ok(None));
        assert_eq!(Credential::find(&map, Some("token=a.b.c"), false), Ok(None));
    }

    #[test]
    fn it_does_not_show() {
        let shown = format!("{:?}", Credential::new("very.secret.token"));
        assert!(!shown.contains("secret"), "{shown}");
    }
}
