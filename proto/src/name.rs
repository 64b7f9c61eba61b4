//! Public names: what a visitor asks for and what a client may serve.
//!
//! There is one canonical form, made here, for claims, registration and look-up
//! alike; whatever has none is no name.

use std::borrow::Borrow;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Longest name, without the dot at its end.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// A host name or address in its one canonical form: lower case, no dot at its
/// end, no port, ASCII only.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<str>);

/// Why a text is no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAName;

impl fmt::Display for NotAName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a host name: letters, digits, hyphens and dots, or an address")
    }
}

impl std::error::Error for NotAName {}

impl Name {
    /// The canonical form of a text without a port.
    pub fn parse(text: &str) -> Result<Name, NotAName> {
        if let Some(inner) = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
            let address: Ipv6Addr = inner.parse().map_err(|_| NotAName)?;
            return Ok(Name(address.to_string().into()));
        }
        if let Ok(address) = text.parse::<Ipv6Addr>() {
            return Ok(Name(address.to_string().into()));
        }
        let lower = text.to_ascii_lowercase();
        let host = lower.strip_suffix('.').unwrap_or(&lower);
        // All digits in the last label is an address or nothing: some resolvers
        // read `1.2` as one.
        let numeric = host.rsplit('.').next().is_some_and(is_number);
        if numeric {
            let address: Ipv4Addr = host.parse().map_err(|_| NotAName)?;
            return Ok(Name(address.to_string().into()));
        }
        let fits = host.len() <= MAX_NAME && host.split('.').all(is_label);
        fits.then(|| Name(host.into())).ok_or(NotAName)
    }

    /// The canonical name and the port of what a `Host` header or a URL says.
    pub fn with_port(authority: &str) -> Result<(Name, Option<u16>), NotAName> {
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') && !host.ends_with(':') => {
                let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
                let port = port.parse().ok().filter(|_| digits).ok_or(NotAName)?;
                (host, Some(port))
            }
            _ => (authority, None),
        };
        // An address with colons stands in brackets where a port could follow.
        if host.contains(':') && !host.starts_with('[') {
            return Err(NotAName);
        }
        Ok((Name::parse(host)?, port))
    }

    /// As a text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is an address and not a name.
    pub fn is_address(&self) -> bool {
        self.0.contains(':') || self.0.rsplit('.').next().is_some_and(is_number)
    }

    /// The names above it: `b.c` and `c` for `a.b.c`.
    pub fn parents(&self) -> impl Iterator<Item = &str> {
        let rest = (!self.is_address()).then_some(&*self.0);
        let above = |name: &str| name.split_once('.').map(|(_, up)| up.len());
        std::iter::successors(rest, move |&name| {
            above(name).map(|len| &name[name.len() - len..])
        })
        .skip(1)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Its text hashes and compares like the name itself.
impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Name, NotAName> {
        Name::parse(text)
    }
}

fn is_number(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(|b| b.is_ascii_digit())
}

fn is_label(label: &str) -> bool {
    (1..=MAX_LABEL).contains(&label.len())
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// A name, or every name below one: `a.example` or `*.a.example`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern {
    below: bool,
    name: Name,
}

impl Pattern {
    /// Of a text. A wildcard stands for whole labels at the front, below a name
    /// of at least two.
    pub fn parse(text: &str) -> Result<Pattern, NotAName> {
        match text.strip_prefix("*.") {
            None => Ok(Pattern {
                below: false,
                name: Name::parse(text)?,
            }),
            Some(rest) => {
                let name = Name::parse(rest)?;
                let wide = name.is_address() || !name.as_str().contains('.');
                match wide {
                    true => Err(NotAName),
                    false => Ok(Pattern { below: true, name }),
                }
            }
        }
    }

    /// Of one name.
    pub fn exact(name: Name) -> Pattern {
        Pattern { below: false, name }
    }

