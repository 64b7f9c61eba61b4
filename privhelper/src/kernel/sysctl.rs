//! The few kernel settings that have no netlink message, by their files, and
//! what they held before us, so that teardown can put it back.

use std::fs::{self, OpenOptions};
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

/// What we changed: name, old value, new value. A line is written and synced before the
/// change it is about, so one that was cut short is about none.
fn journal(state: &Path) -> io::Result<Vec<[String; 3]>> {
    let text = if_there(fs::read_to_string(state.join(JOURNAL)))?.unwrap_or_default();
    let words = |l: &str| l.splitn(3, ' ').map(str::to_owned).collect::<Vec<_>>();
    let lines = text.lines().filter_map(|l| words(l).try_into().ok());
    Ok(lines.collect())
}

/// Raises a sysctl, remembering what it was; false when this kernel has none of that name.
/// What is higher already is stricter, and stays.
pub(crate) fn raise(state: &Path, name: &str, value: &str) -> io::Result<bool> {
    let Some(old) = read(name)? else {
        return Ok(false);
    };
    if old.as_str() < value {
        if !journal(state)?.iter().any(|l| l[0] == name) {
            let mut options = OpenOptions::new();
            let mut file = options
                .append(true)
                .create(true)
                .open(state.join(JOURNAL))?;
            // What was cut short before ends here.
            file.write_all(format!("\n{name} {old} {value}").as_bytes())?;
            file.sync_all()?;
        }
        write(name, value)?;
    }
    Ok(true)
}

/// Puts back every value that is still ours, newest first; returns how many. A
/// value somebody changed after us is theirs and stays.
pub(crate) fn restore(state: &Path) -> io::Result<usize> {
    let mut restored = 0;
    for [name, old, value] in journal(state)?.iter().rev() {
        if is(name, value)? {
            write(name, old)?;
            restored += 1;
        }
    }
    if_there(fs::remove_file(state.join(JOURNAL))).map(|_| restored)
}
