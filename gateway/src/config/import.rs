//! The configuration of the first reverse VPN's server, said in our words.
//!
//! What has a counterpart is translated, what has none is said in a comment of
//! the result, so that nothing is lost without a word.

mod yaml;

use std::path::Path;

use rvpn_proto::name::{Name, Pattern};

use self::yaml::Node;

/// Where both looked for clients if nothing was said.
const PORT: u16 = 8443;

/// Secrets below this can be tried out.
const SHORT: usize = 32;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Not of the kind that is read here.
    #[error("line {line}: {what}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// What and what instead.
        what: String,
    },
    /// It is, but not that program's.
    #[error("{0}")]
    Meaning(String),
}

type Imported<T> = Result<T, ImportError>;

/// The keys that are known, for finding those that are not.
const KNOWN: [&str; 10] = [
    "rvpn.serverName",
    "rvpn.wssdomain",
    "rvpn.admindomain",
    "rvpn.genericlistener",
    "rvpn.deadtime.dwell",
    "rvpn.deadtime.idle",
    "rvpn.deadtime.cancelcheck",
    "rvpn.domains",
    "rvpn.loadbalancing.defaultmethod",
    "rvpn.domains.*.secret",
];

/// Translates the text of a file. `path` is only named in the result.
pub fn import(text: &str, path: &Path) -> Imported<String> {
    let root = yaml::parse(text)?;
    let Some(rvpn) = root.get("rvpn") else {
        return Err(ImportError::Meaning(
            "there is no key rvpn at the top; this is not a configuration of go-rvpn-server"
                .to_owned(),
        ));
    };
    let mut notes = Vec::new();
    unknown(&root, "", &mut notes);
    let mut out = format!(
        "# From {}, by rvpn-gateway config import.\n# Check it with: rvpn-gateway --config THIS --check\n\n",
        path.display()
    );
    top(rvpn, &mut out)?;
    listener(rvpn, &mut out)?;
    admin(rvpn, &mut out)?;
    serve(rvpn, &mut out, &mut notes)?;
    domains(rvpn, &mut out, &mut notes)?;
    for note in notes {
        writes(&mut out, format_args!("\n# Note: {note}"));
    }
    Ok(out)
}

fn writes(out: &mut String, what: std::fmt::Arguments<'_>) {
    out.push_str(&format!("{what}\n"));
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn wrong(key: &str, text: &str, why: &dyn std::fmt::Display) -> ImportError {
    ImportError::Meaning(format!("rvpn.{key}: \"{text}\": {why}"))
}

fn scalar<'a>(of: &'a Node, key: &str) -> Imported<Option<&'a str>> {
    match of.get(key) {
        None => Ok(None),
        Some(node) => match node.scalar() {
            Some("") => Ok(None),
            Some(text) => Ok(Some(text)),
            None => Err(ImportError::Syntax {
                line: node.line(),
                what: format!("{key} must be a single value"),
            }),
        },
    }
}

fn name(of: &Node, key: &str) -> Imported<Option<Name>> {
    let Some(text) = scalar(of, key)? else {
        return Ok(None);
    };
    // Its own examples have a port behind the name.
    let (name, _) = Name::with_port(text).map_err(|e| wrong(key, text, &e))?;
    Ok(Some(name))
}

fn number(of: &Node, key: &str, most: u64) -> Imported<Option<u64>> {
    let Some(text) = scalar(of, key)? else {
        return Ok(None);
    };
    let found = text.parse().ok().filter(|n| (1..=most).contains(n));
    let why = format!("must be a whole number from 1 to {most}");
    found.map(Some).ok_or_else(|| wrong(key, text, &why))
}

fn top(rvpn: &Node, out: &mut String) -> Imported<()> {
    if let Some(called) = scalar(rvpn, "serverName")? {
        let plain: String = called.chars().filter(|c| !c.is_control()).collect();
        writes(out, format_args!("# It was called: {plain}"));
    }
    match name(rvpn, "wssdomain")? {
        Some(name) if !name.is_address() => {
            writes(out, format_args!("names = [{}]\n", quoted(name.as_str())));
        }
        _ => writes(
            out,
            format_args!("# wssdomain names no host: addresses need no entry in names.\n"),
        ),
    }
    Ok(())
}

