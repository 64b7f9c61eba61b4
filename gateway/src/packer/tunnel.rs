//! What a tunnel knows, and what it makes of frames.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rvpn_proto::packer::{
    Bodies, CAPACITY, Command, Failure, Fault, Frame, Head, Heard, NO_STREAM, ON_ITS_WAY, Profile,
    Turn, Word, code, failed, hello, succeeded,
};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::SERVICE;
use super::bell::{Bell, Number};
use super::carrier::Way;
use super::desk::Desk;
use super::ids::{Id, Ids, Who};
use super::pipe::{End, Ended, PARTING, Pipe};
use super::tokens::{self, Print, Tokens};
use crate::auth::{Denied, Grant};
use crate::limits::PendingPass;
use crate::serve::account::Carrying;
use crate::serve::{Carrier, OpenError, Visit};
use crate::session::Shared;
use crate::session::hub::{Card, Entry};

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
        if self.is_crowded() {
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

    fn control(&mut self, body: &[u8]) -> Result<(), Over> {
        let (id, command) = match Heard::parse(body) {
            Ok(Heard::Request { id, command }) => (id, command),
            Ok(Heard::Reply { .. } | Heard::Notice) => return Ok(()),
            Err(failure) => {
                self.command(&rvpn_proto::packer::notice(failure));
                return Ok(());
            }
        };
        let refuse = |code, message| Err(Failure { code, message });
        let done = match command {
            Command::AddToken(token) => return self.show(id, &token),
            Command::DeleteToken(Some(token)) => {
                // What is not there any more is gone as it should be.
                self.tokens.remove(&tokens::print(&token));
                Ok(())
            }
            Command::DeleteToken(None) => {
                self.tokens.clear();
                Ok(())
            }
            Command::Hello => Ok(()),
            Command::Pair => refuse(
                code::INVALID_TOKEN,
                "this gateway gives no tokens to clients; start the client with one",
            ),
            Command::Unknown => refuse(code::UNKNOWN_COMMAND, "unknown command"),
            Command::Malformed => refuse(code::BAD_COMMAND, "the command lacks what belongs to it"),
        };
        self.answer(id, done);
        Ok(())
    }

    fn answer(&mut self, id: i64, done: Result<(), Failure>) {
        let text = match done {
            Ok(()) => succeeded(id),
            Err(failure) => failed(id, failure),
        };
        self.command(&text);
    }

    /// Has a token judged, elsewhere.
    fn show(&mut self, id: i64, token: &str) -> Result<(), Over> {
        let print = tokens::print(token);
        if self.tokens.has(&print) {
            self.answer(id, Ok(()));
            return Ok(());
        }
        if self.judging.len() >= MOST_JUDGING {
            let message = "too many tokens at once";
            let code = code::BAD_COMMAND;
            self.answer(id, Err(Failure { code, message }));
            return Ok(());
        }
        let (answer, verdict) = oneshot::channel();
        let judged = self.desk.judge(token);
        self.shared.control.spawn(async move {
            // The tunnel may have ended meanwhile; then the place is given back.
            drop(answer.send(judged.await));
        });
        self.judging.push_back(Judging { id, print, verdict });
        Ok(())
    }

    /// A verdict has come.
    pub(super) fn judged(
        &mut self,
        judging: &Judging,
        verdict: Result<Grant, Denied>,
    ) -> Result<(), Over> {
        let grant = match verdict {
            Ok(grant) => grant,
            Err(why) => {
                let message = "invalid access token";
                let code = code::INVALID_TOKEN;
                self.answer(judging.id, Err(Failure { code, message }));
                self.wrong += 1;
                return match (why, self.is_stranger() && self.wrong >= MOST_WRONG) {
                    (Denied::TooMany, _) if self.is_stranger() => {
                        Err(Over::Close(1013, "too many connections of the account"))
                    }
                    (_, true) => Err(Over::Close(1008, "invalid access token")),
                    _ => Ok(()),
                };
            }
        };
        let done = self.login(judging.print, grant)?;
        self.answer(judging.id, done);
        if done.is_ok() {
            self.listen(judging.print);
        }
        Ok(())
    }

    /// Has the ports of a token listened on, and tells what was granted when
    /// that is known.
    pub(super) fn listen(&mut self, print: Print) {
        let Some((place, ports)) = self.tokens.doors(&print) else {
            return self.grant();
        };
        let (answer, opened) = oneshot::channel();
        self.shared.control.spawn(async move {
            let mut opened = Vec::new();
            for port in ports {
                match place.listen(port).await {
                    Ok(()) => opened.push(port),
                    Err(refused) => debug!(%refused, "a port is not served"),
                }
            }
            // The tunnel may have ended meanwhile; then its place goes with us.
            drop(answer.send(opened));
        });
        self.listening.push_back(Listening { print, opened });
    }

    /// The ports of a token are open, or will not be.
    pub(super) fn opened(&mut self, print: Print, ports: Vec<u16>) {
        self.tokens.opened(&print, ports);
        self.grant();
    }

    /// Takes a login: from here on the client is somebody.
    pub(super) fn login(
        &mut self,
        print: Print,
        grant: Grant,
    ) -> Result<Result<(), Failure>, Over> {
        let account = Arc::clone(&grant.account);
        let (subject, token_id) = (Arc::clone(&grant.subject), grant.token_id);
        let who = tokens::Who {
            table: &self.shared.table,
            carrier: Arc::clone(&self.way) as Arc<dyn Carrier>,
            peer: self.peer,
            instance: Arc::clone(&self.instance),
        };
        if let Err(failure) = self.tokens.add(print, grant, who) {
            return Ok(Err(failure));
        }
        if self.member.is_some() {
            return Ok(Ok(()));
        }
        if self.shared.hub.is_closed() {
            return Err(Over::Close(1012, "the gateway restarts"));
        }
        let row = Carrying::open(&self.shared.meter, &account, SERVICE).map_err(|error| {
            warn!(%error, "cannot begin a session");
            Over::Close(1013, "the gateway is out of resources")
        })?;
        let card = Card {
            id: row.number(),
            account,
            token_id,
            subject,
            service: SERVICE,
            peer: self.peer,
            started: SystemTime::now(),
            addresses: Vec::new(),
            slot: None,
            core: self.way.core,
            gauge: Arc::default(),
        };
        info!(account = %card.account, "client came");
        self.member = Some(Member {
            _entry: self.shared.hub.enter(card, self.way.orders.clone()),
            row,
        });
        self.pending = None;
        Ok(Ok(()))
    }

    /// Brings the meter up to date: visitors' bytes are counted where they are
    /// served, those of the wire here.
    pub(super) fn publish(&mut self, wire: (u64, u64)) {
        if let Some(member) = &mut self.member {
            member.row.wire(wire);
        }
    }

    /// Tells what was granted.
    fn grant(&mut self) {
        if self.profile.takes_grants() {
            let granted = self.tokens.granted(&self.host, self.port);
            self.command(&granted.command());
        }
    }

    /// Looks after a visitor who rang.
    pub(super) fn look(&mut self, number: Number, now: Instant) {
        let Some(visitor) = self.visitors.get_mut(&number) else {
            return;
        };
        let news = visitor.pipe.news();
        if news.data && !visitor.queued && !visitor.paused && !visitor.told {
            visitor.queued = true;
            self.ready.push_back(number);
        }
        let Some(how) = news.ended else {
            return self.turn(number, news.turn);
        };
        if !std::mem::replace(&mut visitor.parting, true) {
            self.parting.push_back((now, number));
        }
        self.turn(number, news.turn);
        // What it said before it ended in order is sent first.
        let unsaid = news.data && how == Ended::Clean && !news.deaf;
        if !unsaid {
            self.farewell(number, how, news.gone, now);
        }
    }

    /// A visitor has ended, and nothing of it is left to be sent.
    fn farewell(&mut self, number: Number, how: Ended, gone: bool, now: Instant) {
        let Some(visitor) = self.visitors.get_mut(&number) else {
            return;
        };
        let first = !std::mem::replace(&mut visitor.told, true);
        let heard = visitor.heard;
        // A client that never heard of it, or is done with it, need not hear
        // that it left.
        if first && visitor.begun && !heard {
            match how {
                Ended::Clean => self.say(number, Word::End, self.quiet()),
                Ended::Broken => {
                    let failure = Failure {
                        code: code::CLOSED,
                        message: "the visitor's connection broke",
                    };
                    let body = self.trouble(failure);
                    self.say(number, Word::Error, &body);
                }
            }
        }
        if gone {
            self.leave(number, heard, now);
        }
    }

    fn leave(&mut self, number: Number, done: bool, now: Instant) {
        if let Some(visitor) = self.visitors.remove(&number) {
            self.ids.leave(&visitor.id, done || !visitor.begun, now);
        }
    }

    /// When somebody's time to part is over.
    pub(super) fn parting(&self) -> Option<Instant> {
        self.parting.front().map(|(since, _)| *since + PARTING)
    }

    /// Cuts off visitors whose clients do not end them.
    pub(super) fn part(&mut self, now: Instant) {
        while self.parting().is_some_and(|at| at <= now)
            && let Some((_, number)) = self.parting.pop_front()
        {
            if let Some(visitor) = self.visitors.get(&number)
                && !visitor.heard
            {
                self.cut(number, now);
            }
        }
    }

    /// Puts the next frame that is no visitor's bytes into `buffer`, if there is one.
    pub(super) fn last_word(&mut self, buffer: &mut Vec<u8>) -> bool {
        buffer.clear();
        let word = self.words.pop_front();
        word.is_some_and(|word| {
            buffer.extend_from_slice(&word);
            true
        })
    }

    /// Puts the next frame to send into `buffer`, words first. False if there
    /// is none.
    pub(super) fn frame(&mut self, buffer: &mut Vec<u8>, now: Instant) -> bool {
        if self.last_word(buffer) {
            return true;
        }
        while let Some(number) = self.ready.pop_front() {
            let Some(visitor) = self.visitors.get_mut(&number) else {
                continue;
            };
            visitor.queued = false;
            if visitor.paused || visitor.told {
                continue;
            }
            visitor.pipe.take(&mut self.spare);
            let framed = match self.spare.is_empty() {
                true => false,
                false => {
                    visitor.begun = true;
                    let word = Word::Data(visitor.visit.service.as_str());
                    let frame = visitor.frame(word, &self.spare);
                    frame.encode(self.profile, buffer).is_ok()
                }
            };
            // It may have ended behind what was just taken.
            self.look(number, now);
            if framed {
                return true;
            }
        }
        false
    }

    /// Ends everybody: the client is gone.
    pub(super) fn end(&mut self) {
        // Nobody is sent here any more.
        self.tokens.clear();
        self.member = None;
        for visitor in self.visitors.values() {
            visitor.pipe.end(Ended::Broken);
        }
        self.visitors.clear();
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
