//! Connections: who may have one, and when one is closed.

use std::collections::BTreeMap;
use std::io::ErrorKind::WouldBlock;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rvpn_ipc::frame::REQUEST_LEN;
use rvpn_ipc::{EXCHANGE_TIMEOUT, Reply, Request, seqpacket};

use crate::pool::Holder;

/// The gateway, its successor, and a moment's overlap.
const MOST: usize = 4;
/// At most one line about bad peers in this time.
const QUIET: Duration = Duration::from_secs(1);

pub(super) struct Peer {
    socket: OwnedFd,
    /// Readable when the process is gone, however its socket is kept open.
    pub(super) process: Option<OwnedFd>,
    /// By when it must have said hello; none once it has.
    pub(super) deadline: Option<Instant>,
    pub(super) closed: bool,
}

impl Peer {
    pub(super) fn greeted(&self) -> bool {
        self.deadline.is_none()
    }

    /// The kernel keeps some hundred frames for a peer that reads slowly; one for
    /// which there is no room ends the connection.
    fn send(&mut self, reply: &Reply, fd: Option<&OwnedFd>) {
        let sent = seqpacket::send(self.socket.as_fd(), &reply.encode(), fd.map(AsFd::as_fd));
        self.closed |= sent.is_err();
    }

    /// One request, if there is one. Whatever else it is than a frame ends the connection.
    fn read(&mut self) -> Result<Option<Request>, String> {
        // One byte more than a frame has: a longer one is seen to be longer.
        let mut buf = [0; REQUEST_LEN + 1];
        let got = match seqpacket::recv(self.socket.as_fd(), &mut buf, false) {
            Err(e) if e.kind() == WouldBlock => return Ok(None),
            other => other.map_err(|e| e.to_string())?,
        };
        if got.surplus_fds {
            return Err("it sent descriptors".to_owned());
        }
        if got.len == 0 {
            self.closed = true;
            return Ok(None);
        }
        let request = Request::decode(&buf[..got.len]);
        request.map(Some).map_err(|e| e.to_string())
    }
}

#[derive(Default)]
pub(super) struct Peers {
    pub(super) all: BTreeMap<Holder, Peer>,
    /// The one user they may be.
    gateway: u32,
    last: Holder,
    complained: Option<Instant>,
    unsaid: u32,
}

impl Peers {
    pub(super) fn of(gateway: u32) -> Peers {
        let none = Peers::default();
        Peers { gateway, ..none }
    }

    /// Takes one connection, and keeps it if it is the gateway's. Nothing is read before that is known.
    pub(super) fn accept(&mut self, listener: BorrowedFd<'_>) {
        let found = seqpacket::accept(listener);
        let found = found.and_then(|s| Ok((seqpacket::peer_cred(s.as_fd())?, s)));
        let Ok((cred, socket)) = found else { return };
        let (uid, gateway) = (cred.uid, self.gateway);
        if uid != gateway {
            let who = format!("uid {uid}, only the gateway's uid {gateway} is served");
            return self.complain(&format!("a connection of {who}"));
        }
        if self.all.len() >= MOST {
            return self.complain("more connections than a gateway and its successor need");
        }
        self.last += 1;
        let process = seqpacket::peer_pidfd(socket.as_fd());
        let peer = Peer {
            process: process.ok().filter(|_| cred.pid != 0),
            socket,
            deadline: Some(Instant::now() + EXCHANGE_TIMEOUT),
            closed: false,
        };
        self.all.insert(self.last, peer);
    }

    /// One line a second at most, with the number of those left out.
    fn complain(&mut self, why: &str) {
        let now = Instant::now();
        if self.complained.is_some_and(|t| now - t < QUIET) {
            self.unsaid += 1;
            return;
        }
        let unsaid = std::mem::take(&mut self.unsaid);
        say!(warning: "closed a connection: {why} (and {unsaid} more unsaid)");
        self.complained = Some(now);
    }

    pub(super) fn greeted(&self) -> usize {
        let open = self.all.values().filter(|p| !p.closed);
        open.filter(|p| p.greeted()).count()
    }

    /// Sends to one that may be gone already. Our copy of the descriptor is closed here, at once.
    pub(super) fn send(&mut self, id: Holder, reply: &Reply, fd: Option<OwnedFd>) {
        if let Some(p) = self.all.get_mut(&id) {
            p.send(reply, fd.as_ref());
        }
    }

    pub(super) fn tell_all(&mut self, notice: &Reply) {
        let greeted = self.all.values_mut().filter(|p| p.greeted());
        greeted.for_each(|p| p.send(notice, None));
    }

    /// Two descriptors for each peer: its socket, and its process where it is known.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let peers = self.all.values();
        let fds = peers.flat_map(|p| [&p.socket, p.process.as_ref().unwrap_or(&p.socket)]);
        fds.map(AsFd::as_fd)
    }

    /// Reads one request; `None` when there is none, or the peer has been closed for what it sent.
    pub(super) fn read(&mut self, id: Holder) -> Option<Request> {
        let peer = self.all.get_mut(&id).filter(|p| !p.closed)?;
        match peer.read() {
            Ok(request) => request,
            Err(why) => {
                peer.closed = true;
                self.complain(&why);
                None
            }
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.all.values().filter_map(|p| p.deadline).min()
    }

    /// Takes out those that are closed, or have not said hello in time, and returns their ids.
    pub(super) fn bury(&mut self, now: Instant) -> Vec<Holder> {
        let over = |p: &Peer| p.closed || p.deadline.is_some_and(|d| d <= now);
        let gone = self.all.extract_if(.., |_, p| over(p));
        gone.map(|(id, _)| id).collect()
    }
}
