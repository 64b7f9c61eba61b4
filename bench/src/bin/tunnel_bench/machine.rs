//! What the figures were made on.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

/// The machine, as it was before the run.
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) system: String,
    pub(crate) load: f64,
    /// Whether programs may use that congestion control.
    pub(crate) bbr: bool,
}

impl Machine {
    pub(crate) fn now() -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let value = |path: &str, name: &str, between: char| {
            let text = read(path);
            let line = text.lines().find(|l| l.starts_with(name));
            let value = line.and_then(|l| l.split_once(between)).map(|(_, v)| v);
            value
                .unwrap_or("unknown")
                .trim()
                .trim_matches('"')
                .to_owned()
        };
        let date = Command::new("date").args(["-u", "+%F %H:%M UTC"]).output();
        let date = date.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
        Machine {
            date: date.unwrap_or_default(),
            processor: value("/proc/cpuinfo", "model name", ':'),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            system: value("/etc/os-release", "PRETTY_NAME", '='),
            load: load(),
            bbr: read("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
                .split_whitespace()
                .any(|name| name == "bbr"),
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "date": self.date,
            "processor": self.processor,
            "cores": self.cores,
            "kernel": self.kernel,
            "system": self.system,
            "load": self.load,
            "bbr": self.bbr,
        })
    }
}

/// The load average of the last minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|n| n.parse().ok()).unwrap_or(0.0)
}
