//! Listeners that the service manager bound for us, low ports among them.
#![expect(
    unsafe_code,
    reason = "a descriptor that was inherited arrives as a number"
)]

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd};

/// Inherited TCP listeners that nobody has claimed yet.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: Vec<(SocketAddr, TcpListener)>,
}

impl Inherited {
    /// Takes them over. To be called once, before anything else opens descriptors.
    pub fn take() -> io::Result<Inherited> {
        let mut sockets = Vec::new();
        for fd in sd_notify::listen_fds()? {
            // SAFETY: the manager opened this descriptor for this process,
            // which is the one it names, and we are asked only once.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let socket = TcpListener::from(fd);
            let address = socket.local_addr().map_err(|error| {
                let why = format!("an inherited descriptor is not a TCP listener: {error}");
                io::Error::new(error.kind(), why)
            })?;
            sockets.push((address, socket));
        }
        Ok(Inherited { sockets })
    }

    /// The one bound to this address.
    pub fn claim(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let index = self.sockets.iter().position(|(a, _)| *a == address)?;
        Some(self.sockets.swap_remove(index).1)
    }

    /// Addresses that nobody claimed.
    pub fn rest(&self) -> Vec<SocketAddr> {
        self.sockets.iter().map(|(a, _)| *a).collect()
    }
}
