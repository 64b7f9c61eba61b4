//! Which name a client means, and where its visitors find it.

use rvpn_proto::name::{Name, Pattern};

use crate::admit::Via;

/// Names and ports of a login that its client is told.
pub(super) const TOLD: usize = 256;

pub(super) fn told(names: &[Pattern]) -> Vec<String> {
    names.iter().take(TOLD).map(Pattern::to_string).collect()
}

/// Why a wish is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoName {
    /// No name at all.
    NotAName,
    /// The login may serve no names.
    None,
    /// All that may be served by their whole name are served already.
    AllTaken,
    /// A single label, and nothing that it could be below.
    NothingAbove,
}

/// The names that a wish stands for. A whole name stands for itself, a single
/// label for a name below what the login may serve, and no wish at all for the
/// first name of the login that `taken` does not say is in use; below a
/// wildcard for a label of the client's own, always the same.
pub(super) fn meant(
    wish: Option<&str>,
    rights: &[Pattern],
    own_label: &str,
    taken: impl Fn(&Pattern) -> bool,
) -> Result<Pattern, NoName> {
    let below = |label: &str| {
        let mut wild = rights.iter().filter(|r| r.is_wildcard());
        wild.find_map(|r| Name::parse(&format!("{label}.{}", r.name())).ok())
    };
    match wish {
        Some(whole) if whole.contains('.') || whole.contains(':') => {
            Pattern::parse(whole).map_err(|_| NoName::NotAName)
        }
        Some(label) => {
            Name::parse(label).map_err(|_| NoName::NotAName)?;
            let lower = label.to_ascii_lowercase();
            let exact = rights.iter().find(|r| {
                let first = r.name().as_str().split('.').next();
                !r.is_wildcard() && first == Some(lower.as_str())
            });
            match exact {
                Some(known) => Ok(known.clone()),
                None => below(label).map(Pattern::exact).ok_or(NoName::NothingAbove),
            }
        }
        None => {
            let mut exact = rights.iter().filter(|r| !r.is_wildcard());
            match exact.find(|r| !taken(r)) {
                Some(free) => Ok(free.clone()),
                None => below(own_label).map(Pattern::exact).ok_or(match rights {
                    [] => NoName::None,
                    _ => NoName::AllTaken,
                }),
            }
        }
    }
}

/// A label that is always the same for the same thing of the same installation.
pub(super) fn own_label(instance: &str, id: u32) -> String {
    use aws_lc_rs::digest::{SHA256, digest};
    let sum = digest(&SHA256, format!("{instance}/{id}").as_bytes());
    // Letters only at the front, so that no label looks like a number.
    let letters = sum.as_ref().iter().take(8);
    letters.map(|b| char::from(b'a' + b % 26)).collect()
}

/// `https://app.example:8443`, as visitors type it.
pub(super) fn url(scheme: &str, host: &str, port: u16) -> String {
    let usual = match scheme {
        "https" => 443,
        "http" => 80,
        "ssh" => 22,
        _ => 0,
    };
    let host = match host.contains(':') && !host.starts_with('[') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    };
    match port == usual {
        true => format!("{scheme}://{host}"),
        false => format!("{scheme}://{host}:{port}"),
    }
}

/// The scheme of what is served as a page.
pub(super) fn web(via: &Via) -> &'static str {
    match via.tls {
        true => "https",
        false => "http",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(texts: &[&str]) -> Vec<Pattern> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn a_wish_becomes_a_whole_name() {
        let all = rights(&["shop.example", "*.alice.example", "www.example"]);
        let of = |wish| meant(wish, &all, "own", |_| false).map(|p| p.to_string());
        for (wish, name) in [
            (Some("app"), "app.alice.example"),
            (Some("APP"), "app.alice.example"),
            (Some("shop"), "shop.example"),
            (Some("x.alice.example"), "x.alice.example"),
            (Some("*.alice.example"), "*.alice.example"),
            // Whether it is allowed is not asked here.
            (Some("bob.example"), "bob.example"),
            (None, "shop.example"),
        ] {
            assert_eq!(of(wish), Ok(name.to_owned()), "{wish:?}");
        }
        for wish in ["", "a b", "bücher", "-a", "*", "a..b", "*.com"] {
            assert_eq!(of(Some(wish)), Err(NoName::NotAName), "{wish:?}");
        }
        let first = |p: &Pattern| p.to_string() == "shop.example";
        let next = meant(None, &all, "own", first).unwrap();
        assert_eq!(next.to_string(), "www.example");
        let own = meant(None, &all, "own", |_| true).unwrap();
        assert_eq!(own.to_string(), "own.alice.example");
        assert_eq!(meant(None, &[], "own", |_| false), Err(NoName::None));
        let exact = rights(&["a.example"]);
        assert_eq!(meant(None, &exact, "own", |_| true), Err(NoName::AllTaken));
        let no = meant(Some("b"), &exact, "own", |_| false);
        assert_eq!(no, Err(NoName::NothingAbove));
    }

    #[test]
    fn an_installation_keeps_its_label() {
        let label = own_label("laptop", 1);
        assert_eq!(label, own_label("laptop", 1));
        assert_ne!(label, own_label("laptop", 2));
        assert!(Name::parse(&label).is_ok() && label.len() == 8);
    }

    #[test]
    fn usual_ports_are_not_written() {
        assert_eq!(url("https", "a.example", 443), "https://a.example");
        assert_eq!(url("https", "a.example", 8443), "https://a.example:8443");
        assert_eq!(url("http", "a.example", 443), "http://a.example:443");
        assert_eq!(url("tcp", "::1", 80), "tcp://[::1]:80");
    }
}
