//! What is known of a gateway, and how this device proves who it is.

use std::fmt;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ED25519};
use rvpn_proto::control::Message as Control;
use serde::{Deserialize, Serialize};

use crate::cli::Choice;
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::home::Owner;
use crate::text::{from_base64, now, to_base64};

/// How long a token of a device is good; it is needed for one login only.
const TOKEN_LIFE: u64 = 300;

/// A text that is not shown.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Hidden(pub(crate) String);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Where a gateway is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// A name or an address, without brackets.
    pub(crate) host: String,
    /// Its port.
    pub(crate) port: u16,
}

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let wrong = || format!("'{text}' is not HOST or HOST:PORT, like vpn.example.org:443");
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => (
                host,
                port.parse().ok().filter(|p| *p > 0).ok_or_else(wrong)?,
            ),
            _ => (text, 443),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let fits = host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b));
        if host.is_empty() || host.len() > 253 || !fits {
            return Err(wrong());
        }
        Ok(Address {
            host: host.to_ascii_lowercase(),
            port,
        })
    }
}

impl Address {
    /// As in a URL or a Host header.
    pub(crate) fn authority(&self) -> String {
        let host = self.bare();
        match self.port {
            443 => host,
            port => format!("{host}:{port}"),
        }
    }

    fn bare(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.bare(), self.port)
    }
}

/// Whose certificate is believed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Trust {
    /// SHA-256 of the certificate, in hexadecimal: that one and no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fingerprint: Option<String>,
    /// A file of authorities instead of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ca_file: Option<PathBuf>,
}

/// How the login is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", untagged)]
pub(crate) enum Login {
    /// A key of this device, which signs a token for each login.
    Device(Device),
    /// A token that somebody else signed.
    Token(TokenFile),
}

/// The file of a token.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct TokenFile {
    /// Its path.
    pub(crate) token_file: PathBuf,
}

/// A registered device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Device {
    /// By which the gateway knows the key.
    pub(crate) key_id: String,
    /// On whose behalf.
    pub(crate) account: String,
    /// PKCS #8 in base64url.
    pub(crate) private_key: Hidden,
}

/// One gateway.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Profile {
    /// `host:port`.
    pub(crate) address: String,
    /// Made once at random; a gateway keeps one lease for it.
    pub(crate) instance: String,
    /// Whose certificate is believed.
    #[serde(default)]
    pub(crate) trust: Trust,
    /// Who we are.
    pub(crate) login: Login,
}

impl Profile {
    /// Where the gateway is.
    pub(crate) fn address(&self) -> Outcome<Address> {
        let parsed = self.address.parse();
        parsed.map_err(|e: String| Failure::new(Kind::Config, format!("address: {e}")))
    }

    /// A token for one login, now.
    pub(crate) fn token(&self) -> Outcome<Hidden> {
        match &self.login {
            Login::Device(device) => device.token(),
            Login::Token(file) => {
                let text = Owner::current()?.read_private(&file.token_file)?;
                let token = text.trim();
                let fits = token.bytes().all(|b| b.is_ascii_graphic());
                if token.is_empty() || !fits {
                    return Err(Failure::new(
                        Kind::Config,
                        format!("{} holds no token", file.token_file.display()),
                    ));
                }
                Ok(Hidden(token.to_owned()))
            }
        }
    }
}

impl Device {
    fn token(&self) -> Outcome<Hidden> {
        #[derive(Serialize)]
        struct Claims<'a> {
            sub: &'a str,
            iat: u64,
            exp: u64,
            jti: String,
        }
        let broken = || {
            Failure::new(
                Kind::Config,
                "the device's key is damaged: ask for a new invite and join again",
            )
        };
        let key = from_base64(&self.private_key.0).ok_or_else(broken)?;
        let claims = Claims {
            sub: &self.account,
            iat: now(),
            exp: now() + TOKEN_LIFE,
            jti: random_text::<12>()?,
        };
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = Some(self.key_id.clone());
        let signed = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_ed_der(&key));
        signed.map(Hidden).map_err(|_| broken())
    }
}

/// A new key: its PKCS #8 form, and the raw public half.
pub(crate) fn new_key() -> Outcome<(Hidden, Vec<u8>)> {
    let pair = KeyPair::generate_for(&PKCS_ED25519).while_doing("make a key")?;
    let private = Hidden(to_base64(&pair.serialize_der()));
    Ok((private, pair.public_key_raw().to_vec()))
}

/// Random bytes as text. From the kernel: the crypto library measures the
/// processor's jitter for tens of milliseconds before it gives its first ones,
/// and that would be most of the time that `up` takes to connect.
pub(crate) fn random_text<const N: usize>() -> Outcome<String> {
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom")
        .and_then(|mut kernel| kernel.read_exact(&mut bytes))
        .while_doing("get random bytes")?;
    Ok(to_base64(&bytes))
}

