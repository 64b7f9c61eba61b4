//! What a login may serve to the world.

use rvpn_proto::name::{Name, Pattern};

use super::Denied;

/// Names and ports of one claim; more are of no use.
pub(crate) const MOST: usize = 256;

/// Names and ports that somebody may serve. They come from what was signed,
/// never from who asks first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Names, or all below a name.
    pub names: Vec<Pattern>,
    /// TCP ports of the gateway.
    pub ports: Vec<u16>,
    /// The account's own name, below which everything is its.
    pub home: Option<Name>,
}

impl Rights {
    /// Reads the claims `domains`, `name` and `ports`.
    pub(super) fn claimed(
        domains: Option<&[String]>,
        name: Option<&str>,
        ports: Option<&[u16]>,
    ) -> Result<Rights, Denied> {
        let domains = domains.unwrap_or_default();
        let ports = ports.unwrap_or_default();
        if domains.len() > MOST || ports.len() > MOST || ports.contains(&0) {
            return Err(Denied::Claims);
        }
        let texts = domains.iter().map(String::as_str).chain(name);
        let names = texts.map(|text| Pattern::parse(text).map_err(|_| Denied::Claims));
        Ok(Rights {
            names: names.collect::<Result<_, _>>()?,
            ports: ports.to_vec(),
            home: None,
        })
    }

    /// Those of a registered device. What is stored was checked when it was
    /// written; whatever no longer is a name gives nothing.
    pub(super) fn stored(names: &[String], ports: &[u16]) -> Rights {
        Rights {
            names: names.iter().filter_map(|n| n.parse().ok()).collect(),
            ports: ports.to_vec(),
            home: None,
        }
    }

    /// Keeps what is inside these names.
    pub(super) fn within(mut self, names: &[Pattern]) -> Rights {
        let inside = |wish: &Pattern| names.iter().any(|n| n.contains(wish));
        self.names.retain(inside);
        self
    }

    /// Adds the account's own name below the domain, if the account is a label
    /// in its one canonical form: two accounts that differ in case only would
    /// otherwise be one name.
    pub(super) fn at_home(mut self, account: &str, domain: &Name) -> Rights {
        let is_label = !account.contains('.') && !account.contains(':');
        let home = Name::parse(&format!("{account}.{domain}")).ok();
        let home = home.filter(|h| is_label && h.as_str().starts_with(account));
        if let Some(home) = home {
            self.names.push(Pattern::exact(home.clone()));
            self.names.push(Pattern::below(home.clone()));
            self.home = Some(home);
        }
        self
    }

    /// Whether all that the pattern stands for may be served.
    pub fn name(&self, wish: &Pattern) -> bool {
        self.names.iter().any(|n| n.contains(wish))
    }

    /// Whether the port may be listened on.
    pub fn port(&self, port: u16) -> bool {
        self.ports.contains(&port)
    }
}
