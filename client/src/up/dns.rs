//! Names go to the tunnel's resolvers while it is up.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::journal::{Before, Journal, Resolvers, replace};
use crate::fail::{Failure, Outcome, While as _};

const FILE: &str = "/etc/resolv.conf";

/// Whether systemd-resolved answers for this machine.
pub(crate) fn is_resolved() -> bool {
    let managed =
        fs::read_link(FILE).is_ok_and(|to| to.to_string_lossy().contains("systemd/resolve"));
    managed && Path::new("/run/systemd/resolve/io.systemd.Resolve").exists()
}

/// Makes these the machine's resolvers.
pub(crate) fn point(journal: &mut Journal, resolvers: &[IpAddr]) -> Outcome {
    if resolvers.is_empty() {
        return Ok(());
    }
    match is_resolved() {
        true => by_service(journal, resolvers),
        false => by_file(journal, resolvers),
    }
}

fn by_service(journal: &mut Journal, resolvers: &[IpAddr]) -> Outcome {
    journal.resolvers = Some(Resolvers::Resolved);
    journal.write()?;
    let device = journal.interface.clone();
    let servers: Vec<String> = resolvers.iter().map(IpAddr::to_string).collect();
    let ask = |verb: &str, words: &[String]| -> Outcome {
        let status = Command::new("/usr/bin/resolvectl")
            .env_clear()
            .arg(verb)
            .arg(&device)
            .args(words)
            .stdin(Stdio::null())
            .status()
            .while_doing("run resolvectl (--no-dns leaves the resolvers alone)")?;
        match status.success() {
            true => Ok(()),
            false => Err(Failure::internal(format!(
                "'resolvectl {verb} {device}' failed: {status}"
            ))),
        }
    };
    ask("dns", &servers)?;
    // All names, before those of other devices.
    ask("domain", &["~.".to_owned()])?;
    ask("default-route", &["yes".to_owned()])
}

fn by_file(journal: &mut Journal, resolvers: &[IpAddr]) -> Outcome {
    let path = PathBuf::from(FILE);
    let mut ours =
        String::from("# Written by rvpn up, which puts the one before back when it ends.\n");
    // Programs read three.
    for resolver in resolvers.iter().take(3) {
        ours.push_str(&format!("nameserver {resolver}\n"));
    }
    if !matches!(&journal.resolvers, Some(Resolvers::File { .. })) {
        let before = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_symlink() => Some(Before::Link(
                fs::read_link(&path).while_doing("read resolv.conf")?,
            )),
            Ok(meta) => Some(Before::File {
                content: fs::read(&path).while_doing("read resolv.conf")?,
                mode: meta.permissions().mode(),
            }),
            Err(_) => None,
        };
        journal.resolvers = Some(Resolvers::File {
            path: path.clone(),
            before,
            ours: ours.clone(),
        });
    } else if let Some(Resolvers::File { ours: written, .. }) = &mut journal.resolvers {
        written.clone_from(&ours);
    }
    journal.write()?;
    if let Some(resolvers) = &journal.resolvers {
        resolvers.keep()?;
    }
    replace(&path, ours.as_bytes(), 0o644).while_doing("replace resolv.conf")
}
