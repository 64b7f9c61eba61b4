//! How much a socket is given at once.
//!
//! A message that a socket does not take at once waits in front of everything
//! that is more urgent. On a fast link that is over before anybody notices; on
//! a link of 100 Mbit/s a message of 64 KiB takes five milliseconds, and the
//! kernel keeps a second and a third one of the same size. So it is measured
//! how fast a socket that is full takes more, and a message is as long as it
//! takes in about a millisecond.
//!
//! What is measured may be too little, such as after the other end has stood
//! still, so whatever takes much without ever being full is given more.

use crate::record::MESSAGE_LIMIT;

/// Fewer bytes would be mostly headers, and kernels wait for more.
const LEAST: usize = 4 * 1024;
/// Microseconds that a message may take.
const SPAN: u64 = 1000;
/// Microseconds that are measured at least: sockets take in steps, and whoever
/// reads at the other end is not always given the CPU at once.
const WINDOW: u64 = 10_000;
/// Bytes that a socket takes without being full before it is given more.
const EASY: u64 = 256 * 1024;

/// Measures one socket.
#[derive(Clone, Debug)]
pub struct Pace {
    most: usize,
    /// It has not taken all that it was given.
    full: bool,
    /// When it last had taken all after it was full, and how much in all by then.
    mark: Option<(u64, u64)>,
    /// What it had taken when `most` was last found to be right.
    sure: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            most: MESSAGE_LIMIT,
            full: false,
            mark: None,
            sure: 0,
        }
    }
}

impl Pace {
    /// Bytes that a message may have, and all messages that are given together.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Whether that is less than the most a message ever has.
    pub fn is_slow(&self) -> bool {
        self.most < MESSAGE_LIMIT
    }

    /// The socket did not take everything.
    pub fn full(&mut self) {
        self.full = true;
    }

    /// The socket took everything that it was given, `taken` bytes in all so
    /// far. Time is in microseconds of any clock that does not go back.
    pub fn took(&mut self, now: u64, taken: u64) {
        if std::mem::take(&mut self.full) {
            self.sure = taken;
            self.measure(now, taken);
        } else if self.is_slow() && taken.saturating_sub(self.sure) >= EASY {
            self.most = (self.most * 2).min(MESSAGE_LIMIT);
            self.sure = taken;
        }
    }

    /// Nothing waits, so it is not the socket that takes time.
    pub fn empty(&mut self) {
        self.mark = None;
    }

    fn measure(&mut self, now: u64, taken: u64) {
        let Some((since, before)) = self.mark else {
            self.mark = Some((now, taken));
            return;
        };
        let passed = now.saturating_sub(since);
        if passed >= WINDOW {
            let bytes = taken.saturating_sub(before).saturating_mul(SPAN) / passed;
            let bytes = usize::try_from(bytes).unwrap_or(MESSAGE_LIMIT);
            self.most = bytes.clamp(LEAST, MESSAGE_LIMIT);
            self.mark = Some((now, taken));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A socket that takes so many bytes a millisecond, always full.
    fn narrow(pace: &mut Pace, from: u64, taken: &mut u64, rate: u64) {
        for ms in 0..40 {
            *taken += rate;
            pace.full();
            pace.took(from + ms * 1000, *taken);
        }
    }

    #[test]
    fn a_message_is_what_the_link_takes_in_a_millisecond() {
        let (mut pace, mut taken) = (Pace::default(), 0);
        assert_eq!(pace.most(), MESSAGE_LIMIT);
        for (from, rate, most) in [
            (0, 12_500, 12_500),
            (100_000, 40_000, 40_000),
            (200_000, 1_000_000, MESSAGE_LIMIT),
            (300_000, 1250, LEAST),
        ] {
            // What was not measured in one go does not count.
            pace.empty();
            narrow(&mut pace, from, &mut taken, rate);
            assert_eq!(pace.most(), most, "{rate}");
        }
    }

    #[test]
    fn pauses_of_ours_do_not_make_a_link_slow() {
        let mut pace = Pace::default();
        for n in 0..100_u64 {
            for (after, taken) in [(0, 0), (100, 50_000), (200, 99_000)] {
                pace.full();
                pace.took(n * 50_000 + after, n * 100_000 + taken);
            }
            pace.empty();
        }
        assert_eq!(pace.most(), MESSAGE_LIMIT);
    }

    #[test]
    fn a_link_that_is_not_slow_any_more_is_given_more() {
        let (mut pace, mut taken) = (Pace::default(), 0);
        narrow(&mut pace, 0, &mut taken, 5000);
        for _ in 0..1000 {
            taken += 5000;
            pace.took(50_000, taken);
        }
        assert_eq!(pace.most(), MESSAGE_LIMIT);
        narrow(&mut pace, 100_000, &mut taken, 5000);
        assert!(pace.most() < 2 * 5000);
    }
}
