//! What `up` changed on this machine, written down before it is changed, so
//! that it can be put back whatever happened to who changed it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::net::Net;
use crate::fail::{Failure, Outcome, While as _};

/// How long putting things back may take another process.
const MENDS: Duration = Duration::from_secs(10);

/// Where `up` has its files.
pub(crate) fn dir() -> PathBuf {
    std::env::var_os("RVPN_RUN").map_or_else(|| PathBuf::from("/run/rvpn-client"), PathBuf::from)
}

/// Everything that has to be put back.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Journal {
    /// Of the device.
    pub(crate) interface: String,
    /// The process that keeps it.
    pub(crate) pid: u32,
    /// Whether it blocks what would pass the tunnel by, also without a process.
    #[serde(default)]
    pub(crate) blocks: bool,
    /// Of the gateway: while names are blocked, nobody else can tell.
    #[serde(default)]
    pub(crate) gateway: Option<(String, Vec<SocketAddr>)>,
    /// Files of the kernel, with what was in them.
    pub(crate) sysctls: Vec<(PathBuf, String)>,
    /// The list of resolvers.
    pub(crate) resolvers: Option<Resolvers>,
}

/// Where the list of resolvers is kept beyond a restart of the machine.
fn kept_path() -> PathBuf {
    match std::env::var_os("RVPN_RUN") {
        Some(run) => PathBuf::from(run).join("kept/resolvers.json"),
        None => PathBuf::from("/var/lib/rvpn-client/resolvers.json"),
    }
}

/// Resolvers that were replaced and not put back, as far as ours are still there.
fn kept() -> Option<Resolvers> {
    let text = fs::read_to_string(kept_path()).ok()?;
    let resolvers: Resolvers = serde_json::from_str(&text).ok()?;
    let Resolvers::File { path, ours, .. } = &resolvers else {
        return None;
    };
    fs::read_to_string(path)
        .is_ok_and(|now| now == *ours)
        .then_some(resolvers)
}

/// How names were resolved before.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Resolvers {
    /// The service that manages it was told of the device; it forgets with it.
    Resolved,
    /// The file was replaced.
    File {
        /// Which.
        path: PathBuf,
        /// What was in it; nothing if there was none.
        before: Option<Before>,
        /// What was put there.
        ours: String,
    },
}

/// A file as it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Before {
    /// A link to another.
    Link(PathBuf),
    /// A file.
    File {
        /// Its content, whatever it is.
        content: Vec<u8>,
        /// Its mode.
        mode: u32,
    },
}

impl Journal {
    fn path() -> PathBuf {
        dir().join("journal.json")
    }

    /// Whether one is there; what it says is root's to know.
    pub(crate) fn is_left() -> bool {
        Journal::path().exists()
    }

    /// What is there, if anything.
    pub(crate) fn read() -> Outcome<Option<Journal>> {
        let path = Journal::path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // A machine that lost its power forgot everything but its files.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(kept().map(|resolvers| Journal {
                    resolvers: Some(resolvers),
                    ..Journal::default()
                }));
            }
            Err(error) => return Err(error).while_doing(format_args!("read {}", path.display())),
        };
        let journal = serde_json::from_str(&text);
        journal
            .map(Some)
            .while_doing(format_args!("read {}", path.display()))
    }

    /// Writes it down, durably, before what it speaks of is done.
    pub(crate) fn write(&self) -> Outcome {
        write_whole(&Journal::path(), 0o755, self)
    }

    /// Sets a file of the kernel, to be put back later.
    pub(crate) fn set(&mut self, path: PathBuf, value: &str) -> Outcome {
        let before = match fs::read_to_string(&path) {
            Ok(before) => before,
            // Its device has gone in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).while_doing(format_args!("read {}", path.display())),
        };
        if !self.sysctls.iter().any(|(known, _)| *known == path) {
            self.sysctls.push((path.clone(), before));
            self.write()?;
        }
        fs::write(&path, value).while_doing(format_args!("write {}", path.display()))
    }

    /// Takes over from an `up` that was killed, without a moment in which what
    /// it blocked is open: its rules stay until those of the next replace them,
    /// and what it found is what is put back one day.
    pub(crate) async fn take_over(&mut self, left: Journal) -> Outcome {
        self.sysctls = left.sysctls;
        self.resolvers = left.resolvers;
        self.gateway = left.gateway;
        self.write()?;
        if let Some(resolvers) = &self.resolvers {
            resolvers.put_back()?;
        }
        self.resolvers = None;
        self.write()?;
        let net = Net::open().while_doing("talk to the kernel")?;
        net.remove(&left.interface).await
    }

    /// Puts everything back; what cannot be is said, and the rest is done all
    /// the same. The journal goes last.
    pub(crate) async fn undo(self) -> Outcome {
        let mut failed = Vec::new();
        let mut note = |result: Outcome| failed.extend(result.err());
        if let Some(resolvers) = &self.resolvers {
            note(resolvers.put_back());
        }
        match Net::open() {
            Ok(net) => {
                note(net.release().await);
                if !self.interface.is_empty() {
                    note(net.remove(&self.interface).await);
                }
            }
            Err(error) => note(Err(Failure::internal(format!("no netlink: {error}")))),
        }
        for (path, before) in self.sysctls.iter().rev() {
            match fs::write(path, before) {
                // Its device is gone, and the setting with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => note(done.while_doing(format_args!("restore {}", path.display()))),
            }
        }
        if let Some(first) = failed.into_iter().next() {
            return Err(first);
        }
        match fs::remove_file(Journal::path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).while_doing("remove the journal")
            }
            _ => Ok(()),
        }
    }
}

