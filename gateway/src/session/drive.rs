//! The loop of one session.
//!
//! One task owns the connection, the device and the counters of one client and
//! is driven by polling: each turn takes what has arrived from the client,
//! drains the device whether or not the client can be written to, and sends
//! as long as the socket takes it. Nothing is encrypted ahead of the socket,
//! so what waits, waits in the queue, where it can still be dropped.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use rvpn_acks::LOOK;
use rvpn_proto::queue::{Buffer, Pace, Stride};
use tokio::task::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_tungstenite::tungstenite::Message;

use super::carriage::{Bucket, Carriage, End};
use super::hub::Order;
use super::mailbox::Mailbox;
use super::transport::{Incoming, Transport};
use crate::cores::Load;
use crate::meter::{Row, Totals};
use crate::pump::Out;
use crate::pump::budget::Gauge;
use crate::tun::{MAX_READ, Tun, VIRTIO_LEN};

/// Taken from the client in one turn, after which the device has its own.
const TURN_BYTES: usize = 256 * 1024;
const TURN_MESSAGES: usize = 256;
/// Taken from the device in one turn.
const DRAIN_BYTES: usize = 1024 * 1024;
const DRAIN_PACKETS: usize = 512;
/// Turns, after which the core's other sessions have theirs.
const TURNS: usize = 4;
/// What is given to a socket that is fast in one turn, one large message or
/// several small ones. Much less than what is drained from the device in one:
/// else a sender that is faster than we are would wait there, first come, first
/// served, and not in the queue.
const FLUSH_BYTES: usize = 48 * 1024;

/// Buffers that belong to the thread, so that an idle session has none.
pub struct Scratch {
    /// One read of the device.
    pub device: Buffer,
    /// The message being built.
    pub message: Buffer,
    /// The packet being put together.
    pub packet: Box<[u8]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        device: Buffer::new(),
        message: Buffer::new(),
        packet: vec![0; MAX_READ].into(),
    });
}

/// How long a silent or unreachable peer is believed in.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Without any message from it, or without any byte taken by its socket.
    pub silence: Duration,
    /// How often it is pinged by us.
    pub ping_every: Option<Duration>,
}

/// One session, running.
pub struct Drive<T, C> {
    pub transport: T,
    pub carriage: C,
    pub tun: Tun,
    pub row: Row,
    /// Shows others what waits.
    pub gauge: Arc<Gauge>,
    pub totals: Totals,
    pub orders: Mailbox<Order>,
    /// Control messages made elsewhere, such as a resolved name.
    pub answers: Mailbox<Message>,
    /// Ends when something outside ends the session: revocation, expiry, the helper.
    pub outside: Pin<Box<dyn Future<Output = End> + Send>>,
    /// What the connection had carried before its meter row was opened.
    pub patience: Patience,
    timer: Pin<Box<Sleep>>,
    /// What the timer is set to, since reading it back costs more.
    alarm: Instant,
    heard: Instant,
    pinged: Instant,
    /// Since when, and at which count of bytes, the socket has not taken everything.
    stuck: Option<(Instant, u64)>,
    flushing: bool,
    /// How much the socket is given at once, and the device between two looks.
    pace: Pace,
    stride: Stride,
    /// Packets and bytes that looks have taken from the device in this turn.
    looked: (usize, usize),
    begun: Instant,
    control: Bucket,
    drops_seen: u64,
    /// The last turn ended before all was done.
    unfinished: bool,
}

