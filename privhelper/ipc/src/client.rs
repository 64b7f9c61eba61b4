//! A blocking client half, for tests and tools.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::frame::{
    Class, FLAG_RESUMED, FLAG_SUCCESSOR, FrameError, Generation, Key, Kind, Op, REPLY_LEN, Reply,
    Request, Slot, Status,
};
use crate::{EXCHANGE_TIMEOUT, seqpacket};

/// Why a request got no lease.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed or timed out.
    #[error("helper socket: {0}")]
    Io(#[from] io::Error),
    /// Whoever listens is not the user the helper runs as.
    #[error(
        "uid {found}, not the helper's uid {expected}, serves the helper's socket: another program is in its place"
    )]
    WrongPeer {
        /// The uid found.
        found: u32,
        /// The uid it should have.
        expected: u32,
    },
    /// The answer is not a frame.
    #[error("the helper's answer: {0}")]
    Frame(#[from] FrameError),
    /// The helper said no.
    #[error("the helper refused: {}", .0.status)]
    Refused(Reply),
    /// The helper closed the connection.
    #[error("the helper closed the connection")]
    Closed,
    /// The answer does not fit the request.
    #[error("the helper's answer does not fit: {0}")]
    Mismatch(&'static str),
}

type Result<T> = std::result::Result<T, ClientError>;

/// A slot of the pool in our hands.
#[derive(Debug)]
pub struct Lease {
    /// Addresses and the rest, as answered.
    pub reply: Reply,
    /// The attached TUN, for kinds that have one.
    pub tun: Option<OwnedFd>,
}

impl Lease {
    /// Whether the key had the slot already.
    pub fn resumed(&self) -> bool {
        self.reply.flags & FLAG_RESUMED != 0
    }
}

/// One connection to the helper.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    seq: u32,
    notices: VecDeque<Reply>,
}

impl Client {
    /// Connects, checks that `helper_uid` serves the socket, and says hello.
    pub fn connect(path: &Path, helper_uid: u32, successor: bool) -> Result<(Client, Reply)> {
        let socket = seqpacket::connect(path)?;
        seqpacket::set_timeout(socket.as_fd(), EXCHANGE_TIMEOUT)?;
        let found = seqpacket::peer_cred(socket.as_fd())?.uid;
        if found != helper_uid {
            let expected = helper_uid;
            return Err(ClientError::WrongPeer { found, expected });
        }
        let mut client = Client {
            socket,
            seq: 0,
            notices: VecDeque::new(),
        };
        let mut hello = Request::new(Op::Hello, 0);
        hello.flags = if successor { FLAG_SUCCESSOR } else { 0 };
        let reply = client.exchange(hello)?.reply;
        Ok((client, reply))
    }

    /// The pool's figures.
    pub fn describe(&mut self) -> Result<Reply> {
        Ok(self.exchange(Request::new(Op::Describe, 0))?.reply)
    }

    /// A slot for `key`.
    pub fn acquire(&mut self, key: Key, kind: Kind, class: Class) -> Result<Lease> {
        let (wanted, mut acquire) = (kind.has_tun(), Request::new(Op::Acquire, 0));
        (acquire.key, acquire.kind, acquire.class) = (key, Some(kind), class);
        let lease = self.exchange(acquire)?;
        if lease.tun.is_some() != wanted {
            return Err(ClientError::Mismatch("the TUN descriptor"));
        }
        Ok(lease)
    }

    /// Claims a lease held before the helper or the gateway restarted.
    pub fn confirm(&mut self, slot: Slot, g: Generation, key: Key) -> Result<Reply> {
        self.about(Op::Confirm, slot, g, key)
    }

    /// Leaves the lease to its linger time. The caller closes its TUN first.
    pub fn linger(&mut self, slot: Slot, g: Generation) -> Result<()> {
        self.about(Op::Linger, slot, g, Key::NONE).map(drop)
    }

    /// Gives the lease back. The caller closes its TUN first.
    pub fn release(&mut self, slot: Slot, g: Generation) -> Result<()> {
        self.about(Op::Release, slot, g, Key::NONE).map(drop)
    }

    fn about(&mut self, op: Op, slot: Slot, g: Generation, key: Key) -> Result<Reply> {
        let mut request = Request::new(op, 0);
        (request.slot, request.generation, request.key) = (slot, g, key);
        Ok(self.exchange(request)?.reply)
    }

    /// The oldest notice that arrived with an answer and was not taken yet.
    pub fn take_notice(&mut self) -> Option<Reply> {
        self.notices.pop_front()
    }

    /// Waits up to the exchange timeout for a notice.
    pub fn wait_notice(&mut self) -> Result<Reply> {
        if let Some(notice) = self.notices.pop_front() {
            return Ok(notice);
        }
        let (reply, _) = self.receive()?;
        match reply.op {
            None => Ok(reply),
            Some(_) => Err(ClientError::Mismatch("an answer nobody waits for")),
        }
    }

    /// The socket, for tests that send what this client would not.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&mut self) -> Result<(Reply, Option<OwnedFd>)> {
        let mut buf = [0; REPLY_LEN];
        let got = unbroken(|| seqpacket::recv(self.socket.as_fd(), &mut buf, true))?;
        if got.len == 0 {
            return Err(ClientError::Closed);
        }
        if got.truncated || got.surplus_fds {
            let what = "more bytes or descriptors than one answer has";
            return Err(ClientError::Mismatch(what));
        }
        Ok((Reply::decode(&buf[..got.len])?, got.fd))
    }

    /// Sends a request under the next number and waits for its answer.
    fn exchange(&mut self, request: Request) -> Result<Lease> {
        self.seq = self.seq.checked_add(1).unwrap_or(1);
        let (op, seq) = (request.op, self.seq);
        let frame = Request { seq, ..request }.encode();
        unbroken(|| seqpacket::send(self.socket.as_fd(), &frame, None))?;
        loop {
            let (reply, tun) = self.receive()?;
            match reply.op {
                None => self.notices.push_back(reply),
                Some(answered) if answered != op || reply.seq != seq => {
                    return Err(ClientError::Mismatch("operation or sequence number"));
                }
                Some(_) if reply.status == Status::Ok => return Ok(Lease { reply, tun }),
                Some(_) => return Err(ClientError::Refused(reply)),
            }
        }
    }
}

/// A socket with a timeout says that any signal came, even one that means
/// nothing, such as the end of a child.
fn unbroken<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
