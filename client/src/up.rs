//! `rvpn up`: this machine's traffic through a gateway.
//!
//! Two processes: this one has rights and reads only what the kernel, the user
//! and its own other half say; the other half reads what strangers send and has
//! no rights (see [`carry`]). A third, without a part in it, waits for this one
//! to die and then mends what it left behind.

mod apart;
pub(crate) mod carry;
mod control;
mod device;
mod dial;
mod dns;
pub(crate) mod fd;
mod half;
pub(crate) mod journal;
pub(crate) mod mend;
mod net;
mod parent;
mod plan;
mod pump;
mod rules;
mod wire;

pub(crate) use self::control::{down, status};
pub(crate) use self::fd::can_go_far;
pub(crate) use self::net::may_change;
pub(crate) use self::rules::MARK;

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::{Pid, setsid};
use serde_json::Value;

use crate::cli::Up;
use crate::fail::{Failure, Kind, Outcome, While as _};

/// How long the background process may take to connect.
const READY: Duration = Duration::from_secs(60);

/// Tells the background process that it is one; its words are those of the first.
const BACKGROUND: &str = "RVPN_BACKGROUND";

/// Begins, and stays until it is told to end.
pub(crate) async fn run(args: Up) -> Outcome {
    if !may_change() {
        return Err(Failure::new(
            Kind::Refused,
            "this changes routes and needs root: run 'sudo rvpn up' \
             ('rvpn ping' works without)",
        ));
    }
    if let Some(state) = control::ask("status").await? {
        return Err(already(&state));
    }
    let background = std::env::var_os(BACKGROUND).is_some();
    if background {
        leave_terminal();
    }
    match args.detach && !background {
        true => detach().await,
        false => parent::run(args).await,
    }
}

/// There is one, as it says of itself.
fn already(state: &Value) -> Failure {
    Failure::usage(format!(
        "a tunnel to {} is up already: end it first with 'sudo rvpn down'",
        state["gateway"].as_str().unwrap_or("a gateway")
    ))
}

/// Whether one is up on this machine.
pub(crate) async fn is_up() -> bool {
    matches!(control::ask("status").await, Ok(Some(_)))
}

/// Starts the same in the background and waits until it is connected.
async fn detach() -> Outcome {
    let dir = journal::dir();
    std::fs::create_dir_all(&dir).while_doing(format_args!("make {}", dir.display()))?;
    // Of this attempt alone, until it has come about.
    let path = dir.join(format!("up-{}.log", std::process::id()));
    let log = std::fs::File::create(&path).while_doing(format_args!("write {}", path.display()))?;
    let again = log.try_clone().while_doing("write the log")?;
    let words = std::env::args_os().skip(1);
    let exe = std::env::current_exe().while_doing("find this program")?;
    let mut command = Command::new(exe);
    command
        .args(words)
        .env(BACKGROUND, "1")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(again);
    let mut child = command.spawn().while_doing("start in the background")?;
    let start = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    loop {
        ticks.tick().await;
        let said = || std::fs::read_to_string(&path).unwrap_or_default();
        if let Some(status) = child
            .try_wait()
            .while_doing("watch the background process")?
        {
            eprint!("{}", said());
            // Nobody misses it if it stays.
            let _shown = std::fs::remove_file(&path);
            std::process::exit(status.code().unwrap_or(70));
        }
        let state = control::ask("status").await?;
        if state.is_some_and(|s| s["state"] == "connected" && s["pid"] == child.id()) {
            print!("{}", said());
            let (attempt, path) = (path, dir.join("up.log"));
            std::fs::rename(attempt, &path)
                .while_doing(format_args!("write {}", path.display()))?;
            println!("going on in the background; its log is {}", path.display());
            return std::io::stdout().flush().while_doing("write");
        }
        if start.elapsed() > READY {
            eprint!("{}", said());
            return Err(Failure::unavailable(format!(
                "not connected after {} s; it goes on trying, 'sudo rvpn down' ends it",
                READY.as_secs()
            )));
        }
    }
}

/// Leaves the terminal behind, so that its signals and its end do not reach us.
fn leave_terminal() {
    // It fails only for one who has left it already.
    let _left: nix::Result<Pid> = setsid();
}
