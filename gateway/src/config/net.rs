//! Networks and host names.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// An address range, such as `10.0.0.0/8`; a single address is one too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    base: IpAddr,
    bits: u8,
}

impl Network {
    /// Whether the address is inside. An IPv4 address that came through an
    /// IPv6 socket counts as what it is.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.base, address.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(a)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                base.to_bits() & mask == a.to_bits() & mask
            }
            (IpAddr::V6(base), IpAddr::V6(a)) => {
                let shift = 128 - u32::from(self.bits);
                let mask = u128::MAX.checked_shl(shift).unwrap_or(0);
                base.to_bits() & mask == a.to_bits() & mask
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Network, String> {
        let wrong = || format!("\"{text}\" is not a network; write it like 10.0.0.0/8 or fd00::/8");
        let (base, bits) = match text.split_once('/') {
            Some((base, bits)) => (base, Some(bits)),
            None => (text, None),
        };
        let base: IpAddr = base.parse().map_err(|_| wrong())?;
        let most = if base.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |b| b.parse().map_err(|_| wrong()))?;
        if bits > most {
            return Err(wrong());
        }
        Ok(Network { base, bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.bits)
    }
}

/// The host names that the public port answers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    names: Vec<String>,
    any: bool,
}

impl Names {
    /// Lower-cases and checks them. `*` alone means whatever a client says.
    pub fn new(names: Vec<String>) -> Result<Names, String> {
        let mut checked = Names::default();
        for name in names {
            if name == "*" {
                checked.any = true;
                continue;
            }
            let lower = name.to_ascii_lowercase();
            let fits = !lower.is_empty()
                && lower.len() <= 253
                && lower.split('.').all(is_label)
                && lower.parse::<IpAddr>().is_err();
            if !fits {
                return Err(format!(
                    "names: \"{name}\" is not a host name; write it like vpn.example.org, without scheme or port (addresses need no entry)"
                ));
            }
            checked.names.push(lower);
        }
        Ok(checked)
    }

    /// Whether a request for this host, without port, is for us. Addresses
    /// are: a page of a rebound name never sends one as its host.
    pub fn answers_to(&self, host: &str) -> bool {
        self.any || is_address(host) || host == "localhost" || self.lists(host)
    }

    /// Whether the name is configured.
    pub fn lists(&self, host: &str) -> bool {
        self.names.iter().any(|name| name == host)
    }

    /// The first name, which is the one to show.
    pub fn first(&self) -> Option<&str> {
        self.names.first().map(String::as_str)
    }

    /// All of them.
    pub fn all(&self) -> &[String] {
        &self.names
    }
}

fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn is_address(host: &str) -> bool {
    let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    match inner {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.parse::<std::net::Ipv4Addr>().is_ok(),
    }
}

/// Splits `host[:port]` as it stands in a Host header or an origin, lower-cased
/// and without a trailing dot. `None` if it is neither a name nor an address:
/// nothing is guessed about what a stranger may have meant.
pub fn host_of(authority: &str) -> Option<(String, Option<u16>)> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
            let port = port.parse().ok().filter(|_| digits)?;
            (host, Some(port))
        }
        Some(_) | None => (authority, None),
    };
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    let fits = is_address(host) || (host.len() <= 253 && host.split('.').all(is_label));
    fits.then(|| (host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_contains_its_own_and_nobody_else() {
        let net: Network = "10.1.0.0/16".parse().unwrap();
        assert!(net.contains("10.1.255.1".parse().unwrap()));
        assert!(net.contains("::ffff:10.1.0.1".parse().unwrap()));
        assert!(!net.contains("10.2.0.0".parse().unwrap()));
        assert!(!net.contains("fd00::1".parse().unwrap()));
        let all: Network = "::/0".parse().unwrap();
        assert!(all.contains("fd00::1".parse().unwrap()));
        assert!("10.0.0.0/33".parse::<Network>().is_err());
        assert!("localhost".parse::<Network>().is_err());
        let one: Network = "192.0.2.7".parse().unwrap();
        assert!(one.contains("192.0.2.7".parse().unwrap()));
        assert!(!one.contains("192.0.2.8".parse().unwrap()));
    }

    #[test]
    fn hosts_are_canonical_or_refused() {
        let of = |text| host_of(text);
        assert_eq!(
            of("VPN.Example.org.:443"),
            Some(("vpn.example.org".into(), Some(443)))
        );
        assert_eq!(of("[::1]:8443"), Some(("[::1]".into(), Some(8443))));
        assert_eq!(of("[::1]"), Some(("[::1]".into(), None)));
        assert_eq!(of("192.0.2.1"), Some(("192.0.2.1".into(), None)));
        for wrong in [
            "",
            "a b",
            "user@host",
            "host:",
            "host:http",
            "host:+1",
            "::1",
            "-a.b",
            "a..b",
            "h/x",
            "h\u{e9}",
        ] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_configured_names_and_addresses_are_answered_to() {
        let names = Names::new(vec!["VPN.example.org".into()]).unwrap();
        for ours in ["vpn.example.org", "192.0.2.1", "[2001:db8::1]", "localhost"] {
            assert!(names.answers_to(ours), "{ours}");
        }
        for theirs in [
            "evil.example",
            "vpn.example.org.evil.example",
            "0x7f.1",
            "2130706433",
        ] {
            assert!(!names.answers_to(theirs), "{theirs}");
        }
        assert!(Names::new(vec!["*".into()]).unwrap().answers_to("whatever"));
        assert!(Names::new(vec!["https://x".into()]).is_err());
    }
}
