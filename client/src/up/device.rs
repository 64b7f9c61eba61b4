//! The tunnel's device.

use std::os::fd::{IntoRawFd as _, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tun_rs::DeviceBuilder;

use super::fd::owned;
use crate::fail::{Outcome, While as _};

/// Makes it. Its packets have virtio headers, and can be super-packets. The second is
/// whether it takes several datagrams as one packet.
pub(crate) fn make(name: &str) -> Outcome<(OwnedFd, bool)> {
    let device = DeviceBuilder::new()
        .name(name)
        .offload(true)
        .packet_information(false)
        .enable(false)
        .build_sync()
        .while_doing(format_args!("make the device {name}"))?;
    let datagrams = device.udp_gso();
    let fd = owned(device.into_raw_fd());
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).while_doing("prepare the device")?;
    Ok((fd, datagrams))
}
