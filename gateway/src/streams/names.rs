//! Which name a client means, and where its visitors find it.

use rvpn_proto::name::Pattern;

use crate::admit::Via;
use crate::auth::rights::Rights;
use crate::serve::names::{Unclear, wished};

/// Names and ports of a login that its client is told.
pub(super) const TOLD: usize = 256;

pub(super) fn told(names: &[Pattern]) -> Vec<String> {
    names.iter().take(TOLD).map(Pattern::to_string).collect()
}

/// The name that a client means. Whoever has no wish, and its own name already
/// serves the same, gets a label below it, always the same one.
pub(super) fn meant(
    rights: &Rights,
    account: &str,
    wish: Option<&str>,
    own_label: &str,
    taken: impl Fn(&Pattern) -> bool,
) -> Result<Pattern, Unclear> {
    let first = wished(rights, account, wish);
    let in_use = first.as_ref().is_ok_and(taken);
    match (wish, first) {
        (None, Err(Unclear::Nothing(_))) => {
            wished(rights, account, Some(own_label)).map_err(|_| Unclear::Nothing(account.into()))
        }
        (None, Ok(_)) if in_use => wished(rights, account, Some(own_label)),
        (_, first) => first,
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

    #[test]
    fn a_second_target_without_a_name_gets_a_label() {
        let rights = |home: Option<&str>, names: &[&str]| Rights {
            names: names.iter().map(|n| n.parse().unwrap()).collect(),
            home: home.map(|h| h.parse().unwrap()),
            ..Rights::default()
        };
        let text = |p: Result<Pattern, Unclear>| p.map(|p| p.to_string());
        let home = rights(Some("alice.t.ex"), &["alice.t.ex", "*.alice.t.ex"]);
        let of = |wish, taken: bool| text(meant(&home, "alice", wish, "own", |_| taken));
        assert_eq!(of(None, false), Ok("alice.t.ex".into()));
        assert_eq!(of(None, true), Ok("own.alice.t.ex".into()));
        assert_eq!(of(Some("app"), true), Ok("app.alice.t.ex".into()));
        let wild = rights(None, &["*.c.ex"]);
        let first = meant(&wild, "alice", None, "own", |_| false);
        assert_eq!(text(first), Ok("own.c.ex".into()));
        let none = meant(&rights(None, &[]), "alice", None, "own", |_| false);
        assert_eq!(none, Err(Unclear::Nothing("alice".into())));
    }

    #[test]
    fn an_installation_keeps_its_label() {
        let label = own_label("laptop", 1);
        assert_eq!(label, own_label("laptop", 1));
        assert_ne!(label, own_label("laptop", 2));
        assert!(label.parse::<rvpn_proto::name::Name>().is_ok() && label.len() == 8);
    }

    #[test]
    fn usual_ports_are_not_written() {
        assert_eq!(url("https", "a.example", 443), "https://a.example");
        assert_eq!(url("https", "a.example", 8443), "https://a.example:8443");
        assert_eq!(url("http", "a.example", 443), "http://a.example:443");
        assert_eq!(url("tcp", "::1", 80), "tcp://[::1]:80");
    }
}
