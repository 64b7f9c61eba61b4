//! TUN devices of this program's own.
#![expect(
    unsafe_code,
    reason = "the runtime cannot know who keeps a descriptor open"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use rvpn_lab::{Ns, raw};
use tokio::io::unix::AsyncFd;

const SET_IFF: u32 = 0x4004_54ca;
const SET_OFFLOAD: u32 = 0x4004_54d0;
/// A TUN without packet information.
const PLAIN: u16 = 0x0001 | 0x1000;
/// The same with a virtio header before each packet.
const VIRTIO: u16 = PLAIN | 0x4000;
/// Checksums, and segmentation of TCP and of UDP, left to who reads; the
/// latter only since Linux 6.2.
const OFFLOADS: [u64; 2] = [0x67, 0x07];
/// More than any packet with its header.
pub(crate) const LARGEST: usize = 66_000;

/// A device of this name, up; reading and writing it never waits. With `whole`
/// packets of 64 KiB come and go uncut, each behind a virtio header.
pub(crate) fn tun(ns: &Ns, name: &str, whole: bool, queue: u32) -> io::Result<File> {
    let file = ns.run(|| {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = options
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        let flags = if whole { VIRTIO } else { PLAIN };
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        raw::ioctl_buffer(file.as_fd(), SET_IFF, &mut request)?;
        if whole {
            let set = |offload| raw::ioctl_number(file.as_fd(), SET_OFFLOAD, offload);
            set(OFFLOADS[0]).or_else(|_| set(OFFLOADS[1]))?;
        }
        Ok::<_, io::Error>(file)
    })?;
    ns.ip(&format!("link set {name} mtu 1500 txqueuelen {queue} up"));
    Ok(file)
}

/// Watches a device that `tun` made.
pub(crate) fn watch(device: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: the file owns its descriptor and moves into the AsyncFd, which
    // hands out shared references only, so it stays open and the same.
    let watched = unsafe { AsyncFd::register(device) };
    watched.map_err(io::Error::from)
}
