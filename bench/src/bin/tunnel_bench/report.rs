//! The tables.

use std::fmt::Write as _;

use crate::Way;
use crate::args::Plan;
use crate::crowd::MANY;
use crate::idle::Cost;
use crate::lossy::{self, Hop};
use crate::machine::Machine;
use crate::measure::{self, OURS, SIZES};
use crate::results::{Middle, Results};
use crate::road::Kind;
use crate::rough::LOSSES;
use crate::schedule::REPORTED;
use crate::sides::{self, BUSY, FEW, MANY_DEVICES};
use crate::slow::{DELAYS, STREAMS};
use crate::targets;

/// Everything of one run.
pub(crate) struct Report<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) plan: &'a Plan,
    pub(crate) command: String,
    pub(crate) kinds: Vec<Kind>,
    pub(crate) results: &'a Results,
    pub(crate) idle: &'a [Cost],
}

/// Median and spread, or a dash.
fn cell(middle: Option<Middle>, digits: usize) -> String {
    match middle {
        None => "–".to_owned(),
        Some(Middle {
            median,
            least,
            most,
        }) if least == most => {
            format!("{median:.digits$}")
        }
        Some(Middle {
            median,
            least,
            most,
        }) => {
            format!("{median:.digits$} ({least:.digits$}–{most:.digits$})")
        }
    }
}

/// A lossy road's key as a heading: its losses are in thousandths.
fn percent(key: &str) -> String {
    let (road, way) = key.split_once('.').unwrap_or((key, ""));
    let digits = |c: char| c.is_ascii_digit();
    let place = if road.starts_with("far") { " far" } else { "" };
    let n: u32 = road.trim_start_matches(|c| !digits(c)).parse().unwrap_or(0);
    format!("{} %{place} {way}", n / 10)
}

fn streams() -> Vec<String> {
    let of = |way: Way| measure::STREAMS.map(|n| format!("{}.{n}", way.name()));
    Way::BOTH.into_iter().flat_map(of).collect()
}

