//! What the first demonstration did: everybody who listens at one path is sent
//! a text every few seconds, and what they say is counted and logged.
//!
//! It shows that a WebSocket gets through, without a tunnel behind it. It is off
//! unless configured, takes no lease and no packet, and lives on the control
//! runtime, so a data core never hears of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message;
use tracing::{Instrument, debug, info, info_span};

use crate::admit::Io;
use crate::auth::Grant;
use crate::config::Demo;
use crate::session::begin::monotonic;
use crate::session::transport::{Broken, Incoming, Socket};

/// Where it is.
pub const PATH: &str = "/ws/client";
/// What a browser calls it when it has a token to present beside it.
pub const SUBPROTOCOL: &str = "rvpn.demo.1";
/// What everybody is sent.
pub const TEXT: &str = "This is a test";
/// Longest message that is read.
pub const LIMIT: usize = 512;
/// Messages that are read between two texts; nobody has more to say by hand.
const MESSAGES: u32 = 100;
/// Texts in a row without any sign of life, after which nobody is there.
const SILENT: u32 = 6;
/// How long a text may take to leave, and a farewell likewise.
const SENDING: Duration = Duration::from_secs(5);

/// Those who listen.
#[derive(Debug)]
pub struct Audience {
    count: Arc<AtomicUsize>,
    stop: watch::Sender<bool>,
}

impl Default for Audience {
    fn default() -> Audience {
        Audience {
            count: Arc::default(),
            stop: watch::Sender::new(false),
        }
    }
}

impl Audience {
    /// A chair, if fewer than `limit` are taken.
    pub fn enter(&self, limit: usize) -> Option<Chair> {
        let more = |n: usize| (n < limit).then_some(n + 1);
        self.count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()?;
        Some(Chair {
            count: Arc::clone(&self.count),
            stop: self.stop.subscribe(),
        })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Sends everybody home.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }
}

/// A place in the audience, given up by dropping it.
#[derive(Debug)]
pub struct Chair {
    count: Arc<AtomicUsize>,
    stop: watch::Receiver<bool>,
}

impl Drop for Chair {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Somebody who may listen.
pub struct Guest {
    /// Its place.
    pub chair: Chair,
    /// Who it is; its place among the account's connections is in the stream.
    pub account: Arc<str>,
    /// Where it comes from.
    pub peer: IpAddr,
    /// Nobody in particular.
    pub anonymous: bool,
    /// When its right to be here ends by itself.
    pub expires_at: Option<SystemTime>,
    /// Turns true when it is taken back.
    pub revoked: watch::Receiver<bool>,
    /// The time between two texts.
    pub every: Duration,
}

impl Guest {
    /// Of a login.
    pub fn new(chair: Chair, grant: &Grant, config: &Demo, peer: IpAddr) -> Guest {
        Guest {
            chair,
            peer,
            account: Arc::clone(&grant.account),
            anonymous: config.anonymous,
            expires_at: grant.expires_at,
            revoked: grant.revoked.clone(),
            every: config.every,
        }
    }

    /// Entertains it until one of us has had enough.
    pub async fn run(self, io: Io, read_ahead: Bytes) {
        let span = info_span!("demo", account = %self.account, peer = %self.peer);
        self.listen(io, read_ahead).instrument(span).await;
    }

    async fn listen(mut self, io: Io, read_ahead: Bytes) {
        let mut socket = Socket::limited(io, read_ahead, LIMIT).await;
        let mut counted = Counted::default();
        self.note(&counted, "listener came");
        let end = self.talk(&mut socket, &mut counted).await;
        let parting = async {
            match end.said() {
                Some((code, reason)) => socket.close(code, reason).await,
                // Its close frame is answered by reading on.
                None => drop(socket.next().await),
            }
        };
        drop(timeout(SENDING, parting).await);
        self.note(&counted, end.why());
    }

