//! What is measured in which round, and how long all of it takes: a way whose
//! figures no target is about is measured in fewer rounds.

use std::time::Duration;

use crate::args::Plan;
use crate::load::Span;
use crate::road::Kind;
use crate::{lossy, sides, slow};

/// Rounds of what is reported only.
pub(crate) const REPORTED: u32 = 2;

/// What a way is measured at, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Tcp,
    Udp,
    /// Loss of one packet in a hundred, and a narrow road.
    Rough,
    /// More loss, and loss beyond the gateway.
    Rougher,
    Delay,
    /// Loss of one packet in a hundred on a long road, on either side of the gateways.
    Lossy,
}

impl Part {
    const ALL: [Part; 6] = [
        Part::Tcp,
        Part::Udp,
        Part::Rough,
        Part::Rougher,
        Part::Delay,
        Part::Lossy,
    ];

    /// Whether it is asked for at all.
    fn wanted(self, plan: &Plan) -> bool {
        match self {
            Part::Tcp => plan.tcp,
            Part::Udp => plan.udp,
            Part::Rough | Part::Rougher => plan.rough,
            Part::Delay => plan.delay,
            Part::Lossy => plan.lossy,
        }
    }

    /// Whether this way has it.
    fn known(self, kind: Kind) -> bool {
        match self {
            Part::Tcp => true,
            // What carries the same bytes the same way says nothing new there.
            Part::Rough => !matches!(
                kind,
                Kind::RawTls | Kind::Stunnel | Kind::BoringTun | Kind::Naive { .. }
            ),
            Part::Udp => kind.carries_packets(),
            Part::Rougher | Part::Lossy => {
                matches!(kind, Kind::Plain | Kind::Ours { offload: true })
            }
            Part::Delay => slow::compared(kind),
        }
    }

    /// Whether a target is about it.
    fn judged(self, kind: Kind) -> bool {
        match (self, kind) {
            (_, Kind::Ours { offload: true }) => self != Part::Delay,
            (Part::Tcp | Part::Rough | Part::Rougher | Part::Lossy, Kind::Plain) => true,
            (Part::Tcp, kind) => matches!(
                kind,
                Kind::RawTls
                    | Kind::Ours { offload: false }
                    | Kind::Naive { long: false }
                    | Kind::OpenVpn { tcp: true }
                    | Kind::Ocserv { dtls: false }
                    | Kind::WireGuard
            ),
            (Part::Udp, kind) => matches!(
                kind,
                Kind::OpenVpn { tcp: false }
                    | Kind::Ocserv { .. }
                    | Kind::WireGuard
                    | Kind::BoringTun
                    | Kind::Naive { long: true }
            ),
            _ => false,
        }
    }

    /// How long it takes for one way, roughly.
    fn takes(self, plan: &Plan) -> Duration {
        let one = plan.warm + plan.count;
        let long = plan.warm * 4 + plan.count * 2;
        let connect = Duration::from_millis(500);
        match self {
            Part::Tcp => one * 6 + plan.idle + connect,
            Part::Udp => plan.trial * 50,
            Part::Rough => long * 4 + connect * 2,
            Part::Rougher => (long * 2 + connect) * 2,
            Part::Delay => slow::DELAYS.into_iter().fold(Duration::ZERO, |sum, delay| {
                let trip = Duration::from_millis(delay);
                sum + plan.idle + connect * 2 + (one + trip * 30) * 4
            }),
            Part::Lossy => {
                let Span { warm, count } = lossy::span(plan);
                ((warm + count + connect / 2) * 2 + connect) * 2
            }
        }
    }
}

/// Whether this round has this part of this way.
pub(crate) fn due(plan: &Plan, part: Part, kind: Kind, round: u32) -> bool {
    let rounds = if part.judged(kind) {
        plan.rounds
    } else {
        plan.rounds.min(REPORTED)
    };
    part.wanted(plan) && part.known(kind) && round < rounds
}

/// How long all rounds and what follows take, roughly, on a machine that is quiet.
pub(crate) fn estimate(plan: &Plan, kinds: &[Kind]) -> Duration {
    let mut sum = Duration::ZERO;
    for round in 0..plan.rounds {
        for (part, kind) in Part::ALL
            .into_iter()
            .flat_map(|part| kinds.iter().map(move |kind| (part, *kind)))
        {
            if due(plan, part, kind, round) {
                sum += part.takes(plan);
            }
        }
    }
    let one = plan.warm + plan.count;
    let seconds = Duration::from_secs;
    if plan.many {
        sum += (one * 8 + seconds(3)) * plan.rounds;
    }
    if plan.cores {
        sum += one * 4 * plan.rounds + seconds(10);
    }
    if plan.devices {
        sum += one * 4 * sides::rounds_of_devices(plan) + seconds(20);
    }
    for clients in &plan.clients {
        sum += one * 4 * plan.rounds + seconds(15) + Duration::from_millis(7) * *clients as u32;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::{Part, REPORTED, due};
    use crate::args::Plan;
    use crate::road::Kind;

    fn plan(words: &str) -> Plan {
        let words = words.split_whitespace().map(str::to_owned);
        Plan::new(words).expect("a plan")
    }

    #[test]
    fn what_no_target_is_about_is_measured_in_the_first_rounds_only() {
        let plan = plan("--parts all --rounds 5");
        let ours = Kind::Ours { offload: true };
        assert!(due(&plan, Part::Tcp, ours, 4), "a target is about it");
        assert!(!due(&plan, Part::Tcp, ours, 5), "there are five rounds");
        assert!(due(&plan, Part::Tcp, Kind::Stunnel, REPORTED - 1));
        assert!(!due(&plan, Part::Tcp, Kind::Stunnel, REPORTED));
        assert!(!due(&plan, Part::Delay, ours, REPORTED));
        for kind in [ours, Kind::Plain] {
            assert!(due(&plan, Part::Lossy, kind, 4), "the target compares them");
        }
    }

    #[test]
    fn only_what_is_asked_for_and_a_way_can_do_is_measured() {
        let asked = plan("--parts udp");
        assert!(due(&asked, Part::Udp, Kind::BoringTun, 0));
        assert!(!due(&asked, Part::Tcp, Kind::BoringTun, 0));
        assert!(
            !due(&asked, Part::Udp, Kind::Stunnel, 0),
            "it carries no datagrams"
        );
    }
}
