//! Getting a TCP connection to a gateway.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::sys::socket::sockopt;
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::timeout;

use crate::fail::{Failure, Outcome};
use crate::profile::Address;
use crate::up::fd::go_far;
use crate::up::{self, MARK};

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

/// One attempt. Past a tunnel that is up, where we have the right to pass it;
/// otherwise the tunnel would be asked to lead to its own beginning.
async fn attempt(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // Without the right to it there is no mark, and mostly no tunnel either.
    let _refused = nix::sys::socket::setsockopt(&socket, sockopt::Mark, &MARK);
    socket.connect(address).await
}

/// Connects to the first address that answers.
pub(crate) async fn connect(to: &Address) -> Outcome<TcpStream> {
    let mut why = String::new();
    for address in resolve(to).await? {
        match timeout(ADDRESS, attempt(address)).await {
            Ok(Ok(tcp)) => {
                // Without it small packets would wait for each other.
                let _late = tcp.set_nodelay(true);
                go_far(tcp.as_fd());
                return Ok(tcp);
            }
            Ok(Err(error)) => why = format!("{address}: {error}"),
            Err(_) => why = format!("{address}: no answer in {ADDRESS:?}"),
        }
    }
    let remedy = match up::is_up().await {
        true => {
            "'rvpn up' runs here and everything goes through it: use the ordinary programs, or sudo"
        }
        false => "is the address right, and is its port open?",
    };
    Err(Failure::unavailable(format!(
        "cannot connect to {to} ({why}): {remedy}"
    )))
}
