//! Which of the project's own targets a run meets.

use std::fmt::Write as _;

use crate::Way;
use crate::idle::Cost;
use crate::lossy::{self, Hop};
use crate::measure::{OURS, SIZES};
use crate::results::{Middle, Results};
use crate::road::Kind;
use crate::sides::{BUSY, FEW, MANY_DEVICES};

/// A target's bound on a median.
#[derive(Clone, Copy)]
enum Bound {
    Least(f64),
    Most(f64),
}

const SLOW: [Kind; 2] = [Kind::Ocserv { dtls: false }, Kind::OpenVpn { tcp: true }];
/// Idle clients that the targets are about.
const CLIENTS: usize = 5000;

/// A row for each target, also for those that this run cannot say anything of.
pub(crate) fn table(results: &Results, kinds: &[Kind], idle: &[Cost]) -> String {
    let mut rows = Rows {
        text: "| | must | measured | |\n|---|---|---|---|\n".to_owned(),
    };
    tcp(&mut rows, results);
    cpu(&mut rows, results);
    udp(&mut rows, results, kinds);
    round_trips(&mut rows, results);
    loss(&mut rows, results);
    many(&mut rows, results);
    quiet(&mut rows, results, idle);
    for way in Way::BOTH {
        let [many, few] = ["many", "few"].map(|word| format!("devices.{word}.{}", way.name()));
        let ratio = results.ratio((OURS, &many), (OURS, &few));
        let what = format!(
            "TCP {}, 4 streams, where {MANY_DEVICES} devices are provisioned, of the same with {FEW}",
            way.name(),
        );
        rows.add(&what, Bound::Least(0.9), ratio, "x");
    }
    rows.text
}

fn tcp(rows: &mut Rows, results: &Results) {
    for (way, least) in [(Way::Up, 0.5), (Way::Down, 0.7)] {
        for streams in [1, 4] {
            let measure = format!("tcp.{}.{streams}", way.name());
            let one = format!("tcp.{}.1", way.name());
            let ratio = results.ratio((OURS, &measure), (Kind::RawTls, &one));
            let what = format!(
                "TCP {}, {}, of one raw TLS connection",
                way.name(),
                many_streams(streams)
            );
            rows.add(&what, Bound::Least(least), ratio, "x");
        }
    }
    let ten = SLOW.into_iter().flat_map(|k| [(k, 1, 10.0), (k, 4, 10.0)]);
    let two = [1, 4].map(|streams| (Kind::WireGuard, streams, 2.0));
    for (peer, streams, least) in ten.chain(two) {
        for way in Way::BOTH {
            let measure = format!("tcp.{}.{streams}", way.name());
            let ratio = results.ratio((OURS, &measure), (peer, &measure));
            let what = format!(
                "TCP {}, {}, of {}{}",
                way.name(),
                many_streams(streams),
                peer.name(),
                without(peer)
            );
            rows.add(&what, Bound::Least(least), ratio, "x");
        }
    }
    let (plain, naive) = (Kind::Ours { offload: false }, Kind::Naive { long: false });
    for way in Way::BOTH {
        let measure = format!("tcp.{}.4", way.name());
        let ratio = results.ratio((plain, &measure), (naive, &measure));
        let what = format!("TCP {}, 4 streams, --no-offload, of naive", way.name());
        rows.add(&what, Bound::Least(5.0), ratio, "x");
    }
}

fn many_streams(streams: usize) -> String {
    let s = if streams == 1 { "" } else { "s" };
    format!("{streams} stream{s}")
}

