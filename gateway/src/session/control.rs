//! The text messages of a native session.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::control::{
    ControlError, Counters, ErrorNotice, Goodbye, Message as Control, Resolved, Stage, Stats,
};
use tokio::net::lookup_host;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tracing::warn;

use super::carriage::End;
use super::mailbox::Slot;
use crate::meter::{Side, Totals};

/// How long a name may take to resolve.
const RESOLVE: Duration = Duration::from_secs(5);
/// Names a client may have in resolution at the same time.
const RESOLVING: usize = 8;
/// And all clients together, as each takes a thread from what else may block.
static EVERYBODY: Semaphore = Semaphore::const_new(64);
/// Addresses of one name; more are of no use to anybody.
const ADDRESSES: usize = 16;

/// Answers the control messages of one client.
pub(super) struct Desk {
    /// Where names are resolved, never on a data core.
    runtime: Handle,
    answers: Slot<Message>,
    /// One permit a name in resolution.
    resolving: Arc<Semaphore>,
}

impl Desk {
    pub(super) fn new(runtime: Handle, answers: Slot<Message>) -> Desk {
        Desk {
            runtime,
            answers,
            resolving: Arc::new(Semaphore::new(RESOLVING)),
        }
    }

    /// Takes one message; the answer, if there is one at once.
    pub(super) fn text(&self, text: &str, totals: &Totals) -> Result<Option<Message>, End> {
        match Control::parse(text, Stage::Session) {
            Ok(Control::Stats(_)) => Ok(encode(&Control::Stats(stats(totals)))),
            Ok(Control::Resolve(question)) => Ok(self.resolve(question.id, question.name)),
            Ok(Control::Goodbye(_)) => Err(End::Goodbye),
            // A client has nothing to tell us with these.
            Ok(
                Control::Hello(_)
                | Control::Welcome(_)
                | Control::Ticket(_)
                | Control::Quota(_)
                | Control::Resolved(_),
            ) => Ok(notice("not-now", "this message has no place here")),
            Ok(Control::Error(_)) => Ok(None),
            Err(error @ ControlError::Unknown { .. }) => {
                Ok(notice("unknown-kind", &error.to_string()))
            }
            Err(_) => Err(End::Misbehaved {
                code: 1008,
                reason: "malformed control message",
            }),
        }
    }

    fn resolve(&self, id: u32, name: String) -> Option<Message> {
        let own = Arc::clone(&self.resolving).try_acquire_owned();
        let (Ok(own), Ok(common)) = (own, EVERYBODY.try_acquire()) else {
            return notice("not-now", "too many names at once");
        };
        let answers = self.answers.clone();
        // A lookup that is given up goes on in a thread, so its permits stay with it.
        let lookup = self.runtime.spawn(async move {
            let found = lookup_host((name.as_str(), 0)).await.map(Vec::from_iter);
            drop((own, common));
            found
        });
        self.runtime.spawn(async move {
            let found = timeout(RESOLVE, lookup).await;
            let (mut addresses, error) = match found {
                Ok(Ok(Ok(found))) => (found.iter().map(SocketAddr::ip).collect(), None),
                Ok(_) => (
                    Vec::<IpAddr>::new(),
                    Some("the name does not resolve".to_owned()),
                ),
                Err(_) => (Vec::new(), Some("the resolver does not answer".to_owned())),
            };
            addresses.dedup();
            // A name must not lead a client to us or to our neighbours.
            addresses.retain(public);
            addresses.truncate(ADDRESSES);
            let error = match (addresses.is_empty(), error) {
                (true, None) => Some("the name has no public address".to_owned()),
                (_, error) => error,
            };
            let resolved = Resolved {
                id,
                addresses,
                error,
            };
            if let Some(message) = encode(&Control::Resolved(resolved)) {
                // A session that ended, or does not read, does without.
                drop(answers.leave(message));
            }
        });
        None
    }
}

/// What a name may resolve to for a client: the packet rules refuse the rest
/// anyway, and our private view of a name is none of its business.
fn public(address: &IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.is_unspecified())
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unspecified()
                || v6.is_unique_local()
                || v6.is_unicast_link_local())
        }
    }
}

/// A message for the wire; an invalid one would be our own fault and is not sent.
pub(super) fn encode(message: &Control) -> Option<Message> {
    match message.to_text(Stage::Session) {
        Ok(text) => Some(Message::text(text)),
        Err(error) => {
            warn!(%error, "a control message of our own is not valid");
            None
        }
    }
}

/// What is said before a close frame.
pub(super) fn goodbye(code: u16, text: &str, retry_after: Option<Duration>) -> Option<Message> {
    let retry_after_ms = retry_after.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
    encode(&Control::Goodbye(Goodbye {
        code,
        text: text.to_owned(),
        retry_after_ms,
    }))
}

fn notice(code: &str, text: &str) -> Option<Message> {
    encode(&Control::Error(ErrorNotice {
        code: code.to_owned(),
        text: text.to_owned(),
    }))
}

fn stats(totals: &Totals) -> Stats {
    let counters = |side: &Side| {
        Some(Counters {
            packets: side.packets,
            payload: side.payload,
            wire: side.wire,
            dropped: side.drops.iter().sum(),
        })
    };
    Stats {
        outbound: counters(&totals.outbound),
        inbound: counters(&totals.inbound),
    }
}