    /// A line for the log. What strangers can trigger at will is for those who
    /// look closely.
    fn note(&self, counted: &Counted, what: &'static str) {
        let Counted { read, written } = counted;
        match self.anonymous {
            true => debug!(bytes_read = read, bytes_written = written, "{what}"),
            false => info!(bytes_read = read, bytes_written = written, "{what}"),
        }
    }

    /// A message as its bytes: as text it could pretend to be other lines.
    fn note_message(&self, counted: &Counted, bytes: &[u8]) {
        let Counted { read, written } = counted;
        match self.anonymous {
            true => debug!(
                bytes_read = read,
                bytes_written = written,
                ?bytes,
                "message"
            ),
            false => info!(
                bytes_read = read,
                bytes_written = written,
                ?bytes,
                "message"
            ),
        }
    }

    async fn talk(&mut self, socket: &mut Socket, counted: &mut Counted) -> End {
        let mut clock = interval_at(Instant::now() + self.every, self.every);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut left, mut unheard) = (MESSAGES, 0);
        let mut stop = self.chair.stop.clone();
        let mut revoked = self.revoked.clone();
        let expires = self.expires_at.map(monotonic);
        let expired = async {
            match expires {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(expired);
        loop {
            tokio::select! {
                () = told(&mut stop) => return End::Stopped,
                () = told(&mut revoked) => return End::Revoked,
                () = &mut expired => return End::Expired,
                _ = clock.tick() => {
                    left = MESSAGES;
                    unheard += 1;
                    if unheard > SILENT {
                        return End::Lost;
                    }
                    let sending = async {
                        socket.send(Message::text(TEXT)).await?;
                        // Every WebSocket answers this, so a dead line shows.
                        socket.send(Message::Ping(Bytes::new())).await
                    };
                    match timeout(SENDING, sending).await {
                        Ok(Ok(())) => counted.written += TEXT.len() as u64,
                        _ => return End::Lost,
                    }
                }
                message = socket.next() => {
                    unheard = 0;
                    let message = match &message {
                        Ok(Incoming::Text(text)) => text.as_bytes(),
                        Ok(Incoming::Data(data)) => data,
                        Ok(Incoming::Control) => &[],
                        Ok(Incoming::Close { .. }) => return End::Left,
                        Err(broken) => return End::of(broken),
                    };
                    let Some(fewer) = left.checked_sub(1) else {
                        return End::TooMuch;
                    };
                    left = fewer;
                    if !message.is_empty() {
                        counted.read += message.len() as u64;
                        self.note_message(counted, message);
                    }
                }
            }
        }
    }
}

/// Waits for a word that may never come.
async fn told(word: &mut watch::Receiver<bool>) {
    if word.wait_for(|w| *w).await.map(drop).is_err() {
        // Nobody is left who could say it.
        std::future::pending::<()>().await;
    }
}

/// Bytes of messages so far.
#[derive(Debug, Default)]
struct Counted {
    read: u64,
    written: u64,
}

/// Why it is over.
enum End {
    Left,
    Lost,
    Protocol,
    TooBig,
    TooMuch,
    Revoked,
    Expired,
    Stopped,
}

impl End {
    fn of(broken: &Broken) -> End {
        match broken {
            Broken::Lost => End::Lost,
            Broken::Protocol => End::Protocol,
            Broken::TooBig => End::TooBig,
        }
    }

    fn why(&self) -> &'static str {
        match self {
            End::Left => "listener left",
            End::Lost => "listener lost",
            _ => "listener sent away",
        }
    }

    /// Close code and reason, if anybody is there to read them.
    fn said(&self) -> Option<(u16, &'static str)> {
        Some(match self {
            End::Left | End::Lost => return None,
            End::Protocol => (1002, "WebSocket protocol error"),
            End::TooBig => (1009, "a message over 512 bytes"),
            End::TooMuch => (1008, "too many messages"),
            End::Revoked => (1008, "access was revoked"),
            End::Expired => (1008, "the token has expired"),
            End::Stopped => (1012, "the gateway restarts"),
        })
    }
}