fn listener(rvpn: &Node, out: &mut String) -> Imported<()> {
    let port = number(rvpn, "genericlistener", 65_535)?.unwrap_or(PORT.into());
    writes(
        out,
        format_args!("[[listener]]\naddress = \"[::]:{port}\"\nmode = \"auto\"\n"),
    );
    writes(
        out,
        format_args!(
            "# It always read this pair. Remove the table for a certificate of the gateway's\n\
             # own, or have one got for you: see [acme].\n\
             [tls]\ncertificate = \"certs/fullchain.pem\"\nkey = \"certs/privkey.pem\"\n"
        ),
    );
    Ok(())
}

fn admin(rvpn: &Node, out: &mut String) -> Imported<()> {
    let Some(name) = name(rvpn, "admindomain")? else {
        return Ok(());
    };
    writes(
        out,
        format_args!(
            "# Its admin pages asked for no login. Here every call shows the token of\n\
             # admin.token in the state directory; under this name only by TLS.\n[admin]"
        ),
    );
    match name.is_address() {
        true => writes(
            out,
            format_args!("# {name} is an address: operators come in by loopback.\n"),
        ),
        false => writes(out, format_args!("public = [{}]\n", quoted(name.as_str()))),
    }
    Ok(())
}

fn serve(rvpn: &Node, out: &mut String, notes: &mut Vec<String>) -> Imported<()> {
    let empty = Node::empty();
    let balancing = rvpn.get("loadbalancing").unwrap_or(&empty);
    let method = match scalar(balancing, "defaultmethod")? {
        None | Some("round-robin" | "roundrobin" | "round_robin") => "round-robin",
        Some("least-connections" | "leastconnections" | "least_connections") => "least-connections",
        Some(other) => {
            notes.push(format!(
                "loadbalancing.defaultmethod {} is not known; round-robin stands in for it.",
                quoted(other)
            ));
            "round-robin"
        }
    };
    writes(out, format_args!("[serve]\nbalance = \"{method}\"\n"));
    let dead = rvpn.get("deadtime").unwrap_or(&empty);
    let mut times = String::new();
    for (theirs, ours) in [
        ("dwell", "dwell"),
        ("idle", "idle"),
        ("cancelcheck", "cancel-check"),
    ] {
        if let Some(seconds) = number(dead, theirs, 86_400)? {
            writes(&mut times, format_args!("{ours} = {seconds}"));
        }
    }
    if !times.is_empty() {
        writes(out, format_args!("[serve.dead-time]\n{times}"));
    }
    Ok(())
}

fn domains(rvpn: &Node, out: &mut String, notes: &mut Vec<String>) -> Imported<()> {
    let Some(domains) = rvpn.get("domains") else {
        notes.push("there are no domains, so no older client can log in; add a [[legacy]] block for each secret.".to_owned());
        return Ok(());
    };
    // Whoever holds a secret may use it for every name that it stands at, and
    // older clients sign one token for several names.
    let mut blocks: Vec<(&str, Vec<Pattern>)> = Vec::new();
    for (text, settings) in domains.entries() {
        let pattern = Pattern::parse(text).map_err(|e| wrong("domains", text, &e))?;
        if blocks.iter().any(|(_, names)| names.contains(&pattern)) {
            return Err(wrong("domains", text, &"it is there twice"));
        }
        let Some(secret) = scalar(settings, "secret")? else {
            notes.push(format!(
                "{pattern} has no secret, so nobody may serve it; it was left out."
            ));
            continue;
        };
        match blocks.iter_mut().find(|(s, _)| *s == secret) {
            Some((_, names)) => names.push(pattern),
            None => blocks.push((secret, vec![pattern])),
        }
    }
    for (secret, names) in &blocks {
        let Some(first) = names.first() else { continue };
        let label = first.to_string().replace("*.", "all.").replace(':', "-");
        if secret.len() < SHORT {
            notes.push(format!(
                "the secret of {first} has {} characters; whoever guesses it serves its names. Give their clients a longer one.",
                secret.len()
            ));
        }
        let names: Vec<_> = names.iter().map(|n| quoted(&n.to_string())).collect();
        writes(
            out,
            format_args!(
                "# Tokens signed with this secret may serve these names and nothing else. It may\n\
                 # stand in a file of its own (mode 0600) instead: secret-file = \"…\"\n\
                 [[legacy]]\nname = {}\nsecret = {}\ndomains = [{}]\n",
                quoted(&label),
                quoted(secret),
                names.join(", ")
            ),
        );
    }
    if !blocks.is_empty() {
        notes.push(
            "the result has secrets in it: keep it readable for the gateway's user only (chmod 0640)."
                .to_owned(),
        );
    }
    Ok(())
}

