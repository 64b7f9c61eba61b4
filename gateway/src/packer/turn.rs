//! The loop of one tunnel.
//!
//! One task owns the connection and is driven by polling. What a client sends
//! goes to its visitors at once; what they say is taken from each in turn and
//! only when the socket has taken the last, so that a client that does not read
//! slows its visitors down and costs nothing.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use rvpn_proto::packer::{Decoder, Limits, Piece};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_tungstenite::tungstenite::Message;

use super::bell::Number;
use super::carrier::Ask;
use super::tunnel::{Over, State};
use crate::cores::Load;
use crate::session::hub::Order;
use crate::session::mailbox::Mailbox;
use crate::session::transport::{Broken, Incoming, Socket, Transport};

/// Frames of a client that is logged in. What a visitor is sent may be longer
/// than a message: it is passed on as it comes.
pub(super) const LIMITS: Limits = Limits {
    data: 64 * 1024 * 1024,
    word: 16 * 1024,
};
/// Frames of a stranger: a token and the words around it.
pub(super) const STRANGER: Limits = Limits {
    data: 0,
    word: 5 * 1024,
};
/// All that a stranger may send.
const STRANGER_BYTES: u64 = 16 * 1024;

/// Work of one turn, after which the core's other tasks have theirs.
const TURN_BYTES: usize = 256 * 1024;
const TURN_MESSAGES: usize = 128;
const TURN_ASKS: usize = 64;
const TURN_SENDS: usize = 8;
/// What is given to the socket at once.
const FLUSH_BYTES: usize = 64 * 1024;

/// How long a visitor without room may hold up its tunnel.
const HELD: Duration = Duration::from_secs(1);
/// Silence after which the client is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(120);
/// The same when it has been sent something since.
const OWING: Duration = Duration::from_secs(15);
/// How long it has for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The same when somebody else wants to know.
const PROBED: Duration = Duration::from_secs(2);

/// A tunnel, running.
pub(super) struct Run {
    socket: Socket,
    pub(super) state: State,
    decoder: Decoder,
    asks: mpsc::Receiver<Ask>,
    orders: Mailbox<Order>,
    /// What has been read of the client and waits for room.
    input: Bytes,
    held: Option<Held>,
    /// Until when it must have logged in.
    login: Option<Instant>,
    clock: Clock,
    timer: Pin<Box<Sleep>>,
    flushing: bool,
    rung: Vec<Number>,
    buffer: Vec<u8>,
}

/// A visitor who holds up the tunnel.
struct Held {
    number: Number,
    bytes: Bytes,
    until: Instant,
}

/// Signs of life.
struct Clock {
    heard: Instant,
    /// Since when it owes us one.
    owing: Option<Instant>,
    /// When it must have given one.
    due: Option<Instant>,
    /// Bytes that the socket had taken when we looked the last time.
    taken: u64,
}

impl Clock {
    fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.owing = None;
        self.due = None;
    }

    /// When to ask, or to give up.
    fn next(&self) -> Instant {
        let ask = self.heard + SILENCE;
        let ask = self.owing.map_or(ask, |since| ask.min(since + OWING));
        self.due.unwrap_or(ask)
    }
}

impl Run {
    pub(super) fn new(
        socket: Socket,
        state: State,
        asks: mpsc::Receiver<Ask>,
        orders: Mailbox<Order>,
    ) -> Run {
        let now = Instant::now();
        let stranger = state.is_stranger();
        Run {
            login: stranger.then(|| now + state.desk.patience()),
            decoder: Decoder::new(if stranger { STRANGER } else { LIMITS }),
            clock: Clock {
                heard: now,
                owing: None,
                due: None,
                taken: 0,
            },
            timer: Box::pin(sleep_until(now)),
            input: Bytes::new(),
            held: None,
            flushing: false,
            rung: Vec::new(),
            buffer: Vec::new(),
            socket,
            state,
            asks,
            orders,
        }
    }

    /// Carries visitors until there is a reason to end.
    pub(super) async fn run(&mut self, load: &Load) -> Over {
        poll_fn(|cx| {
            let before = self.socket.wire();
            let over = self.turn(cx);
            let after = self.socket.wire();
            load.add(after.0 - before.0 + after.1 - before.1);
            if before != after {
                self.state.publish(after);
            }
            over
        })
        .await
    }