fn cpu(rows: &mut Rows, results: &Results) {
    for way in Way::BOTH {
        for streams in [1, 4] {
            let measure = format!("cpu.{}.{streams}", way.name());
            let one = format!("cpu.{}.1", way.name());
            let ratio = results.ratio((OURS, &measure), (Kind::RawTls, &one));
            let what = format!(
                "gateway CPU per GB, {}, {}, of one raw TLS connection",
                way.name(),
                many_streams(streams)
            );
            rows.add(&what, Bound::Most(2.0), ratio, "x");
        }
    }
    for way in Way::BOTH {
        let measure = format!("cpu.{}.4", way.name());
        let ratio = results.ratio((OURS, &measure), (SLOW[0], &measure));
        let what = format!("gateway CPU per GB, {}, of {}", way.name(), SLOW[0].name());
        rows.add(&what, Bound::Most(0.1), ratio, "x");
    }
}

fn udp(rows: &mut Rows, results: &Results, kinds: &[Kind]) {
    for size in SIZES {
        for way in Way::BOTH {
            let measure = format!("udp.{size}.{}", way.name());
            let others = kinds.iter().copied().filter(|k| k.peer().is_some());
            let measured = others.filter_map(|k| Some((k, results.middle(k, &measure)?.median)));
            let best = measured.max_by(|a, b| a.1.total_cmp(&b.1));
            let ratio = best.and_then(|(k, _)| results.ratio((OURS, &measure), (k, &measure)));
            let what = format!(
                "UDP {size} bytes {} without loss, of the best peer ({})",
                way.name(),
                best.map_or("none was measured", |(k, _)| k.name())
            );
            rows.add(&what, Bound::Least(1.3), ratio, "x");
        }
    }
    let long = Kind::Naive { long: true };
    for size in SIZES {
        for way in Way::BOTH {
            let measure = format!("udp.{size}.{}", way.name());
            let ratio = results.ratio((OURS, &measure), (long, &measure));
            let what = format!(
                "UDP {size} bytes {} without loss, of a long queue that nobody manages",
                way.name()
            );
            rows.add(&what, Bound::Least(0.8), ratio, "x");
        }
    }
}

fn round_trips(rows: &mut Rows, results: &Results) {
    let above = results.above(OURS, Kind::Plain, "rtt.idle.p50");
    let what = "round trip idle, median above no tunnel";
    rows.add(what, Bound::Most(0.25), above, " ms");
    for way in Way::BOTH {
        for (percent, most) in [(50, 3.0), (99, 8.0)] {
            let measure = format!("rtt.{}.p{percent}", way.name());
            let what = format!("round trip under 10 streams {}, p{percent}", way.name());
            let value = results.middle(OURS, &measure);
            rows.add(&what, Bound::Most(most), value, " ms");
        }
    }
    for way in Way::BOTH {
        let way = way.name();
        let value = results.middle(OURS, &format!("rtt.narrow.{way}.p50"));
        let what = format!("round trip under 10 streams {way}, 100 Mbit/s, p50");
        rows.add(&what, Bound::Most(20.0), value, " ms");
        let lost = results.sum(OURS, &format!("rtt.narrow.{way}.lost"));
        let what = format!("echo requests lost under 10 streams {way}, 100 Mbit/s, all rounds");
        rows.add(
            &what,
            Bound::Most(0.0),
            lost.and_then(|n| Middle::of([n])),
            "",
        );
    }
    let ratio = results.ratio((OURS, "connect"), (SLOW[0], "connect"));
    let what = "connecting, of ocserv and openconnect";
    rows.add(what, Bound::Most(1.0), ratio, "x");
}

fn loss(rows: &mut Rows, results: &Results) {
    let hops = [("loss10", "before"), ("far10", "behind")];
    for (key, place) in hops {
        for way in Way::BOTH {
            let measure = format!("{key}.{}", way.name());
            let ratio = results.ratio((OURS, &measure), (Kind::Plain, &measure));
            let what = format!(
                "TCP {} where 1 % is lost {place} the gateway, of the same without a tunnel",
                way.name()
            );
            rows.add(&what, Bound::Least(1.0), ratio, "x");
        }
    }
    for hop in Hop::BOTH {
        for way in Way::BOTH {
            let measure = hop.key(way);
            let ratio = results.ratio((OURS, &measure), (Kind::Plain, &measure));
            let what = format!(
                "TCP {} where 1 % is lost {} the gateway on a road of {} ms, of the same without a tunnel",
                way.name(),
                hop.name(),
                lossy::TRIP.as_millis()
            );
            rows.add(&what, Bound::Least(1.0), ratio, "x");
        }
    }
}

