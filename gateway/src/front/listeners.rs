//! The public listeners, which come and go while the gateway runs.
//!
//! The configuration's are there from the start and follow a reload; others are
//! asked for by an operator or by a client that has a right to a port of its
//! own. Whoever came through a listener stays when it is closed.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::admit::Counted;
use crate::config::{Listener, Mode};
use crate::http::{Front, Visitor};
use crate::limits::PendingPass;
use crate::listener;

/// Listeners at once.
const MOST: usize = 1024;

/// Somebody who takes the visitors of a port, whatever they speak.
pub trait Take: Send + Sync + 'static {
    /// For whom, as operators see it.
    fn name(&self) -> String;

    /// Takes one. Nothing has been read of it; its deadlines are the taker's.
    fn take(
        &self,
        front: Arc<Front>,
        io: Counted,
        visitor: Visitor,
        pass: PendingPass,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// What a listener is for.
#[derive(Clone)]
pub enum Purpose {
    /// Everything that the front tells apart.
    Front,
    /// One who has the port for itself.
    Taken(Arc<dyn Take>),
}

impl Purpose {
    fn is(&self, other: &Purpose) -> bool {
        match (self, other) {
            (Purpose::Front, Purpose::Front) => true,
            (Purpose::Taken(a), Purpose::Taken(b)) => a.name() == b.name(),
            (Purpose::Front, Purpose::Taken(_)) | (Purpose::Taken(_), Purpose::Front) => false,
        }
    }
}

/// Who wanted a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The configuration: it follows the next reload.
    Config,
    /// The configuration, and the service manager holds the socket too.
    Inherited,
    /// Somebody at run time: it is gone after a restart.
    Asked,
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Added {
    /// It listens there now.
    Added(SocketAddr),
    /// It did already, for the same purpose.
    Exists(SocketAddr),
    /// It cannot.
    Fault(Fault),
}

/// Why there is no listener.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The helper translates connections to these ports.
    #[error(
        "port {port}: ports {low} to {high} are where the clients' connections leave from; use another port, or move nat-ports in the helper's configuration"
    )]
    Translated {
        /// Asked for.
        port: u16,
        /// The first that cannot be used.
        low: u16,
        /// The last one.
        high: u16,
    },
    /// A listener of ours is there, for something else.
    #[error("{address} is the listener of {what} already")]
    Taken {
        /// Where.
        address: SocketAddr,
        /// Whose.
        what: String,
    },
    /// The system says no.
    #[error("cannot listen at {address}: {why}")]
    System {
        /// Where.
        address: SocketAddr,
        /// Its words, and what to do.
        why: String,
        /// Whether somebody else has it.
        in_use: bool,
    },
    /// There are enough.
    #[error("there are {MOST} listeners already; remove one first")]
    TooMany,
    /// The gateway is shutting down.
    #[error("the gateway is shutting down")]
    Closed,
}

/// A listener as operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Where.
    pub address: SocketAddr,
    /// What is expected.
    pub mode: Mode,
    /// For whom, if it is one client's.
    pub of: Option<String>,
    /// Who wanted it.
    pub origin: Origin,
}

/// What connections of a listener have in common.
pub(crate) struct Door {
    settings: ArcSwap<Listener>,
    purpose: Purpose,
    number: usize,
    port: u16,
}

impl Door {
    pub(crate) fn settings(&self) -> Arc<Listener> {
        self.settings.load_full()
    }

    pub(crate) fn purpose(&self) -> &Purpose {
        &self.purpose
    }

    /// Counted in the order in which they were opened.
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

struct Open {
    door: Arc<Door>,
    /// The address as it was asked for, when the port was left to the system.
    asked: SocketAddr,
    origin: Origin,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Open {
    /// Accepts nobody from now on; the port is free when this is done.
    async fn close(self) {
        self.stop.send_replace(true);
        // It can only have ended by a panic, and then the socket is closed too.
        drop(self.task.await);
    }
}

/// All of them.
#[derive(Default)]
pub struct Listeners {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    by_address: BTreeMap<SocketAddr, Open>,
    translated: Option<(u16, u16)>,
    runtime: Option<Handle>,
    count: usize,
    closed: bool,
}

/// What a reload wants, bound already.
pub struct Planned {
    wanted: Vec<Listener>,
    sockets: Vec<(Listener, StdListener)>,
}

impl Listeners {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses the ports that the helper translates connections to.
    pub fn forbid(&self, translated: (u16, u16)) {
        self.lock().translated = Some(translated);
    }