/// What only one process at a time has: the right to change what the journal
/// speaks of.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "held, not read")] File);

impl Lock {
    /// Takes it, unless somebody has it.
    fn try_take() -> Outcome<Option<Lock>> {
        let dir = dir();
        let path = dir.join("lock");
        let open = || -> io::Result<File> {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&dir)?;
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            options.open(&path)
        };
        let file = open().while_doing(format_args!("write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => {
                Err(error).while_doing(format_args!("lock {}", path.display()))
            }
        }
    }

    /// Takes it once whoever mends has finished.
    pub(crate) async fn take() -> Outcome<Lock> {
        Lock::take_within(MENDS).await?.ok_or_else(|| {
            Failure::unavailable(
                "another 'rvpn up' or 'rvpn down' is at work: see 'rvpn status', or try again",
            )
        })
    }

    /// Takes it, or nothing if somebody keeps it that long.
    pub(crate) async fn take_within(limit: Duration) -> Outcome<Option<Lock>> {
        let begun = Instant::now();
        loop {
            let taken = Lock::try_take()?;
            if taken.is_some() || begun.elapsed() > limit {
                return Ok(taken);
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Writes it for root alone, whole or not at all, and durably.
fn write_whole(path: &Path, mode: u32, value: &impl Serialize) -> Outcome {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(dir)?;
        let fresh = path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        serde_json::to_writer(&mut file, value)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().while_doing(format_args!("write {}", path.display()))
}

impl Resolvers {
    /// Keeps it where a restart of the machine does not reach.
    pub(super) fn keep(&self) -> Outcome {
        write_whole(&kept_path(), 0o700, self)
    }

    fn put_back(&self) -> Outcome {
        let done = self.restore();
        if done.is_ok() {
            // If it is gone, somebody was faster.
            let _gone = fs::remove_file(kept_path());
        }
        done
    }

    fn restore(&self) -> Outcome {
        let Resolvers::File { path, before, ours } = self else {
            return Ok(());
        };
        let name = path.display();
        match fs::read(path) {
            Ok(now) if now == ours.as_bytes() => {}
            // Somebody has changed it since: theirs counts.
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).while_doing(format_args!("read {name}")),
        }
        let done = match before {
            None => fs::remove_file(path),
            Some(Before::Link(to)) => replace_by_link(path, to),
            Some(Before::File { content, mode }) => replace(path, content, *mode),
        };
        done.while_doing(format_args!("restore {name}"))
    }
}

fn replace_by_link(path: &Path, to: &Path) -> io::Result<()> {
    let fresh = path.with_extension("rvpn-new");
    let _old = fs::remove_file(&fresh);
    std::os::unix::fs::symlink(to, &fresh)?;
    fs::rename(&fresh, path)
}

/// Replaces a file at once, or, where it is a mount point, its content.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let fresh = path.with_extension("rvpn-new");
    let _old = fs::remove_file(&fresh);
    let swap = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&fresh)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    match swap() {
        Err(error) if is_mount(&error) => {
            let _fresh = fs::remove_file(&fresh);
            fs::write(path, content)
        }
        done => done,
    }
}

fn is_mount(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::EXDEV | libc::EROFS)
    )
}
