//! `rvpn serve`: servers of this machine, for the world.
//!
//! One connection to the gateway carries all visitors, each as a stream of its
//! own. Only what stands on the command line is ever dialled.

pub(crate) mod args;
mod auth;
mod beside;
mod control;
mod older;
mod proxy2;
mod pump;
mod show;
mod stream;
mod target;
mod visit;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use rvpn_proto::control::{Stage, close};
use rvpn_proto::streams::mux::{Limits, Mux, Side};
use rvpn_proto::streams::{
    Hello, MAX_RECEIVED, Message as Control, SUBPROTOCOL, ServedAs, Turned, VERSIONS, Welcome,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::Message;

use self::args::Serve;
use self::beside::Beside;
use self::control::{Asked, Question};
use self::pump::{Came, End, Pump};
use self::show::Show;
use self::target::Target;
use self::visit::{House, News};
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::link::{Denied, goodbye, sent_away, upgrade};
use crate::profile::{self, Address, Profile, program};
use crate::text::{shown, to_hex};
use crate::up::carry::backoff;
use crate::{reach, tls};

/// How long the upgrade, the welcome and the answers to all offers may each take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a goodbye may take.
const PARTING: Duration = Duration::from_secs(2);
/// The longest wait between attempts.
const LATE: Duration = Duration::from_secs(120);
/// A connection that lasted this long was a good one.
const STEADY: Duration = Duration::from_secs(10);
/// How often the line that lives is drawn.
const DRAW: Duration = Duration::from_millis(250);
/// What happened and was not shown yet; visitors do not wait for it.
const NEWS: usize = 1024;

/// Serves, and stays until it is told to end.
pub(crate) async fn run(args: Serve) -> Outcome {
    let words: Vec<&str> = args.targets.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["status"] => return control::status(args.json).await,
        ["stop"] => return control::stop(None).await,
        ["stop", which] => return control::stop(Some(which)).await,
        _ => {}
    }
    if !args.locals.is_empty() {
        return older::run(&args).await;
    }
    let targets = target::parse(&args.targets, &args.name, &args.port)?;
    let (gateway, profile) = profile::choose(&args.choice)?;
    let background = control::is_background();
    let secrets = match (args.auth, background) {
        (None, _) => String::new(),
        (Some(_), false) => auth::ask(args.auth_file.as_deref())?,
        (Some(_), true) => control::settle_in_background()?,
    };
    let accounts = match args.auth {
        None => None,
        Some(_) => Some(Arc::new(auth::Accounts::read(&secrets)?)),
    };
    if args.bg && !background {
        return control::detach(&secrets).await;
    }
    if background && args.auth.is_none() {
        control::settle_in_background()?;
    }
    let (listening, questions) = control::listen()?;
    let (news, heard) = mpsc::channel(NEWS);
    let connector = tls::connector(&profile.trust, tls::authorities(&profile.trust)?.as_deref())?;
    let mut server = Server {
        to: profile.address()?,
        instance: instance(&args, &profile, &targets),
        show: Show::new(gateway, targets.clone(), args.json),
        profile: Arc::new(profile),
        connector,
        connections: args.connections.into(),
        beside: None,
        house: Arc::new(House {
            targets,
            accounts,
            proxy_protocol: args.proxy_protocol,
            news,
        }),
        calls: Calls::new(questions)?,
        heard,
        failures: 0,
        welcomed: false,
    };
    let served = server.sessions().await;
    server.beside = None;
    drop(listening);
    if served.is_ok() {
        server.show.done();
    }
    served
}

/// Names this installation and what it serves: the same again takes over at
/// once, something else of the same installation is served beside it.
fn instance(args: &Serve, profile: &Profile, targets: &[Target]) -> String {
    let mut whole = match (&args.choice.server, &args.choice.token_file) {
        // Its profile is made anew each time.
        (Some(server), file) => format!("{server} {file:?} {:?}", nix::unistd::gethostname().ok()),
        _ => profile.instance.clone(),
    };
    for target in targets {
        let (name, port) = (&target.name, &target.public_port);
        whole.push_str(&format!("\n{target} {name:?} {port:?}"));
    }
    format!(
        "s{}",
        &to_hex(digest(&SHA256, whole.as_bytes()).as_ref())[..32]
    )
}

