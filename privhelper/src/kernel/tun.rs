//! The TUN device itself: making it, attaching to it, proving that nobody else is.
#![expect(unsafe_code, reason = "the ioctls of /dev/net/tun")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

mod raw {
    nix::ioctl_write_ptr_bad!(tun_set_iff, 0x4004_54ca, libc::ifreq);
    nix::ioctl_write_int_bad!(tun_set_persist, 0x4004_54cb);
    nix::ioctl_write_int_bad!(tun_set_owner, 0x4004_54cc);
    nix::ioctl_write_int_bad!(tun_set_offload, 0x4004_54d0);
    nix::ioctl_read_bad!(tun_get_iff, 0x8004_54d2, libc::ifreq);
}

/// Every ioctl request this module makes, for the system call filter.
pub(crate) const REQUESTS: [u64; 5] = [
    0x4004_54ca,
    0x4004_54cb,
    0x4004_54cc,
    0x4004_54d0,
    0x8004_54d2,
];

pub(crate) const DEVICE: &str = "/dev/net/tun";
const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Checksums and segmentation of TCP left to us.
pub(crate) const OFFLOAD_TCP: u16 = 0x01 | 0x02 | 0x04;
/// The same for UDP, since Linux 6.2.
pub(crate) const OFFLOAD_UDP: u16 = 0x20 | 0x40;

/// An attached device. Dropping it detaches.
pub(crate) struct Tun(File);

impl Tun {
    /// Attaches to the device of this name, or makes it. `EBUSY` means that
    /// somebody holds a descriptor of it.
    pub(crate) fn attach(name: &str) -> io::Result<Tun> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)?;
        let mut request = ifreq(name)?;
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        // SAFETY: the descriptor is open and request is a live, initialised ifreq.
        unsafe { raw::tun_set_iff(file.as_raw_fd(), &raw const request) }?;
        Ok(Tun(file))
    }

    /// The name the kernel has for what is attached; an error when it was deleted meanwhile.
    pub(crate) fn name(&self) -> io::Result<String> {
        let mut request = ifreq("")?;
        // SAFETY: the descriptor is open and request is a live ifreq the kernel may fill.
        unsafe { raw::tun_get_iff(self.0.as_raw_fd(), &raw mut request) }?;
        let name = request.ifr_name.map(|c| c as u8);
        Ok(super::netlink::text_of(&name))
    }

    /// Lets this user attach without a capability, and nobody else.
    pub(crate) fn own(&self, uid: u32) -> io::Result<()> {
        let uid = libc::c_int::try_from(uid).map_err(io::Error::other)?;
        // SAFETY: the descriptor is open; the argument is a number.
        unsafe { raw::tun_set_owner(self.0.as_raw_fd(), uid) }?;
        Ok(())
    }

    /// Keeps the device when the last descriptor is closed.
    pub(crate) fn persist(&self) -> io::Result<()> {
        // SAFETY: the descriptor is open; the argument is a number.
        unsafe { raw::tun_set_persist(self.0.as_raw_fd(), 1) }?;
        Ok(())
    }

    /// Sets what is left to the holder, which outlives every descriptor, and
    /// returns what the kernel took: an old one may not know UDP.
    pub(crate) fn offload(&self, wanted: u16) -> io::Result<u16> {
        let mut error = None;
        for mask in [wanted, wanted & OFFLOAD_TCP] {
            // SAFETY: the descriptor is open; the argument is a number.
            match unsafe { raw::tun_set_offload(self.0.as_raw_fd(), mask.into()) } {
                Ok(_) => return Ok(mask),
                Err(e) => error = Some(e),
            }
        }
        Err(error.unwrap_or(nix::Error::EINVAL).into())
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0.into()
    }
}

fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}
