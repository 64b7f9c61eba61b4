//! What a client costs that has nothing to say.

use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use rvpn_lab::tunnel_client::{Session, Speech, Target, on};
use rvpn_lab::{Gateway, Helper, Lab};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::cpu::{self, Who};

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

/// Connects so many in a laboratory of their own.
pub(crate) fn cost(clients: usize) -> Cost {
    let lab = Lab::new();
    let kernel = cpu::kernel();
    let slots = format!("slots = {clients}\nmax-slots = {clients}\n");
    let helper = Helper::serving(&lab, &slots);
    let devices = cpu::kernel().saturating_sub(kernel);
    let limits = format!(
        "[limits]\nmax-clients = {}\npending-per-address = {}\n",
        clients + 16,
        clients + 16
    );
    let gateway = Gateway::start(&lab, &helper, &limits);
    let who = Who::Program(gateway.pid());
    let phone = lab.client("phone", 10);
    let target = Target::of(&gateway);
    let tokens: Vec<String> = (0..clients)
        .map(|n| gateway.token(&format!("idle-{n}")))
        .collect();
    on(&phone, async || {
        let speech = Speech::Native { offload: true };
        // The first one pays for what all share.
        let first = Session::open(&target, speech, &gateway.token("first")).await;
        drop(first);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (user, kernel) = (private(&who), cpu::kernel());
        let (begun, before) = (Instant::now(), spent(&who));
        let (stop, stopped) = watch::channel(false);
        let open = tokens
            .iter()
            .map(|token| Session::open(&target, speech, token));
        let mut opened = stream::iter(open).buffer_unordered(AT_ONCE);
        let mut kept = Vec::with_capacity(clients);
        while let Some(mut session) = opened.next().await {
            let mut stopped = stopped.clone();
            // Reads on, so that the gateway's keepalive is answered.
            kept.push(tokio::spawn(async move {
                loop {
                    tokio::select! {
                        _ = stopped.changed() => return,
                        // The laboratory fails one that waits too long in vain.
                        _ = timeout(AGAIN, session.rx.event()) => {}
                    }
                }
            }));
        }
        drop(opened);
        let (connected, login) = (begun.elapsed(), spent(&who) - before);
        tokio::time::sleep(SETTLE).await;
        let each = |all: f64| all / clients as f64;
        let user = private(&who) - user;
        let kernel = cpu::kernel().saturating_sub(kernel) as f64;
        let before = spent(&who);
        tokio::time::sleep(WATCHED).await;
        let quiet = (spent(&who) - before) / WATCHED.as_secs_f64();
        stop.send_replace(true);
        for task in kept {
            // One that was cut off is counted by what it cost until then.
            let _ = task.await;
        }
        Cost {
            clients,
            user: each(user),
            device: each(devices as f64),
            connection: each(kernel),
            connected,
            login: each(login * 1e3),
            quiet,
        }
    })
}

fn private(who: &Who) -> f64 {
    who.private().map_or(0.0, |kib| kib as f64)
}

fn spent(who: &Who) -> f64 {
    who.seconds().unwrap_or(0.0)
}