/// What nobody reads, so that a slip of the pen is found.
fn unknown(node: &Node, path: &str, notes: &mut Vec<String>) {
    for (key, below) in node.entries() {
        let full = match path.is_empty() {
            true => key.to_owned(),
            false => format!("{path}.{key}"),
        };
        let general = match path {
            "rvpn.domains" => "rvpn.domains.*",
            _ => &full,
        };
        let general = general.to_ascii_lowercase();
        let inside = format!("{general}.");
        let fits = |known: &&str| **known == general || known.starts_with(&inside);
        match KNOWN.iter().any(|k| fits(&k.to_ascii_lowercase().as_str())) {
            true => unknown(below, &general, notes),
            false => notes.push(format!(
                "{full} (line {}) has no counterpart and was left out.",
                below.line()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "\
rvpn:
  serverName: rvpn1
  wssdomain: localhost.rvpn.daplie.invalid
  admindomain: rvpn.rvpn.daplie.invalid
  genericlistener: 8443
  deadtime:
    dwell: 120
    idle: 60
    cancelcheck: 10
  domains:
    test.daplie.me:
      secret: abc123
    'test2.daplie.me':
      secret: \"abc: #1\\\"23\" # a comment
    \"*.test3.daplie.me\":
      secret: abc123
  loadbalancing:
    defaultmethod: round-robin
";

    fn load(text: &str) -> crate::config::Config {
        let text = text.replace("# From", "helper.user = 7\n# From");
        crate::config::Config::parse(&text, Path::new("/etc/rvpn/gateway.toml"), |_| None).unwrap()
    }

    #[test]
    fn r_19_every_key_of_the_ancestor_is_translated() {
        let out = import(EXAMPLE, Path::new("go-rvpn-server.yaml")).unwrap();
        let config = load(&out);
        assert_eq!(config.names.all(), ["localhost.rvpn.daplie.invalid"]);
        assert_eq!(config.admin_public, ["rvpn.rvpn.daplie.invalid"]);
        assert_eq!(config.listeners[0].address.port(), 8443);
        let dead = config.serve.dead_time;
        assert_eq!(
            (
                dead.dwell.as_secs(),
                dead.idle.as_secs(),
                dead.cancel_check.as_secs()
            ),
            (120, 60, 10)
        );
        assert_eq!(config.serve.balance.as_str(), "round-robin");
        let legacy: Vec<_> = config
            .legacy
            .iter()
            .map(|l| {
                let names = l.domains.iter().map(ToString::to_string);
                (
                    &*l.name,
                    l.secret.bytes(),
                    names.collect::<Vec<_>>().join(" "),
                )
            })
            .collect();
        assert_eq!(
            legacy,
            [
                (
                    "test.daplie.me",
                    &b"abc123"[..],
                    "test.daplie.me *.test3.daplie.me".to_owned()
                ),
                (
                    "test2.daplie.me",
                    b"abc: #1\"23",
                    "test2.daplie.me".to_owned()
                ),
            ]
        );
        assert!(out.contains("has 6 characters"));
    }

    #[test]
    fn r_19_what_has_no_counterpart_is_said() {
        let text = EXAMPLE.replace("  serverName", "  colour: blue\n  serverNam");
        let text = text.replace("defaultmethod: round-robin", "defaultmethod: random");
        let out = import(&text, Path::new("x")).unwrap();
        assert!(out.contains("# Note: rvpn.colour (line 2)"), "{out}");
        assert!(out.contains("# Note: rvpn.serverNam (line 3)"), "{out}");
        assert!(
            out.contains("defaultmethod \"random\" is not known"),
            "{out}"
        );
        load(&out);
    }

    #[test]
    fn r_19_what_cannot_be_is_refused_by_name() {
        let error = |text: &str| import(text, Path::new("x")).unwrap_err().to_string();
        assert!(error("").contains("no key rvpn"));
        assert!(error("other: 1\n").contains("no key rvpn"));
        let with = |from: &str, to: &str| error(&EXAMPLE.replace(from, to));
        assert!(with("8443", "99999").contains("rvpn.genericlistener: \"99999\""));
        assert!(with("dwell: 120", "dwell: soon").contains("rvpn.dwell: \"soon\""));
        assert!(with("test.daplie.me", "te st").contains("rvpn.domains: \"te st\""));
        assert!(with("    dwell", "\tdwell").starts_with("line 7: "));
    }
}