/// A name for this installation that a gateway accepts as an identifier.
pub(crate) fn new_instance() -> Outcome<String> {
    Ok(format!("i{}", random_text::<12>()?))
}

/// The file of a gateway of this name.
pub(crate) fn path_of(owner: &Owner, name: &str) -> Outcome<PathBuf> {
    let fits = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !fits {
        return Err(Failure::usage(format!(
            "'{name}' cannot name a gateway: use up to 64 letters, digits, dots, dashes"
        )));
    }
    Ok(owner.config_dir().join(format!("{name}.toml")))
}

/// The names of the gateways that were joined.
pub(crate) fn names(owner: &Owner) -> Vec<String> {
    let Ok(entries) = fs::read_dir(owner.config_dir()) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter_map(|f| f.strip_suffix(".toml").map(str::to_owned))
        .collect();
    names.sort();
    names
}

fn read(owner: &Owner, path: &Path) -> Outcome<Profile> {
    let text = owner.read_private(path)?;
    toml::from_str(&text).map_err(|e| {
        // The text of a syntax error would show the line, and with it the key.
        let message = format!("{}: {}", path.display(), e.message());
        Failure::new(Kind::Config, message)
    })
}

/// The gateway that the command line, the environment or the only profile names.
pub(crate) fn choose(choice: &Choice) -> Outcome<(String, Profile)> {
    let owner = Owner::current()?;
    if let Some(server) = &choice.server {
        let Some(token_file) = &choice.token_file else {
            return Err(Failure::usage(
                "--server needs --token-file FILE, or an invite: rvpn join LINK",
            ));
        };
        let address: Address = server.parse().map_err(Failure::usage)?;
        let profile = Profile {
            address: address.to_string(),
            instance: new_instance()?,
            trust: Trust {
                fingerprint: choice.fingerprint.clone(),
                ca_file: choice.ca_file.clone(),
            },
            login: Login::Token(TokenFile {
                token_file: token_file.clone(),
            }),
        };
        return Ok((address.authority(), profile));
    }
    let known = names(&owner);
    let name = match (&choice.gateway, known.as_slice()) {
        (Some(name), _) => name.clone(),
        (None, [only]) => only.clone(),
        (None, []) => {
            return Err(Failure::new(
                Kind::Config,
                "no gateway is known: run 'rvpn join LINK' with the link of an invite, \
                 or name one with --server HOST --token-file FILE",
            ));
        }
        (None, several) => {
            return Err(Failure::usage(format!(
                "several gateways are known: choose one with --gateway ({})",
                several.join(", ")
            )));
        }
    };
    let path = path_of(&owner, &name)?;
    if !path.exists() {
        let known = match known.is_empty() {
            true => "none is known yet, 'rvpn join LINK' adds one".to_owned(),
            false => format!("known are: {}", known.join(", ")),
        };
        return Err(Failure::usage(format!(
            "no gateway is called '{name}': {known}"
        )));
    }
    Ok((name, read(&owner, &path)?))
}

/// Keeps a gateway.
pub(crate) fn keep(owner: &Owner, name: &str, profile: &Profile) -> Outcome<PathBuf> {
    let path = path_of(owner, name)?;
    let text = toml::to_string(profile).while_doing("write the profile")?;
    owner.write_private(&path, text.as_bytes())?;
    Ok(path)
}

/// What this program calls itself.
pub(crate) fn program() -> String {
    concat!("rvpn/", env!("CARGO_PKG_VERSION")).to_owned()
}

/// A control message for the wire.
pub(crate) fn encode(message: &Control, stage: rvpn_proto::control::Stage) -> Outcome<String> {
    message
        .to_text(stage)
        .while_doing("write a control message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let parse = |t: &str| t.parse::<Address>();
        for (text, host, port) in [
            ("vpn.example.org", "vpn.example.org", 443),
            ("VPN.example.org:8443", "vpn.example.org", 8443),
            ("1.1.1.2", "1.1.1.2", 443),
            ("[2606:4700::2]:444", "2606:4700::2", 444),
            ("2606:4700::2", "2606:4700::2", 443),
        ] {
            let address = parse(text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(
                (address.host.as_str(), address.port),
                (host, port),
                "{text}"
            );
            assert_eq!(parse(&address.to_string()), Ok(address));
        }
        for wrong in ["", ":443", "a:0", "a:70000", "a b", "a/b", "user@host"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nothing_secret_is_shown() {
        let device = Device {
            key_id: "d.x".to_owned(),
            account: "alice".to_owned(),
            private_key: Hidden("SECRET".to_owned()),
        };
        assert!(!format!("{:?}", Login::Device(device)).contains("SECRET"));
    }
}
