//! TCP ports of the gateway that clients have for themselves.
//!
//! A port is listened on as long as somebody serves it. What visitors speak is
//! their server's business: it may be the one that speaks first. What names are
//! for is refused there unless the configuration allows it, so that nobody
//! takes a port for a way around the names.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::proxy::first;
use super::table::{Doors, Refused};
use super::visit;
use super::{Service, Visit};
use crate::admit::{Counted, Io, Prefixed};
use crate::config::{AdminAddress, Config, Listener, Mode};
use crate::front::listeners::{Added, Fault, Purpose, Take, everywhere};
use crate::front::look::{What, look};
use crate::http::{Front, Visitor};
use crate::limits::PendingPass;

/// How long a visitor may say nothing until its server is asked to speak.
const SILENCE: Duration = Duration::from_millis(350);
/// How long a port stays open that nobody serves: its server may be coming back.
const LINGER: Duration = Duration::from_millis(1500);

/// Opens and closes them by the front's listeners.
pub struct Ports {
    front: Weak<Front>,
}

impl Ports {
    /// Of this front.
    pub fn of(front: &Arc<Front>) -> Ports {
        Ports {
            front: Arc::downgrade(front),
        }
    }
}

impl Doors for Ports {
    fn open(&self, port: u16) -> Pin<Box<dyn Future<Output = Result<(), Refused>> + Send>> {
        let front = self.front.upgrade();
        Box::pin(async move {
            let closed = || Refused::PortFault(port, "the gateway is shutting down".to_owned());
            let front = front.ok_or_else(closed)?;
            if is_ours(&front.config(), port) {
                return Err(Refused::PortTaken(port));
            }
            let listener = Listener {
                address: everywhere(port),
                mode: Mode::Auto,
                proxy_from: Vec::new(),
                forwarded_from: Vec::new(),
            };
            let purpose = Purpose::Taken(Arc::new(Granted(port)));
            match front.listeners.add(&front, listener, purpose) {
                Added::Added(_) | Added::Exists(_) => Ok(()),
                Added::Fault(Fault::Taken { .. } | Fault::System { in_use: true, .. }) => {
                    Err(Refused::PortTaken(port))
                }
                Added::Fault(fault) => Err(Refused::PortFault(port, fault.to_string())),
            }
        })
    }

    fn close(&self, port: u16) {
        // Outside of a runtime everything ends anyway.
        let (Some(front), Ok(runtime)) = (self.front.upgrade(), Handle::try_current()) else {
            return;
        };
        runtime.spawn(async move {
            sleep(LINGER).await;
            if !front.table.serves_port(port) {
                front.listeners.remove(everywhere(port)).await;
            }
        });
    }
}

/// Whether the gateway itself is, or could be, at that port.
fn is_ours(config: &Config, port: u16) -> bool {
    let admin = match &config.admin {
        AdminAddress::Tcp(address) => Some(address.port()),
        AdminAddress::Unix(_) => None,
    };
    admin == Some(port) || config.listeners.iter().any(|l| l.address.port() == port)
}

/// A port whose visitors go to whoever serves it.
struct Granted(u16);

impl Take for Granted {
    fn name(&self) -> String {
        format!("the client that serves port {}", self.0)
    }

    fn take(
        &self,
        front: Arc<Front>,
        io: Counted,
        visitor: Visitor,
        pass: PendingPass,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(receive(front, io, visitor, pass))
    }
}

async fn receive(front: Arc<Front>, counted: Counted, visitor: Visitor, pass: PendingPass) {
    let config = front.config();
    let io = match config.serve.strict_ports {
        false => Some(Io::plain(Prefixed::new(Bytes::new(), counted))),
        true => {
            let limit = config.limits.login_time;
            match timeout(limit, nameless(counted)).await {
                Ok(io) => io,
                Err(_) => return debug!("a visitor of a port stopped in the middle of a word"),
            }
        }
    };
    drop(config);
    let Some(io) = io else {
        return debug!(
            port = visitor.port,
            "what names are for is refused on a port"
        );
    };
    let visit = Visit {
        peer: visitor.peer,
        port: visitor.port,
        name: None,
        service: Service::Tcp,
    };
    visit::pass(front, io, visit, pass).await;
}

/// The connection as if nothing had been read, unless it asks for a name.
async fn nameless(mut counted: Counted) -> Option<Io> {
    let seen = look(&mut counted, Mode::Auto, Some(SILENCE)).await.ok()?;
    let named = matches!(&seen.what, What::Tls(hello) if hello.name.is_some());
    let http = seen.what == What::Http;
    let mut io = Io::plain(seen.replayed(counted));
    if named || (http && first::names_a_host(&mut io).await) {
        return None;
    }
    Some(io)
}
