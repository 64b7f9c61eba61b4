//! Roads that lose packets or are narrow.

use crate::Way;
use crate::args::Plan;
use crate::condition::Condition;
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