    /// Gives the connection away, with what is left to say in front of a farewell.
    pub(super) fn into_socket(mut self) -> Socket {
        self.state.end();
        while self.state.last_word(&mut self.buffer) {
            let word = Bytes::copy_from_slice(&self.buffer);
            if self.feed(Message::Binary(word)).is_err() {
                break;
            }
        }
        self.socket
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<Over> {
        let now = Instant::now();
        if let Poll::Ready(order) = self.orders.poll(cx) {
            return Poll::Ready(match order {
                Order::End { code, reason, .. } => Over::Close(code, reason),
                // There is no lease to hand over; nobody asks for it.
                Order::HandOver(_) => Over::Lost("continued elsewhere"),
            });
        }
        if let Poll::Ready(reason) = self.state.tokens.poll_over(cx) {
            return Poll::Ready(Over::Close(1008, reason));
        }
        let more = self.visitors(cx, now);
        let more = self
            .receive(cx, now)
            .map(|again| again | more)
            // Behind what asks for them, so that none is left unwatched.
            .and_then(|more| self.verdicts(cx).map(|()| more))
            .and_then(|more| Ok(self.send(cx, now)? | more));
        match more {
            Err(over) => return Poll::Ready(over),
            Ok(true) => cx.waker().wake_by_ref(),
            Ok(false) => {}
        }
        self.watch(cx, now)
    }

    /// Tokens that have been judged, and ports that have been opened.
    fn verdicts(&mut self, cx: &mut Context<'_>) -> Result<(), Over> {
        while let Some(first) = self.state.listening.front_mut() {
            let Poll::Ready(opened) = Pin::new(&mut first.opened).poll(cx) else {
                break;
            };
            let print = first.print;
            self.state.listening.pop_front();
            self.state.opened(print, opened.unwrap_or_default());
        }
        while let Some(first) = self.state.judging.front_mut() {
            let Poll::Ready(verdict) = Pin::new(&mut first.verdict).poll(cx) else {
                return Ok(());
            };
            let Some(judging) = self.state.judging.pop_front() else {
                return Ok(());
            };
            // Without a verdict the gateway is ending.
            let verdict = verdict.map_err(|_| Over::Close(1012, "the gateway restarts"))?;
            let stranger = self.state.is_stranger();
            self.state.judged(&judging, verdict)?;
            if stranger && !self.state.is_stranger() {
                self.login = None;
                self.decoder.set_limits(LIMITS);
            }
        }
        Ok(())
    }

    /// Visitors who come, and those who want something.
    fn visitors(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        self.look_after(cx, now);
        let mut more = true;
        for _ in 0..TURN_ASKS {
            match self.asks.poll_recv(cx) {
                Poll::Ready(Some(Ask::Open(visit, answer))) => {
                    if self.state.is_crowded() {
                        // Some may have gone just now.
                        self.look_after(cx, now);
                    }
                    // Whoever asked may have gone; then its end is dropped and rings.
                    drop(answer.send(self.state.open(visit, now)));
                }
                Poll::Ready(Some(Ask::Probe)) => {
                    let soon = now + PROBED;
                    let first = self.clock.due.is_none();
                    self.clock.due = Some(self.clock.due.map_or(soon, |due| due.min(soon)));
                    if first {
                        self.ping();
                    }
                }
                Poll::Ready(None) | Poll::Pending => {
                    more = false;
                    break;
                }
            }
        }
        more
    }

    /// Visitors who rang.
    fn look_after(&mut self, cx: &Context<'_>, now: Instant) {
        self.state.bell.answer(&mut self.rung, cx);
        for number in self.rung.drain(..) {
            self.state.look(number, now);
        }
    }

    /// Client to visitors.
    fn receive(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, Over> {
        let mut bytes = 0;
        for _ in 0..TURN_MESSAGES {
            if let Some(held) = &self.held {
                let (number, until) = (held.number, held.until);
                if !self.state.refill(number, &held.bytes) {
                    if now < until {
                        return Ok(false);
                    }
                    self.state.cut(number, now);
                }
                self.held = None;
            }
            self.decode(now)?;
            if self.held.is_some() {
                continue;
            }
            // Whoever does not read is not listened to.
            if self.state.is_full() || bytes >= TURN_BYTES {
                return Ok(bytes >= TURN_BYTES);
            }
            let Poll::Ready(message) = self.socket.poll_next(cx) else {
                return Ok(false);
            };
            self.clock.heard(now);
            if self.state.is_stranger() && self.socket.wire().0 > STRANGER_BYTES {
                return Err(Over::Close(1009, "too much before a login"));
            }
            match message.map_err(|broken| lost(&broken))? {
                Incoming::Data(data) => {
                    if data.is_empty() {
                        self.state.chatter(now)?;
                    }
                    bytes += data.len();
                    self.input = data;
                }
                Incoming::Text(_) => return Err(Over::Close(1003, "packer v1 is binary")),
                Incoming::Control => {
                    self.state.chatter(now)?;
                    // The answer to a ping waits in the transport.
                    self.flushing = true;
                }
                Incoming::Close { .. } => return Err(Over::Lost("the client closed")),
            }
        }
        Ok(true)
    }

    /// Frames out of what was read, up to one that finds no room.
    fn decode(&mut self, now: Instant) -> Result<(), Over> {
        let input = std::mem::take(&mut self.input);
        let mut rest = &input[..];
        while self.held.is_none() && !self.state.is_full() {
            let Some(piece) = self.decoder.next(&mut rest)? else {
                break;
            };
            match piece {
                Piece::Data { head, bytes, .. } => {
                    if let Some(number) = self.state.data(&head, bytes, now)? {
                        let until = now + HELD;
                        let bytes = input.slice_ref(bytes);
                        self.held = Some(Held {
                            number,
                            bytes,
                            until,
                        });
                    }
                }
                Piece::Word { head, body } => self.state.word(&head, body, now)?,
            }
        }
        if !rest.is_empty() {
            self.input = input.slice_ref(rest);
        }
        Ok(())
    }

    /// Visitors to client, one flush at a time.
    fn send(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, Over> {
        let full = self.state.is_full();
        for _ in 0..TURN_SENDS {
            if self.flushing {
                let flushed = self.socket.poll_flush(cx).map_err(|broken| lost(&broken))?;
                if flushed.is_pending() {
                    return Ok(full && !self.state.is_full());
                }
                self.flushing = false;
            }
            let mut fed = 0;
            while fed < FLUSH_BYTES && self.state.frame(&mut self.buffer, now) {
                fed += self.buffer.len();
                let frame = Bytes::from(std::mem::take(&mut self.buffer));
                self.feed(Message::Binary(frame.clone()))?;
                // The transport has copied it, so the memory is ours again.
                self.buffer = Vec::from(frame);
                self.clock.owing.get_or_insert(now);
            }
            if !self.flushing {
                if self.buffer.capacity() > FLUSH_BYTES / 4 {
                    self.buffer = Vec::new();
                }
                // Who had to read first may be listened to again.
                return Ok(full && !self.state.is_full());
            }
        }
        Ok(true)
    }

    fn feed(&mut self, message: Message) -> Result<(), Over> {
        self.flushing = true;
        self.socket.feed(message).map_err(|broken| lost(&broken))
    }

    fn ping(&mut self) {
        self.flushing = true;
        // A connection on which this fails tells so when it is flushed.
        drop(self.socket.feed(Message::Ping(Bytes::new())));
    }

    fn watch(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<Over> {
        if self.login.is_some_and(|until| until <= now) {
            return Poll::Ready(Over::Close(1008, "no login in time"));
        }
        if self.clock.next() <= now {
            let taken = self.socket.wire().1;
            let moved = taken != std::mem::replace(&mut self.clock.taken, taken);
            match self.clock.due {
                // It reads, slowly: the question is still on its way.
                Some(_) if moved && self.flushing => self.clock.due = Some(now + ANSWER),
                Some(_) => return Poll::Ready(Over::Close(1013, "connection timeout")),
                None => {
                    self.clock.due = Some(now + ANSWER);
                    self.ping();
                    cx.waker().wake_by_ref();
                }
            }
        }
        self.state.part(now);
        let next = [self.login, self.held.as_ref().map(|h| h.until)];
        let next = next.into_iter().chain([self.state.parting()]).flatten();
        let next = next.fold(self.clock.next(), Instant::min);
        if self.timer.deadline() != next {
            self.timer.as_mut().reset(next);
        }
        if self.timer.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

fn lost(broken: &Broken) -> Over {
    match broken {
        Broken::Lost => Over::Lost("the connection ended"),
        Broken::Protocol => Over::Close(1002, "WebSocket protocol error"),
        Broken::TooBig => Over::Close(1009, "message too big"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r_24_silence_is_asked_about_sooner_when_something_is_owed() {
        let start = Instant::now();
        let mut clock = Clock {
            heard: start,
            owing: None,
            due: None,
            taken: 0,
        };
        assert_eq!(clock.next(), start + SILENCE);
        clock.owing = Some(start + OWING);
        assert_eq!(clock.next(), start + 2 * OWING);
        clock.due = Some(start + ANSWER);
        assert_eq!(clock.next(), start + ANSWER);
        clock.heard(start + ANSWER);
        assert_eq!(clock.next(), start + ANSWER + SILENCE);
    }
}
