//! What the probes are worth: a gateway of `ip_forward` and `masquerade` alone, which leaks.

use std::fs::OpenOptions;
use std::os::fd::AsFd;

use rvpn_ipc::{Key, Lease, Op, Reply, Request, Status};

use crate::helper::Tunnel;
use crate::ns::Ns;
use crate::topology::Lab;

const TUNSETIFF: u32 = 0x4004_54ca;
/// A TUN without packet information and with a virtio header.
const FLAGS: u16 = 0x0001 | 0x1000 | 0x4000;

/// A TUN device of this name in the namespace, up, with these host addresses.
pub fn tun(ns: &Ns, name: &str, slot: u8) -> Tunnel {
    let file = ns.run(|| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .expect("/dev/net/tun");
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..18].copy_from_slice(&FLAGS.to_ne_bytes());
        crate::raw::ioctl_buffer(file.as_fd(), TUNSETIFF, &mut request).expect("TUNSETIFF");
        file
    });
    let v4 = [10, 64, slot, 0].into();
    let v6 = format!("fd52:5650:1:{slot:x}::").parse().expect("address");
    ns.ip(&format!("addr add 10.64.{slot}.1/24 dev {name}"));
    ns.ip(&format!("addr add {v6}/112 dev {name} nodad"));
    ns.ip(&format!("link set {name} up"));
    let reply = Reply {
        slot: slot.into(),
        v4,
        v6,
        ..Reply::to(&Request::new(Op::Acquire, 1), Status::Ok)
    };
    Tunnel::new(
        Key([slot; 16]),
        Lease {
            reply,
            tun: Some(file.into()),
        },
    )
}

/// Two clients on a gateway that does what many a guide says.
pub fn gateway(lab: &Lab) -> (Tunnel, Tunnel) {
    let pair = (tun(&lab.gw, "nv0", 0), tun(&lab.gw, "nv1", 1));
    lab.gw.sysctl("net/ipv4/ip_forward", "1");
    lab.gw.sysctl("net/ipv6/conf/all/forwarding", "1");
    lab.gw.sh(
        "nft",
        &["table inet naive {\nchain post {\ntype nat hook postrouting priority 100;\noifname wan0 masquerade\n}\n}"],
    );
    pair
}
