//! Getting a TCP connection to a gateway.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use crate::fail::{Failure, Outcome};
use crate::profile::Address;

/// How long one address has to answer.
const ADDRESS: Duration = Duration::from_secs(5);

/// The addresses of a gateway, families taking turns, so that one that does
/// not work costs one attempt.
pub(crate) async fn resolve(to: &Address) -> Outcome<Vec<SocketAddr>> {
    let found = lookup_host((to.host.as_str(), to.port)).await;
    let found: Vec<SocketAddr> = found
        .map_err(|e| Failure::unavailable(format!("the name {} does not resolve: {e}", to.host)))?
        .collect();
    let (six, four): (Vec<_>, Vec<_>) = found.into_iter().partition(SocketAddr::is_ipv6);
    let (mut six, mut four) = (six.into_iter(), four.into_iter());
    let mut turns = Vec::new();
    loop {
        match (six.next(), four.next()) {
            (None, None) => break,
            (a, b) => turns.extend(a.into_iter().chain(b)),
        }
    }
    match turns.is_empty() {
        true => Err(Failure::unavailable(format!(
            "the name {} has no address",
            to.host
        ))),
        false => Ok(turns),
    }
}

/// Connects to the first address that answers.
pub(crate) async fn connect(to: &Address) -> Outcome<TcpStream> {
    let mut why = String::new();
    for address in resolve(to).await? {
        match timeout(ADDRESS, TcpStream::connect(address)).await {
            Ok(Ok(tcp)) => {
                // Without it small packets would wait for each other.
                let _late = tcp.set_nodelay(true);
                return Ok(tcp);
            }
            Ok(Err(error)) => why = format!("{address}: {error}"),
            Err(_) => why = format!("{address}: no answer in {ADDRESS:?}"),
        }
    }
    Err(Failure::unavailable(format!(
        "cannot connect to {to} ({why}): is the address right, and is its port open?"
    )))
}
