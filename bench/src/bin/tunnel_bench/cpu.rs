//! What processes and threads cost, as `/proc` tells it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Ticks of `/proc/PID/stat` in a second, on every architecture Linux gives it.
const TICKS: f64 = 100.0;

/// Whose time is the gateway side's.
#[derive(Clone, Debug)]
pub(crate) enum Who {
    /// The kernel alone does it, in nobody's name.
    Nobody,
    /// A program, its process group and whatever they started.
    Program(u32),
    /// Threads of this process, by their name.
    Threads(&'static str),
}

impl Who {
    /// CPU seconds so far, kernel work in their own calls included.
    pub(crate) fn seconds(&self) -> Option<f64> {
        match self {
            Who::Nobody => None,
            Who::Program(leader) => Some(program(*leader).iter().map(|p| p.ticks).sum::<f64>()),
            Who::Threads(name) => Some(stats(Path::new("/proc/self/task")).fold(0.0, |sum, s| {
                if s.name == *name { sum + s.ticks } else { sum }
            })),
        }
        .map(|ticks| ticks / TICKS)
    }

    /// Memory of the program that is nobody else's, in KiB.
    pub(crate) fn private(&self) -> Option<u64> {
        let Who::Program(leader) = self else {
            return None;
        };
        Some(program(*leader).iter().map(|p| rollup(p.id)).sum())
    }
}

struct Stat {
    id: u32,
    name: String,
    parent: u32,
    group: u32,
    ticks: f64,
}

fn stats(dir: &Path) -> impl Iterator<Item = Stat> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        // One that ended meanwhile is not there.
        let text = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name may have any character, so the last parenthesis ends it.
        let (head, tail) = text.rsplit_once(')')?;
        let fields: Vec<&str> = tail.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u32>().ok();
        Some(Stat {
            id,
            name: head.split_once('(')?.1.to_owned(),
            parent: number(1)?,
            group: number(2)?,
            ticks: f64::from(number(11)?) + f64::from(number(12)?),
        })
    })
}

fn program(leader: u32) -> Vec<Stat> {
    let all: Vec<Stat> = stats(Path::new("/proc")).collect();
    let mut ids: BTreeSet<u32> = BTreeSet::from([leader]);
    loop {
        let before = ids.len();
        for stat in &all {
            if stat.group == leader || ids.contains(&stat.parent) {
                ids.insert(stat.id);
            }
        }
        if ids.len() == before {
            break;
        }
    }
    all.into_iter().filter(|s| ids.contains(&s.id)).collect()
}

fn rollup(id: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{id}/smaps_rollup")).unwrap_or_default();
    let lines = text.lines().filter(|l| l.starts_with("Private_"));
    lines
        .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum()
}

/// Kernel memory of the machine that is never given back to others, in KiB.
pub(crate) fn kernel() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    field("SUnreclaim:").unwrap_or(0) + field("Percpu:").unwrap_or(0)
}
