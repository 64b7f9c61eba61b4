//! One visitor, between its own task and the tunnel's.
//!
//! Both sides hold the same small state under a lock that is never held across
//! an await and hardly ever contended, as both live on one core.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rvpn_proto::packer::{CAPACITY, Gauge, Turn};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::bell::{Bell, Number};

/// What a visitor has said and the client has not been sent. A whole request
/// head or ClientHello fits, so that the first frame has all of it.
pub(super) const WAITING: usize = 64 * 1024;
/// Pieces are gathered into buffers of at least this size, so that many small
/// ones do not take more room than they count for.
const CHUNK: usize = 2048;
/// A buffer that is larger is given back when it is empty.
const KEEP: usize = 4096;
/// How long a side may take to end after the other has.
pub(super) const PARTING: Duration = Duration::from_secs(60);
/// A tunnel that was held up goes on when this much has been taken.
const STEP: usize = CAPACITY / 4;

/// How a side ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// In order.
    Clean,
    /// Otherwise.
    Broken,
}

/// What the tunnel finds when a visitor rang.
#[derive(Debug, Default)]
pub(super) struct News {
    /// It has said something.
    pub(super) data: bool,
    /// It has ended, and how; what it said before comes first.
    pub(super) ended: Option<Ended>,
    /// Something to tell the client.
    pub(super) turn: Option<Turn>,
    /// Nobody reads any more.
    pub(super) gone: bool,
    /// The client wants nothing more of it.
    pub(super) deaf: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// From the client, in order, with the bytes of the first already taken.
    chunks: VecDeque<Vec<u8>>,
    taken: usize,
    gauge: Gauge,
    over: Option<Ended>,
    /// Since when what the visitor says is of no use to anybody.
    deaf: Option<Instant>,
    reader: Option<Waker>,
    /// The tunnel waits for room here.
    holding: bool,
    /// From the visitor.
    said: Vec<u8>,
    shut: bool,
    writer: Option<Waker>,
    dropped: bool,
    rung: bool,
}

/// The state of one visitor.
#[derive(Debug)]
pub(super) struct Pipe {
    inner: Mutex<Inner>,
    bell: Arc<Bell>,
    number: Number,
}

impl Pipe {
    /// Both ends of a new one.
    pub(super) fn new(bell: Arc<Bell>, number: Number) -> (Arc<Pipe>, End) {
        let inner = Mutex::default();
        let pipe = Arc::new(Pipe {
            inner,
            bell,
            number,
        });
        (Arc::clone(&pipe), End { pipe })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self, inner: &mut Inner) {
        if !inner.rung {
            inner.rung = true;
            self.bell.ring(self.number);
        }
    }

    /// Takes bytes of the client. False if there is no room; then nothing was
    /// taken, and the bell rings when there is. Of a client that was told to
    /// pause more is taken, as long as all its visitors together have no more
    /// than `most`.
    pub(super) fn fill(&self, bytes: &[u8], most: usize) -> bool {
        let mut inner = self.lock();
        if inner.dropped || inner.over.is_some() {
            // Nobody to give it to.
            return true;
        }
        let late = inner.gauge.is_paused() && self.bell.waiting() + bytes.len() <= most;
        if bytes.len() > inner.gauge.room() && !late {
            inner.holding = true;
            return false;
        }
        inner.push(bytes);
        self.bell.fill(bytes.len());
        if let Some(reader) = inner.reader.take() {
            reader.wake();
        }
        true
    }

