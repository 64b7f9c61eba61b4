//! TLS connections that carry bytes as fast as they can, from visitors to a server.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::Scope;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rvpn_lab::Ns;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const CHUNK: usize = 128 * 1024;
/// For a connection to be there at the server.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which way the bytes go, as the visitor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    Up,
    Down,
}

impl Way {
    pub(crate) const BOTH: [Way; 2] = [Way::Up, Way::Down];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Up => "up",
            Way::Down => "down",
        }
    }
}

/// How long it runs before it counts, and how long it counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) warm: Duration,
    pub(crate) count: Duration,
}

/// The server's certificate and those who trust it.
pub(crate) struct Tls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Tls {
    pub(crate) fn new(name: &'static str) -> Result<Tls, Box<dyn std::error::Error>> {
        let made = rcgen::generate_simple_self_signed([name.to_owned()])?;
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
            name: ServerName::try_from(name)?,
        })
    }
}

/// What all threads of one measurement know.
#[derive(Default)]
struct Shared {
    moved: AtomicU64,
    stop: AtomicBool,
}

/// Opens so many connections and returns what they carried together, in Gbit/s.
pub(crate) fn run(
    visitor: &Ns,
    to: SocketAddr,
    server: &TcpListener,
    visitors: usize,
    way: Way,
    span: Span,
    tls: &Tls,
) -> io::Result<f64> {
    server.set_nonblocking(true)?;
    // What an earlier measurement left behind is not this one's.
    while server.accept().is_ok() {}
    let shared = Shared::default();
    std::thread::scope(|scope| {
        let shared = &shared;
        let mut sockets = Vec::new();
        let measured = measure(
            scope,
            visitor,
            to,
            server,
            visitors,
            way,
            span,
            tls,
            shared,
            &mut sockets,
        );
        shared.stop.store(true, Relaxed);
        for socket in sockets {
            // One that is gone already has nothing to end.
            let _ = socket.shutdown(Shutdown::Both);
        }
        measured
    })
}

#[expect(
    clippy::too_many_arguments,
    reason = "one call, split for its clean-up"
)]
fn measure<'s>(
    scope: &'s Scope<'s, '_>,
    visitor: &Ns,
    to: SocketAddr,
    server: &TcpListener,
    visitors: usize,
    way: Way,
    span: Span,
    tls: &'s Tls,
    shared: &'s Shared,
    sockets: &mut Vec<TcpStream>,
) -> io::Result<f64> {
    for _ in 0..visitors {
        let near = visitor.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        near.set_nodelay(true)?;
        sockets.push(near.try_clone()?);
        // A tunnel may want to see the visitor's first bytes before it goes on.
        let name = tls.name.clone();
        start(scope, async move {
            let stream = tls.connector.connect(name, ready(near)?).await?;
            carry(stream, way == Way::Up, shared).await
        })?;
        let begun = Instant::now();
        let far = loop {
            match server.accept() {
                Ok((far, _)) => break far,
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                Err(e) if begun.elapsed() > PATIENCE => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        far.set_nodelay(true)?;
        sockets.push(far.try_clone()?);
        start(scope, async move {
            let stream = tls.acceptor.accept(ready(far)?).await?;
            carry(stream, way == Way::Down, shared).await
        })?;
    }
    std::thread::sleep(span.warm);
    let (begun, before) = (Instant::now(), shared.moved.load(Relaxed));
    std::thread::sleep(span.count);
    let (seconds, after) = (begun.elapsed().as_secs_f64(), shared.moved.load(Relaxed));
    Ok((after - before) as f64 * 8e-9 / seconds)
}

fn start<'s>(
    scope: &'s Scope<'s, '_>,
    work: impl Future<Output = io::Result<()>> + Send + 's,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    scope.spawn(move || {
        // It ends by its socket being shut down: an error is what is expected.
        let _ = runtime.block_on(work);
    });
    Ok(())
}

fn ready(socket: TcpStream) -> io::Result<tokio::net::TcpStream> {
    socket.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(socket)
}

async fn carry(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    sends: bool,
    shared: &Shared,
) -> io::Result<()> {
    let mut chunk = vec![0x5a; CHUNK];
    while !shared.stop.load(Relaxed) {
        if sends {
            stream.write_all(&chunk).await?;
        } else {
            let n = stream.read(&mut chunk).await?;
            if n == 0 {
                break;
            }
            shared.moved.fetch_add(n as u64, Relaxed);
        }
    }
    Ok(())
}
