//! Which name a client means.

use rvpn_proto::name::{Name, NotAName, Pattern};

use crate::auth::rights::Rights;

/// Why a wish leads to no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unclear {
    /// Nothing was said, and there is no name that goes without saying.
    #[error("say which name to serve: this login of {0} has none that goes without saying")]
    Nothing(String),
    /// Not a name at all.
    #[error("\"{0}\" is no name: {1}")]
    NotAName(String, NotAName),
    /// Outside the rights.
    #[error("\"{0}\" is not among the names of this login")]
    NotYours(String),
    /// Several names are meant by it.
    #[error("\"{0}\" can be {1} or {2}: give the whole name")]
    Several(String, Pattern, Pattern),
}

/// The name that a client of `account` means by its wish: a whole name inside
/// its rights, or one label. Without a wish it is the account's own name, or
/// the only one it has.
pub fn wished(rights: &Rights, account: &str, wish: Option<&str>) -> Result<Pattern, Unclear> {
    let Some(wish) = wish else {
        return own(rights, account);
    };
    let no_name = |why| Unclear::NotAName(shown(wish), why);
    if wish.trim_end_matches('.').contains('.') || wish.contains(':') {
        let pattern = Pattern::parse(wish).map_err(no_name)?;
        return match rights.name(&pattern) {
            true => Ok(pattern),
            false => Err(Unclear::NotYours(pattern.to_string())),
        };
    }
    let label = Name::parse(wish).map_err(no_name)?;
    if let Some(home) = &rights.home {
        return below(&label, home).map_err(no_name);
    }
    let claimed = rights.names.iter();
    let begins = |p: &&Pattern| first_label(p.name()) == label.as_str();
    let exact = claimed.clone().filter(|p| !p.is_wildcard()).filter(begins);
    if let Some(found) = only(wish, exact.cloned())? {
        return Ok(found);
    }
    let wild = claimed.filter(|p| p.is_wildcard());
    let inside = wild.filter_map(|p| below(&label, p.name()).ok());
    only(wish, inside)?.ok_or_else(|| Unclear::NotYours(label.to_string()))
}

fn own(rights: &Rights, account: &str) -> Result<Pattern, Unclear> {
    if let Some(home) = &rights.home {
        return Ok(Pattern::exact(home.clone()));
    }
    let exact = rights.names.iter().filter(|p| !p.is_wildcard());
    match only("", exact.cloned()) {
        Ok(Some(found)) => Ok(found),
        Ok(None) | Err(_) => Err(Unclear::Nothing(account.to_owned())),
    }
}

fn below(label: &Name, base: &Name) -> Result<Pattern, NotAName> {
    let name = Name::parse(&format!("{label}.{base}"))?;
    Ok(Pattern::exact(name))
}

fn first_label(name: &Name) -> &str {
    name.as_str().split('.').next().unwrap_or_default()
}

/// The one there is; an error if there are several.
fn only(wish: &str, mut found: impl Iterator<Item = Pattern>) -> Result<Option<Pattern>, Unclear> {
    let Some(first) = found.next() else {
        return Ok(None);
    };
    match found.find(|other| *other != first) {
        Some(other) => Err(Unclear::Several(shown(wish), first, other)),
        None => Ok(Some(first)),
    }
}

/// What a stranger wrote, fit for a line.
fn shown(text: &str) -> String {
    text.chars()
        .take(64)
        .flat_map(char::escape_default)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(home: Option<&str>, names: &[&str]) -> Rights {
        Rights {
            names: names.iter().map(|n| n.parse().unwrap()).collect(),
            home: home.map(|h| h.parse().unwrap()),
            ..Rights::default()
        }
    }

    #[test]
    fn a_wish_is_a_label_or_a_whole_name() {
        let home = rights(
            Some("alice.t.ex"),
            &["alice.t.ex", "*.alice.t.ex", "shop.ex"],
        );
        let of = |wish| wished(&home, "alice", wish).map(|p| p.to_string());
        assert_eq!(of(None), Ok("alice.t.ex".into()));
        assert_eq!(of(Some("App")), Ok("app.alice.t.ex".into()));
        assert_eq!(of(Some("shop.ex")), Ok("shop.ex".into()));
        assert_eq!(of(Some("*.alice.t.ex")), Ok("*.alice.t.ex".into()));
        assert_eq!(
            of(Some("bob.t.ex")),
            Err(Unclear::NotYours("bob.t.ex".into()))
        );
        assert!(matches!(of(Some("a b")), Err(Unclear::NotAName(..))));
        assert!(matches!(of(Some("")), Err(Unclear::NotAName(..))));
    }

    #[test]
    fn without_a_home_the_claims_decide() {
        let one = rights(None, &["app.shop.ex"]);
        assert_eq!(wished(&one, "a", None).unwrap().to_string(), "app.shop.ex");
        assert_eq!(
            wished(&one, "a", Some("app")).unwrap().to_string(),
            "app.shop.ex"
        );
        assert!(wished(&one, "a", Some("web")).is_err());
        let two = rights(None, &["app.a.ex", "app.b.ex", "*.c.ex"]);
        assert_eq!(wished(&two, "a", None), Err(Unclear::Nothing("a".into())));
        assert!(matches!(
            wished(&two, "a", Some("app")),
            Err(Unclear::Several(..))
        ));
        assert_eq!(
            wished(&two, "a", Some("web")).unwrap().to_string(),
            "web.c.ex"
        );
        assert!(wished(&rights(None, &[]), "a", Some("web")).is_err());
    }
}
