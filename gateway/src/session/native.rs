//! The native protocol, `rvpn.packets.1`: its greeting and its terms.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::control::{
    self, Hello, KEEPALIVE, KEEPALIVE_MAX, Limits, Message as Control, OFFLOAD, Pair, Stage,
    Ticket, Welcome,
};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tracing::debug;

use super::begin::{Arrival, Greeting, Place, Protocol};
use super::control::{Desk, encode, goodbye};
use super::drive::Patience;
use super::packets::{Packets, Terms};
use super::transport::{Incoming, LIMIT, Socket};
use super::whose::whose;
use super::{Settings, Shared};
use crate::admit::Admission;
use crate::cores::Seat;
use crate::meter::flush::now_ms;
use crate::ticket::random;

/// How long a client may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// The smallest tunnel MTU a client may ask for: IPv6 needs it.
const MIN_MTU: u16 = 1280;

/// One native client.
pub(super) struct Native {
    /// Whether it takes and gives super-packets.
    offload: bool,
    /// The tunnel MTU it would like.
    mtu: Option<u16>,
    runtime: Handle,
    settings: Arc<Settings>,
    keepalive: Duration,
}

/// Reads the hello and sends the connection on to its lease, or away.
pub(super) async fn greet(
    shared: Arc<Shared>,
    admission: Admission,
    mut socket: Socket,
    seat: Seat,
) {
    let hello = match timeout(HELLO, read_hello(&mut socket)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(None)) => return,
        Ok(Err(Some((code, reason)))) => return refuse(socket, code, reason).await,
        Err(_) => return refuse(socket, 1008, "no hello in time").await,
    };
    if control::negotiate(&hello.versions).is_none() {
        return refuse(socket, 1002, "no protocol version in common").await;
    }
    let found = whose(
        &shared.tickets,
        &shared.hub,
        &admission.account,
        &admission.token_id.to_string(),
        Some(&hello.instance),
        hello.ticket.as_deref(),
        now_ms() / 1000,
    );
    let asked = hello.keepalive_s.map(|s| Duration::from_secs(s.into()));
    let arrival = Arrival {
        socket,
        protocol: Native {
            keepalive: asked
                .unwrap_or(KEEPALIVE)
                .clamp(Duration::from_secs(1), KEEPALIVE_MAX),
            offload: hello.can(OFFLOAD),
            mtu: hello.mtu,
            runtime: shared.control.clone(),
            settings: Arc::clone(&shared.settings),
        },
        admission,
        key: found.key,
        epoch: found.epoch,
        seat,
    };
    arrival.settle(shared);
}

/// The hello, or the close code and reason for what came instead of it; none
/// if nobody is there to read them.
async fn read_hello(socket: &mut Socket) -> Result<Hello, Option<(u16, &'static str)>> {
    loop {
        match socket.next().await {
            Ok(Incoming::Text(text)) => {
                return match Control::parse(&text, Stage::BeforeLogin) {
                    Ok(Control::Hello(hello)) => Ok(hello),
                    Ok(_) => Err(Some((1008, "the first message must be a hello"))),
                    Err(error) => {
                        debug!(%error, "not a hello");
                        Err(Some((1008, "malformed hello")))
                    }
                };
            }
            Ok(Incoming::Data(_)) => return Err(Some((1008, "data before the hello"))),
            Ok(Incoming::Control) => {}
            Ok(Incoming::Close { .. }) => return Err(None),
            Err(broken) => {
                return Err(broken.code().map(|code| (code, "WebSocket protocol error")));
            }
        }
    }
}

async fn refuse(mut socket: Socket, code: u16, reason: &'static str) {
    debug!(code, reason, "client refused");
    let parting = async {
        if let Some(message) = goodbye(code, reason, None) {
            drop(socket.send(message).await);
        }
        socket.close(code, reason).await;
    };
    drop(timeout(Duration::from_secs(2), parting).await);
}

impl Protocol for Native {
    type Carriage = Packets;

    fn service(&self) -> &'static str {
        "packets"
    }

    fn patience(&self) -> Patience {
        Patience {
            silence: control::patience(self.keepalive),
            ping_every: None,
        }
    }

    fn welcome(&mut self, place: &Place) -> io::Result<(Vec<Greeting>, Packets)> {
        let (inner4, inner6) = place.inner_pair();
        let offload = self.offload && place.reply.offload != 0;
        let mtu = self
            .mtu
            .map_or(place.reply.mtu, |wish| wish.max(MIN_MTU))
            .min(place.reply.mtu);
        let ticket = place.ticket.clone().map(|ticket| Ticket {
            ticket,
            valid_s: self.settings.ticket_life.as_secs(),
        });
        let welcome = Welcome {
            version: control::VERSIONS[0],
            name: concat!("rvpn-gateway/", env!("CARGO_PKG_VERSION")).to_owned(),
            session: format!("{:032x}", place.session),
            resumed: place.resumed,
            capabilities: if offload {
                vec![OFFLOAD.to_owned()]
            } else {
                Vec::new()
            },
            v4: Pair {
                address: inner4,
                peer: inner4.to_bits().wrapping_sub(1).into(),
            },
            v6: Some(Pair {
                address: inner6,
                peer: inner6.to_bits().wrapping_sub(1).into(),
            }),
            mtu: mtu.into(),
            dns: self.settings.dns.clone(),
            routes: self.settings.routes.clone(),
            ticket,
            keepalive_s: u16::try_from(self.keepalive.as_secs()).unwrap_or(u16::MAX),
            limits: Limits {
                max_message: LIMIT as u32,
                max_control: Stage::Session.limit() as u32,
                outbound_rate: None,
                inbound_rate: None,
                flows: None,
            },
        };
        let message = encode(&Control::Welcome(Box::new(welcome)))
            .ok_or_else(|| io::Error::other("the welcome is not valid"))?;
        let terms = Terms {
            inner: (inner4, inner6),
            lease: place.lease_pair(),
            mtu,
            offload,
            device: place.reply.offload,
        };
        let seed = random::<16>()?;
        let desk = Desk::new(self.runtime.clone(), place.answers.clone());
        let key = [0, 8].map(|at| {
            let mut half = [0; 8];
            half.copy_from_slice(&seed[at..at + 8]);
            u64::from_le_bytes(half)
        });
        Ok((vec![message.into()], Packets::new(terms, desk, key)))
    }

    fn farewell(&self, code: u16, reason: &str, retry_after: Option<Duration>) -> Option<Message> {
        goodbye(code, reason, retry_after)
    }

    fn lingers(&self) -> bool {
        true
    }
}
