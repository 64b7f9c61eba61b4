//! Datagrams between the two sides of a tunnel: several flows, each sent by a
//! thread of its own, many with one system call, and received the same way.
//!
//! A sender's own call carries its packets through all of the laboratory's wires
//! and through the kernel of the host in between, as far as the next program.
//! One sender therefore gets less through than a tunnel could take, and receivers
//! that are woken for every packet slow down who wakes them.

use std::io::{IoSlice, IoSliceMut};
use std::iter::repeat_n;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt,
};
use rvpn_lab::Ns;

use crate::Way;

/// The receiver is never what loses them.
const BUFFER: usize = 64 << 20;
/// With one system call, and in one go: in the order of a network card's bursts.
const BURST: usize = 64;
/// Until a sender looks again what is due, and a receiver what has come.
const NAP: Duration = Duration::from_micros(40);
/// More than any datagram of a measurement.
const LARGEST: usize = 2048;

/// Flows that both sides know the other end of.
pub(crate) struct Flows {
    from: Vec<UdpSocket>,
    to: Vec<UdpSocket>,
}

/// What was sent in one go, and when that was over.
pub(crate) struct Sent {
    pub(crate) packets: u64,
    pub(crate) took: Duration,
    pub(crate) end: Instant,
}

impl Flows {
    /// So many between a client and the far side's ports from this one on.
    pub(crate) fn open(
        client: &Ns,
        far: &Ns,
        first: SocketAddr,
        way: Way,
        count: u16,
    ) -> Option<Flows> {
        let pairs: Option<Vec<_>> = (0..count)
            .map(|n| {
                let at = SocketAddr::new(first.ip(), first.port() + n);
                meet(client, far, at)
            })
            .collect();
        let (near, far) = pairs?.into_iter().unzip();
        let (from, to) = match way {
            Way::Up => (near, far),
            Way::Down => (far, near),
        };
        Some(Flows { from, to })
    }

    /// Sends packets with this at their front at this rate, for so long.
    pub(crate) fn send(&self, id: u64, length: usize, rate: f64, limit: Duration) -> Sent {
        let each = rate / self.from.len() as f64;
        let ready = Barrier::new(self.from.len() + 1);
        thread::scope(|scope| {
            let run = |from| {
                let mut payload = [0; LARGEST];
                payload[..8].copy_from_slice(&id.to_ne_bytes());
                ready.wait();
                pour(from, &payload[..length], each, limit)
            };
            let senders = self.from.iter();
            let senders: Vec<_> = senders.map(|from| scope.spawn(move || run(from))).collect();
            ready.wait();
            let start = Instant::now();
            let packets = senders.into_iter().filter_map(|s| s.join().ok()).sum();
            let end = Instant::now();
            Sent {
                packets,
                took: end - start,
                end,
            }
        })
    }

    /// Counts what arrives until it is told to stop.
    pub(crate) fn receive(&self, counter: &Counter) {
        let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BURST, None);
        let mut buffers = [[0; 8]; BURST];
        while !counter.stop.load(Relaxed) {
            let mut all = 0;
            for socket in &self.to {
                all += counter.take(socket, &mut headers, &mut buffers);
            }
            if all == 0 {
                thread::sleep(NAP);
            }
        }
    }
}

fn meet(client: &Ns, far: &Ns, at: SocketAddr) -> Option<(UdpSocket, UdpSocket)> {
    let there = far.run(|| UdpSocket::bind(at)).ok()?;
    let here = client
        .run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(at)?;
            Ok::<_, std::io::Error>(socket)
        })
        .ok()?;
    let short = Some(Duration::from_millis(20));
    there.set_read_timeout(short).ok()?;
    for socket in [&here, &there] {
        setsockopt(socket, sockopt::RcvBufForce, &BUFFER).ok()?;
    }
    for _ in 0..100 {
        here.send(&[0; 8]).ok()?;
        if let Ok((_, from)) = there.recv_from(&mut [0; 64]) {
            there.connect(from).ok()?;
            return Some((here, there));
        }
    }
    None
}

