//! Roads that lose packets or are narrow.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::process::Command;

use rvpn_lab::topology::FAR4;
use rvpn_lab::{Lab, Ns, raw};

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

/// What is wrong with a road.
enum Wrong<'a> {
    Loss,
    /// With the far side's port of the wire.
    Far(&'a Ns, String),
    Narrow,
}

/// A road's condition, until it is dropped.
struct Condition<'a> {
    ends: Vec<&'a Ns>,
    wrong: Wrong<'a>,
}

impl<'a> Condition<'a> {
    /// Nobody at these ends sends more.
    fn narrow(ends: Vec<&'a Ns>) -> Condition<'a> {
        for ns in &ends {
            // A long queue, so that it is the sender's to keep it short.
            let words = "qdisc add dev wan0 root tbf rate 100mbit burst 64k limit 4000000";
            ns.sh("tc", &words.split(' ').collect::<Vec<_>>());
        }
        let wrong = Wrong::Narrow;
        Condition { ends, wrong }
    }

    /// The client and the gateways do not hear all of each other.
    fn loss(client: &'a Ns, address: &str, gateways: [&'a Ns; 2], n: u32) -> Condition<'a> {
        deaf(client, &format!("ip daddr {address}"), n);
        cut(client, "wan0", true);
        for gateway in gateways {
            deaf(gateway, &format!("ip saddr {address}"), n);
            cut(gateway, "wan0", true);
        }
        let [one, other] = gateways;
        Condition {
            ends: vec![client, one, other],
            wrong: Wrong::Loss,
        }
    }

    /// The gateways and the far side do not. The road before the gateways is as it
    /// always is, so packets are cut at the far side's ends of the wire only.
    fn far(lab: &'a Lab, n: u32) -> Condition<'a> {
        let (far, gateways) = (&lab.up, [&lab.gw, &lab.nb]);
        deaf(far, &format!("ip daddr {FAR4}"), n);
        for gateway in gateways {
            deaf(gateway, &format!("ip saddr {FAR4}"), n);
        }
        cut(far, "wan0", true);
        let (wire, port) = lab.port(far);
        cut(wire, &port, true);
        checksums(wire, &port, false).expect("a device without offload");
        Condition {
            ends: vec![far, gateways[0], gateways[1]],
            wrong: Wrong::Far(wire, port),
        }
    }
}

/// Whether a device cuts what it sends into packets of the wire: what is lost is
/// one of those and not one of 64 KiB.
fn cut(ns: &Ns, device: &str, on: bool) {
    let most = if on { 1 } else { 65_535 };
    ns.ip(&format!("link set {device} gso_max_segs {most}"));
}

/// Whether checksums are left to a device. A packet that came from a tunnel's is
/// cut only where they are not.
fn checksums(ns: &Ns, device: &str, on: bool) -> std::io::Result<()> {
    let socket = ns.run(|| UdpSocket::bind("0.0.0.0:0"))?;
    raw::offload_checksums(socket.as_fd(), device, on)
}

/// Of a thousand such packets from the wire a host does not hear so many.
fn deaf(ns: &Ns, which: &str, n: u32) {
    let rules = format!(
        "add table ip rough; \
         add chain ip rough in {{ type filter hook prerouting priority -300; }}; \
         add rule ip rough in iifname \"wan0\" {which} numgen random mod 1000 < {n} drop"
    );
    ns.sh("nft", &[&rules]);
}

impl Drop for Condition<'_> {
    fn drop(&mut self) {
        // What is left of it would only spoil later figures, which show it.
        for ns in &self.ends {
            let words: &[&str] = match self.wrong {
                Wrong::Narrow => &["tc", "qdisc", "del", "dev", "wan0", "root"],
                Wrong::Loss | Wrong::Far(..) => {
                    cut(ns, "wan0", false);
                    &["nft", "delete", "table", "ip", "rough"]
                }
            };
            let mut command = Command::new(words[0]);
            let _done = ns.output(command.args(&words[1..]));
        }
        if let Wrong::Far(wire, port) = &self.wrong {
            cut(wire, port, false);
            // It was there before.
            let _on = checksums(wire, port, true);
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
    let near = format!("1.1.1.{}", road.number);
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
        let _condition = Condition::loss(road.client(), &near, gateways, thousandth);
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
