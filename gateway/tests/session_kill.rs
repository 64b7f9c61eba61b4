//! What is left of the counters when their process is killed.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use rvpn_gateway::meter::{Meter, Orphan, Totals};

/// Set in the process that is going to be killed.
const DIRECTORY: &str = "RVPN_SESSION_KILL_DIRECTORY";

/// Counts as fast as it can and says how far it has come.
fn count_until_killed(dir: &Path) {
    let meter = Meter::create(dir, 8).unwrap();
    let ended = meter.open(1, "bob", "packets", 3).unwrap();
    let mut totals = Totals::default();
    totals.inbound.pass(5, 500);
    ended.close(&totals, 4);
    let row = meter.open(2, "alice", "packets", 3).unwrap();
    let mut out = std::io::stdout();
    for n in 1..=u64::MAX {
        totals.outbound.pass(1, 100);
        row.publish(&totals, false);
        if n % 1000 == 0 {
            writeln!(out, "counted {n}").unwrap();
            out.flush().unwrap();
        }
    }
}

#[test]
fn a_killed_process_has_lost_nothing_it_had_counted() {
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        count_until_killed(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_killed_process_has_lost_nothing_it_had_counted",
        ])
        .arg("--nocapture")
        .env(DIRECTORY, dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said = |line: &str| line.strip_prefix("counted ")?.parse::<u64>().ok();
    let mut reached = 0;
    while reached < 50_000 {
        let line = lines.next().unwrap().unwrap();
        reached = said(&line).unwrap_or(reached);
        let (living, _) = Orphan::find(dir.path()).unwrap();
        assert!(living.is_empty(), "its process still lives");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    for line in lines {
        reached = said(&line.unwrap()).unwrap_or(reached);
    }
    let (orphans, strange) = Orphan::find(dir.path()).unwrap();
    assert_eq!((orphans.len(), strange.len()), (1, 0));
    let rows = orphans[0].usage(99);
    assert_eq!(
        (rows[0].account.as_str(), rows[0].ended_ms),
        ("bob", Some(4))
    );
    assert_eq!(rows[0].totals.inbound.payload, 500);
    assert_eq!(
        (rows[1].account.as_str(), rows[1].ended_ms),
        ("alice", Some(99))
    );
    let out = rows[1].totals.outbound;
    // At most the step between two messages more than it had said.
    assert!(
        (reached..=reached + 1000).contains(&out.packets),
        "{reached} {out:?}"
    );
}
