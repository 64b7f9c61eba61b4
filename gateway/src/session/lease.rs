//! Getting a client its lease: from its own former connection if there is one,
//! else from the helper.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rvpn_ipc::{Class, Kind, Status};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::debug;

use super::hub::{Former, Handed, Order};
use crate::helper::{Helper, HelperError, Lease};

/// How long a former connection may take to let go. Its task answers in its
/// next turn unless its core is overwhelmed; the helper breaks the tie then.
const HAND_OVER: Duration = Duration::from_millis(250);
/// When a client comes back if we cannot say better.
const SOON: Duration = Duration::from_secs(1);

/// Why a client gets no lease, as it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// WebSocket close code.
    pub code: u16,
    /// The older clients look for these very words.
    pub reason: &'static str,
    /// When to come back.
    pub retry_after: Duration,
}

/// The reason the first gateways gave, which their clients know.
pub const POOL_EMPTY: &str = "No available TUN interfaces";

impl From<HelperError> for Refusal {
    fn from(error: HelperError) -> Refusal {
        let (reason, retry_after) = match error {
            HelperError::NoCapacity { retry_after } => (POOL_EMPTY, retry_after),
            HelperError::Refused(Status::UnknownClass) => ("no such policy class", SOON * 60),
            HelperError::Refused(_) => ("no lease at the moment", SOON),
            HelperError::Away => ("the gateway cannot reach its helper", SOON),
        };
        Refusal {
            code: 1013,
            reason,
            retry_after,
        }
    }
}

/// The lease of `key`, whoever has it now.
pub async fn obtain(
    helper: &Helper,
    key: rvpn_ipc::Key,
    class: Class,
    former: Option<Former>,
) -> Result<(Lease, OwnedFd), Refusal> {
    if let Some(former) = former
        && let Some(handed) = take_over(former).await
    {
        let mut lease = handed.lease;
        lease.continued();
        return Ok((lease, handed.tun));
    }
    match helper.acquire(key, Kind::Both, class).await {
        Ok((lease, Some(tun))) => Ok((lease, tun)),
        Ok((_, None)) => Err(HelperError::Away.into()),
        Err(error) => {
            debug!(%error, "no lease");
            Err(error.into())
        }
    }
}

async fn take_over(former: Former) -> Option<Handed> {
    let (give, take) = oneshot::channel();
    former.orders.leave(Order::HandOver(give)).ok()?;
    timeout(HAND_OVER, take).await.ok()?.ok()
}
