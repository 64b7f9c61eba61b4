//! Connections: who may have one, what waits to be sent, when one is closed.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use rvpn_ipc::frame::{REPLY_LEN, REQUEST_LEN};
use rvpn_ipc::{EXCHANGE_TIMEOUT, Reply, Request, seqpacket};

use crate::pool::Holder;

/// The gateway, its successor, and a moment's overlap.
const MOST: usize = 4;
/// Answers and notices that may wait for a peer that reads slowly.
const UNREAD: usize = 256;
/// At most one line about bad peers in this time.
const QUIET: Duration = Duration::from_secs(1);

pub(crate) struct Peer {
    pub(crate) id: Holder,
    /// It has said hello.
    pub(crate) greeted: bool,
    socket: OwnedFd,
    /// Readable when the process is gone, however its socket is kept open.
    process: Option<OwnedFd>,
    out: VecDeque<([u8; REPLY_LEN], Option<OwnedFd>)>,
    /// By when it must have said hello, or read what waits.
    deadline: Option<Instant>,
    closed: bool,
}

pub(crate) struct Peers {
    all: Vec<Peer>,
    gateway: u32,
    last: Holder,
    complained: Option<Instant>,
    unsaid: u32,
}

impl Peer {
    pub(crate) fn send(&mut self, reply: &Reply, fd: Option<OwnedFd>) {
        if self.out.len() >= UNREAD {
            self.closed = true;
            return;
        }
        self.out.push_back((reply.encode(), fd));
        self.flush();
    }

    fn flush(&mut self) {
        while let Some((bytes, fd)) = self.out.front() {
            match seqpacket::send(self.socket.as_fd(), bytes, fd.as_ref().map(AsFd::as_fd)) {
                Ok(()) => {
                    // Our copy of the descriptor is closed here, at once.
                    self.out.pop_front();
                    self.deadline = None;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.deadline
                        .get_or_insert_with(|| Instant::now() + EXCHANGE_TIMEOUT);
                    return;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.closed = true;
                    return;
                }
            }
        }
    }
}

impl Peers {
    pub(crate) fn new(gateway: u32) -> Peers {
        Peers {
            all: Vec::new(),
            gateway,
            last: 0,
            complained: None,
            unsaid: 0,
        }
    }

    /// Takes one connection, and keeps it if it is the gateway's. Nothing is read before that is known.
    pub(crate) fn accept(&mut self, listener: BorrowedFd<'_>, now: Instant) {
        let Ok(socket) = seqpacket::accept(listener) else {
            return;
        };
        let cred = match seqpacket::peer_cred(socket.as_fd()) {
            Ok(cred) if cred.uid == self.gateway && self.all.len() < MOST => cred,
            Ok(cred) if cred.uid == self.gateway => {
                return self.complain(
                    now,
                    "more connections than a gateway and its successor need",
                );
            }
            Ok(cred) => {
                let why = format!(
                    "a connection of uid {}, only the gateway's uid {} is served",
                    cred.uid, self.gateway
                );
                return self.complain(now, &why);
            }
            Err(e) => return self.complain(now, &e.to_string()),
        };
        self.last += 1;
        let process = if cred.pid == 0 {
            None
        } else {
            seqpacket::peer_pidfd(socket.as_fd()).ok()
        };
        self.all.push(Peer {
            id: self.last,
            greeted: false,
            socket,
            process,
            out: VecDeque::new(),
            deadline: Some(now + EXCHANGE_TIMEOUT),
            closed: false,
        });
    }

    /// One line a second at most, with the number of those left out.
    fn complain(&mut self, now: Instant, why: &str) {
        if self.complained.is_some_and(|t| now - t < QUIET) {
            self.unsaid += 1;
            return;
        }
        let unsaid = std::mem::take(&mut self.unsaid);
        let more = if unsaid > 0 {
            format!(" (and {unsaid} more like it)")
        } else {
            String::new()
        };
        say!(4, "closed a connection: {why}{more}");
        self.complained = Some(now);
    }

    pub(crate) fn get(&mut self, id: Holder) -> Option<&mut Peer> {
        self.all.iter_mut().find(|p| p.id == id)
    }

    pub(crate) fn id_at(&self, at: usize) -> Option<Holder> {
        self.all.get(at).map(|p| p.id)
    }

    pub(crate) fn greeted(&self) -> usize {
        self.all.iter().filter(|p| p.greeted).count()
    }

    pub(crate) fn tell_all(&mut self, notice: &Reply) {
        for p in self.all.iter_mut().filter(|p| p.greeted) {
            p.send(notice, None);
        }
    }

    /// Two descriptors for each peer: its socket, and its process.
    pub(crate) fn poll_fds<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        for p in &self.all {
            let events = if p.out.is_empty() {
                PollFlags::POLLIN
            } else {
                PollFlags::POLLOUT
            };
            fds.push(PollFd::new(p.socket.as_fd(), events));
            let process = p.process.as_ref().unwrap_or(&p.socket);
            let events = if p.process.is_some() {
                PollFlags::POLLIN
            } else {
                PollFlags::empty()
            };
            fds.push(PollFd::new(process.as_fd(), events));
        }
    }

    /// Reads one request; `None` when there is none, or the peer has been closed for what it sent.
    pub(crate) fn read(&mut self, id: Holder, now: Instant) -> Option<Request> {
        let peer = self.get(id)?;
        if peer.closed {
            return None;
        }
        if !peer.out.is_empty() {
            peer.flush();
            return None;
        }
        // One byte more than a frame has: a longer one is seen to be longer.
        let mut buf = [0; REQUEST_LEN + 1];
        let why = match seqpacket::recv(peer.socket.as_fd(), &mut buf, false) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return None;
            }
            Err(e) => e.to_string(),
            Ok(r) if r.len == 0 && !r.surplus_fds => {
                peer.closed = true;
                return None;
            }
            Ok(r) if r.surplus_fds => "it sent descriptors".to_owned(),
            Ok(r) => match Request::decode(&buf[..r.len]) {
                Ok(request) => return Some(request),
                Err(e) => e.to_string(),
            },
        };
        peer.closed = true;
        self.complain(now, &why);
        None
    }

    /// Closes a peer whose process is gone.
    pub(crate) fn process_gone(&mut self, id: Holder) {
        if let Some(p) = self.get(id)
            && p.process.is_some()
        {
            p.closed = true;
        }
    }

    pub(crate) fn close(&mut self, id: Holder) {
        if let Some(p) = self.get(id) {
            p.closed = true;
        }
    }

    pub(crate) fn greet(&mut self, id: Holder) {
        if let Some(p) = self.get(id) {
            p.greeted = true;
            p.deadline = None;
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.all.iter().filter_map(|p| p.deadline).min()
    }

    pub(crate) fn expire(&mut self, now: Instant) {
        for p in self
            .all
            .iter_mut()
            .filter(|p| p.deadline.is_some_and(|d| d <= now))
        {
            p.closed = true;
        }
    }

    /// Takes the closed ones out and returns their ids.
    pub(crate) fn bury(&mut self) -> Vec<Holder> {
        self.all
            .extract_if(.., |p| p.closed)
            .map(|p| p.id)
            .collect()
    }
}
