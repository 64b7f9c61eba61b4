//! What a client costs that has nothing to say.

use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use rvpn_lab::tunnel_client::{Session, Speech, Target, on};
use rvpn_lab::{Gateway, Lab};
use tokio::sync::watch;
use tokio::task::JoinHandle as JoinTask;
use tokio::time::timeout;

use crate::cpu::{self, Who};

const SPEECH: Speech = Speech::Native { offload: true };
/// For all of them to be connected, and watched.
const CONNECTED: Duration = Duration::from_secs(200);
/// For what the first one left.
const SETTLE_FIRST: Duration = Duration::from_millis(300);
/// Handshakes under way at once.
const AT_ONCE: usize = 64;
/// For buffers that are given back when nothing comes.
const SETTLE: Duration = Duration::from_secs(3);
/// Between two looks at a connection on which nothing comes.
const AGAIN: Duration = Duration::from_secs(10);
/// In which nobody says anything.
const WATCHED: Duration = Duration::from_secs(5);

/// What so many clients cost.
pub(crate) struct Cost {
    pub(crate) clients: usize,
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

/// Clients that are connected and say nothing, until this is dropped.
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
            on(&phone, async || {
                // The first one pays for what all share.
                drop(Session::open(&target, SPEECH, &first).await);
                tokio::time::sleep(SETTLE_FIRST).await;
                let (kept, mut cost) = connect(&target, &tokens, &who, &stopped).await;
                cost.device = device;
                // Whoever asked may have given up.
                let _ = tell.send(cost);
                for task in kept {
                    // One that was cut off is counted by what it cost until then.
                    let _ = task.await;
                }
            });
        });
        let thread = Some(thread);
        let idle = Idle { stop, thread };
        let cost = told.recv_timeout(CONNECTED)?;
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

async fn connect(
    target: &Target,
    tokens: &[String],
    who: &Who,
    stopped: &watch::Receiver<bool>,
) -> (Vec<JoinTask<()>>, Cost) {
    let clients = tokens.len();
    let (user, kernel) = (private(who), cpu::kernel());
    let (begun, before) = (Instant::now(), spent(who));
    let open = tokens
        .iter()
        .map(|token| Session::open(target, SPEECH, token));
    let mut opened = stream::iter(open).buffer_unordered(AT_ONCE);
    let mut kept = Vec::with_capacity(clients);
    while let Some(mut session) = opened.next().await {
        let mut stopped = stopped.clone();
        // Reads on, so that the gateway's keepalive is answered.
        kept.push(tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = stopped.wait_for(|stop| *stop) => return,
                    // The laboratory fails one that waits too long in vain.
                    _ = timeout(AGAIN, session.rx.event()) => {}
                }
            }
        }));
    }
    drop(opened);
    let (connected, login) = (begun.elapsed(), spent(who) - before);
    tokio::time::sleep(SETTLE).await;
    let each = |all: f64| all / clients as f64;
    let user = private(who) - user;
    let kernel = cpu::kernel().saturating_sub(kernel) as f64;
    let before = spent(who);
    tokio::time::sleep(WATCHED).await;
    let quiet = (spent(who) - before) / WATCHED.as_secs_f64();
    let cost = Cost {
        clients,
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
