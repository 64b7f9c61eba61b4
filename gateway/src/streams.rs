//! `rvpn.streams.1`: clients that serve.
//!
//! A client logs in as for packets, says hello and what it would like to
//! serve. It needs no lease and no device. From then on it is a
//! [`crate::serve::Carrier`]: each of its visitors is a stream of its own over
//! its one connection.

mod carrier;
mod desk;
mod drive;
mod names;
mod stream;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rvpn_proto::control::{self, KEEPALIVE, KEEPALIVE_MAX, Stage, close};
use rvpn_proto::streams::mux::{Limits, Mux, Side};
use rvpn_proto::streams::{
    Capacity, Hello, MAX_RECEIVED, Message as Control, OFFERS, STREAMS, VERSIONS, Welcome,
};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message;
use tracing::{Instrument as _, debug, info, info_span, warn};

use self::carrier::Client;
use self::desk::{Desk, encode, goodbye};
use self::drive::Drive;
use crate::admit::{Admission, Via};
use crate::cores::Seat;
use crate::meter::flush::now_ms;
use crate::serve::table::Server;
use crate::session::Shared;
use crate::session::begin::monotonic;
use crate::session::carriage::End;
use crate::session::hub::{Card, orders};
use crate::session::transport::{Incoming, Socket};
use crate::ticket::random;

pub use self::stream::Stream;

/// What the session list and the meter call it.
pub const SERVICE: &str = "streams";
/// How long a client may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// How long the farewell may take; the client may not be reading any more.
const FAREWELL: Duration = Duration::from_secs(2);
/// Notices to one session that may wait; more say nothing new.
const NOTICES: usize = 4;

/// Reads the hello and serves on the connection until it ends.
pub(crate) async fn greet(
    shared: Arc<Shared>,
    admission: Admission,
    via: Arc<Via>,
    mut socket: Socket,
    seat: Seat,
) {
    let span = info_span!("session", account = %admission.account, peer = %admission.peer);
    async {
        let hello = match timeout(HELLO, read_hello(&mut socket)).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(None)) => return,
            Ok(Err(Some((code, reason)))) => return part(socket, code, reason, None).await,
            Err(_) => return part(socket, close::POLICY, "no hello in time", None).await,
        };
        if control::negotiate(&hello.versions).is_none() {
            let reason = "no protocol version in common";
            return part(socket, close::PROTOCOL, reason, None).await;
        }
        settle(&shared, admission, via, socket, seat, hello).await;
    }
    .instrument(span)
    .await;
}

/// The hello, or the close code and reason for what came instead of it; none
/// if nobody is there to read them.
async fn read_hello(socket: &mut Socket) -> Result<Hello, Option<(u16, &'static str)>> {
    loop {
        match socket.next().await {
            Ok(Incoming::Text(text)) => {
                return match Control::parse(&text, Stage::BeforeLogin) {
                    Ok(Control::Hello(hello)) => Ok(hello),
                    Ok(_) => Err(Some((close::POLICY, "the first message must be a hello"))),
                    Err(error) => {
                        debug!(%error, "not a hello");
                        Err(Some((close::POLICY, "malformed hello")))
                    }
                };
            }
            Ok(Incoming::Data(_)) => return Err(Some((close::POLICY, "data before the hello"))),
            Ok(Incoming::Control) => {}
            Ok(Incoming::Close { .. }) => return Err(None),
            Err(broken) => {
                return Err(broken.code().map(|code| (code, "WebSocket protocol error")));
            }
        }
    }
}

/// Says why, and closes.
async fn part(mut socket: Socket, code: u16, reason: &'static str, retry_after: Option<Duration>) {
    let parting = async {
        if let Some(message) = goodbye(code, reason, retry_after) {
            drop(socket.send(message).await);
        }
        socket.close(code, reason).await;
    };
    // Running out only means that the client did not listen.
    drop(timeout(FAREWELL, parting).await);
}

