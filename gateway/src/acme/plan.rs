//! When to ask for which certificate.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rvpn_proto::name::Name;

use super::Failure;
use super::files::Held;
use super::validity::Validity;
use crate::tls::Fingerprint;

/// How long the first failure keeps us from trying again; every further one
/// four times as long. Authorities allow only a few failures an hour.
const FIRST_WAIT: Duration = Duration::from_secs(60);
const LONGEST_WAIT: Duration = Duration::from_secs(6 * 3600);
/// At least this when the authority asks to be left alone.
const LIMITED_WAIT: Duration = Duration::from_secs(3600);
/// Names of others: so many at once, and then one more in this time.
const BURST: u32 = 20;
const ONE_MORE: Duration = Duration::from_secs(60);
/// Longest name; it is part of a file's name.
const NAME_LEN: usize = 200;

/// Whether authorities sign for such a name, as far as its form tells.
pub(crate) fn can_have(name: &Name) -> bool {
    let text = name.as_str();
    !name.is_address() && text.contains('.') && !text.contains('_') && text.len() <= NAME_LEN
}

/// One name.
pub(super) struct Entry {
    /// Whether it is somebody else's.
    pub(super) served: bool,
    /// When to ask next.
    pub(super) due: SystemTime,
    /// Whether it is being asked for now.
    pub(super) busy: bool,
    /// What there is.
    pub(super) has: Option<Has>,
    /// Failures since the last success.
    pub(super) failures: u32,
    /// The last of them, with what to do about it.
    pub(super) failure: Option<(String, &'static str)>,
}

pub(super) struct Has {
    pub(super) validity: Validity,
    pub(super) fingerprint: Fingerprint,
    pub(super) origin: String,
}

impl Entry {
    pub(super) fn new(served: bool) -> Entry {
        Entry {
            served,
            due: UNIX_EPOCH,
            busy: false,
            has: None,
            failures: 0,
            failure: None,
        }
    }

    pub(super) fn is_from_another(&self, directory: &str) -> bool {
        self.failures == 0 && self.has.as_ref().is_some_and(|h| h.origin != directory)
    }

    pub(super) fn hold(&mut self, held: &Held) {
        self.due = renewal(held.validity, chance());
        self.has = Some(Has {
            validity: held.validity,
            fingerprint: held.fingerprint,
            origin: held.origin.clone(),
        });
        self.failures = 0;
        self.failure = None;
    }

    /// Returns how long it waits now.
    pub(super) fn fail(&mut self, failure: &Failure) -> Duration {
        let mut wait = wait(self.failures, chance());
        if failure.limited {
            wait = wait.max(LIMITED_WAIT);
        }
        self.failures = self.failures.saturating_add(1);
        self.failure = Some((failure.text.clone(), failure.remedy));
        self.due = SystemTime::now() + wait;
        wait
    }

    /// Lets a failure be forgotten for one more try.
    pub(super) fn hurry(&mut self) {
        if self.failures > 0 {
            self.due = SystemTime::now();
        }
    }
}

/// Between 0 and 1, so that many gateways do not ask at the same moment.
fn chance() -> f64 {
    let bytes = crate::ticket::random::<2>().unwrap_or_default();
    f64::from(u16::from_be_bytes(bytes)) / f64::from(u16::MAX)
}

/// At two thirds of the life, or a little later.
fn renewal(validity: Validity, chance: f64) -> SystemTime {
    let life = Duration::from_secs(validity.ends - validity.begins);
    let after = life.mul_f64(2.0 / 3.0 + chance / 24.0);
    UNIX_EPOCH + Duration::from_secs(validity.begins) + after
}

fn wait(failures: u32, chance: f64) -> Duration {
    let factor = 4_u32.saturating_pow(failures.min(8));
    let wait = FIRST_WAIT.saturating_mul(factor).min(LONGEST_WAIT);
    wait.mul_f64(0.9 + chance / 5.0)
}

/// How often somebody else's name may make us ask.
#[derive(Default)]
pub(super) struct Quota {
    used: u32,
    since: Option<SystemTime>,
}

impl Quota {
    pub(super) fn take(&mut self, now: SystemTime) -> bool {
        let since = *self.since.get_or_insert(now);
        let passed = now.duration_since(since).unwrap_or_default();
        let back = passed.as_secs() / ONE_MORE.as_secs();
        if back > 0 {
            let back = u32::try_from(back).unwrap_or(u32::MAX);
            self.used = self.used.saturating_sub(back);
            self.since = Some(now);
        }
        let may = self.used < BURST;
        self.used += u32::from(may);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_comes_after_two_thirds_and_well_before_the_end() {
        let validity = Validity {
            begins: 1_000_000,
            ends: 1_000_000 + 90 * 86_400,
        };
        let day = |chance| {
            let at = renewal(validity, chance)
                .duration_since(UNIX_EPOCH)
                .unwrap();
            (at.as_secs_f64() - 1_000_000.0) / 86_400.0
        };
        assert!((day(0.0) - 60.0).abs() < 0.01);
        assert!((day(1.0) - 63.75).abs() < 0.01);
    }

    #[test]
    fn failures_come_hours_apart_at_the_end_and_few_in_the_first() {
        let waits: Vec<u64> = (0..12).map(|n| wait(n, 0.5).as_secs()).collect();
        assert_eq!(waits[..5], [60, 240, 960, 3840, 15_360]);
        assert!(waits[5..].iter().all(|w| *w == 6 * 3600));
        assert!(wait(u32::MAX, 1.0) < Duration::from_secs(7 * 3600));
        let mut at = 0;
        let tries = waits.iter().take_while(|w| {
            at += **w;
            at <= 3600
        });
        assert!(tries.count() < 5);
    }

    #[test]
    fn others_names_have_a_share() {
        let mut quota = Quota::default();
        let start = SystemTime::now();
        let taken = (0..100).filter(|_| quota.take(start)).count();
        assert_eq!(taken, 20);
        assert!(quota.take(start + Duration::from_secs(61)));
        assert!(!quota.take(start + Duration::from_secs(62)));
    }

    #[test]
    fn only_public_host_names_can_have_one() {
        for (text, can) in [
            ("a.example", true),
            ("localhost", false),
            ("192.0.2.1", false),
            ("::1", false),
            ("a_b.example", false),
        ] {
            assert_eq!(can_have(&Name::parse(text).unwrap()), can, "{text}");
        }
    }
}