/// One sender's part. What cannot be sent is counted as well, as lost.
fn pour(from: &UdpSocket, payload: &[u8], rate: f64, limit: Duration) -> u64 {
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BURST, None);
    let (start, mut sent) = (Instant::now(), 0_u64);
    while start.elapsed() < limit {
        let due = (start.elapsed().as_secs_f64() * rate) as u64;
        let burst = due.saturating_sub(sent).min(BURST as u64);
        let mut rest = burst as usize;
        while rest > 0 {
            let packet = [IoSlice::new(payload)];
            let taken = sendmmsg(
                from.as_raw_fd(),
                &mut headers,
                repeat_n(&packet, rest),
                [None; BURST],
                [],
                MsgFlags::empty(),
            );
            rest -= taken.map_or(1, Iterator::count).clamp(1, rest);
        }
        sent += burst;
        if sent >= due {
            thread::sleep(NAP);
        }
    }
    sent
}

/// What arrives of the present trial.
pub(crate) struct Counter {
    epoch: Instant,
    id: AtomicU64,
    pub(crate) seen: AtomicU64,
    /// When the last one came, in nanoseconds since the epoch.
    last: AtomicU64,
    pub(crate) stop: AtomicBool,
}

impl Default for Counter {
    fn default() -> Counter {
        Counter {
            epoch: Instant::now(),
            id: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            last: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }
}

impl Counter {
    pub(crate) fn begin(&self) -> u64 {
        let id = self.id.fetch_add(1, Relaxed) + 1;
        self.seen.store(0, Relaxed);
        id
    }

    /// When the last one came.
    pub(crate) fn last(&self) -> Instant {
        self.epoch + Duration::from_nanos(self.last.load(Relaxed))
    }

    /// Takes what is there, and how much that was.
    fn take(
        &self,
        socket: &UdpSocket,
        headers: &mut MultiHeaders<SockaddrIn>,
        buffers: &mut [[u8; 8]; BURST],
    ) -> usize {
        // The rest of each is cut off.
        let mut slices = buffers.each_mut().map(|b| [IoSliceMut::new(b)]);
        let flags = MsgFlags::MSG_DONTWAIT;
        let taken = recvmmsg(socket.as_raw_fd(), headers, &mut slices, flags, None);
        let Ok(taken) = taken.map(Iterator::count) else {
            return 0;
        };
        let id = self.id.load(Relaxed).to_ne_bytes();
        let ours = buffers[..taken].iter().filter(|b| **b == id).count();
        if ours > 0 {
            let now = self.epoch.elapsed().as_nanos();
            self.last.store(now as u64, Relaxed);
            self.seen.fetch_add(ours as u64, Relaxed);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::sync::atomic::Ordering::Relaxed;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::{Counter, Flows};

    /// Over the loopback.
    fn flows(count: usize) -> Flows {
        let pair = |_| {
            let [one, other] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("a socket"));
            one.connect(other.local_addr().expect("an address"))
                .expect("connect");
            (one, other)
        };
        let (from, to) = (0..count).map(pair).unzip();
        Flows { from, to }
    }

    #[test]
    fn what_all_flows_send_is_counted_and_nothing_of_an_earlier_trial() {
        let (flows, counter) = (flows(2), Counter::default());
        thread::scope(|scope| {
            scope.spawn(|| flows.receive(&counter));
            let early = counter.begin();
            let limit = Duration::from_millis(200);
            let sent = flows.send(counter.begin(), 36, 4000.0, limit);
            // Late, of a trial that is over.
            flows.send(early, 36, 4000.0, limit);
            let begun = Instant::now();
            while counter.seen.load(Relaxed) < sent.packets
                && begun.elapsed() < Duration::from_secs(5)
            {
                thread::sleep(Duration::from_millis(1));
            }
            counter.stop.store(true, Relaxed);
            assert_eq!(counter.seen.load(Relaxed), sent.packets);
            // As many as are due in that time, but for what came due at its end.
            assert!((50..=800).contains(&sent.packets), "{}", sent.packets);
            assert!(counter.last() >= sent.end - sent.took);
        });
    }
}
