//! From an admitted connection to a running session, and from its end to
//! nothing left of it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rvpn_ipc::{Key, Reply};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message;
use tracing::{Instrument, debug, info, info_span, warn};

use super::Shared;
use super::carriage::{Carriage, End};
use super::drive::{Drive, Patience};
use super::hub::{Card, Claim, Entry, Handed, SessionId, orders};
use super::lease::{Refusal, obtain};
use super::mailbox::{Slot, mailbox};
use super::transport::{Socket, Transport as _};
use crate::admit::Admission;
use crate::cores::Seat;
use crate::helper::{Lease, LeaseEvent};
use crate::meter::Totals;
use crate::meter::flush::now_ms;
use crate::pump::budget::Gauge;
use crate::ticket::random;
use crate::tun::Tun;

/// How long the farewell may take; the client may not be reading any more.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long a client may take to accept its welcome.
const WELCOME: Duration = Duration::from_secs(10);
/// Control messages made elsewhere that may wait for a session.
const ANSWERS: usize = 16;

/// What a protocol has to say and know when a session begins.
pub trait Protocol: Send + Sync + 'static {
    /// Its packets.
    type Carriage: Carriage + Send;

    /// What the session list calls it.
    fn service(&self) -> &'static str;

    /// How long silence is believed to be life.
    fn patience(&self) -> Patience;

    /// The first messages to the client, once it has its lease, and the carriage for the rest.
    fn welcome(&mut self, place: &Place) -> io::Result<(Vec<Greeting>, Self::Carriage)>;

    /// What to tell a client that is refused or sent away, before the close frame.
    fn farewell(&self, code: u16, reason: &str, retry_after: Option<Duration>) -> Option<Message>;

    /// The words of a close frame, for clients that know only their own.
    fn close_reason(&self, _code: u16, reason: &'static str) -> &'static str {
        reason
    }

    /// Whether the client may come back to its lease without a word.
    fn lingers(&self) -> bool;
}

/// A message of the beginning.
pub struct Greeting {
    /// How long to wait before it. Nothing overtakes it.
    pub after: Duration,
    /// The message.
    pub message: Message,
}

impl From<Message> for Greeting {
    fn from(message: Message) -> Greeting {
        Greeting {
            after: Duration::ZERO,
            message,
        }
    }
}

/// Where a session has come to stand.
pub struct Place {
    /// Its number.
    pub session: SessionId,
    /// The lease, as the helper described it.
    pub reply: Reply,
    /// The slot kept its key, so flows of before may go on.
    pub resumed: bool,
    /// The ticket for next time, sealed.
    pub ticket: Option<String>,
    /// Where control messages made elsewhere go.
    pub answers: Slot<Message>,
}

impl Place {
    /// The client's addresses inside the lease.
    pub fn lease_pair(&self) -> (Ipv4Addr, Ipv6Addr) {
        (
            Ipv4Addr::from_bits(self.reply.v4.to_bits() + 2),
            Ipv6Addr::from_bits(self.reply.v6.to_bits() + 1),
        )
    }

    /// The client's addresses as it sees them with NAT: those of the first
    /// slot, whichever it has, so that a changed lease does not show inside.
    pub fn inner_pair(&self) -> (Ipv4Addr, Ipv6Addr) {
        let (v4, v6) = self.lease_pair();
        let slot = self.reply.slot;
        (
            Ipv4Addr::from_bits(v4.to_bits().wrapping_sub(slot << 8)),
            Ipv6Addr::from_bits(v6.to_bits().wrapping_sub(u128::from(slot) << 64)),
        )
    }
}

/// A connection that knows its lease key, on its way to the lease.
pub struct Arrival<P> {
    pub socket: Socket,
    pub protocol: P,
    pub admission: Admission,
    pub key: Key,
    /// Number of the ticket it came with.
    pub epoch: u64,
    pub seat: Seat,
}

impl<P: Protocol> Arrival<P> {
    /// Runs the session on the core where the client already is, or here.
    pub fn settle(mut self, shared: Arc<Shared>) {
        if let Some(core) = shared.hub.core_of(self.key)
            && core != self.seat.core()
        {
            self.seat = shared.cores.seat(core);
        }
        let core = self.seat.core();
        let span =
            info_span!("session", account = %self.admission.account, peer = %self.admission.peer);
        let on = Arc::clone(&shared);
        let kept = span.clone();
        let task = async move {
            if let Err(error) = self.socket.stream_mut().rehome() {
                debug!(%error, "cannot move a connection to its core");
                return;
            }
            // A task of its own: this one is several times as large, and what
            // lasts for days should not keep what a beginning needs.
            if let Some(session) = self.start(&on).await {
                on.cores.spawn(core, session.carry().instrument(kept));
            }
        };
        // Boxed, since a task's own memory lasts as long as anybody could wake
        // it, and the connection remembers who last waited for it to be written.
        shared.cores.spawn(core, Box::pin(task.instrument(span)));
    }

