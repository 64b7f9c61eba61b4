//! The highest rate of datagrams that arrives whole.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use rvpn_lab::Ns;

use crate::Way;
use crate::flood::{Counter, Flows};

/// IPv4 and UDP headers.
const HEADERS: usize = 28;
/// So much of a trial may be lost.
const LOSS: f64 = 0.001;
/// A queue that needs longer to drain was growing.
const STANDING: Duration = Duration::from_millis(10);
const TRIALS: u32 = 10;
/// Where the search begins, and below which nothing is worth knowing.
const FIRST: f64 = 40_000.0;
const LEAST: f64 = 500.0;
/// Each has a sender of its own. One gets less through the wires alone than some
/// tunnels take; a third takes cores that the tunnels' programs need, and none of
/// them then gets more through.
const FLOWS: u16 = 2;

/// One trial's outcome.
struct Trial {
    /// Datagrams a second that were sent.
    rate: f64,
    whole: bool,
}

/// Packets a second between a client and the far side, `size` bytes each with
/// their headers. `None` when nothing gets through at all.
pub(crate) fn lossless(
    client: &Ns,
    far: &Ns,
    at: SocketAddr,
    way: Way,
    size: usize,
    trial: Duration,
) -> Option<f64> {
    let flows = Flows::open(client, far, at, way, FLOWS)?;
    let counter = Counter::default();
    thread::scope(|scope| {
        scope.spawn(|| flows.receive(&counter));
        let length = size.saturating_sub(HEADERS).max(8);
        let best = search(|rate| attempt(&flows, length, rate, trial, &counter));
        counter.stop.store(true, Relaxed);
        best
    })
}

/// Doubles until it fails, then closes in.
fn search(mut attempt: impl FnMut(f64) -> Trial) -> Option<f64> {
    let (mut low, mut high, mut rate) = (0.0_f64, None::<f64>, FIRST);
    for _ in 0..TRIALS {
        let mut trial = attempt(rate);
        if !trial.whole {
            // A hiccup of the machine is not the tunnel's.
            trial = attempt(rate);
        }
        if trial.whole {
            low = low.max(trial.rate);
            if trial.rate < rate * 0.9 {
                // The sender has no more to give.
                break;
            }
        } else {
            high = Some(trial.rate.min(rate));
        }
        rate = match high {
            None => rate * 2.0,
            Some(_) if low == 0.0 => rate / 4.0,
            Some(high) if (high - low) < high * 0.08 => break,
            Some(high) => f64::midpoint(low, high),
        };
        if rate < LEAST {
            break;
        }
    }
    (low > 0.0).then_some(low)
}

fn attempt(flows: &Flows, length: usize, rate: f64, limit: Duration, counter: &Counter) -> Trial {
    let sent = flows.send(counter.begin(), length, rate, limit);
    let (mut seen, mut since) = (counter.seen.load(Relaxed), Instant::now());
    while seen < sent.packets && since.elapsed() < STANDING * 3 {
        thread::sleep(Duration::from_micros(500));
        let now = counter.seen.load(Relaxed);
        if now > seen {
            (seen, since) = (now, Instant::now());
        }
    }
    let drained = counter.last().saturating_duration_since(sent.end);
    Trial {
        rate: sent.packets as f64 / sent.took.as_secs_f64(),
        whole: seen as f64 >= sent.packets as f64 * (1.0 - LOSS) && drained <= STANDING,
    }
}

#[cfg(test)]
mod tests {
    use super::{Trial, search};

    #[test]
    fn the_search_comes_close_to_what_a_road_takes_and_stays_below() {
        for limit in [700.0, 45_000.0, 119_000.0, 600_000.0] {
            let best = search(|rate| Trial {
                rate,
                whole: rate <= limit,
            });
            let best = best.expect("something gets through");
            assert!(best <= limit && best >= limit * 0.85, "{best} of {limit}");
        }
        let nothing = search(|rate| Trial { rate, whole: false });
        assert_eq!(nothing, None, "a road that carries nothing");
    }

    #[test]
    fn the_search_ends_where_the_senders_have_no_more_to_give() {
        let mut trials = 0;
        let best = search(|rate| {
            trials += 1;
            Trial {
                rate: rate.min(100_000.0),
                whole: true,
            }
        });
        assert_eq!(best, Some(100_000.0));
        assert_eq!(trials, 3, "none after the first that fell short");
    }

    #[test]
    fn one_trial_that_fails_by_accident_is_repeated() {
        let mut trials = 0;
        let best = search(|rate| {
            trials += 1;
            Trial {
                rate,
                whole: trials != 1 && rate <= 80_000.0,
            }
        });
        assert!(best.expect("it gets through") >= 70_000.0);
    }
}
