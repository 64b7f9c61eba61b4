//! Bytes between a visitor and its stream.
//!
//! Both ends are moved by one task on one core, through one buffer of that
//! core: what a reader gave is offered to the writer at once, and only what the
//! writer did not take is kept. So an idle visitor holds no memory, and a slow
//! one holds at most one buffer per direction while its other end waits.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::count::Visiting;
use super::{Duplex, Stream};

/// What is read at once.
const BUFFER: usize = 64 * 1024;
/// Reads of one turn, so that a fast visitor does not keep others waiting.
const TURN: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A visitor's stream that counts what passes, at the client's side: whatever
/// becomes of the visitor, this is what the client was given and gave.
pub struct Metered {
    stream: Stream,
    visiting: Arc<Visiting>,
    /// Whether the connection itself is the request, and was answered.
    answered: Option<bool>,
}

impl Metered {
    /// Counts from here. A whole connection counts as one request.
    pub fn connection(stream: Stream, visiting: Visiting) -> Metered {
        visiting.request();
        Metered {
            stream,
            visiting: Arc::new(visiting),
            answered: Some(false),
        }
    }

    /// Counts bytes; requests are counted by who reads them.
    pub fn bytes(stream: Stream, visiting: Visiting) -> Metered {
        Metered {
            stream,
            visiting: Arc::new(visiting),
            answered: None,
        }
    }

    /// For whoever reads the requests in it.
    pub fn requests(&self) -> Requests {
        Requests(Arc::clone(&self.visiting))
    }
}

/// Counts requests where a connection may have many.
pub struct Requests(Arc<Visiting>);

impl Requests {
    /// One goes to the client.
    pub fn request(&self) {
        self.0.request();
    }

