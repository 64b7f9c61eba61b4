//! Where the log goes.

use std::path::Path;
use std::time::Duration;

use super::check::Checked;
use super::{Log, LogFile, LogTo, raw};

const MEGABYTE: u64 = 1 << 20;
const DAY: u64 = 24 * 3600;

pub(super) fn check(raw: raw::Log, level: Option<String>, base: &Path) -> Checked<Log> {
    let bounds = [
        ("rotate-mb", raw.rotate_mb, 1, 1 << 20),
        ("keep", raw.keep, 0, 10_000),
        ("keep-days", raw.keep_days, 0, 36_500),
    ];
    let is_file = !matches!(
        raw.file.as_deref(),
        None | Some("" | "none" | "-" | "stdout" | "stderr")
    );
    for (what, value, least, most) in bounds {
        let Some(value) = value else { continue };
        if !is_file {
            return Err(format!(
                "log: {what} is about a file; set log.file to one, or remove {what}"
            ));
        }
        if !(least..=most).contains(&value) {
            return Err(format!("log: {what} must be between {least} and {most}"));
        }
    }
    let to = match raw.file.as_deref() {
        None | Some("stderr") => LogTo::Stderr,
        Some("-" | "stdout") => LogTo::Stdout,
        Some("" | "none") => LogTo::Nowhere,
        Some(path) => {
            let path = base.join(path);
            if path.file_name().is_none() {
                return Err(format!("log: file \"{}\" is not a file", path.display()));
            }
            LogTo::File(LogFile {
                path,
                rotate: raw.rotate_mb.unwrap_or(100) * MEGABYTE,
                keep: usize::try_from(raw.keep.unwrap_or(10)).unwrap_or(usize::MAX),
                keep_for: match raw.keep_days.unwrap_or(120) {
                    0 => None,
                    days => Some(Duration::from_secs(days * DAY)),
                },
            })
        }
    };
    Ok(Log {
        filter: level.or(raw.level).unwrap_or_else(|| "info".to_owned()),
        json: matches!(raw.format, Some(raw::LogFormat::Json)),
        to,
    })
}
