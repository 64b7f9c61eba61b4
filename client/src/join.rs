//! Registering this device's key with the code of an invite.

use std::io::Read as _;

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::json;

use crate::cli::Join;
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::home::Owner;
use crate::http::{Ask, ask};
use crate::profile::{self, Address, Device, Login, Profile, Trust};
use crate::text::{shown, to_base64};
use crate::{reach, tls};

/// What an invite says.
struct Invite {
    address: Address,
    fingerprint: Option<String>,
    code: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Joined {
    key_id: String,
    account: String,
}

fn read(link: &str) -> Outcome<Invite> {
    let wrong = |why: &str| {
        Failure::usage(format!(
            "this is not the link of an invite, rvpn://HOST/?fp=…&code=…: {why}"
        ))
    };
    let rest = link
        .strip_prefix("rvpn://")
        .ok_or_else(|| wrong("it does not begin with rvpn://"))?;
    let (authority, query) = rest
        .split_once('?')
        .ok_or_else(|| wrong("it has no code"))?;
    let address = authority
        .trim_end_matches('/')
        .parse()
        .map_err(|e: String| wrong(&e))?;
    let find = |key: &str| {
        let mut fields = query.split('&').filter_map(|f| f.split_once('='));
        fields.find(|(k, _)| *k == key).map(|(_, v)| v.to_owned())
    };
    let fingerprint = find("fp");
    if let Some(text) = &fingerprint {
        tls::pin(text)?;
    }
    Ok(Invite {
        address,
        fingerprint,
        code: find("code").ok_or_else(|| wrong("it has no code"))?,
    })
}

/// Joins, and keeps what is needed to log in.
pub(crate) async fn run(args: Join) -> Outcome {
    let link = match args.link.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .while_doing("read standard input")?;
            text
        }
        link => link.to_owned(),
    };
    let invite = read(link.trim())?;
    let owner = Owner::current()?;
    let name = args
        .name
        .unwrap_or_else(|| invite.address.host.replace(':', "."));
    let path = profile::path_of(&owner, &name)?;
    if path.exists() {
        return Err(Failure::usage(format!(
            "{} exists already: give the gateway another --name, or remove that file first",
            path.display()
        )));
    }
    let device = args.device.or_else(|| {
        let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
        (name.len() <= 64).then_some(name)
    });
    let trust = Trust {
        fingerprint: invite.fingerprint,
        ca_file: None,
    };
    let (private_key, public) = profile::new_key()?;
    let tcp = reach::connect(&invite.address).await?;
    let io = tls::handshake(&tls::connector(&trust, None)?, &invite.address, tcp).await?;
    let host = invite.address.authority();
    let body = json!({
        "code": invite.code,
        "public-key": to_base64(&public),
        "name": device.unwrap_or_default(),
    });
    let request = Ask {
        method: Method::POST,
        host: &host,
        path: "/rvpn/v1/join",
        bearer: None,
        body: Some(&body),
    };
    let (status, answer) = ask(io, request).await?;
    let joined: Joined = match status {
        StatusCode::OK => serde_json::from_slice(&answer).map_err(|e| {
            Failure::new(
                Kind::Protocol,
                format!("{host} answers what is no answer: {e}"),
            )
        })?,
        StatusCode::FORBIDDEN => {
            return Err(Failure::new(
                Kind::Refused,
                "the invite is not accepted: it was used, has expired, or was taken back; \
                 ask for a new one",
            ));
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            return Err(Failure::unavailable(format!(
                "{host} does not take invites right now ({status}): try again in a minute"
            )));
        }
        other => {
            return Err(Failure::new(
                Kind::Protocol,
                format!("{host} answers {other}: is it an RVPN gateway?"),
            ));
        }
    };
    let kept = Profile {
        address: invite.address.to_string(),
        instance: profile::new_instance()?,
        trust,
        login: Login::Device(Device {
            key_id: joined.key_id,
            account: joined.account.clone(),
            private_key,
        }),
    };
    let path = profile::keep(&owner, &name, &kept)?;
    println!(
        "joined {} as {}; kept in {}",
        invite.address,
        shown(&joined.account),
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links() {
        let pin = "ab".repeat(32);
        let whole = read(&format!("rvpn://vpn.example.org:8443/?fp={pin}&code=XYZ")).unwrap();
        assert_eq!(whole.address.to_string(), "vpn.example.org:8443");
        assert_eq!(
            (whole.fingerprint.as_deref(), whole.code.as_str()),
            (Some(pin.as_str()), "XYZ")
        );
        assert!(
            read("rvpn://[2606:4700::2]/?code=XYZ")
                .unwrap()
                .fingerprint
                .is_none()
        );
        for wrong in [
            "https://a/?code=b",
            "rvpn://a",
            "rvpn://a/?fp=12&code=b",
            "rvpn:///?code=b",
            "rvpn://a/?x=y",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
