//! Values by way, measure and round, and what is made of them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::road::Kind;

/// Everything that was measured, in rounds.
#[derive(Default)]
pub(crate) struct Results {
    values: BTreeMap<(&'static str, String), BTreeMap<u32, f64>>,
    /// What could not be measured, and why.
    pub(crate) notes: Vec<String>,
}

/// The middle of several rounds and how far they are apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Middle {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Middle {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Middle> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[half]
        } else {
            f64::midpoint(sorted[half - 1], sorted[half])
        };
        Some(Middle {
            median,
            least,
            most,
        })
    }
}

impl Results {
    pub(crate) fn put(&mut self, kind: Kind, measure: &str, round: u32, value: Option<f64>) {
        if let Some(value) = value.filter(|v| v.is_finite()) {
            let key = (kind.name(), measure.to_owned());
            self.values.entry(key).or_default().insert(round, value);
        }
    }

    fn rounds(&self, kind: Kind, measure: &str) -> Option<&BTreeMap<u32, f64>> {
        self.values.get(&(kind.name(), measure.to_owned()))
    }

    pub(crate) fn middle(&self, kind: Kind, measure: &str) -> Option<Middle> {
        Middle::of(self.rounds(kind, measure)?.values().copied())
    }

    /// All rounds of a count together.
    pub(crate) fn sum(&self, kind: Kind, measure: &str) -> Option<f64> {
        Some(self.rounds(kind, measure)?.values().sum())
    }

    /// One way's value by another's, round by round.
    pub(crate) fn ratio(
        &self,
        (kind, measure): (Kind, &str),
        (other, others): (Kind, &str),
    ) -> Option<Middle> {
        let (ours, theirs) = (self.rounds(kind, measure)?, self.rounds(other, others)?);
        Middle::of(ours.iter().filter_map(|(round, value)| {
            let other = theirs.get(round).filter(|v| **v > 0.0)?;
            Some(value / other)
        }))
    }

    /// The same for differences.
    pub(crate) fn above(&self, kind: Kind, other: Kind, measure: &str) -> Option<Middle> {
        let (ours, theirs) = (self.rounds(kind, measure)?, self.rounds(other, measure)?);
        let pairs = ours.iter().filter_map(|(r, v)| Some(v - theirs.get(r)?));
        Middle::of(pairs)
    }

    pub(crate) fn json(&self) -> Value {
        let rows = self.values.iter().map(|((name, measure), rounds)| {
            let middle = Middle::of(rounds.values().copied());
            json!({
                "way": name,
                "measure": measure,
                "rounds": rounds,
                "median": middle.map(|m| m.median),
            })
        });
        json!({"values": rows.collect::<Vec<_>>(), "notes": self.notes})
    }
}