    async fn start(mut self, shared: &Arc<Shared>) -> Option<Box<Running<P>>> {
        let (order_tx, order_rx) = orders();
        let claimed = shared.hub.claim(
            self.key,
            self.seat.core(),
            order_tx.clone(),
            shared.settings.ticket_life,
        );
        let Ok((claim, former)) = claimed else {
            let refusal = Refusal {
                code: 1012,
                reason: "the gateway is shutting down",
                retry_after: shared.retry_after(),
            };
            self.refuse(&refusal).await;
            return None;
        };
        let class = self.admission.class;
        let (lease, tun) = match obtain(&shared.helper, self.key, class, former).await {
            Ok(got) => got,
            Err(refusal) => {
                self.refuse(&refusal).await;
                return None;
            }
        };
        let started = SystemTime::now();
        let opened = random::<16>().map(u128::from_le_bytes).and_then(|id| {
            let row = shared.meter.open(
                id,
                &self.admission.account,
                self.protocol.service(),
                now_ms(),
            );
            Ok((id, row.map_err(io::Error::other)?, Tun::adopt(tun)?))
        });
        let (id, row, tun) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                warn!(%error, "cannot begin a session");
                let refusal = Refusal {
                    code: 1013,
                    reason: "the gateway is out of resources",
                    retry_after: shared.retry_after(),
                };
                self.refuse(&refusal).await;
                return None;
            }
        };
        let (answers, answer_rx) = mailbox(ANSWERS);
        let place = Place {
            session: id,
            reply: lease.reply,
            resumed: lease.resumed(),
            ticket: self.ticket(shared, &claim, &lease),
            answers,
        };
        let (v4, v6) = place.lease_pair();
        let gauge = Arc::<Gauge>::default();
        let card = Card {
            id,
            account: Arc::clone(&self.admission.account),
            subject: Arc::clone(&self.admission.subject),
            token_id: self.admission.token_id,
            service: self.protocol.service(),
            peer: self.admission.peer,
            started,
            addresses: vec![IpAddr::V4(v4), IpAddr::V6(v6)],
            slot: Some(lease.reply.slot),
            core: self.seat.core(),
            gauge: Arc::clone(&gauge),
        };
        let entry = shared.hub.enter(card, order_tx);
        info!(
            slot = lease.reply.slot,
            resumed = place.resumed,
            "client came"
        );

        let outside = outside(&self.admission, &lease, &tun);
        let patience = self.protocol.patience();
        let welcomed = match self.protocol.welcome(&place) {
            Ok((messages, carriage)) => timeout(WELCOME, self.greet(messages))
                .await
                .map_err(|_| End::Lost("the client did not take its welcome"))
                .and_then(|sent| sent.map(|()| carriage)),
            Err(error) => {
                warn!(%error, "cannot welcome a client");
                Err(End::Lost("no welcome"))
            }
        };
        // The carriage must not keep the channel open that it is told by.
        drop(place);
        let held = Held {
            claim,
            lease,
            entry,
            protocol: self.protocol,
        };
        match welcomed {
            Ok(carriage) => {
                let drive = Drive::new(
                    self.socket,
                    carriage,
                    tun,
                    row,
                    gauge,
                    order_rx,
                    answer_rx,
                    outside,
                    patience,
                );
                Some(Box::new(Running {
                    drive,
                    held,
                    seat: self.seat,
                    _admission: self.admission,
                }))
            }
            Err(end) => {
                drop(outside);
                let mut totals = Totals::default();
                (totals.outbound.wire, totals.inbound.wire) = self.socket.wire();
                row.close(&totals, now_ms());
                held.end(end, tun, self.socket).await;
                None
            }
        }
    }

    async fn greet(&mut self, greetings: Vec<Greeting>) -> Result<(), End> {
        for Greeting { after, message } in greetings {
            if !after.is_zero() {
                sleep(after).await;
            }
            self.socket.send(message).await?;
        }
        Ok(())
    }

    fn ticket(&self, shared: &Shared, claim: &Claim, lease: &Lease) -> Option<String> {
        if !self.protocol.lingers() {
            return None;
        }
        let life = shared.settings.ticket_life.as_secs();
        let claims = crate::ticket::Claims {
            key: self.key,
            generation: lease.reply.generation,
            epoch: claim.next_epoch(self.epoch),
            expires: now_ms() / 1000 + life,
        };
        let sealed = shared.tickets.seal(&self.admission.account, &claims);
        sealed
            .inspect_err(|error| warn!(%error, "no resume ticket for a client"))
            .ok()
    }

    async fn refuse(mut self, refusal: &Refusal) {
        debug!(reason = refusal.reason, "client refused");
        let parting = part(
            &mut self.socket,
            &self.protocol,
            refusal.code,
            refusal.reason,
            Some(refusal.retry_after),
        );
        // Running out only means that the client did not listen.
        drop(timeout(FAREWELL, parting).await);
    }
}

