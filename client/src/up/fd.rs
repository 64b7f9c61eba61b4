//! Everything about bare descriptors, in one place.
#![expect(
    unsafe_code,
    reason = "descriptors arrive as numbers, tokio cannot know who keeps them open, \
              and two settings of the kernel have no wrapper"
)]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Owns a descriptor that was just received or given away.
pub(crate) fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the callers have it from the kernel, or from an owner that gave
    // it up, just now; nobody else will close it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Watches a descriptor that does not block.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<File>> {
    let file = File::from(fd);
    // SAFETY: the file owns its descriptor and moves into the AsyncFd, which
    // hands out shared references only, so it stays open and the same.
    let watched = unsafe { AsyncFd::register_with_interest(file, interest) };
    watched.map_err(io::Error::from)
}

/// What the kernel may hold unsent of ours; more waits where it can still be
/// put in order.
const UNSENT: libc::c_int = 16 * 1024;

/// Sets the options of the connection to the gateway.
pub(crate) fn tune(socket: BorrowedFd<'_>) -> io::Result<()> {
    for (option, value) in [(libc::TCP_NODELAY, 1), (libc::TCP_NOTSENT_LOWAT, UNSENT)] {
        // SAFETY: the value lives until the call is over, and its size is given.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A round trip up to which a road counts as short. What its two ends hold of it
/// is more than what is on the way.
const SHORT: Duration = Duration::from_micros(250);

/// What may then wait unread at this end, in bytes. The kernel doubles it, as it
/// counts what surrounds them. More would wait there, first come, first served,
/// and not in the queue of the other end.
const UNREAD: usize = 512 * 1024;

/// A round trip from which on a road counts as long. On shorter ones the system's
/// own congestion control is as good or better.
const LONG: Duration = Duration::from_millis(4);

/// Makes a connection fill a long road. A tunnel's connection lives for days and
/// has little to send for most of them; cubic takes the wavering of quiet times
/// for the road's capacity, and then needs many seconds to grow when there is
/// much to send. bbr measures anew. Where it is not allowed, nothing changes.
pub(crate) fn go_far(socket: BorrowedFd<'_>) {
    if round_trip(socket).is_ok_and(|rtt| rtt >= LONG) {
        let _not_allowed = use_bbr(&socket);
    }
}

/// Keeps what waits on a short road from waiting at this end of it.
pub(crate) fn stay_near(socket: BorrowedFd<'_>) {
    if round_trip(socket).is_ok_and(|rtt| rtt <= SHORT) {
        // Without it there is only more delay.
        let _refused = setsockopt(&socket, sockopt::RcvBuf, &UNREAD);
    }
}

/// Whether long roads can have what they want here.
pub(crate) fn can_go_far() -> bool {
    let (family, kind) = (AddressFamily::Inet, SockType::Stream);
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None);
    socket.is_ok_and(|socket| use_bbr(&socket).is_ok())
}

fn use_bbr(socket: &impl AsFd) -> nix::Result<()> {
    setsockopt(socket, sockopt::TcpCongestion, &OsString::from("bbr"))
}

/// The shortest round trip of a connection so far.
fn round_trip(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    // SAFETY: it consists of integers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: both outlive the call, and the kernel writes no more than `length` says.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    match (got, info.tcpi_min_rtt) {
        (0, 0 | u32::MAX) => Err(io::ErrorKind::NotConnected.into()),
        (0, micros) => Ok(Duration::from_micros(micros.into())),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn a_short_road_keeps_the_congestion_control_of_the_system() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let before = getsockopt(&far, sockopt::TcpCongestion).unwrap();
        let rtt = round_trip(near.as_fd()).unwrap();
        assert!(rtt < LONG, "{rtt:?} through memory");
        go_far(far.as_fd());
        assert_eq!(getsockopt(&far, sockopt::TcpCongestion).unwrap(), before);
    }

    #[test]
    fn little_waits_unread_at_the_end_of_a_short_road() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let short = || {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            // A machine with much else to do may make it a longer one.
            let is_short = round_trip(far.as_fd()).is_ok_and(|rtt| rtt <= SHORT);
            is_short.then_some((near, far))
        };
        let (_near, far) = (0..100).find_map(|_| short()).unwrap();
        let before = getsockopt(&far, sockopt::RcvBuf).unwrap();
        stay_near(far.as_fd());
        let after = getsockopt(&far, sockopt::RcvBuf).unwrap();
        // The system may allow less.
        assert!(after != before && after <= 2 * UNREAD, "{before} {after}");
    }

    #[test]
    fn what_is_not_connected_has_no_round_trip() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(round_trip(listener.as_fd()).is_err());
    }
}
