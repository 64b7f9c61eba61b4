//! A visitor's bytes and its server's, each handed to the other untouched.

use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::sniff::alert::Alert;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::time::timeout;
use tracing::debug;

use super::table::Chosen;
use super::{Service, Visit};
use crate::admit::Raw;
use crate::http::Front;
use crate::limits::PendingPass;

/// How long a client may take to open a stream.
const OPENING: Duration = Duration::from_secs(10);
/// How long the farewell to a visitor may take whom nobody serves.
const PARTING: Duration = Duration::from_secs(1);

/// Hands a visitor to the client that was chosen for it.
pub async fn passthrough(
    front: Arc<Front>,
    mut raw: Raw,
    chosen: Chosen,
    visit: Visit,
    pass: PendingPass,
) {
    let carrier = Arc::clone(&chosen.server.carrier);
    let service = visit.service;
    let mut stream = match timeout(OPENING, carrier.open(visit)).await {
        Ok(Ok(stream)) => stream,
        failed => {
            debug!(why = ?failed.map(|f| f.err()), "a visitor is not served");
            if service == Service::Https {
                let alert = Alert::InternalError.record();
                drop(timeout(PARTING, raw.write_all(&alert)).await);
                drop(timeout(PARTING, raw.shutdown()).await);
            }
            return;
        }
    };
    // No stranger any more: its server pays for it.
    drop(pass);
    let both = async move {
        if raw.get_mut().rehome().is_ok() {
            let done = copy_bidirectional(&mut raw, &mut stream).await;
            debug!(?done, "a visitor has gone");
        }
    };
    front.sessions.run(carrier.core(), Box::pin(both));
}
