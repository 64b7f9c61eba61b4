//! Two laboratories that differ in one thing, measured in turns: what else the
//! machine does meanwhile is in the figures of both.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal;
use rvpn_lab::machine::Up;
use rvpn_lab::topology::{FAR4, GW4, UP4};
use rvpn_lab::{Gateway, Helper, Lab};

use crate::Way;
use crate::args::Plan;
use crate::cpu;
use crate::crowd::{machines, together, up};
use crate::idle::{Cost, Idle};
use crate::load::Span;
use crate::measure::{OURS, Outcome, guarded};
use crate::results::Results;
use crate::stage::{TCP, congestion};

/// To build one with all that belongs to it, and to tear it down.
const BUILT: Duration = Duration::from_secs(240);
/// For one answer.
const ANSWERED: Duration = Duration::from_secs(60);
/// Of a log, when something failed.
const LINES: usize = 20;
/// Leases beside those that are counted.
const SPARE: usize = 12;
const DEVICE_ROUNDS: u32 = 9;
pub(crate) const FEW: usize = 10;
pub(crate) const MANY_DEVICES: usize = 10_000;
/// Clients that are busy together on one core or all.
pub(crate) const BUSY: usize = 4;

/// What one of the two is.
#[derive(Clone, Debug)]
struct Side {
    /// Devices that are provisioned.
    slots: usize,
    /// Clients that are connected and quiet.
    idle: usize,
    /// Clients that are busy, and the streams of each.
    busy: usize,
    streams: usize,
    /// The gateway's configuration.
    extra: String,
}

/// Answers to what a side is asked.
enum Answer {
    Ready(Option<Cost>),
    Gigabits(f64),
}

/// A side in a thread of its own, with namespaces of its own.
struct Running {
    ask: Sender<Way>,
    answers: Receiver<Result<Answer, String>>,
    thread: JoinHandle<()>,
}

impl Running {
    /// Builds it, and says what its idle clients cost.
    fn start(side: Side, span: Span) -> Outcome<(Running, Option<Cost>)> {
        let (ask, asked) = channel();
        let (answer, answers) = channel();
        let thread = std::thread::spawn(move || {
            if let Err(e) = guarded(|| serve(&side, span, &asked, &answer)) {
                // Nobody may wait for it any more.
                let _ = answer.send(Err(e.to_string()));
            }
        });
        let running = Running {
            ask,
            answers,
            thread,
        };
        match running.answer(BUILT)? {
            Answer::Ready(cost) => Ok((running, cost)),
            Answer::Gigabits(_) => Err("an answer before its question".into()),
        }
    }

    fn answer(&self, limit: Duration) -> Outcome<Answer> {
        Ok(self.answers.recv_timeout(limit)??)
    }

    fn measure(&self, way: Way) -> Outcome<f64> {
        self.ask.send(way)?;
        match self.answer(ANSWERED)? {
            Answer::Gigabits(rate) => Ok(rate),
            Answer::Ready(_) => Err("ready twice".into()),
        }
    }

    /// Ends it, and waits until it is gone: what it leaves costs time.
    fn end(self) {
        drop(self.ask);
        loop {
            match self.answers.recv_timeout(BUILT) {
                Ok(Err(e)) => eprintln!("at the end: {e}"),
                Ok(Ok(_)) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                // One that hangs ends with this program.
                Err(RecvTimeoutError::Timeout) => return,
            }
        }
        // What it had to say it has said.
        let _ = self.thread.join();
    }
}

