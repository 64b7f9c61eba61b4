//! What every session has carried, exactly and whatever happens.
//!
//! Each session owns a row of plain counters in a file that is mapped into
//! memory. Its task is the only writer and writes after every turn, so a
//! killed process has lost at most the turn it was in, and what acknowledgements
//! another thread wrote since the last look, [`rvpn_acks::LOOK`] ago. Rows hold
//! totals, never differences: whoever stores one twice, or late, stores the same
//! thing.
//!
//! The next process finds the file of a dead one by its lock, closes the rows
//! into the store and removes it.

mod count;
pub mod flush;
mod shm;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

pub use self::count::{DROPS, DropReason, Side, Totals};
use self::shm::Words;

/// "RVPNmetr", so that nobody takes another file for a table.
const MAGIC: u64 = 0x7274_656d_4e50_5652;
/// Changes whenever a word's meaning does.
const VERSION: u64 = 2;
/// Words of the header and of every row: one kilobyte.
const ROW: usize = 128;

// Words of a row.
const STATE: usize = 0;
const SESSION: usize = 1;
const STARTED: usize = 3;
const ENDED: usize = 4;
const LENGTHS: usize = 5;
const ACCOUNT: usize = 6;
const SERVICE: usize = ACCOUNT + ACCOUNT_BYTES / 8;
const COUNTS: usize = SERVICE + SERVICE_BYTES / 8;
const ACCOUNT_BYTES: usize = 256;
/// The longest name and what stands before it.
const SERVICE_BYTES: usize = 264;
/// Words of one direction.
const SIDE: usize = 3 + DROPS;

const FREE: u64 = 0;
const LIVE: u64 = 1;
const OVER: u64 = 2;

const _: () = assert!(COUNTS + 2 * SIDE <= ROW);
/// One row as it stands in a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The session.
    pub session: u128,
    /// Who pays.
    pub account: String,
    /// What was used.
    pub service: String,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// When it ended; `None` while it runs.
    pub ended_ms: Option<u64>,
    /// How much.
    pub totals: Totals,
}

/// Enough of a row to tell whether it has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The session.
    pub session: u128,
    /// All its counters together. They only grow, so if any does, this does.
    pub sum: u64,
    /// Whether it is over.
    pub ended: bool,
}

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the meter file {path}: {error}")]
pub struct MeterError {
    path: PathBuf,
    error: io::Error,
}

/// No row is free.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the meter has no free row: more is open than limits.max-clients provides for")]
pub struct Full;

#[derive(Debug)]
struct Table {
    words: Words,
    /// Holds the lock that tells others that we live.
    _file: File,
}

/// The table of this process.
#[derive(Debug)]
pub struct Meter {
    table: Arc<Table>,
    path: PathBuf,
    slots: Mutex<Slots>,
}

#[derive(Debug)]
struct Slots {
    free: Vec<usize>,
    /// Rows below were used at least once.
    used: usize,
    rows: usize,
}

impl Meter {
    /// Makes the table for this process, with room for `rows` sessions. The
    /// file is sparse: a row costs its kilobyte when it is first used.
    pub fn create(dir: &Path, rows: usize) -> Result<Meter, MeterError> {
        let path = dir.join(format!("meter-{}.rows", std::process::id()));
        let make = || {
            // A former process may have had our number; its file was adopted before.
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.try_lock().map_err(io::Error::from)?;
            file.set_len(((rows + 1) * ROW * 8) as u64)?;
            let words = Words::map(&file)?;
            for (i, v) in [
                MAGIC,
                VERSION,
                ROW as u64,
                rows as u64,
                std::process::id().into(),
            ]
            .into_iter()
            .enumerate()
            {
                words.all()[i].store(v, Ordering::Relaxed);
            }
            Ok(Table { words, _file: file })
        };
        let table = make().map_err(|error| MeterError {
            path: path.clone(),
            error,
        })?;
        Ok(Meter {
            table: Arc::new(table),
            path,
            slots: Mutex::new(Slots {
                free: Vec::new(),
                used: 0,
                rows,
            }),
        })
    }

