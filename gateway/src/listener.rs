//! From an accepted socket to a connection that speaks HTTP.
//!
//! Nobody here is known yet, so everything has a deadline and a share: the
//! number of strangers, those of one place, TLS handshakes, and the time for
//! each step.

pub mod inherited;

use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nix::sys::socket::{Backlog, listen};
use rustls::server::Acceptor;
use rvpn_proto::name::Name;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::LazyConfigAcceptor;
use tracing::{debug, warn};

use crate::admit::{Counted, Io, Prefixed};
use crate::config::{Listener, Mode, Network};
use crate::http::{self, Front, Visitor};
use crate::limits::Place;
use crate::proxy;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// How long to leave the kernel alone when it has no descriptor or memory left.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// What is read to see what a connection is.
const FIRST_BYTES: usize = 1024;

/// What a connection turned out to be by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// A TLS record with a handshake in it.
    Tls,
    /// The beginning of an HTTP request.
    Http,
    /// Something that nobody here speaks.
    Other,
}

/// Tells what the bytes begin; `None` if there are too few.
pub fn classify(bytes: &[u8]) -> Option<First> {
    match bytes {
        [] => None,
        [0x16] => None,
        [0x16, 0x03, ..] => Some(First::Tls),
        [first, ..] if first.is_ascii_uppercase() => Some(First::Http),
        _ => Some(First::Other),
    }
}

/// Binds a public listener.
pub fn bind(address: SocketAddr) -> io::Result<StdListener> {
    let socket = StdListener::bind(address)?;
    adopt(&socket)?;
    Ok(socket)
}

/// Prepares a listener that was bound by us or inherited.
pub fn adopt(socket: &StdListener) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    // The standard library's backlog is short for clients that all come back at once.
    listen(&socket.as_fd(), Backlog::new(BACKLOG)?)?;
    Ok(())
}

/// Accepts until told to stop.
pub async fn run(
    front: Arc<Front>,
    number: usize,
    socket: TcpListener,
    mut stop: watch::Receiver<bool>,
) {
    let mut complained: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            // An error means that the sender is gone, which is a stop as well.
            _ = stop.wait_for(|s| *s) => return,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                let front = Arc::clone(&front);
                tokio::spawn(async move { receive(front, number, tcp, peer).await });
            }
            Err(error) if is_exhaustion(&error) => {
                // The connection stays in the queue, so trying again at once would spin.
                if complained.is_none_or(|at| at.elapsed() > Duration::from_secs(10)) {
                    warn!(%error, "cannot accept connections; raise LimitNOFILE or lower limits.pending");
                    complained = Some(Instant::now());
                }
                sleep(EXHAUSTED).await;
            }
            // That one connection had gone again.
            Err(error) => debug!(%error, "accept"),
        }
    }
}

fn is_exhaustion(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

fn any_contains(networks: &[Network], peer: SocketAddr) -> bool {
    networks.iter().any(|n| n.contains(peer.ip()))
}

async fn receive(front: Arc<Front>, number: usize, tcp: TcpStream, peer: SocketAddr) {
    let config = front.config();
    let Some(listener) = config.listeners.get(number) else {
        return;
    };
    let limits = &config.limits;
    let by_proxy = any_contains(&listener.proxy_from, peer);
    let believed = any_contains(&listener.forwarded_from, peer);
    let each = match by_proxy || believed {
        true => limits.pending,
        false => limits.pending_per_address,
    };
    let place = Place::of(peer.ip());
    let Some(mut pass) = front.pending.enter(place, limits.pending, each) else {
        return;
    };
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(%error, "cannot set an option of a connection");
        return;
    }
    let mut counted = Counted::new(tcp);
    let mut peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    if by_proxy {
        let deadline = Instant::now() + limits.login_time;
        match timeout_at(deadline, proxy::read(&mut counted)).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(source))) => {
                peer = source;
                let place = Place::of(peer.ip());
                // Everybody behind the proxy has a share of their own.
                drop(pass);
                let entered =
                    front
                        .pending
                        .enter(place, limits.pending, limits.pending_per_address);
                let Some(entered) = entered else {
                    return;
                };
                pass = entered;
            }
            Ok(Err(error)) => return debug!(%error, "a proxy's connection"),
            Err(_) => return debug!("a proxy sent no header in time"),
        }
    }
    let visitor = Visitor {
        peer,
        believed,
        listener: number,
    };
    match dress(&front, listener, counted, limits.login_time).await {
        Ok(io) => http::serve(front, io, visitor, pass).await,
        Err(error) => debug!(%error, peer = %visitor.peer.ip(), "not let to HTTP"),
    }
}

/// Finds out what the connection speaks and undoes TLS.
async fn dress(
    front: &Front,
    listener: &Listener,
    mut counted: Counted,
    limit: Duration,
) -> io::Result<Io> {
    let mut first = Bytes::new();
    let tls = match listener.mode {
        Mode::Tls => true,
        Mode::Plain => false,
        Mode::Auto => {
            let deadline = Instant::now() + limit;
            let (bytes, what) = timeout_at(deadline, look(&mut counted)).await??;
            first = bytes;
            match what {
                First::Tls => true,
                First::Http => false,
                First::Other => return Err(io::Error::other("neither TLS nor HTTP")),
            }
        }
    };
    let raw = Prefixed::new(first, counted);
    if !tls {
        return Ok(Io::plain(raw));
    }
    let deadline = Instant::now() + limit;
    let handshake = async {
        let greeting = LazyConfigAcceptor::new(Acceptor::default(), raw).await?;
        let hello = greeting.client_hello();
        let name = hello.server_name().and_then(|n| Name::parse(n).ok());
        let checks = |p: &[u8]| p == b"acme-tls/1";
        let checked = hello.alpn().is_some_and(|mut offered| offered.any(checks));
        let server = match &name {
            Some(name) if checked => front
                .tls
                .challenged(name)
                .ok_or_else(|| io::Error::other("no challenge is under way"))?,
            name => front.tls.of(name.as_ref()),
        };
        let mut answer = pin!(greeting.into_stream(server));
        // The costly part is the first turn, in which keys are agreed on and
        // signed for. Whoever then says nothing holds no permit.
        let permit = front.handshakes.acquire().await.map_err(io::Error::other)?;
        let turn = poll_fn(|cx| Poll::Ready(answer.as_mut().poll(cx))).await;
        drop(permit);
        match turn {
            Poll::Ready(done) => done,
            Poll::Pending => answer.await,
        }
    };
    Ok(Io::tls(timeout_at(deadline, handshake).await??))
}

/// Reads as much as it takes to tell.
async fn look(counted: &mut Counted) -> io::Result<(Bytes, First)> {
    let mut bytes = BytesMut::with_capacity(FIRST_BYTES);
    loop {
        if let Some(what) = classify(&bytes) {
            return Ok((bytes.freeze(), what));
        }
        if counted.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pro_04_first_bytes_have_one_meaning() {
        let (mut tls, mut http) = (0, 0);
        for both in 0..=u16::MAX {
            let bytes = both.to_be_bytes();
            let whole = classify(&bytes).expect("two bytes are enough");
            // One byte says the same or nothing yet.
            assert!(classify(&bytes[..1]).is_none_or(|first| first == whole));
            tls += u32::from(whole == First::Tls);
            http += u32::from(whole == First::Http);
        }
        assert_eq!((tls, http), (1, 26 * 256));
        assert_eq!(classify(b""), None);
        assert_eq!(classify(b"\r\n\r\n\0\r\nQUIT\n"), Some(First::Other));
        assert_eq!(classify(b"PRI * HTTP/2.0"), Some(First::Http));
    }
}
