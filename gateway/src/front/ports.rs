//! Ports that clients have a right to, for whatever they serve there.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rvpn_proto::sniff::ClientHello;
use rvpn_proto::sniff::alert::Alert;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::debug;

use super::listeners::{Added, Fault, Purpose, Take, everywhere};
use super::look::{self, What};
use super::{decide, go};
use crate::admit::{Counted, Io};
use crate::config::{AdminAddress, Config, Listener, Mode};
use crate::http::{Front, Visitor};
use crate::limits::PendingPass;
use crate::serve::table::{Doors, Refused};
use crate::serve::{Service, Visit, visit};

/// How long a visitor says nothing before its server is let speak first.
const SILENCE: Duration = Duration::from_millis(350);
/// How long a port stays open when nobody serves it: its client may only have
/// lost its connection.
const LINGER: Duration = Duration::from_secs(2);

/// Opens and closes them.
pub(crate) struct Ports {
    front: Weak<Front>,
}

impl Ports {
    pub(crate) fn of(front: &Arc<Front>) -> Ports {
        Ports {
            front: Arc::downgrade(front),
        }
    }
}

/// Whether the gateway itself is at that port, or would be after a restart.
fn is_ours(config: &Config, port: u16) -> bool {
    let admin = match &config.admin {
        AdminAddress::Tcp(address) => Some(address.port()),
        AdminAddress::Unix(_) => None,
    };
    admin == Some(port) || config.listeners.iter().any(|l| l.address.port() == port)
}

fn open(front: &Arc<Front>, port: u16) -> Result<(), Refused> {
    if is_ours(&front.config(), port) {
        return Err(Refused::PortTaken(port));
    }
    let settings = Listener {
        address: everywhere(port),
        mode: Mode::Auto,
        proxy_from: Vec::new(),
        forwarded_from: Vec::new(),
    };
    let purpose = Purpose::Taken(Arc::new(OfClient(port)));
    match front.listeners.add(front, settings, purpose) {
        Added::Added(_) | Added::Exists(_) => Ok(()),
        Added::Fault(Fault::Taken { .. } | Fault::System { in_use: true, .. }) => {
            Err(Refused::PortTaken(port))
        }
        Added::Fault(fault) => Err(Refused::PortFault(port, fault.to_string())),
    }
}

impl Doors for Ports {
    fn open(&self, port: u16) -> Pin<Box<dyn Future<Output = Result<(), Refused>> + Send>> {
        let opened = match self.front.upgrade() {
            Some(front) => open(&front, port),
            None => Err(Refused::PortFault(port, Fault::Closed.to_string())),
        };
        Box::pin(async { opened })
    }

    fn close(&self, port: u16) {
        let front = Weak::clone(&self.front);
        let closing = async move {
            sleep(LINGER).await;
            let Some(front) = front.upgrade() else { return };
            if front.table.serves_port(port) {
                return;
            }
            let own = OfClient(port).name();
            front.listeners.remove_of(everywhere(port), &own).await;
            // Somebody may have come at the same moment, and found it open.
            if front.table.serves_port(port)
                && let Err(error) = open(&front, port)
            {
                debug!(%error, "cannot open a port again");
            }
        };
        if let Some(front) = self.front.upgrade() {
            front.listeners.spawn(closing);
        }
    }
}

/// A client's own port.
struct OfClient(u16);

impl Take for OfClient {
    fn name(&self) -> String {
        format!("client with port {}", self.0)
    }

    fn take(
        &self,
        front: Arc<Front>,
        mut io: Counted,
        visitor: Visitor,
        pass: PendingPass,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let port = self.0;
        Box::pin(async move {
            let deadline = Instant::now() + front.config().limits.login_time;
            let looked = look::look(&mut io, Mode::Auto, Some(SILENCE));
            let mut seen = match timeout_at(deadline, looked).await {
                Ok(Ok(seen)) => seen,
                Ok(Err(error)) => return debug!(%error, "gone before it spoke"),
                Err(_) => return debug!("did not say in time what it is"),
            };
            // These have names, and names have the front: here they would go to
            // whoever has the port, whomever they asked for.
            let strict = front.config().serve.strict_ports;
            let misdirected =
                strict && seen.what == What::Http && seen.names_a_host(&mut io, SILENCE).await;
            let refusal = match &seen.what {
                What::Tls(ClientHello { name: Some(_), .. }) if strict => {
                    Some(decide::Refusal::Alert(Alert::UnrecognizedName))
                }
                _ => misdirected.then_some(decide::Refusal::Misdirected),
            };
            let raw = seen.replayed(io);
            if let Some(refusal) = refusal {
                return go::refuse(raw, refusal).await;
            }
            let visit = Visit {
                peer: visitor.peer,
                port,
                name: None,
                service: Service::Tcp,
            };
            visit::pass(front, Io::plain(raw), visit, pass).await;
        })
    }
}
