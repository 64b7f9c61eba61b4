//! Echo requests, answered by the far kernel: no program there adds its wake-up.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use rvpn_lab::Ns;

/// Answers that come later than this after the last request are lost.
const GRACE: Duration = Duration::from_millis(500);
/// More than a measurement sends.
const MOST: usize = 60_000;

/// Round trips of one measurement.
#[derive(Debug, Default)]
pub(crate) struct Trips {
    pub(crate) sent: usize,
    millis: Vec<f64>,
}

impl Trips {
    /// The value below which this share of them is, in milliseconds.
    pub(crate) fn percentile(&self, percent: usize) -> Option<f64> {
        let mut sorted = self.millis.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        sorted
            .get((sorted.len() * percent / 100).min(last))
            .copied()
    }

    pub(crate) fn lost(&self) -> usize {
        self.sent - self.millis.len()
    }
}

/// Lets programs of this namespace send echo requests without a raw socket.
pub(crate) fn allow(ns: &Ns) {
    ns.sysctl("net/ipv4/ping_group_range", "0 0");
}

fn open(ns: &Ns) -> UdpSocket {
    ns.run(|| {
        let fd = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Icmp,
        );
        UdpSocket::from(fd.expect("a socket for echo requests"))
    })
}

fn request(sequence: u16) -> [u8; 64] {
    let mut packet = [0x5a; 64];
    // Echo request; the kernel fills in checksum and identifier.
    packet[..6].copy_from_slice(&[8, 0, 0, 0, 0, 0]);
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    packet
}

fn answered(socket: &UdpSocket) -> io::Result<usize> {
    let mut buffer = [0; 256];
    loop {
        let (n, _) = socket.recv_from(&mut buffer)?;
        if n >= 8 && buffer[0] == 0 {
            return Ok(usize::from(u16::from_be_bytes([buffer[6], buffer[7]])));
        }
    }
}

/// Sends one every so often until it is told to stop.
pub(crate) fn watch(ns: &Ns, to: Ipv4Addr, every: Duration, stop: &AtomicBool) -> Trips {
    let socket = open(ns);
    let to = SocketAddr::from((to, 0));
    let (mut begun, mut trips) = (Vec::new(), Trips::default());
    let mut due = Instant::now();
    let mut end = None;
    loop {
        let now = Instant::now();
        let stopped = stop.load(Ordering::Relaxed) || begun.len() == MOST;
        if stopped {
            let end = *end.get_or_insert(now + GRACE);
            if now >= end || trips.millis.len() == begun.len() {
                trips.sent = begun.len();
                return trips;
            }
        } else if now >= due {
            begun.push(now);
            // One that cannot be sent is one that is lost.
            let _ = socket.send_to(&request((begun.len() - 1) as u16), to);
            due = (due + every).max(now);
        }
        let wait = due.saturating_duration_since(now).min(every);
        let wait = wait.max(Duration::from_micros(200));
        if socket.set_read_timeout(Some(wait)).is_err() {
            continue;
        }
        if let Ok(sequence) = answered(&socket)
            && let Some(begun) = begun.get(sequence)
        {
            trips.millis.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
}

/// From then until the first answer, asking every two milliseconds.
pub(crate) fn first(ns: &Ns, to: Ipv4Addr, since: Instant, limit: Duration) -> Option<Duration> {
    let socket = open(ns);
    socket.set_nonblocking(true).ok()?;
    let to = SocketAddr::from((to, 0));
    let mut sequence = 0;
    while since.elapsed() < limit {
        // There is no way there until there is a tunnel.
        let _ = socket.send_to(&request(sequence), to);
        sequence = sequence.wrapping_add(1);
        let next = Instant::now() + Duration::from_millis(2);
        while Instant::now() < next {
            if answered(&socket).is_ok() {
                return Some(since.elapsed());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    None
}
