//! One certificate, from the order to the signed chain.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::{Request, Response};
use instant_acme::{
    Account, AuthorizationStatus, BodyWrapper, BytesResponse, ChallengeType, Error, HttpClient,
    Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::CertifiedKey;
use rvpn_proto::name::Name;
use tokio::time::timeout;
use tracing::{debug, info};

use super::files::{self, Held, Kept};
use super::{Acme, Failure};
use crate::config;
use crate::https::Https;

/// How long one question may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the authority may take to look for a challenge, and to sign.
const WAIT: Duration = Duration::from_secs(90);
/// Largest answer that is read.
const LIMIT: usize = 256 * 1024;

/// The HTTP of the ACME library.
struct Http(Https);

impl HttpClient for Http {
    fn request(
        &self,
        request: Request<BodyWrapper<hyper::body::Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let https = self.0.clone();
        Box::pin(async move {
            let answer = timeout(PATIENCE, https.ask(request, LIMIT)).await;
            let answer = answer.map_err(|_| Error::Str("no answer in time"))?;
            let (parts, body) = answer.map_err(|e| Error::Other(Box::new(e)))?.into_parts();
            let body = http_body_util::Full::new(body);
            Ok(BytesResponse::from(Response::from_parts(parts, body)))
        })
    }
}

/// The account with the authority, made if there is none.
pub(super) async fn account(acme: &Acme, settings: &config::Acme) -> Result<Account, Failure> {
    let https = Https::new(&settings.ca_file)
        .map_err(|e| Failure::new(e.to_string(), "correct acme.ca-file"))?;
    let builder = || Account::builder_with_http(Box::new(Http(https.clone())));
    let contact: Vec<&str> = settings.contact.iter().map(String::as_str).collect();
    if let Some(mut kept) = files::account(&acme.dir, &settings.directory) {
        let known = async {
            let changed = kept.contact != settings.contact;
            let copy = serde_json::to_value(&kept.credentials)?;
            let account = builder()
                .from_credentials(serde_json::from_value(copy)?)
                .await?;
            if changed {
                account.update_contacts(&contact).await?;
                kept.contact.clone_from(&settings.contact);
                files::keep_account(&acme.dir, &kept).map_err(|e| Error::Other(Box::new(e)))?;
            }
            Ok(account)
        };
        match known.await.map_err(|e| Failure::of(&e, settings)) {
            Err(failure) if failure.lost => {}
            known => return known,
        }
    }
    let new = NewAccount {
        contact: &contact,
        terms_of_service_agreed: true,
        only_return_existing: false,
    };
    let directory = settings.directory.to_string();
    let (account, credentials) = builder()
        .create(&new, directory, None)
        .await
        .map_err(|e| Failure::of(&e, settings))?;
    let kept = Kept {
        directory: settings.directory.to_string(),
        contact: settings.contact.clone(),
        credentials,
    };
    files::keep_account(&acme.dir, &kept).map_err(|e| unwritten(&e))?;
    info!(directory = %settings.directory, "made an account with the authority");
    Ok(account)
}

fn unwritten(error: &std::io::Error) -> Failure {
    let text = format!("cannot write to the state directory: {error}");
    Failure::new(text, "make room on the disk, and check who owns it")
}

/// Gets a certificate for the name, and keeps it.
pub(super) async fn certificate(
    acme: &Acme,
    settings: &config::Acme,
    account: &Account,
    name: &Name,
) -> Result<Held, Failure> {
    let mut failed = Vec::new();
    for kind in settings.challenge.kinds() {
        match attempt(acme, settings, account, name, kind).await {
            Ok(held) => return Ok(held),
            // Only a challenge that was not met makes another kind worth a try.
            Err(failure) if failure.challenge => {
                debug!(%name, why = failure.text, "a challenge was not met");
                failed.push(failure);
            }
            Err(failure) => return Err(failure),
        }
    }
    let texts: Vec<_> = failed.iter().map(|f| f.text.as_str()).collect();
    let text = texts.join("; ");
    let last = failed.pop();
    Err(last.map_or_else(
        || Failure::new("there is no kind of challenge to use", "set acme.challenge"),
        |last| Failure { text, ..last },
    ))
}

async fn attempt(
    acme: &Acme,
    settings: &config::Acme,
    account: &Account,
    name: &Name,
    kind: config::ChallengeKind,
) -> Result<Held, Failure> {
    let of = |error: Error| Failure::of(&error, settings);
    let identifiers = [Identifier::Dns(name.as_str().to_owned())];
    let mut order = account
        .new_order(&NewOrder::new(&identifiers))
        .await
        .map_err(of)?;
    // What answers the authority's question goes with this, whatever happens.
    let mut shown = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(one) = authorizations.next().await {
        let mut one = one.map_err(of)?;
        match one.status {
            AuthorizationStatus::Pending => {}
            AuthorizationStatus::Valid => continue,
            _ => {
                return Err(Failure::challenge(
                    kind,
                    "the authorization is closed".to_owned(),
                ));
            }
        }
        let wanted = match kind {
            config::ChallengeKind::TlsAlpn01 => ChallengeType::TlsAlpn01,
            config::ChallengeKind::Http01 => ChallengeType::Http01,
        };
        let Some(mut challenge) = one.challenge(wanted) else {
            let text = "the authority does not offer it for this name".to_owned();
            return Err(Failure::challenge(kind, text));
        };
        let proof = challenge.key_authorization();
        shown.push(match kind {
            config::ChallengeKind::TlsAlpn01 => {
                let key = challenge_key(name, proof.digest().as_ref())
                    .map_err(|e| Failure::new(e, "this is a defect of the gateway"))?;
                acme.show_key(name, key)
            }
            config::ChallengeKind::Http01 => acme.show_text(name, &challenge.token, proof.as_str()),
        });
        challenge.set_ready().await.map_err(of)?;
    }
    let retries = RetryPolicy::new().timeout(WAIT);
    let status = match order.poll_ready(&retries).await {
        Ok(status) => status,
        Err(Error::Api(problem)) => return Err(Failure::unmet(kind, &problem)),
        Err(error) => return Err(of(error)),
    };
    drop(shown);
    if status != OrderStatus::Ready {
        return Err(why_invalid(&mut order, kind).await);
    }
    let key = KeyPair::generate().map_err(defect)?;
    let mut params = CertificateParams::new(vec![name.as_str().to_owned()]).map_err(defect)?;
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key).map_err(defect)?;
    order.finalize_csr(request.der()).await.map_err(of)?;
    let chain = order.poll_certificate(&retries).await.map_err(of)?;
    let pem = files::text(&settings.directory, &key.serialize_pem(), &chain);
    let held = Held::read(&pem, name).map_err(|why| {
        Failure::new(
            format!("the authority sent a certificate that cannot be used: {why}"),
            "use another acme.directory",
        )
    })?;
    files::keep(&acme.dir, name, &pem).map_err(|e| unwritten(&e))?;
    Ok(held)
}