    /// Takes a row for a session. Names longer than a row has room for are cut
    /// at a character.
    pub fn open(
        &self,
        session: u128,
        account: &str,
        service: &str,
        started_ms: u64,
    ) -> Result<Row, Full> {
        let index = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            match slots.free.pop() {
                Some(index) => index,
                None if slots.used < slots.rows => {
                    slots.used += 1;
                    slots.used - 1
                }
                None => return Err(Full),
            }
        };
        let row = Row {
            table: Arc::clone(&self.table),
            index,
        };
        let words = row.words();
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        words[SESSION].store((session >> 64) as u64, Ordering::Relaxed);
        words[SESSION + 1].store(session as u64, Ordering::Relaxed);
        words[STARTED].store(started_ms, Ordering::Relaxed);
        let account = put_text(&words[ACCOUNT..SERVICE], account);
        let service = put_text(&words[SERVICE..COUNTS], service);
        words[LENGTHS].store((account | service << 32) as u64, Ordering::Relaxed);
        // From here on the row counts for whoever reads the file.
        words[STATE].store(LIVE, Ordering::Release);
        Ok(row)
    }

    /// All rows in use, with the number by which an ended one is given back.
    pub fn usage(&self) -> Vec<(usize, Usage)> {
        let used = self
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .used;
        read_rows(&self.table.words, used)
    }

    /// Shows every row's mark to `which`, and reads those that it picks.
    pub fn pick(&self, mut which: impl FnMut(usize, Mark) -> bool) -> Vec<Usage> {
        let used = self
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .used;
        let rows = rows(&self.table.words, used).enumerate();
        rows.filter(|(index, row)| mark(row).is_some_and(|mark| which(*index, mark)))
            .filter_map(|(_, row)| read_row(row))
            .collect()
    }

    /// Frees rows of ended sessions, once the store has them.
    pub fn forget(&self, rows: impl IntoIterator<Item = usize>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        for index in rows {
            let state = &self.table.words.all()[(index + 1) * ROW + STATE];
            if state.load(Ordering::Acquire) == OVER {
                state.store(FREE, Ordering::Release);
                slots.free.push(index);
            }
        }
    }

    /// Removes the file of a process that ends in order, after its last rows
    /// were stored.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

/// One session's row. The session is its only writer.
#[derive(Debug)]
pub struct Row {
    table: Arc<Table>,
    index: usize,
}

impl Row {
    fn words(&self) -> &[AtomicU64] {
        &self.table.words.all()[(self.index + 1) * ROW..][..ROW]
    }

    /// Stores the totals. Plain stores to memory nobody else writes; reasons
    /// that do not occur cost nothing.
    pub fn publish(&self, totals: &Totals, drops_changed: bool) {
        let words = self.words();
        for (n, side) in [&totals.outbound, &totals.inbound].into_iter().enumerate() {
            let at = &words[COUNTS + n * SIDE..][..SIDE];
            at[0].store(side.payload, Ordering::Relaxed);
            at[1].store(side.packets, Ordering::Relaxed);
            at[2].store(side.wire, Ordering::Relaxed);
            if drops_changed {
                for (word, drops) in at[3..].iter().zip(side.drops) {
                    word.store(drops, Ordering::Relaxed);
                }
            }
        }
    }

    /// Adds payload to what stands there. For rows that several tasks write,
    /// none of which publishes.
    pub fn add(&self, outbound: u64, inbound: u64) {
        let words = self.words();
        for (n, bytes) in [outbound, inbound].into_iter().enumerate() {
            if bytes > 0 {
                words[COUNTS + n * SIDE].fetch_add(bytes, Ordering::Relaxed);
            }
        }
    }

    /// Ends a row of that kind as it stands.
    pub fn end(&self, ended_ms: u64) {
        let words = self.words();
        words[ENDED].store(ended_ms, Ordering::Relaxed);
        words[STATE].store(OVER, Ordering::Release);
    }

    /// Ends the row. It stays until the store has it.
    pub fn close(self, totals: &Totals, ended_ms: u64) {
        self.publish(totals, true);
        self.end(ended_ms);
    }

    /// The row as others see it.
    pub fn read(&self) -> Option<Usage> {
        read_row(self.words())
    }
}

/// The table of a process that is gone.
#[derive(Debug)]
pub struct Orphan {
    words: Words,
    path: PathBuf,
    rows: usize,
    _file: File,
}

