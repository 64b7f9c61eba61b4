//! The loop of one connection that carries streams.
//!
//! Like the loop of packets it is driven by polling and gives the socket
//! nothing ahead of what it takes, so that what waits, waits in its stream,
//! and streams go on taking turns.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use rvpn_proto::control::close;
use rvpn_proto::streams::MAX_SENT;
use rvpn_proto::streams::mux::Mux;
use tokio::sync::mpsc;
use tokio::task::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_tungstenite::tungstenite::Message;
use tracing::debug;

use super::carrier::Notice;
use super::desk::Desk;
use crate::cores::Load;
use crate::meter::{Row, Totals};
use crate::session::carriage::{Bucket, End};
use crate::session::hub::Order;
use crate::session::mailbox::Mailbox;
use crate::session::transport::{Incoming, Socket, Transport as _};

/// Work of one turn in one direction, after which the other and the core's
/// other sessions have theirs.
const TURN_BYTES: usize = 256 * 1024;
const TURN_MESSAGES: usize = 256;
const TURN_SENDS: usize = 8;
/// How long a client has to answer a probe.
const PROBE: Duration = Duration::from_secs(2);
/// How often a client is told of its visitors at most.
const COUNTS: Duration = Duration::from_secs(1);

/// One connection, running.
pub(super) struct Drive<'a> {
    socket: &'a mut Socket,
    mux: Mux,
    desk: Desk,
    row: Row,
    totals: Totals,
    orders: Mailbox<Order>,
    notices: mpsc::Receiver<Notice>,
    /// Control messages made elsewhere, such as that a port is open.
    answers: mpsc::Receiver<Message>,
    outside: Pin<Box<dyn Future<Output = End> + Send>>,
    silence: Duration,
    timer: Pin<Box<Sleep>>,
    heard: Instant,
    counted: Instant,
    /// When it was asked for a sign of life.
    probed: Option<Instant>,
    /// Since when, and at which count of bytes, the socket has not taken everything.
    stuck: Option<(Instant, u64)>,
    flushing: bool,
    control: Bucket,
    message: Vec<u8>,
}

