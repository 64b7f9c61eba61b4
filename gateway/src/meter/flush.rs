//! From the table into the store, once a second.
//!
//! Only rows that changed are written. A store that is down costs nothing but
//! time: the totals stay in the table and are written when it is back, and
//! ended rows keep their place until then.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use super::{Meter, Orphan, Usage};

/// How much a crash of the store's machine can lose.
const EVERY: Duration = Duration::from_secs(1);

/// Where totals go. Rows are cumulative: writing one again, or an older one
/// after it, must leave the newer one.
pub trait UsageStore: Send + Sync + 'static {
    /// Writes rows, all or none. May block; it is called from a thread that may.
    fn put_usage(&self, rows: &[Usage]) -> Result<(), String>;
}

/// What the flusher knows to be in the store.
pub struct Flusher<S> {
    meter: Arc<Meter>,
    store: Arc<S>,
    /// By session: its counters' sum, and whether it was over.
    stored: HashMap<u128, (u64, bool)>,
    orphans: Vec<Orphan>,
    failing: bool,
}

impl<S: UsageStore> Flusher<S> {
    /// Takes on what dead processes left in `dir`. Their rows are written
    /// with the first flush that succeeds.
    pub fn new(meter: Arc<Meter>, store: Arc<S>, dir: &Path) -> Flusher<S> {
        let orphans = match Orphan::find(dir) {
            Ok((orphans, strange)) => {
                for path in strange {
                    warn!(path = %path.display(), "not a meter file of this version; left alone");
                }
                orphans
            }
            Err(error) => {
                warn!(%error, dir = %dir.display(), "cannot look for meter files of dead processes");
                Vec::new()
            }
        };
        Flusher {
            meter,
            store,
            stored: HashMap::new(),
            orphans,
            failing: false,
        }
    }

    /// Flushes until told to stop, and once more then.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>, tick: impl Fn() + Send) {
        let mut clock = interval(EVERY);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let stopping = tokio::select! {
                _ = clock.tick() => false,
                // An error means that the sender is gone, which is a stop as well.
                _ = stop.wait_for(|s| *s) => true,
            };
            tick();
            self = match tokio::task::spawn_blocking(move || {
                self.flush();
                self
            })
            .await
            {
                Ok(flusher) => flusher,
                Err(error) => {
                    warn!(%error, "the usage flusher failed; totals stay in the meter file");
                    return;
                }
            };
            if stopping {
                return;
            }
        }
    }

    /// One pass. Says once when the store fails and once when it is back.
    pub fn flush(&mut self) {
        match self.try_flush() {
            Ok(()) if self.failing => {
                self.failing = false;
                info!("the store takes usage again");
            }
            Err(error) if !self.failing => {
                self.failing = true;
                warn!(%error, "the store does not take usage; totals wait in the meter file");
            }
            Ok(()) | Err(_) => {}
        }
    }

    fn try_flush(&mut self) -> Result<(), String> {
        while let Some(orphan) = self.orphans.last() {
            let rows = orphan.usage(now_ms());
            self.store.put_usage(&rows)?;
            info!(
                sessions = rows.len(),
                "closed the sessions of a dead process"
            );
            if let Some(orphan) = self.orphans.pop()
                && let Err(error) = orphan.remove()
            {
                warn!(%error, "cannot remove a meter file; its rows will be written again");
            }
        }
        let (mut marks, mut over) = (Vec::new(), Vec::new());
        let changed = self.meter.pick(|index, mark| {
            if mark.ended {
                over.push((index, mark.session));
            }
            let known = (mark.sum, mark.ended);
            let changed = self.stored.get(&mark.session) != Some(&known);
            if changed {
                // What is read of it next may be newer; then it is written again.
                marks.push((mark.session, known));
            }
            changed
        });
        if !changed.is_empty() {
            self.store.put_usage(&changed)?;
        }
        self.stored.extend(marks);
        for (_, session) in &over {
            self.stored.remove(session);
        }
        self.meter.forget(over.into_iter().map(|(index, _)| index));
        Ok(())
    }
}

/// Wall clock, for what is kept.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::Totals;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Ledger {
        down: AtomicBool,
        writes: Mutex<Vec<Usage>>,
    }

    impl Ledger {
        fn take(&self) -> Vec<Usage> {
            std::mem::take(&mut self.writes.lock().unwrap())
        }
    }

    impl UsageStore for Ledger {
        fn put_usage(&self, rows: &[Usage]) -> Result<(), String> {
            if self.down.load(Ordering::Relaxed) {
                return Err("down".into());
            }
            self.writes.lock().unwrap().extend_from_slice(rows);
            Ok(())
        }
    }

    fn totals(n: u64) -> Totals {
        let mut totals = Totals::default();
        totals.inbound.pass(n, n * 100);
        totals
    }

    #[test]
    fn only_changes_are_written_and_an_ended_row_is_freed_once_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let meter = Arc::new(Meter::create(dir.path(), 1).unwrap());
        let ledger = Arc::new(Ledger::default());
        let mut flusher = Flusher::new(Arc::clone(&meter), Arc::clone(&ledger), dir.path());
        let row = meter.open(1, "alice", "packets", 5).unwrap();
        row.publish(&totals(1), true);
        flusher.flush();
        assert_eq!(ledger.take()[0].totals, totals(1));
        flusher.flush();
        assert!(ledger.take().is_empty());

        ledger.down.store(true, Ordering::Relaxed);
        row.close(&totals(2), 9);
        flusher.flush();
        assert!(
            meter.open(2, "bob", "packets", 5).is_err(),
            "not stored yet"
        );
        ledger.down.store(false, Ordering::Relaxed);
        flusher.flush();
        let rows = ledger.take();
        assert_eq!((rows.len(), rows[0].ended_ms), (1, Some(9)));
        assert_eq!(rows[0].totals, totals(2));
        meter.open(2, "bob", "packets", 5).unwrap();
    }

    #[test]
    fn what_a_dead_process_left_is_written_before_its_file_goes() {
        let dir = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        let dead = Meter::create(state.path(), 1).unwrap();
        let row = dead.open(7, "alice", "packets", 5).unwrap();
        row.publish(&totals(3), true);
        drop((row, dead));

        let meter = Arc::new(Meter::create(dir.path(), 1).unwrap());
        let ledger = Arc::new(Ledger::default());
        ledger.down.store(true, Ordering::Relaxed);
        let mut flusher = Flusher::new(meter, Arc::clone(&ledger), state.path());
        flusher.flush();
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 1);
        ledger.down.store(false, Ordering::Relaxed);
        flusher.flush();
        let rows = ledger.take();
        assert_eq!((rows[0].session, rows[0].totals), (7, totals(3)));
        assert!(rows[0].ended_ms.is_some());
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0);
    }
}
