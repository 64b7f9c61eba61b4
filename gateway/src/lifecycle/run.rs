//! The locked-in process: start the parts, serve, end in order.

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};
use tracing::{error, info, warn};

use super::Failure;
use super::prepare::{Admin, Prepared};
use crate::acme::Wish;
use crate::admit::Sessions as _;
use crate::api::{self, Desk};
use crate::auth::{Gate, OpenError};
use crate::config::{Config, Listener, Secret};
use crate::cores::Cores;
use crate::fd;
use crate::heap::Heap;
use crate::helper::{Helper, HelperConfig};
use crate::http::Front;
use crate::meter::flush::{Flusher, UsageStore, now_ms};
use crate::meter::{Meter, Orphan};
use crate::pump::budget::PROCESS;
use crate::session::{Sessions, Settings, Shared};
use crate::store::{Sqlite, Store};
use crate::ticket::TicketKey;
use crate::tls::Tls;

const STORE_FILE: &str = "store.db";
const TICKET_FILE: &str = "ticket.key";
/// Threads for strangers, the API and the helper's socket.
const CONTROL_THREADS: usize = 2;
/// How long the helper may take to come up beside us.
const HELPER_WAIT: Duration = Duration::from_secs(10);
/// Rows of the meter for each client: its connections.
const ROWS_OF_CLIENT: usize = 4;
/// And for names that clients serve, whoever they are.
const ROWS_OF_NAMES: usize = 32_768;
/// How long connections without a login may go on at a shutdown.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

pub(super) fn run(prepared: Prepared) -> Result<(), Failure> {
    let config = &prepared.config;
    let internal =
        |what: &'static str| move |e: io::Error| Failure::Internal(anyhow!("{what}: {e}"));
    let engine = Sqlite::open(&config.state_dir.join(STORE_FILE))
        .map_err(|e| Failure::Internal(e.into()))?;
    let store = Store::start(engine).map_err(internal("cannot start the store"))?;
    let gate = Gate::open(config, store.clone()).map_err(|error| match error {
        OpenError::Key(e) => Failure::Config(e.into()),
        OpenError::Store(e) => Failure::Internal(e.into()),
    })?;
    let tls = Tls::load(config).map_err(|e| Failure::Config(e.into()))?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("rvpn-control")
        .enable_all()
        .build()
        .map_err(internal("cannot start the control runtime"))?;
    runtime.block_on(serve(prepared, store, Arc::new(gate), Arc::new(tls)))
}

async fn serve(
    prepared: Prepared,
    store: Store,
    gate: Arc<Gate>,
    tls: Arc<Tls>,
) -> Result<(), Failure> {
    let Prepared {
        path,
        config,
        public,
        admin,
    } = prepared;
    let config = Arc::new(config);
    let (shared, translated) = start_sessions(&config, &store).await?;
    let sessions = Sessions(Arc::clone(&shared));
    let front = Front::new(
        Arc::clone(&config),
        Arc::clone(&gate),
        tls,
        Arc::new(sessions.clone()),
    );
    let wish = {
        let front = Arc::clone(&front);
        move || Wish::of(&front)
    };
    // Before anybody comes who would see another certificate.
    front.acme.prepare(&wish());
    front.listeners.forbid(translated);
    let mut tasks = JoinSet::new();
    for ((socket, origin), settings) in public.into_iter().zip(&config.listeners) {
        let listeners = &front.listeners;
        let adopted = listeners.adopt(&front, socket, settings.clone(), origin);
        adopted.map_err(|e| Failure::Internal(e.into()))?;
    }
    let (token, socket) = admin_socket(&config, admin).map_err(Failure::Internal)?;
    let started = Instant::now();
    let desk = |token| {
        Arc::new(Desk {
            front: Arc::clone(&front),
            directory: Arc::new(sessions.clone()),
            token,
            started,
        })
    };
    // Where strangers come too nobody gets in by the permissions of a file.
    let shown = admin_secret(&config).map_err(Failure::Internal)?;
    front.office.get_or_init(|| api::router(desk(Some(shown))));
    let desk = desk(token);
    // The API outlives the listeners: it is how one sees a shutdown go on.
    let (quiet_tx, quiet) = watch::channel(false);
    let mut last = JoinSet::new();
    last.spawn(api::run(socket, api::router(desk), quiet.clone()));
    let flusher = Flusher::new(
        Arc::clone(&shared.meter),
        Arc::new(store),
        &config.state_dir,
    );
    let cores = Arc::clone(&shared);
    let heap = Heap::default();
    last.spawn(flusher.run(quiet, move || {
        cores.cores.measure();
        heap.tend(cores.hub.came(), cores.cores.rate());
    }));
    tasks.spawn(async move {
        gate.ring().warm_up().await;
    });
    tasks.spawn(Arc::clone(&front.acme).run(wish));
    // Before anybody is told that we are ready: a signal that nobody watches for kills.
    let signals = Signals::watch().map_err(Failure::Internal)?;
    greet(&config, &front);
    tasks.spawn(watchdog());

    let reload = || reload(&path, &front);
    signals.wait_for_the_end(reload).await;

    info!("shutting down");
    tell(&[NotifyState::Stopping]);
    front.stop();
    front.listeners.close().await;
    let deadline = Instant::now() + config.limits.drain_time;
    sessions.drain(config.limits.drain_time).await;
    let left = connections_left(&front.gate, deadline).await;
    strangers_left(&front).await;
    if left > 0 {
        warn!(
            connections = left,
            "some clients did not take their leave in time"
        );
    }
    quiet_tx.send_replace(true);
    while last.join_next().await.is_some() {}
    tasks.shutdown().await;
    info!("done");
    Ok(())
}

