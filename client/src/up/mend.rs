//! Who waits for `up` to die, and puts back what it left.

use std::io::Read as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use super::journal::{Journal, Lock};
use super::leave_terminal;
use crate::fail::{Outcome, While as _};

/// How long the end of a process may take.
const DIES: Duration = Duration::from_secs(2);
/// What says that nothing is left to mend.
const DONE: u8 = b'.';

/// Started by `up`.
pub(crate) struct Mender {
    process: Child,
    line: Option<ChildStdin>,
}

impl Mender {
    /// Starts it. It has nothing to do as long as we live.
    pub(crate) fn start() -> Outcome<Mender> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("__mend")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        let mut process = command
            .spawn()
            .while_doing("start the process that mends")?;
        let line = process.stdin.take();
        Ok(Mender { process, line })
    }

    /// Everything was put back already.
    pub(crate) fn dismiss(mut self) {
        use std::io::Write as _;
        if let Some(mut line) = self.line.take() {
            // If it is gone, it mends nothing.
            let _gone = line.write_all(&[DONE]);
        }
        let _status = self.process.wait();
    }
}

/// The process itself.
pub(crate) async fn run() -> Outcome {
    leave_terminal();
    let mut said = Vec::new();
    std::io::stdin()
        .read_to_end(&mut said)
        .while_doing("wait")?;
    if said.contains(&DONE) {
        return Ok(());
    }
    // One who dies may lose it a moment later. Whoever else has it puts back
    // what is found.
    let Some(_lock) = Lock::take_within(DIES).await? else {
        return Ok(());
    };
    match Journal::read()? {
        Some(journal) => journal.undo().await,
        None => Ok(()),
    }
}