    /// Runs a listener that is bound already, on the caller's runtime. All that
    /// are added later run there too.
    pub fn adopt(
        &self,
        front: &Arc<Front>,
        socket: StdListener,
        settings: Listener,
        origin: Origin,
    ) -> io::Result<SocketAddr> {
        let mut inner = self.lock();
        inner.runtime.get_or_insert_with(Handle::current);
        inner.run(front, socket, settings, Purpose::Front, origin)
    }

    /// Listens somewhere more, until it is removed or the process ends.
    pub fn add(&self, front: &Arc<Front>, settings: Listener, purpose: Purpose) -> Added {
        let mut inner = self.lock();
        let address = settings.address;
        if inner.closed {
            return Added::Fault(Fault::Closed);
        }
        if let Some(open) = inner.at(address) {
            let (at, open) = open;
            return match open.door.purpose.is(&purpose) {
                true => Added::Exists(at),
                false => Added::Fault(Fault::Taken {
                    address: at,
                    what: whose(&open.door.purpose).unwrap_or_else(|| "the gateway".to_owned()),
                }),
            };
        }
        if let Err(fault) = inner.allowed(address) {
            return Added::Fault(fault);
        }
        if inner.by_address.len() >= MOST {
            return Added::Fault(Fault::TooMany);
        }
        let added = bind(address).and_then(|socket| {
            inner
                .run(front, socket, settings, purpose, Origin::Asked)
                .map_err(|error| fault(address, &error))
        });
        match added {
            Ok(at) => {
                info!(address = %at, "listening");
                Added::Added(at)
            }
            Err(fault) => Added::Fault(fault),
        }
    }

    /// Listens there no longer, if the listener is this taker's.
    pub(crate) async fn remove_of(&self, address: SocketAddr, taker: &str) {
        let own = {
            let inner = self.lock();
            let open = inner.at(address);
            open.is_some_and(|(_, o)| whose(&o.door.purpose).as_deref() == Some(taker))
        };
        if own {
            self.remove(address).await;
        }
    }

    /// Runs something where the listeners run.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let runtime = self.lock().runtime.clone();
        if let Some(runtime) = runtime.or_else(|| Handle::try_current().ok()) {
            runtime.spawn(task);
        }
    }

    /// Listens there no longer; false if it did not. When this is done the port
    /// is free.
    pub async fn remove(&self, address: SocketAddr) -> bool {
        let open = {
            let mut inner = self.lock();
            let at = inner.at(address).map(|(at, _)| at);
            at.and_then(|at| inner.by_address.remove(&at))
        };
        match open {
            Some(open) => {
                open.close().await;
                info!(%address, "no longer listening");
                true
            }
            None => false,
        }
    }

    /// All of them, by address.
    pub fn list(&self) -> Vec<View> {
        let inner = self.lock();
        let view = |(address, open): (&SocketAddr, &Open)| View {
            address: *address,
            mode: open.door.settings.load().mode,
            of: whose(&open.door.purpose),
            origin: open.origin,
        };
        inner.by_address.iter().map(view).collect()
    }

    /// Binds what a configuration wants and is not there yet, all or nothing,
    /// without accepting anybody.
    pub fn plan(&self, wanted: &[Listener]) -> Result<Planned, Fault> {
        let inner = self.lock();
        let mut sockets = Vec::new();
        for one in wanted {
            inner.allowed(one.address)?;
            if inner.at(one.address).is_none() {
                sockets.push((one.clone(), bind(one.address)?));
            }
        }
        Ok(Planned {
            wanted: wanted.to_vec(),
            sockets,
        })
    }

