//! Where a user's files are, also under sudo, and how they are kept private.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, User, geteuid, setegid, seteuid};

use crate::fail::{Failure, Kind, Outcome, While as _};

/// The user on whose behalf this runs: under sudo the one who called it.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    /// Their number.
    pub(crate) uid: Uid,
    /// Their group.
    pub(crate) gid: Gid,
    home: PathBuf,
}

impl Owner {
    /// Of this process.
    pub(crate) fn current() -> Outcome<Owner> {
        let me = geteuid();
        let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
        let sudo = number("SUDO_UID").filter(|_| me.is_root());
        let uid = sudo.map_or(me, Uid::from_raw);
        let known = User::from_uid(uid).while_doing("read the list of users")?;
        if sudo.is_none()
            && let Some(home) = std::env::var_os("HOME").filter(|h| !h.is_empty())
        {
            let gid = known.map_or_else(nix::unistd::getegid, |u| u.gid);
            let home = home.into();
            return Ok(Owner { uid, gid, home });
        }
        let user = known.ok_or_else(|| {
            Failure::new(
                Kind::Config,
                format!("user {uid} has no home directory: set HOME"),
            )
        })?;
        Ok(Owner {
            uid,
            gid: user.gid,
            home: user.dir,
        })
    }

    /// The directory of this program's configuration.
    pub(crate) fn config_dir(&self) -> PathBuf {
        let asked = std::env::var_os("RVPN_HOME").filter(|d| !d.is_empty());
        match asked {
            Some(dir) => dir.into(),
            None => self.home.join(".config/rvpn"),
        }
    }

    /// Does what follows with this user's rights, as far as files go: root has no
    /// business in somebody's home.
    pub(crate) fn act(&self) -> Outcome<Acting> {
        if !geteuid().is_root() || self.uid.is_root() {
            return Ok(Acting { back: false });
        }
        setegid(self.gid).while_doing("act as the user who called sudo")?;
        let acting = Acting { back: true };
        seteuid(self.uid).while_doing("act as the user who called sudo")?;
        Ok(acting)
    }

    /// Writes a file that nobody else reads, whole or not at all.
    pub(crate) fn write_private(&self, path: &Path, content: &[u8]) -> Outcome {
        let _owner = self.act()?;
        let dir = path.parent().filter(|d| !d.as_os_str().is_empty());
        let dir = dir.unwrap_or(Path::new("."));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .while_doing(format_args!("make the directory {}", dir.display()))?;
        let fresh = path.with_extension("new");
        let write = || -> io::Result<()> {
            // Not through a link, and not into a file that others had open.
            match fs::remove_file(&fresh) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&fresh, path)?;
            File::open(dir)?.sync_all()
        };
        write().while_doing(format_args!("write {}", path.display()))
    }

    /// Reads a file of theirs that holds a secret.
    pub(crate) fn read_private(&self, path: &Path) -> Outcome<String> {
        let _owner = self.act()?;
        read_private(path)
    }
}

/// As long as this lives, the process acts as somebody else.
#[must_use]
pub(crate) struct Acting {
    back: bool,
}

impl Drop for Acting {
    fn drop(&mut self) {
        if self.back {
            // Root may always become root again, as its other ids still are.
            let _root = (seteuid(Uid::from_raw(0)), setegid(Gid::from_raw(0)));
        }
    }
}

/// Reads a file that holds a secret; one that others may read is refused.
pub(crate) fn read_private(path: &Path) -> Outcome<String> {
    let name = path.display();
    let config = |message: String| Failure::new(Kind::Config, message);
    let meta = fs::metadata(path).map_err(|e| config(format!("cannot read {name}: {e}")))?;
    if meta.is_file() && meta.permissions().mode() & 0o077 != 0 {
        return Err(config(format!(
            "{name} may be read by others (mode {:04o}): run 'chmod 600 {name}'",
            meta.mode() & 0o7777
        )));
    }
    fs::read_to_string(path).map_err(|e| config(format!("cannot read {name}: {e}")))
}
