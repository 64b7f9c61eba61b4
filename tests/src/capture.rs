//! Watching interfaces, with nothing between them and the verdict.

use std::io::Read;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};

use crate::ns::Ns;
use crate::raw::bind_packets;
use crate::read_back::ip_json;

/// A tap on all of a namespace's interfaces but loopback, or on one of them, both directions.
pub struct Capture {
    pub name: String,
    fd: OwnedFd,
    seen: Vec<Vec<u8>>,
}

impl Capture {
    /// From now on.
    pub fn on(ns: &Ns) -> Capture {
        let fd = ns.run(|| {
            let fd = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_NONBLOCK,
                SockProtocol::EthAll,
            )
            .expect("packet socket");
            // Root of a user namespace alone may not go beyond the machine's limit.
            setsockopt(&fd, sockopt::RcvBufForce, &(64 << 20))
                .or_else(|_| setsockopt(&fd, sockopt::RcvBuf, &(64 << 20)))
                .expect("buffer");
            fd
        });
        Capture {
            name: ns.name.to_owned(),
            fd,
            seen: Vec::new(),
        }
    }

    /// From now on, at this interface alone. What a TUN device carries has no
    /// link header.
    pub fn at(ns: &Ns, interface: &str) -> Capture {
        let mut capture = Capture::on(ns);
        let index = ip_json(ns, &format!("link show {interface}"))[0]["ifindex"].as_u64();
        let index = index.and_then(|n| n.try_into().ok()).expect("an index");
        bind_packets(capture.fd.as_fd(), index).expect("bind");
        // What came from elsewhere until now.
        capture.clear();
        capture
    }

    /// Everything seen so far.
    pub fn frames(&mut self) -> &[Vec<u8>] {
        let mut buf = vec![0; 70_000];
        while let Ok(n) = recv(self.fd.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
            self.seen.push(buf[..n].to_vec());
        }
        &self.seen
    }

    /// How many frames hold these bytes.
    pub fn count(&mut self, needle: &[u8]) -> usize {
        self.frames().iter().filter(|f| contains(f, needle)).count()
    }

    /// The tap itself, for who looks at more than can be kept.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Forgets what was seen.
    pub fn clear(&mut self) {
        self.frames();
        self.seen.clear();
    }
}

/// Whether the bytes occur.
pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// Waits until the descriptor is readable; false at the deadline.
pub fn readable(fd: impl AsFd, limit: std::time::Duration) -> bool {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, timeout).is_ok_and(|n| n > 0)
}

/// Everything a UDP socket has received and nobody has read.
pub fn drain_udp(s: &UdpSocket) -> Vec<Vec<u8>> {
    s.set_nonblocking(true).expect("nonblocking");
    let mut buf = vec![0; 70_000];
    let mut all = Vec::new();
    while let Ok((n, _)) = s.recv_from(&mut buf) {
        all.push(buf[..n].to_vec());
    }
    s.set_nonblocking(false).expect("blocking");
    all
}

/// Everything a stream has received until it would block or ends.
pub fn drain(mut s: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buf = [0; 65_536];
    while let Ok(n @ 1..) = s.read(&mut buf) {
        all.extend_from_slice(&buf[..n]);
    }
    all
}
