//! Certificates from an authority, and for which names.

use std::path::Path;

use rvpn_proto::name::Name;

use super::check::{Checked, SYSTEM_CA};
use super::{Acme, ChallengeKind, Challenges, raw};
use crate::acme::can_have;

/// The authority most people mean.
const DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";

pub(super) fn check(
    raw: Option<raw::Acme>,
    base: &Path,
    names: &[String],
    files: bool,
) -> Checked<Option<Acme>> {
    let Some(raw) = raw else {
        return Ok(None);
    };
    let directory = raw.directory.unwrap_or_else(|| DIRECTORY.to_owned());
    let is_https = directory
        .parse::<hyper::Uri>()
        .is_ok_and(|u| u.scheme_str() == Some("https") && u.host().is_some());
    if !is_https {
        return Err(format!(
            "acme: directory \"{directory}\" is not an https:// address; the default is {DIRECTORY}"
        ));
    }
    let contact = raw.contact.map_or_else(Vec::new, raw::OneOrMany::many);
    let contact = contact
        .into_iter()
        .map(address)
        .collect::<Checked<Vec<_>>>()?;
    let names = match raw.names {
        Some(names) => names
            .iter()
            .map(|text| {
                let name = Name::parse(text).ok().filter(can_have);
                name.ok_or_else(|| format!(
                    "acme: names: authorities sign for public host names such as vpn.example.org, not for \"{text}\" (wildcards need a certificate from files: [[certificate]])"
                ))
            })
            .collect::<Checked<Vec<_>>>()?,
        None if files => {
            if !raw.served {
                return Err(
                    "acme: [tls] is there too; list in acme.names what to get a certificate for, or remove one of both".to_owned(),
                );
            }
            Vec::new()
        }
        None => {
            let own = names.iter().filter_map(|n| Name::parse(n).ok());
            own.filter(can_have).collect()
        }
    };
    if names.is_empty() && !raw.served {
        return Err(
            "acme: there is no name to get a certificate for; add one to names or acme.names, or set acme.served = true"
                .to_owned(),
        );
    }
    Ok(Some(Acme {
        directory: directory.into(),
        contact,
        ca_file: raw
            .ca_file
            .map_or_else(|| SYSTEM_CA.into(), |file| base.join(file)),
        names,
        served: raw.served,
        challenge: match raw.challenge {
            raw::Challenge::TlsAlpn01 => Challenges::Only(ChallengeKind::TlsAlpn01),
            raw::Challenge::Http01 => Challenges::Only(ChallengeKind::Http01),
            raw::Challenge::Both => Challenges::Both,
        },
    }))
}

/// Authorities want addresses of mail as URLs.
fn address(text: String) -> Checked<String> {
    let bare = text.strip_prefix("mailto:").unwrap_or(&text);
    let fits = bare.split_once('@').is_some_and(|(who, host)| {
        !who.is_empty() && !host.is_empty() && bare.bytes().all(|b| b.is_ascii_graphic())
    });
    match fits {
        true => Ok(format!("mailto:{bare}")),
        false => Err(format!(
            "acme: contact \"{text}\" is no mail address; write it like ops@example.org"
        )),
    }
}
