//! What sysctls held before us, so that teardown can put it back.
//!
//! Written and synced before the first change; a line is `name old new`. A
//! value somebody changed after us is theirs and stays.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::kernel::sysctl;

const FILE: &str = "sysctl.journal";

pub(crate) struct Journal {
    path: PathBuf,
    lines: Vec<(String, String, String)>,
}

impl Journal {
    pub(crate) fn open(state: &Path) -> io::Result<Journal> {
        let path = state.join(FILE);
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            other => other?,
        };
        let lines = text
            .lines()
            .filter_map(|l| {
                let mut words = l.splitn(3, ' ').map(str::to_owned);
                Some((words.next()?, words.next()?, words.next()?))
            })
            .collect();
        Ok(Journal { path, lines })
    }

    /// Raises a sysctl, remembering what it was; false when this kernel has none of that name.
    /// What is higher already is stricter, and stays.
    pub(crate) fn raise(&mut self, name: &str, value: &str) -> io::Result<bool> {
        let Some(old) = sysctl::read(name)? else {
            return Ok(false);
        };
        if old.as_str() >= value {
            return Ok(true);
        }
        if !self.lines.iter().any(|(n, _, _)| n == name) {
            self.lines.push((name.to_owned(), old, value.to_owned()));
            self.save()?;
        }
        sysctl::write(name, value)?;
        Ok(true)
    }

    fn save(&self) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = File::create(&new)?;
        for (name, old, value) in &self.lines {
            writeln!(file, "{name} {old} {value}")?;
        }
        file.sync_all()?;
        fs::rename(new, &self.path)
    }

    /// Puts back every value that is still ours, newest first; returns their names.
    pub(crate) fn restore(self) -> io::Result<Vec<String>> {
        let mut restored = Vec::new();
        for (name, old, value) in self.lines.into_iter().rev() {
            if sysctl::read(&name)?.as_deref() == Some(value.as_str()) {
                sysctl::write(&name, &old)?;
                restored.push(name);
            }
        }
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(restored),
        }
    }
}
