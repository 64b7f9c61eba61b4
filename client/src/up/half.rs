//! The other half of `up`, as the one with rights sees it; and what else that
//! one listens to.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::net::many_users;
use super::wire::{Wire, pair};
use crate::fail::{Outcome, While as _};
use crate::home::Owner;

/// Whom the other half becomes when nobody better is known.
const NOBODY: u32 = 65_534;

/// The other half.
pub(super) struct Half {
    pub(super) wire: Wire,
    process: Child,
    pub(super) has_device: bool,
}

impl Half {
    /// Starts it, as somebody else if there is anybody else.
    pub(super) fn start() -> Outcome<Half> {
        let (ours, theirs) = pair().while_doing("make a socket")?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("__carry")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            // Ctrl-C is for us; we tell it.
            .process_group(0);
        if many_users() {
            let owner = Owner::current()?;
            let (uid, gid) = match owner.uid.is_root() {
                true => (NOBODY, NOBODY),
                false => (owner.uid.as_raw(), owner.gid.as_raw()),
            };
            command.uid(uid).gid(gid);
        }
        let process = command
            .spawn()
            .while_doing("start the half that talks to the gateway")?;
        Ok(Half {
            wire: Wire::new(ours).while_doing("talk to the other half")?,
            process,
            has_device: false,
        })
    }

    /// It is over with it, whatever it still does.
    pub(super) fn finish(&mut self) -> Outcome<ExitStatus> {
        // It fails for one that has ended already.
        let _ended = self.process.kill();
        self.process
            .wait()
            .while_doing("see how the other half ended")
    }
}

/// The signals that mean the end.
pub(super) struct Signals([Signal; 3]);

impl Signals {
    /// From now on they end nothing by themselves.
    pub(super) fn new() -> Outcome<Signals> {
        let of = |kind| signal(kind).while_doing("watch for signals");
        Ok(Signals([
            of(SignalKind::interrupt())?,
            of(SignalKind::terminate())?,
            of(SignalKind::hangup())?,
        ]))
    }

    /// Waits for one.
    pub(super) async fn any(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }
}
