//! Visitors on the public port, and what clients have behind them.

use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Lab, PATIENCE};

/// A device's own certificate.
pub(crate) struct Device {
    certificate: CertificateDer<'static>,
    server: Arc<ServerConfig>,
    pub(crate) pem: (String, String),
}

impl Device {
    pub(crate) fn of(name: &str) -> Device {
        let made = generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let CertifiedKey { cert, signing_key } = made;
        let pem = (cert.pem(), signing_key.serialize_pem());
        let certificate = cert.der().clone();
        let key = PrivateKeyDer::from_pem_slice(pem.1.as_bytes()).unwrap();
        let server = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        Device {
            certificate,
            server: Arc::new(server),
            pem,
        }
    }

    /// TLS as the device does it.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.server))
    }

    /// A visitor who believes nobody but this device.
    pub(crate) async fn visit<S>(&self, io: S, name: &str) -> tokio_rustls::client::TlsStream<S>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let connecting = connector.connect(name, io);
        timeout(PATIENCE, connecting).await.unwrap().unwrap()
    }
}

/// A connection to the public port.
pub(crate) async fn connect(lab: &Lab) -> TcpStream {
    let tcp = TcpStream::connect(lab.at).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

/// Sends a request and reads until the end.
pub(crate) async fn ask<S: AsyncRead + AsyncWrite + Unpin>(io: &mut S, request: &str) -> String {
    io.write_all(request.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    let reading = io.read_to_end(&mut all);
    // An end without close_notify is an end as well.
    drop(timeout(PATIENCE, reading).await.expect("an end in time"));
    String::from_utf8_lossy(&all).into_owned()
}
