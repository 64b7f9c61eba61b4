//! `rvpn doctor`: what stands between here and the other side of the gateway.

use std::path::Path;
use std::time::Duration;

use rvpn_proto::control::Policy;
use serde_json::json;

use crate::cli::Doctor;
use crate::fail::{Failure, Kind, Outcome};
use crate::ping::{Talk, talk};
use crate::profile::{self, Profile};
use crate::text::table;
use crate::up::journal::Journal;
use crate::{reach, tls, up};

/// How a check ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Good,
    /// Works, but not all of it.
    Weak,
    Bad,
    /// Not looked at, as something before it failed.
    Skipped,
}

impl Mark {
    fn name(self) -> &'static str {
        match self {
            Mark::Good => "ok",
            Mark::Weak => "weak",
            Mark::Bad => "FAILED",
            Mark::Skipped => "skipped",
        }
    }
}

#[derive(Default)]
struct Report {
    lines: Vec<(&'static str, Mark, String)>,
}

impl Report {
    fn note(&mut self, what: &'static str, mark: Mark, text: impl Into<String>) {
        self.lines.push((what, mark, text.into()));
    }

    /// Notes how it went, and gives what there is to go on with.
    fn take<T>(
        &mut self,
        what: &'static str,
        result: Outcome<T>,
        good: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.note(what, Mark::Good, good(&value));
                Some(value)
            }
            Err(failure) => {
                self.note(what, Mark::Bad, failure.to_string());
                None
            }
        }
    }
}

/// Runs every check; fails if one does.
pub(crate) async fn run(args: Doctor) -> Outcome {
    let mut report = Report::default();
    machine(&mut report);
    gateway(&args, &mut report).await;
    let bad = report
        .lines
        .iter()
        .filter(|(_, mark, _)| *mark == Mark::Bad)
        .count();
    if args.json {
        let checks = report.lines.iter().map(
            |(what, mark, text)| json!({"check": what, "result": mark.name(), "detail": text}),
        );
        println!(
            "{}",
            json!({"checks": checks.collect::<Vec<_>>(), "failed": bad})
        );
    } else {
        let rows = report.lines.iter().map(|(what, mark, text)| {
            vec![(*what).to_owned(), mark.name().to_owned(), text.clone()]
        });
        print!("{}", table(&rows.collect::<Vec<_>>()));
    }
    match bad {
        0 => Ok(()),
        n => Err(Failure::unavailable(format!(
            "{n} check(s) failed; the remedies are above"
        ))),
    }
}

/// What `up` needs here.
fn machine(report: &mut Report) {
    let tun = Path::new("/dev/net/tun");
    match std::fs::OpenOptions::new().read(true).write(true).open(tun) {
        Ok(_) => report.note("tun device", Mark::Good, "/dev/net/tun opens"),
        Err(error) => {
            let text = format!(
                "/dev/net/tun: {error}; 'rvpn up' needs it: sudo modprobe tun, and run it as root"
            );
            let mark = if up::may_change() {
                Mark::Bad
            } else {
                Mark::Weak
            };
            report.note("tun device", mark, text);
        }
    }
    match up::may_change() {
        true => report.note("rights", Mark::Good, "routes can be changed"),
        false => report.note(
            "rights",
            Mark::Weak,
            "'rvpn up' needs root: sudo rvpn up ('rvpn ping' does not)",
        ),
    }
    match Path::new("/proc/net/if_inet6").exists() {
        true => report.note("ipv6", Mark::Good, "the kernel has it"),
        false => report.note(
            "ipv6",
            Mark::Weak,
            "switched off here; only IPv4 goes through the tunnel",
        ),
    }
    match up::can_go_far() {
        true => report.note("long roads", Mark::Good, "bbr can be used"),
        false => report.note(
            "long roads",
            Mark::Weak,
            "this user may not use bbr, and where packets are lost on a long road uploads \
             are slow without: sudo modprobe tcp_bbr && sudo sysctl -w \
             'net.ipv4.tcp_allowed_congestion_control=reno cubic bbr'",
        ),
    }
    match Journal::read() {
        Ok(Some(journal)) if !Path::new(&format!("/proc/{}", journal.pid)).exists() => report.note(
            "left behind",
            Mark::Bad,
            "a killed 'rvpn up' left changes: sudo rvpn down --repair",
        ),
        Ok(Some(_)) => report.note("left behind", Mark::Good, "a tunnel is up now"),
        Ok(None) => report.note("left behind", Mark::Good, "nothing"),
        Err(_) => report.note("left behind", Mark::Good, "nothing that this user may see"),
    }
}

