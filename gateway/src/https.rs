//! Asking others by HTTPS: authorities that issue certificates, and issuers of
//! tokens for their keys.
//!
//! One connection for each question, no redirects, and whom to believe is
//! always said by the configuration.

use std::path::Path;
use std::sync::Arc;

use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Bytes};
use hyper::header::{HOST, HeaderValue};
use hyper::http::uri::{PathAndQuery, Scheme};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    /// The authorities cannot be read.
    #[error("cannot read {0}: {1}")]
    Roots(String, String),
    /// What is asked is no https address.
    #[error("{0} is not an https:// address")]
    Address(String),
    /// No connection, or not with whom it should be.
    #[error("cannot connect to {0}: {1}")]
    Connect(String, std::io::Error),
    /// The conversation broke off.
    #[error("{0} broke off: {1}")]
    Talk(String, String),
}

/// A way to ask.
#[derive(Clone)]
pub struct Https {
    tls: TlsConnector,
}

impl Https {
    /// One that believes the authorities in this file.
    pub fn new(ca_file: &Path) -> Result<Https, HttpsError> {
        let wrong = |why: &dyn std::fmt::Display| {
            HttpsError::Roots(ca_file.display().to_string(), why.to_string())
        };
        let mut roots = RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(ca_file).map_err(|e| wrong(&e))?;
        roots.add_parsable_certificates(certificates.filter_map(Result::ok));
        if roots.is_empty() {
            return Err(wrong(&"it has no certificate"));
        }
        let mut tls = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Https {
            tls: TlsConnector::from(Arc::new(tls)),
        })
    }

    /// Asks, and reads an answer of at most `limit` bytes. The caller sets a deadline.
    pub async fn ask<B>(
        &self,
        mut request: Request<B>,
        limit: usize,
    ) -> Result<Response<Bytes>, HttpsError>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: std::error::Error + Send + Sync,
    {
        let uri = request.uri().clone();
        let wrong = || HttpsError::Address(uri.to_string());
        let authority = uri.authority().ok_or_else(wrong)?.clone();
        if uri.scheme() != Some(&Scheme::HTTPS) {
            return Err(wrong());
        }
        let bare = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned()).map_err(|_| wrong())?;
        let whom = authority.to_string();
        let connect = async {
            let port = authority.port_u16().unwrap_or(443);
            let tcp = TcpStream::connect((bare, port)).await?;
            tcp.set_nodelay(true)?;
            self.tls.connect(name, tcp).await
        };
        let tls = connect
            .await
            .map_err(|e| HttpsError::Connect(whom.clone(), e))?;
        let broken = |e: &dyn std::fmt::Display| HttpsError::Talk(whom.clone(), e.to_string());
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| wrong())?;
        request.headers_mut().insert(HOST, host);
        let root = PathAndQuery::from_static("/");
        *request.uri_mut() = Uri::from(uri.path_and_query().cloned().unwrap_or(root));
        let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
            .await
            .map_err(|e| broken(&e))?;
        let answer = async {
            let (head, body) = send
                .send_request(request)
                .await
                .map_err(|e| broken(&e))?
                .into_parts();
            let body = Limited::new(body, limit).collect().await;
            let body = body.map_err(|e| broken(&e))?.to_bytes();
            Ok(Response::from_parts(head, body))
        };
        tokio::pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            ended = connection => match ended {
                // All of the answer may be there before the end is.
                Ok(()) => answer.await,
                Err(e) => Err(broken(&e)),
            },
        }
    }
}
