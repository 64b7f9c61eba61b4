//! The rounds: in each, every way is measured once, one after the other.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::args::Plan;
use crate::crowd::Crowd;
use crate::hill::Hill;
use crate::load;
use crate::lossy;
use crate::results::Results;
use crate::road::{ALL, Kind, Road};
use crate::rough;
use crate::rtt::{self, Trips};
use crate::schedule::{self, Part};
use crate::slow;
use crate::stage::{FAR, Stage, UDP};
use crate::tls::Tls;
use crate::{Way, udp};

pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

pub(crate) const STREAMS: [usize; 3] = [1, 4, 10];
pub(crate) const SIZES: [usize; 3] = [64, 512, 1400];
/// Streams under which round trips are measured.
pub(crate) const LOADED: usize = 10;
pub(crate) const OURS: Kind = Kind::Ours { offload: true };
/// Between two echo requests.
const EVERY: Duration = Duration::from_millis(5);
/// What is on the way when a load ends is gone after this.
const QUIET: Duration = Duration::from_millis(60);
/// Clients' machines are numbered from here.
const FIRST_CLIENT: u8 = 20;

/// The ways that are asked for and can be had; why not, for the others.
fn chosen(plan: &Plan, results: &mut Results) -> Vec<Kind> {
    let wanted = |kind: &Kind| match (kind.peer(), &plan.peers, &plan.ways) {
        (_, _, Some(ways)) => ways.contains(&kind.word()),
        (Some(peer), Some(names), _) => names.iter().any(|n| n == peer),
        _ => true,
    };
    let mut kinds: Vec<Kind> = ALL.into_iter().filter(wanted).collect();
    kinds.retain(|kind| match kind.missing() {
        None => true,
        Some(program) => {
            let note = format!("{}: skipped, {program} is not installed", kind.name());
            eprintln!("{note}");
            results.notes.push(note);
            false
        }
    });
    kinds
}

/// Builds the laboratory and plays all rounds in it.
pub(crate) fn tunnels(plan: &Plan) -> Outcome<(Results, Vec<Kind>)> {
    let mut results = Results::default();
    let stage = Stage::new();
    if stage.outer.is_none() {
        let note = "connections to the gateways use the machine's own congestion control";
        results.notes.push(note.to_owned());
    }
    let tls = Tls::new()?;
    let names = [
        "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m",
    ];
    let mut roads = Vec::new();
    for ((kind, name), n) in chosen(plan, &mut results)
        .into_iter()
        .zip(names)
        .zip(FIRST_CLIENT..)
    {
        match guarded(|| Road::new(&stage, kind, name, n)) {
            Ok(road) => roads.push(road),
            Err(e) => note(&mut results, kind, "could not be set up", &e),
        }
    }
    let mut crowd = None;
    if plan.many {
        match guarded(|| Ok(Crowd::new(&stage))) {
            Ok(made) => crowd = Some(made),
            Err(e) => note(&mut results, OURS, "no crowd", &e),
        }
    }
    let mut hill = None;
    if plan.delay || plan.lossy {
        match guarded(|| Ok(Hill::new(&stage))) {
            Ok(made) => hill = Some(made),
            Err(e) => note(&mut results, OURS, "no long roads", &e),
        }
    }
    let estimate = schedule::estimate(plan, &kinds(&roads)).as_secs();
    eprintln!("about {} minutes", estimate.div_ceil(60));
    let begun = Instant::now();
    for round in 0..plan.rounds {
        // Another order each round, so that nobody always comes after the same.
        for i in 0..roads.len() {
            let road = &roads[(i + round as usize) % roads.len()];
            let kind = road.kind;
            eprintln!(
                "{:4.0} s  round {} of {}: {}",
                begun.elapsed().as_secs_f64(),
                round + 1,
                plan.rounds,
                kind.name()
            );
            let due = |part| schedule::due(plan, part, kind, round);
            let mut tried = |what: &str, f: &dyn Fn(&mut Results) -> Outcome<()>| {
                if let Err(e) = guarded(|| f(&mut results)) {
                    note(
                        &mut results,
                        kind,
                        &format!("{what}, in round {}", round + 1),
                        &e,
                    );
                }
            };
            if due(Part::Tcp) || due(Part::Udp) {
                let f = |results: &mut Results| one(&stage, road, plan, &tls, round, results);
                tried("failed", &f);
            }
            if due(Part::Rough) {
                let f =
                    |results: &mut Results| rough::roads(&stage, road, plan, &tls, round, results);
                tried("on bad roads", &f);
            }
            if due(Part::Delay)
                && let Some(hill) = &hill
            {
                let f =
                    |results: &mut Results| slow::roads(&stage, hill, road, plan, round, results);
                tried("on long roads", &f);
            }
            if due(Part::Lossy)
                && let Some(hill) = &hill
            {
                let f =
                    |results: &mut Results| lossy::roads(&stage, hill, road, plan, round, results);
                tried("on long roads that lose packets", &f);
            }
            if begun.elapsed() > plan.limit {
                results.notes.push(format!(
                    "ended after {} s, in round {}",
                    plan.limit.as_secs(),
                    round + 1
                ));
                return Ok((results, kinds(&roads)));
            }
        }
        if let Some(crowd) = &crowd {
            eprintln!("{:4.0} s  many clients", begun.elapsed().as_secs_f64());
            if let Err(e) = guarded(|| crowd.measure(&stage, plan, round, &mut results)) {
                note(&mut results, OURS, "several clients at once", &e);
            }
        }
    }
    Ok((results, kinds(&roads)))
}