fn defect(error: rcgen::Error) -> Failure {
    Failure::new(error.to_string(), "this is a defect of the gateway")
}

/// What the authority found when it looked for the answer.
async fn why_invalid(order: &mut Order, kind: config::ChallengeKind) -> Failure {
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut one)) = authorizations.next().await {
        let Ok(state) = one.refresh().await else {
            break;
        };
        if let Some(problem) = state.challenges.iter().find_map(|c| c.error.as_ref()) {
            return Failure::unmet(kind, problem);
        }
    }
    Failure::challenge(kind, "the authority does not say why".to_owned())
}

/// What is shown to whoever asks for the protocol `acme-tls/1` under the name.
fn challenge_key(name: &Name, digest: &[u8]) -> Result<Arc<CertifiedKey>, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let key = KeyPair::generate().map_err(|e| text(&e))?;
    let mut params =
        CertificateParams::new(vec![name.as_str().to_owned()]).map_err(|e| text(&e))?;
    params
        .custom_extensions
        .push(CustomExtension::new_acme_identifier(digest));
    let made = params.self_signed(&key).map_err(|e| text(&e))?;
    let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    // Put together by hand: the extension is critical, so that nobody else
    // accepts the certificate, rustls' own check of it included.
    let key = any_supported_type(&private).map_err(|e| text(&e))?;
    let chain = vec![made.der().clone()];
    Ok(Arc::new(CertifiedKey::new(chain, key)))
}
