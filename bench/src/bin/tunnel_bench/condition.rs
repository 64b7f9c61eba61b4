//! What makes a road lose packets or narrow, for a while.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::process::Command;

use rvpn_lab::raw::{self, Feature};
use rvpn_lab::{Lab, Ns};

/// A road's condition, until it is dropped.
pub(crate) struct Condition<'a> {
    /// Where it was made, and what ends it there.
    undo: Vec<(&'a Ns, Undo)>,
}

/// What ends a condition.
enum Undo {
    Command(&'static [&'static str]),
    Feature(String, Feature, bool),
}

impl<'a> Condition<'a> {
    /// Nobody at these ends sends more.
    pub(crate) fn narrow(ends: Vec<&'a Ns>) -> Condition<'a> {
        let mut it = Condition { undo: Vec::new() };
        for ns in ends {
            // A long queue, so that it is the sender's to keep it short.
            let words = "qdisc add dev wan0 root tbf rate 100mbit burst 64k limit 4000000";
            ns.sh("tc", &words.split(' ').collect::<Vec<_>>());
            it.undo.push((
                ns,
                Undo::Command(&["tc", "qdisc", "del", "dev", "wan0", "root"]),
            ));
        }
        it
    }

    /// Between a host and the gateways some of a thousand packets are lost, each way.
    /// The host is a client, or the near end of the wire on its long road.
    pub(crate) fn loss(lab: &'a Lab, host: &'a Ns, n: u32) -> Condition<'a> {
        let mut it = Condition { undo: Vec::new() };
        for ns in [host, &lab.gw, &lab.nb] {
            it.set(ns, "wan0", Feature::Checksums, false);
            it.joins(lab, ns);
        }
        let (wire, port) = lab.port(host);
        it.lossy(
            wire,
            "bridge",
            "forward",
            &[("iifname", &port), ("oifname", &port)],
            n,
        );
        it
    }

    /// Between the gateways and the far side. The road before the gateways is as it
    /// always is, so packets are cut at the far side's ends of the wire only, and
    /// what goes there is lost where it is cut already.
    pub(crate) fn far(lab: &'a Lab, n: u32) -> Condition<'a> {
        let mut it = Condition { undo: Vec::new() };
        for ns in [&lab.gw, &lab.nb] {
            it.joins(lab, ns);
        }
        let (wire, port) = lab.port(&lab.up);
        it.set(&lab.up, "wan0", Feature::Checksums, false);
        it.set(wire, &port, Feature::Checksums, false);
        it.lossy(wire, "bridge", "forward", &[("iifname", &port)], n);
        it.lossy(&lab.up, "ip", "prerouting", &[("iifname", "wan0")], n);
        it
    }

    /// Real devices cut what they send and join what they receive, and what is lost
    /// between is a packet of the wire; those of the laboratory do neither by themselves.
    fn set(&mut self, ns: &'a Ns, device: &str, which: Feature, on: bool) {
        feature(ns, device, which, on).expect("a device that can be told");
        self.undo
            .push((ns, Undo::Feature(device.to_owned(), which, !on)));
    }

    /// The kernel joins only what a device receives from one that cuts.
    fn joins(&mut self, lab: &'a Lab, ns: &'a Ns) {
        let (wire, port) = lab.port(ns);
        self.set(wire, &port, Feature::Checksums, false);
        self.set(ns, "wan0", Feature::Joins, true);
    }

    fn lossy(&mut self, ns: &'a Ns, family: &str, hook: &str, which: &[(&str, &str)], n: u32) {
        let mut rules = format!(
            "add table {family} rough; \
             add chain {family} rough in {{ type filter hook {hook} priority -300; }}"
        );
        for (word, device) in which {
            rules += &format!(
                "; add rule {family} rough in {word} \"{device}\" meta protocol ip \
                 numgen random mod 1000 < {n} drop"
            );
        }
        ns.sh("nft", &[&rules]);
        self.undo.push((
            ns,
            Undo::Command(match family {
                "bridge" => &["nft", "delete", "table", "bridge", "rough"],
                _ => &["nft", "delete", "table", "ip", "rough"],
            }),
        ));
    }
}

fn feature(ns: &Ns, device: &str, which: Feature, on: bool) -> std::io::Result<()> {
    let socket = ns.run(|| UdpSocket::bind("0.0.0.0:0"))?;
    raw::feature(socket.as_fd(), device, which, on)
}

impl Drop for Condition<'_> {
    fn drop(&mut self) {
        // What is left of it would only spoil later figures, which show it.
        for (ns, undo) in self.undo.drain(..).rev() {
            match undo {
                Undo::Command(words) => {
                    let mut command = Command::new(words[0]);
                    let _done = ns.output(command.args(&words[1..]));
                }
                Undo::Feature(device, which, on) => {
                    let _done = feature(ns, &device, which, on);
                }
            }
        }
    }
}
