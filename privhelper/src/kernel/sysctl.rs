//! The few kernel settings that have no netlink message, by their files, and
//! what they held before us, so that teardown can put it back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const JOURNAL: &str = "sysctl.journal";

fn path(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

/// `None` where there is no such file.
pub(crate) fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// The value, without the newline; `None` when this kernel has no such setting.
pub(crate) fn read(name: &str) -> io::Result<Option<String>> {
    let text = if_there(fs::read_to_string(path(name))).map_err(|e| named(name, &e))?;
    Ok(text.map(|t| t.trim_end().to_owned()))
}

/// Whether the setting is there and has this value.
pub(crate) fn is(name: &str, value: &str) -> io::Result<bool> {
    Ok(read(name)?.as_deref() == Some(value))
}

pub(crate) fn write(name: &str, value: &str) -> io::Result<()> {
    fs::write(path(name), value).map_err(|e| named(name, &e))
}

/// Whether the setting is off and nobody at all can change it from here.
pub(crate) fn stuck(name: &str) -> bool {
    let opened = OpenOptions::new().write(true).open(path(name));
    let read_only = opened.is_err_and(|e| e.kind() == io::ErrorKind::ReadOnlyFilesystem);
    is(name, "0").unwrap_or(false) && read_only
}

fn named(name: &str, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("/proc/sys/{name}: {e}"))
}

/// Written and synced before the first change; a line is `name old new`. A
/// value somebody changed after us is theirs and stays.
pub(crate) struct Journal {
    path: PathBuf,
    lines: Vec<[String; 3]>,
}

impl Journal {
    pub(crate) fn open(state: &Path) -> io::Result<Journal> {
        let path = state.join(JOURNAL);
        let text = if_there(fs::read_to_string(&path))?.unwrap_or_default();
        let words = |l: &str| l.splitn(3, ' ').map(str::to_owned).collect::<Vec<_>>();
        let lines = text.lines().filter_map(|l| words(l).try_into().ok());
        let lines = lines.collect();
        Ok(Journal { path, lines })
    }

    /// Raises a sysctl, remembering what it was; false when this kernel has none of that name.
    /// What is higher already is stricter, and stays.
    pub(crate) fn raise(&mut self, name: &str, value: &str) -> io::Result<bool> {
        let Some(old) = read(name)? else {
            return Ok(false);
        };
        if old.as_str() < value {
            if !self.lines.iter().any(|l| l[0] == name) {
                self.lines.push([name.to_owned(), old, value.to_owned()]);
                self.save()?;
            }
            write(name, value)?;
        }
        Ok(true)
    }

    fn save(&self) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = File::create(&new)?;
        for line in &self.lines {
            writeln!(file, "{}", line.join(" "))?;
        }
        file.sync_all()?;
        fs::rename(new, &self.path)
    }

    /// Puts back every value that is still ours, newest first; returns how many.
    pub(crate) fn restore(self) -> io::Result<usize> {
        let mut restored = 0;
        for [name, old, value] in self.lines.iter().rev() {
            if is(name, value)? {
                write(name, old)?;
                restored += 1;
            }
        }
        if_there(fs::remove_file(&self.path)).map(|_| restored)
    }
}
