//! System calls the laboratory needs as they are.
#![expect(
    unsafe_code,
    reason = "per-thread setresuid, ioctls by number and clone flags have no safe wrapper"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// Real, effective and saved user and group of the calling thread.
pub fn set_thread_user(id: u32) -> io::Result<()> {
    // SAFETY: plain numbers; only this thread changes.
    check(unsafe { libc::syscall(libc::SYS_setresgid, id, id, id) })?;
    // SAFETY: plain numbers; only this thread changes.
    check(unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) }).map(drop)
}

/// An ioctl whose argument is a number.
pub fn ioctl_number(fd: BorrowedFd<'_>, request: u32, arg: u64) -> io::Result<()> {
    // SAFETY: the requests passed take a number, or a pointer the kernel itself checks.
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), request, arg) }).map(drop)
}

/// An ioctl whose argument is a buffer.
pub fn ioctl_buffer(fd: BorrowedFd<'_>, request: u32, arg: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer is live and at least as large as any structure of the requests passed (an ifreq).
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), request, arg.as_mut_ptr()) })
        .map(drop)
}

/// What a device can be told to do or leave, as ethtool numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Leaves checksums to what it sends to, and with them the cutting of super-packets.
    Checksums = 0x17,
    /// Joins the packets of a flow that it receives together.
    Joins = 0x2c,
}

/// Switches a feature of a device of this namespace on or off.
pub fn feature(fd: BorrowedFd<'_>, device: &str, feature: Feature, on: bool) -> io::Result<()> {
    const SIOCETHTOOL: u32 = 0x8946;
    let value = [feature as u32, u32::from(on)];
    let mut request = [0; 40];
    request[..device.len()].copy_from_slice(device.as_bytes());
    request[16..24].copy_from_slice(&value.as_ptr().addr().to_ne_bytes());
    // Seen by the kernel only, behind the compiler's back.
    std::hint::black_box(&value);
    let done = ioctl_buffer(fd, SIOCETHTOOL, &mut request);
    std::hint::black_box(&value);
    done
}

/// Leaves a packet socket those of one interface.
pub fn bind_packets(fd: BorrowedFd<'_>, interface: i32) -> io::Result<()> {
    // SAFETY: sockaddr_ll is plain data for which all zero is a valid value.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    at.sll_ifindex = interface;
    let len = size_of::<libc::sockaddr_ll>();
    // SAFETY: the address is live and of the length passed.
    check(unsafe { libc::syscall(libc::SYS_bind, fd.as_raw_fd(), &raw const at, len) }).map(drop)
}

/// Any system call with plain numbers, to see whether it is let through.
pub fn syscall(number: i64, args: [u64; 5]) -> io::Result<i64> {
    // SAFETY: callers pass null or invalid pointers only, which the kernel refuses.
    check(unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) })
}

/// A netlink message to the port of another process.
pub fn netlink_to(protocol: i32, port: u32, kind: u16, body: &[u8]) -> io::Result<()> {
    let mut m = Vec::new();
    m.extend(u32::try_from(16 + body.len()).unwrap_or(16).to_ne_bytes());
    m.extend(kind.to_ne_bytes());
    m.extend([0; 10]);
    m.extend(body);
    // SAFETY: plain numbers.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, protocol)
    })?;
    // SAFETY: sockaddr_nl is plain data for which all zero is a valid value.
    let mut to: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    to.nl_family = libc::AF_NETLINK as u16;
    to.nl_pid = port;
    let len = size_of::<libc::sockaddr_nl>();
    // SAFETY: message and address are live and of the lengths passed.
    let sent = check(unsafe {
        libc::syscall(
            libc::SYS_sendto,
            fd,
            m.as_ptr(),
            m.len(),
            0,
            &raw const to,
            len,
        )
    });
    // SAFETY: the descriptor was made above and is not used again.
    check(unsafe { libc::syscall(libc::SYS_close, fd) })?;
    sent.map(drop)
}

/// A message with many copies of one descriptor.
pub fn send_copies(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: BorrowedFd<'_>,
    n: usize,
) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let fds = vec![fd.as_raw_fd(); n];
    let iov = [io::IoSlice::new(bytes)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &iov,
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}
