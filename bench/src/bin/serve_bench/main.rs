//! What serving through the gateway costs: the same TLS connections from the same
//! visitor, straight to the server, through `rvpn serve`, and through another
//! reverse tunnel that speaks TLS, in one run.
//!
//! `dev-bin/bench --serve` builds what it needs and starts it; see there.

mod load;
mod peer;
mod table;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use rvpn_lab::machine::{Machine, operator};
use rvpn_lab::ns::Daemon;
use rvpn_lab::topology::{GW4, NB4};
use rvpn_lab::{Gateway, Helper, Lab};

use crate::load::{Span, Tls, Way};
use crate::peer::Rathole;
use crate::table::{Column, Results};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "\
usage: serve_bench [--quick] [--rounds N] [--seconds S] [--rathole PROGRAM]
                   [--json FILE] [--markdown FILE]
  --quick     one short round, to see that it works
  --rounds    rounds, each measuring everything once (5)
  --seconds   counted for each figure (1)
  --rathole   the other tunnel's program (not measured without it)";

/// The names that visitors ask for, of a client with one connection and of one with several.
const NAME: &str = "app.bench.test";
const NAME_MANY: &str = "many.bench.test";
const CONNECTIONS: &str = "4";
/// Where the server listens for its tunnel, and for those who come straight.
const LOCAL: &str = "127.0.0.1:8443";
const STRAIGHT: u16 = 8444;
const VISITORS: [usize; 2] = [1, 10];
const PATIENCE: Duration = Duration::from_secs(15);

struct Plan {
    rounds: u32,
    span: Span,
    rathole: Option<PathBuf>,
    json: Option<PathBuf>,
    markdown: Option<PathBuf>,
}

