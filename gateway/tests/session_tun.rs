//! The device wrapper on real TUN devices, inside a namespace of the test's own.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use rvpn_gateway::tun::{MAX_READ, Refused, Tun, VIRTIO_LEN};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

/// Runs one test of this program again inside fresh user and network
/// namespaces. True in the inner run.
fn inside(test: &str) -> bool {
    const MARK: &str = "RVPN_SESSION_TUN_INSIDE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("1 passed"), "{out}\n{err}");
    false
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {output:?}");
}

/// Makes a device with virtio headers, as the helper does, without its offloads.
fn device(name: &str) -> OwnedFd {
    ip(&["tuntap", "add", "mode", "tun", "vnet_hdr", "name", name]);
    let fd = support::attach(name).unwrap();
    ip(&["address", "add", "10.64.0.1/24", "dev", name]);
    ip(&["link", "set", name, "up"]);
    fd
}

/// An echo request from the client's side to the host's end of the device.
fn ping() -> Vec<u8> {
    let mut packet = vec![
        0x45, 0, 0, 28, 0, 1, 0, 0, 64, 1, 0, 0, 10, 64, 0, 2, 10, 64, 0, 1, // IPv4
        8, 0, 0, 0, 0, 7, 0, 1, // echo
    ];
    let sum = |bytes: &[u8]| {
        let mut sum: u32 = bytes
            .chunks(2)
            .map(|p| u32::from(u16::from_be_bytes([p[0], p[1]])))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    };
    let head = sum(&packet[..20]);
    packet[10..12].copy_from_slice(&head);
    let body = sum(&packet[20..]);
    packet[22..24].copy_from_slice(&body);
    packet
}

async fn read(tun: &Tun) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0; MAX_READ];
    let n = timeout(
        PATIENCE,
        std::future::poll_fn(|cx| tun.poll_read(cx, &mut buf)),
    )
    .await
    .unwrap()?;
    buf.truncate(n);
    Ok(buf)
}

#[test]
fn a_packet_written_is_answered_by_the_kernel() {
    if !inside("a_packet_written_is_answered_by_the_kernel") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let tun = Tun::adopt(device("rvt0")).unwrap();
        let packet = ping();
        // In three parts, as a session writes them.
        let parts = [
            IoSlice::new(&[0; VIRTIO_LEN]),
            IoSlice::new(&packet[..20]),
            IoSlice::new(&packet[20..]),
        ];
        tun.write(&parts).unwrap();
        loop {
            let read = read(&tun).await.unwrap();
            let answer = &read[VIRTIO_LEN..];
            // The kernel's own chatter on a fresh device may come first.
            if answer[0] >> 4 == 4 && answer[9] == 1 {
                assert_eq!(answer[12..20], [10, 64, 0, 1, 10, 64, 0, 2]);
                assert_eq!(answer[20], 0, "an echo reply");
                break;
            }
        }
    });
}

#[test]
fn a_device_that_is_down_refuses_and_works_again_when_it_is_up() {
    if !inside("a_device_that_is_down_refuses_and_works_again_when_it_is_up") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let tun = Tun::adopt(device("rvt0")).unwrap();
        let packet = ping();
        let parts = [IoSlice::new(&[0; VIRTIO_LEN]), IoSlice::new(&packet)];
        ip(&["link", "set", "rvt0", "down"]);
        assert_eq!(tun.write(&parts), Err(Refused::Down));
        ip(&["link", "set", "rvt0", "up"]);
        assert_eq!(tun.write(&parts), Ok(()));
    });
}

#[test]
fn a_deleted_device_is_noticed_without_traffic() {
    if !inside("a_deleted_device_is_noticed_without_traffic") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let tun = Tun::adopt(device("rvt0")).unwrap();
        let gone = tokio::spawn(tun.gone());
        ip(&["link", "delete", "rvt0"]);
        timeout(PATIENCE, gone).await.unwrap().unwrap();
        let packet = ping();
        let parts = [IoSlice::new(&[0; VIRTIO_LEN]), IoSlice::new(&packet)];
        assert_eq!(tun.write(&parts), Err(Refused::Gone));
    });
}

mod support {
    #![expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

    use std::fs::OpenOptions;
    use std::io;
    use std::os::fd::{AsRawFd, OwnedFd};

    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

    pub(crate) fn attach(name: &str) -> io::Result<OwnedFd> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: ifreq is plain data for which all zero is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as i16;
        // SAFETY: request is a live ifreq, which is what this operation takes.
        let attached = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
        if attached < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file.into())
    }
}
