//! What older clients speak.

use std::sync::Arc;

use rvpn_proto::control;
use rvpn_proto::dialect::{Dialect as Variant, Noise, Padding};
use rvpn_proto::packer::Profile;

use super::{Checked, NAME_LEN, name};
use crate::config::{Dialect, Legacy, Packer, raw};

pub(super) fn packer(raw: raw::Packer, legacy: &[Legacy]) -> Checked<Packer> {
    let some = legacy.iter().any(|l| !l.domains.is_empty());
    Ok(Packer {
        enabled: raw.enabled.unwrap_or(some),
        profile: raw
            .profile
            .map(|p| profile(&p))
            .transpose()
            .map_err(|why| format!("packer: {why}"))?,
    })
}

pub(super) fn profile(text: &str) -> Checked<Profile> {
    text.parse()
        .map_err(|why| format!("profile \"{text}\" is {why}"))
}

pub(super) fn dialect(raw: raw::Dialect, legacy: &[Legacy]) -> Checked<Dialect> {
    let wrong = |why: &str| format!("dialect \"{}\": {why}", raw.path);
    let is_path = raw.path.starts_with('/')
        && raw.path.len() <= NAME_LEN
        && raw
            .path
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"?#%\\".contains(&b));
    if !is_path {
        return Err(wrong("the path must begin with / and have no ?, # or %"));
    }
    if raw.path == control::PATH || raw.path.starts_with("/rvpn/") {
        return Err(wrong("paths under /rvpn/ belong to the gateway itself"));
    }
    let variant = match raw.kind {
        raw::DialectKind::Raw => Variant::SnatRaw,
        raw::DialectKind::Text4 => Variant::TextV4,
        raw::DialectKind::Text46 => Variant::TextDual,
        raw::DialectKind::Padded => Variant::Padded,
    };
    if raw.anonymous && raw.legacy.is_some() {
        return Err(wrong("anonymous and legacy exclude each other"));
    }
    let account = raw.account.as_deref();
    let account = account.map(|a| name("dialect: account", a)).transpose()?;
    let by_name = |n: &String| legacy.iter().find(|l| *l.name == **n);
    let legacy = match &raw.legacy {
        Some(name) => match by_name(name) {
            Some(found) => Some(Arc::clone(&found.name)),
            None => return Err(wrong(&format!("there is no [[legacy]] named \"{name}\""))),
        },
        None => None,
    };
    if account.is_some() && legacy.is_some() {
        return Err(wrong(
            "with legacy the account is that of the [[legacy]] block; leave account out",
        ));
    }
    let padding = match &raw.padding {
        None => Padding::NONE,
        Some(_) if variant != Variant::Padded => {
            return Err(wrong("only the kind \"padded\" knows padding"));
        }
        Some(raw::Padding::Named(preset)) => match preset.as_str() {
            "none" => Padding::NONE,
            "slight" => Padding::SLIGHT,
            "broad" => Padding::BROAD,
            _ => {
                return Err(wrong(
                    "padding is \"none\", \"slight\", \"broad\" or a table of its own",
                ));
            }
        },
        Some(raw::Padding::Own(own)) => own_padding(own).map_err(|e| wrong(&e))?,
    };
    Ok(Dialect {
        variant,
        account,
        anonymous: raw.anonymous,
        legacy,
        class: raw.class,
        padding,
        path: raw.path,
    })
}

fn own_padding(own: &raw::OwnPadding) -> Checked<Padding> {
    let noise = match (own.noise_bytes, own.noise_every_ms) {
        (Some(bytes), Some(every_ms)) => Some(Noise { bytes, every_ms }),
        (None, None) => None,
        _ => return Err("noise needs both noise-bytes and noise-every-ms".to_owned()),
    };
    let padding = Padding {
        bytes: own.bytes,
        noise,
    };
    let ordered = |(low, high): (u16, u16)| low <= high && high <= 2048;
    let fits = ordered(padding.bytes)
        && padding.noise.is_none_or(|n| {
            ordered(n.bytes)
                && n.every_ms.0 <= n.every_ms.1
                && (10..=60_000).contains(&n.every_ms.0)
        });
    match fits {
        true => Ok(padding),
        false => Err(
            "ranges are [least, most]; bytes at most 2048, noise at least every 60 s and at most every 10 ms"
                .to_owned(),
        ),
    }
}
