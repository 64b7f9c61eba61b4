//! Further connections beside the first, for many busy visitors.
//!
//! One connection is one core's work, here and at the gateway. Each of these
//! has a thread of its own here, lives on another core there, and serves under
//! the very names and ports that the first one got, so that the gateway
//! spreads visitors over all of them. One that is lost comes back by itself;
//! the first one alone decides when everything ends.

use std::sync::Arc;
use std::thread::JoinHandle;

use rvpn_proto::control::close;
use rvpn_proto::streams::{Message as Control, Serve, ServedAs};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use super::pump::{Came, End};
use super::visit::{self, House, News};
use super::{LATE, PARTING, STEADY, explain, open};
use crate::fail::{Outcome, While as _};
use crate::link::{Denied, goodbye};
use crate::profile::{Address, Profile};
use crate::up::carry::backoff;

/// What each of them needs to know.
pub(super) struct Task {
    pub(super) to: Address,
    pub(super) profile: Arc<Profile>,
    pub(super) connector: TlsConnector,
    pub(super) house: Arc<House>,
    /// Of the first; theirs are made from it.
    pub(super) instance: String,
    pub(super) wishes: Vec<Serve>,
}

/// A wish for what somebody got: its name and its port are known now.
pub(super) fn wish(first: Serve, at: &ServedAs) -> Serve {
    Serve {
        name: at.name.clone().or(first.name),
        port: at.port.or(first.port),
        ..first
    }
}

/// All of them; they end with this.
pub(super) struct Beside {
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Beside {
    /// Starts so many.
    pub(super) fn start(count: usize, task: Task) -> Outcome<Beside> {
        let task = Arc::new(task);
        let (stop, stopped) = watch::channel(false);
        let mut all = Beside {
            stop,
            threads: Vec::new(),
        };
        for n in 2..count + 2 {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .while_doing("start a connection of its own thread")?;
            let (task, stopped) = (Arc::clone(&task), stopped.clone());
            let thread = std::thread::Builder::new()
                .name(format!("serve-{n}"))
                .spawn(move || runtime.block_on(sessions(&task, n, stopped)))
                .while_doing("start a thread for a connection")?;
            all.threads.push(thread);
        }
        Ok(all)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for thread in self.threads.drain(..) {
            // Each says goodbye in bounded time. One that panicked has said so.
            let _panicked = thread.join();
        }
    }
}

/// One session after another, until told to stop or refused for good.
async fn sessions(task: &Task, n: usize, mut stop: watch::Receiver<bool>) {
    let instance = format!("{}-{n}", task.instance);
    let mut failures = 0;
    while !*stop.borrow() {
        let begun = Instant::now();
        let denied = match session(task, &instance, &mut stop).await {
            Ok(()) => return,
            Err(denied) => denied,
        };
        if begun.elapsed() > STEADY {
            failures = 0;
        }
        let wait = match denied.after {
            Some(after) => after.min(LATE),
            None => backoff(failures),
        };
        failures += 1;
        if !denied.again || failures == 1 {
            let why = format!("connection {n}: {}", denied.failure);
            // Whoever shows it may be behind.
            let _behind = task.house.news.try_send(News::Trouble { why });
        }
        if !denied.again {
            return;
        }
        tokio::select! {
            () = sleep(wait) => {}
            _ = stop.changed() => return,
        }
    }
}

/// One session, until told to stop.
async fn session(
    task: &Task,
    instance: &str,
    stop: &mut watch::Receiver<bool>,
) -> Result<(), Denied> {
    let mut pump = tokio::select! {
        opened = open(&task.to, &task.profile, &task.connector, instance) => opened?,
        _ = stop.changed() => return Ok(()),
    };
    for wish in &task.wishes {
        pump.say(&Control::Serve(wish.clone()));
    }
    let end = loop {
        tokio::select! {
            came = pump.next() => match came {
                Ok(Came::Visitor(stream)) => {
                    tokio::spawn(visit::welcome(Arc::clone(&task.house), stream));
                }
                Ok(Came::Said(said)) => if let Control::Refused(turned) = *said {
                    break Some(End::Wrong(format!("it does not serve the same twice: {}", turned.text)));
                },
                Err(end) => break Some(end),
            },
            _ = stop.changed() => break None,
        }
    };
    let mut socket = pump.into_socket();
    let over = matches!(end, Some(End::Lost(_) | End::SentAway(..)));
    if !over {
        let _late = timeout(PARTING, goodbye(&mut socket, close::NORMAL, "")).await;
    }
    match end {
        None => Ok(()),
        // What is refused now may be free when the one that has it is gone.
        Some(end) => Err(explain(&task.to, end, true)),
    }
}