impl<'a> Drive<'a> {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a thing the session owns"
    )]
    pub(super) fn new(
        socket: &'a mut Socket,
        mux: Mux,
        desk: Desk,
        row: Row,
        orders: Mailbox<Order>,
        notices: mpsc::Receiver<Notice>,
        answers: mpsc::Receiver<Message>,
        outside: Pin<Box<dyn Future<Output = End> + Send>>,
        silence: Duration,
    ) -> Drive<'a> {
        let now = Instant::now();
        Drive {
            socket,
            mux,
            desk,
            row,
            totals: Totals::default(),
            orders,
            notices,
            answers,
            outside,
            silence,
            timer: Box::pin(sleep_until(now + COUNTS)),
            heard: now,
            counted: now,
            probed: None,
            stuck: None,
            flushing: false,
            control: Bucket::full(now),
            message: Vec::new(),
        }
    }

    /// Carries streams until there is a reason to end.
    pub(super) async fn run(&mut self, welcome: Message, load: &Load) -> End {
        if let Err(broken) = self.socket.feed(welcome) {
            return broken.into();
        }
        self.flushing = true;
        // What a turn may do is bounded here; tokio's own bound would end it early.
        unconstrained(poll_fn(|cx| {
            let before = self.totals;
            let end = self.turn(cx);
            self.publish();
            load.add(
                self.totals.outbound.wire - before.outbound.wire + self.totals.inbound.wire
                    - before.inbound.wire,
            );
            end
        }))
        .await
    }

    /// Takes everything out of the table; what was counted and where.
    pub(super) fn stop(self) -> (Totals, Row) {
        drop(self.desk);
        (self.totals, self.row)
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let now = Instant::now();
        if let Poll::Ready(Order::End {
            code,
            reason,
            retry_after,
        }) = self.orders.poll(cx)
        {
            return Poll::Ready(End::Told {
                code,
                reason,
                retry_after,
            });
        }
        if let Poll::Ready(end) = self.outside.as_mut().poll(cx) {
            return Poll::Ready(end);
        }
        let more = self
            .receive(cx, now)
            .and_then(|more| Ok(self.send(cx, now)? | more));
        match more {
            Err(end) => return Poll::Ready(end),
            // Not done, but others have waited long enough.
            Ok(true) => cx.waker().wake_by_ref(),
            Ok(false) => {}
        }
        self.watch(cx, now)
    }

    fn receive(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, End> {
        let mut bytes = 0;
        for _ in 0..TURN_MESSAGES {
            let Poll::Ready(message) = self.socket.poll_next(cx) else {
                return Ok(false);
            };
            self.heard = now;
            self.probed = None;
            match message? {
                Incoming::Data(data) => {
                    // Small ones are control, whatever is in them: a frame's header has 12.
                    if data.len() < 12 {
                        self.control.take(now)?;
                    }
                    bytes += data.len();
                    self.mux.receive(&data).map_err(|fault| {
                        debug!(%fault, "a client that serves misbehaves");
                        End::Misbehaved {
                            code: close::POLICY,
                            reason: "streams protocol error",
                        }
                    })?;
                }
                Incoming::Text(text) => {
                    self.control.take(now)?;
                    if let Some(answer) = self.desk.text(&text)? {
                        self.feed(answer)?;
                    }
                }
                Incoming::Control => {
                    self.control.take(now)?;
                    // The answer to a ping waits in the transport.
                    self.flushing = true;
                }
                Incoming::Close { .. } => return Err(End::Lost("the client closed")),
            }
            if bytes >= TURN_BYTES {
                break;
            }
        }
        Ok(true)
    }

    fn feed(&mut self, message: Message) -> Result<(), End> {
        self.socket.feed(message)?;
        self.flushing = true;
        Ok(())
    }

    /// One message at a time: more is built only when the socket has taken the last.
    fn send(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, End> {
        while let Poll::Ready(Some(Notice::Probe)) = self.notices.poll_recv(cx) {
            if self.probed.is_none() {
                self.probed = Some(now);
                self.timer.as_mut().reset(now + PROBE);
                self.feed(Message::Ping(Bytes::new()))?;
            }
        }
        for _ in 0..TURN_SENDS {
            if self.flushing {
                if self.socket.poll_flush(cx)?.is_pending() {
                    let taken = self.socket.wire().1;
                    self.stuck.get_or_insert((now, taken));
                    return Ok(false);
                }
                self.flushing = false;
                self.stuck = None;
            }
            while let Poll::Ready(Some(answer)) = self.answers.poll_recv(cx) {
                self.feed(answer)?;
            }
            if self.flushing {
                continue;
            }
            self.message.clear();
            let polled = self.mux.poll_send(cx, &mut self.message, MAX_SENT);
            if polled.is_pending() {
                return Ok(false);
            }
            self.socket.data(cx, &self.message)?;
            self.flushing = true;
        }
        Ok(true)
    }

    /// The clock: silence, sockets that take nothing, probes, counts.
    fn watch(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<End> {
        while self.timer.as_mut().poll(cx).is_ready() {
            if now.saturating_duration_since(self.heard) >= self.silence {
                return Poll::Ready(End::Lost("no sign of life from the client"));
            }
            if self.probed.is_some_and(|at| at + PROBE <= now) {
                return Poll::Ready(End::Lost("the client did not answer when asked"));
            }
            if let Some((since, taken)) = self.stuck {
                let total = self.socket.wire().1;
                if total != taken {
                    self.stuck = Some((now, total));
                } else if now.saturating_duration_since(since) >= self.silence {
                    return Poll::Ready(End::Lost("the client takes no data"));
                }
            }
            if now.saturating_duration_since(self.counted) >= COUNTS {
                self.counted = now;
                if let Some(counts) = self.desk.counts() {
                    if let Err(end) = self.feed(counts) {
                        return Poll::Ready(end);
                    }
                    cx.waker().wake_by_ref();
                }
            }
            // Memory that only traffic needs.
            if self.mux.open_streams() == 0 {
                self.message = Vec::new();
            }
            let next = match self.probed {
                Some(at) => (at + PROBE).min(now + COUNTS),
                None => now + COUNTS,
            };
            self.timer
                .as_mut()
                .reset(next.max(now + Duration::from_millis(1)));
        }
        Poll::Pending
    }

    fn publish(&mut self) {
        let (read, written) = self.socket.wire();
        self.totals.outbound.wire = read;
        self.totals.inbound.wire = written;
        self.row.publish(&self.totals, false);
    }
}