/// A session whose client was welcomed.
struct Running<P: Protocol> {
    drive: Drive<Socket, P::Carriage>,
    held: Held<P>,
    seat: Seat,
    _admission: Admission,
}

impl<P: Protocol> Running<P> {
    async fn carry(mut self: Box<Self>) {
        let Running {
            drive, held, seat, ..
        } = &mut *self;
        let end = drive.run(seat.load(), || held.claim.heard()).await;
        drive.tun.finish_aside(&mut drive.totals.outbound).await;
        drive.publish();
        Box::pin(self.finish(end)).await;
    }

    async fn finish(self: Box<Self>, end: End) {
        let Running { drive, held, .. } = *self;
        let Drive {
            transport,
            tun,
            row,
            totals,
            outside,
            ..
        } = drive;
        drop(outside);
        row.close(&totals, now_ms());
        held.end(end, tun, transport).await;
    }
}

/// What a session has taken and must give back, in this order.
struct Held<P> {
    claim: Claim,
    lease: Lease,
    entry: Entry,
    protocol: P,
}

impl<P: Protocol> Held<P> {
    async fn end(self, end: End, tun: Tun, mut socket: Socket) {
        let Held {
            claim,
            mut lease,
            entry,
            protocol,
        } = self;
        let mut said = None;
        let mut gone_for_good = !protocol.lingers();
        match end {
            End::Replaced(to) => {
                info!("client continues on another connection");
                if let Some(tun) = tun.into_fd() {
                    // The other side may have given up; then this is an ordinary end.
                    drop(to.send(Handed { tun, lease }));
                }
                drop((claim, entry));
                let parting = part(&mut socket, &protocol, 1000, "continued elsewhere", None);
                drop(timeout(FAREWELL, parting).await);
                return;
            }
            End::Lost(why) => info!(why, "client lost"),
            End::Goodbye => {
                info!("client left");
                claim.void_tickets();
                gone_for_good = true;
                said = Some((1000, "goodbye", None));
            }
            End::Misbehaved { code, reason } => {
                info!(code, reason, "client sent away");
                said = Some((code, reason, None));
            }
            End::Told {
                code,
                reason,
                retry_after,
            } => {
                info!(code, reason, "client told to go");
                if retry_after.is_none() {
                    claim.void_tickets();
                    gone_for_good = true;
                }
                said = Some((code, reason, retry_after));
            }
            End::DeviceLost => {
                warn!("the client's device is gone");
                gone_for_good = true;
                said = Some((
                    1011,
                    "the tunnel device is gone",
                    Some(Duration::from_secs(1)),
                ));
            }
        }
        if gone_for_good {
            lease.release_on_drop();
        }
        // The helper proves the device free, so it must be closed first.
        drop(tun);
        drop(lease);
        drop((claim, entry));
        if let Some((code, reason, retry_after)) = said {
            let parting = part(&mut socket, &protocol, code, reason, retry_after);
            drop(timeout(FAREWELL, parting).await);
        }
    }
}

async fn part<P: Protocol>(
    socket: &mut Socket,
    protocol: &P,
    code: u16,
    reason: &'static str,
    retry_after: Option<Duration>,
) {
    if let Some(message) = protocol.farewell(code, reason, retry_after)
        && socket.send(message).await.is_err()
    {
        return;
    }
    socket
        .close(code, protocol.close_reason(code, reason))
        .await;
}

/// Resolves when something outside ends the session.
fn outside(
    admission: &Admission,
    lease: &Lease,
    tun: &Tun,
) -> Pin<Box<dyn Future<Output = End> + Send>> {
    let mut revoked = admission.revoked.clone();
    let mut events = lease.events();
    let gone = tun.gone();
    let expiry = admission.expires_at.map(monotonic);
    let told = |reason| End::Told {
        code: 1008,
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
        tokio::select! {
            () = async {
                if revoked.wait_for(|r| *r).await.map(drop).is_err() {
                    // Nobody is left who could revoke it.
                    std::future::pending::<()>().await;
                }
            } => told("access was revoked"),
            () = expired => told("the token has expired"),
            () = gone => End::DeviceLost,
            event = async { events.wait_for(Option::is_some).await.ok().and_then(|e| *e) } => {
                match event {
                    Some(LeaseEvent::TakenOver) => told("the lease was taken over"),
                    Some(LeaseEvent::DeviceLost) | None => End::DeviceLost,
                }
            }
        }
    })
}

/// When a moment of the wall clock comes, as things stand now. From here on
/// the session is not moved by whoever sets the clock.
/// The same moment on the clock of timers.
pub(crate) fn monotonic(at: SystemTime) -> Instant {
    let left = at.duration_since(SystemTime::now()).unwrap_or_default();
    // Far beyond any session, and within what a timer takes.
    Instant::now() + left.min(Duration::from_secs(10 * 365 * 24 * 3600))
}