fn many(rows: &mut Rows, results: &Results) {
    for way in Way::BOTH {
        let way = way.name();
        for word in ["even", "greedy"] {
            let measure = format!("many.{way}.8.{word}.jain");
            let what = format!("fairness of 8 busy clients {way}, {word} (Jain's index)");
            let value = results.middle(OURS, &measure);
            rows.add(&what, Bound::Least(0.95), value, "");
        }
        for word in ["even", "greedy"] {
            let all = format!("many.{way}.8.{word}");
            let ratio = results.ratio((OURS, &all), (OURS, &format!("many.{way}.1.even")));
            let what = format!("8 busy clients {way}, {word}, together, of one");
            rows.add(&what, Bound::Least(1.0), ratio, "x");
        }
    }
    for (way, least) in [(Way::Up, 1.3), (Way::Down, 1.8)] {
        let [all, one] = ["all", "one"].map(|word| format!("cores.{word}.{}", way.name()));
        let ratio = results.ratio((OURS, &all), (OURS, &one));
        let what = format!(
            "{BUSY} busy clients {} with a runtime for each core, of one runtime",
            way.name()
        );
        rows.add(&what, Bound::Least(least), ratio, "x");
    }
}

fn quiet(rows: &mut Rows, results: &Results, idle: &[Cost]) {
    let mut counts: Vec<usize> = idle.iter().map(|cost| cost.clients).collect();
    if !counts.contains(&CLIENTS) {
        counts.push(CLIENTS);
    }
    for clients in counts {
        let cost = idle.iter().find(|cost| cost.clients == clients);
        let what = format!("idle client, gateway memory, {clients} clients");
        let value = cost.and_then(|cost| Middle::of([cost.user]));
        rows.add(&what, Bound::Most(24.0), value, " KiB");
        for way in Way::BOTH {
            let [among, alone] =
                ["among", "alone"].map(|word| format!("idle.{clients}.{word}.{}", way.name()));
            let ratio = results.ratio((OURS, &among), (OURS, &alone));
            let what = format!(
                "TCP {}, 1 stream, one busy client among {clients} idle ones, of the same alone",
                way.name()
            );
            rows.add(&what, Bound::Least(0.9), ratio, "x");
        }
    }
}

/// The target is for a wireguard-go that knows segmentation offload.
fn without(peer: Kind) -> &'static str {
    let version = peer.version();
    let dated = version
        .rsplit('.')
        .next()
        .and_then(|d| d.parse::<u32>().ok());
    match dated {
        Some(20_000_000..20_230_501) if peer == Kind::WireGuard => {
            " (one without offload; the target is for one with it)"
        }
        _ => "",
    }
}

struct Rows {
    text: String,
}

impl Rows {
    fn add(&mut self, what: &str, bound: Bound, value: Option<Middle>, unit: &str) {
        let (sign, limit) = match bound {
            Bound::Least(n) => ("≥", n),
            Bound::Most(n) => ("≤", n),
        };
        let Some(value) = value else {
            let _ = writeln!(
                self.text,
                "| {what} | {sign} {limit}{unit} | – | not measured |"
            );
            return;
        };
        let met = match bound {
            Bound::Least(n) => value.median >= n,
            Bound::Most(n) => value.median <= n,
        };
        let spread = if value.least == value.most {
            String::new()
        } else {
            format!(" ({:.2}–{:.2})", value.least, value.most)
        };
        let _ = writeln!(
            self.text,
            "| {what} | {sign} {limit}{unit} | {:.2}{unit}{spread} | {} |",
            value.median,
            if met { "met" } else { "**not met**" }
        );
    }
}