impl Orphan {
    /// Finds and locks the tables whose processes are gone. Files that are not
    /// tables of this version are named in the second list and left alone.
    pub fn find(dir: &Path) -> io::Result<(Vec<Orphan>, Vec<PathBuf>)> {
        let (mut orphans, mut strange) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let ours = path
                .file_name()
                .and_then(|n| n.to_str())
                .is_some_and(|n| n.starts_with("meter-") && n.ends_with(".rows"));
            if !ours {
                continue;
            }
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(e)) => return Err(e),
            }
            match Orphan::check(file, &path) {
                Some(orphan) => orphans.push(orphan),
                None => strange.push(path),
            }
        }
        Ok((orphans, strange))
    }

    fn check(file: File, path: &Path) -> Option<Orphan> {
        let words = Words::map(&file).ok()?;
        let all = words.all();
        let head: Vec<u64> = all
            .iter()
            .take(4)
            .map(|w| w.load(Ordering::Relaxed))
            .collect();
        let [MAGIC, VERSION, row, rows] = head[..] else {
            return None;
        };
        let rows = usize::try_from(rows).ok()?;
        let fits = row == ROW as u64 && all.len() == rows.checked_add(1)?.checked_mul(ROW)?;
        fits.then(|| Orphan {
            path: path.to_owned(),
            rows,
            words,
            _file: file,
        })
    }

    /// What its sessions had used. Those that ran are given `ended_ms`, the
    /// time of their process's end as far as it is known.
    pub fn usage(&self, ended_ms: u64) -> Vec<Usage> {
        read_rows(&self.words, self.rows)
            .into_iter()
            .map(|(_, mut usage)| {
                usage.ended_ms.get_or_insert(ended_ms);
                usage
            })
            .collect()
    }

    /// Removes the file, once the store has its rows.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

fn read_rows(words: &Words, rows: usize) -> Vec<(usize, Usage)> {
    self::rows(words, rows)
        .enumerate()
        .filter_map(|(i, row)| Some((i, read_row(row)?)))
        .collect()
}

fn rows(words: &Words, used: usize) -> impl Iterator<Item = &[AtomicU64]> {
    words.all()[ROW..].chunks_exact(ROW).take(used)
}

fn mark(words: &[AtomicU64]) -> Option<Mark> {
    let state = words[STATE].load(Ordering::Acquire);
    if state != LIVE && state != OVER {
        return None;
    }
    let at = |i: usize| words[i].load(Ordering::Relaxed);
    let counts = COUNTS..COUNTS + 2 * SIDE;
    Some(Mark {
        session: u128::from(at(SESSION)) << 64 | u128::from(at(SESSION + 1)),
        sum: counts.map(at).fold(0, u64::wrapping_add),
        ended: state == OVER,
    })
}

fn read_row(words: &[AtomicU64]) -> Option<Usage> {
    let state = words[STATE].load(Ordering::Acquire);
    if state != LIVE && state != OVER {
        return None;
    }
    let at = |i: usize| words[i].load(Ordering::Relaxed);
    let lengths = at(LENGTHS);
    let side = |n: usize| {
        let base = COUNTS + n * SIDE;
        let mut drops = [0; DROPS];
        for (i, drop) in drops.iter_mut().enumerate() {
            *drop = at(base + 3 + i);
        }
        Side {
            payload: at(base),
            packets: at(base + 1),
            wire: at(base + 2),
            drops,
        }
    };
    Some(Usage {
        session: u128::from(at(SESSION)) << 64 | u128::from(at(SESSION + 1)),
        account: text(&words[ACCOUNT..SERVICE], lengths & 0xffff_ffff),
        service: text(&words[SERVICE..COUNTS], lengths >> 32),
        started_ms: at(STARTED),
        ended_ms: (state == OVER).then(|| at(ENDED)),
        totals: Totals {
            outbound: side(0),
            inbound: side(1),
        },
    })
}

fn put_text(words: &[AtomicU64], text: &str) -> usize {
    let len = text.floor_char_boundary(words.len() * 8);
    for (word, bytes) in words.iter().zip(text.as_bytes()[..len].chunks(8)) {
        let mut eight = [0; 8];
        eight[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_le_bytes(eight), Ordering::Relaxed);
    }
    len
}