async fn settle(
    shared: &Arc<Shared>,
    admission: Admission,
    via: Arc<Via>,
    mut socket: Socket,
    seat: Seat,
    hello: Hello,
) {
    if shared.hub.is_closed() {
        let wait = Some(shared.retry_after());
        return part(socket, close::RESTART, "the gateway is shutting down", wait).await;
    }
    let opened = random::<16>().map(u128::from_le_bytes).and_then(|id| {
        let row = shared.meter.open(id, &admission.account, SERVICE, now_ms());
        Ok((id, row.map_err(std::io::Error::other)?))
    });
    let (id, row) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            warn!(%error, "cannot begin a session");
            let wait = Some(shared.retry_after());
            let reason = "the gateway is out of resources";
            return part(socket, close::POOL_FULL, reason, wait).await;
        }
    };
    let keepalive = hello
        .keepalive_s
        .map_or(KEEPALIVE, |s| Duration::from_secs(s.into()))
        .clamp(Duration::from_secs(1), KEEPALIVE_MAX);
    let (order_tx, order_rx) = orders();
    let (notice_tx, notice_rx) = mpsc::channel(NOTICES);
    let mux = Mux::new(Side::Gateway, Limits::default());
    let client = Arc::new(Client::new(
        mux.clone(),
        seat.core(),
        order_tx.clone(),
        notice_tx,
    ));
    let card = Card {
        id,
        account: Arc::clone(&admission.account),
        token_id: admission.token_id,
        subject: Arc::clone(&admission.subject),
        service: SERVICE,
        peer: admission.peer,
        started: SystemTime::now(),
        addresses: Vec::new(),
        slot: None,
        core: seat.core(),
        gauge: Arc::default(),
    };
    let entry = shared.hub.enter(card, order_tx);
    let server = Server {
        account: Arc::clone(&admission.account),
        instance: hello.instance.as_str().into(),
        rights: Arc::clone(&admission.rights),
        peer: admission.peer,
        carrier: Arc::clone(&client) as Arc<dyn crate::serve::Carrier>,
    };
    let place = shared.table.join(server.clone());
    info!("client came to serve");

    let outside = outside(&admission);
    let welcome = welcome(id, keepalive, &admission);
    let (answers, answer_rx) = mpsc::channel(OFFERS);
    let desk = Desk::new(place, client, &server, via, shared.control.clone(), answers);
    let mut drive = Drive::new(
        &mut socket,
        mux.clone(),
        desk,
        row,
        order_rx,
        notice_rx,
        answer_rx,
        outside,
        control::patience(keepalive),
    );
    let end = match welcome {
        Some(message) => drive.run(message, seat.load()).await,
        None => End::Lost("no welcome"),
    };
    // Nobody is sent here any more before the streams end.
    let row = drive.stop();
    mux.end();
    drop(entry);
    let (totals, row) = row;
    row.close(&totals, now_ms());
    let (code, reason, retry_after) = match end {
        End::Lost(why) => {
            info!(why, "client lost");
            return;
        }
        End::Goodbye => {
            info!("client left");
            (close::NORMAL, "goodbye", None)
        }
        End::Misbehaved { code, reason } => {
            info!(code, reason, "client sent away");
            (code, reason, None)
        }
        End::Told {
            code,
            reason,
            retry_after,
        } => {
            info!(code, reason, "client told to go");
            (code, reason, retry_after)
        }
        // Without a lease there is nothing to hand over or to lose.
        End::Replaced(_) | End::DeviceLost => (close::NORMAL, "continued elsewhere", None),
    };
    part(socket, code, reason, retry_after).await;
}

fn welcome(id: u128, keepalive: Duration, admission: &Admission) -> Option<Message> {
    let rights = &admission.rights;
    encode(&Control::Welcome(Welcome {
        version: VERSIONS[0],
        name: concat!("rvpn-gateway/", env!("CARGO_PKG_VERSION")).to_owned(),
        session: format!("{id:032x}"),
        keepalive_s: u16::try_from(keepalive.as_secs()).unwrap_or(u16::MAX),
        limits: Capacity {
            streams: STREAMS as u32,
            offers: OFFERS as u32,
            max_message: MAX_RECEIVED as u32,
            max_control: Stage::Session.limit() as u32,
        },
        names: names::told(&rights.names),
        ports: rights.ports.iter().copied().take(names::TOLD).collect(),
    }))
}

/// Resolves when something outside ends the session.
fn outside(admission: &Admission) -> Pin<Box<dyn Future<Output = End> + Send>> {
    let mut revoked = admission.revoked.clone();
    let expiry = admission.expires_at.map(monotonic);
    let told = |reason| End::Told {
        code: close::POLICY,
        reason,
        retry_after: None,
    };
    Box::pin(async move {
        let expired = async {
            match expiry {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let taken_back = async {
            if revoked.wait_for(|r| *r).await.map(drop).is_err() {
                // Nobody is left who could revoke it.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = taken_back => told("access was revoked"),
            () = expired => told("the token has expired"),
        }
    })
}
