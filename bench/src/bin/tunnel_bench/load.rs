//! TCP streams that send as fast as they can, over sockets that are there.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use rvpn_lab::Ns;

use crate::Way;
use crate::cpu::Who;
use crate::tls::Tls;

pub(crate) const CHUNK: usize = 128 * 1024;
/// For a connection to be there at the far end.
const PATIENCE: Duration = Duration::from_secs(10);
/// Both ends of every stream the same, whatever the machine's default is.
const CONGESTION: &str = "cubic";

/// What was moved, once it was under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) cpu: Option<f64>,
}

impl Moved {
    pub(crate) fn gigabits(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.seconds
    }

    /// CPU seconds of the gateway's side for 10^9 bytes.
    pub(crate) fn cost(&self) -> Option<f64> {
        let gigabytes = self.bytes as f64 * 1e-9;
        self.cpu
            .map(|cpu| cpu / gigabytes)
            .filter(|c| c.is_finite())
    }
}

/// How long a measurement runs before it counts, and how long it counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) warm: Duration,
    pub(crate) count: Duration,
}

/// One connection's two ends.
pub(crate) struct Pair {
    near: TcpStream,
    far: TcpStream,
}

/// Opens so many, from the client to an address that leads to the listener.
pub(crate) fn connect(
    client: &Ns,
    to: SocketAddr,
    listener: &TcpListener,
    streams: usize,
) -> io::Result<Vec<Pair>> {
    listener.set_nonblocking(true)?;
    // What an earlier measurement left behind is not this one's.
    while listener.accept().is_ok() {}
    let one = || {
        let near = client.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        let begun = Instant::now();
        let far = loop {
            match listener.accept() {
                Ok((far, _)) => break far,
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                Err(e) if begun.elapsed() > PATIENCE => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        far.set_nonblocking(false)?;
        for socket in [&near, &far] {
            socket.set_nodelay(true)?;
            setsockopt(socket, sockopt::TcpCongestion, &CONGESTION.into())?;
        }
        Ok(Pair { near, far })
    };
    (0..streams).map(|_| one()).collect()
}

/// Sends over all of them at once. With `tls` each connection is one of TLS,
/// whose client is the near end.
pub(crate) fn run(
    pairs: Vec<Pair>,
    way: Way,
    span: Span,
    who: &Who,
    tls: Option<&Tls>,
) -> io::Result<Moved> {
    let (moved, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let handles = pairs
        .iter()
        .flat_map(|p| [p.near.try_clone(), p.far.try_clone()]);
    let handles: Vec<TcpStream> = handles.collect::<io::Result<_>>()?;
    let (moved, stop) = (&moved, &stop);
    std::thread::scope(|scope| {
        for Pair { near, far } in pairs {
            match tls {
                None => {
                    let (from, to) = match way {
                        Way::Up => (near, far),
                        Way::Down => (far, near),
                    };
                    scope.spawn(move || send(from, stop));
                    scope.spawn(move || receive(to, moved));
                }
                Some(tls) => {
                    tls.client(scope, near, way == Way::Up, moved, stop)?;
                    tls.server(scope, far, way == Way::Down, moved, stop)?;
                }
            }
        }
        std::thread::sleep(span.warm);
        let (begun, before, cpu) = (Instant::now(), moved.load(Relaxed), who.seconds());
        std::thread::sleep(span.count);
        let (seconds, after) = (begun.elapsed().as_secs_f64(), moved.load(Relaxed));
        let cpu = who.seconds().zip(cpu).map(|(after, before)| after - before);
        stop.store(true, Relaxed);
        for socket in handles {
            // One that is gone already has nothing to end.
            let _ = socket.shutdown(Shutdown::Both);
        }
        Ok(Moved {
            bytes: after - before,
            seconds,
            cpu,
        })
    })
}

fn send(mut to: TcpStream, stop: &AtomicBool) {
    let chunk = vec![0x5a; CHUNK];
    while !stop.load(Relaxed) && to.write_all(&chunk).is_ok() {}
}

fn receive(mut from: TcpStream, moved: &AtomicU64) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(n @ 1..) = from.read(&mut chunk) {
        moved.fetch_add(n as u64, Relaxed);
    }
}