impl Report<'_> {
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        self.head(&mut text);
        text += "\n## Targets\n\nAs the project set them for itself, for a quiet machine; a median and (spread) of the rounds.\n\n";
        text += &targets::table(self.results, &self.kinds, self.idle);
        text += "\nThat everything arrives whole, in both families, with MTU 1500 and 1280 and with every checksum right, is not measured here but tested: `tests/tests/integrity.rs`.\n";
        if self.plan.tcp {
            self.tcp(&mut text);
            self.cpu(&mut text);
        }
        if self.plan.udp {
            self.udp(&mut text);
        }
        if self.plan.tcp {
            self.rtt(&mut text);
        }
        if self.plan.tcp || self.plan.udp {
            self.connecting(&mut text);
        }
        self.rough(&mut text);
        self.delay(&mut text);
        self.lossy(&mut text);
        self.many(&mut text);
        self.sides(&mut text);
        self.quiet(&mut text);
        if !self.results.notes.is_empty() {
            text += "\n## Not measured or not complete\n\n";
            for note in &self.results.notes {
                let _ = writeln!(text, "* {note}");
            }
        }
        text
    }

    fn head(&self, text: &mut String) {
        let m = self.machine;
        let _ = write!(
            text,
            "# Measured\n\n`{}`, {}. {} cores ({}), {}, kernel {}.\n\
             Load average before the run: {:.2}.\n",
            self.command, m.date, m.cores, m.processor, m.system, m.kernel, m.load
        );
        if m.load > 1.0 {
            *text += "\n**The machine was not quiet: other programs took part of the cores, so these figures are lower and further apart than they should be. Read ratios only.**\n";
        }
        let _ = write!(
            text,
            "\nClient, gateway and far side are namespaces of this one machine on a bridge of veths with MTU 1500, so \
             load generators, both ends and the kernel share its cores, and packets of 64 KiB cross the wires uncut. \
             No loss, no delay. Rounds: {}, each measuring every way once, but only {} of what no target is about; {} ms counted for each TCP figure, {} ms for each attempt at a \
             rate of datagrams. Cells are medians with (least–most). All TCP inside the tunnels is cubic{}.\n\n",
            self.plan.rounds,
            self.plan.rounds.min(REPORTED),
            self.plan.count.as_millis(),
            self.plan.trial.as_millis(),
            if self
                .results
                .notes
                .iter()
                .any(|n| n.contains("congestion control"))
            {
                ""
            } else {
                ", and that around them unless a tunnel chooses another by itself"
            }
        );
        *text += "| way | what | version |\n|---|---|---|\n";
        for kind in &self.kinds {
            let _ = writeln!(
                text,
                "| {} | {} | {} |",
                kind.name(),
                kind.what(),
                kind.version()
            );
        }
    }

    /// A table with a row for each way that has any of the values.
    fn table(
        &self,
        text: &mut String,
        columns: &[String],
        value: impl Fn(Kind, &str) -> Option<Middle>,
        digits: usize,
    ) {
        self.named(text, columns, columns, value, digits);
    }

    /// The same with other headings.
    fn named(
        &self,
        text: &mut String,
        columns: &[String],
        headings: &[String],
        value: impl Fn(Kind, &str) -> Option<Middle>,
        digits: usize,
    ) {
        let _ = writeln!(text, "| | {} |", headings.join(" | ").replace('.', " "));
        let _ = writeln!(text, "|---|{}", "---|".repeat(columns.len()));
        for kind in &self.kinds {
            let values: Vec<_> = columns.iter().map(|c| value(*kind, c)).collect();
            if values.iter().any(Option::is_some) {
                let cells: Vec<_> = values.into_iter().map(|v| cell(v, digits)).collect();
                let _ = writeln!(text, "| {} | {} |", kind.name(), cells.join(" | "));
            }
        }
    }

    fn tcp(&self, text: &mut String) {
        let columns = streams();
        *text += "\n## TCP, Gbit/s, by direction and streams\n\n";
        let speed = |kind, c: &str| self.results.middle(kind, &format!("tcp.{c}"));
        self.table(text, &columns, speed, 2);
        *text += "\nIn terms of one raw TLS connection in the same direction and round:\n\n";
        let ratio = |kind, c: &str| {
            let way = c.split('.').next().unwrap_or_default();
            let one = format!("tcp.{way}.1");
            self.results
                .ratio((kind, &format!("tcp.{c}")), (Kind::RawTls, &one))
        };
        self.table(text, &columns, ratio, 2);
        *text += "\n`rvpn` in terms of each, the same streams and round:\n\n";
        let ours = Kind::Ours { offload: true };
        let times = |kind, c: &str| {
            let measure = format!("tcp.{c}");
            (kind != ours).then_some(())?;
            self.results.ratio((ours, &measure), (kind, &measure))
        };
        self.table(text, &columns, times, 2);
    }

    fn cpu(&self, text: &mut String) {
        *text += "\n## CPU of the gateway's program, seconds per 10^9 bytes\n\nKernel work in its own calls included; what the kernel does in interrupts is in nobody's figure.\n\n";
        let cost = |kind, c: &str| self.results.middle(kind, &format!("cpu.{c}"));
        self.table(text, &streams(), cost, 2);
        *text += "\n`rvpn` in terms of raw TLS with as many connections as it has streams, in the same round; the target is about one connection:\n\n";
        let ratio = |kind, c: &str| {
            let measure = format!("cpu.{c}");
            let raw = (Kind::RawTls, &*measure);
            (kind == OURS).then(|| self.results.ratio((kind, &measure), raw))?
        };
        self.table(text, &streams(), ratio, 2);
    }

    fn udp(&self, text: &mut String) {
        *text += "\n## UDP, thousand packets a second, at most 0.1 % lost and no queue left behind\n\nBy size with headers and direction. Two senders, each a thread with a flow of its own that gives the kernel what is due every 40 µs or so, at most 64 packets, with one `sendmmsg` and without segmentation offload; one thread receives both flows with `recvmmsg`. The call of a sender carries its packets through the wires of the laboratory as far as the next program, so that one sender is slower than some of the tunnels; with three the tunnels get no more through, since they share the cores. Without a tunnel it is the senders that have no more to give. A tunnel that joins the datagrams of a flow (`rvpn`) can be faster still, because they cross the wires behind it joined.\n\n";
        let columns: Vec<String> = SIZES
            .into_iter()
            .flat_map(|size| Way::BOTH.map(|way| format!("{size}.{}", way.name())))
            .collect();
        let rate = |kind, c: &str| {
            let pps = self.results.middle(kind, &format!("udp.{c}"))?;
            Some(Middle {
                median: pps.median / 1e3,
                least: pps.least / 1e3,
                most: pps.most / 1e3,
            })
        };
        self.table(text, &columns, rate, 0);
    }

    fn rtt(&self, text: &mut String) {
        *text += "\n## Round trips, ms: median and 99th percentile of each round\n\nEcho requests every 5 ms, answered by the far kernel; loaded is with 10 TCP streams at full speed.\n\n";
        let columns: Vec<String> = ["idle", "up", "down"]
            .into_iter()
            .flat_map(|load| ["p50", "p99"].map(|p| format!("{load}.{p}")))
            .collect();
        let value = |kind, c: &str| self.results.middle(kind, &format!("rtt.{c}"));
        self.table(text, &columns, value, 2);
        let mut lost = Vec::new();
        for kind in &self.kinds {
            for load in ["idle", "up", "down"] {
                let sum = |what: &str| self.results.sum(*kind, &format!("rtt.{load}.{what}"));
                if let (Some(gone @ 1.0..), Some(sent)) = (sum("lost"), sum("sent")) {
                    lost.push(format!("{} {load} {gone} of {sent}", kind.name()));
                }
            }
        }
        let lost = if lost.is_empty() {
            "none".to_owned()
        } else {
            lost.join(", ")
        };
        let _ = writeln!(text, "\nRequests without an answer: {lost}.");
    }

    fn rough(&self, text: &mut String) {
        if !self.plan.rough {
            return;
        }
        *text += "\n## Roads that lose packets, and a narrow one\n\nMbit/s of 4 TCP streams where each packet between client and gateway is lost with 1 % or 3 %, in both directions, or (`far`) with 1 % between gateway and far side. As with real devices, those before the lossy piece of wire cut super-packets into packets of the wire, each of which is lost or not, and those behind it join what has come through. A round trip takes less than a tenth of a millisecond there without a tunnel, so the time that a tunnel adds by itself counts more than on a real road.\n\n";
        let kinds = LOSSES.map(|n| format!("loss{n}")).into_iter();
        let kinds = kinds.chain([format!("far{}", LOSSES[0])]);
        let columns: Vec<String> = kinds
            .flat_map(|key| Way::BOTH.map(|way| format!("{key}.{}", way.name())))
            .collect();
        let named: Vec<String> = columns.iter().map(|key| percent(key)).collect();
        let value = |kind, c: &str| self.results.middle(kind, c);
        self.named(text, &columns, &named, value, 0);
        *text += "\nWhere the sending end sends no more than 100 Mbit/s, 10 TCP streams: Mbit/s, and round trips meanwhile, ms.\n\n";
        let columns: Vec<String> = Way::BOTH
            .into_iter()
            .flat_map(|way| {
                let road = format!("narrow.{}", way.name());
                let trips = ["p50", "p99", "lost"].map(|p| format!("rtt.{road}.{p}"));
                std::iter::once(road).chain(trips)
            })
            .collect();
        let short = |key: &String| key.replace("rtt.narrow.", "").replace("narrow.", "");
        let named: Vec<String> = columns.iter().map(short).collect();
        self.named(text, &columns, &named, value, 1);
    }

    fn delay(&self, text: &mut String) {
        if !self.plan.delay {
            return;
        }
        *text += "\n## Long roads\n\nBetween client and gateway packets take 10 or 50 ms each way, so that a round trip is 20 or 100 ms longer; the road is as wide as this program can carry and loses nothing. Mbit/s by direction and streams, once their windows are open:\n\n";
        let value = |kind, c: &str| self.results.middle(kind, c);
        let all = || DELAYS.into_iter().flat_map(|d| Way::BOTH.map(|w| (d, w)));
        let rates = all().flat_map(|(delay, way)| {
            STREAMS.map(|n| {
                (
                    format!("delay{delay}.{}.{n}", way.name()),
                    format!("{delay} ms {} {n}", way.name()),
                )
            })
        });
        let (columns, named): (Vec<_>, Vec<_>) = rates.unzip();
        self.named(text, &columns, &named, value, 0);
        *text += "\nRound trips, ms: without load, and under 4 streams.\n\n";
        let trips = DELAYS.into_iter().flat_map(|delay| {
            let loads = [("idle".to_owned(), "idle")]
                .into_iter()
                .chain(Way::BOTH.map(|way| (format!("{}.{}", way.name(), STREAMS[1]), way.name())));
            let loads: Vec<_> = loads.collect();
            loads.into_iter().flat_map(move |(load, word)| {
                ["p50", "p99"].map(|p| {
                    (
                        format!("rtt.delay{delay}.{load}.{p}"),
                        format!("{delay} ms {word} {p}"),
                    )
                })
            })
        });
        let (columns, named): (Vec<_>, Vec<_>) = trips.unzip();
        self.named(text, &columns, &named, value, 1);
    }

    fn lossy(&self, text: &mut String) {
        if !self.plan.lossy {
            return;
        }
        let span = lossy::span(self.plan);
        let _ = write!(
            text,
            "\n## A long road that loses packets\n\nMbit/s of {} TCP streams, counted for {} ms, where a round trip is {} ms longer and each packet of the wire is lost with {} %, in both directions: between client and gateway (`before`), on the piece of wire behind the long one, or between gateway and far side (`behind`). Super-packets are cut and joined there as on the roads that lose packets only. Before the gateway it is a tunnel's own connection that loses packets and sends them again, and what the streams inside see is only that they come later. That of `rvpn` uses bbr on a long road where the system allows it, as this one {}; with cubic one connection has no more than one of the streams has without a tunnel.\n\n",
            lossy::STREAMS,
            span.count.as_millis(),
            lossy::TRIP.as_millis(),
            lossy::LOSS / 10,
            if self.machine.bbr { "does" } else { "does not" },
        );
        let all = Hop::BOTH
            .into_iter()
            .flat_map(|h| Way::BOTH.map(|w| (h, w)));
        let columns =
            all.map(|(hop, way)| (hop.key(way), format!("{} {}", hop.name(), way.name())));
        let (columns, named): (Vec<_>, Vec<_>) = columns.unzip();
        let rate = |kind, c: &str| self.results.middle(kind, c);
        self.named(text, &columns, &named, rate, 0);
    }

    fn many(&self, text: &mut String) {
        if !self.plan.many {
            return;
        }
        *text += "\n## Several clients of ours at once\n\nGbit/s of all together, one stream each, and Jain's index of what each got; `greedy`: one of them has ten streams.\n\n";
        let cases = MANY.map(|n| (n, "even")).into_iter().chain([(8, "greedy")]);
        *text += "| clients | up | index | down | index |\n|---|---|---|---|---|\n";
        for (count, word) in cases {
            let cells = Way::BOTH.into_iter().flat_map(|way| {
                let key = format!("many.{}.{count}.{word}", way.name());
                let ours = Kind::Ours { offload: true };
                let middle = |key: &str| cell(self.results.middle(ours, key), 2);
                [middle(&key), middle(&format!("{key}.jain"))]
            });
            let cells: Vec<String> = cells.collect();
            let _ = writeln!(text, "| {count} {word} | {} |", cells.join(" | "));
        }
    }

    /// Two gateways that differ in one thing, in turns.
    fn sides(&self, text: &mut String) {
        let mut rows = Vec::new();
        if self.plan.cores {
            let what = |word| format!("{BUSY} busy clients, {word}");
            rows.push((what("one data core"), "cores.one".to_owned()));
            rows.push((what("one for each CPU"), "cores.all".to_owned()));
        }
        for clients in &self.plan.clients {
            let key = |word| format!("idle.{clients}.{word}");
            rows.push(("one busy client alone".to_owned(), key("alone")));
            rows.push((format!("the same among {clients} idle ones"), key("among")));
        }
        if self.plan.devices {
            let what = |n| format!("one client, 4 streams, {n} devices provisioned");
            rows.push((what(FEW), "devices.few".to_owned()));
            rows.push((what(MANY_DEVICES), "devices.many".to_owned()));
        }
        if rows.is_empty() {
            return;
        }
        let _ = write!(
            text,
            "\n## Gateways that differ in one thing\n\nGbit/s. Two that are next to each other in the table ran in laboratories beside each other, measured in turns{}.\n\n| | up | down |\n|---|---|---|\n",
            if self.plan.devices {
                format!(
                    "; those with devices in {} rounds",
                    sides::rounds_of_devices(self.plan)
                )
            } else {
                String::new()
            }
        );
        for (what, key) in rows {
            let cells = Way::BOTH.map(|way| {
                let measure = format!("{key}.{}", way.name());
                cell(self.results.middle(OURS, &measure), 2)
            });
            let _ = writeln!(text, "| {what} | {} |", cells.join(" | "));
        }
    }

    fn connecting(&self, text: &mut String) {
        *text += "\n## Connecting, and memory\n\nFrom the start of the client's program to the first answer from the far side, ms; private memory of all the gateway's processes after the load, MiB.\n\n";
        let columns = ["connect".to_owned(), "memory".to_owned()];
        self.table(text, &columns, |kind, c| self.results.middle(kind, c), 1);
    }

    fn quiet(&self, text: &mut String) {
        if self.idle.is_empty() {
            return;
        }
        *text += "\n## Clients that are connected and quiet\n\n\
             | clients | gateway, KiB each | kernel, KiB a device | kernel, KiB a connection (both ends) | all connected, s | gateway CPU a login, ms | CPU of all while quiet |\n\
             |---|---|---|---|---|---|---|\n";
        for c in self.idle {
            let _ = writeln!(
                text,
                "| {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.2} | {:.1} % |",
                c.clients,
                c.user,
                c.device,
                c.connection,
                c.connected.as_secs_f64(),
                c.login,
                c.quiet * 100.0
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn lossy_roads_have_headings_that_say_how_much_and_where() {
        assert_eq!(percent("loss10.up"), "1 % up");
        assert_eq!(percent("loss30.down"), "3 % down");
        assert_eq!(percent("far10.up"), "1 % far up");
    }
}
