//! Clients that serve, without a tunnel: their streams end in the test.
#![expect(dead_code, reason = "every test program uses another part of this")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rvpn_gateway::auth::rights::Rights;
use rvpn_gateway::cores::{CoreId, Cores};
use rvpn_gateway::serve::table::{Offer, Place, Server, Table};
use rvpn_gateway::serve::{Carrier, OpenError, Opening, Visit};
use rvpn_proto::name::{Name, Pattern};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;

/// What a stream between the gateway and a client holds.
const PIPE: usize = 64 * 1024;

/// A client that serves. What it is asked for comes out of a channel.
pub(crate) struct Fake {
    asked: mpsc::UnboundedSender<(Visit, DuplexStream)>,
    core: CoreId,
    failing: Mutex<Option<OpenError>>,
    pub(crate) probes: AtomicUsize,
    ended: Mutex<Option<(u16, &'static str)>>,
}

/// The other side of it.
pub(crate) type Asked = mpsc::UnboundedReceiver<(Visit, DuplexStream)>;

impl Fake {
    pub(crate) fn new() -> (Arc<Fake>, Asked) {
        let (asked, get) = mpsc::unbounded_channel();
        let fake = Fake {
            asked,
            core: some_core(),
            failing: Mutex::default(),
            probes: AtomicUsize::new(0),
            ended: Mutex::default(),
        };
        (Arc::new(fake), get)
    }

    /// From now on it opens nothing.
    pub(crate) fn fail(&self, why: OpenError) {
        *self.failing.lock().unwrap() = Some(why);
    }

    pub(crate) fn ended(&self) -> Option<(u16, &'static str)> {
        *self.ended.lock().unwrap()
    }

    pub(crate) fn probed(&self) -> usize {
        self.probes.load(Ordering::SeqCst)
    }
}

impl Carrier for Fake {
    fn open(&self, visit: Visit) -> Opening {
        let failing = self.failing.lock().unwrap().clone();
        let asked = self.asked.clone();
        Box::pin(async move {
            match failing {
                // As if the answer were lost.
                Some(OpenError::Silent) => std::future::pending().await,
                Some(why) => Err(why),
                None => {
                    let (near, far) = tokio::io::duplex(PIPE);
                    asked.send((visit, far)).map_err(|_| OpenError::Gone)?;
                    Ok(Box::new(near) as _)
                }
            }
        })
    }

    fn core(&self) -> CoreId {
        self.core
    }

    fn probe(&self) {
        self.probes.fetch_add(1, Ordering::SeqCst);
    }

    fn end(&self, code: u16, reason: &'static str) {
        *self.ended.lock().unwrap() = Some((code, reason));
    }
}

fn some_core() -> CoreId {
    use std::sync::OnceLock;
    static CORE: OnceLock<CoreId> = OnceLock::new();
    *CORE.get_or_init(|| Cores::start(1, false).unwrap().least_loaded().core())
}

pub(crate) fn rights(names: &[&str], ports: &[u16]) -> Arc<Rights> {
    Arc::new(Rights {
        names: names.iter().map(|n| n.parse().unwrap()).collect(),
        ports: ports.to_vec(),
        home: None,
    })
}

pub(crate) fn server(
    account: &str,
    instance: &str,
    rights: Arc<Rights>,
    carrier: Arc<Fake>,
) -> Server {
    Server {
        account: account.into(),
        instance: instance.into(),
        rights,
        peer: "192.0.2.9:4000".parse().unwrap(),
        carrier,
    }
}

/// A client in the table that serves these names.
pub(crate) struct Served {
    pub(crate) place: Place,
    pub(crate) fake: Arc<Fake>,
    pub(crate) asked: Asked,
}

/// Whose rights are just these names.
pub(crate) fn serve(table: &Arc<Table>, account: &str, instance: &str, names: &[&str]) -> Served {
    let (fake, asked) = Fake::new();
    let server = server(account, instance, rights(names, &[]), Arc::clone(&fake));
    let place = table.join(server);
    for name in names {
        place.offer(Offer::of(pattern(name))).unwrap();
    }
    Served { place, fake, asked }
}

pub(crate) fn pattern(text: &str) -> Pattern {
    text.parse().unwrap()
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(crate) mod backend;