fn kinds(roads: &[Road]) -> Vec<Kind> {
    roads.iter().map(|road| road.kind).collect()
}

/// The laboratory panics when something does not come about; others go on.
pub(crate) fn guarded<T>(f: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        let words = words.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(words.unwrap_or_else(|| "panicked".to_owned()).into())
    })
}

pub(crate) fn note(results: &mut Results, kind: Kind, what: &str, e: &dyn std::fmt::Display) {
    let first = e.to_string().lines().next().unwrap_or_default().to_owned();
    let note = format!("{}: {what}: {first}", kind.name());
    eprintln!("{note}");
    results.notes.push(note);
}

fn one(
    stage: &Stage,
    road: &Road,
    plan: &Plan,
    tls: &Tls,
    round: u32,
    results: &mut Results,
) -> Outcome<()> {
    let (open, connect) = road.open()?;
    let kind = road.kind;
    let due = |part| schedule::due(plan, part, kind, round);
    let millis = connect.map(|c| c.as_secs_f64() * 1e3);
    results.put(kind, "connect", round, millis);
    let packets = kind.carries_packets();
    if packets && due(Part::Tcp) {
        std::thread::sleep(QUIET);
        let trips = trips(road, || {
            std::thread::sleep(plan.idle);
            Ok(())
        })?;
        record(results, kind, "rtt.idle", round, &trips.1);
    }
    for way in Way::BOTH {
        for streams in STREAMS.into_iter().filter(|_| due(Part::Tcp)) {
            let tls = (kind == Kind::RawTls).then_some(tls);
            let load = || {
                let listener = road.listener(stage);
                let pairs = load::connect(road.client(), road.to, listener, streams)?;
                Ok(load::run(pairs, way, plan.span(), &road.who, tls)?)
            };
            let moved = if packets && streams == LOADED {
                let (moved, trips) = trips(road, load)?;
                record(results, kind, &format!("rtt.{}", way.name()), round, &trips);
                moved
            } else {
                load()?
            };
            let key = format!("{}.{streams}", way.name());
            results.put(kind, &format!("tcp.{key}"), round, Some(moved.gigabits()));
            results.put(kind, &format!("cpu.{key}"), round, moved.cost());
            std::thread::sleep(QUIET);
        }
    }
    if due(Part::Udp) {
        let sizes = if plan.quick { &SIZES[..1] } else { &SIZES[..] };
        for size in sizes {
            for way in Way::BOTH {
                let far = &stage.lab.up;
                let at = (FAR, UDP).into();
                let rate = udp::lossless(road.client(), far, at, way, *size, plan.trial);
                let key = format!("udp.{size}.{}", way.name());
                results.put(kind, &key, round, Some(rate.unwrap_or(0.0)));
            }
        }
    }
    results.put(
        kind,
        "memory",
        round,
        road.who.private().map(|k| k as f64 / 1024.0),
    );
    open.close();
    Ok(())
}

/// Round trips while something else happens.
pub(crate) fn trips<T: Send>(
    road: &Road,
    meanwhile: impl FnOnce() -> Outcome<T>,
) -> Outcome<(T, Trips)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| rtt::watch(road.client(), FAR, EVERY, &stop));
        let value = meanwhile();
        stop.store(true, Ordering::Relaxed);
        let trips = watch
            .join()
            .map_err(|_| "the round trips could not be measured")?;
        Ok((value?, trips))
    })
}

pub(crate) fn record(results: &mut Results, kind: Kind, key: &str, round: u32, trips: &Trips) {
    for percent in [50, 99] {
        let measure = format!("{key}.p{percent}");
        results.put(kind, &measure, round, trips.percentile(percent));
    }
    results.put(
        kind,
        &format!("{key}.lost"),
        round,
        Some(trips.lost() as f64),
    );
    results.put(kind, &format!("{key}.sent"), round, Some(trips.sent as f64));
}