/// What interrupts whatever is being done.
struct Calls {
    questions: mpsc::Receiver<Asked>,
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Calls {
    fn new(questions: mpsc::Receiver<Asked>) -> Outcome<Calls> {
        let listen = |kind| signal(kind).while_doing("listen for signals");
        Ok(Calls {
            questions,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Answers questions until told to stop.
    async fn stop(&mut self, show: &mut Show) {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => return,
                _ = self.terminate.recv() => return,
                _ = self.hangup.recv() => return,
                asked = self.questions.recv() => {
                    let Some((question, answer)) = asked else { continue };
                    // Whoever asked may be gone.
                    let _gone = answer.send(show.status());
                    if question == Question::Stop {
                        return;
                    }
                }
            }
        }
    }
}

/// Everything a `serve` has.
struct Server {
    to: Address,
    instance: String,
    profile: Arc<Profile>,
    connector: TlsConnector,
    house: Arc<House>,
    show: Show,
    calls: Calls,
    heard: mpsc::Receiver<News>,
    /// Attempts that failed since the last success.
    failures: u32,
    /// It was served once.
    welcomed: bool,
    /// How many there are to be, with the first.
    connections: usize,
    /// The others, and what they serve.
    beside: Option<(Beside, BTreeMap<u32, ServedAs>)>,
}

impl Server {
    /// One session after another, until told to stop or refused for good.
    async fn sessions(&mut self) -> Outcome {
        loop {
            let begun = Instant::now();
            let denied = match self.session().await {
                Ok(()) => return Ok(()),
                Err(denied) => denied,
            };
            // What fails at once is the user's to see; what was served is served again.
            if !self.welcomed || !denied.again {
                return Err(denied.failure);
            }
            if begun.elapsed() > STEADY {
                self.failures = 0;
            }
            let wait = match denied.after {
                Some(after) => after.min(LATE),
                None => backoff(self.failures),
            };
            self.failures += 1;
            self.show.lost(&denied.failure.to_string(), wait);
            tokio::select! {
                () = sleep(wait) => {}
                () = self.calls.stop(&mut self.show) => return Ok(()),
            }
        }
    }

    /// One session, until told to stop.
    async fn session(&mut self) -> Result<(), Denied> {
        let opened = tokio::select! {
            opened = open(&self.to, &self.profile, &self.connector, &self.instance) => opened,
            () = self.calls.stop(&mut self.show) => return Ok(()),
        };
        let mut pump = opened?;
        for target in &self.house.targets {
            pump.say(&Control::Serve(target.wish()));
        }
        let end = self.carry(&mut pump).await;
        let mut socket = pump.into_socket();
        match end {
            Ok(()) => {
                let parting = goodbye(&mut socket, close::NORMAL, "");
                let _late = timeout(PARTING, parting).await;
                Ok(())
            }
            Err(Stop::Denied(denied)) => {
                let parting = goodbye(&mut socket, close::NORMAL, "");
                let _late = timeout(PARTING, parting).await;
                Err(denied)
            }
            Err(Stop::End(end)) => Err(explain(&self.to, end, self.welcomed)),
        }
    }

    /// The other connections serve what this one got.
    fn serve_beside(&mut self, served: &BTreeMap<u32, ServedAs>) -> Outcome {
        if self.connections < 2 || self.beside.as_ref().is_some_and(|(_, of)| of == served) {
            return Ok(());
        }
        // Those of before go first.
        self.beside = None;
        let wishes = self.house.targets.iter().map(|target| {
            let wish = target.wish();
            match served.get(&target.id) {
                Some(at) => beside::wish(wish, at),
                None => wish,
            }
        });
        let task = beside::Task {
            to: self.to.clone(),
            profile: Arc::clone(&self.profile),
            connector: self.connector.clone(),
            house: Arc::clone(&self.house),
            instance: self.instance.clone(),
            wishes: wishes.collect(),
        };
        let started = Beside::start(self.connections - 1, task)?;
        self.beside = Some((started, served.clone()));
        Ok(())
    }

    /// Visitors, until there is an end.
    async fn carry(&mut self, pump: &mut Pump) -> Result<(), Stop> {
        let mut answers = Answers::new(self.house.targets.len());
        let answered = sleep(PATIENCE);
        tokio::pin!(answered);
        let mut draw = interval(DRAW);
        loop {
            tokio::select! {
                came = pump.next() => match came.map_err(Stop::End)? {
                    Came::Visitor(stream) => {
                        tokio::spawn(visit::welcome(Arc::clone(&self.house), stream));
                    }
                    Came::Said(said) => {
                        if let Some(served) = answers.take(*said, self).map_err(Stop::Denied)? {
                            self.welcomed = true;
                            self.serve_beside(&served).map_err(|f| Stop::Denied(f.into()))?;
                            self.show.serving(served);
                        }
                    }
                },
                Some(news) = self.heard.recv() => self.show.news(&news),
                () = self.calls.stop(&mut self.show) => return Ok(()),
                () = &mut answered, if !answers.done => {
                    let text = format!("{} does not say whether it serves in {PATIENCE:?}", self.to);
                    return Err(Stop::Denied(Failure::unavailable(text).into()));
                }
                _ = draw.tick() => self.show.draw(),
            }
        }
    }
}

/// Why a session ended, and whether the next one may do better.
fn explain(to: &Address, end: End, welcomed: bool) -> Denied {
    match end {
        End::Lost(why) => {
            Failure::unavailable(format!("the connection to {to} broke: {why}")).into()
        }
        End::SentAway(said, frame) => {
            let replaced = said.as_ref().map(|g| g.code) == Some(close::NORMAL);
            let mut denied = sent_away(to, said, frame);
            if replaced {
                let text = "another 'rvpn serve' of the same took over";
                denied.failure = Failure::new(Kind::Unavailable, text);
            }
            denied
        }
        End::Wrong(why) => {
            let text = format!("{to} does not speak as it should: {why}");
            let mut denied = Denied::from(Failure::new(Kind::Protocol, text));
            // Whoever is in between must not be able to end it.
            denied.again = welcomed;
            denied
        }
    }
}

/// Why a session ends.
enum Stop {
    End(End),
    Denied(Denied),
}

/// The gateway's answers to our offers.
struct Answers {
    wanted: usize,
    served: BTreeMap<u32, ServedAs>,
    refused: Vec<Turned>,
    done: bool,
}

impl Answers {
    fn new(wanted: usize) -> Answers {
        Answers {
            wanted,
            served: BTreeMap::new(),
            refused: Vec::new(),
            done: false,
        }
    }

    /// Takes a message; when all offers are answered, and well, what is served.
    fn take(
        &mut self,
        said: Control,
        server: &mut Server,
    ) -> Result<Option<BTreeMap<u32, ServedAs>>, Denied> {
        match said {
            Control::Serving(serving) => {
                self.served.insert(serving.id, serving.at);
            }
            Control::Refused(turned) => self.refused.push(turned),
            Control::Counts(counts) => {
                server.show.counted(counts.turned_away);
                return Ok(None);
            }
            _ => return Ok(None),
        }
        if self.served.len() + self.refused.len() < self.wanted {
            return Ok(None);
        }
        self.done = true;
        let Some(first) = self.refused.first() else {
            return Ok(Some(self.served.clone()));
        };
        let target = server.house.targets.iter().find(|t| t.id == first.id);
        let target = target.map_or_else(String::new, |t| format!("{t} is not served: "));
        let remedy = match first.remedy.is_empty() {
            true => String::new(),
            false => format!("; {}", shown(&first.remedy)),
        };
        let text = format!("{target}{}{remedy}", shown(&first.text));
        let for_good = matches!(first.code.as_str(), "claim" | "reserved" | "name" | "port");
        let kind = match first.code.as_str() {
            "claim" | "reserved" | "port" | "taken" => Kind::Refused,
            "name" | "ending" => Kind::Usage,
            _ => Kind::Unavailable,
        };
        Err(Denied {
            failure: Failure::new(kind, text),
            // What another has now may be free later.
            again: !for_good,
            after: None,
        })
    }
}

/// Connects, logs in and is welcomed.
async fn open(
    to: &Address,
    profile: &Profile,
    connector: &TlsConnector,
    instance: &str,
) -> Result<Pump, Denied> {
    let token = profile.token()?;
    let tcp = reach::connect(to).await?;
    let tls = tls::handshake(connector, to, tcp).await?;
    let late =
        |what: &str| Failure::unavailable(format!("{to} does not finish {what} in {PATIENCE:?}"));
    let upgraded = upgrade(to, &token, SUBPROTOCOL, MAX_RECEIVED, tls);
    let mut socket = timeout(PATIENCE, upgraded)
        .await
        .map_err(|_| late("the upgrade"))??;
    let hello = Control::Hello(Hello {
        versions: VERSIONS.to_vec(),
        name: program(),
        instance: instance.to_owned(),
        keepalive_s: None,
    });
    let hello = hello
        .to_text(Stage::BeforeLogin)
        .while_doing("write a control message")?;
    let lost = |why: &dyn std::fmt::Display| {
        Failure::unavailable(format!("{to} ended the session before it began: {why}"))
    };
    let welcomed = async {
        use futures_util::{SinkExt as _, StreamExt as _};
        socket
            .send(Message::text(hello))
            .await
            .map_err(|e| lost(&e))?;
        let mut said = None;
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => match Control::parse(&text, Stage::Session) {
                    Ok(Control::Welcome(welcome)) => return Ok(welcome),
                    Ok(Control::Goodbye(goodbye)) => said = Some(goodbye),
                    Ok(_) => {}
                    Err(error) => {
                        let text = format!("{to} sends what is no welcome: {error}");
                        return Err(Failure::new(Kind::Protocol, text).into());
                    }
                },
                Some(Ok(Message::Close(frame))) => return Err(sent_away(to, said, frame)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Denied::from(lost(&error))),
                None => return Err(lost(&"the connection closed").into()),
            }
        }
    };
    let welcome: Welcome = timeout(PATIENCE, welcomed)
        .await
        .map_err(|_| late("its welcome"))??;
    if !VERSIONS.contains(&welcome.version) {
        let text = format!(
            "{to} speaks version {}, which is not known here",
            welcome.version
        );
        return Err(Failure::new(Kind::Protocol, text).into());
    }
    let limits = Limits {
        opened: 0,
        accepted: usize::try_from(welcome.limits.streams)
            .unwrap_or(usize::MAX)
            .min(rvpn_proto::streams::STREAMS),
        ..Limits::default()
    };
    let keepalive = Duration::from_secs(welcome.keepalive_s.clamp(1, 50).into());
    Ok(Pump::new(socket, Mux::new(Side::Client, limits), keepalive))
}
