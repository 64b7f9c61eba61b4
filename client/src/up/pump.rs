//! Between the device and the connection: the half that has no rights.
//!
//! One loop owns both, as at the gateway: each turn takes what has arrived,
//! drains the device whether or not the socket takes data, and sends as long
//! as it does. What waits, waits in the queue, where it can still be dropped.

mod carrier;

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, Stream};
use rvpn_acks::{Aside, LOOK};
use rvpn_proto::control::{Goodbye, Message as Control, Stage, Welcome, patience};
use rvpn_proto::gso::{Coalescer, Joins, Offer, Segments, VIRTIO_LEN, VirtioHeader};
use rvpn_proto::packet::{Parsed, Side};
use rvpn_proto::queue::{Meta, Pace, Stride};
use rvpn_proto::record::{Offload, Reader};
use rvpn_proto::validate::{Limits, inbound};
use tokio::task::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};

pub(crate) use self::carrier::{Carrier, Device};
use super::apart::Apart;
use crate::link::Socket;

/// Taken from the gateway in one turn, and from the device.
const TURN_BYTES: usize = 256 * 1024;
const DRAIN_BYTES: usize = 1024 * 1024;
const DRAIN_PACKETS: usize = 512;
/// Turns before the clock and the other half have theirs.
const TURNS: usize = 4;
/// What is given to a socket that is fast in one turn: less than is drained
/// from the device, so that what is too much waits in the queue and not there.
const FLUSH_BYTES: usize = 48 * 1024;
/// No header of a packet that passes is longer.
const HEAD: usize = 128;
/// How long a connection has to answer after the network has changed.
const PROBE: Duration = Duration::from_millis(800);

/// Why the carrying ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The connection is gone.
    Lost(String),
    /// The gateway said so.
    SentAway(Option<Goodbye>, Option<CloseFrame>),
    /// The device is gone.
    Device(io::Error),
}

/// One connection's part.
pub(crate) struct Session<'a> {
    pub(crate) socket: &'a mut Socket<Apart>,
    /// The newest ticket.
    pub(crate) ticket: &'a mut Option<String>,
    v4: Ipv4Addr,
    v6: Option<Ipv6Addr>,
    limits: Limits,
    offload: bool,
    /// Spares the kernel the work of one packet at a time.
    coalescer: Coalescer,
    keepalive: Duration,
    heard: Instant,
    pinged: Instant,
    /// A ping that was not answered yet.
    waiting: Option<Instant>,
    /// By when something must be heard.
    probe: Option<Instant>,
    flushing: bool,
    /// How much the socket is given at once, and was given so far.
    pace: Pace,
    given: u64,
    /// And the device between two looks.
    stride: Stride,
    /// Packets and bytes that looks have taken from the device in this turn.
    looked: (usize, usize),
    timer: Pin<Box<Sleep>>,
    said: Option<Goodbye>,
}

