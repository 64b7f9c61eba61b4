//! What a tunnel knows, and what it makes of frames.

mod commands;
mod farewell;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::packer::{
    Bodies, CAPACITY, Failure, Fault, Frame, Head, NO_STREAM, ON_ITS_WAY, Profile, Turn, Word,
    code, hello,
};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use super::bell::{Bell, Number};
use super::carrier::Way;
use super::desk::Desk;
use super::ids::{Id, Ids, Who};
use super::pipe::{End, Ended, Pipe};
use super::tokens::{Print, Tokens};
use crate::auth::{Denied, Grant};
use crate::limits::PendingPass;
use crate::serve::account::Carrying;
use crate::serve::{OpenError, Visit};
use crate::session::Shared;
use crate::session::hub::Entry;

/// Visitors of one client at once.
const MOST_VISITORS: usize = 4096;
/// Words that wait for the client to read; it is not read from meanwhile.
pub(super) const MOST_WORDS: usize = 256;
/// Tokens that are being judged at once.
const MOST_JUDGING: usize = 4;
/// Tokens that were not accepted before the connection is.
const MOST_WRONG: u32 = 3;
/// Frames for visitors the client never had, within a minute.
const MOST_ASTRAY: u32 = 16;
/// Commands and pings within a second.
const MOST_CHATTER: u32 = 500;

