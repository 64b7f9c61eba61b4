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
    /// Connects now: later the socket's path may be out of reach.
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
        let mine = env::var("WATCHDOG_PID").map_or(true, is_us);
        let micros = number("WATCHDOG_USEC").filter(|_| mine);
        let watchdog = micros.map(|v| Duration::from_micros(v / 2));
        Notify { socket, watchdog }
    }

    pub(crate) fn say(&self, text: &str) {
        if let Some(socket) = &self.socket {
            // Nobody to tell is no reason to stop.
            let _ = socket.send(text.as_bytes());
        }
    }
}

fn is_us(pid: String) -> bool {
    pid == std::process::id().to_string()
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// How many listeners were passed in, from descriptor 3 on.
pub(crate) fn passed_listeners() -> u64 {
    let mine = env::var("LISTEN_PID").is_ok_and(is_us);
    number("LISTEN_FDS").filter(|_| mine).unwrap_or(0)
}
