//! Several clients of ours that are busy at once.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use rvpn_lab::Ns;
use rvpn_lab::machine::{Machine, Up};
use rvpn_lab::topology::GW4;
use rvpn_lab::{Gateway, Lab};

use crate::Way;
use crate::args::Plan;
use crate::cpu::Who;
use crate::load::{self, Span};
use crate::measure::Outcome;
use crate::results::Results;
use crate::road::Kind;
use crate::rtt;
use crate::stage::{FAR, Stage, client, far_tcp};

/// Busy clients at once.
pub(crate) const MANY: [usize; 3] = [1, 4, 8];
/// Streams of the greedy one among clients with one each.
const GREEDY: usize = 10;
const NAMES: [&str; 8] = ["m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7"];
/// Their machines are numbered from here.
const FIRST: u8 = 40;
/// For a tunnel to carry its first packet.
const PATIENCE: Duration = Duration::from_secs(15);

/// So many clients' machines that joined the gateway, at most eight.
pub(crate) fn machines(lab: &Lab, gateway: &Gateway, count: usize) -> Vec<Machine> {
    let named = NAMES.into_iter().zip(FIRST..).take(count);
    let joined = named.map(|(name, n)| {
        let machine = client(lab, name, n);
        machine.join(lab, gateway, name, GW4);
        machine
    });
    joined.collect()
}

/// All of them with their tunnels up.
pub(crate) fn up(machines: &[Machine]) -> Outcome<Vec<Up<'_>>> {
    let mut ups = Vec::new();
    for machine in machines {
        let since = Instant::now();
        ups.push(machine.begin(&[]));
        rtt::first(&machine.ns, FAR, since, PATIENCE)
            .ok_or("one of several clients has no tunnel")?;
    }
    Ok(ups)
}

/// What each of these clients moves while all do, in Gbit/s; with so many
/// streams each.
pub(crate) fn together<'a>(
    clients: impl IntoIterator<Item = (&'a Ns, usize)>,
    listener: &TcpListener,
    way: Way,
    span: Span,
) -> Outcome<Vec<f64>> {
    let mut all = Vec::new();
    for (near, streams) in clients {
        all.push(load::connect(near, far_tcp(), listener, streams)?);
    }
    std::thread::scope(|scope| {
        let start = |pairs| scope.spawn(move || load::run(pairs, way, span, &Who::Nobody, None));
        let runs: Vec<_> = all.into_iter().map(start).collect();
        let rates = runs.into_iter().map(|run| match run.join() {
            Ok(moved) => Ok(moved?.gigabits()),
            Err(_) => Err("a load could not be run".into()),
        });
        rates.collect()
    })
}

/// Clients of ours beside those of the rounds.
pub(crate) struct Crowd {
    machines: Vec<Machine>,
}

impl Crowd {
    pub(crate) fn new(stage: &Stage) -> Crowd {
        Crowd {
            machines: machines(&stage.lab, &stage.gateway, NAMES.len()),
        }
    }

    /// How much they move together, and how evenly.
    pub(crate) fn measure(
        &self,
        stage: &Stage,
        plan: &Plan,
        round: u32,
        results: &mut Results,
    ) -> Outcome<()> {
        let kind = Kind::Ours { offload: true };
        let ups = up(&self.machines)?;
        for way in Way::BOTH {
            for (count, greedy) in MANY.map(|n| (n, false)).into_iter().chain([(8, true)]) {
                let streams = |n| if greedy && n == 0 { GREEDY } else { 1 };
                let busy = self.machines[..count].iter().enumerate();
                let busy = busy.map(|(n, machine)| (&machine.ns, streams(n)));
                let rates = together(busy, &stage.listener, way, plan.span())?;
                let word = if greedy { "greedy" } else { "even" };
                let key = format!("many.{}.{count}.{word}", way.name());
                results.put(kind, &key, round, Some(rates.iter().sum()));
                results.put(kind, &format!("{key}.jain"), round, Some(jain(&rates)));
            }
        }
        ups.into_iter().for_each(Up::down);
        Ok(())
    }
}

/// One when all are equal, one by their number when one has everything.
fn jain(rates: &[f64]) -> f64 {
    let sum: f64 = rates.iter().sum();
    let squares: f64 = rates.iter().map(|r| r * r).sum();
    sum * sum / (rates.len() as f64 * squares)
}

#[cfg(test)]
mod tests {
    use super::jain;

    #[test]
    fn the_index_is_jains() {
        assert_eq!(jain(&[2.0, 2.0, 2.0, 2.0]), 1.0);
        assert_eq!(jain(&[2.0, 0.0, 0.0, 0.0]), 0.25);
    }
}
