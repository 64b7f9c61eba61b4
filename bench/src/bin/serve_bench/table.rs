//! What was measured, by way, direction and number of visitors.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use crate::VISITORS;
use crate::load::Way;

/// A way from the visitor to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Column {
    Straight,
    Ours,
    /// With several connections to the gateway.
    OursMany,
    Rathole,
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Column::Straight => "no tunnel",
            Column::Ours => "rvpn serve",
            Column::OursMany => "rvpn serve --connections 4",
            Column::Rathole => "rathole with TLS",
        })
    }
}

/// Gbit/s, in rounds.
#[derive(Default)]
pub(crate) struct Results {
    values: BTreeMap<(Column, Way, usize), Vec<f64>>,
}

impl Results {
    pub(crate) fn put(&mut self, column: Column, way: Way, visitors: usize, round: u32, gbit: f64) {
        let rounds = self.values.entry((column, way, visitors)).or_default();
        rounds.resize(round as usize, f64::NAN);
        rounds.push(gbit);
    }

    fn of(&self, column: Column, way: Way, visitors: usize) -> &[f64] {
        let rounds = self.values.get(&(column, way, visitors));
        rounds.map_or(&[], Vec::as_slice)
    }

    /// Round by round against another, the middle and how far they are apart.
    fn ratio(
        &self,
        (column, visitors): (Column, usize),
        (other, others): (Column, usize),
        way: Way,
    ) -> String {
        let pairs = self.of(column, way, visitors).iter();
        let pairs = pairs.zip(self.of(other, way, others));
        cell(pairs.map(|(a, b)| a / b))
    }

    pub(crate) fn markdown(&self, rounds: u32, count: Duration) -> String {
        let mut text = String::from("# Measured: serving\n\n");
        let _ = writeln!(
            text,
            "TLS connections of one visitor's machine to a server behind a tunnel client, by SNI, the server's own \
             certificate: all on namespaces of one machine, so both TLS ends, the gateway and the tunnel client share its \
             cores. {rounds} rounds, {} ms counted for each figure; medians with (least–most).\n",
            count.as_millis()
        );
        let columns = || Way::BOTH.into_iter().flat_map(|w| VISITORS.map(|n| (w, n)));
        let heads: Vec<_> = columns()
            .map(|(way, n)| format!("{} {n}", way.name()))
            .collect();
        let mut table = |title: &str, value: &dyn Fn(Column, Way, usize) -> String| {
            let _ = writeln!(text, "## {title}\n\n| | {} |", heads.join(" | "));
            let _ = writeln!(text, "|---|{}", "---|".repeat(heads.len()));
            for column in [
                Column::Straight,
                Column::Ours,
                Column::OursMany,
                Column::Rathole,
            ] {
                if !self.of(column, Way::Down, VISITORS[0]).is_empty() {
                    let cells: Vec<_> = columns().map(|(w, n)| value(column, w, n)).collect();
                    let _ = writeln!(text, "| {column} | {} |", cells.join(" | "));
                }
            }
            text.push('\n');
        };
        table("Gbit/s, by direction and visitors", &|column, way, n| {
            cell(self.of(column, way, n).iter().copied())
        });
        table(
            "In terms of one TLS connection without a tunnel, the same round",
            &|column, way, n| self.ratio((column, n), (Column::Straight, 1), way),
        );
        table(
            "`rvpn serve` in terms of each, the same round",
            &|column, way, n| self.ratio((Column::Ours, n), (column, n), way),
        );
        table(
            "`rvpn serve --connections 4` in terms of each, the same round",
            &|column, way, n| self.ratio((Column::OursMany, n), (column, n), way),
        );
        text
    }

    pub(crate) fn json(&self) -> Value {
        let rows = self.values.iter().map(|((column, way, visitors), rounds)| {
            json!({
                "way": column.to_string(),
                "direction": way.name(),
                "visitors": visitors,
                "gbit-s": rounds,
            })
        });
        rows.collect()
    }
}

fn cell(values: impl Iterator<Item = f64>) -> String {
    let mut sorted: Vec<f64> = values.filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (sorted.first(), sorted.last()) else {
        return "–".to_owned();
    };
    let middle = f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    match least == most {
        true => format!("{middle:.2}"),
        false => format!("{middle:.2} ({least:.2}–{most:.2})"),
    }
}
