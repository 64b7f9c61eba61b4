//! What is served, as the command line has it.

use std::fmt;

use rvpn_proto::streams::{Offered, Serve};

use crate::fail::{Failure, Outcome};

/// A server of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its number, with the gateway.
    pub(crate) id: u32,
    pub(crate) service: Offered,
    /// Where it listens.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The name it would like.
    pub(crate) name: Option<String>,
    /// The gateway's port that it would like.
    pub(crate) public_port: Option<u16>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        write!(f, "{}://{host}:{}", self.service.as_str(), self.port)
    }
}

fn wrong(text: &str) -> Failure {
    Failure::usage(format!(
        "'{text}' is nothing to serve: write PORT, http://HOST:PORT, tls://HOST:PORT, ssh or \
         tcp:PORT"
    ))
}

/// `HOST:PORT`, `:PORT`, `PORT` or nothing where there is a usual port.
fn place(whole: &str, rest: &str, usual: Option<u16>) -> Outcome<(String, u16)> {
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.contains(['/', '?', '#', '@']) {
        return Err(Failure::usage(format!(
            "'{whole}': only a host and a port can be served, without a path or a user"
        )));
    }
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ if !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()) => ("", Some(rest)),
        _ => (rest, None),
    };
    let port = match port {
        Some(text) => Some(text.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| {
            Failure::usage(format!("'{whole}': '{text}' is not a port: 1 to 65535"))
        })?),
        None => usual,
    };
    let port = port.ok_or_else(|| {
        Failure::usage(format!(
            "'{whole}': say on which port it listens, like {whole}:8080"
        ))
    })?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._:".contains(&b);
    if host.len() > 253 || !host.bytes().all(fits) {
        return Err(wrong(whole));
    }
    let host = match host {
        "" => "127.0.0.1".to_owned(),
        named => named.to_owned(),
    };
    Ok((host, port))
}

fn read(text: &str) -> Outcome<(Offered, String, u16)> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        let (host, port) = place(text, text, None)?;
        return Ok((Offered::Http, host, port));
    }
    if text == "ssh" {
        return Ok((Offered::Ssh, "127.0.0.1".to_owned(), 22));
    }
    let (scheme, rest) = text.split_once(':').ok_or_else(|| wrong(text))?;
    let (service, usual) = match scheme {
        "http" => (Offered::Http, Some(80)),
        "tls" | "https" => (Offered::Tls, Some(443)),
        "ssh" => (Offered::Ssh, Some(22)),
        "tcp" => (Offered::Tcp, None),
        _ => return Err(wrong(text)),
    };
    let (host, port) = place(text, rest, usual)?;
    Ok((service, host, port))
}

/// Reads all targets, and gives names and ports to them in turn.
pub(crate) fn parse(targets: &[String], names: &[String], ports: &[u16]) -> Outcome<Vec<Target>> {
    let mut parsed = Vec::new();
    let (mut names, mut ports) = (names.iter(), ports.iter());
    for (id, text) in (1_u32..).zip(targets) {
        let (service, host, port) = read(text)?;
        let tcp = service == Offered::Tcp;
        parsed.push(Target {
            id,
            service,
            host,
            port,
            name: if tcp { None } else { names.next().cloned() },
            public_port: if tcp { ports.next().copied() } else { None },
        });
    }
    if let Some(name) = names.next() {
        return Err(Failure::usage(format!(
            "--name {name} is one more than there are targets with names"
        )));
    }
    if let Some(port) = ports.next() {
        return Err(Failure::usage(format!(
            "--port {port} is one more than there are tcp targets, like tcp:5432"
        )));
    }
    if parsed.len() > rvpn_proto::streams::OFFERS {
        return Err(Failure::usage(format!(
            "{} targets are too many for one client, {} are allowed",
            parsed.len(),
            rvpn_proto::streams::OFFERS
        )));
    }
    Ok(parsed)
}

impl Target {
    /// What the gateway is asked for.
    pub(crate) fn wish(&self) -> Serve {
        Serve {
            id: self.id,
            service: self.service,
            name: self.name.clone(),
            port: self.public_port,
            ending: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Outcome<String> {
        let parsed = parse(&[text.to_owned()], &[], &[])?;
        Ok(parsed[0].to_string())
    }

    #[test]
    fn targets_are_read_as_people_write_them() {
        for (text, target) in [
            ("3000", "http://127.0.0.1:3000"),
            ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
            ("http://localhost:3000/", "http://localhost:3000"),
            ("http:8080", "http://127.0.0.1:8080"),
            ("http://web.lan", "http://web.lan:80"),
            ("tls://:8443", "tls://127.0.0.1:8443"),
            ("https://10.0.0.7:8443", "tls://10.0.0.7:8443"),
            ("ssh", "ssh://127.0.0.1:22"),
            ("ssh:2222", "ssh://127.0.0.1:2222"),
            ("tcp:5432", "tcp://127.0.0.1:5432"),
            ("tcp:db.lan:5432", "tcp://db.lan:5432"),
            ("tcp://[::1]:5432", "tcp://[::1]:5432"),
        ] {
            assert_eq!(one(text).unwrap_or_else(|e| panic!("{text}: {e}")), target);
        }
        for text in [
            "",
            "0",
            "65536",
            "web",
            "ftp://x:21",
            "http://x/path",
            "http://u@x:1",
            "tcp:",
            "tcp:x",
            "http://a b:1",
            "http://x:port",
        ] {
            let error = one(text).unwrap_err();
            assert_eq!(error.kind, crate::fail::Kind::Usage, "{text}");
        }
    }

    #[test]
    fn names_and_ports_go_to_targets_in_turn() {
        let text = |t: &[&str]| t.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        let targets = text(&["3000", "tcp:5432", "tls://:8443"]);
        let parsed = parse(&targets, &text(&["app", "shop"]), &[15432]).unwrap();
        assert_eq!(parsed[0].name.as_deref(), Some("app"));
        assert_eq!(
            (parsed[1].name.as_deref(), parsed[1].public_port),
            (None, Some(15432))
        );
        assert_eq!(parsed[2].name.as_deref(), Some("shop"));
        assert!(parse(&targets, &text(&["a", "b", "c"]), &[]).is_err());
        assert!(parse(&text(&["3000"]), &[], &[15432]).is_err());
    }
}
