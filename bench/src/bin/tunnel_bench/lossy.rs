//! A road that loses packets and is long as well. Those of `rough` have no length at
//! all, as no real one has.

use std::time::Duration;

use crate::Way;
use crate::args::Plan;
use crate::condition::Condition;
use crate::hill::{Hill, Long};
use crate::load::{self, Span};
use crate::measure::Outcome;
use crate::results::Results;
use crate::road::Road;
use crate::stage::Stage;

/// The round trip, half of it each way.
pub(crate) const TRIP: Duration = Duration::from_millis(20);
/// How many of a thousand packets are lost, each way.
pub(crate) const LOSS: u32 = 10;
/// Many, since each is slow there and what it happens to lose decides how slow:
/// of four, the sum differs by a sixth from one time to the next.
pub(crate) const STREAMS: usize = 16;

/// Which side of the gateways loses them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    Before,
    Behind,
}

impl Hop {
    pub(crate) const BOTH: [Hop; 2] = [Hop::Before, Hop::Behind];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Hop::Before => "before",
            Hop::Behind => "behind",
        }
    }

    /// Under which its figures are kept.
    pub(crate) fn key(self, way: Way) -> String {
        format!("lossy.{}.{}", self.name(), way.name())
    }
}

/// Of one figure: every stream recovers from its losses many times meanwhile, so
/// that how many there happen to be says little.
pub(crate) fn span(plan: &Plan) -> Span {
    Span {
        warm: plan.warm * 4,
        count: plan.count * 4,
    }
}

/// One way with loss before the gateways, and behind them.
pub(crate) fn roads(
    stage: &Stage,
    hill: &Hill,
    road: &Road,
    plan: &Plan,
    round: u32,
    results: &mut Results,
) -> Outcome<()> {
    for hop in Hop::BOTH {
        // Before anything connects: how much a socket sends at once is kept.
        let _long = Long::new(stage, hill, road, TRIP / 2)?;
        let _condition = match hop {
            Hop::Before => Condition::loss(&stage.lab, &hill.ns, LOSS),
            Hop::Behind => Condition::far(&stage.lab, LOSS),
        };
        let (open, _) = road.open()?;
        for way in Way::BOTH {
            let pairs = load::connect(road.client(), road.to, &stage.listener, STREAMS)?;
            let moved = load::run(pairs, way, span(plan), &road.who, None)?;
            let megabits = moved.gigabits() * 1e3;
            results.put(road.kind, &hop.key(way), round, Some(megabits));
            // What is on the way is gone before the next.
            std::thread::sleep(TRIP * 3);
        }
        open.close();
    }
    Ok(())
}
