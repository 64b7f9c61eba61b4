//! Looking for the answer to a challenge where the name leads.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::issue::public_key_info;

/// How long somebody may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the answer was not there: kind of the problem, and words.
pub(super) type Missing = (&'static str, String);

fn connection(error: &dyn std::fmt::Display) -> Missing {
    ("connection", error.to_string())
}

fn wrong(text: &str) -> Missing {
    ("unauthorized", text.to_owned())
}

/// RFC 8737.
pub(super) async fn by_tls(port: u16, name: &str, authorization: &str) -> Result<(), Missing> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| connection(&e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
    let server = ServerName::try_from(name.to_owned()).map_err(|e| connection(&e))?;
    let handshake = async {
        let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        TlsConnector::from(Arc::new(config))
            .connect(server, tcp)
            .await
    };
    let tls = timeout(PATIENCE, handshake)
        .await
        .map_err(|e| connection(&e))?
        .map_err(|e| connection(&e))?;
    let (_, state) = tls.get_ref();
    if state.alpn_protocol() != Some(b"acme-tls/1") {
        return Err(wrong("it does not speak acme-tls/1"));
    }
    let Some([certificate]) = state.peer_certificates() else {
        return Err(wrong("not exactly one certificate"));
    };
    // The extension 1.3.6.1.5.5.7.1.31, critical, an octet string in one.
    let mut extension = vec![
        0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x01, 0x1f, 0x01, 0x01, 0xff, 0x04, 0x22,
        0x04, 0x20,
    ];
    extension.extend(digest(&SHA256, authorization.as_bytes()).as_ref());
    let mut names = vec![0x06, 0x03, 0x55, 0x1d, 0x11, 0x04];
    let len = u8::try_from(name.len()).map_err(|e| connection(&e))?;
    names.extend([len + 4, 0x30, len + 2, 0x82, len]);
    names.extend(name.as_bytes());
    let holds = |part: &[u8]| certificate.windows(part.len()).any(|w| w == part);
    match holds(&extension) && holds(&names) {
        true => Ok(()),
        false => Err(wrong("the certificate does not prove the key")),
    }
}

/// RFC 8555, section 8.3.
pub(super) async fn by_http(
    port: u16,
    name: &str,
    token: &str,
    authorization: &str,
) -> Result<(), Missing> {
    let talk = async {
        let mut tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        let request = format!(
            "GET /.well-known/acme-challenge/{token} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n"
        );
        tcp.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        tcp.take(1 << 16).read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let answer = timeout(PATIENCE, talk)
        .await
        .map_err(|e| connection(&e))?
        .map_err(|e| connection(&e))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    match head.starts_with("HTTP/1.1 200") && body.trim_end() == authorization {
        true => Ok(()),
        false => Err(wrong("another answer is there")),
    }
}

/// Nobody vouches for the certificate of a challenge.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 was agreed on".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // As a whole nobody accepts it: it has a critical extension.
        let key = public_key_info(certificate).ok_or(CertificateError::BadEncoding)?;
        let key = SubjectPublicKeyInfoDer::from(key);
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature_with_raw_key(message, &key, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
