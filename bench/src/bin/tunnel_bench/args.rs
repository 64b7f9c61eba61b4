//! What is asked for.

use std::path::PathBuf;
use std::time::Duration;

use crate::load::Span;
use crate::road::ALL;

pub(crate) const USAGE: &str = "\
usage: tunnel_bench [--quick] [--rounds N] [--seconds S] [--peers NAME,...|none]
                    [--ways NAME,...] [--parts PART,...] [--idle N,...|0] [--limit S]
                    [--json FILE] [--markdown FILE]
  --quick     one short round and 100 idle clients, to see that it works
  --rounds    rounds, each measuring everything once (5)
  --seconds   counted for each TCP figure (1)
  --peers     openvpn, ocserv, wireguard-go, boringtun, stunnel (all that are installed)
  --ways      only these, as the tables call them, with - for a space
  --parts     tcp (with round trips), udp, rough (loss, a narrow road), delay (a long
              road), lossy (loss on a long road), many (busy clients at once), cores (four
              busy clients on one core of the gateway and on all), devices (10 and 10,000
              of them), or all; tcp,udp unless told otherwise
  --idle      connected clients for the figures of idle ones (1000)
  --limit     ends the rounds after so many seconds (3600)";

/// How much is measured, and where it goes.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) quick: bool,
    pub(crate) rounds: u32,
    pub(crate) warm: Duration,
    pub(crate) count: Duration,
    /// For round trips without load.
    pub(crate) idle: Duration,
    /// One attempt at a rate of datagrams.
    pub(crate) trial: Duration,
    /// `None` is whichever are installed.
    pub(crate) peers: Option<Vec<String>>,
    /// `None` is all.
    pub(crate) ways: Option<Vec<String>>,
    pub(crate) tcp: bool,
    pub(crate) udp: bool,
    /// On roads that lose packets or are narrow.
    pub(crate) rough: bool,
    /// On roads that are long.
    pub(crate) delay: bool,
    /// On a long one that loses packets.
    pub(crate) lossy: bool,
    /// Several clients of ours at once.
    pub(crate) many: bool,
    /// Those on one core of the gateway, and on all.
    pub(crate) cores: bool,
    /// Few and many devices beside the one in use.
    pub(crate) devices: bool,
    pub(crate) clients: Vec<usize>,
    pub(crate) limit: Duration,
    pub(crate) json: Option<PathBuf>,
    pub(crate) markdown: Option<PathBuf>,
}

const PARTS: [&str; 8] = [
    "tcp", "udp", "rough", "delay", "lossy", "many", "cores", "devices",
];
const PEERS: [&str; 5] = ["openvpn", "ocserv", "wireguard-go", "boringtun", "stunnel"];

impl Plan {
    pub(crate) fn new(given: impl Iterator<Item = String>) -> Result<Plan, String> {
        let words: Vec<String> = given.collect();
        let quick = words.iter().any(|w| w == "--quick");
        let mut plan = Plan {
            quick,
            rounds: if quick { 1 } else { 5 },
            warm: Duration::from_millis(if quick { 100 } else { 250 }),
            count: Duration::from_millis(if quick { 300 } else { 1000 }),
            idle: Duration::from_millis(if quick { 300 } else { 1000 }),
            trial: Duration::from_millis(if quick { 60 } else { 150 }),
            peers: None,
            ways: None,
            tcp: true,
            udp: true,
            rough: false,
            delay: false,
            lossy: false,
            many: false,
            cores: false,
            devices: false,
            clients: vec![if quick { 100 } else { 1000 }],
            limit: Duration::from_secs(if quick { 75 } else { 3600 }),
            json: None,
            markdown: None,
        };
        let mut words = words.into_iter().filter(|w| w != "--quick");
        while let Some(word) = words.next() {
            let value = words
                .next()
                .ok_or_else(|| format!("{word} needs a value"))?;
            let number = |most: u64| match value.parse::<u64>() {
                Ok(n) if (1..=most).contains(&n) => Ok(n),
                _ => Err(format!("{word} '{value}': give a number from 1 to {most}")),
            };
            match word.as_str() {
                "--rounds" => plan.rounds = number(100)? as u32,
                "--seconds" => plan.count = Duration::from_secs(number(60)?),
                "--limit" => plan.limit = Duration::from_secs(number(86_400)?),
                "--peers" => plan.peers = Some(peers(&value)?),
                "--ways" => plan.ways = Some(ways(&value)?),
                "--parts" => {
                    let all = PARTS.join(",");
                    let value = if value == "all" { &all } else { &value };
                    let parts: Vec<&str> = value.split(',').collect();
                    if let Some(other) = parts.iter().find(|p| !PARTS.contains(p)) {
                        return Err(format!("--parts '{other}': there are {}", PARTS.join(", ")));
                    }
                    plan.tcp = parts.contains(&"tcp");
                    plan.udp = parts.contains(&"udp");
                    plan.rough = parts.contains(&"rough");
                    plan.delay = parts.contains(&"delay");
                    plan.lossy = parts.contains(&"lossy");
                    plan.many = parts.contains(&"many");
                    plan.cores = parts.contains(&"cores");
                    plan.devices = parts.contains(&"devices");
                }
                "--idle" => plan.clients = clients(&value)?,
                "--json" => plan.json = Some(value.into()),
                "--markdown" => plan.markdown = Some(value.into()),
                _ => return Err(format!("'{word}' is not an option")),
            }
        }
        Ok(plan)
    }

    /// Of one TCP figure.
    pub(crate) fn span(&self) -> Span {
        Span {
            warm: self.warm,
            count: self.count,
        }
    }
}

fn peers(value: &str) -> Result<Vec<String>, String> {
    if value == "none" {
        return Ok(Vec::new());
    }
    let names: Vec<String> = value.split(',').map(str::to_owned).collect();
    match names.iter().find(|n| !PEERS.contains(&n.as_str())) {
        None => Ok(names),
        Some(other) => Err(format!(
            "'{other}' is no peer: there are {}",
            PEERS.join(", ")
        )),
    }
}

fn ways(value: &str) -> Result<Vec<String>, String> {
    let names: Vec<String> = value.split(',').map(str::to_owned).collect();
    let known: Vec<String> = ALL.iter().map(|kind| kind.word()).collect();
    match names.iter().find(|n| !known.contains(n)) {
        None => Ok(names),
        Some(other) => Err(format!("--ways '{other}': there are {}", known.join(", "))),
    }
}

fn clients(value: &str) -> Result<Vec<usize>, String> {
    let parse = |n: &str| n.parse().ok().filter(|n| *n <= 10_000);
    let all: Option<Vec<usize>> = value.split(',').map(parse).collect();
    let all = all.ok_or_else(|| format!("--idle '{value}': give numbers up to 10000"))?;
    Ok(all.into_iter().filter(|n| *n > 0).collect())
}
