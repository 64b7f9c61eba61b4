//! Whom the client believes to be its gateway.
//!
//! Either one certificate, by its fingerprint, or what a known authority
//! vouches for. There is no third way.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::home::Owner;
use crate::profile::{Address, Trust};
use crate::text::{from_hex, to_hex};

/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where Debian and most others keep the authorities.
const SYSTEM: &str = "/etc/ssl/certs/ca-certificates.crt";

/// SHA-256 of a certificate, in hexadecimal.
pub(crate) fn fingerprint(certificate: &[u8]) -> String {
    to_hex(digest(&SHA256, certificate).as_ref())
}

/// Reads a fingerprint as people paste it.
pub(crate) fn pin(text: &str) -> Outcome<[u8; 32]> {
    let bytes = from_hex(text).and_then(|b| <[u8; 32]>::try_from(b).ok());
    bytes.ok_or_else(|| {
        Failure::usage(format!(
            "'{text}' is not a fingerprint: 64 hexadecimal digits, as the gateway prints it"
        ))
    })
}

/// What makes TLS connections for one gateway.
pub(crate) fn connector(trust: &Trust, authorities: Option<&str>) -> Outcome<TlsConnector> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .while_doing("set TLS up")?;
    let builder = match &trust.fingerprint {
        Some(text) => {
            let pinned = Pinned {
                sha256: pin(text)?,
                provider,
            };
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(pinned))
        }
        None => builder.with_root_certificates(roots(trust.ca_file.as_deref(), authorities)?),
    };
    let mut config = builder.with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The file of authorities that was asked for, if one was.
pub(crate) fn authorities(trust: &Trust) -> Outcome<Option<String>> {
    let Some(path) = &trust.ca_file else {
        return Ok(None);
    };
    let _owner = Owner::current()?.act()?;
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) => Err(unusable(Some(path), &error.to_string())),
    }
}

fn unusable(file: Option<&Path>, why: &str) -> Failure {
    let path = file.unwrap_or(Path::new(SYSTEM)).display();
    let remedy = match file {
        Some(_) => "name a PEM file with --ca-file",
        None => "install ca-certificates, or pin the gateway with --fingerprint",
    };
    Failure::new(Kind::Config, format!("cannot use {path}: {why}; {remedy}"))
}

fn roots(file: Option<&Path>, authorities: Option<&str>) -> Outcome<RootCertStore> {
    let text = match authorities {
        Some(text) => text.as_bytes().to_vec(),
        None => std::fs::read(SYSTEM).map_err(|e| unusable(file, &e.to_string()))?,
    };
    let found = CertificateDer::pem_slice_iter(&text);
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.filter_map(Result::ok));
    match roots.is_empty() {
        true => Err(unusable(file, "it has no certificate")),
        false => Ok(roots),
    }
}

/// Makes TLS out of a connection.
pub(crate) async fn handshake<S>(
    connector: &TlsConnector,
    to: &Address,
    io: S,
) -> Outcome<TlsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from(to.host.clone())
        .map_err(|_| Failure::usage(format!("'{}' cannot be a server's name", to.host)))?;
    match timeout(PATIENCE, connector.connect(name, io)).await {
        Ok(done) => done.map_err(|error| explain(to, &error)),
        Err(_) => Err(Failure::unavailable(format!(
            "{to} does not finish the TLS handshake in {PATIENCE:?}: is it an RVPN gateway?"
        ))),
    }
}

/// What went wrong, and what to do about it.
fn explain(to: &Address, error: &std::io::Error) -> Failure {
    let tls = error.get_ref().and_then(|e| e.downcast_ref::<Error>());
    let text = match tls {
        None => {
            return Failure::unavailable(format!("{to} ended the TLS handshake: {error}"));
        }
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => format!(
            "the certificate of {to} is signed by nobody known: if the gateway made it itself, \
             pin it (--fingerprint, or join by an invite); otherwise somebody is in between"
        ),
        Some(Error::InvalidCertificate(CertificateError::Expired)) => format!(
            "the certificate of {to} has expired: its operator must renew it, or this clock is wrong"
        ),
        Some(Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => format!("the certificate of {to} is for another name: use the name it was made for"),
        Some(Error::InvalidCertificate(CertificateError::Other(other))) => {
            format!("the certificate of {to} is refused: {other}")
        }
        Some(other) => format!("no TLS with {to}: {other}"),
    };
    Failure::new(Kind::Protocol, text)
}

/// Believes one certificate, whatever it says.
#[derive(Debug)]
struct Pinned {
    sha256: [u8; 32],
    provider: Arc<CryptoProvider>,
}

/// It was another one.
#[derive(Debug)]
struct NotPinned(String);

impl fmt::Display for NotPinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "it is not the pinned one but {}. If its operator made a new one, join again; \
             otherwise somebody is in between",
            self.0
        )
    }
}

impl std::error::Error for NotPinned {}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if digest(&SHA256, end_entity).as_ref() == self.sha256 {
            return Ok(ServerCertVerified::assertion());
        }
        let other = rustls::OtherError(Arc::new(NotPinned(fingerprint(end_entity))));
        Err(CertificateError::Other(other).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
