//! Everything said to the kernel: netlink, the TUN device, a few sysctls.
//!
//! Pure netlink over blocking sockets. One [`Kernel`] belongs to one thread.

pub(crate) mod conntrack;
pub(crate) mod host;
pub(crate) mod link;
pub(crate) mod netlink;
pub(crate) mod nft;
pub(crate) mod ruleset;
pub(crate) mod sockopt;
pub(crate) mod sysctl;
pub(crate) mod tun;

use std::io;

use netlink::Socket;

/// The sockets of one thread.
pub(crate) struct Kernel {
    pub(crate) route: Socket,
    pub(crate) filter: Socket,
}

impl Kernel {
    pub(crate) fn open() -> io::Result<Kernel> {
        Ok(Kernel {
            route: Socket::open(libc::NETLINK_ROUTE, 0)?,
            filter: Socket::open(libc::NETLINK_NETFILTER, 0)?,
        })
    }
}
