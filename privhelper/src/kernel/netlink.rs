//! Netlink messages and the sockets that carry them.
//!
//! A message, an attribute and a nest of attributes are byte strings, made by a
//! function each. Lengths and types are native-endian, attributes aligned to
//! four bytes. Answers count only when the kernel itself sent them (port 0) and
//! when they bear the sequence number of what was asked.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname,
    recvmsg, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

const HEADER: usize = 16;
/// Fits the largest message a dump brings.
const RECEIVE: usize = 32 * 1024;
const ANSWER_SECONDS: i64 = 10;

/// What an attribute can hold.
pub(crate) trait Payload {
    const FLAGS: u16 = 0;
    fn bytes(self) -> Vec<u8>;
}

macro_rules! payloads {
    ($($kind:ty: $flags:literal, $bytes:expr;)*) => { $(
        impl Payload for $kind {
            const FLAGS: u16 = $flags;
            fn bytes(self) -> Vec<u8> {
                ($bytes)(self)
            }
        }
    )* };
}

payloads! {
    // Attributes inside this one.
    Vec<u8>: 0x8000, |attributes| attributes;
    // Big-endian, as nfnetlink has numbers; rtnetlink's are given as native bytes.
    u32: 0, |n: u32| n.to_be_bytes().to_vec();
    // With its terminating zero.
    &str: 0, |s: &str| [s.as_bytes(), &[0]].concat();
    &[u8]: 0, <[u8]>::to_vec;
    [u8; 4]: 0, |b: [u8; 4]| b.to_vec();
}

/// One attribute.
pub(crate) fn attr<P: Payload>(kind: u16, payload: P) -> Vec<u8> {
    let data = payload.bytes();
    let len = u16::try_from(data.len() + 4).unwrap_or(u16::MAX);
    let head = [len, kind | P::FLAGS].map(u16::to_ne_bytes).concat();
    let mut b = [head, data].concat();
    b.resize(b.len().next_multiple_of(4), 0);
    b
}

/// Attributes side by side, themselves the payload of one: `attrs![KIND => PAYLOAD, ...]`.
macro_rules! attrs {
    ($($kind:expr => $payload:expr),*) => {{
        let all: &[Vec<u8>] = &[$($crate::kernel::netlink::attr($kind, $payload)),*];
        all.concat()
    }};
}

/// One message; its sequence number is filled in when it is sent.
pub(crate) fn message(kind: u16, flags: libc::c_int, fixed: &[u8], attrs: &[u8]) -> Vec<u8> {
    let flags = flags as u16 | libc::NLM_F_REQUEST as u16;
    let mut b = [&[0; HEADER], fixed].concat();
    b.resize(b.len().next_multiple_of(4), 0);
    b.extend(attrs);
    let len = u32::try_from(b.len()).unwrap_or(u32::MAX).to_ne_bytes();
    b[..4].copy_from_slice(&len);
    b[4..8].copy_from_slice(&[kind, flags].map(u16::to_ne_bytes).concat());
    b
}

/// A received message.
#[derive(Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    flags: u16,
    seq: u32,
    /// Who caused it, in notifications.
    pub(crate) port: u32,
    pub(crate) body: &'a [u8],
}

impl Message<'_> {
    /// What an error, an acknowledgement or the end of a dump says.
    fn result(&self) -> Option<io::Result<()>> {
        let last = [libc::NLMSG_ERROR, libc::NLMSG_DONE].contains(&i32::from(self.kind));
        let code = u32_at(self.body, 0).unwrap_or(0).cast_signed();
        let error = (code != 0).then(|| io::Error::from_raw_os_error(-code));
        last.then(|| error.map_or(Ok(()), Err))
    }
}

/// Splits a datagram into its messages; stops at the first that does not fit.
pub(crate) fn messages(mut data: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(data, 0)? as usize;
        let message = Message {
            kind: u16_at(data, 4)?,
            flags: u16_at(data, 6)?,
            seq: u32_at(data, 8)?,
            port: u32_at(data, 12)?,
            body: data.get(HEADER..len)?,
        };
        data = data.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes after a message's fixed part.
pub(crate) fn attributes(mut data: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(data, 0)?);
        let kind = u16_at(data, 2)? & 0x3fff;
        let value = data.get(4..len)?;
        data = data.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(crate) fn attr_of(data: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(data).find(|(k, _)| *k == kind).map(|(_, v)| v)
}

pub(crate) fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*data.get(at..)?.first_chunk()?))
}

pub(crate) fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*data.get(at..)?.first_chunk()?))
}

pub(crate) fn text_of(data: &[u8]) -> String {
    let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    String::from_utf8_lossy(&data[..end]).into_owned()
}

/// Forgives one error: that what should go is gone already.
pub(crate) fn unless(errno: i32, result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.raw_os_error() == Some(errno) => Ok(()),
        other => other,
    }
}

/// One netlink socket.
pub(crate) struct Socket {
    pub(crate) fd: OwnedFd,
    /// Our own port, by which our changes are known in notifications.
    pub(crate) port: u32,
    seq: u32,
    buf: Vec<u8>,
}

