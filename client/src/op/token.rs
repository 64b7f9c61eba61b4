//! Tokens: signed with a key that the gateway never sees.

use std::io::Read as _;
use std::path::Path;

use hyper::Method;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ED25519};
use rvpn_proto::name::Pattern;
use serde_json::{Value, json};

use super::{print, segment, text, when};
use crate::cli::{Admin, Token};
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::home::{Owner, read_private};
use crate::http::api;
use crate::profile::random_text;
use crate::text::{from_base64, moment, now, span, table};

pub(crate) async fn run(what: Token) -> Outcome {
    match what {
        Token::Key { out, name } => key(&out, &name),
        Token::Mint {
            key,
            kid,
            account,
            valid,
            jti,
            issuer,
            audience,
            domains,
            tcp_ports,
        } => {
            let jti = match jti {
                Some(jti) => jti,
                None => format!("t.{}", random_text::<12>()?),
            };
            let mut claims = json!({
                "sub": account,
                "iat": now(),
                "exp": now().saturating_add(valid.as_secs()),
                "jti": jti,
            });
            for (name, value) in [("iss", issuer), ("aud", audience)] {
                if let Some(value) = value {
                    claims[name] = value.into();
                }
            }
            if !domains.is_empty() {
                claims["domains"] = served_names(&domains)?.into();
            }
            if !tcp_ports.is_empty() {
                claims["ports"] = tcp_ports.into();
            }
            println!("{}", sign(&key, kid, &claims)?);
            eprintln!(
                "for {account}, good for {}, jti {jti}",
                span(valid.as_secs())
            );
            Ok(())
        }
        Token::Inspect { file, json } => {
            let token = read(&file)?;
            inspect(&parts(&token)?, json);
            Ok(())
        }
        Token::Revoke {
            admin,
            jti,
            account,
            file,
            reason,
            undo,
        } => {
            let (scope, value) = match (jti, account, file) {
                (Some(jti), _, _) => ("jti", jti),
                (_, Some(account), _) => ("subject", account),
                (_, _, Some(file)) => ("jti", jti_of(&file)?),
                (None, None, None) => {
                    return Err(Failure::usage(
                        "say what to revoke: --jti ID, --account NAME or --file TOKEN",
                    ));
                }
            };
            revoke(&admin, scope, &value, &reason, undo).await
        }
        Token::Revoked { admin } => revoked(&admin).await,
    }
}

/// In the one form that names have.
pub(super) fn served_names(names: &[String]) -> Outcome<Vec<String>> {
    let one = |text: &String| {
        let wrong = |why| Failure::usage(format!("{text:?} cannot be served: {why}"));
        Pattern::parse(text).map(|p| p.to_string()).map_err(wrong)
    };
    names.iter().map(one).collect()
}

fn key(out: &Path, name: &str) -> Outcome {
    if out.exists() {
        return Err(Failure::usage(format!(
            "{} exists already: name another file",
            out.display()
        )));
    }
    let pair = KeyPair::generate_for(&PKCS_ED25519).while_doing("make a key")?;
    let owner = Owner::current()?;
    owner.write_private(out, pair.serialize_pem().as_bytes())?;
    let public = out.with_extension("pub.pem");
    let acting = owner.act()?;
    std::fs::write(&public, pair.public_key_pem())
        .while_doing(format_args!("write {}", public.display()))?;
    drop(acting);
    println!("private key: {} (stays here)", out.display());
    println!(
        "public key:  {} (copy it to the gateway), and in its configuration:\n",
        public.display()
    );
    let file = public.file_name().unwrap_or_default().to_string_lossy();
    println!("[[key]]\nname = {name:?}\nalgorithm = \"EdDSA\"\nfile = {file:?}");
    Ok(())
}

