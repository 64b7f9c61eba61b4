//! The socket: exact receive buffers, one descriptor at most, and who the peer is.
//!
//! `CMSG_SPACE` of one descriptor rounds up to a length that admits two, and a
//! surplus descriptor is installed in the receiver before anybody can look at
//! it. So the control length is given to the kernel to the byte, and a side
//! that expects none receives without any.
#![expect(
    unsafe_code,
    reason = "recvmsg with an exact control length; descriptors the kernel has just made"
)]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// `CMSG_LEN` of one descriptor.
const ONE_FD: usize = size_of::<libc::cmsghdr>() + size_of::<RawFd>();

/// Control buffer with the alignment `cmsghdr` needs.
#[repr(C, align(8))]
struct Control([u8; ONE_FD]);

/// What one receive brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes in the buffer; zero means the peer is gone.
    pub len: usize,
    /// The message was longer than the buffer.
    pub truncated: bool,
    /// The one descriptor taken, if it was asked for and came.
    pub fd: Option<OwnedFd>,
    /// There were descriptors beyond what was asked for; the kernel has dropped them.
    pub surplus_fds: bool,
}

/// Identity of the process at the other end, as of its `connect` or `listen`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCred {
    /// Its process, zero when outside our pid namespace.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
}

/// Receives one message; with `want_fd` false no descriptor can get in.
pub fn recv(socket: BorrowedFd<'_>, buf: &mut [u8], want_fd: bool) -> io::Result<Received> {
    let mut control = Control([0; ONE_FD]);
    let mut iov = IoSliceMut::new(buf);
    // SAFETY: msghdr is plain data for which all zero is a valid value.
    let mut msg: libc::msghdr = unsafe { zeroed() };
    msg.msg_iov = (&raw mut iov).cast();
    msg.msg_iovlen = 1;
    if want_fd {
        msg.msg_control = (&raw mut control).cast();
        msg.msg_controllen = ONE_FD;
    }
    // SAFETY: every pointer in msg refers to a live local of the stated length.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut msg, libc::MSG_CMSG_CLOEXEC) };
    let len = Errno::result(got)? as usize;
    let mut fd = None;
    if want_fd {
        // SAFETY: msg was filled by recvmsg and control outlives this use.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const msg).as_ref() };
        if let Some(c) = header
            && c.cmsg_level == libc::SOL_SOCKET
            && c.cmsg_type == libc::SCM_RIGHTS
            && c.cmsg_len >= ONE_FD
        {
            // SAFETY: the header says that at least one descriptor follows it.
            let raw = unsafe { libc::CMSG_DATA(c).cast::<RawFd>().read_unaligned() };
            // SAFETY: the kernel has just installed this descriptor for us and nothing else owns it.
            fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
        }
    }
    Ok(Received {
        len,
        truncated: msg.msg_flags & libc::MSG_TRUNC != 0,
        fd,
        surplus_fds: msg.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Sends one message with at most one descriptor, whole or not at all.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds = fd.map(|fd| [fd.as_raw_fd()]);
    let control = fds.as_ref().map(|fds| ControlMessage::ScmRights(fds));
    let (parts, flags) = ([IoSlice::new(bytes)], MsgFlags::MSG_NOSIGNAL);
    let n = socket::sendmsg::<()>(socket.as_raw_fd(), &parts, control.as_slice(), flags, None)?;
    let whole = (n == bytes.len()).then_some(());
    whole.ok_or_else(|| io::ErrorKind::WriteZero.into())
}

/// The peer's credentials, taken by the kernel when it connected.
pub fn peer_cred(socket: BorrowedFd<'_>) -> io::Result<PeerCred> {
    let cred = socket::getsockopt(&socket, sockopt::PeerCredentials)?;
    let (pid, uid) = (cred.pid(), cred.uid());
    Ok(PeerCred { pid, uid })
}

/// A handle on the peer's process that cannot come to mean another one. It
/// polls readable when the process is gone. Needs Linux 6.5.
pub fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(socket::getsockopt(&socket, sockopt::PeerPidfd)?)
}

/// Bounds every receive and send on a blocking socket.
pub fn set_timeout(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let limit = TimeVal::microseconds(i64::try_from(limit.as_micros()).unwrap_or(i64::MAX));
    socket::setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
    Ok(socket::setsockopt(&socket, sockopt::SendTimeout, &limit)?)
}

fn new_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

fn address(path: &Path) -> io::Result<UnixAddr> {
    UnixAddr::new(path).map_err(|e| {
        let why = format!("{e}: a socket path has at most 107 bytes");
        let why = format!("{}: {why}", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, why)
    })
}

/// Connects to the helper, blocking.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let (addr, socket) = (address(path)?, new_socket(SockFlag::empty())?);
    socket::connect(socket.as_raw_fd(), &addr)?;
    Ok(socket)
}

