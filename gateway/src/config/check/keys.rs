//! Keys that sign tokens, and what their tokens may have.

use std::ops::RangeInclusive;
use std::path::Path;

use rvpn_proto::name::Pattern;

use super::dialects::profile;
use super::{Checked, SYSTEM_CA, name};
use crate::config::{Algorithm, Key, KeySource, Legacy, Secret, raw};

/// HS256 secrets of the strict policy are at least as long as its hash.
const SECRET_LEN: usize = 32;

pub(super) fn key(raw: raw::Key, base: &Path) -> Checked<Key> {
    let name = name("key", &raw.name)?;
    let wrong = |why: &str| format!("key \"{name}\": {why}");
    let ca_file = raw.ca_file.as_ref().map(|f| base.join(f));
    let source = match (raw.file, raw.secret_file, raw.jwks_file, raw.jwks_url) {
        (Some(file), None, None, None) => {
            let algorithm = match raw.algorithm.as_deref() {
                Some("EdDSA") => Algorithm::EdDsa,
                Some("ES256") => Algorithm::Es256,
                Some("RS256") => Algorithm::Rs256,
                Some(_) | None => {
                    return Err(wrong("algorithm must be EdDSA, ES256 or RS256 beside file"));
                }
            };
            KeySource::Pem {
                algorithm,
                file: base.join(file),
            }
        }
        (None, Some(file), None, None) => {
            if raw.algorithm.as_deref().is_some_and(|a| a != "HS256") {
                return Err(wrong("algorithm must be HS256 beside secret-file"));
            }
            let secret = secret_file(&base.join(file)).map_err(|e| wrong(&e))?;
            if secret.bytes().len() < SECRET_LEN {
                return Err(wrong(&format!(
                    "the secret has {} bytes and needs {SECRET_LEN}; make one with: openssl rand -hex 32",
                    secret.bytes().len()
                )));
            }
            KeySource::Secret(secret)
        }
        (None, None, Some(file), None) => KeySource::JwksFile(base.join(file)),
        (None, None, None, Some(url)) => {
            if !url.starts_with("https://") {
                return Err(wrong("jwks-url must begin with https://"));
            }
            url.parse::<hyper::Uri>()
                .map_err(|e| wrong(&format!("jwks-url: {e}")))?;
            KeySource::JwksUrl {
                url: url.into(),
                ca_file: ca_file.unwrap_or_else(|| SYSTEM_CA.into()),
            }
        }
        _ => {
            return Err(wrong(
                "give exactly one of file, secret-file, jwks-file and jwks-url",
            ));
        }
    };
    if raw.algorithm.is_some()
        && matches!(source, KeySource::JwksFile(_) | KeySource::JwksUrl { .. })
    {
        return Err(wrong(
            "a JWK set names its algorithms itself; leave algorithm out",
        ));
    }
    Ok(Key {
        name,
        source,
        issuer: raw.issuer,
        audience: raw.audience,
        class: raw.class,
    })
}

fn secret_file(path: &Path) -> Checked<Secret> {
    let mut bytes =
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    // An editor's last newline is not part of it.
    while bytes.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
        bytes.pop();
    }
    Ok(Secret::new(bytes))
}

pub(super) fn one_legacy(raw: raw::Legacy, base: &Path) -> Checked<Legacy> {
    let name = name("legacy", &raw.name)?;
    let wrong = |why: &str| format!("legacy \"{name}\": {why}");
    let secret = match (raw.secret, raw.secret_file) {
        (Some(secret), None) => secret,
        (None, Some(file)) => secret_file(&base.join(file)).map_err(|e| wrong(&e))?,
        _ => return Err(wrong("give exactly one of secret and secret-file")),
    };
    if secret.bytes().is_empty() {
        return Err(wrong("the secret is empty; anybody could sign with it"));
    }
    let mut domains = Vec::new();
    for domain in raw.domains {
        let pattern = Pattern::parse(&domain)
            .map_err(|why| wrong(&format!("\"{domain}\" is no domain: {why}")))?;
        domains.push(pattern);
    }
    let ports = ports(raw.ports).map_err(|e| wrong(&e))?;
    let profile = raw.profile.map(|p| profile(&p)).transpose();
    let profile = profile.map_err(|e| wrong(&e))?;
    Ok(Legacy {
        account: format!("legacy:{name}").into(),
        name,
        secret,
        domains,
        ports,
        profile,
        class: raw.class,
    })
}

fn ports(raw: Vec<raw::Ports>) -> Checked<Vec<RangeInclusive<u16>>> {
    let several = |text: &str| {
        let (first, last) = text.split_once('-')?;
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (0 < first && first <= last).then_some(first..=last)
    };
    raw.into_iter()
        .map(|ports| match ports {
            raw::Ports::One(port @ 1..) => Ok(port..=port),
            raw::Ports::One(0) => Err("port 0 is none".to_owned()),
            raw::Ports::Several(text) => several(&text)
                .ok_or_else(|| format!("\"{text}\" is no range of ports; write it like 2000-2999")),
        })
        .collect()
}
