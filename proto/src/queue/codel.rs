//! When a flow's queue stands: RFC 8289, as decisions on one packet after the other.

use super::Settings;

/// What to do with the packet at the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Deliver,
    /// Drop it, or some of it, and ask again about what is then at the head.
    Drop,
}

/// How soon after a phase of dropping the next one goes on where it ended, in intervals.
const MEMORY: u64 = 16;

/// What is remembered of one flow.
#[derive(Clone, Debug, Default)]
pub(super) struct Codel {
    /// When dropping may begin, if waits stay above the target till then.
    patience_ends: Option<u64>,
    dropping: bool,
    next_drop: u64,
    /// Drops of this phase, and what it began with.
    count: u32,
    count_at_start: u32,
}

impl Codel {
    /// Judges a packet that has waited so long and leaves so many bytes behind it.
    pub(super) fn judge(
        &mut self,
        settings: &Settings,
        waited: u64,
        behind: u32,
        now: u64,
    ) -> Verdict {
        if !self.stands(settings, waited, behind, now) {
            self.dropping = false;
            return Verdict::Deliver;
        }
        if !self.dropping {
            self.begin(settings, now);
            return Verdict::Drop;
        }
        if now < self.next_drop {
            return Verdict::Deliver;
        }
        self.count = self.count.saturating_add(1);
        self.next_drop += self.pause(settings);
        Verdict::Drop
    }

    /// The flow has nothing waiting.
    pub(super) fn emptied(&mut self) {
        self.patience_ends = None;
        self.dropping = false;
    }

    /// Whether waits have been above the target for a whole interval.
    fn stands(&mut self, settings: &Settings, waited: u64, behind: u32, now: u64) -> bool {
        if waited < settings.target || behind <= settings.mtu {
            self.patience_ends = None;
            return false;
        }
        let ends = *self
            .patience_ends
            .get_or_insert(now.saturating_add(settings.interval));
        now >= ends
    }

    fn begin(&mut self, settings: &Settings, now: u64) {
        self.dropping = true;
        let lately = now.saturating_sub(self.next_drop) < MEMORY.saturating_mul(settings.interval);
        let reached = self.count.saturating_sub(self.count_at_start);
        self.count = if lately && reached > 1 { reached } else { 1 };
        self.count_at_start = self.count;
        self.next_drop = now.saturating_add(self.pause(settings));
    }

    /// Shorter with every drop, by the square root, to which TCP's rate is proportional.
    fn pause(&self, settings: &Settings) -> u64 {
        let root = (u64::from(self.count) << 20).isqrt();
        settings.interval.saturating_mul(1 << 10) / root.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1000;
    const BEHIND: u32 = 100_000;

    fn drops(codel: &mut Codel, waited: u64, behind: u32, from: u64, until: u64) -> Vec<u64> {
        let settings = Settings::default();
        let mut drops = Vec::new();
        for now in (from..until).step_by(100) {
            while codel.judge(&settings, waited, behind, now) == Verdict::Drop {
                drops.push(now);
            }
        }
        drops
    }

    #[test]
    fn drops_begin_after_an_interval_and_come_closer_by_the_square_root() {
        let drops = drops(&mut Codel::default(), 6 * MS, BEHIND, 0, 500 * MS);
        assert_eq!(drops[0], 100 * MS);
        for (n, pair) in drops.windows(2).enumerate() {
            let expected = 100_000.0 / ((n + 1) as f64).sqrt();
            let gap = (pair[1] - pair[0]) as f64;
            // Judged every 100 us, so a drop is late by up to that.
            assert!((gap - expected).abs() <= 101.0, "{n}: {gap} {expected}");
        }
        // 100 ms and then 100 / sqrt(n): the eighth gap ends at 537 ms.
        assert_eq!(drops.len(), 7);
    }

    #[test]
    fn nothing_is_dropped_below_the_target_or_with_little_behind() {
        let codel = &mut Codel::default();
        assert!(drops(codel, 4_999, BEHIND, 0, 1000 * MS).is_empty());
        assert!(drops(codel, 50 * MS, 1500, 1000 * MS, 2000 * MS).is_empty());
    }

    #[test]
    fn one_good_packet_starts_the_wait_again() {
        let codel = &mut Codel::default();
        assert!(drops(codel, 6 * MS, BEHIND, 0, 99 * MS).is_empty());
        assert!(drops(codel, 4 * MS, BEHIND, 99 * MS, 100 * MS).is_empty());
        assert!(drops(codel, 6 * MS, BEHIND, 100 * MS, 199 * MS).is_empty());
        assert_eq!(drops(codel, 6 * MS, BEHIND, 199 * MS, 210 * MS).len(), 1);
    }

    #[test]
    fn dropping_goes_on_where_it_ended_if_it_was_not_long_ago() {
        let again = |pause: u64| {
            let codel = &mut Codel::default();
            let before = drops(codel, 6 * MS, BEHIND, 0, 1000 * MS).len() as u64;
            assert!(before > 10);
            assert!(drops(codel, 0, BEHIND, 1000 * MS, (1000 + pause) * MS).is_empty());
            let from = (1000 + pause) * MS;
            drops(codel, 6 * MS, BEHIND, from, from + 300 * MS).len()
        };
        assert!(again(100) > 2 * again(10_000));
    }
}
