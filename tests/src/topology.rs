//! The standard set-up: `gw` and `nb` on one wire with the router `up`, which is the internet.
//!
//! ```text
//!   gw (1.1.1.2, 2606:4700:4700::2) ──┐
//!   nb (1.1.1.3, 2606:4700:4700::3) ──┼── wire ── up (1.1.1.1, 2606:4700:4700::1111; 8.8.8.8)
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::helper::Tunnel;
use crate::ns::Ns;

pub const GW4: &str = "1.1.1.2";
pub const UP4: &str = "1.1.1.1";
pub const NB4: &str = "1.1.1.3";
pub const FAR4: &str = "8.8.8.8";
pub const GW6: &str = "2606:4700:4700::2";
pub const UP6: &str = "2606:4700:4700::1111";
pub const NB6: &str = "2606:4700:4700::3";

/// The same places by family, for what must hold in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    pub gw: &'static str,
    pub up: &'static str,
    pub nb: &'static str,
    /// Every address of a host.
    pub any: &'static str,
}

pub const FAMILIES: [Family; 2] = [
    Family {
        gw: GW4,
        up: UP4,
        nb: NB4,
        any: "0.0.0.0",
    },
    Family {
        gw: GW6,
        up: UP6,
        nb: NB6,
        any: "::",
    },
];

impl Family {
    pub fn is_v4(self) -> bool {
        self.gw == GW4
    }

    /// The first address a client has in this family.
    pub fn source(self, of: &Tunnel) -> String {
        if self.is_v4() { of.v4(2) } else { of.v6(1) }
    }
}

/// Address and port as one text.
pub fn at(address: &str, port: u16) -> String {
    match address.parse::<std::net::IpAddr>() {
        Ok(a) => std::net::SocketAddr::new(a, port).to_string(),
        Err(e) => panic!("{address}: {e}"),
    }
}

/// The laboratory of one test.
pub struct Lab {
    pub gw: Ns,
    pub up: Ns,
    pub nb: Ns,
    wire: Ns,
    /// A directory of this test's own, inside its private `/run`.
    pub dir: PathBuf,
}

/// Whether more than one user can be told apart here.
pub fn many_uids() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace()
        .nth(2)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0_u64)
        > 65_536
}

/// Gives this thread, and those it starts, mounts and a network of their own.
/// The machine's interfaces are out of reach from here on.
fn go_private() {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .expect("unshare: run the tests as root (sudo ./dev-bin/test) or in a user namespace");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .expect("own /run");
    // The mode udev gives the device, whatever it is on this machine.
    if many_uids() {
        let tun = "/run/net-tun";
        mknod(
            tun,
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o666),
            makedev(10, 200),
        )
        .expect("mknod tun");
        fs::set_permissions(tun, fs::Permissions::from_mode(0o666)).expect("chmod tun");
        mount(Some(tun), "/dev/net/tun", none, MsFlags::MS_BIND, none).expect("own /dev/net/tun");
    }
}

/// Puts a file in the place of another, for this test only.
pub fn bind(file: &std::path::Path, over: &str) {
    let none = None::<&str>;
    mount(Some(file), over, none, MsFlags::MS_BIND, none).expect("bind");
}

impl Default for Lab {
    fn default() -> Lab {
        Lab::new()
    }
}

impl Lab {
    /// Builds it. One per test: each test is a thread or process of its own.
    pub fn new() -> Lab {
        go_private();
        let (gw, up, nb, wire) = (Ns::new("gw"), Ns::new("up"), Ns::new("nb"), Ns::new("wire"));
        wire.ip("link add br0 type bridge");
        wire.ip("link set br0 up");
        for (ns, v4, v6) in [(&gw, GW4, GW6), (&up, UP4, UP6), (&nb, NB4, NB6)] {
            attach(&wire, ns, v4, v6);
        }
        up.ip(&format!("addr add {FAR4}/32 dev lo"));
        up.sysctl("net/ipv4/ip_forward", "1");
        for ns in [&gw, &nb] {
            lead_out(ns);
        }
        let dir = PathBuf::from("/run/lab");
        fs::create_dir_all(&dir).expect("/run/lab");
        Lab {
            gw,
            up,
            nb,
            wire,
            dir,
        }
    }

    /// A client's machine on the wire, as 1.1.1.N and 2606:4700:4700::N; it
    /// reaches the gateway and the internet, and is reached by nothing of the lab's own.
    pub fn client(&self, name: &'static str, n: u8) -> Ns {
        assert!((10..=99).contains(&n), "below 10 are the lab's own");
        let ns = Ns::new(name);
        self.plug(&ns, n);
        ns
    }
}

impl Lab {
    /// Makes the wire no more than one: with `br_netfilter` loaded, a bridge
    /// passes every packet by the rules of its host, which costs time.
    pub fn bare_wire(&self) {
        for family in ["ip", "ip6", "arp"] {
            let name = format!("net/bridge/bridge-nf-call-{family}tables");
            // Not there when that module is not.
            if self
                .wire
                .run(|| fs::exists(format!("/proc/sys/{name}")).is_ok_and(|there| there))
            {
                self.wire.sysctl(&name, "0");
            }
        }
    }

    /// The wire, and its device that a namespace is plugged into.
    pub fn port(&self, ns: &Ns) -> (&Ns, String) {
        (&self.wire, port(ns))
    }

    /// Takes a client's cable away, with its addresses and routes.
    pub fn unplug(&self, client: &Ns) {
        client.ip("link del wan0");
    }

    /// Plugs a client in again, as another host.
    pub fn plug(&self, client: &Ns, n: u8) {
        attach(
            &self.wire,
            client,
            &format!("1.1.1.{n}"),
            &format!("2606:4700:4700::{n}"),
        );
        lead_out(client);
    }
}

/// Plugs a namespace into the wire with these addresses.
fn attach(wire: &Ns, ns: &Ns, v4: &str, v6: &str) {
    let port = port(ns);
    connect(wire, &port, ns, "wan0");
    wire.ip(&format!("link set {port} master br0"));
    ns.ip(&format!("addr add {v4}/24 dev wan0"));
    ns.ip(&format!("addr add {v6}/64 dev wan0 nodad"));
}

fn port(ns: &Ns) -> String {
    format!("p-{}", ns.name)
}

fn lead_out(ns: &Ns) {
    ns.ip(&format!("route add default via {UP4}"));
    ns.ip(&format!("-6 route add default via {UP6}"));
}

/// A cable between two namespaces, both ends up.
pub fn connect(a: &Ns, a_name: &str, b: &Ns, b_name: &str) {
    // Made in a, under a passing name; moved by the process id of a waiting child of b.
    let mut child = b.spawn(std::process::Command::new("cat").stdin(std::process::Stdio::piped()));
    a.ip(&format!(
        "link add {a_name} type veth peer name {b_name}-x netns {}",
        child.id()
    ));
    drop(child.stdin.take());
    let _ = child.wait();
    b.ip(&format!("link set {b_name}-x name {b_name}"));
    a.ip(&format!("link set {a_name} up"));
    b.ip(&format!("link set {b_name} up"));
}
