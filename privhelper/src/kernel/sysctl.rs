//! The few kernel settings that have no netlink message, by their files.

use std::fs;
use std::io;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name)
}

/// The value, without the newline; `None` when this kernel has no such setting.
pub(crate) fn read(name: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(path(name)) {
        Ok(s) => Ok(Some(s.trim_end().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(named(name, &e)),
    }
}

pub(crate) fn write(name: &str, value: &str) -> io::Result<()> {
    fs::write(path(name), value).map_err(|e| named(name, &e))
}

/// Whether the setting is off and nobody at all can change it from here.
pub(crate) fn stuck(name: &str) -> bool {
    let off = read(name).is_ok_and(|v| v.as_deref() == Some("0"));
    let opened = fs::OpenOptions::new().write(true).open(path(name));
    off && opened.is_err_and(|e| e.kind() == io::ErrorKind::ReadOnlyFilesystem)
}

fn named(name: &str, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("/proc/sys/{name}: {e}"))
}
