//! The stream under the WebSocket.

use std::any::Any;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// A TCP connection that counts its bytes: those of the wire, whatever is in them.
#[derive(Debug)]
pub struct Counted {
    /// Gone only after a failed move to another runtime.
    tcp: Option<TcpStream>,
    read: u64,
    written: u64,
}

impl Counted {
    /// Counts from here.
    pub fn new(tcp: TcpStream) -> Counted {
        Counted {
            tcp: Some(tcp),
            read: 0,
            written: 0,
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
    /// What must live exactly as long as the connection.
    held: Option<Box<dyn Any + Send + Sync>>,
}

impl Io {
    /// Without TLS: behind a proxy, or in a test.
    pub fn plain(raw: Raw) -> Io {
        Io {
            unread: Bytes::new(),
            layer: Layer::Plain(raw),
            held: None,
        }
    }

    /// After the handshake.
    pub fn tls(stream: TlsStream<Raw>) -> Io {
        Io {
            unread: Bytes::new(),
            layer: Layer::Tls(Box::new(stream)),
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

impl std::fmt::Debug for Io {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Io")
            .field("tls", &self.is_tls())
            .field("wire", &self.wire())
            .finish_non_exhaustive()
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
        layer!(self, inner => Pin::new(inner).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        layer!(self, inner => Pin::new(inner).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.layer {
            Layer::Plain(inner) => inner.is_write_vectored(),
            Layer::Tls(inner) => inner.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        layer!(self, inner => Pin::new(inner).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        layer!(self, inner => Pin::new(inner).poll_shutdown(cx))
    }
}
