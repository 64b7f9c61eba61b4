//! The TUN device itself: making it, attaching to it, proving that nobody else is.
#![expect(unsafe_code, reason = "the ioctls of /dev/net/tun")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

const SET_IFF: u64 = 0x4004_54ca;
const SET_PERSIST: u64 = 0x4004_54cb;
const SET_OWNER: u64 = 0x4004_54cc;
const SET_OFFLOAD: u64 = 0x4004_54d0;
const GET_IFF: u64 = 0x8004_54d2;
/// Every ioctl request this module makes, for the system call filter.
pub(crate) const REQUESTS: [u64; 5] = [SET_IFF, SET_PERSIST, SET_OWNER, SET_OFFLOAD, GET_IFF];

pub(crate) const DEVICE: &str = "/dev/net/tun";
const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Checksums and segmentation of TCP left to us.
const OFFLOAD_TCP: u16 = 0x01 | 0x02 | 0x04;
/// The same for UDP, since Linux 6.2.
const OFFLOAD_UDP: u16 = 0x20 | 0x40;
pub(crate) const OFFLOAD: u16 = OFFLOAD_TCP | OFFLOAD_UDP;

/// An attached device. Dropping it detaches.
pub(crate) struct Tun(File);

impl Tun {
    /// Attaches to the device of this name, or makes it. `EBUSY` means that
    /// somebody holds a descriptor of it.
    pub(crate) fn attach(name: &str) -> io::Result<Tun> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(libc::O_NONBLOCK);
        let tun = Tun(options.open(DEVICE)?);
        tun.exchange(SET_IFF, name)?;
        Ok(tun)
    }

    /// The name the kernel has for what is attached; an error when it was deleted meanwhile.
    pub(crate) fn name(&self) -> io::Result<String> {
        let answer = self.exchange(GET_IFF, "")?;
        let name = answer.ifr_name.map(|c| c as u8);
        Ok(super::netlink::text_of(&name))
    }

    /// Lets this user attach without a capability, and nobody else.
    pub(crate) fn own(&self, uid: u32) -> io::Result<()> {
        self.set(SET_OWNER, uid)
    }

    /// Keeps the device when the last descriptor is closed.
    pub(crate) fn persist(&self) -> io::Result<()> {
        self.set(SET_PERSIST, 1)
    }

    /// Sets what is left to the holder, which outlives every descriptor, and
    /// returns what the kernel took: an old one may not know UDP.
    pub(crate) fn offload(&self, wanted: u16) -> io::Result<u16> {
        if self.set(SET_OFFLOAD, wanted.into()).is_ok() {
            return Ok(wanted);
        }
        let less = wanted & OFFLOAD_TCP;
        self.set(SET_OFFLOAD, less.into()).map(|()| less)
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0.into()
    }

    fn set(&self, request: u64, value: u32) -> io::Result<()> {
        let value = libc::c_ulong::from(value);
        // SAFETY: the descriptor is open; these requests take a number.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, value) })?;
        Ok(())
    }

    fn exchange(&self, request: u64, name: &str) -> io::Result<libc::ifreq> {
        // SAFETY: ifreq is plain data for which all zero is a valid value.
        let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= ifreq.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        ifreq.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        // SAFETY: the descriptor is open; these requests take a live ifreq, which the kernel may fill.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, &raw mut ifreq) })?;
        Ok(ifreq)
    }
}