impl Socket {
    pub(crate) fn open(protocol: SockProtocol, groups: u32) -> io::Result<Socket> {
        let (family, flags) = (AddressFamily::Netlink, SockFlag::SOCK_CLOEXEC);
        let fd = socket(family, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        let limit = TimeVal::seconds(ANSWER_SECONDS);
        setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
        // The table of a full pool is one transaction of some megabytes.
        let _ = setsockopt(&fd, sockopt::SndBufForce, &(16 << 20));
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &(4 << 20));
        // Dumps are filtered by the kernel, not by us: the address dump by interface among them.
        super::raw::set_strict(&fd)?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        let (seq, buf) = (0, vec![0; RECEIVE]);
        Ok(Socket { fd, port, seq, buf })
    }

    /// Numbers the messages and sends them; returns the first number.
    fn send(&mut self, mut batch: Vec<u8>) -> io::Result<u32> {
        #[cfg(feature = "fault-hooks")]
        crate::fault::refuse("send")?;
        let (first, mut at) = (self.seq.wrapping_add(1), 0);
        while let Some(len) = u32_at(&batch, at) {
            self.seq = self.seq.wrapping_add(1);
            batch[at + 8..at + 12].copy_from_slice(&self.seq.to_ne_bytes());
            at += (len as usize).next_multiple_of(4).max(HEADER);
        }
        send(self.fd.as_raw_fd(), &batch, MsgFlags::empty())?;
        Ok(first)
    }

    /// One datagram from the kernel; whatever another process sends is dropped.
    fn receive(&mut self, flags: MsgFlags) -> nix::Result<&[u8]> {
        loop {
            let mut iov = [IoSliceMut::new(&mut self.buf)];
            let got = recvmsg::<NetlinkAddr>(self.fd.as_raw_fd(), &mut iov, None, flags);
            match got.map(|m| (m.bytes, m.address)) {
                Ok((n, Some(from))) if from.pid() == 0 => return Ok(&self.buf[..n]),
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Hands out every notification that waits; true when some were lost.
    pub(crate) fn drain(&mut self, mut each: impl FnMut(Message<'_>)) -> bool {
        let mut lost = false;
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(data) => messages(data).for_each(&mut each),
                Err(nix::Error::EAGAIN) => return lost,
                Err(_) => lost = true,
            }
        }
    }

    /// Sends messages, waits until the last is acknowledged, and hands out every
    /// answer. A message that fails reports itself without being asked. `after` is sent
    /// behind them and never acknowledged. False when tables changed during a dump of them.
    fn exchange(
        &mut self,
        mut batch: Vec<u8>,
        after: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<bool> {
        let mut sizes: Vec<usize> = messages(&batch).map(|m| HEADER + m.body.len()).collect();
        let Some(size) = sizes.pop() else {
            return Ok(true);
        };
        let flags = batch.len() - size.next_multiple_of(4) + 6;
        batch[flags] |= libc::NLM_F_ACK as u8;
        batch.extend(after);
        let first = self.send(batch)?;
        let last = first.wrapping_add(sizes.len() as u32);
        let (mut all, mut whole) = (Ok(()), true);
        loop {
            let answers = messages(self.receive(MsgFlags::empty())?);
            let ours = |m: &Message<'_>| m.seq.wrapping_sub(first) <= last.wrapping_sub(first);
            for m in answers.filter(ours) {
                whole &= i32::from(m.flags) & libc::NLM_F_DUMP_INTR == 0;
                let Some(result) = m.result() else {
                    each(m.body);
                    continue;
                };
                // A refused transaction is reported on its first message alone.
                let over = m.seq == last || (m.seq == first && result.is_err());
                all = all.and(result);
                if over {
                    return all.map(|()| whole);
                }
            }
        }
    }

    /// Has the kernel do what the messages say.
    pub(crate) fn run(&mut self, batch: Vec<u8>) -> io::Result<()> {
        self.transact(batch, &[])
    }

    /// The same, with the message that ends a transaction.
    pub(crate) fn transact(&mut self, batch: Vec<u8>, end: &[u8]) -> io::Result<()> {
        self.exchange(batch, end, |_| {}).map(drop)
    }

    /// Sends one request and returns what is read from the bodies of its answers.
    pub(crate) fn ask<I: IntoIterator>(
        &mut self,
        request: Vec<u8>,
        read: impl Fn(&[u8]) -> I,
    ) -> io::Result<Vec<I::Item>> {
        for _ in 0..8 {
            let mut found = Vec::new();
            if self.exchange(request.clone(), &[], |body| found.extend(read(body)))? {
                return Ok(found);
            }
        }
        let why = "a table changed through eight dumps of it";
        Err(io::Error::other(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_attributes_are_read_back() {
        let parts = attrs![3 => "rv0", 13 => 500_u32.to_ne_bytes(), 26 => attrs![8 => &[1_u8][..]]];
        let mut b = message(16, 0, &[1, 2, 3, 4], &parts);
        b.extend(message(17, 0, &[0; 4], &[]));
        let all: Vec<_> = messages(&b).collect();
        assert_eq!((all.len(), all[0].kind, all[1].kind), (2, 16, 17));
        let body = &all[0].body[4..];
        assert_eq!(text_of(attr_of(body, 3).unwrap()), "rv0");
        assert_eq!(u32_at(attr_of(body, 13).unwrap(), 0), Some(500));
        assert_eq!(attr_of(attr_of(body, 26).unwrap(), 8), Some(&[1][..]));
    }

    #[test]
    fn cut_messages_end_the_walk() {
        let b = message(16, 0, &[0; 4], &attrs![1 => 7]);
        for n in 0..b.len() {
            assert_eq!(messages(&b[..n]).count(), 0, "{n}");
        }
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
    }
}
