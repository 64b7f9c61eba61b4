//! TLS without a tunnel: what one connection of the library in use can carry.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::Scope;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::load::CHUNK;

/// The threads of the server's ends, to tell their time from the clients'.
pub(crate) const SERVER: &str = "raw-tls-server";
const CLIENT: &str = "raw-tls-client";
const NAME: &str = "gateway";

/// Both sides' configuration: the library's defaults, as the gateway has them.
pub(crate) struct Tls {
    pub(crate) acceptor: TlsAcceptor,
    connector: TlsConnector,
}

impl Tls {
    pub(crate) fn new() -> Result<Tls, Box<dyn std::error::Error>> {
        let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
        let certificate = CertificateDer::from(made.cert.der().to_vec());
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.clone())?;
        let server = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        let client = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Tls {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
        })
    }

    /// A client's connection over a socket that is there.
    pub(crate) async fn connect(
        &self,
        socket: TcpStream,
    ) -> io::Result<tokio_rustls::client::TlsStream<tokio::net::TcpStream>> {
        let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
        self.connector.connect(name, ready(socket)?).await
    }

    /// Starts the client's end on a thread of its own.
    pub(crate) fn client<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        socket: TcpStream,
        sends: bool,
        moved: &'s AtomicU64,
        stop: &'s AtomicBool,
    ) -> io::Result<()> {
        let work = async move {
            let stream = self.connect(socket).await?;
            carry(stream, sends, moved, stop).await
        };
        start(scope, CLIENT, work)
    }

    /// The same for the server's.
    pub(crate) fn server<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        socket: TcpStream,
        sends: bool,
        moved: &'s AtomicU64,
        stop: &'s AtomicBool,
    ) -> io::Result<()> {
        let work = async move {
            let stream = self.acceptor.accept(ready(socket)?).await?;
            carry(stream, sends, moved, stop).await
        };
        start(scope, SERVER, work)
    }
}

fn start<'s>(
    scope: &'s Scope<'s, '_>,
    name: &str,
    work: impl Future<Output = io::Result<()>> + Send + 's,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn_scoped(scope, move || {
        // It ends by its socket being shut down: an error is what is expected.
        let _ = runtime.block_on(work);
    })?;
    Ok(())
}

fn ready(socket: TcpStream) -> io::Result<tokio::net::TcpStream> {
    socket.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(socket)
}

async fn carry(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    sends: bool,
    moved: &AtomicU64,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut chunk = vec![0x5a; CHUNK];
    while !stop.load(Relaxed) {
        if sends {
            stream.write_all(&chunk).await?;
        } else {
            let n = stream.read(&mut chunk).await?;
            if n == 0 {
                break;
            }
            moved.fetch_add(n as u64, Relaxed);
        }
    }
    Ok(())
}