/// Why a tunnel ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// Nobody is there to be told.
    Lost(&'static str),
    /// The client is told.
    Close(u16, &'static str),
}

/// Broken frames: no other client is harmed, this one goes.
impl From<Fault> for Over {
    fn from(fault: Fault) -> Over {
        debug!(%fault, "a client sent what is no frame");
        Over::Close(
            1008,
            match fault {
                Fault::Version { .. } => "not a frame of packer v1",
                Fault::NotText => "a frame header that is not text",
                Fault::Fields { .. } => "a frame header with too few fields",
                Fault::Length => "a frame length that is not a number",
                Fault::TooLong { .. } => "a frame that is too long",
            },
        )
    }
}

/// Somebody who visits the client.
pub(super) struct Visitor {
    pub(super) pipe: Arc<Pipe>,
    id: Id,
    visit: Visit,
    name: String,
    /// The client knows of it.
    begun: bool,
    /// It stands in line with something to say.
    queued: bool,
    /// The client wants nothing of it for now.
    paused: bool,
    /// It has ended, and what it said before has been sent or never will be.
    told: bool,
    /// The client has ended it.
    heard: bool,
    /// Its time to part runs.
    parting: bool,
}

/// A token on its way to a verdict.
pub(super) struct Judging {
    id: i64,
    print: Print,
    pub(super) verdict: oneshot::Receiver<Result<Grant, Denied>>,
}

/// Ports of a token that are being opened.
pub(super) struct Listening {
    pub(super) print: Print,
    pub(super) opened: oneshot::Receiver<Vec<u16>>,
}

/// What a client that is logged in is counted and listed by.
struct Member {
    _entry: Entry,
    row: Carrying,
}

/// Counts what should be rare.
#[derive(Debug)]
struct Rare {
    since: Instant,
    count: u32,
}

impl Rare {
    /// Whether it is not, within `span`.
    fn is_often(&mut self, span: Duration, most: u32, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= span {
            self.since = now;
            self.count = 0;
        }
        self.count += 1;
        self.count > most
    }
}

/// The state of a tunnel: all but its connection.
pub(super) struct State {
    pub(super) shared: Arc<Shared>,
    pub(super) profile: Profile,
    pub(super) desk: Arc<dyn Desk>,
    pub(super) peer: SocketAddr,
    pub(super) host: Arc<str>,
    pub(super) port: u16,
    pub(super) way: Arc<Way>,
    pub(super) bell: Arc<Bell>,
    pub(super) tokens: Tokens,
    pub(super) judging: VecDeque<Judging>,
    pub(super) listening: VecDeque<Listening>,
    /// Tells it apart from others of its account.
    pub(super) instance: Arc<str>,
    /// What it is counted and listed by, once it is logged in.
    member: Option<Member>,
    /// Its place among strangers, until it is.
    pub(super) pending: Option<PendingPass>,
    visitors: HashMap<Number, Visitor>,
    ids: Ids,
    last: Number,
    /// Visitors with something to say, in turn.
    ready: VecDeque<Number>,
    /// Frames without visitors' bytes, which go first.
    words: VecDeque<Vec<u8>>,
    /// Visitors who have ended and whose clients have not, since when.
    parting: VecDeque<(Instant, Number)>,
    wrong: u32,
    astray: Rare,
    chatter: Rare,
    spare: Vec<u8>,
}

#[expect(clippy::too_many_arguments, reason = "each is a thing the tunnel owns")]
impl State {
    pub(super) fn new(
        shared: Arc<Shared>,
        profile: Profile,
        desk: Arc<dyn Desk>,
        peer: SocketAddr,
        host: Arc<str>,
        port: u16,
        way: Arc<Way>,
        instance: Arc<str>,
        pending: Option<PendingPass>,
    ) -> State {
        let now = Instant::now();
        let rare = || Rare {
            since: now,
            count: 0,
        };
        let mut state = State {
            shared,
            profile,
            desk,
            peer,
            host,
            port,
            way,
            bell: Arc::default(),
            tokens: Tokens::default(),
            judging: VecDeque::new(),
            listening: VecDeque::new(),
            instance,
            member: None,
            pending,
            visitors: HashMap::new(),
            ids: Ids::default(),
            last: 0,
            ready: VecDeque::new(),
            words: VecDeque::new(),
            parting: VecDeque::new(),
            wrong: 0,
            astray: rare(),
            chatter: rare(),
            spare: Vec::new(),
        };
        if profile.commands() {
            state.command(&hello(profile));
        }
        state
    }
}

impl State {
    /// Whether the client has not logged in.
    pub(super) fn is_stranger(&self) -> bool {
        self.member.is_none()
    }

    /// Whether it should read before it says more.
    pub(super) fn is_full(&self) -> bool {
        self.words.len() >= MOST_WORDS
    }

    /// Counts something that is neither data nor about a visitor.
    pub(super) fn chatter(&mut self, now: Instant) -> Result<(), Over> {
        let second = Duration::from_secs(1);
        match self.chatter.is_often(second, MOST_CHATTER, now) {
            true => Err(Over::Close(1008, "too many commands")),
            false => Ok(()),
        }
    }

    /// Says something that is about no visitor.
    pub(super) fn command(&mut self, json: &str) {
        let mut bytes = Vec::new();
        let frame = Frame::control(json.as_bytes());
        match frame.encode(self.profile, &mut bytes) {
            Ok(()) => self.words.push_back(bytes),
            Err(error) => debug!(%error, "a command was not said"),
        }
    }

    /// Says a word about a visitor.
    fn say(&mut self, number: Number, word: Word<'_>, body: &[u8]) {
        let Some(visitor) = self.visitors.get(&number) else {
            return;
        };
        let mut bytes = Vec::new();
        match visitor.frame(word, body).encode(self.profile, &mut bytes) {
            Ok(()) => self.words.push_back(bytes),
            Err(error) => debug!(%error, "a word was not said"),
        }
    }

    fn quiet(&self) -> &'static [u8] {
        match self.profile.bodies() {
            Bodies::Empty => b"",
            Bodies::Space => b" ",
        }
    }

    /// What went wrong, as far as this client wants to hear of it.
    fn trouble(&self, failure: Failure) -> Vec<u8> {
        match self.profile.commands() {
            true => failure.body().into_bytes(),
            false => self.quiet().to_vec(),
        }
    }

    /// Whether there is no room for another visitor.
    pub(super) fn is_crowded(&self) -> bool {
        self.visitors.len() >= MOST_VISITORS
    }

    /// Lets a visitor in.
    pub(super) fn open(&mut self, visit: Visit, now: Instant) -> Result<End, OpenError> {
        // Whoever comes and goes leaves words behind for a client that does not read.
        if self.is_crowded() || self.words.len() >= MOST_VISITORS {
            return Err(OpenError::Full);
        }
        self.last += 1;
        let number = self.last;
        let id = self.ids.give(visit.peer, number, now);
        let id = id.ok_or(OpenError::Full)?;
        let (pipe, end) = Pipe::new(Arc::clone(&self.bell), number);
        let visitor = Visitor {
            pipe,
            id,
            name: visit
                .name
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            visit,
            begun: self.profile.announces(),
            queued: false,
            paused: false,
            told: false,
            heard: false,
            parting: false,
        };
        self.visitors.insert(number, visitor);
        if self.profile.announces() {
            self.say(number, Word::Connection, b"");
        }
        Ok(end)
    }

    /// Bytes of a frame for a visitor. Gives back whom there is no room for.
    pub(super) fn data(
        &mut self,
        head: &Head<'_>,
        bytes: &[u8],
        now: Instant,
    ) -> Result<Option<Number>, Over> {
        if self.is_stranger() {
            return Err(Over::Close(1008, "log in first"));
        }
        if bytes.is_empty() {
            self.chatter(now)?;
        }
        let number = match self.ids.find(head.id) {
            Who::Here(number) => number,
            Who::Left { told } => {
                if !told {
                    self.ids.told(head.id);
                    self.unknown(head);
                }
                return Ok(None);
            }
            Who::Nobody => {
                self.unknown(head);
                let minute = Duration::from_secs(60);
                return match self.astray.is_often(minute, MOST_ASTRAY, now) {
                    true => Err(Over::Close(1008, "frames for visitors of nobody here")),
                    false => Ok(None),
                };
            }
        };
        let Some(visitor) = self.visitors.get(&number) else {
            return Ok(None);
        };
        if !visitor.pipe.fill(bytes, self.most_waiting()) {
            return Ok(Some(number));
        }
        self.flow(number);
        Ok(None)
    }

    /// What may wait for all visitors together.
    fn most_waiting(&self) -> usize {
        match self.profile.pauses() {
            true => self.visitors.len() * CAPACITY + ON_ITS_WAY,
            false => 0,
        }
    }

    /// Whether bytes that waited have found room.
    pub(super) fn refill(&mut self, number: Number, bytes: &[u8]) -> bool {
        let Some(visitor) = self.visitors.get(&number) else {
            return true;
        };
        if !visitor.pipe.has_room(bytes.len()) || !visitor.pipe.fill(bytes, self.most_waiting()) {
            return false;
        }
        self.flow(number);
        true
    }

    /// A visitor who takes too long is cut off, for the sake of the others.
    pub(super) fn cut(&mut self, number: Number, now: Instant) {
        let failure = Failure {
            code: code::TIMEOUT,
            message: "the visitor did not take what was sent",
        };
        let body = self.trouble(failure);
        self.say(number, Word::Error, &body);
        if let Some(visitor) = self.visitors.get(&number) {
            visitor.pipe.cut();
        }
        self.leave(number, false, now);
    }

    /// Tells the client to pause or go on, if it knows how.
    fn flow(&mut self, number: Number) {
        let Some(visitor) = self.visitors.get(&number) else {
            return;
        };
        let turn = visitor.pipe.turn();
        self.turn(number, turn);
    }

    fn turn(&mut self, number: Number, turn: Option<Turn>) {
        let Some(visitor) = self.visitors.get(&number) else {
            return;
        };
        if visitor.heard || !self.profile.pauses() {
            return;
        }
        match turn {
            Some(Turn::Pause(read)) => self.say(number, Word::Pause, read.to_string().as_bytes()),
            Some(Turn::Resume(read)) => {
                self.say(number, Word::Resume, read.to_string().as_bytes());
            }
            None => {}
        }
    }

    /// Bytes for nobody.
    fn unknown(&mut self, head: &Head<'_>) {
        let failure = Failure {
            code: code::NO_CONNECTION,
            message: "no matching connection",
        };
        let frame = Frame {
            id: head.id,
            word: Word::Error,
            service_port: head.service_port.parse().unwrap_or(0),
            name: head.name,
            speaks: "",
            body: &self.trouble(failure),
        };
        let mut bytes = Vec::new();
        if frame.encode(self.profile, &mut bytes).is_ok() {
            self.words.push_back(bytes);
        }
    }

    /// A frame that is not a visitor's bytes.
    pub(super) fn word(&mut self, head: &Head<'_>, body: &[u8], now: Instant) -> Result<(), Over> {
        if head.word == Word::Control {
            self.chatter(now)?;
            return self.control(body);
        }
        if head.id == NO_STREAM {
            // The oldest client refuses commands like this.
            return self.chatter(now);
        }
        if self.is_stranger() {
            return Err(Over::Close(1008, "log in first"));
        }
        let Who::Here(number) = self.ids.find(head.id) else {
            // Both sides may end a visitor at once.
            return Ok(());
        };
        let Some(visitor) = self.visitors.get_mut(&number) else {
            return Ok(());
        };
        match head.word {
            Word::End => {
                visitor.heard = true;
                visitor.pipe.end(Ended::Clean);
            }
            Word::Error => {
                visitor.heard = true;
                visitor.pipe.end(Ended::Broken);
            }
            Word::Pause => visitor.paused = true,
            Word::Resume => {
                visitor.paused = false;
                self.look(number, now);
            }
            Word::Connection | Word::Control | Word::Data(_) => {}
        }
        Ok(())
    }
}

impl Visitor {
    fn frame<'a>(&'a self, word: Word<'a>, body: &'a [u8]) -> Frame<'a> {
        Frame {
            id: &self.id,
            word,
            service_port: self.visit.port,
            name: &self.name,
            speaks: self.visit.service.as_str(),
            body,
        }
    }
}