impl<T: Transport, C: Carriage> Drive<T, C> {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a thing the session owns"
    )]
    pub fn new(
        transport: T,
        carriage: C,
        tun: Tun,
        row: Row,
        gauge: Arc<Gauge>,
        orders: Mailbox<Order>,
        answers: Mailbox<Message>,
        outside: Pin<Box<dyn Future<Output = End> + Send>>,
        patience: Patience,
    ) -> Drive<T, C> {
        let now = Instant::now();
        let mut drive = Drive {
            transport,
            carriage,
            tun,
            row,
            gauge,
            totals: Totals::default(),
            orders,
            answers,
            outside,
            patience,
            timer: Box::pin(sleep_until(now)),
            alarm: now,
            heard: now,
            pinged: now,
            stuck: None,
            flushing: false,
            pace: Pace::default(),
            stride: Stride::default(),
            looked: (0, 0),
            begun: now,
            control: Bucket::full(now),
            drops_seen: 0,
            unfinished: false,
        };
        let next = drive.next_alarm(now);
        drive.set_alarm(next);
        drive
    }

    /// Carries packets until there is a reason to end. `heard` is called once,
    /// when the first message after the welcome arrives.
    pub async fn run(&mut self, load: &Load, mut heard: impl FnMut()) -> End {
        let before = self.heard;
        let mut told = false;
        // What a turn may do is bounded here, in bytes. tokio's own bound, of 128
        // calls, would end it in the middle of a drain and leave nothing for sending.
        unconstrained(poll_fn(|cx| {
            let counted = self.totals;
            let end = SCRATCH.with_borrow_mut(|scratch| self.turn(cx, scratch));
            self.carriage.tally(&mut self.totals);
            self.share(load);
            self.publish();
            load.add(
                self.totals.outbound.payload - counted.outbound.payload
                    + self.totals.inbound.payload
                    - counted.inbound.payload,
            );
            if !told && self.heard != before {
                told = true;
                heard();
            }
            end
        }))
        .await
    }

    fn turn(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<End> {
        let now = Instant::now();
        if let Poll::Ready(order) = self.orders.poll(cx) {
            return Poll::Ready(match order {
                Order::End {
                    code,
                    reason,
                    retry_after,
                } => End::Told {
                    code,
                    reason,
                    retry_after,
                },
                Order::HandOver(to) => End::Replaced(to),
            });
        }
        if let Poll::Ready(end) = self.outside.as_mut().poll(cx) {
            return Poll::Ready(end);
        }
        let mut last = now;
        for turn in 1.. {
            let more = self
                .receive(cx, scratch, last)
                .and_then(|more| {
                    if self.looked.0 > 0 {
                        last = Instant::now();
                    }
                    Ok(self.drain(cx, scratch, last)? | more)
                })
                .and_then(|more| Ok(self.send(cx, scratch, last)? | more));
            match more {
                Err(end) => return Poll::Ready(end),
                Ok(true) if turn < TURNS => last = Instant::now(),
                // Not done, but others have waited long enough.
                Ok(true) => {
                    cx.waker().wake_by_ref();
                    self.unfinished = true;
                    break;
                }
                Ok(false) => break,
            }
        }
        self.watch(cx, last)
    }

    /// Has a part of the work done by another thread while there is too much of it.
    fn share(&mut self, load: &Load) {
        match load.acks() {
            Some(writer) if self.unfinished => self.tun.open_aside(writer),
            Some(_) => {}
            None => self.tun.aside.close(),
        }
        self.unfinished = false;
        self.tun.count_aside(&mut self.totals.outbound);
    }

    /// Client to device.
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        now: Instant,
    ) -> Result<bool, End> {
        self.looked = (0, 0);
        let more = self.take_in(cx, scratch, now);
        // Also when the session ends: what came before the end has come.
        let (carriage, mut out) = self.out(&mut scratch.packet, now);
        carriage.flush(&mut out);
        more
    }

    /// The way to the device.
    fn out<'a>(&'a mut self, scratch: &'a mut [u8], now: Instant) -> (&'a mut C, Out<'a>) {
        let out = Out {
            tun: &self.tun,
            totals: &mut self.totals,
            scratch,
            stride: &mut self.stride,
            now,
        };
        (&mut self.carriage, out)
    }

    fn take_in(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        now: Instant,
    ) -> Result<bool, End> {
        let mut bytes = 0;
        for _ in 0..TURN_MESSAGES {
            let Poll::Ready(message) = self.transport.poll_next(cx) else {
                return Ok(false);
            };
            self.heard = now;
            match message? {
                Incoming::Data(data) => {
                    if data.is_empty() {
                        self.control.take(now)?;
                    }
                    bytes += data.len();
                    let mut from = 0;
                    loop {
                        let (carriage, mut out) = self.out(&mut scratch.packet, now);
                        from = carriage.outbound(&data, from, &mut out)?;
                        if self.stride.is_due() {
                            self.look(cx, scratch)?;
                        }
                        if from >= data.len() {
                            break;
                        }
                    }
                }
                Incoming::Text(text) => {
                    self.control.take(now)?;
                    if let Some(answer) = self.carriage.text(&text, &mut self.totals)? {
                        self.transport.feed(answer)?;
                        self.flushing = true;
                    }
                }
                Incoming::Control => {
                    self.control.take(now)?;
                    // The answer to a ping waits in the transport.
                    self.flushing = true;
                }
                // A plain close without a goodbye: the tab was closed, the phone slept.
                Incoming::Close { .. } => return Err(End::Lost("the client closed")),
            }
            if bytes >= TURN_BYTES {
                break;
            }
        }
        Ok(true)
    }

    /// Sends on what has come from the device while it was written to.
    fn look(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<(), End> {
        let now = Instant::now();
        let before = self.looked.0;
        // All looks of a turn take no more than one drain does.
        while self.looked.0 < DRAIN_PACKETS && self.looked.1 < DRAIN_BYTES {
            let read = self.tun.read_now(scratch.device.from(VIRTIO_LEN));
            let Some(n) = read.map_err(|_| End::DeviceLost)? else {
                break;
            };
            self.carriage
                .inbound(&mut scratch.device, n, &mut self.totals, now);
            self.looked.0 += 1;
            self.looked.1 += n;
        }
        let found = self.looked.0 > before;
        self.stride.looked(found);
        if found {
            self.send(cx, scratch, now)?;
        }
        Ok(())
    }

    /// Device to queue.
    fn drain(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        now: Instant,
    ) -> Result<bool, End> {
        let mut bytes = 0;
        for _ in 0..DRAIN_PACKETS {
            match self.tun.poll_read(cx, scratch.device.from(VIRTIO_LEN)) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Err(_)) => return Err(End::DeviceLost),
                Poll::Ready(Ok(n)) => {
                    self.carriage
                        .inbound(&mut scratch.device, n, &mut self.totals, now);
                    bytes += n;
                    if bytes >= DRAIN_BYTES {
                        break;
                    }
                }
            }
        }
        Ok(true)
    }

    /// Queue to client, one flush at a time: more is built only when the socket
    /// has taken the last, so that what waits can still be reordered and dropped.
    fn send(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        now: Instant,
    ) -> Result<bool, End> {
        if self.flushing && !self.flush(cx, now)? {
            return Ok(false);
        }
        while let Poll::Ready(answer) = self.answers.poll(cx) {
            self.transport.feed(answer)?;
            self.flushing = true;
        }
        if self.flushing && !self.flush(cx, now)? {
            return Ok(false);
        }
        let (mut fed, most) = (0, self.pace.most());
        self.transport.keep_apart(self.pace.is_slow());
        while fed < most.min(FLUSH_BYTES) {
            let buffer = &mut scratch.message;
            let Some(message) = self.carriage.message(buffer, most, &mut self.totals, now) else {
                break;
            };
            fed += message.len();
            self.transport.data(cx, &buffer.bytes()[message])?;
            self.flushing = true;
        }
        if self.flushing {
            return self.flush(cx, now);
        }
        self.pace.empty();
        Ok(false)
    }

    /// Whether the socket took everything, so that more can follow.
    fn flush(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, End> {
        if self.transport.poll_flush(cx)?.is_pending() {
            let taken = self.transport.wire().1;
            self.stuck.get_or_insert((now, taken));
            self.pace.full();
            return Ok(false);
        }
        self.pace.took(self.micros(now), self.transport.wire().1);
        self.flushing = false;
        self.stuck = None;
        Ok(true)
    }

    fn micros(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.begun).as_micros();
        u64::try_from(passed).unwrap_or(u64::MAX)
    }

    /// The clock: silence, sockets that take nothing, our pings, delayed sends.
    fn watch(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<End> {
        if let Some(due) = self.carriage.due()
            && due < self.alarm
        {
            self.set_alarm(due);
        }
        if self.tun.aside.is_open() && self.alarm > now + LOOK {
            self.set_alarm(now + LOOK);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if now.saturating_duration_since(self.heard) >= self.patience.silence {
                return Poll::Ready(End::Lost("no sign of life from the client"));
            }
            if let Some((since, taken)) = self.stuck {
                let total = self.transport.wire().1;
                if total != taken {
                    self.stuck = Some((now, total));
                } else if now.saturating_duration_since(since) >= self.patience.silence {
                    return Poll::Ready(End::Lost("the client takes no data"));
                }
            }
            if let Some(every) = self.patience.ping_every
                && now.saturating_duration_since(self.pinged) >= every
            {
                self.pinged = now;
                if let Err(broken) = self.transport.feed(Message::Ping(Bytes::new())) {
                    return Poll::Ready(broken.into());
                }
                self.flushing = true;
            }
            if self.flushing || self.carriage.due().is_some_and(|due| due <= now) {
                cx.waker().wake_by_ref();
            }
            self.tun.aside.look();
            // Not in the middle of much.
            if !self.tun.aside.is_open() {
                self.carriage.relax();
            }
            let next = self.next_alarm(now);
            self.set_alarm(next);
        }
        Poll::Pending
    }

    fn next_alarm(&self, now: Instant) -> Instant {
        let mut next = self.heard + self.patience.silence;
        if let Some((since, _)) = self.stuck {
            next = next.min(since + self.patience.silence);
        }
        if let Some(every) = self.patience.ping_every {
            next = next.min(self.pinged + every);
        }
        if let Some(due) = self.carriage.due() {
            next = next.min(due);
        }
        if self.tun.aside.is_open() {
            next = next.min(now + LOOK);
        }
        next.max(now + Duration::from_millis(1))
    }

    fn set_alarm(&mut self, at: Instant) {
        self.alarm = at;
        self.timer.as_mut().reset(at);
    }

    /// Brings the meter row up to date.
    pub fn publish(&mut self) {
        let (read, written) = self.transport.wire();
        self.totals.outbound.wire = read;
        self.totals.inbound.wire = written;
        let drops = self.totals.drops();
        self.row.publish(&self.totals, drops != self.drops_seen);
        self.gauge.set(self.carriage.depth());
        self.drops_seen = drops;
    }
}