    /// Of all names below one.
    pub fn below(name: Name) -> Pattern {
        Pattern { below: true, name }
    }

    /// Whether it stands for many names.
    pub fn is_wildcard(&self) -> bool {
        self.below
    }

    /// The name it is, or is below.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Whether the name is one of those it stands for.
    pub fn covers(&self, name: &Name) -> bool {
        match self.below {
            false => self.name == *name,
            true => name.parents().any(|up| up == self.name.as_str()),
        }
    }

    /// Whether everything `other` stands for is covered by this.
    pub fn contains(&self, other: &Pattern) -> bool {
        match other.below {
            false => self.covers(&other.name),
            true => self.below && (self.name == other.name || self.covers(&other.name)),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.below {
            true => write!(f, "*.{}", self.name),
            false => write!(f, "{}", self.name),
        }
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Pattern {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Pattern, NotAName> {
        Pattern::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_has_one_form() {
        for text in ["A.EX", "a.ex.", "a.ex", "A.eX."] {
            assert_eq!(name(text).as_str(), "a.ex");
        }
        assert_eq!(name("[::1]"), name("::1"));
        assert_eq!(name("127.0.0.1").as_str(), "127.0.0.1");
        for text in [
            "",
            ".",
            "a..ex",
            "a.ex..",
            "-a.ex",
            "a-.ex",
            "a ex",
            "a.ex:443",
            "a@b",
            "a%00",
            "bücher.ex",
            "*.a.ex",
            "1.2",
            "256.1.1.1",
            "a.1",
            "[a.ex]",
            "a.ex\0",
        ] {
            assert_eq!(Name::parse(text), Err(NotAName), "{text:?}");
        }
        assert!(Name::parse(&"a.".repeat(128)).is_err());
        assert!(Name::parse(&format!("{}.ex", "a".repeat(64))).is_err());
    }

    #[test]
    fn a_host_may_say_its_port() {
        let of = |text| Name::with_port(text).map(|(n, p)| (n.to_string(), p));
        assert_eq!(of("a.ex:8443"), Ok(("a.ex".into(), Some(8443))));
        assert_eq!(of("a.ex"), Ok(("a.ex".into(), None)));
        assert_eq!(of("[::1]:80"), Ok(("::1".into(), Some(80))));
        assert_eq!(of("127.0.0.1:80"), Ok(("127.0.0.1".into(), Some(80))));
        for text in ["::1", "a.ex:", "a.ex:+1", "a.ex:65536", "a.ex:80:80", ":80"] {
            assert_eq!(of(text), Err(NotAName), "{text:?}");
        }
    }

    #[test]
    fn a_wildcard_stands_for_all_below_and_not_for_its_own_name() {
        let wild = pattern("*.a.ex");
        assert!(wild.covers(&name("x.a.ex")) && wild.covers(&name("y.x.a.ex")));
        assert!(!wild.covers(&name("a.ex")) && !wild.covers(&name("xa.ex")));
        assert!(!wild.covers(&name("ex")) && !wild.covers(&name("1.2.3.4")));
        assert!(pattern("a.ex").covers(&name("a.ex")));
        assert!(!pattern("a.ex").covers(&name("x.a.ex")));
        for text in ["*", "*.", "*.ex", "*.1.2.3.4", "x.*.ex", "*a.ex", "*.*.ex"] {
            assert!(Pattern::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_claim_contains_what_is_inside_it() {
        let inside = |claim: &str, wish: &str| pattern(claim).contains(&pattern(wish));
        assert!(inside("a.ex", "a.ex") && inside("*.a.ex", "b.a.ex"));
        assert!(inside("*.a.ex", "*.a.ex") && inside("*.a.ex", "*.b.a.ex"));
        assert!(!inside("a.ex", "*.a.ex") && !inside("*.a.ex", "a.ex"));
        assert!(!inside("*.b.a.ex", "*.a.ex"));
    }
}
