//! The TUN descriptor of one session.
//!
//! The helper passes it attached and configured; here it is only read and
//! written. The interest must include errors: a deleted interface reports
//! nothing else, and a task waiting for readability alone would wait for ever.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use rvpn_acks::{Aside, Writer};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::yield_now;
use tracing::warn;

use crate::meter::{DropReason, Side};

/// Length of the virtio header before every packet.
pub const VIRTIO_LEN: usize = 10;
/// The largest packet with its header. A shorter read would cut it silently.
pub const MAX_READ: usize = VIRTIO_LEN + 65_535;

/// Longer than what is under way takes on any machine that still works, and less
/// than who takes the session over waits for it.
const UNDER_WAY: Duration = Duration::from_millis(200);

/// A TUN, or in tests one end of a socket pair that stands for it.
#[derive(Debug)]
pub struct Tun {
    fd: Arc<AsyncFd<File>>,
    /// For acknowledgements, while there is much to do.
    pub aside: Aside,
}

/// Why a packet did not get into the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The kernel did not like this packet, or was short of memory. The next one may do.
    Packet,
    /// The interface is down, as it is for a moment while the helper restores its rules.
    Down,
    /// The interface is gone; the session cannot go on.
    Gone,
}

impl Tun {
    /// Takes the descriptor. Must run on the runtime that will use it.
    pub fn adopt(fd: OwnedFd) -> io::Result<Tun> {
        let fd = crate::fd::watch(fd, Interest::READABLE | Interest::ERROR)?;
        Ok(Tun {
            fd: Arc::new(fd),
            aside: Aside::default(),
        })
    }

    /// Has acknowledgements written by another thread while there is much to do,
    /// as there is now.
    pub fn open_aside(&mut self, writer: &Writer) {
        let fd = &self.fd;
        self.aside.open(writer, || fd.get_ref().try_clone());
    }

    /// Brings into the totals what the other thread has done.
    pub fn count_aside(&mut self, side: &mut Side) {
        let written = self.aside.written();
        side.pass(written.packets, written.bytes);
        side.drop(DropReason::Kernel, written.refused);
        side.drop(DropReason::Down, written.down);
    }

    /// Waits for what is under way, so that the descriptor is nobody else's.
    pub async fn finish_aside(&mut self, side: &mut Side) {
        let begun = Instant::now();
        self.aside.close();
        while self.aside.is_open() && begun.elapsed() < UNDER_WAY {
            yield_now().await;
            self.aside.close();
        }
        if self.aside.abandon() {
            warn!("acknowledgements under way took too long; the last are not counted");
        }
        self.count_aside(side);
    }

    /// Gives the descriptor back, for a session that continues on another
    /// connection. None while a future of [`Tun::gone`] is still alive.
    pub fn into_fd(self) -> Option<OwnedFd> {
        Some(OwnedFd::from(Arc::into_inner(self.fd)?.into_inner()))
    }

    /// Ends when the interface was deleted. Waiting for packets does not tell:
    /// the kernel then reports an error and no readability.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        let fd = Arc::clone(&self.fd);
        async move {
            // An error here means that the runtime ends.
            drop(fd.ready(Interest::ERROR).await.map(|_| ()));
        }
    }

    /// Reads one packet with its virtio header. Pending means that the device
    /// is empty and that the task will be woken; an error, that it is gone.
    pub fn poll_read(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            match guard.try_io(|fd| fd.get_ref().read(buf)) {
                Ok(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    /// Reads one packet that may have come since the device was last found empty,
    /// which the runtime would tell only later. If there is none, nobody is woken
    /// when one comes.
    pub fn read_now(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match self.fd.get_ref().read(buf) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes one packet: its virtio header, what was rewritten of it, the rest.
    /// A TUN never makes its writer wait, so there is nothing to poll for.
    pub fn write(&self, parts: &[IoSlice<'_>]) -> Result<(), Refused> {
        loop {
            return match self.fd.get_ref().write_vectored(parts) {
                Ok(_) => Ok(()),
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    Some(libc::EIO) => Err(Refused::Down),
                    // The last two: the other end of a socket pair went away.
                    Some(libc::EBADFD | libc::EPIPE | libc::ECONNRESET) => Err(Refused::Gone),
                    _ => Err(Refused::Packet),
                },
            };
        }
    }
}
