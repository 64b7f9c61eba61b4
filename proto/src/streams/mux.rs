//! Many streams in one byte stream, as yamux has it.
//!
//! It is stricter than yamux asks for, because the other side may be hostile:
//! a frame for a stream that it was never given, or that it has ended itself,
//! or beyond what it was granted, is a [`Fault`], and the connection that it
//! came on is to be closed. And it is exact about endings, because a stream
//! that was cut off must not look like one that was finished: a [`Handle`] that
//! is dropped before both sides have finished resets its stream, and a reader
//! of a stream that was reset gets an error and never an end.
//!
//! Nothing here waits or knows a clock: streams wake whoever waits for them,
//! and one driver moves bytes between [`Mux::receive`], [`Mux::poll_send`] and
//! the connection.

mod core;
mod frame;
mod handle;
mod slot;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use self::core::Core;
pub use self::frame::INITIAL_WINDOW;
pub use self::handle::{Broken, Handle};

/// Which ids a side gives to the streams that it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Odd ones: whoever opened the connection.
    Client,
    /// Even ones.
    Gateway,
}

/// What a connection may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Streams that we have open.
    pub opened: usize,
    /// Streams that the other side has open; with none, opening one is a fault.
    pub accepted: usize,
    /// What a stream that is read quickly may have on its way to us.
    pub window: u32,
    /// Bytes of all streams that nobody has read yet. When there are more,
    /// streams that hold more than [`Limits::share`] are reset.
    pub unread: usize,
    /// See above.
    pub share: usize,
}

/// Bytes of one stream that wait to be sent.
pub const WAITING: usize = 256 * 1024;

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            opened: super::STREAMS,
            accepted: 0,
            // Together with what waits on the other way, and in the hands of
            // whoever reads, 1 MiB.
            window: 640 * 1024,
            unread: 64 * 1024 * 1024,
            share: 32 * 1024,
        }
    }
}

/// What the other side did wrong. There is no going on after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Bytes that are no header.
    Header,
    /// A frame for a stream that was never opened, or is over.
    Stream(u32),
    /// More than was granted, or a grant beyond all sense.
    Window(u32),
    /// Bytes behind the end.
    AfterEnd(u32),
    /// It may not open streams, or not with this id.
    Opening(u32),
    /// Pings without end.
    Flood,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Header => f.write_str("not a stream frame"),
            Fault::Stream(id) => write!(f, "a frame for stream {id}, which is none of this side's"),
            Fault::Window(id) => write!(f, "stream {id} goes beyond its window"),
            Fault::AfterEnd(id) => write!(f, "bytes behind the end of stream {id}"),
            Fault::Opening(id) => write!(f, "stream {id} may not be opened"),
            Fault::Flood => f.write_str("too many pings"),
        }
    }
}

impl std::error::Error for Fault {}

/// Why no stream can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotOpened {
    /// The connection is over, or the other side is going.
    Gone,
    /// There are as many as there may be.
    Full,
}

/// One end of a connection. Clones are the same end.
#[derive(Clone)]
pub struct Mux {
    core: Arc<Mutex<Core>>,
}

impl fmt::Debug for Mux {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mux")
            .field("streams", &self.open_streams())
            .finish_non_exhaustive()
    }
}

impl Mux {
    /// Of a new connection.
    pub fn new(side: Side, limits: Limits) -> Mux {
        Mux {
            core: Arc::new(Mutex::new(Core::new(side, limits))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something and wakes afterwards, without the lock: waking may drop
    /// a task, and with it a stream of ours.
    fn with<T>(&self, work: impl FnOnce(&mut Core) -> T) -> T {
        let mut core = self.lock();
        let result = work(&mut core);
        let driver = core.driver_due();
        let others = core.wakers_due();
        drop(core);
        wake(driver, others);
        result
    }

    /// Opens a stream. The other side hears of it with the next message.
    pub fn open(&self) -> Result<Handle, NotOpened> {
        let id = self.with(Core::open)?;
        Ok(Handle::new(self.clone(), id))
    }

    /// The next stream that the other side opened; none when the connection is over.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Option<Handle>> {
        let found = self.with(|core| core.poll_accept(cx));
        found.map(|id| id.map(|id| Handle::new(self.clone(), id)))
    }

    /// Takes bytes that came, cut anywhere.
    pub fn receive(&self, bytes: &[u8]) -> Result<(), Fault> {
        self.with(|core| core.receive(bytes))
    }

    /// Appends frames to `out`, as long as it stays below `limit` bytes and
    /// there are any. Every stream has its turn.
    pub fn poll_send(&self, cx: &mut Context<'_>, out: &mut Vec<u8>, limit: usize) -> Poll<()> {
        self.with(|core| core.poll_send(cx, out, limit))
    }

    /// Opens nothing more; what is open goes on.
    pub fn go_away(&self) {
        self.with(Core::go_away);
    }

    /// The connection is over, and with it all streams.
    pub fn end(&self) {
        self.with(Core::end);
    }

    /// How many there are, also of those that are still ending.
    pub fn open_streams(&self) -> usize {
        self.lock().streams()
    }

    /// Bytes that came and were not read yet.
    pub fn unread(&self) -> usize {
        self.lock().unread()
    }
}

fn wake(driver: Option<Waker>, others: Vec<Waker>) {
    if let Some(driver) = driver {
        driver.wake();
    }
    for waker in others {
        waker.wake();
    }
}
