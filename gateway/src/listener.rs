//! Listening: binding, adopting and accepting, and nothing of what follows.

pub mod inherited;

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{Backlog, listen};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use crate::front::listeners::Door;
use crate::front::receive;
use crate::http::Front;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// How long to leave the kernel alone when it has no descriptor or memory left.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// Binds a public listener.
pub fn bind(address: SocketAddr) -> io::Result<StdListener> {
    let socket = StdListener::bind(address)?;
    adopt(&socket)?;
    Ok(socket)
}

/// Prepares a listener that was bound by us or inherited.
pub fn adopt(socket: &StdListener) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    // The standard library's backlog is short for clients that all come back at once.
    listen(&socket.as_fd(), Backlog::new(BACKLOG)?)?;
    Ok(())
}

/// Accepts until told to stop.
pub(crate) async fn run(
    front: Arc<Front>,
    door: Arc<Door>,
    socket: TcpListener,
    mut stop: watch::Receiver<bool>,
) {
    let mut complained: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            // An error means that the sender is gone, which is a stop as well.
            _ = stop.wait_for(|s| *s) => return,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                tokio::spawn(receive(Arc::clone(&front), Arc::clone(&door), tcp, peer));
            }
            Err(error) if is_exhaustion(&error) => {
                // The connection stays in the queue, so trying again at once would spin.
                if complained.is_none_or(|at| at.elapsed() > Duration::from_secs(10)) {
                    warn!(%error, "cannot accept connections; raise LimitNOFILE or lower limits.pending");
                    complained = Some(Instant::now());
                }
                sleep(EXHAUSTED).await;
            }
            // That one connection had gone again.
            Err(error) => debug!(%error, "accept"),
        }
    }
}

fn is_exhaustion(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}
