//! The laboratory: one far side, our gateway, and beside it on the same wire a
//! second host that is everybody else's gateway.
//!
//! ```text
//!   a client of each kind ──┐            ┌── gw  1.1.1.2, ours
//!       1.1.1.N             ├── bridge ──┼── nb  1.1.1.3, plain NAT, TLS, the peers
//!                                        └── up  1.1.1.1 and 8.8.8.8, the far side
//! ```
//!
//! Clients have no way to 8.8.8.8 but the one that is measured.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;

use rvpn_lab::machine::Machine;
use rvpn_lab::topology::{FAR4, GW4, NB4, UP4};
use rvpn_lab::{Gateway, Helper, Lab, Ns};

use crate::rtt;

/// Where streams end.
pub(crate) const TCP: u16 = 5201;
/// Where datagrams end.
pub(crate) const UDP: u16 = 5202;
/// The far side.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// More than clients at a time.
const HELPER: &str = "slots = 16\nmax-slots = 24\n";

/// Later fields outlive earlier ones.
pub(crate) struct Stage {
    pub(crate) gateway: Gateway,
    _helper: Helper,
    pub(crate) listener: TcpListener,
    /// Whether the connections between client and gateway use cubic.
    pub(crate) outer: Option<&'static str>,
    pub(crate) lab: Lab,
}

impl Stage {
    pub(crate) fn new() -> Stage {
        let lab = Lab::new();
        lab.bare_wire();
        let helper = Helper::serving(&lab, HELPER);
        let gateway = Gateway::start(&lab, &helper, "");
        let nb = &lab.nb;
        nb.sysctl("net/ipv4/ip_forward", "1");
        for device in ["all", "default", "wan0"] {
            // It leads out where packets come in, and shall not say so.
            nb.sysctl(&format!("net/ipv4/conf/{device}/send_redirects"), "0");
        }
        let rules = format!(
            "add table ip bench; add chain ip bench out {{ type nat hook postrouting priority 100; }}; \
             add rule ip bench out oifname \"wan0\" ip daddr {FAR4} masquerade"
        );
        nb.sh("nft", &[&rules]);
        let cubic = [(&lab.gw, GW4), (nb, NB4), (&lab.up, UP4)];
        let outer = cubic.iter().all(|(ns, address)| congestion(ns, address));
        let listener = lab.up.tcp(&format!("{FAR4}:{TCP}"));
        Stage {
            gateway,
            _helper: helper,
            listener,
            outer: outer.then_some("cubic"),
            lab,
        }
    }
}

/// A client's machine that reaches its neighbours only.
pub(crate) fn client(lab: &Lab, name: &'static str, n: u8) -> Machine {
    let machine = Machine::new(lab, name, n);
    let ns = &machine.ns;
    ns.ip("route del default");
    ns.ip("-6 route del default");
    congestion(ns, &address(n).to_string());
    rtt::allow(ns);
    machine
}

/// The address of the client's machine with this number.
pub(crate) fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(1, 1, 1, n)
}

/// Where the far side's streams end.
pub(crate) fn far_tcp() -> SocketAddr {
    SocketAddr::from((FAR, TCP))
}

/// Connections with neighbours use cubic, whoever opens them.
pub(crate) fn congestion(ns: &Ns, address: &str) -> bool {
    let words = format!("route replace 1.1.1.0/24 dev wan0 src {address} congctl cubic");
    let mut command = Command::new("ip");
    command.args(words.split(' '));
    ns.output(&mut command).status.success()
}
