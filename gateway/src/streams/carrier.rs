//! A client that serves, as those see it who bring it visitors.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rvpn_proto::name::Pattern;
use rvpn_proto::streams::mux::{Mux, NotOpened};
use rvpn_proto::streams::{Counts, Offered, Opening as Description, Status, Visit as Told};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use super::stream::Stream;
use crate::cores::CoreId;
use crate::serve::{Carrier, OpenError, Opening, Service, Visit};
use crate::session::hub::{Order, Orders};

/// How long a client may take to accept a visitor: it may have to reach its
/// own server first.
const ANSWER: Duration = Duration::from_secs(10);

/// What a session is told in passing.
#[derive(Debug)]
pub(super) enum Notice {
    /// Show that you are there.
    Probe,
}

/// What the client serves, by its own number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) id: u32,
    pub(super) service: Offered,
    /// Under which names; none for a port.
    pub(super) pattern: Option<Pattern>,
    pub(super) port: Option<u16>,
}

/// Visitors of one client.
#[derive(Debug, Default)]
struct Visitors {
    open: AtomicU32,
    total: AtomicU64,
    turned_away: AtomicU64,
}

/// One visitor that is there; gone when dropped.
#[derive(Debug)]
pub(super) struct Present(Arc<Visitors>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// One connected client.
#[derive(Debug)]
pub(super) struct Client {
    mux: Mux,
    core: CoreId,
    orders: Orders,
    notices: mpsc::Sender<Notice>,
    lines: Mutex<Vec<Line>>,
    visitors: Arc<Visitors>,
}

impl Client {
    pub(super) fn new(
        mux: Mux,
        core: CoreId,
        orders: Orders,
        notices: mpsc::Sender<Notice>,
    ) -> Client {
        Client {
            mux,
            core,
            orders,
            notices,
            lines: Mutex::default(),
            visitors: Arc::default(),
        }
    }

    /// Changes what is served.
    pub(super) fn lines<T>(&self, change: impl FnOnce(&mut Vec<Line>) -> T) -> T {
        change(&mut self.lines.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            open: self.visitors.open.load(Relaxed),
            total: self.visitors.total.load(Relaxed),
            turned_away: self.visitors.turned_away.load(Relaxed),
        }
    }

    /// Which of the client's lines a visitor is for, as the client numbers them.
    fn line_for(&self, visit: &Visit) -> Option<(u32, Offered)> {
        let service = match visit.service {
            Service::Http => Offered::Http,
            Service::Https => Offered::Tls,
            Service::Ssh => Offered::Ssh,
            Service::Tcp => Offered::Tcp,
        };
        let fits = |line: &&Line| {
            line.service == service
                && match (service, &line.pattern, &visit.name) {
                    (Offered::Tcp, _, _) => line.port == Some(visit.port),
                    (Offered::Ssh, _, None) => true,
                    (_, Some(pattern), Some(name)) => pattern.covers(name),
                    _ => false,
                }
        };
        // The exact name before a wildcard, the longest wildcard first.
        let weight = |line: &&Line| {
            let pattern = line.pattern.as_ref();
            pattern.map(|p| (!p.is_wildcard(), p.name().as_str().len()))
        };
        self.lines(|lines| {
            let best = lines.iter().filter(fits).max_by_key(weight);
            best.map(|line| (line.id, service))
        })
    }
}

async fn open(mux: Mux, told: Told, visitors: Arc<Visitors>) -> Result<Stream, OpenError> {
    let opened = mux.open().map_err(|why| match why {
        NotOpened::Gone => OpenError::Gone,
        NotOpened::Full => OpenError::Full,
    })?;
    visitors.open.fetch_add(1, Relaxed);
    let mut stream = Stream::new(opened, Present(visitors));
    let description = Description::Visit(told).to_bytes().map_err(|error| {
        debug!(%error, "a visitor cannot be described");
        OpenError::Refused
    })?;
    let answer = async {
        stream.write_all(&description).await?;
        stream.read_u8().await
    };
    match timeout(ANSWER, answer).await {
        Err(_) => Err(OpenError::Silent),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionAborted => {
            Err(OpenError::Gone)
        }
        Ok(Err(_)) => Err(OpenError::Refused),
        Ok(Ok(byte)) => match Status::of(byte) {
            Some(Status::Accepted) => Ok(stream),
            Some(Status::Refused | Status::Unreachable) | None => Err(OpenError::Refused),
        },
    }
}

impl Carrier for Client {
    fn open(&self, visit: Visit) -> Opening {
        let Some((offer, service)) = self.line_for(&visit) else {
            return Box::pin(std::future::ready(Err(OpenError::Refused)));
        };
        let told = Told {
            offer,
            peer: visit.peer,
            port: visit.port,
            name: visit.name.map(|n| n.to_string()),
            service,
        };
        let (mux, visitors) = (self.mux.clone(), Arc::clone(&self.visitors));
        Box::pin(async move {
            match open(mux, told, Arc::clone(&visitors)).await {
                Ok(stream) => {
                    visitors.total.fetch_add(1, Relaxed);
                    Ok(Box::new(stream) as crate::serve::Stream)
                }
                Err(error) => {
                    visitors.turned_away.fetch_add(1, Relaxed);
                    Err(error)
                }
            }
        })
    }

    fn core(&self) -> CoreId {
        self.core
    }

    fn probe(&self) {
        // A full channel means that it is being asked already.
        drop(self.notices.try_send(Notice::Probe));
    }

    fn end(&self, code: u16, reason: &'static str) {
        // A full mailbox means that it is ending already.
        drop(self.orders.leave(Order::End {
            code,
            reason,
            retry_after: None,
        }));
    }
}
