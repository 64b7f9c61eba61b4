//! Two small tunnels of the same libraries as ours, to compare with: what the
//! rest of ours is good for shows beside them.
//!
//! One is what one writes first: every packet is a message of its own, sent at
//! once. The other knows super-packets and sends what waits in one message, but
//! leaves its queue to the device, which it does not read while the socket is
//! full: up to 500 packets wait there, and nobody manages them.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use rvpn_lab::Ns;
use rvpn_lab::topology::{FAR4, NB4};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch as flag;
use tokio::time::sleep;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async, client_async};

use crate::device::{LARGEST, tun, watch};
use crate::measure::Outcome;
use crate::tls::Tls;

/// The device's queue, as long as the kernel makes it by itself.
const QUEUE: u32 = 500;
/// What one message holds at most, but for its last packet.
const BATCH: usize = 64 * 1024;
/// Before each packet of a batch.
const LENGTH: usize = 4;
/// The threads of the gateway's ends.
pub(crate) const SERVER: &str = "naive-server";
pub(crate) const LONG_SERVER: &str = "long-server";
const CLIENT: &str = "naive-client";

/// One of the two.
pub(crate) struct Naive {
    long: bool,
    tls: Arc<Tls>,
}

/// An end that runs until it is dropped.
pub(crate) struct End {
    stop: flag::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Naive {
    pub(crate) fn new(long: bool) -> Outcome<Naive> {
        let tls = Arc::new(Tls::new()?);
        Ok(Naive { long, tls })
    }

    /// Device, network and port, so that both can run beside each other.
    fn place(&self) -> (&'static str, &'static str, SocketAddr) {
        let at = |port| SocketAddr::new(NB4.parse().expect("an address"), port);
        if self.long {
            ("long0", "10.6.2", at(4435))
        } else {
            ("naive0", "10.6.1", at(4434))
        }
    }

    fn device(&self, ns: &Ns, host: u8) -> io::Result<File> {
        let (name, network, _) = self.place();
        let file = tun(ns, name, self.long, QUEUE)?;
        ns.ip(&format!("addr add {network}.{host}/24 dev {name}"));
        Ok(file)
    }

    /// Serves one client after the other.
    pub(crate) fn serve(&self, ns: &Ns) -> Outcome<End> {
        let device = self.device(ns, 1)?;
        let listener = ns.tcp(&self.place().2.to_string());
        let (tls, long) = (Arc::clone(&self.tls), self.long);
        let name = if long { LONG_SERVER } else { SERVER };
        End::start(name, async move || {
            let device = watch(device)?;
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (socket, _) = listener.accept().await?;
                socket.set_nodelay(true)?;
                let client = async {
                    let stream = tls.acceptor.accept(socket).await?;
                    let socket = accept_async(stream).await.map_err(io::Error::other)?;
                    carry(socket, &device, long).await
                };
                // The next one has its turn when this one is gone.
                let _gone = client.await;
            }
        })
    }

    /// Connects a client, whose device is there when this returns.
    pub(crate) fn connect(&self, ns: &Ns) -> Outcome<End> {
        let (name, _, at) = self.place();
        let device = self.device(ns, 2)?;
        ns.ip(&format!("route add {FAR4}/32 dev {name}"));
        let socket = ns.run(|| TcpStream::connect_timeout(&at, Duration::from_secs(5)))?;
        socket.set_nodelay(true)?;
        let (tls, long) = (Arc::clone(&self.tls), self.long);
        End::start(CLIENT, async move || {
            let device = watch(device)?;
            let stream = tls.connect(socket).await?;
            let request = format!("wss://{NB4}/");
            let opened = client_async(request, stream).await;
            let (socket, _) = opened.map_err(io::Error::other)?;
            carry(socket, &device, long).await
        })
    }
}

impl End {
    fn start<F: Future<Output = io::Result<()>>>(
        name: &str,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Outcome<End> {
        let (stop, mut stopped) = flag::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    // A failure shows as a tunnel that carries nothing.
                    _ = work() => {}
                    _ = stopped.wait_for(|stop| *stop) => {}
                }
            });
        })?;
        let thread = Some(thread);
        Ok(End { stop, thread })
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // Its device is gone with it.
            let _ = thread.join();
        }
    }
}

async fn carry<S: AsyncRead + AsyncWrite + Unpin>(
    socket: WebSocketStream<S>,
    device: &AsyncFd<File>,
    long: bool,
) -> io::Result<()> {
    let (mut sink, mut stream) = socket.split();
    let out = async {
        let mut packet = vec![0; LARGEST];
        loop {
            let n = read(device, &mut packet).await?;
            let message = if long {
                let mut batch = Vec::with_capacity(BATCH + LARGEST);
                append(&mut batch, &packet[..n]);
                while batch.len() < BATCH
                    && let Ok(n) = device.get_ref().read(&mut packet)
                {
                    append(&mut batch, &packet[..n]);
                }
                Bytes::from(batch)
            } else {
                Bytes::copy_from_slice(&packet[..n])
            };
            // And not before it is sent is anything read.
            let sent = sink.send(Message::Binary(message)).await;
            sent.map_err(io::Error::other)?;
        }
    };
    let inward = async {
        while let Some(message) = stream.next().await {
            let Message::Binary(message) = message.map_err(io::Error::other)? else {
                continue;
            };
            let mut rest = &message[..];
            while !rest.is_empty() {
                let packet;
                (packet, rest) = if long {
                    first(rest).ok_or(io::ErrorKind::InvalidData)?
                } else {
                    (rest, &[][..])
                };
                write(device, packet).await;
            }
        }
        Ok(())
    };
    tokio::select! {
        done = out => done,
        done = inward => done,
    }
}

fn append(batch: &mut Vec<u8>, packet: &[u8]) {
    batch.extend((packet.len() as u32).to_le_bytes());
    batch.extend(packet);
}

/// The first packet of a batch, and the rest.
fn first(batch: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = batch.split_first_chunk::<LENGTH>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

async fn read(device: &AsyncFd<File>, packet: &mut [u8]) -> io::Result<usize> {
    // Most often there is none, and asking costs less than being told.
    loop {
        let mut ready = device.readable().await?;
        if let Ok(read) = ready.try_io(|device| device.get_ref().read(packet)) {
            return read;
        }
    }
}

async fn write(device: &AsyncFd<File>, packet: &[u8]) {
    // A device that takes no more now does soon; what it refuses is lost.
    while let Err(e) = device.get_ref().write(packet) {
        if e.kind() != io::ErrorKind::WouldBlock {
            return;
        }
        sleep(Duration::from_millis(1)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::{append, first};

    #[test]
    fn a_batch_comes_apart_into_its_packets() {
        let mut batch = Vec::new();
        append(&mut batch, b"one");
        append(&mut batch, b"");
        append(&mut batch, b"three");
        let (packet, rest) = first(&batch).expect("a packet");
        assert_eq!(packet, b"one");
        let (packet, rest) = first(rest).expect("an empty one");
        assert_eq!(packet, b"");
        assert_eq!(first(rest), Some((&b"three"[..], &b""[..])));
        assert_eq!(first(&batch[..5]), None, "cut off");
    }
}