impl Plan {
    fn new(words: impl Iterator<Item = String>) -> Result<Plan, String> {
        let mut plan = Plan {
            rounds: 5,
            span: Span {
                warm: Duration::from_millis(300),
                count: Duration::from_secs(1),
            },
            rathole: None,
            json: None,
            markdown: None,
        };
        let mut words = words;
        while let Some(word) = words.next() {
            if word == "--quick" {
                plan.rounds = 1;
                plan.span = Span {
                    warm: Duration::from_millis(100),
                    count: Duration::from_millis(300),
                };
                continue;
            }
            let value = words
                .next()
                .ok_or_else(|| format!("{word} needs a value"))?;
            let number = || match value.parse::<u32>() {
                Ok(n @ 1..=100) => Ok(n),
                _ => Err(format!("{word} '{value}': give a number from 1 to 100")),
            };
            match word.as_str() {
                "--rounds" => plan.rounds = number()?,
                "--seconds" => plan.span.count = Duration::from_secs(number()?.into()),
                "--rathole" => plan.rathole = Some(value.into()),
                "--json" => plan.json = Some(value.into()),
                "--markdown" => plan.markdown = Some(value.into()),
                _ => return Err(format!("'{word}' is not an option")),
            }
        }
        Ok(plan)
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
    // A thread has namespaces of its own, and takes them with it.
    let done = std::thread::scope(|scope| {
        let run = scope.spawn(|| run(&plan).map_err(|e| e.to_string()));
        run.join()
            .unwrap_or_else(|_| Err("the laboratory could not be built".to_owned()))
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("serve_bench: {e}");
            ExitCode::from(70)
        }
    }
}

/// One way from the visitor to a server.
struct Road {
    column: Column,
    to: SocketAddr,
    server: TcpListener,
    tls: Tls,
    _tunnel: Vec<Daemon>,
}

fn run(plan: &Plan) -> Outcome<()> {
    let lab = Lab::new();
    lab.bare_wire();
    let helper = Helper::serving(&lab, "slots = 2\nmax-slots = 4\n");
    let gateway = Gateway::start(&lab, &helper, "");
    let visitor = Machine::new(&lab, "visitor", 20);
    let one = Machine::new(&lab, "ours", 21);
    let many = Machine::new(&lab, "many", 24);
    let mut roads = vec![
        straight(&lab)?,
        ours(&lab, &gateway, &one, Column::Ours, NAME, &[])?,
        ours(
            &lab,
            &gateway,
            &many,
            Column::OursMany,
            NAME_MANY,
            &["--connections", CONNECTIONS],
        )?,
    ];
    if let Some(program) = &plan.rathole {
        let (server, client) = (&lab.nb, Machine::new(&lab, "theirs", 22));
        let peer = Rathole::new(program, &lab.dir.join("rathole"))?;
        let daemons = peer.start(server, &client.ns, NB4, LOCAL)?;
        roads.push(Road {
            column: Column::Rathole,
            to: peer::entrance(NB4)?,
            server: client.ns.tcp(LOCAL),
            tls: Tls::new(NAME)?,
            _tunnel: daemons,
        });
    }
    for road in &roads {
        until_open(&visitor, road)?;
    }
    let mut results = Results::default();
    for round in 0..plan.rounds {
        for i in 0..roads.len() {
            let road = &roads[(i + round as usize) % roads.len()];
            eprintln!("round {} of {}: {}", round + 1, plan.rounds, road.column);
            for visitors in VISITORS {
                for way in Way::BOTH {
                    let (from, server) = (&visitor.ns, &road.server);
                    let speed =
                        load::run(from, road.to, server, visitors, way, plan.span, &road.tls)?;
                    results.put(road.column, way, visitors, round, speed);
                }
            }
        }
    }
    let text = results.markdown(plan.rounds, plan.span.count);
    println!("{text}");
    if let Some(path) = &plan.markdown {
        fs::write(path, &text)?;
    }
    if let Some(path) = &plan.json {
        fs::write(path, format!("{:#}\n", results.json()))?;
    }
    Ok(())
}

/// To the server's own address, over the same wire.
fn straight(lab: &Lab) -> Outcome<Road> {
    let machine = Machine::new(lab, "straight", 23);
    let to: SocketAddr = format!("1.1.1.23:{STRAIGHT}").parse()?;
    Ok(Road {
        column: Column::Straight,
        to,
        server: machine.ns.tcp(&to.to_string()),
        tls: Tls::new(NAME)?,
        _tunnel: Vec::new(),
    })
}

/// Through the gateway: the server's own certificate, by the visitor's SNI.
fn ours(
    lab: &Lab,
    gateway: &Gateway,
    machine: &Machine,
    column: Column,
    name: &'static str,
    more: &[&str],
) -> Outcome<Road> {
    let words = [
        "invite",
        machine.ns.name,
        "--address",
        GW4,
        "--name",
        name,
    ];
    let link = operator(lab, gateway, &words).good();
    machine
        .rvpn(&["join", link.trim(), "--name", "home"])
        .good();
    let target = format!("tls://{LOCAL}");
    let log = fs::File::create(lab.dir.join(format!("{name}.log")))?;
    let mut words = vec!["serve", &target, "--name", name];
    words.extend(more);
    let mut command = machine.command(&words);
    command
        .stdout(log.try_clone()?)
        .stderr(log)
        .stdin(Stdio::null());
    Ok(Road {
        column,
        to: format!("{GW4}:443").parse()?,
        server: machine.ns.tcp(LOCAL),
        tls: Tls::new(name)?,
        _tunnel: vec![machine.ns.daemon(&mut command)],
    })
}

/// Waits until a visitor gets through.
fn until_open(visitor: &Machine, road: &Road) -> Outcome<()> {
    let begun = Instant::now();
    let short = Span {
        warm: Duration::from_millis(20),
        count: Duration::from_millis(20),
    };
    loop {
        let (from, server) = (&visitor.ns, &road.server);
        match load::run(from, road.to, server, 1, Way::Down, short, &road.tls) {
            Ok(speed) if speed > 0.0 => return Ok(()),
            _ if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(50)),
            Ok(_) => return Err(format!("{}: nothing gets through", road.column).into()),
            Err(e) => return Err(format!("{}: {e}", road.column).into()),
        }
    }
}
