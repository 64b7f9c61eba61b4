//! How the rest of the gateway reaches a client.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::pipe::End;
use crate::cores::CoreId;
use crate::serve::{Carrier, OpenError, Opening, Stream, Visit};
use crate::session::hub::{Order, Orders};

/// Visitors who may wait to be let in; the tunnel takes them at once.
pub(super) const ASKS: usize = 256;
/// How long a busy tunnel may take to let one in.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a tunnel is asked for.
pub(super) enum Ask {
    /// To let a visitor in.
    Open(Visit, oneshot::Sender<Result<End, OpenError>>),
    /// To show that its client is there.
    Probe,
}

/// The way to a tunnel.
pub(super) struct Way {
    pub(super) asks: mpsc::Sender<Ask>,
    pub(super) orders: Orders,
    pub(super) core: CoreId,
}

impl Carrier for Way {
    fn open(&self, visit: Visit) -> Opening {
        let (answer, answered) = oneshot::channel();
        let asked = self.asks.try_send(Ask::Open(visit, answer));
        Box::pin(async move {
            asked.map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => OpenError::Full,
                mpsc::error::TrySendError::Closed(_) => OpenError::Gone,
            })?;
            let answered = timeout(PATIENCE, answered).await;
            let end = answered
                .map_err(|_| OpenError::Silent)?
                .map_err(|_| OpenError::Gone)??;
            Ok(Box::new(end) as Stream)
        })
    }

    fn core(&self) -> CoreId {
        self.core
    }

    fn probe(&self) {
        // A tunnel with no room for a question is alive, or found out soon.
        drop(self.asks.try_send(Ask::Probe));
    }

    fn end(&self, code: u16, reason: &'static str) {
        drop(self.orders.leave(Order::End {
            code,
            reason,
            retry_after: None,
        }));
    }
}
