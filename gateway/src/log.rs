//! A log file that is set aside when it is large, and those before it, of
//! which the old ones go.
//!
//! All of it is done by the process itself, from inside its cage: it has rights
//! to the directory of the file and nothing beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFile;

/// How long a file goes on growing after it could not be set aside.
const AGAIN: u64 = 1 << 20;

/// Where lines go.
#[derive(Clone)]
pub struct Rotating {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    settings: LogFile,
    file: File,
    size: u64,
    /// At this size it is set aside.
    limit: u64,
}

impl Rotating {
    /// Opens the file, to write behind what is there.
    pub fn open(settings: &LogFile) -> io::Result<Rotating> {
        let file = open(&settings.path)?;
        let mut inner = Inner {
            size: file.metadata()?.len(),
            limit: settings.rotate,
            file,
            settings: settings.clone(),
        };
        inner.tidy(SystemTime::now());
        Ok(Rotating {
            inner: Arc::new(Mutex::new(inner)),
        })
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
}

impl Inner {
    fn line(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u64;
        if self.size > 0 && self.size + len > self.limit {
            self.set_aside(SystemTime::now());
        }
        self.file.write_all(bytes)?;
        self.size += len;
        Ok(())
    }

    /// Goes on with a new file. If that cannot be, the old one goes on, and
    /// says so in itself.
    fn set_aside(&mut self, now: SystemTime) {
        let path = self.settings.path.clone();
        let rotated = free(&path, now).and_then(|to| {
            fs::rename(&path, &to)?;
            open(&path).inspect_err(|_| drop(fs::rename(&to, &path)))
        });
        match rotated {
            Ok(file) => {
                self.file = file;
                self.size = 0;
                self.limit = self.settings.rotate;
                self.tidy(now);
            }
            Err(error) => {
                self.limit = self.size + AGAIN;
                let line = format!(
                    "cannot set this log aside: {error}; give the gateway's user write access to {}\n",
                    path.parent().unwrap_or(Path::new(".")).display()
                );
                // Whoever cannot write here cannot be told here.
                drop(self.file.write_all(line.as_bytes()));
            }
        }
    }

    /// Removes those that are too many or too old.
    fn tidy(&mut self, now: SystemTime) {
        let mut old = aside(&self.settings.path);
        // Their names begin with the time.
        old.sort();
        let too_many = match self.settings.keep {
            0 => 0,
            keep => old.len().saturating_sub(keep),
        };
        let too_old = |path: &PathBuf| {
            let age = fs::metadata(path).and_then(|m| m.modified());
            let age = age.ok().and_then(|at| now.duration_since(at).ok());
            let keep_for = self.settings.keep_for;
            age.zip(keep_for).is_some_and(|(age, most)| age > most)
        };
        for (number, path) in old.iter().enumerate() {
            if number < too_many || too_old(path) {
                // It is tried again the next time.
                drop(fs::remove_file(path));
            }
        }
    }
}

/// Where the file goes that is set aside now.
fn free(path: &Path, now: SystemTime) -> io::Result<PathBuf> {
    let stamp = stamp(now);
    let of_now = |path: &PathBuf| {
        let text = path.to_str()?;
        let (before, number) = text.rsplit_once('-')?;
        before
            .ends_with(&stamp)
            .then(|| number.parse::<u32>().ok())?
    };
    // Behind all others of this second, also where the first of them are gone.
    let last = aside(path).iter().filter_map(of_now).max();
    let number = last.map_or(0, |n| n + 1);
    if number > 999 {
        return Err(io::Error::other("too many files of this second"));
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{stamp}-{number:03}"));
    Ok(PathBuf::from(name))
}

/// Those that were set aside before.
fn aside(path: &Path) -> Vec<PathBuf> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Vec::new();
    };
    let mut prefix = name.to_owned();
    prefix.push(".");
    let ours = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        let rest = name
            .as_encoded_bytes()
            .strip_prefix(prefix.as_encoded_bytes());
        rest.is_some_and(is_stamp)
    };
    let dir = match dir.as_os_str().is_empty() {
        true => Path::new("."),
        false => dir,
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(ours).map(|e| e.path()).collect()
}

/// Like `20261121T121637Z-000`.
fn is_stamp(text: &[u8]) -> bool {
    const FORM: &[u8] = b"00000000T000000Z-000";
    let fits = |(have, want): (&u8, &u8)| match want {
        b'0' => have.is_ascii_digit(),
        want => have == want,
    };
    text.len() == FORM.len() && text.iter().zip(FORM).all(fits)
}

/// The moment in UTC, in an order that is that of time.
fn stamp(now: SystemTime) -> String {
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March have the leap day at their end.
    let since = days + 719_468;
    let (era, of_era) = (since / 146_097, since % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = match month {
        0..10 => (month + 3, year + era * 400),
        _ => (month - 9, year + era * 400 + 1),
    };
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// One line at a time.
pub struct Line<'a>(MutexGuard<'a, Inner>);

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.line(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.file.flush()
    }
}

impl<'a> MakeWriter<'a> for Rotating {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path, rotate: u64, keep: usize) -> LogFile {
        LogFile {
            path: dir.join("gateway.log"),
            rotate,
            keep,
            keep_for: Some(Duration::from_secs(120 * 86_400)),
        }
    }

    fn write(log: &Rotating, text: &str) {
        log.make_writer().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn moments_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "19700101T000000Z"),
            (951_782_400, "20000229T000000Z"),
            (1_795_262_197, "20261121T115637Z"),
            (4_107_542_399, "21000228T235959Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(stamp(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn r_20_no_line_is_lost_or_cut_and_the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let log = Rotating::open(&settings(dir.path(), 1000, 3)).unwrap();
        for n in 0..500 {
            write(&log, &format!("line {n:05} {}\n", "x".repeat(80)));
        }
        let mut files = aside(&dir.path().join("gateway.log"));
        files.sort();
        assert_eq!(files.len(), 3);
        files.push(dir.path().join("gateway.log"));
        let mut next = None;
        for file in &files {
            let text = fs::read_to_string(file).unwrap();
            assert!(text.len() <= 1000 && text.ends_with('\n'));
            for line in text.lines() {
                let number: u32 = line[5..10].parse().unwrap();
                assert!(next.is_none_or(|n| n == number), "{number}");
                next = Some(number + 1);
            }
        }
        assert_eq!(next, Some(500));
    }

    #[test]
    fn r_20_old_ones_go_and_files_of_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let old = SystemTime::now() - Duration::from_secs(121 * 86_400);
        let others = [
            "gateway.log.1",
            "gateway.log.20200101T000000Z",
            "other.log.20200101T000000Z-000",
        ];
        for name in others.iter().chain(&["gateway.log.20200101T000000Z-000"]) {
            let file = File::create(at(name)).unwrap();
            file.set_modified(old).unwrap();
        }
        File::create(at("gateway.log.20260101T000000Z-000")).unwrap();
        Rotating::open(&settings(dir.path(), 1000, 10)).unwrap();
        assert!(!at("gateway.log.20200101T000000Z-000").exists());
        assert!(at("gateway.log.20260101T000000Z-000").exists());
        assert!(others.iter().all(|name| at(name).exists()));
    }

    #[test]
    fn r_20_what_is_there_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), 1000, 3);
        for n in 0..3 {
            write(&Rotating::open(&settings).unwrap(), &format!("{n}\n"));
        }
        assert_eq!(fs::read_to_string(&settings.path).unwrap(), "0\n1\n2\n");
    }
}