/// Lets whoever has just come hear an answer. Those who say nothing do not hold
/// the shutdown up.
async fn strangers_left(front: &Front) {
    let mut look = interval(Duration::from_millis(10));
    let deadline = Instant::now() + LAST_ANSWERS;
    while front.pending.count() > 0 && Instant::now() < deadline {
        look.tick().await;
    }
}

/// Waits until all connections are closed: a session that has ended may still
/// be telling its client why. Returns how many are not.
async fn connections_left(gate: &Gate, deadline: Instant) -> usize {
    let mut look = interval(Duration::from_millis(10));
    while gate.connections() > 0 && Instant::now() < deadline {
        look.tick().await;
    }
    gate.connections()
}

/// The sessions, and the ports that the helper translates connections to.
async fn start_sessions(
    config: &Config,
    store: &Store,
) -> Result<(Arc<Shared>, (u16, u16)), Failure> {
    let helper = Helper::start(HelperConfig {
        socket: config.helper.socket.clone(),
        uid: config.helper.uid,
        successor: false,
    });
    let pool = timeout(HELPER_WAIT, helper.ready()).await.ok().flatten();
    let Some(pool) = pool else {
        return Err(Failure::Unavailable(anyhow!(
            "the helper does not answer at {}; start rvpn-privhelper first, or correct helper.socket and helper.user",
            config.helper.socket.display()
        )));
    };
    let translated = (pool.nat_low, pool.nat_high);
    check_nat_range(&config.listeners, translated).map_err(|e| Failure::Config(anyhow!(e)))?;
    if pool.slots as usize > config.limits.max_clients {
        warn!(
            slots = pool.slots,
            max_clients = config.limits.max_clients,
            "the helper's pool is larger than limits.max-clients; the rest of it stays unused"
        );
    }
    let internal =
        |what: &'static str, e: &dyn std::fmt::Display| Failure::Internal(anyhow!("{what}: {e}"));
    let dir = config.state_dir.clone();
    let adopting = store.clone();
    let adopted = tokio::task::spawn_blocking(move || adopt_own(&dir, &adopting)).await;
    adopted
        .map_err(|e| internal("meter", &e))?
        .map_err(Failure::Internal)?;
    let rows = config.limits.max_clients * ROWS_OF_CLIENT + ROWS_OF_NAMES;
    let meter = Meter::create(&config.state_dir, rows).map_err(|e| internal("meter", &e))?;
    let tickets = TicketKey::load_or_create(&config.state_dir.join(TICKET_FILE))
        .map_err(|e| internal("tickets", &e))?;
    let count = match config.session.cores {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        count => count,
    };
    let cores =
        Cores::start(count, config.session.pin).map_err(|e| internal("data threads", &e))?;
    PROCESS.set(config.limits.queue_memory);
    let settings = Settings {
        ticket_life: config.session.ticket_life,
        dns: config.session.dns.clone(),
        routes: config.session.routes.clone(),
    };
    let shared = Shared::new(cores, helper, Arc::new(meter), tickets, settings);
    Ok((shared, translated))
}