impl<'a> Session<'a> {
    /// After a welcome.
    pub(crate) fn new(
        socket: &'a mut Socket<Apart>,
        ticket: &'a mut Option<String>,
        welcome: &Welcome,
        datagrams: bool,
    ) -> Session<'a> {
        let now = Instant::now();
        let offload = welcome
            .capabilities
            .iter()
            .any(|c| c == rvpn_proto::control::OFFLOAD);
        *ticket = welcome.ticket.as_ref().map(|t| t.ticket.clone());
        Session {
            socket,
            ticket,
            v4: welcome.v4.address,
            v6: welcome.v6.map(|pair| pair.address),
            limits: Limits {
                mtu: u16::try_from(welcome.mtu).unwrap_or(u16::MAX),
                offload,
                verify: false,
            },
            offload,
            coalescer: Coalescer::new(Joins {
                // Where the gateway's uplink joins nothing, they come singly also with offload.
                tcp: true,
                udp: datagrams,
            }),
            keepalive: Duration::from_secs(welcome.keepalive_s.into()),
            heard: now,
            pinged: now,
            waiting: None,
            probe: None,
            flushing: false,
            pace: Pace::default(),
            given: 0,
            stride: Stride::default(),
            looked: (0, 0),
            timer: Box::pin(sleep_until(now)),
            said: None,
        }
    }

    /// The network changed: asks whether the gateway is still there.
    pub(crate) fn probe(&mut self) {
        self.probe.get_or_insert(Instant::now() + PROBE);
        self.ping();
    }

    fn ping(&mut self) {
        let now = Instant::now();
        self.pinged = now;
        self.waiting.get_or_insert(now);
        if Pin::new(&mut *self.socket)
            .start_send(Message::Ping(Bytes::new()))
            .is_ok()
        {
            self.flushing = true;
        }
        self.timer.as_mut().reset(now);
    }

    /// Carries packets until the connection ends.
    pub(crate) async fn run(&mut self, carrier: &mut Carrier) -> End {
        // A turn is bounded here; tokio's own bound would end it in the middle.
        unconstrained(poll_fn(|cx| match self.turn(cx, carrier) {
            Ok(()) => Poll::Pending,
            Err(end) => Poll::Ready(end),
        }))
        .await
    }

    fn turn(&mut self, cx: &mut Context<'_>, carrier: &mut Carrier) -> Result<(), End> {
        let mut now = Instant::now();
        for turn in 1.. {
            let mut more = self.receive(cx, carrier, now)?;
            if self.looked.0 > 0 {
                now = Instant::now();
            }
            more |= self.drain(cx, carrier, now)?;
            more |= self.send(cx, carrier, now)?;
            if !more {
                break;
            }
            if turn == TURNS {
                cx.waker().wake_by_ref();
                carrier.device.open_aside();
                break;
            }
            now = Instant::now();
        }
        let watched = self.watch(cx, &mut carrier.device.aside, now);
        carrier.device.count_aside(&mut carrier.inbound);
        watched
    }

    /// Gateway to device.
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        carrier: &mut Carrier,
        now: Instant,
    ) -> Result<bool, End> {
        self.looked = (0, 0);
        let more = self.take_in(cx, carrier, now);
        // Also when the connection ends: what came before the end has come.
        self.finish(carrier)?;
        more
    }

    fn take_in(
        &mut self,
        cx: &mut Context<'_>,
        carrier: &mut Carrier,
        now: Instant,
    ) -> Result<bool, End> {
        let mut bytes = 0;
        while bytes < TURN_BYTES {
            let Poll::Ready(next) = Pin::new(&mut *self.socket).poll_next(cx) else {
                return Ok(false);
            };
            self.heard = now;
            self.probe = None;
            match next {
                Some(Ok(Message::Binary(data))) => {
                    bytes += data.len();
                    self.accept(cx, &data, carrier)?;
                }
                Some(Ok(Message::Text(text))) => match Control::parse(&text, Stage::Session) {
                    Ok(Control::Ticket(ticket)) => *self.ticket = Some(ticket.ticket),
                    Ok(Control::Goodbye(goodbye)) => self.said = Some(goodbye),
                    // What we do not know is of no use to us.
                    _ => {}
                },
                Some(Ok(Message::Pong(_))) => {
                    carrier.rtt = self.waiting.take().map(|at| at.elapsed()).or(carrier.rtt);
                }
                // Its answer waits in the socket.
                Some(Ok(Message::Ping(_))) => self.flushing = true,
                Some(Ok(Message::Close(frame))) => {
                    return Err(End::SentAway(self.said.take(), frame));
                }
                Some(Ok(Message::Frame(_))) => {}
                Some(Err(Error::ConnectionClosed)) | None if self.said.is_some() => {
                    return Err(End::SentAway(self.said.take(), None));
                }
                Some(Err(error)) => return Err(End::Lost(error.to_string())),
                None => return Err(End::Lost("the connection closed".to_owned())),
            }
        }
        Ok(true)
    }

    fn accept(
        &mut self,
        cx: &mut Context<'_>,
        data: &Bytes,
        carrier: &mut Carrier,
    ) -> Result<(), End> {
        for record in Reader::new(data) {
            if self.stride.is_due() {
                self.look(cx, carrier)?;
            }
            let Ok(record) = record else {
                return Err(End::Lost("the gateway sent a malformed record".to_owned()));
            };
            let (packet, offload) = (record.packet, record.offload);
            let judged = self.judge(packet, offload);
            let Some(parsed) = judged.filter(|_| offload == Offload::NONE || self.offload) else {
                carrier.inbound.dropped += 1;
                continue;
            };
            loop {
                match self
                    .coalescer
                    .offer(&mut carrier.packet, packet, &parsed, offload)
                {
                    Offer::Taken => break,
                    Offer::Flush => self.finish(carrier)?,
                    Offer::Pass => {
                        let mut head = [0; HEAD];
                        let (first, rest) = packet[..parsed.len()].split_at(parsed.len().min(HEAD));
                        let head = &mut head[..first.len()];
                        head.copy_from_slice(first);
                        let count = &mut carrier.inbound;
                        carrier.device.write(head, rest, &parsed, offload, count)?;
                        self.stride.wrote();
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes what was joined so far.
    fn finish(&mut self, carrier: &mut Carrier) -> Result<(), End> {
        let Some(kept) = self.coalescer.flush(&mut carrier.packet) else {
            return Ok(());
        };
        let packet = &mut carrier.packet[..kept.parsed.len()];
        let count = &mut carrier.inbound;
        let (parsed, offload) = (&kept.parsed, kept.offload);
        self.stride.wrote();
        carrier.device.write(packet, &[], parsed, offload, count)
    }

    /// A hostile gateway may send anything. Only what is a packet to the
    /// tunnel's own address gets into the device (CLI-09).
    fn judge(&self, packet: &[u8], offload: Offload) -> Option<Parsed> {
        let parsed = inbound(packet, offload, &self.limits).ok()?;
        let packet = &packet[..parsed.len()];
        let passes = self.is_mine(&parsed, packet, Side::Destination)
            && !self.is_mine(&parsed, packet, Side::Source)
            && !is_next_door(&parsed, packet)
            && parsed.header_len() <= packet.len().min(HEAD);
        passes.then_some(parsed)
    }

    fn is_mine(&self, parsed: &Parsed, packet: &[u8], side: Side) -> bool {
        match parsed.address(packet, side) {
            Some(IpAddr::V4(v4)) => v4 == self.v4,
            Some(IpAddr::V6(v6)) => Some(v6) == self.v6,
            None => false,
        }
    }

    /// Sends on what has come from the device while it was written to.
    fn look(&mut self, cx: &mut Context<'_>, carrier: &mut Carrier) -> Result<(), End> {
        let now = Instant::now();
        let before = self.looked.0;
        // All looks of a turn take no more than one drain does.
        while self.looked.0 < DRAIN_PACKETS && self.looked.1 < DRAIN_BYTES {
            let Some(n) = carrier.device.read_now(carrier.read.from(VIRTIO_LEN))? else {
                break;
            };
            self.take(n, carrier, now);
            self.looked.0 += 1;
            self.looked.1 += n;
        }
        let found = self.looked.0 > before;
        self.stride.looked(found);
        if found {
            self.send(cx, carrier, now)?;
        }
        Ok(())
    }

    /// Device to queue.
    fn drain(
        &mut self,
        cx: &mut Context<'_>,
        carrier: &mut Carrier,
        now: Instant,
    ) -> Result<bool, End> {
        let mut bytes = 0;
        for _ in 0..DRAIN_PACKETS {
            let n = match carrier.device.poll_read(cx, carrier.read.from(VIRTIO_LEN)) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Err(error)) => return Err(End::Device(error)),
                Poll::Ready(Ok(n)) => n,
            };
            self.take(n, carrier, now);
            bytes += n;
            if bytes >= DRAIN_BYTES {
                break;
            }
        }
        Ok(true)
    }

    fn take(&mut self, n: usize, carrier: &mut Carrier, now: Instant) {
        let micros = carrier.micros(now);
        let read = &mut carrier.read.from(VIRTIO_LEN)[..n];
        let judged = VirtioHeader::read(read).and_then(|virtio| {
            let packet = &read[VIRTIO_LEN..];
            let offload = virtio.offload();
            let parsed = inbound(packet, offload, &self.limits).ok()?;
            let mine = self.is_mine(&parsed, packet, Side::Source);
            // What the kernel says of its own accord (multicast, discovery) stays here.
            (mine && virtio.describes(&parsed)).then_some((parsed, offload))
        });
        let Some((parsed, offload)) = judged else {
            carrier.outbound.dropped += 1;
            return;
        };
        let mut meta = Meta {
            offload,
            header_len: u16::try_from(parsed.header_len()).unwrap_or(0),
        };
        let queue = &mut carrier.queue;
        if self.offload {
            queue.push_buffer(&mut carrier.read, parsed.len(), meta, micros);
            return;
        }
        // The gateway takes finished packets only. To cut them here costs one read of
        // the device and not one for each.
        let offload = std::mem::take(&mut meta.offload);
        let Ok(mut segments) = Segments::new(&mut read[VIRTIO_LEN..], &parsed, offload) else {
            carrier.outbound.dropped += 1;
            return;
        };
        while let Some(segment) = segments.cut() {
            queue.push(segment, meta, micros);
        }
        carrier.outbound.dropped += segments.left() as u64;
    }

    /// Queue to gateway, one flush at a time.
    fn send(
        &mut self,
        cx: &mut Context<'_>,
        carrier: &mut Carrier,
        now: Instant,
    ) -> Result<bool, End> {
        if self.flushing && !self.flush(cx, carrier.micros(now))? {
            return Ok(false);
        }
        let (mut fed, most) = (0, self.pace.most());
        let tcp = self.socket.get_mut().get_mut().get_mut().0;
        tcp.set(self.pace.is_slow());
        while fed < most.min(FLUSH_BYTES) {
            let Some(message) = carrier.build(most, now) else {
                break;
            };
            fed += message.len();
            self.given += message.len() as u64;
            let message = &mut carrier.message.bytes_mut()[message];
            let sent = self.socket.get_mut().message(cx, message);
            sent.map_err(|e| End::Lost(e.to_string()))?;
            self.flushing = true;
        }
        if self.flushing {
            return self.flush(cx, carrier.micros(now));
        }
        self.pace.empty();
        Ok(false)
    }

    /// Whether the socket took everything, so that more can follow.
    fn flush(&mut self, cx: &mut Context<'_>, now: u64) -> Result<bool, End> {
        let flushed = Pin::new(&mut *self.socket).poll_flush(cx).map_err(lost)?;
        self.flushing = flushed.is_pending();
        if self.flushing {
            self.pace.full();
        } else {
            self.pace.took(now, self.given);
        }
        Ok(!self.flushing)
    }

    /// The clock: keepalive, silence, the answer after a change.
    fn watch(&mut self, cx: &mut Context<'_>, aside: &mut Aside, now: Instant) -> Result<(), End> {
        let silence = patience(self.keepalive);
        if aside.is_open() && self.timer.deadline() > now + LOOK {
            self.timer.as_mut().reset(now + LOOK);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if now >= self.heard + silence {
                return Err(End::Lost(format!(
                    "nothing heard for {} s",
                    silence.as_secs()
                )));
            }
            if self.probe.is_some_and(|by| now >= by) {
                return Err(End::Lost("no answer after the network changed".to_owned()));
            }
            if now >= self.pinged + self.keepalive {
                self.ping();
                cx.waker().wake_by_ref();
            }
            aside.look();
            let mut next = (self.pinged + self.keepalive).min(self.heard + silence);
            if aside.is_open() {
                next = next.min(now + LOOK);
            }
            if let Some(by) = self.probe {
                next = next.min(by);
            }
            self.timer
                .as_mut()
                .reset(next.max(now + Duration::from_millis(1)));
        }
        Ok(())
    }
}

fn lost(error: Error) -> End {
    End::Lost(error.to_string())
}

/// From an address that says "on your own wire", as those do who advertise routes.
fn is_next_door(parsed: &Parsed, packet: &[u8]) -> bool {
    match parsed.address(packet, Side::Source) {
        Some(IpAddr::V4(v4)) => v4.is_link_local(),
        Some(IpAddr::V6(v6)) => v6.is_unicast_link_local(),
        None => true,
    }
}
