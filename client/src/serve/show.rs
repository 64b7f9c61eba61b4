//! What the user sees: a line that lives on a terminal, plain lines elsewhere,
//! or JSON.

use std::collections::{BTreeMap, VecDeque};
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rvpn_proto::streams::ServedAs;
use serde_json::{Value, json};

use super::target::Target;
use super::visit::News;
use crate::text::{bytes, shown, span};

/// Over which time the rate of visitors is taken.
const RATE: Duration = Duration::from_secs(60);
/// Arrivals that are remembered for it.
const ARRIVALS: usize = 10_000;

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Live,
    Lines,
    Json,
}

/// All that is known of what is going on.
pub(super) struct Show {
    form: Form,
    gateway: String,
    targets: Vec<Target>,
    served: BTreeMap<u32, ServedAs>,
    begun: Instant,
    connected: bool,
    trouble: Option<String>,
    open: u64,
    total: u64,
    /// Turned away by the gateway, as it says.
    turned_away: u64,
    sent: u64,
    received: u64,
    arrivals: VecDeque<Instant>,
    last: Option<SocketAddr>,
    reconnects: u64,
    /// The line that lives is on the screen.
    drawn: bool,
}

impl Show {
    pub(super) fn new(gateway: String, targets: Vec<Target>, as_json: bool) -> Show {
        let form = match (as_json, std::io::stdout().is_terminal()) {
            (true, _) => Form::Json,
            (false, true) => Form::Live,
            (false, false) => Form::Lines,
        };
        Show {
            form,
            gateway,
            targets,
            served: BTreeMap::new(),
            begun: Instant::now(),
            connected: false,
            trouble: None,
            open: 0,
            total: 0,
            turned_away: 0,
            sent: 0,
            received: 0,
            arrivals: VecDeque::new(),
            last: None,
            reconnects: 0,
            drawn: false,
        }
    }

    /// Prints a line, or its JSON.
    fn say(&mut self, line: &str, event: &Value) {
        let mut out = std::io::stdout().lock();
        // Whoever closed our output does not want to hear of it.
        let _closed = match self.form {
            Form::Json => writeln!(out, "{event}"),
            Form::Lines => writeln!(out, "{line}"),
            Form::Live => {
                let clear = if self.drawn { "\r\x1b[K" } else { "" };
                writeln!(out, "{clear}{line}")
            }
        };
        self.drawn = false;
        let _closed = out.flush();
    }

    fn target(&self, id: u32) -> String {
        let target = self.targets.iter().find(|t| t.id == id);
        target.map_or_else(|| id.to_string(), Target::to_string)
    }

    /// Everything is served.
    pub(super) fn serving(&mut self, served: BTreeMap<u32, ServedAs>) {
        let again = !self.served.is_empty();
        let same = self.served == served;
        self.served = served;
        self.connected = true;
        self.trouble = None;
        if again {
            self.reconnects += 1;
            let line = format!("connected to {} again", self.gateway);
            let event = json!({"event": "connected", "gateway": self.gateway});
            self.say(&line, &event);
        }
        if again && same {
            return;
        }
        for (id, at) in self.served.clone() {
            let target = self.target(id);
            let urls: Vec<String> = at.urls.iter().map(|u| shown(u)).collect();
            let line = format!("{}  ->  {target}", urls.join(" "));
            let event = json!({
                "event": "serving", "id": id, "target": target,
                "name": at.name, "port": at.port, "urls": urls,
            });
            self.say(&line, &event);
        }
    }

    /// The connection is gone.
    pub(super) fn lost(&mut self, why: &str, wait: Duration) {
        self.connected = false;
        self.trouble = Some(why.to_owned());
        let line = format!("{why}; trying again in {:.1} s", wait.as_secs_f64());
        let event = json!({
            "event": "lost", "why": why,
            "retry_ms": u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        });
        self.say(&line, &event);
    }

    /// What the gateway counts.
    pub(super) fn counted(&mut self, turned_away: u64) {
        self.turned_away = turned_away;
    }

