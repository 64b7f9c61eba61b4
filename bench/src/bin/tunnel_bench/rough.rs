//! Roads that lose packets or are narrow.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::process::Command;

use rvpn_lab::raw::{self, Feature};
use rvpn_lab::{Lab, Ns};

use crate::Way;
use crate::args::Plan;
use crate::load::{self, Span};
use crate::measure::{LOADED, Outcome, record, trips};
use crate::results::Results;
use crate::road::{Kind, Road};
use crate::schedule::{self, Part};
use crate::stage::Stage;
use crate::tls::Tls;

/// Streams on a road that loses packets.
pub(crate) const STREAMS: usize = 4;
/// How many of a thousand packets are lost, each way.
pub(crate) const LOSSES: [u32; 2] = [10, 30];

/// A road's condition, until it is dropped.
struct Condition<'a> {
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
    fn narrow(ends: Vec<&'a Ns>) -> Condition<'a> {
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

    /// Between the client and the gateways some of a thousand packets are lost, each way.
    fn loss(lab: &'a Lab, client: &'a Ns, n: u32) -> Condition<'a> {
        let mut it = Condition { undo: Vec::new() };
        for ns in [client, &lab.gw, &lab.nb] {
            it.set(ns, "wan0", Feature::Checksums, false);
            it.joins(lab, ns);
        }
        let (wire, port) = lab.port(client);
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
    fn far(lab: &'a Lab, n: u32) -> Condition<'a> {
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

/// One way on every kind of bad road.
pub(crate) fn roads(
    stage: &Stage,
    road: &Road,
    plan: &Plan,
    tls: &Tls,
    round: u32,
    results: &mut Results,
) -> Outcome<()> {
    let kind = road.kind;
    let span = Span {
        warm: plan.warm * 4,
        count: plan.count * 2,
    };
    let tls = (kind == Kind::RawTls).then_some(tls);
    let gateways = [&stage.lab.gw, &stage.lab.nb];
    let load = |way, streams| {
        let listener = road.listener(stage);
        let pairs = load::connect(road.client(), road.to, listener, streams)?;
        Ok(load::run(pairs, way, span, &road.who, tls)?)
    };
    let rougher = schedule::due(plan, Part::Rougher, kind, round);
    for thousandth in LOSSES {
        if thousandth > LOSSES[0] && !rougher {
            continue;
        }
        // Before anything connects: how much a socket sends at once is kept.
        let _condition = Condition::loss(&stage.lab, road.client(), thousandth);
        let (open, _) = road.open()?;
        for way in Way::BOTH {
            let moved = load(way, STREAMS)?;
            let key = format!("loss{thousandth}.{}", way.name());
            results.put(kind, &key, round, Some(moved.gigabits() * 1e3));
        }
        open.close();
    }
    if rougher {
        let _condition = Condition::far(&stage.lab, LOSSES[0]);
        let (open, _) = road.open()?;
        for way in Way::BOTH {
            let moved = load(way, STREAMS)?;
            let key = format!("far{}.{}", LOSSES[0], way.name());
            results.put(kind, &key, round, Some(moved.gigabits() * 1e3));
        }
        open.close();
    }
    if !kind.carries_packets() {
        return Ok(());
    }
    let (open, _) = road.open()?;
    for way in Way::BOTH {
        // Behind the tunnel nothing is narrow, else packets would wait there too.
        let ends = match way {
            Way::Up => vec![road.client()],
            Way::Down => gateways.to_vec(),
        };
        let _condition = Condition::narrow(ends);
        let (moved, trips) = trips(road, || load(way, LOADED))?;
        let key = format!("narrow.{}", way.name());
        results.put(kind, &key, round, Some(moved.gigabits() * 1e3));
        record(results, kind, &format!("rtt.{key}"), round, &trips);
    }
    open.close();
    Ok(())
}