fn sign(path: &Path, kid: Option<String>, claims: &Value) -> Outcome<String> {
    let pem = read_private(path)?;
    let pem = pem.as_bytes();
    let kinds = [
        (Algorithm::EdDSA, EncodingKey::from_ed_pem(pem)),
        (Algorithm::ES256, EncodingKey::from_ec_pem(pem)),
        (Algorithm::RS256, EncodingKey::from_rsa_pem(pem)),
    ];
    for (algorithm, key) in kinds {
        let Ok(key) = key else { continue };
        let mut header = Header::new(algorithm);
        header.kid.clone_from(&kid);
        // A key of another kind may have been read; then it cannot sign.
        if let Ok(token) = jsonwebtoken::encode(&header, claims, &key) {
            return Ok(token);
        }
    }
    Err(Failure::new(
        Kind::Config,
        format!(
            "{} is no private key in PEM: Ed25519, P-256 or RSA; 'rvpn token key --out FILE' makes one",
            path.display()
        ),
    ))
}

fn read(file: &Path) -> Outcome<String> {
    let text = match file.as_os_str() == "-" {
        true => {
            let mut text = String::new();
            let read = std::io::stdin().take(1 << 20).read_to_string(&mut text);
            read.while_doing("read standard input")?;
            text
        }
        false => read_private(file)?,
    };
    Ok(text.trim().to_owned())
}

/// Header and claims. The signature is the gateway's business.
fn parts(token: &str) -> Outcome<[Value; 2]> {
    let wrong = || Failure::usage("this is no token: three parts of base64url with dots between");
    let mut pieces = token.split('.');
    let mut next =
        || -> Option<Value> { serde_json::from_slice(&from_base64(pieces.next()?)?).ok() };
    let both = [next().ok_or_else(wrong)?, next().ok_or_else(wrong)?];
    match both.iter().all(Value::is_object) {
        true => Ok(both),
        false => Err(wrong()),
    }
}

fn inspect([header, claims]: &[Value; 2], json: bool) {
    if json {
        print(&json!({"header": header, "claims": claims}));
        return;
    }
    println!("algorithm  {}", text(header, "alg"));
    println!("key        {}", text(header, "kid"));
    println!("account    {}", text(claims, "sub"));
    println!("jti        {}", text(claims, "jti"));
    for (name, key) in [("issuer", "iss"), ("audience", "aud")] {
        if !claims[key].is_null() {
            println!("{name:<9}  {}", text(claims, key));
        }
    }
    for (name, key) in [("issued", "iat"), ("not before", "nbf")] {
        if !claims[key].is_null() {
            println!("{name:<10} {}", when(claims, key));
        }
    }
    match claims["exp"].as_u64() {
        Some(exp) if exp > now() => {
            println!("expires    {} (in {})", moment(exp), span(exp - now()));
        }
        Some(exp) => println!("expires    {} (it has)", moment(exp)),
        None => println!("expires    - (good for older clients' paths only)"),
    }
    println!("The signature was not checked: only the gateway has the public key.");
}

fn jti_of(file: &Path) -> Outcome<String> {
    let [_, claims] = parts(&read(file)?)?;
    let jti = claims["jti"].as_str().map(str::to_owned);
    jti.ok_or_else(|| Failure::usage("the token has no jti: revoke its account, --account NAME"))
}

async fn revoke(admin: &Admin, scope: &str, value: &str, reason: &str, undo: bool) -> Outcome {
    if undo {
        let path = format!("/api/v1/revocations/{scope}/{}", segment(value));
        api(admin, Method::DELETE, &path, None).await?;
        println!("{scope} {value} may log in again");
        return Ok(());
    }
    let body = json!({"scope": scope, "value": value, "reason": reason});
    let done = api(admin, Method::POST, "/api/v1/revocations", Some(&body)).await?;
    match admin.json {
        true => print(&done),
        false => println!(
            "revoked {scope} {value}; {} session(s) ended",
            text(&done, "ended")
        ),
    }
    Ok(())
}

async fn revoked(admin: &Admin) -> Outcome {
    let found = api(admin, Method::GET, "/api/v1/revocations", None).await?;
    if admin.json {
        print(&found);
        return Ok(());
    }
    let head = ["SCOPE", "VALUE", "SINCE", "UNTIL", "REASON"].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    for one in found["revocations"].as_array().into_iter().flatten() {
        rows.push(vec![
            text(one, "scope"),
            text(one, "value"),
            when(one, "created"),
            when(one, "until"),
            text(one, "reason"),
        ]);
    }
    print!("{}", table(&rows));
    Ok(())
}
