//! Certificates by name, and where visitors go who name nobody.

use std::path::Path;

use rvpn_proto::name::{Name, Pattern};

use super::check::Checked;
use super::{CertificateFiles, FrontSettings, NamedCertificate, Unknown, raw};

pub(super) fn certificates(
    raw: Vec<raw::Certificate>,
    base: &Path,
) -> Checked<Vec<NamedCertificate>> {
    let mut all: Vec<NamedCertificate> = Vec::new();
    for one in raw {
        let files = CertificateFiles {
            chain: base.join(one.chain),
            key: base.join(one.key),
        };
        if one.names.is_empty() {
            return Err(format!(
                "certificate {}: names is empty; list those it is for, such as \"app.example.org\"",
                files.chain.display()
            ));
        }
        let mut names = Vec::new();
        for text in &one.names {
            let pattern = Pattern::parse(text)
                .map_err(|why| format!("certificate: \"{text}\" is no name: {why}"))?;
            let before = all.iter().flat_map(|c: &NamedCertificate| &c.names);
            if before.chain(&names).any(|p| *p == pattern) {
                return Err(format!("certificate: \"{pattern}\" is there twice"));
            }
            names.push(pattern);
        }
        all.push(NamedCertificate { names, files });
    }
    Ok(all)
}

pub(super) fn settings(raw: &raw::Front) -> Checked<FrontSettings> {
    let name = |key: &str, text: &Option<String>| {
        text.as_ref()
            .map(|text| {
                Name::parse(text).map_err(|why| {
                    format!("front: {key} \"{text}\" is not a name that is served: {why}")
                })
            })
            .transpose()
    };
    let other = name("default-service", &raw.default_service)?;
    Ok(FrontSettings {
        ssh: name("ssh", &raw.ssh)?.or_else(|| other.clone()),
        other,
        silent: name("silent", &raw.silent)?,
        unknown: match raw.unknown {
            raw::Unknown::Close => Unknown::Close,
            raw::Unknown::Json => Unknown::Json,
        },
    })
}
