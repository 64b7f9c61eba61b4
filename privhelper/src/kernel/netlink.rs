//! Netlink messages and the sockets that carry them.
//!
//! Lengths and types are native-endian, attributes aligned to four bytes.
//! Answers count only when the kernel itself sent them (port 0) and when they
//! bear the sequence number of what was asked.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockType, bind, getsockname, recvmsg, send,
    setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

pub(crate) const HEADER: usize = 16;
/// Fits the largest message a dump brings.
const RECEIVE: usize = 32 * 1024;
const ANSWER_SECONDS: i64 = 10;

/// A growing sequence of messages.
#[derive(Default)]
pub(crate) struct Buf(pub(crate) Vec<u8>);

impl Buf {
    pub(crate) fn attr(&mut self, kind: u16, data: &[u8]) -> &mut Buf {
        let len = u16::try_from(data.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(data);
        self.pad()
    }

    fn pad(&mut self) -> &mut Buf {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A native-endian number, as rtnetlink has them.
    pub(crate) fn ne32(&mut self, kind: u16, v: u32) -> &mut Buf {
        self.attr(kind, &v.to_ne_bytes())
    }

    /// A big-endian number, as nfnetlink has them.
    pub(crate) fn be32(&mut self, kind: u16, v: u32) -> &mut Buf {
        self.attr(kind, &v.to_be_bytes())
    }

    /// Text with its terminating zero.
    pub(crate) fn text(&mut self, kind: u16, s: &str) -> &mut Buf {
        let mut bytes = s.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    pub(crate) fn nest(&mut self, kind: u16, f: impl FnOnce(&mut Buf)) -> &mut Buf {
        let at = self.0.len();
        self.attr(kind | 0x8000, &[]);
        f(self);
        let len = u16::try_from(self.0.len() - at).unwrap_or(u16::MAX);
        self.0[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    /// One message; its sequence number is filled in when it is sent.
    pub(crate) fn message(
        &mut self,
        kind: u16,
        flags: libc::c_int,
        fixed: &[u8],
        f: impl FnOnce(&mut Buf),
    ) -> &mut Buf {
        let at = self.0.len();
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or_default();
        self.0.extend([0; 4]);
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend([0; 8]);
        self.0.extend(fixed);
        self.pad();
        f(self);
        let len = u32::try_from(self.0.len() - at).unwrap_or(u32::MAX);
        self.0[at..at + 4].copy_from_slice(&len.to_ne_bytes());
        self
    }
}

/// A received message.
#[derive(Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) seq: u32,
    /// Who caused it, in notifications.
    pub(crate) port: u32,
    pub(crate) body: &'a [u8],
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
pub(crate) fn attrs(mut data: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(data, 0)?);
        let kind = u16_at(data, 2)? & 0x3fff;
        let value = data.get(4..len)?;
        data = data.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(crate) fn attr_of(data: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(data).find(|(k, _)| *k == kind).map(|(_, v)| v)
}

pub(crate) fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(data.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

pub(crate) fn text_of(data: &[u8]) -> String {
    let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    String::from_utf8_lossy(&data[..end]).into_owned()
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
    pub(crate) fn open(protocol: libc::c_int, groups: u32) -> io::Result<Socket> {
        let protocol = match protocol {
            libc::NETLINK_ROUTE => nix::sys::socket::SockProtocol::NetlinkRoute,
            _ => nix::sys::socket::SockProtocol::NetlinkNetFilter,
        };
        let fd = nix::sys::socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        setsockopt(
            &fd,
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(ANSWER_SECONDS),
        )?;
        // The table of a full pool is one transaction of some megabytes.
        let _ = setsockopt(&fd, sockopt::SndBufForce, &(16 << 20));
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &(4 << 20));
        // Dumps are filtered by the kernel, not by us: the address dump by interface among them.
        super::sockopt::set_strict(&fd)?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        Ok(Socket {
            fd,
            port,
            seq: 0,
            buf: vec![0; RECEIVE],
        })
    }

    /// Numbers and sends the messages; returns the first and last number.
    fn send(&mut self, batch: &mut Buf) -> io::Result<(u32, u32)> {
        #[cfg(feature = "fault-hooks")]
        crate::fault::refuse("send")?;
        let first = self.seq.wrapping_add(1);
        let mut at = 0;
        while let Some(len) = u32_at(&batch.0, at) {
            self.seq = self.seq.wrapping_add(1);
            batch.0[at + 8..at + 12].copy_from_slice(&self.seq.to_ne_bytes());
            at += (len as usize).next_multiple_of(4).max(HEADER);
        }
        send(self.fd.as_raw_fd(), &batch.0, MsgFlags::empty())?;
        Ok((first, self.seq))
    }

    /// One datagram from the kernel; whatever another process sends is dropped.
    pub(crate) fn receive(&mut self, flags: MsgFlags) -> nix::Result<&[u8]> {
        loop {
            let mut iov = [IoSliceMut::new(&mut self.buf)];
            match recvmsg::<NetlinkAddr>(self.fd.as_raw_fd(), &mut iov, None, flags)
                .map(|m| (m.bytes, m.address))
            {
                Ok((n, Some(from))) if from.pid() == 0 => return Ok(&self.buf[..n]),
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends messages of which the last alone asks for an acknowledgement, and
    /// waits for that. A message that fails reports itself without being asked.
    pub(crate) fn run(&mut self, batch: &mut Buf) -> io::Result<()> {
        let (first, last) = self.send(batch)?;
        self.answered(first, last)
    }

    /// Sends one request and returns the body of its one answer.
    pub(crate) fn ask(&mut self, request: &mut Buf) -> io::Result<Vec<u8>> {
        let (_, seq) = self.send(request)?;
        loop {
            for m in messages(self.receive(MsgFlags::empty())?) {
                if m.seq == seq && m.kind == libc::NLMSG_ERROR as u16 {
                    let code = u32_at(m.body, 0).unwrap_or_default().cast_signed();
                    return Err(io::Error::from_raw_os_error(-code));
                } else if m.seq == seq {
                    return Ok(m.body.to_vec());
                }
            }
        }
    }

    fn answered(&mut self, first: u32, last: u32) -> io::Result<()> {
        let mut failed = None;
        loop {
            for m in messages(self.receive(MsgFlags::empty())?) {
                if m.kind != libc::NLMSG_ERROR as u16
                    || m.seq.wrapping_sub(first) > last.wrapping_sub(first)
                {
                    continue;
                }
                let code = u32_at(m.body, 0).unwrap_or_default().cast_signed();
                if code != 0 && failed.is_none() {
                    failed = Some(io::Error::from_raw_os_error(-code));
                }
                // A refused batch is reported on its first message alone.
                if m.seq == last || (m.seq == first && code != 0) {
                    return failed.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// The same for an nf_tables batch, whose end at this offset is never acknowledged.
    pub(crate) fn run_batch(&mut self, batch: &mut Buf, end: usize) -> io::Result<()> {
        let messages = messages(&batch.0[..end]).count();
        let first = self.seq.wrapping_add(1);
        let last = self
            .seq
            .wrapping_add(u32::try_from(messages).unwrap_or(u32::MAX));
        self.send(batch)?;
        self.answered(first, last)
    }

    /// Asks for a dump, and again when the tables changed while it was made.
    pub(crate) fn dump(
        &mut self,
        kind: u16,
        fixed: &[u8],
        filter: impl Fn(&mut Buf),
        mut each: impl FnMut(Message<'_>),
        mut restart: impl FnMut(),
    ) -> io::Result<()> {
        for _ in 0..8 {
            let mut b = Buf::default();
            b.message(kind, libc::NLM_F_DUMP, fixed, &filter);
            let (_, seq) = self.send(&mut b)?;
            let mut interrupted = false;
            'dump: loop {
                for m in messages(self.receive(MsgFlags::empty())?) {
                    if m.seq != seq {
                        continue;
                    }
                    interrupted |= i32::from(m.flags) & libc::NLM_F_DUMP_INTR != 0;
                    match i32::from(m.kind) {
                        libc::NLMSG_DONE => break 'dump,
                        libc::NLMSG_ERROR => {
                            let code = u32_at(m.body, 0).unwrap_or_default().cast_signed();
                            return Err(io::Error::from_raw_os_error(-code));
                        }
                        _ => each(m),
                    }
                }
            }
            if !interrupted {
                return Ok(());
            }
            restart();
        }
        Err(io::Error::other(
            "a table changed through eight dumps of it",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_attributes_are_read_back() {
        let mut b = Buf::default();
        b.message(16, libc::NLM_F_ACK, &[1, 2, 3, 4], |b| {
            b.text(3, "rv0").ne32(13, 500).nest(26, |b| {
                b.attr(8, &[1]);
            });
        });
        b.message(17, 0, &[0; 4], |_| {});
        let all: Vec<_> = messages(&b.0).collect();
        assert_eq!((all.len(), all[0].kind, all[1].kind), (2, 16, 17));
        let body = &all[0].body[4..];
        assert_eq!(text_of(attr_of(body, 3).unwrap()), "rv0");
        assert_eq!(u32_at(attr_of(body, 13).unwrap(), 0), Some(500));
        assert_eq!(attr_of(attr_of(body, 26).unwrap(), 8), Some(&[1][..]));
    }

    #[test]
    fn cut_messages_end_the_walk() {
        let mut b = Buf::default();
        b.message(16, 0, &[0; 4], |b| {
            b.ne32(1, 7);
        });
        for n in 0..b.0.len() {
            assert_eq!(messages(&b.0[..n]).count(), 0, "{n}");
        }
        assert_eq!(attrs(&[3, 0, 1, 0]).count(), 0);
    }
}
