//! From an accepted socket to whoever it is for.
//!
//! One port speaks everything. What a connection is stands in its first bytes,
//! which are read once, kept and handed on (`look`); where it goes is decided
//! from them, the configuration and the table of who serves what, and from
//! nothing else (`decide`); then it is brought there (`go`).
//!
//! Nobody here is known yet, so everything has a deadline and a share: the
//! number of strangers, those of one place, TLS handshakes, and the time for
//! each step.

pub mod decide;
mod go;
pub mod listeners;
mod look;
pub mod named;
pub(crate) mod ports;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

pub(crate) use self::go::not_taken;
use self::listeners::{Door, Purpose};
use crate::admit::Counted;
use crate::config::{Listener, Network};
use crate::http::{Front, Visitor};
use crate::limits::{PendingPass, Place};
use crate::proxy;

fn any_contains(networks: &[Network], peer: SocketAddr) -> bool {
    networks.iter().any(|n| n.contains(peer.ip()))
}

/// Takes a connection that has just been accepted.
pub(crate) async fn receive(front: Arc<Front>, door: Arc<Door>, tcp: TcpStream, peer: SocketAddr) {
    let settings = door.settings();
    let limits = front.config().limits;
    let by_proxy = any_contains(&settings.proxy_from, peer);
    let believed = any_contains(&settings.forwarded_from, peer);
    let each = match by_proxy || believed {
        true => limits.pending,
        false => limits.pending_per_address,
    };
    let place = Place::of(peer.ip());
    let Some(pass) = front.pending.enter(place, limits.pending, each) else {
        return;
    };
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(%error, "cannot set an option of a connection");
        return;
    }
    let mut counted = Counted::new(tcp);
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let (peer, pass) = match by_proxy {
        true => match behind(&front, &mut counted, peer, pass).await {
            Some(found) => found,
            None => return,
        },
        false => (peer, pass),
    };
    let visitor = Visitor {
        peer,
        believed,
        listener: door.number(),
        port: door.port(),
        asked: None,
    };
    match door.purpose() {
        Purpose::Front => bring(front, &settings, counted, visitor, pass).await,
        Purpose::Taken(taker) => taker.take(front, counted, visitor, pass).await,
    }
}

/// On whose behalf a proxy connects. Everybody behind it has a share of their own.
async fn behind(
    front: &Front,
    counted: &mut Counted,
    peer: SocketAddr,
    pass: PendingPass,
) -> Option<(SocketAddr, PendingPass)> {
    let limits = front.config().limits;
    let deadline = Instant::now() + limits.login_time;
    match timeout_at(deadline, proxy::read(counted)).await {
        Ok(Ok(None)) => Some((peer, pass)),
        Ok(Ok(Some(source))) => {
            drop(pass);
            let place = Place::of(source.ip());
            let each = limits.pending_per_address;
            let entered = front.pending.enter(place, limits.pending, each)?;
            Some((source, entered))
        }
        Ok(Err(error)) => {
            debug!(%error, "a proxy's connection");
            None
        }
        Err(_) => {
            debug!("a proxy sent no header in time");
            None
        }
    }
}

/// Looks, decides and goes.
async fn bring(
    front: Arc<Front>,
    settings: &Listener,
    mut counted: Counted,
    visitor: Visitor,
    pass: PendingPass,
) {
    let config = front.config();
    let limit = config.limits.login_time;
    let silence = config.front.silent.is_some().then_some(look::SILENCE);
    let deadline = Instant::now() + limit;
    let looked = look::look(&mut counted, settings.mode, silence);
    let seen = match timeout_at(deadline, looked).await {
        Ok(Ok(seen)) => seen,
        Ok(Err(error)) => return debug!(%error, peer = %visitor.peer.ip(), "gone before it spoke"),
        Err(_) => return debug!(peer = %visitor.peer.ip(), "did not say in time what it is"),
    };
    if let look::What::Tls(hello) = &seen.what
        && let Some(name) = &hello.name
    {
        front.table.arrived(name).await;
    }
    let way = decide::decide(&seen.what, settings.mode, &config, &visitor, &front);
    let raw = seen.replayed(counted);
    go::go(front, raw, visitor, way, pass).await;
}
