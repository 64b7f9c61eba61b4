//! systemd's notification protocol: a datagram of `KEY=value` lines.

use std::env;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

pub(crate) struct Notify {
    socket: Option<UnixDatagram>,
    /// Half of what the service manager waits for.
    pub(crate) watchdog: Option<Duration>,
}

impl Notify {
    /// Connects now, and once: later neither the path nor a new socket can be had.
    pub(crate) fn from_env() -> Notify {
        let socket = env::var("NOTIFY_SOCKET").ok().and_then(|name| {
            let address = match name.strip_prefix('@') {
                Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
                None => SocketAddr::from_pathname(&name),
            };
            let socket = UnixDatagram::unbound().ok()?;
            socket.connect_addr(&address.ok()?).ok()?;
            Some(socket)
        });
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
        Notify { socket, watchdog }
    }

    pub(crate) fn say(&self, text: &str) {
        if let Some(socket) = &self.socket {
            // Nobody to tell is no reason to stop.
            let _ = socket.send(text.as_bytes());
        }
    }
}
