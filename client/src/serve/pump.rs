//! One connection to a gateway, for as long as it carries visitors.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink as _, Stream as _};
use rvpn_proto::control::{Goodbye, Stage, patience};
use rvpn_proto::streams::mux::Mux;
use rvpn_proto::streams::{MAX_SENT, Message as Control};
use tokio::net::TcpStream;
use tokio::task::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use super::stream::Stream;
use crate::link::Socket;

/// Messages and bytes of one turn.
const TURN_MESSAGES: usize = 256;
const TURN_BYTES: usize = 256 * 1024;
const TURN_SENDS: usize = 8;
/// Control messages that may wait to be sent.
const WAITING: usize = 256;

/// What came of a connection.
pub(super) enum Came {
    /// A visitor.
    Visitor(Stream),
    /// Something about what is served.
    Said(Box<Control>),
}

/// Why it carries nothing more.
pub(super) enum End {
    /// It broke.
    Lost(String),
    /// The gateway ended it.
    SentAway(Option<Goodbye>, Option<CloseFrame>),
    /// The gateway does what it may not.
    Wrong(String),
}

/// See the module.
pub(super) struct Pump {
    socket: Socket<TcpStream>,
    pub(super) mux: Mux,
    outgoing: VecDeque<Message>,
    flushing: bool,
    keepalive: Duration,
    timer: Pin<Box<Sleep>>,
    heard: Instant,
    said: Option<Goodbye>,
    message: Vec<u8>,
}

impl Pump {
    pub(super) fn new(socket: Socket<TcpStream>, mux: Mux, keepalive: Duration) -> Pump {
        let now = Instant::now();
        Pump {
            socket,
            mux,
            outgoing: VecDeque::new(),
            flushing: false,
            keepalive,
            timer: Box::pin(sleep_until(now + keepalive)),
            heard: now,
            said: None,
            message: Vec::new(),
        }
    }

    /// Sends a control message as soon as there is room.
    pub(super) fn say(&mut self, message: &Control) {
        // One of ours that is not valid would be a mistake here, and refused there.
        if let Ok(text) = message.to_text(Stage::Session)
            && self.outgoing.len() < WAITING
        {
            self.outgoing.push_back(Message::text(text));
        }
    }

    /// The connection, to part with it.
    pub(super) fn into_socket(self) -> Socket<TcpStream> {
        self.mux.end();
        self.socket
    }

    /// Carries, until something came that is not for a stream that is open.
    /// Giving up waiting loses nothing.
    pub(super) async fn next(&mut self) -> Result<Came, End> {
        // A turn is bounded here; tokio's own bound would end it in the middle.
        unconstrained(poll_fn(|cx| self.turn(cx))).await
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<Came, End>> {
        let now = Instant::now();
        let (came, more) = match self.receive(cx, now) {
            Ok(received) => received,
            Err(end) => return Poll::Ready(Err(end)),
        };
        let sent_all = match self.send(cx) {
            Ok(all) => all,
            Err(end) => return Poll::Ready(Err(end)),
        };
        if let Some(said) = came {
            return Poll::Ready(Ok(Came::Said(said)));
        }
        if let Poll::Ready(Some(handle)) = self.mux.poll_accept(cx) {
            return Poll::Ready(Ok(Came::Visitor(Stream::new(handle))));
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if now.saturating_duration_since(self.heard) >= patience(self.keepalive) {
                let why = "nothing was heard from it".to_owned();
                return Poll::Ready(Err(End::Lost(why)));
            }
            self.outgoing.push_back(Message::Ping(Bytes::new()));
            self.timer.as_mut().reset(now + self.keepalive);
            cx.waker().wake_by_ref();
        }
        if more || !sent_all {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// What was said, and whether there is more to read.
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        now: Instant,
    ) -> Result<(Option<Box<Control>>, bool), End> {
        let mut bytes = 0;
        for _ in 0..TURN_MESSAGES {
            let Poll::Ready(next) = Pin::new(&mut self.socket).poll_next(cx) else {
                return Ok((None, false));
            };
            self.heard = now;
            match next {
                None => return Err(End::Lost("it closed".to_owned())),
                Some(Err(error)) => return Err(End::Lost(error.to_string())),
                Some(Ok(Message::Binary(data))) => {
                    bytes += data.len();
                    let taken = self.mux.receive(&data);
                    taken.map_err(|fault| End::Wrong(fault.to_string()))?;
                }
                Some(Ok(Message::Text(text))) => match Control::parse(&text, Stage::Session) {
                    Ok(Control::Goodbye(goodbye)) => self.said = Some(goodbye),
                    Ok(said) => return Ok((Some(Box::new(said)), true)),
                    // Of a later version.
                    Err(rvpn_proto::control::ControlError::Unknown { .. }) => {}
                    Err(error) => return Err(End::Wrong(error.to_string())),
                },
                Some(Ok(Message::Close(frame))) => {
                    return Err(End::SentAway(self.said.take(), frame));
                }
                Some(Ok(_)) => self.flushing = true,
            }
            if bytes >= TURN_BYTES {
                break;
            }
        }
        Ok((None, true))
    }

    /// Whether all was sent that could be.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let lost = |e: tokio_tungstenite::tungstenite::Error| End::Lost(e.to_string());
        for _ in 0..TURN_SENDS {
            if self.flushing {
                match Pin::new(&mut self.socket).poll_flush(cx).map_err(lost)? {
                    Poll::Pending => return Ok(true),
                    Poll::Ready(()) => self.flushing = false,
                }
            }
            while let Some(message) = self.outgoing.pop_front() {
                Pin::new(&mut self.socket)
                    .start_send(message)
                    .map_err(lost)?;
                self.flushing = true;
            }
            if self.flushing {
                continue;
            }
            self.message.clear();
            if self
                .mux
                .poll_send(cx, &mut self.message, MAX_SENT)
                .is_pending()
            {
                return Ok(true);
            }
            let ahead = self.socket.get_mut();
            ahead
                .message(cx, &mut self.message)
                .map_err(|e| End::Lost(e.to_string()))?;
            self.flushing = true;
        }
        Ok(false)
    }
}