/// Closes the accounts of a dead process that had our number, which is the rule
/// in a container: its file is in the way of ours.
fn adopt_own(dir: &Path, store: &Store) -> anyhow::Result<()> {
    let (orphans, _) = Orphan::find(dir).context("cannot look for meter files")?;
    for orphan in orphans {
        let rows = orphan.usage(now_ms());
        store.put_usage(&rows).map_err(|e| anyhow!(e))?;
        info!(
            sessions = rows.len(),
            "closed the sessions of a dead process"
        );
        orphan.remove().context("cannot remove a meter file")?;
    }
    Ok(())
}

/// No listener may be where translated connections come from: a client could
/// then receive what is meant for the gateway.
pub fn check_nat_range(listeners: &[Listener], (low, high): (u16, u16)) -> Result<(), String> {
    let inside = |l: &&Listener| (low..=high).contains(&l.address.port());
    match listeners.iter().find(inside) {
        None => Ok(()),
        Some(listener) => Err(format!(
            "listener {}: ports {low} to {high} are where the clients' connections leave from; use another port, or move nat-ports in the helper's configuration",
            listener.address
        )),
    }
}

fn admin_secret(config: &Config) -> anyhow::Result<Secret> {
    api::admin_token(&config.state_dir).context("cannot use admin.token in the state directory")
}

fn admin_socket(config: &Config, admin: Admin) -> anyhow::Result<(Option<Secret>, api::Socket)> {
    Ok(match admin {
        Admin::Tcp(tcp) => {
            let token = admin_secret(config)?;
            (Some(token), api::Socket::Tcp(TcpListener::from_std(tcp)?))
        }
        Admin::Unix(unix) => (None, api::Socket::Unix(UnixListener::from_std(unix)?)),
    })
}

fn greet(config: &Config, front: &Front) {
    let at: Vec<SocketAddr> = config.listeners.iter().map(|l| l.address).collect();
    if front.tls.self_signed() {
        info!(fingerprint = %front.tls.fingerprint(), "self-signed certificate; clients pin this SHA-256");
    }
    if !fd::can_go_far() {
        info!(
            "bbr is not allowed here: clients far away are slower, many times where packets \
             are lost. README, \"Clients that are far away\", has the three lines that allow it"
        );
    }
    info!(listeners = ?at, admin = %config.admin, "ready");
    tell(&[NotifyState::Ready, NotifyState::Status("serving")]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "cannot tell the service manager");
    }
}

/// Shows the service manager that the control runtime turns.
async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return pending().await;
    };
    let mut clock = interval(limit / 3);
    loop {
        clock.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

/// What the process is told by signals.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From here on they are ours to handle.
    fn watch() -> anyhow::Result<Signals> {
        let on = |kind| signal(kind).context("cannot watch for signals");
        Ok(Signals {
            hangup: on(SignalKind::hangup())?,
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
        })
    }

    async fn wait_for_the_end(mut self, reload: impl Fn()) {
        loop {
            tokio::select! {
                _ = self.hangup.recv() => {
                    if let Ok(now) = NotifyState::monotonic_usec_now() {
                        tell(&[NotifyState::Reloading, now]);
                    }
                    reload();
                    tell(&[NotifyState::Ready]);
                }
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
            }
        }
    }
}

/// Takes over a changed configuration, all of it or nothing. Who is connected
/// stays so.
fn reload(path: &Path, front: &Arc<Front>) {
    match try_reload(path, front) {
        Ok(kept) => {
            for what in kept {
                warn!(what, "changed, but stays as it was until a restart");
            }
            info!("configuration reloaded");
        }
        Err(why) => error!(
            why = format!("{why:#}"),
            "the configuration was not reloaded; the old one stays in force"
        ),
    }
}

/// Puts the file's configuration in force, or changes nothing.
fn try_reload(path: &Path, front: &Arc<Front>) -> anyhow::Result<Vec<&'static str>> {
    let mut config = Config::load(path, |name| std::env::var(name).ok())?;
    let kept = config.keep_fixed(&front.config());
    let certificate = Tls::prepare(&config)?;
    let keys = Gate::prepare(&config)?;
    let listeners = front.listeners.plan(&config.listeners)?;
    front.tls.commit(certificate);
    front.gate.commit(keys);
    front.configure(Arc::new(config));
    front.listeners.follow(front, listeners);
    Ok(kept)
}