    /// Whether the tunnel need not be held up for this one any more.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let mut inner = self.lock();
        let room = inner.gauge.room() >= bytes.max(STEP) || inner.gauge.waiting() == 0;
        let room = room || inner.dropped || inner.over.is_some();
        inner.holding = !room;
        room
    }

    /// What is to be told to the client about it.
    pub(super) fn turn(&self) -> Option<Turn> {
        self.lock().gauge.turn()
    }

    /// The client has ended it.
    pub(super) fn end(&self, how: Ended) {
        let mut inner = self.lock();
        if inner.over.is_none() {
            inner.over = Some(how);
            inner.deaf = Some(Instant::now());
            inner.said = Vec::new();
        }
        if let Some(reader) = inner.reader.take() {
            reader.wake();
        }
        if let Some(writer) = inner.writer.take() {
            writer.wake();
        }
    }

    /// Ends it although the client has not, and forgets what waits.
    pub(super) fn cut(&self) {
        {
            let mut inner = self.lock();
            self.bell.drain(inner.forget());
        }
        self.end(Ended::Broken);
    }

    /// What happened since it was looked at the last time.
    pub(super) fn news(&self) -> News {
        let mut inner = self.lock();
        inner.rung = false;
        News {
            data: !inner.said.is_empty(),
            ended: match (inner.shut, inner.dropped) {
                (true, _) => Some(Ended::Clean),
                (false, true) => Some(Ended::Broken),
                (false, false) => None,
            },
            turn: inner.gauge.turn(),
            gone: inner.dropped,
            deaf: inner.over.is_some(),
        }
    }

    /// Puts what the visitor said into `out`, in place of what was there.
    pub(super) fn take(&self, out: &mut Vec<u8>) {
        out.clear();
        let mut inner = self.lock();
        std::mem::swap(out, &mut inner.said);
        if inner.said.capacity() > KEEP {
            inner.said = Vec::new();
        }
        if let Some(writer) = inner.writer.take() {
            writer.wake();
        }
    }
}

impl Inner {
    fn push(&mut self, mut bytes: &[u8]) {
        self.gauge.fill(bytes.len());
        if let Some(last) = self.chunks.back_mut() {
            let fits = (last.capacity() - last.len()).min(bytes.len());
            let (part, rest) = bytes.split_at(fits);
            last.extend_from_slice(part);
            bytes = rest;
        }
        if !bytes.is_empty() {
            let mut chunk = Vec::with_capacity(bytes.len().max(CHUNK));
            chunk.extend_from_slice(bytes);
            self.chunks.push_back(chunk);
        }
    }

    /// Forgets what waits; how much that was.
    fn forget(&mut self) -> usize {
        self.chunks = VecDeque::new();
        self.taken = 0;
        let waiting = self.gauge.waiting();
        self.gauge.drain(waiting);
        waiting
    }

    /// Gives what waits; how much that was.
    fn pull(&mut self, buf: &mut ReadBuf<'_>) -> usize {
        let before = buf.remaining();
        while let Some(chunk) = self.chunks.front()
            && buf.remaining() > 0
        {
            let rest = &chunk[self.taken..];
            let n = rest.len().min(buf.remaining());
            buf.put_slice(&rest[..n]);
            self.taken += n;
            if self.taken == chunk.len() {
                self.chunks.pop_front();
                self.taken = 0;
            }
        }
        before - buf.remaining()
    }
}

/// The visitor's end: a stream like any other.
#[derive(Debug)]
pub(super) struct End {
    pipe: Arc<Pipe>,
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.pipe.lock();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let taken = inner.pull(buf);
        if taken > 0 {
            inner.gauge.drain(taken);
            self.pipe.bell.drain(taken);
            let step = inner.holding && inner.gauge.room() >= STEP;
            if inner.gauge.wants_more() || step {
                self.pipe.ring(&mut inner);
            }
            return Poll::Ready(Ok(()));
        }
        match inner.over {
            Some(Ended::Clean) => Poll::Ready(Ok(())),
            Some(Ended::Broken) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            None => {
                inner.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.pipe.lock();
        match inner.over {
            // Its server is done and would take these for another visitor. The
            // answer may still be on its way to this one, so it is no error.
            Some(Ended::Clean) if inner.deaf.is_some_and(|d| d.elapsed() < PARTING) => {
                return Poll::Ready(Ok(buf.len()));
            }
            Some(Ended::Clean | Ended::Broken) => {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            None => {}
        }
        if inner.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = WAITING.saturating_sub(inner.said.len());
        if room == 0 {
            inner.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = room.min(buf.len());
        inner.said.extend_from_slice(&buf[..n]);
        self.pipe.ring(&mut inner);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The tunnel sends as fast as it can without being asked.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.pipe.lock();
        if !inner.shut {
            inner.shut = true;
            self.pipe.ring(&mut inner);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut inner = self.pipe.lock();
        inner.dropped = true;
        self.pipe.bell.drain(inner.forget());
        self.pipe.ring(&mut inner);
    }
}
