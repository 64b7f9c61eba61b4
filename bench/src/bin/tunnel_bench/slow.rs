//! Roads that are long, see `hill`.

use std::time::Duration;

use crate::Way;
use crate::args::Plan;
use crate::hill::{Hill, Long};
use crate::load::{self, Span};
use crate::measure::{Outcome, record, trips};
use crate::results::Results;
use crate::road::{Kind, Road};
use crate::stage::Stage;

/// Round trips in milliseconds, half of it each way.
pub(crate) const DELAYS: [u64; 2] = [20, 100];
/// Streams whose throughput is measured; with the last, round trips too.
pub(crate) const STREAMS: [usize; 2] = [1, 4];

/// Who is compared on long roads.
pub(crate) fn compared(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Plain
            | Kind::Ours { offload: true }
            | Kind::Naive { long: true }
            | Kind::OpenVpn { tcp: true }
            | Kind::Ocserv { dtls: false }
    )
}

/// One way on roads of every length.
pub(crate) fn roads(
    stage: &Stage,
    hill: &Hill,
    road: &Road,
    plan: &Plan,
    round: u32,
    results: &mut Results,
) -> Outcome<()> {
    let kind = road.kind;
    for delay in DELAYS {
        let trip = Duration::from_millis(delay);
        let long = Long::new(stage, hill, road, trip / 2)?;
        let (open, _) = road.open()?;
        let (_, idle) = trips(road, || {
            std::thread::sleep(plan.idle);
            Ok(())
        })?;
        record(
            results,
            kind,
            &format!("rtt.delay{delay}.idle"),
            round,
            &idle,
        );
        // Until every window is open.
        let span = Span {
            warm: plan.warm + trip * 15,
            count: plan.count + trip * 10,
        };
        for way in Way::BOTH {
            for streams in STREAMS {
                let load = || {
                    let pairs = load::connect(road.client(), road.to, &stage.listener, streams)?;
                    Ok(load::run(pairs, way, span, &road.who, None)?)
                };
                let (moved, trips) = trips(road, load)?;
                let key = format!("delay{delay}.{}.{streams}", way.name());
                results.put(kind, &key, round, Some(moved.gigabits() * 1e3));
                record(results, kind, &format!("rtt.{key}"), round, &trips);
                // What is on the way is gone before the next.
                std::thread::sleep(trip * 3);
            }
        }
        open.close();
        drop(long);
    }
    Ok(())
}