fn text(words: &[AtomicU64], len: u64) -> String {
    let mut bytes: Vec<u8> = words
        .iter()
        .flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes())
        .collect();
    bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(n: u64) -> Totals {
        let mut t = Totals::default();
        t.outbound.pass(n, 1000 * n);
        t.inbound.wire = 7 * n;
        t.inbound.drop(DropReason::Overload, n);
        t
    }

    fn abandon(meter: Meter) {
        // What a killed process leaves: the file, and no lock.
        drop(meter);
    }

    #[test]
    fn rows_are_read_as_they_were_published() {
        let dir = tempfile::tempdir().unwrap();
        let meter = Meter::create(dir.path(), 4).unwrap();
        let row = meter.open(u128::MAX - 5, "alice", "packets", 17).unwrap();
        row.publish(&totals(3), true);
        let (_, usage) = &meter.usage()[0];
        assert_eq!(usage.session, u128::MAX - 5);
        assert_eq!(
            (usage.account.as_str(), usage.service.as_str()),
            ("alice", "packets")
        );
        assert_eq!((usage.started_ms, usage.ended_ms), (17, None));
        assert_eq!(usage.totals, totals(3));
        let dropped: Vec<_> = usage.totals.inbound.dropped().collect();
        assert_eq!(dropped, [(DropReason::Overload, 3)]);
    }

    #[test]
    fn a_row_is_free_only_after_it_was_stored() {
        let dir = tempfile::tempdir().unwrap();
        let meter = Meter::create(dir.path(), 2).unwrap();
        let a = meter.open(1, "a", "packets", 0).unwrap();
        let _b = meter.open(2, "b", "packets", 0).unwrap();
        assert!(meter.open(3, "c", "packets", 0).is_err());
        // A live row cannot be given back.
        meter.forget([0, 1]);
        assert!(meter.open(3, "c", "packets", 0).is_err());
        a.close(&totals(1), 99);
        assert!(meter.open(3, "c", "packets", 0).is_err());
        assert_eq!(meter.usage()[0].1.ended_ms, Some(99));
        meter.forget([0]);
        let c = meter.open(3, "c", "packets", 0).unwrap();
        assert_eq!(c.read().unwrap().totals, Totals::default());
    }

    #[test]
    fn long_names_are_cut_at_a_character() {
        let dir = tempfile::tempdir().unwrap();
        let meter = Meter::create(dir.path(), 1).unwrap();
        let long = "é".repeat(200);
        let row = meter.open(1, &long, "packets", 0).unwrap();
        assert_eq!(row.read().unwrap().account, "é".repeat(128));
    }

    #[test]
    fn the_next_process_finds_what_a_dead_one_left_and_nothing_of_a_living_one() {
        let dead = tempfile::tempdir().unwrap();
        let meter = Meter::create(dead.path(), 3).unwrap();
        let row = meter.open(5, "alice", "packets", 1).unwrap();
        row.publish(&totals(8), true);
        let ended = meter.open(6, "bob", "packets", 2).unwrap();
        ended.close(&totals(9), 50);

        let (none, strange) = Orphan::find(dead.path()).unwrap();
        assert!(none.is_empty() && strange.is_empty(), "we still live");

        drop(row);
        abandon(meter);
        let (orphans, strange) = Orphan::find(dead.path()).unwrap();
        assert_eq!((orphans.len(), strange.len()), (1, 0));
        let usage = orphans[0].usage(77);
        assert_eq!(usage.len(), 2);
        assert_eq!((usage[0].ended_ms, usage[0].totals), (Some(77), totals(8)));
        assert_eq!((usage[1].ended_ms, usage[1].totals), (Some(50), totals(9)));
        for orphan in orphans {
            orphan.remove().unwrap();
        }
        assert_eq!(fs::read_dir(dead.path()).unwrap().count(), 0);
    }

    #[test]
    fn damaged_and_foreign_files_are_named_and_left() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("meter-1.rows", &b""[..]),
            ("meter-2.rows", &[1; 1024]),
            ("meter-3.rows", &[2; 13]),
        ] {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        fs::write(dir.path().join("other"), b"x").unwrap();
        let meter = Meter::create(dir.path(), 3).unwrap();
        let path = meter.path.clone();
        abandon(meter);
        // A table cut short by a full disk.
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(2048)
            .unwrap();
        let (orphans, strange) = Orphan::find(dir.path()).unwrap();
        assert_eq!((orphans.len(), strange.len()), (0, 4));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5);
    }
}