    /// Its answer came.
    pub fn response(&self) {
        self.0.response();
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let read = buf.filled().len() - before;
        if read > 0 {
            self.visiting.moved(0, read as u64);
            if self.answered == Some(false) {
                self.answered = Some(true);
                self.visiting.response();
            }
        }
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = polled {
            self.visiting.moved(n as u64, 0);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both sides had said all.
    Complete,
    /// Nothing passed for too long.
    Idle,
    /// One side was cut off.
    Broken,
}

/// Moves bytes both ways until both sides have ended, one is cut off, or
/// nothing passes for `idle`. The end of one side is told to the other, which
/// may go on.
pub async fn splice(visitor: impl Duplex, stream: impl Duplex, idle: Duration) -> End {
    Splice {
        visitor,
        stream,
        inbound: Flow::default(),
        outbound: Flow::default(),
        idle,
        last: Instant::now(),
        timer: Box::pin(sleep_until(Instant::now() + idle)),
    }
    .await
}

struct Splice<V, S> {
    visitor: V,
    stream: S,
    inbound: Flow,
    outbound: Flow,
    idle: Duration,
    last: Instant,
    timer: Pin<Box<Sleep>>,
}

/// One direction.
#[derive(Default)]
struct Flow {
    /// What was read and not taken yet.
    rest: Vec<u8>,
    at: usize,
    unflushed: bool,
    stage: Stage,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    /// The reader has ended; the writer is being told.
    Ending,
    Done,
}

impl<V: Duplex, S: Duplex> Future for Splice<V, S> {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        let me = &mut *self;
        let mut moved = false;
        let inbound = me
            .inbound
            .poll(cx, &mut me.visitor, &mut me.stream, &mut moved);
        let outbound = me
            .outbound
            .poll(cx, &mut me.stream, &mut me.visitor, &mut moved);
        match (inbound, outbound) {
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => return Poll::Ready(End::Broken),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(End::Complete),
            (Poll::Pending, _) | (_, Poll::Pending) => {}
        }
        if moved {
            me.last = Instant::now();
        }
        while me.timer.as_mut().poll(cx).is_ready() {
            let due = me.last + me.idle;
            if due <= Instant::now() {
                return Poll::Ready(End::Idle);
            }
            // Resetting it for every byte would cost more than the byte.
            me.timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}

impl Flow {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        moved: &mut bool,
    ) -> Poll<io::Result<()>> {
        for _ in 0..TURN {
            match self.stage {
                Stage::Done => return Poll::Ready(Ok(())),
                Stage::Ending => {
                    ready!(self.give_rest(cx, to, moved))?;
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    *moved = true;
                    self.stage = Stage::Done;
                }
                Stage::Open => {
                    ready!(self.give_rest(cx, to, moved))?;
                    let turn = SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
                        Ok(mut scratch) => {
                            scratch.resize(BUFFER, 0);
                            self.turn(cx, &mut scratch, from, to, moved)
                        }
                        // One splice inside another's poll.
                        Err(_) => self.turn(cx, &mut vec![0; BUFFER], from, to, moved),
                    });
                    if turn.is_pending() && self.unflushed && self.rest.is_empty() {
                        // Nothing more to add: whoever buffers shall send.
                        ready!(Pin::new(&mut *to).poll_flush(cx))?;
                        self.unflushed = false;
                    }
                    ready!(turn)?;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn turn(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut [u8],
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        moved: &mut bool,
    ) -> Poll<io::Result<()>> {
        let mut buf = ReadBuf::new(scratch);
        ready!(Pin::new(from).poll_read(cx, &mut buf))?;
        let mut bytes = buf.filled();
        *moved = true;
        if bytes.is_empty() {
            self.stage = Stage::Ending;
            return Poll::Ready(Ok(()));
        }
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(cx, bytes)? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(n) => {
                    self.unflushed = true;
                    bytes = &bytes[n..];
                }
                Poll::Pending => {
                    self.rest.extend_from_slice(bytes);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn give_rest(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut (impl AsyncWrite + Unpin),
        moved: &mut bool,
    ) -> Poll<io::Result<()>> {
        while self.at < self.rest.len() {
            let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.rest[self.at..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *moved = true;
            self.unflushed = true;
            self.at += n;
        }
        if self.at > 0 {
            // The memory is not kept: the next time may be in an hour.
            self.rest = Vec::new();
            self.at = 0;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn each_side_may_end_before_the_other() {
        let (mut visitor, near) = duplex(1000);
        let (far, mut server) = duplex(1000);
        let splicing = tokio::spawn(splice(near, far, LONG));
        visitor.write_all(b"question").await.unwrap();
        visitor.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        // The visitor has ended and is still answered.
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = String::new();
        visitor.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        assert_eq!(splicing.await.unwrap(), End::Complete);
    }

    #[tokio::test]
    async fn more_than_any_buffer_arrives_whole_both_ways() {
        let (visitor, near) = duplex(777);
        let (far, server) = duplex(1234);
        tokio::spawn(splice(near, far, LONG));
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| (i * 31 % 251) as u8).collect();
        let both = [visitor, server].map(|side| {
            let bytes = bytes.clone();
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(side);
                let sent = tokio::spawn(async move {
                    write.write_all(&bytes).await.unwrap();
                    write.shutdown().await.unwrap();
                });
                let mut got = Vec::new();
                read.read_to_end(&mut got).await.unwrap();
                sent.await.unwrap();
                got
            })
        });
        for side in both {
            assert!(side.await.unwrap() == bytes);
        }
    }

    #[tokio::test]
    async fn the_end_of_one_side_without_a_word_ends_the_other() {
        let (mut visitor, near) = duplex(10);
        let (far, server) = duplex(10);
        let splicing = tokio::spawn(splice(near, far, LONG));
        visitor.write_all(&[0; 10]).await.unwrap();
        drop(server);
        assert_eq!(splicing.await.unwrap(), End::Broken);
        assert_eq!(visitor.read(&mut [0; 1]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn silence_ends_it_and_a_byte_now_and_then_does_not() {
        let (mut visitor, near) = duplex(10);
        let (far, mut server) = duplex(10);
        let splicing = tokio::spawn(splice(near, far, Duration::from_millis(500)));
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            visitor.write_all(b"x").await.unwrap();
            server.read_exact(&mut [0; 1]).await.unwrap();
        }
        let quiet = Instant::now();
        assert_eq!(splicing.await.unwrap(), End::Idle);
        assert!(quiet.elapsed() <= Duration::from_secs(5));
    }
}
