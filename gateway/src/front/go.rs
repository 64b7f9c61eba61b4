//! Bringing a connection where it was decided that it goes.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use rustls::ServerConfig;
use rvpn_proto::sniff::alert::Alert;
use rvpn_proto::sniff::{Class, classify};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::decide::{Certificate, Refusal, Way};
use crate::admit::{Io, Raw};
use crate::http::{self, Front, Visitor};
use crate::limits::PendingPass;
use crate::serve::{Duplex, Service, Visit, visit};

/// How long the farewell to somebody who is refused may take.
const PARTING: Duration = Duration::from_secs(1);
/// What is still read of somebody who is refused, so that the farewell arrives
/// before the reset that unread bytes cause.
const PARTING_BYTES: u64 = 64 * 1024;
/// What is read at first of what TLS had in it.
const INSIDE: usize = 256;
/// No settings, and a farewell that says to use HTTP/1.1 (RFC 9113, 7).
const GOAWAY: &[u8] = b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0d";

const MISDIRECTED: &[u8] =
    b"HTTP/1.1 421 Misdirected Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// As an ancestor said it.
const UNKNOWN: &[u8] =
    b"{\"error\":{\"message\":\"this protocol is not known here\",\"code\":\"E_INVALID_PROTOCOL\"}}\n";

/// Carries it out.
pub(super) async fn go(front: Arc<Front>, raw: Raw, visitor: Visitor, way: Way, pass: PendingPass) {
    match way {
        Way::Http => http::serve(front, Io::plain(raw), visitor, pass).await,
        Way::Here(certificate) => here(front, raw, visitor, certificate, pass).await,
        Way::Through(visit) => visit::pass(front, Io::plain(raw), visit, pass).await,
        Way::Refused(refusal) => refuse(raw, refusal).await,
    }
}

/// Says why not, and closes.
pub(super) async fn refuse(raw: Raw, refusal: Refusal) {
    match refusal {
        Refusal::Alert(alert) => part(raw, &alert.record()).await,
        Refusal::NoHttp2 => part(raw, GOAWAY).await,
        Refusal::Misdirected => part(raw, MISDIRECTED).await,
        Refusal::Unknown => part(raw, UNKNOWN).await,
        Refusal::Silence => {}
    }
}

/// Ends TLS and goes on as HTTP.
async fn here(
    front: Arc<Front>,
    raw: Raw,
    mut visitor: Visitor,
    certificate: Certificate,
    pass: PendingPass,
) {
    let config = match &certificate {
        Certificate::Own(name) => Some(front.tls.of(name.as_ref())),
        Certificate::Challenge(name) => front.tls.challenged(name),
        Certificate::Served(name) => match front.tls.served(name) {
            Ok(config) => Some(config),
            Err(error) => return debug!(%error, "no certificate for a name that is served"),
        },
    };
    let Some(config) = config else { return };
    let deadline = Instant::now() + front.config().limits.login_time;
    let mut io = match timeout_at(deadline, handshake(&front, config, raw)).await {
        Ok(Ok(io)) => io,
        Ok(Err(error)) => return debug!(%error, peer = %visitor.peer.ip(), "a TLS handshake"),
        Err(_) => return debug!(peer = %visitor.peer.ip(), "a TLS handshake took too long"),
    };
    match certificate {
        // The handshake was all that the authority came for.
        Certificate::Challenge(_) => drop(timeout(PARTING, io.shutdown()).await),
        Certificate::Own(name) => {
            visitor.asked = name;
            http::serve(front, io, visitor, pass).await;
        }
        Certificate::Served(name) => {
            let limit = front.config().limits.login_time;
            let Ok(Ok(service)) = timeout(limit, inside(&mut io)).await else {
                return drop(timeout(PARTING, io.shutdown()).await);
            };
            if service == Service::Http {
                visitor.asked = Some(name);
                return http::serve(front, io, visitor, pass).await;
            }
            let visit = Visit {
                peer: visitor.peer,
                port: visitor.port,
                name: Some(name),
                service,
            };
            visit::pass(front, io, visit, pass).await;
        }
    }
}

/// What is spoken inside TLS that ended here in a client's place. Whoever says
/// nothing is a browser that will in a moment, so nobody is let speak first.
async fn inside(io: &mut Io) -> io::Result<Service> {
    let mut bytes = BytesMut::with_capacity(INSIDE);
    let service = loop {
        if io.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match classify(&bytes) {
            None => {}
            Some(Class::Http | Class::Http2) => break Service::Http,
            Some(Class::Ssh) => break Service::Ssh,
            Some(Class::Tls | Class::Ssl2 | Class::Other) => break Service::Tcp,
        }
    };
    io.unread(bytes.freeze());
    Ok(service)
}

async fn handshake(front: &Front, config: Arc<ServerConfig>, raw: Raw) -> io::Result<Io> {
    let mut answer = pin!(TlsAcceptor::from(config).accept(raw));
    // The costly part is the first turn, in which keys are agreed on and
    // signed for. Whoever then says nothing holds no permit.
    let permit = front.handshakes.acquire().await.map_err(io::Error::other)?;
    let turn = poll_fn(|cx| Poll::Ready(answer.as_mut().poll(cx))).await;
    drop(permit);
    let stream = match turn {
        Poll::Ready(done) => done?,
        Poll::Pending => answer.await?,
    };
    Ok(Io::tls(stream))
}

/// Tells a visitor of a name, in TLS, that nobody takes it.
pub(crate) async fn not_taken(io: Io) {
    part(io, &Alert::InternalError.record()).await;
}

/// Last words, and the end.
async fn part(mut raw: impl Duplex, why: &[u8]) {
    let parting = async {
        raw.write_all(why).await?;
        raw.shutdown().await?;
        let mut rest = raw.take(PARTING_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // Whether it was heard makes no difference.
    drop(timeout(PARTING, parting).await);
}