/// Binds and listens, non-blocking; the path must not exist.
pub fn listen(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    let (addr, socket) = (address(path)?, new_socket(SockFlag::SOCK_NONBLOCK)?);
    socket::bind(socket.as_raw_fd(), &addr)?;
    listen_again(socket.as_fd(), backlog)?;
    Ok(socket)
}

/// Makes the calling process the one that connecting peers see: credentials
/// are those of the last to call `listen`, not of whoever bound the socket.
pub fn listen_again(socket: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    Ok(socket::listen(&socket, Backlog::new(backlog)?)?)
}

/// Takes one waiting connection, non-blocking and close-on-exec.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let raw = socket::accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: the kernel has just made this descriptor and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Two connected ends, for tests.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
    Ok(socket::socketpair(AddressFamily::Unix, kind, None, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/thread-self/fd").unwrap().count()
    }

    /// Sends `n` copies of a descriptor the way a hostile peer would.
    fn send_many(socket: BorrowedFd<'_>, n: usize, fd: BorrowedFd<'_>) {
        let payload = [1_u8; 4];
        let mut control = vec![0_u64; (16 + 4 * n).div_ceil(8)];
        let mut iov = libc::iovec {
            iov_base: payload.as_ptr().cast_mut().cast(),
            iov_len: 4,
        };
        // SAFETY: as in send above; the buffer is 8-aligned and holds the header and n descriptors.
        let sent = unsafe {
            let mut msg: libc::msghdr = zeroed();
            msg.msg_iov = &raw mut iov;
            msg.msg_iovlen = 1;
            msg.msg_control = control.as_mut_ptr().cast();
            msg.msg_controllen = 16 + 4 * n;
            let c = libc::CMSG_FIRSTHDR(&raw const msg);
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = 16 + 4 * n;
            for i in 0..n {
                libc::CMSG_DATA(c)
                    .cast::<RawFd>()
                    .add(i)
                    .write_unaligned(fd.as_raw_fd());
            }
            libc::sendmsg(socket.as_raw_fd(), &raw const msg, 0)
        };
        assert_eq!(sent, 4);
    }

    #[test]
    fn one_descriptor_arrives_and_never_a_second() {
        let (a, b) = pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let before = open_fds();
        let mut buf = [0; 8];
        for n in [1, 2, 253] {
            send_many(a.as_fd(), n, file.as_fd());
            let got = recv(b.as_fd(), &mut buf, true).unwrap();
            assert_eq!(
                (got.len, got.fd.is_some(), got.surplus_fds),
                (4, true, n > 1)
            );
            assert_eq!(open_fds(), before + 1, "{n} sent");
        }
        for n in [1, 2, 253] {
            send_many(a.as_fd(), n, file.as_fd());
            let got = recv(b.as_fd(), &mut buf, false).unwrap();
            assert_eq!(
                (got.len, got.fd.is_some(), got.surplus_fds),
                (4, false, true)
            );
            assert_eq!(open_fds(), before, "{n} sent");
        }
    }

    #[test]
    fn a_long_message_is_told_from_a_full_one() {
        let (a, b) = pair().unwrap();
        let mut buf = [0; 8];
        for (n, truncated) in [(7, false), (8, false), (9, true)] {
            send(a.as_fd(), &vec![5; n], None).unwrap();
            let got = recv(b.as_fd(), &mut buf, false).unwrap();
            assert_eq!((got.len, got.truncated), (n.min(8), truncated));
        }
        drop(a);
        assert_eq!(recv(b.as_fd(), &mut buf, false).unwrap().len, 0);
    }

    #[test]
    fn the_peer_is_known() {
        let (a, _b) = pair().unwrap();
        let cred = peer_cred(a.as_fd()).unwrap();
        assert_eq!(cred.pid, std::process::id().cast_signed());
        peer_pidfd(a.as_fd()).unwrap();
    }

    #[test]
    fn a_silent_peer_costs_the_timeout_only() {
        let (a, _b) = pair().unwrap();
        set_timeout(a.as_fd(), Duration::from_millis(20)).unwrap();
        let error = recv(a.as_fd(), &mut [0; 8], false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_named() {
        let error = connect(Path::new(&"x".repeat(200))).unwrap_err();
        assert!(error.to_string().contains("at most 107 bytes"), "{error}");
    }
}
