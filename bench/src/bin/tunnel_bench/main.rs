//! Ours beside no tunnel, raw TLS and other tunnels, in one run on one machine,
//! so that the ratios mean something where the figures do not.
//!
//! `dev-bin/bench` builds what it needs and starts it; see there. Everything
//! happens in network namespaces of its own, which end with it.

mod args;
mod condition;
mod cpu;
mod crowd;
mod device;
mod flood;
mod hill;
mod idle;
mod load;
mod lossy;
mod machine;
mod measure;
mod naive;
mod peers;
mod report;
mod results;
mod road;
mod rough;
mod rtt;
mod schedule;
mod sides;
mod slow;
mod stage;
mod targets;
mod tls;
mod udp;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::args::{Plan, USAGE};
use crate::machine::Machine;
use crate::measure::{OURS, guarded, note};
use crate::report::Report;
use crate::results::Results;

/// Which way the bytes go, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

impl Way {
    pub(crate) const BOTH: [Way; 2] = [Way::Up, Way::Down];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Up => "up",
            Way::Down => "down",
        }
    }
}

fn main() -> ExitCode {
    let plan = match Plan::new(std::env::args().skip(1)) {
        Ok(plan) => plan,
        Err(e) => {
            eprintln!("{e}\n{USAGE}");
            return ExitCode::from(1);
        }
    };
    if let Err(e) = run(&plan) {
        eprintln!("tunnel_bench: {e}");
        return ExitCode::from(70);
    }
    ExitCode::SUCCESS
}

fn run(plan: &Plan) -> Result<(), Box<dyn std::error::Error>> {
    // Every idle client is a descriptor here and some in the gateway.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let machine = Machine::now();
    eprintln!("{} cores, load average {:.2}", machine.cores, machine.load);
    if machine.load > 1.0 {
        eprintln!("WARNING: this machine is not quiet; figures will be low and far apart");
    }
    // A thread has namespaces of its own, and takes them with it.
    let (results, kinds) = std::thread::scope(|scope| {
        let rounds = scope.spawn(|| measure::tunnels(plan).map_err(|e| e.to_string()));
        rounds
            .join()
            .map_err(|_| "the laboratory could not be built".to_owned())?
    })?;
    let mut costs = Vec::new();
    let mut results: Results = results;
    let begun = Instant::now();
    for clients in plan.clients.iter().copied() {
        eprintln!("{clients} idle clients");
        match guarded(|| sides::idle(plan, clients, &mut results)) {
            Ok((cost, played)) => {
                if let Some(cost) = cost {
                    if cost.missing > 0 {
                        let what =
                            format!("of {clients} idle clients {} were missing", cost.missing);
                        results.notes.push(what);
                    }
                    costs.push(cost);
                }
                if let Err(e) = played {
                    note(
                        &mut results,
                        OURS,
                        &format!("busy among {clients} idle clients"),
                        &e,
                    );
                }
            }
            Err(e) => note(&mut results, OURS, &format!("{clients} idle clients"), &e),
        }
    }
    if plan.cores {
        eprintln!("one core and all");
        if let Err(e) = guarded(|| sides::cores(plan, &mut results)) {
            note(&mut results, OURS, "one core and all", &e);
        }
    }
    if plan.devices {
        eprintln!("few devices and many");
        if let Err(e) = guarded(|| sides::devices(plan, &mut results)) {
            note(&mut results, OURS, "few devices and many", &e);
        }
    }
    eprintln!("the rest took {:.0} s", begun.elapsed().as_secs_f64());
    let words: Vec<String> = std::env::args().skip(1).collect();
    let command = std::env::var("RVPN_BENCH_COMMAND")
        .unwrap_or_else(|_| format!("tunnel_bench {}", words.join(" ")));
    let report = Report {
        machine: &machine,
        plan,
        command,
        kinds,
        results: &results,
        idle: &costs,
    };
    let text = report.markdown();
    println!("{text}");
    if let Some(path) = &plan.markdown {
        fs::write(path, &text)?;
    }
    if let Some(path) = &plan.json {
        let idle = costs.iter().map(|c| {
            json!({
                "clients": c.clients,
                "gateway-kib": c.user,
                "device-kib": c.device,
                "connection-kib": c.connection,
                "connected-s": c.connected.as_secs_f64(),
                "login-cpu-ms": c.login,
                "quiet-cpu": c.quiet,
            })
        });
        let whole = json!({
            "machine": machine.json(),
            "command": report.command,
            "rounds": plan.rounds,
            "results": results.json(),
            "idle": idle.collect::<Vec<_>>(),
        });
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(path, format!("{whole:#}\n"))?;
    }
    Ok(())
}
