//! Connections: who may have one, what waits to be sent, when one is closed.

use std::collections::VecDeque;
use std::io::ErrorKind::{Interrupted, WouldBlock};
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
    id: Holder,
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

#[derive(Default)]
pub(crate) struct Peers {
    all: Vec<Peer>,
    gateway: u32,
    last: Holder,
    complained: Option<Instant>,
    unsaid: u32,
}

impl Peer {
    fn send(&mut self, reply: &Reply, fd: Option<OwnedFd>) {
        if self.out.len() >= UNREAD {
            return self.closed = true;
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
                Err(e) if e.kind() == WouldBlock => {
                    let limit = || Instant::now() + EXCHANGE_TIMEOUT;
                    self.deadline.get_or_insert_with(limit);
                    return;
                }
                Err(e) if e.kind() == Interrupted => {}
                Err(_) => return self.closed = true,
            }
        }
    }

    /// One request; an empty reason when there is none to be read now, or ever.
    fn read(&mut self) -> Result<Request, String> {
        // One byte more than a frame has: a longer one is seen to be longer.
        let mut buf = [0; REQUEST_LEN + 1];
        let got = match seqpacket::recv(self.socket.as_fd(), &mut buf, false) {
            Err(e) if [WouldBlock, Interrupted].contains(&e.kind()) => return Err(String::new()),
            other => other.map_err(|e| e.to_string()),
        };
        // Whatever else it is than a frame ends the connection.
        self.closed = true;
        let got = got?;
        if got.surplus_fds {
            return Err("it sent descriptors".to_owned());
        }
        if got.len == 0 {
            return Err(String::new());
        }
        let request = Request::decode(&buf[..got.len]).map_err(|e| e.to_string())?;
        self.closed = false;
        Ok(request)
    }
}

impl Peers {
    pub(crate) fn new(gateway: u32) -> Peers {
        let none = Peers::default();
        Peers { gateway, ..none }
    }

    /// Takes one connection, and keeps it if it is the gateway's. Nothing is read before that is known.
    pub(crate) fn accept(&mut self, listener: BorrowedFd<'_>, now: Instant) {
        let found = seqpacket::accept(listener);
        let found = found.and_then(|s| Ok((seqpacket::peer_cred(s.as_fd())?, s)));
        let Ok((cred, socket)) = found else { return };
        let (uid, gateway) = (cred.uid, self.gateway);
        if uid != gateway {
            let who = format!("uid {uid}, only the gateway's uid {gateway} is served");
            return self.complain(now, &format!("a connection of {who}"));
        }
        if self.all.len() >= MOST {
            let why = "more connections than a gateway and its successor need";
            return self.complain(now, why);
        }
        self.last += 1;
        let process = seqpacket::peer_pidfd(socket.as_fd());
        self.all.push(Peer {
            id: self.last,
            greeted: false,
            process: process.ok().filter(|_| cred.pid != 0),
            socket,
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
        let more = match std::mem::take(&mut self.unsaid) {
            0 => String::new(),
            unsaid => format!(" (and {unsaid} more like it)"),
        };
        say!(warning: "closed a connection: {why}{more}");
        self.complained = Some(now);
    }

    pub(crate) fn get(&mut self, id: Holder) -> Option<&mut Peer> {
        self.all.iter_mut().find(|p| p.id == id)
    }

    /// In the order of [`Peers::poll_fds`].
    pub(crate) fn ids(&self) -> Vec<Holder> {
        self.all.iter().map(|p| p.id).collect()
    }

    pub(crate) fn greeted(&self) -> usize {
        self.all.iter().filter(|p| p.greeted).count()
    }

    /// Sends to one that may be gone already.
    pub(crate) fn send(&mut self, id: Holder, reply: &Reply, fd: Option<OwnedFd>) {
        if let Some(p) = self.get(id) {
            p.send(reply, fd);
        }
    }

    pub(crate) fn tell_all(&mut self, notice: &Reply) {
        for p in self.all.iter_mut().filter(|p| p.greeted) {
            p.send(notice, None);
        }
    }

    /// Two descriptors for each peer: its socket, and its process.
    pub(crate) fn poll_fds<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        let when = |wanted, events| if wanted { events } else { PollFlags::empty() };
        for p in &self.all {
            let idle = p.out.is_empty();
            let events = when(idle, PollFlags::POLLIN) | when(!idle, PollFlags::POLLOUT);
            fds.push(PollFd::new(p.socket.as_fd(), events));
            let process = p.process.as_ref().unwrap_or(&p.socket);
            let events = when(p.process.is_some(), PollFlags::POLLIN);
            fds.push(PollFd::new(process.as_fd(), events));
        }
    }

    /// Reads one request; `None` when there is none, or the peer has been closed for what it sent.
    pub(crate) fn read(&mut self, id: Holder, now: Instant) -> Option<Request> {
        let peer = self.get(id).filter(|p| !p.closed)?;
        if !peer.out.is_empty() {
            peer.flush();
            return None;
        }
        match peer.read() {
            Err(why) if !why.is_empty() => self.complain(now, &why),
            other => return other.ok(),
        }
        None
    }

    /// Closes a peer whose process is gone.
    pub(crate) fn process_gone(&mut self, id: Holder) {
        if let Some(p) = self.get(id) {
            p.closed |= p.process.is_some();
        }
    }

    pub(crate) fn close(&mut self, id: Holder) {
        if let Some(p) = self.get(id) {
            p.closed = true;
        }
    }

    pub(crate) fn greet(&mut self, id: Holder) {
        if let Some(p) = self.get(id) {
            (p.greeted, p.deadline) = (true, None);
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.all.iter().filter_map(|p| p.deadline).min()
    }

    pub(crate) fn expire(&mut self, now: Instant) {
        for p in &mut self.all {
            p.closed |= p.deadline.is_some_and(|d| d <= now);
        }
    }

    /// Takes the closed ones out and returns their ids.
    pub(crate) fn bury(&mut self) -> Vec<Holder> {
        let gone = self.all.extract_if(.., |p| p.closed);
        gone.map(|p| p.id).collect()
    }
}