fn serve(
    side: &Side,
    span: Span,
    asked: &Receiver<Way>,
    answer: &Sender<Result<Answer, String>>,
) -> Outcome<()> {
    let lab = Lab::new();
    lab.bare_wire();
    let before = cpu::kernel();
    let slots = format!("slots = {0}\nmax-slots = {0}\n", side.slots);
    let mut helper = Helper::serving(&lab, &slots);
    let device = cpu::kernel().saturating_sub(before) as f64 / side.slots as f64;
    let gateway = Gateway::start(&lab, &helper, &side.extra);
    for (ns, address) in [(&lab.gw, GW4), (&lab.up, UP4)] {
        // Where it cannot be, the report of the rounds says so.
        let _ = congestion(ns, address);
    }
    let listener = lab.up.tcp(&format!("{FAR4}:{TCP}"));
    let machines = machines(&lab, &gateway, side.busy);
    let idle = (side.idle > 0).then(|| Idle::connect(&lab, &gateway, side.idle, device));
    if let Some(Err(_)) = &idle {
        // Why is in one of these.
        for log in [gateway.log(), helper.log()] {
            let lines: Vec<&str> = log.lines().rev().take(LINES).collect();
            lines.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
    let (idle, cost) = idle.transpose()?.unzip();
    let ups = up(&machines)?;
    answer.send(Ok(Answer::Ready(cost)))?;
    for way in asked {
        let busy = machines.iter().map(|m| (&m.ns, side.streams));
        let rates = together(busy, &listener, way, span)?;
        answer.send(Ok(Answer::Gigabits(rates.iter().sum())))?;
    }
    ups.into_iter().for_each(Up::down);
    drop(idle);
    drop(gateway);
    helper.signal(Signal::SIGTERM);
    helper.ended();
    // All at once, which the end of a namespace does one by one.
    let (code, said) = helper.run(&lab.gw, "teardown");
    if code != 0 {
        return Err(format!("teardown: {said}").into());
    }
    Ok(())
}

/// Both, round by round, each first in turn, under these names. What idle
/// clients cost is known also when the rounds fail.
fn compare(
    plan: &Plan,
    rounds: u32,
    sides: [(&str, Side); 2],
    results: &mut Results,
) -> Outcome<(Option<Cost>, Outcome<()>)> {
    let [(first, one), (second, other)] = sides;
    // The second is built when the first stands still, so that what it costs is its own.
    let (one, _) = Running::start(one, plan.span())?;
    let (other, cost) = match Running::start(other, plan.span()) {
        Ok(started) => started,
        Err(e) => {
            one.end();
            return Err(e);
        }
    };
    let mut play = || {
        for round in 0..rounds {
            for way in Way::BOTH {
                let mut turns = [(first, &one), (second, &other)];
                turns.rotate_left(round as usize % 2);
                for (name, side) in turns {
                    let key = format!("{name}.{}", way.name());
                    results.put(OURS, &key, round, Some(side.measure(way)?));
                }
            }
        }
        Ok(())
    };
    let played = play();
    other.end();
    one.end();
    Ok((cost, played))
}

/// One busy client alone, and among so many that say nothing; and what those cost.
pub(crate) fn idle(
    plan: &Plan,
    clients: usize,
    results: &mut Results,
) -> Outcome<(Option<Cost>, Outcome<()>)> {
    let side = |idle: usize| Side {
        slots: idle + SPARE,
        idle,
        busy: 1,
        streams: 1,
        extra: format!(
            "[limits]\nmax-clients = {0}\npending-per-address = {0}\n",
            idle + SPARE
        ),
    };
    let alone = format!("idle.{clients}.alone");
    let among = format!("idle.{clients}.among");
    let sides = [(&*alone, side(0)), (&*among, side(clients))];
    compare(plan, plan.rounds, sides, results)
}

/// Enough for a difference that is small.
pub(crate) fn rounds_of_devices(plan: &Plan) -> u32 {
    if plan.quick {
        plan.rounds
    } else {
        plan.rounds.max(DEVICE_ROUNDS)
    }
}

/// One client where few devices are provisioned, and where many are.
pub(crate) fn devices(plan: &Plan, results: &mut Results) -> Outcome<()> {
    let side = |slots| Side {
        slots,
        idle: 0,
        busy: 1,
        streams: 4,
        extra: String::new(),
    };
    let sides = [
        ("devices.few", side(FEW)),
        ("devices.many", side(MANY_DEVICES)),
    ];
    compare(plan, rounds_of_devices(plan), sides, results)?.1
}

/// Several busy clients on one core of the gateway, and on all.
pub(crate) fn cores(plan: &Plan, results: &mut Results) -> Outcome<()> {
    let side = |extra: &str| Side {
        slots: BUSY + SPARE,
        idle: 0,
        busy: BUSY,
        streams: 1,
        extra: extra.to_owned(),
    };
    let sides = [
        ("cores.one", side("[session]\ncores = 1\n")),
        ("cores.all", side("")),
    ];
    compare(plan, plan.rounds, sides, results)?.1
}
