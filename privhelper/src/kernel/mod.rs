//! Everything said to the kernel: netlink, the TUN device, a few sysctls.
//!
//! Pure netlink over blocking sockets. One [`Kernel`] belongs to one thread.

#[macro_use]
pub(crate) mod netlink;

pub(crate) mod conntrack;
pub(crate) mod link;
pub(crate) mod nft;
pub(crate) mod raw;
pub(crate) mod ruleset;
pub(crate) mod sysctl;
pub(crate) mod tun;

use std::io;
use std::sync::Arc;

use nix::sys::socket::SockProtocol::{NetlinkNetFilter, NetlinkRoute};

use crate::config::Config;
use netlink::Socket;

/// The sockets of one thread, and what it is to make the kernel look like.
pub(crate) struct Kernel {
    pub(crate) route: Socket,
    pub(crate) filter: Socket,
    pub(crate) config: Arc<Config>,
}

impl Kernel {
    pub(crate) fn open(config: &Arc<Config>) -> io::Result<Kernel> {
        Ok(Kernel {
            route: Socket::open(NetlinkRoute, 0)?,
            filter: Socket::open(NetlinkNetFilter, 0)?,
            config: Arc::clone(config),
        })
    }
}