async fn gateway(args: &Doctor, report: &mut Report) {
    const STEPS: [&str; 6] = ["name", "connection", "tls", "login", "welcome", "through"];
    let found = profile::choose(&args.choice);
    let reached = match report.take("credential", found, |(name, p)| {
        format!("{name} ({})", p.address)
    }) {
        Some((_, profile)) => steps(args, report, &profile).await,
        None => 0,
    };
    for step in &STEPS[reached..] {
        report.note(step, Mark::Skipped, "");
    }
}

/// Gives how many of the steps were looked at.
async fn steps(args: &Doctor, report: &mut Report, profile: &Profile) -> usize {
    let Some(to) = report_address(report, profile).await else {
        return 1;
    };
    let Some(tcp) = report.take("connection", reach::connect(&to).await, |tcp| {
        tcp.peer_addr()
            .map_or_else(|_| "connected".to_owned(), |a| format!("connected to {a}"))
    }) else {
        return 2;
    };
    let connected = async {
        let connector =
            tls::connector(&profile.trust, tls::authorities(&profile.trust)?.as_deref())?;
        tls::handshake(&connector, &to, tcp).await
    };
    let secured = report.take("tls", connected.await, |io| {
        let (_, session) = io.get_ref();
        let version = session
            .protocol_version()
            .map_or("?", |v| v.as_str().unwrap_or("?"));
        let whose = match &profile.trust.fingerprint {
            Some(_) => "the pinned certificate",
            None => "a certificate that is vouched for",
        };
        format!("{version}, {whose}")
    });
    if secured.is_none() {
        return 3;
    }
    let talk = match talk(profile).await {
        Ok(talk) => {
            report.note("login", Mark::Good, "accepted");
            talk
        }
        Err(failure) => {
            report.note("login", Mark::Bad, failure.to_string());
            return 4;
        }
    };
    welcome(report, &talk);
    through(args, report, talk).await;
    6
}

async fn report_address(report: &mut Report, profile: &Profile) -> Option<profile::Address> {
    let to = match profile.address() {
        Ok(to) => to,
        Err(failure) => {
            report.note("name", Mark::Bad, failure.to_string());
            return None;
        }
    };
    let found = reach::resolve(&to).await;
    report.take("name", found, |all| {
        let all: Vec<String> = all.iter().map(|a| a.ip().to_string()).collect();
        format!("{} is {}", to.host, all.join(", "))
    })?;
    Some(to)
}

fn welcome(report: &mut Report, talk: &Talk) {
    let welcome = &talk.welcome;
    let policy = Policy::default();
    match (welcome.validate(&policy), welcome.v6) {
        (Err(refusal), _) => report.note("welcome", Mark::Bad, refusal.to_string()),
        (Ok(()), Some(v6)) => report.note(
            "welcome",
            Mark::Good,
            format!(
                "{} and {}, packets of {} bytes",
                welcome.v4.address, v6.address, welcome.mtu
            ),
        ),
        (Ok(()), None) => {
            report.note(
                "welcome",
                Mark::Weak,
                format!("{}, no IPv6 there", welcome.v4.address),
            );
        }
    }
}

async fn through(args: &Doctor, report: &mut Report, mut talk: Talk) {
    let echo = async {
        let found = talk.resolve(&args.host).await?;
        let first = found.first().copied().ok_or_else(|| {
            Failure::new(Kind::Unavailable, format!("{} has no address", args.host))
        })?;
        match talk.echo(first, Duration::from_secs(3)).await? {
            Ok(took) => Ok(took),
            Err(why) => Err(Failure::unavailable(format!(
                "{}: {why}; the tunnel works, what is behind the gateway does not answer: \
                 try another --host, or look at the gateway's own way out",
                args.host
            ))),
        }
    };
    let result = echo.await;
    report.take("through", result, |took| {
        format!(
            "{} answers in {:.1} ms",
            args.host,
            took.as_secs_f64() * 1000.0
        )
    });
    talk.leave().await;
}
