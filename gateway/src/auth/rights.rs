//! What a login may serve to the world.

use rvpn_proto::name::Pattern;

use super::Denied;

/// Names and ports of one claim; more are of no use.
const MOST: usize = 256;

/// Names and ports that somebody may serve. They come from what was signed,
/// never from who asks first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Names, or all below a name.
    pub names: Vec<Pattern>,
    /// TCP ports of the gateway.
    pub ports: Vec<u16>,
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
        })
    }

    /// Keeps what is inside these names.
    pub(super) fn within(mut self, names: &[Pattern]) -> Rights {
        let inside = |wish: &Pattern| names.iter().any(|n| n.contains(wish));
        self.names.retain(inside);
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
