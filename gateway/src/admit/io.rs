//! The stream under the WebSocket.

use std::any::Any;
use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use nix::sys::socket::{MsgFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// A TCP connection that counts its bytes: those of the wire, whatever is in them.
#[derive(Debug)]
pub struct Counted {
    /// Gone only after a failed move to another runtime.
    tcp: Option<TcpStream>,
    read: u64,
    written: u64,
    /// See [`Io::keep_apart`].
    apart: bool,
}

impl Counted {
    /// Counts from here.
    pub fn new(tcp: TcpStream) -> Counted {
        Counted {
            tcp: Some(tcp),
            read: 0,
            written: 0,
            apart: false,
        }
    }

    /// Bytes read from and written to the socket so far.
    pub fn wire(&self) -> (u64, u64) {
        (self.read, self.written)
    }

    /// Takes the socket out of the runtime it is registered with and registers
    /// it with the caller's. If that fails the socket is closed.
    pub fn rehome(&mut self) -> io::Result<()> {
        let tcp = self.tcp.take().ok_or(io::ErrorKind::NotConnected)?;
        self.tcp = Some(TcpStream::from_std(tcp.into_std()?)?);
        Ok(())
    }

    /// The other end, as the kernel knows it.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.socket()?.peer_addr()
    }

    /// Reads the first bytes, and makes room for them only when they are there.
    /// An empty read is an end.
    pub async fn read_first(&mut self, room: usize) -> io::Result<Vec<u8>> {
        loop {
            self.socket()?.readable().await?;
            let mut bytes = Vec::with_capacity(room);
            match self.socket()?.try_read_buf(&mut bytes) {
                Ok(n) => {
                    self.read += n as u64;
                    return Ok(bytes);
                }
                // It was only thought to be readable.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn poll_write_apart(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let tcp = self.socket()?;
        loop {
            ready!(tcp.poll_write_ready(cx))?;
            let flags = MsgFlags::MSG_EOR | MsgFlags::MSG_NOSIGNAL;
            let sent = tcp.try_io(Interest::WRITABLE, || {
                Ok(sendmsg::<()>(tcp.as_raw_fd(), bufs, &[], flags, None)?)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    self.written += *sent.as_ref().unwrap_or(&0) as u64;
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn socket(&self) -> io::Result<&TcpStream> {
        self.tcp
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn pin(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        let tcp = self.tcp.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        Ok(Pin::new(tcp))
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = self.pin()?.poll_read(cx, buf);
        self.read += (buf.filled().len() - before) as u64;
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.apart {
            return self.poll_write_apart(cx, &[IoSlice::new(buf)]);
        }
        let polled = self.pin()?.poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = polled {
            self.written += n as u64;
        }
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.apart {
            return self.poll_write_apart(cx, bufs);
        }
        let polled = self.pin()?.poll_write_vectored(cx, bufs);
        if let Poll::Ready(Ok(n)) = polled {
            self.written += n as u64;
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.pin()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.pin()?.poll_shutdown(cx)
    }
}

/// A stream some of which was read already, to see what it is.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
}

impl<S> Prefixed<S> {
    /// Gives `prefix` to the reader before anything of `inner`.
    pub fn new(prefix: Bytes, inner: S) -> Prefixed<S> {
        Prefixed { prefix, inner }
    }

    /// The stream below.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The stream below. Reading from it directly would miss the prefix.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let n = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..n]);
        self.prefix.advance(n);
        if self.prefix.is_empty() {
            // Give back the memory: this stream may live for days.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// The socket, with what was read from it to classify it.
pub type Raw = Prefixed<Counted>;

/// Shorter pieces are gathered, so that several share a write and a TLS record.
const SHORT: usize = 8 * 1024;

thread_local! {
    /// The buffer of whoever waited last, for who waits next.
    static SPARE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that were accepted and that the layer below has not taken yet.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// So many of them are gone.
    gone: usize,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.bytes.capacity() == 0 {
            self.bytes = SPARE.take();
        }
        self.bytes.extend_from_slice(bytes);
    }

    fn left(&self) -> &[u8] {
        &self.bytes[self.gone..]
    }

    fn took(&mut self, n: usize) {
        self.gone += n;
        if self.gone == self.bytes.len() {
            self.gone = 0;
            self.bytes.clear();
            SPARE.set(std::mem::take(&mut self.bytes));
        }
    }
}

#[derive(Debug)]
enum Layer {
    Plain(Raw),
    Tls(Box<TlsStream<Raw>>),
}

/// A connection, encrypted or not. Dropping it closes the socket and gives up
/// its place among the account's connections.
pub struct Io {
    /// Read already, and to be read again.
    unread: Bytes,
    layer: Layer,
    /// Goes before everything that is written from now on.
    pending: Pending,
    /// What must live exactly as long as the connection.
    held: Option<Box<dyn Any + Send + Sync>>,
}

impl Io {
    /// Without TLS: behind a proxy, or in a test.
    pub fn plain(raw: Raw) -> Io {
        Io {
            unread: Bytes::new(),
            layer: Layer::Plain(raw),
            pending: Pending::default(),
            held: None,
        }
    }

    /// After the handshake.
    pub fn tls(stream: TlsStream<Raw>) -> Io {
        Io {
            unread: Bytes::new(),
            layer: Layer::Tls(Box::new(stream)),
            pending: Pending::default(),
            held: None,
        }
    }

    /// Whether TLS ends here.
    pub fn is_tls(&self) -> bool {
        matches!(self.layer, Layer::Tls(_))
    }

    /// Gives bytes back, which are read again before anything else.
    pub fn unread(&mut self, bytes: Bytes) {
        debug_assert!(self.unread.is_empty(), "given back once");
        self.unread = bytes;
    }

    /// Ties the life of `what` to that of the connection.
    pub fn hold(&mut self, what: impl Any + Send + Sync) {
        self.held = Some(Box::new(what));
    }

    /// Bytes read from and written to the socket so far: TLS, HTTP and
    /// everything else included.
    pub fn wire(&self) -> (u64, u64) {
        self.counted().wire()
    }

    /// Registers the socket with the caller's runtime, which uses it from now on.
    pub fn rehome(&mut self) -> io::Result<()> {
        match &mut self.layer {
            Layer::Plain(raw) => raw.get_mut().rehome(),
            Layer::Tls(tls) => tls.get_mut().0.get_mut().rehome(),
        }
    }

    /// Whether the kernel may not join what is written from now on to what it has
    /// already. It would do that up to 64 KiB, whatever it was told to hold
    /// unsent at most, and on a slow link nothing passes those.
    pub fn keep_apart(&mut self, apart: bool) {
        match &mut self.layer {
            Layer::Plain(raw) => raw.get_mut().apart = apart,
            Layer::Tls(tls) => tls.get_mut().0.get_mut().apart = apart,
        }
    }

    /// The socket, for its options and `TCP_INFO`.
    pub fn socket(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.counted().socket()?.as_fd())
    }

    fn counted(&self) -> &Counted {
        match &self.layer {
            Layer::Plain(raw) => raw.get_ref(),
            Layer::Tls(tls) => tls.get_ref().0.get_ref(),
        }
    }
}

/// One match for all that is passed through.
macro_rules! layer {
    ($self:ident, $inner:ident => $call:expr) => {
        match &mut $self.layer {
            Layer::Plain($inner) => $call,
            Layer::Tls($inner) => $call,
        }
    };
}

impl Io {
    /// Takes a header and what follows it, both whole, without a copy of what
    /// the layer below takes at once. What it does not take now goes with the
    /// next flush or write, before anything else.
    pub fn give(&mut self, cx: &mut Context<'_>, header: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut given = 0;
        if payload.len() >= SHORT && self.poll_pending(cx)?.is_ready() {
            let whole = header.len() + payload.len();
            while given < whole {
                let head = header.get(given..).unwrap_or_default();
                let rest = &payload[given.saturating_sub(header.len())..];
                let parts = [IoSlice::new(head), IoSlice::new(rest)];
                let parts = if head.is_empty() {
                    &parts[1..]
                } else {
                    &parts[..]
                };
                match layer!(self, inner => Pin::new(inner).poll_write_vectored(cx, parts))? {
                    Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(n) => given += n,
                    Poll::Pending => break,
                }
            }
        }
        let head = header.get(given..).unwrap_or_default();
        let rest = &payload[given.saturating_sub(header.len())..];
        if !head.is_empty() || !rest.is_empty() {
            self.pending.add(head);
            self.pending.add(rest);
        }
        Ok(())
    }

    /// Ready when nothing waits here.
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let left = self.pending.left();
            let n = ready!(layer!(self, inner => Pin::new(inner).poll_write(cx, left)))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.took(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl std::fmt::Debug for Io {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Io")
            .field("tls", &self.is_tls())
            .field("wire", &self.wire())
            .finish_non_exhaustive()
    }
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.unread.is_empty() {
            let n = self.unread.len().min(buf.remaining());
            buf.put_slice(&self.unread.split_to(n));
            if self.unread.is_empty() {
                // Give back the memory: this stream may live for days.
                self.unread = Bytes::new();
            }
            return Poll::Ready(Ok(()));
        }
        layer!(self, inner => Pin::new(inner).poll_read(cx, buf))
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(cx))?;
        layer!(self, inner => Pin::new(inner).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(cx))?;
        layer!(self, inner => Pin::new(inner).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.layer {
            Layer::Plain(inner) => inner.is_write_vectored(),
            Layer::Tls(inner) => inner.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        layer!(self, inner => Pin::new(inner).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        layer!(self, inner => Pin::new(inner).poll_shutdown(cx))
    }
}
