//! Which of the project's own targets a run meets.

use std::fmt::Write as _;

use crate::Way;
use crate::idle::Cost;
use crate::measure::SIZES;
use crate::results::{Middle, Results};
use crate::road::Kind;

const OURS: Kind = Kind::Ours { offload: true };

/// A target's bound on a median.
#[derive(Clone, Copy)]
enum Bound {
    Least(f64),
    Most(f64),
}

/// A row for each target that this run can say something of.
pub(crate) fn table(results: &Results, kinds: &[Kind], idle: &[Cost]) -> String {
    let mut rows = Rows {
        text: "| | must | measured | |\n|---|---|---|---|\n".to_owned(),
    };
    let has = |kind: Kind| kinds.contains(&kind);
    for (way, least) in [(Way::Up, 0.5), (Way::Down, 0.7)] {
        for streams in [1, 4] {
            let measure = format!("tcp.{}.{streams}", way.name());
            let one = format!("tcp.{}.1", way.name());
            let ratio = results.ratio((OURS, &measure), (Kind::RawTls, &one));
            let what = format!(
                "TCP {}, {streams} streams, of one raw TLS connection",
                way.name()
            );
            rows.add(&what, Bound::Least(least), ratio, "x");
        }
    }
    let slow = [Kind::Ocserv { dtls: false }, Kind::OpenVpn { tcp: true }];
    let peers = slow
        .into_iter()
        .map(|k| (k, 10.0))
        .chain([(Kind::WireGuard, 2.0)]);
    for (peer, least) in peers.filter(|(kind, _)| has(*kind)) {
        for way in Way::BOTH {
            let measure = format!("tcp.{}.4", way.name());
            let ratio = results.ratio((OURS, &measure), (peer, &measure));
            let what = format!(
                "TCP {}, 4 streams, of {}{}",
                way.name(),
                peer.name(),
                without(peer)
            );
            rows.add(&what, Bound::Least(least), ratio, "x");
        }
    }
    for (other, most) in [(Kind::RawTls, 2.0), (slow[0], 0.1)] {
        for way in Way::BOTH.into_iter().filter(|_| has(other)) {
            let measure = format!("cpu.{}.4", way.name());
            let ratio = results.ratio((OURS, &measure), (other, &measure));
            let what = format!("gateway CPU per GB, {}, of {}", way.name(), other.name());
            rows.add(&what, Bound::Most(most), ratio, "x");
        }
    }
    for size in SIZES {
        for way in Way::BOTH {
            let measure = format!("udp.{size}.{}", way.name());
            let others = kinds.iter().copied().filter(|k| k.peer().is_some());
            let measured = others.filter_map(|k| Some((k, results.middle(k, &measure)?.median)));
            let Some((best, _)) = measured.max_by(|a, b| a.1.total_cmp(&b.1)) else {
                continue;
            };
            let ratio = results.ratio((OURS, &measure), (best, &measure));
            let what = format!(
                "UDP {size} bytes {} without loss, of the best peer ({})",
                way.name(),
                best.name()
            );
            rows.add(&what, Bound::Least(1.3), ratio, "x");
        }
    }
    let above = results.above(OURS, Kind::Plain, "rtt.idle.p50");
    rows.add(
        "round trip idle, median above no tunnel",
        Bound::Most(0.25),
        above,
        " ms",
    );
    for way in Way::BOTH {
        for (percent, most) in [(50, 3.0), (99, 8.0)] {
            let measure = format!("rtt.{}.p{percent}", way.name());
            let what = format!("round trip under 10 streams {}, p{percent}", way.name());
            rows.add(
                &what,
                Bound::Most(most),
                results.middle(OURS, &measure),
                " ms",
            );
        }
    }
    if has(slow[0]) {
        let ratio = results.ratio((OURS, "connect"), (slow[0], "connect"));
        rows.add(
            "connecting, of ocserv and openconnect",
            Bound::Most(1.0),
            ratio,
            "x",
        );
    }
    for way in Way::BOTH {
        let way = way.name();
        let measure = format!("rtt.narrow.{way}.p50");
        if let value @ Some(_) = results.middle(OURS, &measure) {
            let what = format!("round trip under 10 streams {way}, 100 Mbit/s, p50");
            rows.add(&what, Bound::Most(20.0), value, " ms");
        }
        let measure = format!("loss10.{way}");
        if let value @ Some(_) = results.ratio((OURS, &measure), (Kind::Plain, &measure)) {
            let what = format!("TCP {way} where 1 % is lost, of the same without a tunnel");
            rows.add(&what, Bound::Least(1.0), value, "x");
        }
        for word in ["even", "greedy"] {
            let measure = format!("many.{way}.8.{word}.jain");
            if let value @ Some(_) = results.middle(OURS, &measure) {
                let what = format!("fairness of 8 busy clients {way}, {word} (Jain's index)");
                rows.add(&what, Bound::Least(0.95), value, "");
            }
        }
        let (all, one) = (format!("many.{way}.8.even"), format!("many.{way}.1.even"));
        if let value @ Some(_) = results.ratio((OURS, &all), (OURS, &one)) {
            let what = format!("8 busy clients {way}, of one");
            rows.add(&what, Bound::Least(1.0), value, "x");
        }
    }
    for cost in idle {
        let what = format!("idle client, gateway memory, {} clients", cost.clients);
        let value = Middle::of([cost.user]);
        rows.add(&what, Bound::Most(24.0), value, " KiB");
    }
    rows.text
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