    /// What happened at the door.
    pub(super) fn news(&mut self, news: &News) {
        match news {
            News::Came { id, peer, name } => {
                self.open += 1;
                self.total += 1;
                self.last = Some(*peer);
                if self.arrivals.len() == ARRIVALS {
                    self.arrivals.pop_front();
                }
                self.arrivals.push_back(Instant::now());
                let target = self.target(*id);
                let name = name.as_deref().map(shown);
                let event = json!({
                    "event": "visitor", "id": id, "target": target, "peer": peer, "name": name,
                });
                // Where a line lives, it says so; a thousand others would not help.
                if self.form != Form::Live {
                    let asked = name.map(|n| format!(" for {n}")).unwrap_or_default();
                    self.say(&format!("visitor {peer}{asked} -> {target}"), &event);
                }
            }
            News::Left { id, sent, received } => {
                self.open = self.open.saturating_sub(1);
                self.sent += sent;
                self.received += received;
                if self.form == Form::Json {
                    let event = json!({
                        "event": "left", "id": id, "sent": sent, "received": received,
                    });
                    self.say("", &event);
                }
            }
            News::Unreachable { id, why } => {
                let target = self.target(*id);
                let line = format!("a visitor was turned away: {target} does not answer: {why}");
                let event = json!({"event": "unreachable", "id": id, "target": target, "why": why});
                self.say(&line, &event);
            }
            News::Strange { why } => {
                let why = shown(why);
                let line = format!("refused: the gateway asked for {why}");
                self.say(&line, &json!({"event": "refused", "why": why}));
            }
            News::Trouble { why } => {
                let why = shown(why);
                self.say(&why, &json!({"event": "trouble", "why": why}));
            }
        }
    }

    /// Draws the line that lives, where there is one. Called now and then.
    pub(super) fn draw(&mut self) {
        if self.form != Form::Live {
            return;
        }
        let rate = self.rate();
        let mut line = match self.connected {
            true => format!("{} there, {} in all, {rate:.0}/min", self.open, self.total),
            false => "not connected".to_owned(),
        };
        if let Some(last) = self.last {
            line.push_str(&format!(", last {last}"));
        }
        if self.turned_away > 0 {
            line.push_str(&format!(", {} turned away", self.turned_away));
        }
        line.push_str(&format!(
            ", {} out, {} in, up {}",
            bytes(self.sent),
            bytes(self.received),
            span(self.begun.elapsed().as_secs())
        ));
        let mut out = std::io::stdout().lock();
        let _closed = write!(out, "\r\x1b[Kvisitors: {line}");
        let _closed = out.flush();
        self.drawn = true;
    }

    /// Visitors a minute.
    fn rate(&mut self) -> f64 {
        while self.arrivals.front().is_some_and(|a| a.elapsed() > RATE) {
            self.arrivals.pop_front();
        }
        self.arrivals.len() as f64
    }

    /// The end.
    pub(super) fn done(&mut self) {
        let line = format!("served {} visitors", self.total);
        let event = json!({
            "event": "done", "visitors": self.total, "sent": self.sent, "received": self.received,
        });
        self.say(&line, &event);
    }

    /// For `rvpn serve status`.
    pub(super) fn status(&mut self) -> Value {
        let rate = self.rate();
        let served = self.targets.iter().map(|t| {
            let at = self.served.get(&t.id);
            json!({
                "target": t.to_string(),
                "urls": at.map(|a| a.urls.clone()).unwrap_or_default(),
            })
        });
        json!({
            "pid": std::process::id(),
            "gateway": self.gateway,
            "state": if self.connected { "connected" } else { "connecting" },
            "trouble": self.trouble,
            "served": served.collect::<Vec<_>>(),
            "seconds": self.begun.elapsed().as_secs(),
            "visitors": {"open": self.open, "total": self.total, "per_minute": rate,
                         "turned_away": self.turned_away},
            "sent": self.sent,
            "received": self.received,
            "reconnects": self.reconnects,
        })
    }
}
