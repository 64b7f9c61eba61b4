//! What a client costs that has nothing to say.

use std::panic::AssertUnwindSafe;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::stream::{self, StreamExt};
use rvpn_lab::tunnel_client::{Event, Login, Session, Speech, Target};
use rvpn_lab::{Gateway, Lab};
use rvpn_proto::control::KEEPALIVE;
use tokio::sync::watch;
use tokio::task::JoinHandle as JoinTask;
use tokio::time::{Instant, interval_at};
use tokio_tungstenite::tungstenite::Message;

use crate::cpu::{self, Who};

const SPEECH: Speech = Speech::Native { offload: true };
/// The close code that says so, how often it is heeded, and how long.
const LATER: u16 = 1013;
const TRIES: u32 = 20;
const WAIT: Duration = Duration::from_millis(500);
/// For all of them to be connected, and watched.
const CONNECTED: Duration = Duration::from_secs(200);
/// For what the first one left.
const SETTLE_FIRST: Duration = Duration::from_millis(300);
/// Handshakes under way at once.
const AT_ONCE: usize = 32;
/// For buffers that are given back when nothing comes.
const SETTLE: Duration = Duration::from_secs(3);
/// In which nobody says anything.
const WATCHED: Duration = Duration::from_secs(5);

/// What so many clients cost.
pub(crate) struct Cost {
    pub(crate) clients: usize,
    /// Those of them that were not let in, or did not stay.
    pub(crate) missing: usize,
    /// Private memory of the gateway for each, in KiB.
    pub(crate) user: f64,
    /// The kernel's for a lease's device, before anybody has it, in KiB.
    pub(crate) device: f64,
    /// The kernel's for a connection, both of its ends on this machine, in KiB.
    pub(crate) connection: f64,
    pub(crate) connected: Duration,
    /// Gateway CPU for one login, in milliseconds.
    pub(crate) login: f64,
    /// Share of one CPU that all of them cost while quiet.
    pub(crate) quiet: f64,
}

/// Clients that are connected and say nothing but that they are there, until this is dropped.
pub(crate) struct Idle {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Idle {
    /// Connects so many, and says what they cost; a device costs so many KiB.
    pub(crate) fn connect(
        lab: &Lab,
        gateway: &Gateway,
        clients: usize,
        device: f64,
    ) -> Result<(Idle, Cost), Box<dyn std::error::Error>> {
        let phone = lab.client("phone", 10);
        let who = Who::Program(gateway.pid());
        let target = Target::of(gateway);
        let first = gateway.token("first");
        let names = (0..clients).map(|n| gateway.token(&format!("idle-{n}")));
        let tokens: Vec<String> = names.collect();
        let (stop, stopped) = watch::channel(false);
        let (tell, told) = channel();
        let thread = std::thread::spawn(move || {
            // Those that are there are answered for while others connect.
            phone.run(|| {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()
                    .expect("runtime");
                let part = async {
                    // The first one pays for what all share.
                    drop(open(&target, &first).await);
                    tokio::time::sleep(SETTLE_FIRST).await;
                    let (kept, mut cost) = connect(&target, &tokens, &who, &stopped).await;
                    cost.device = device;
                    // Whoever asked may have given up.
                    let _ = tell.send(cost);
                    for task in kept {
                        // One that was cut off is counted by what it cost until then.
                        let _ = task.await;
                    }
                };
                runtime.block_on(part);
            });
        });
        let thread = Some(thread);
        let idle = Idle { stop, thread };
        let cost = told.recv_timeout(CONNECTED)?;
        if cost.missing * 100 > clients {
            return Err(format!("{} of them were not let in or did not stay", cost.missing).into());
        }
        Ok((idle, cost))
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // What it had to say it has said.
            let _ = thread.join();
        }
    }
}

/// A session; one that is told to come again later does so.
async fn open(target: &Target, token: &str) -> Option<Session> {
    for _ in 0..TRIES {
        let login = Login::default();
        match Session::try_open(target, SPEECH, SPEECH.path(), Some(token), login).await {
            Ok(session) => return Some(session),
            Err(closed) if closed.code == LATER => tokio::time::sleep(WAIT).await,
            Err(closed) => {
                eprintln!("an idle client was not let in: {closed:?}");
                return None;
            }
        }
    }
    None
}

async fn connect(
    target: &Target,
    tokens: &[String],
    who: &Who,
    stopped: &watch::Receiver<bool>,
) -> (Vec<JoinTask<()>>, Cost) {
    let clients = tokens.len();
    let (user, kernel) = (private(who), cpu::kernel());
    let (begun, before) = (Instant::now(), spent(who));
    // One that panics, because nothing came in time, is one that is missing.
    let open = tokens.iter().map(|token| async move {
        let opened = AssertUnwindSafe(open(target, token)).catch_unwind().await;
        opened.unwrap_or_default()
    });
    let mut opened = stream::iter(open).buffer_unordered(AT_ONCE);
    let mut kept = Vec::with_capacity(clients);
    while let Some(session) = opened.next().await {
        let Some(mut session) = session else {
            continue;
        };
        let mut stopped = stopped.clone();
        // It pings as every client does; without that it would be given up while
        // the others connect.
        kept.push(tokio::spawn(async move {
            let mut pings = interval_at(Instant::now() + KEEPALIVE, KEEPALIVE);
            loop {
                tokio::select! {
                    () = async { drop(stopped.wait_for(|stop| *stop).await) } => return,
                    _ = pings.tick() => {
                        let ping = Message::Ping(Bytes::new());
                        if session.tx.try_message(ping).await.is_err() {
                            return;
                        }
                    }
                    said = session.rx.wait() => {
                        if matches!(said, Event::Closed(_)) {
                            return;
                        }
                    }
                }
            }
        }));
    }
    drop(opened);
    let (connected, login) = (begun.elapsed(), spent(who) - before);
    tokio::time::sleep(SETTLE).await;
    let there = || kept.iter().filter(|task| !task.is_finished()).count();
    let counted = there().max(1) as f64;
    let each = |all: f64| all / counted;
    let user = private(who) - user;
    let kernel = cpu::kernel().saturating_sub(kernel) as f64;
    let before = spent(who);
    tokio::time::sleep(WATCHED).await;
    let quiet = (spent(who) - before) / WATCHED.as_secs_f64();
    let cost = Cost {
        clients,
        missing: clients - there(),
        user: each(user),
        device: 0.0,
        connection: each(kernel),
        connected,
        login: each(login * 1e3),
        quiet,
    };
    (kept, cost)
}

fn private(who: &Who) -> f64 {
    who.private().map_or(0.0, |kib| kib as f64)
}

fn spent(who: &Who) -> f64 {
    who.seconds().unwrap_or(0.0)
}