    /// Puts a plan in force: new listeners accept, those that the configuration
    /// no longer has are closed, the others have its settings.
    pub fn follow(&self, front: &Arc<Front>, plan: Planned) {
        let mut inner = self.lock();
        let dropped: Vec<SocketAddr> = inner
            .by_address
            .iter()
            .filter(|(at, open)| {
                let wanted = |l: &Listener| l.address == **at || l.address == open.asked;
                open.origin != Origin::Asked && !plan.wanted.iter().any(wanted)
            })
            .map(|(at, _)| *at)
            .collect();
        for at in dropped {
            let held = inner
                .by_address
                .get(&at)
                .is_some_and(|o| o.origin == Origin::Inherited);
            if held {
                // Closing ours would leave visitors waiting at the manager's.
                warn!(address = %at, "the service manager holds this listener; it stays until a restart");
                continue;
            }
            if let Some(open) = inner.by_address.remove(&at) {
                open.stop.send_replace(true);
                info!(address = %at, "no longer listening");
            }
        }
        for one in plan.wanted {
            if let Some((at, _)) = inner.at(one.address)
                && let Some(open) = inner.by_address.get_mut(&at)
            {
                // One that was asked for before stays when the configuration has it.
                if open.origin == Origin::Asked {
                    open.origin = Origin::Config;
                }
                open.door.settings.store(Arc::new(one));
            }
        }
        for (settings, socket) in plan.sockets {
            let address = settings.address;
            match inner.run(front, socket, settings, Purpose::Front, Origin::Config) {
                Ok(at) => info!(address = %at, "listening"),
                Err(error) => warn!(%address, %error, "cannot listen"),
            }
        }
    }

    /// Accepts nobody any more, anywhere.
    pub async fn close(&self) {
        let all = {
            let mut inner = self.lock();
            inner.closed = true;
            std::mem::take(&mut inner.by_address)
        };
        for open in all.into_values() {
            open.close().await;
        }
    }
}

impl Inner {
    /// The listener of an address, as it was asked for or as it came out.
    fn at(&self, address: SocketAddr) -> Option<(SocketAddr, &Open)> {
        if let Some((at, open)) = self.by_address.get_key_value(&address) {
            return Some((*at, open));
        }
        // A port that the system chooses is another one each time it is asked for.
        let asked = |open: &Open| open.asked == address && open.origin != Origin::Asked;
        let found = self.by_address.iter().find(|(_, open)| asked(open));
        found.map(|(at, open)| (*at, open))
    }

    fn allowed(&self, address: SocketAddr) -> Result<(), Fault> {
        let port = address.port();
        match self.translated {
            Some((low, high)) if (low..=high).contains(&port) => {
                Err(Fault::Translated { port, low, high })
            }
            Some(_) | None => Ok(()),
        }
    }

    fn run(
        &mut self,
        front: &Arc<Front>,
        socket: StdListener,
        settings: Listener,
        purpose: Purpose,
        origin: Origin,
    ) -> io::Result<SocketAddr> {
        let runtime = match &self.runtime {
            Some(runtime) => runtime.clone(),
            None => Handle::try_current().map_err(io::Error::other)?,
        };
        let at = socket.local_addr()?;
        let socket = {
            let _inside = runtime.enter();
            TcpListener::from_std(socket)?
        };
        let door = Arc::new(Door {
            number: self.count,
            port: at.port(),
            purpose,
            settings: ArcSwap::from_pointee(settings.clone()),
        });
        self.count += 1;
        let (stop, stopped) = watch::channel(false);
        let task = listener::run(Arc::clone(front), Arc::clone(&door), socket, stopped);
        let task = runtime.spawn(task);
        let asked = settings.address;
        let open = Open {
            door,
            asked,
            origin,
            stop,
            task,
        };
        self.by_address.insert(at, open);
        Ok(at)
    }
}

fn whose(purpose: &Purpose) -> Option<String> {
    match purpose {
        Purpose::Front => None,
        Purpose::Taken(taker) => Some(taker.name()),
    }
}

fn bind(address: SocketAddr) -> Result<StdListener, Fault> {
    listener::bind(address).map_err(|error| fault(address, &error))
}

fn fault(address: SocketAddr, error: &io::Error) -> Fault {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "; another listener or program has it",
        io::ErrorKind::PermissionDenied => {
            "; a running gateway opens no ports under 1024: put it into the configuration and restart, or let systemd bind it (rvpn-gateway.socket)"
        }
        io::ErrorKind::AddrNotAvailable => "; this machine does not have that address",
        _ => "",
    };
    Fault::System {
        address,
        why: format!("{error}{hint}"),
        in_use: error.kind() == io::ErrorKind::AddrInUse,
    }
}

/// All addresses of this machine, with this port.
pub fn everywhere(port: u16) -> SocketAddr {
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
    match StdListener::bind(v6) {
        Ok(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
        Err(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
    }
}
