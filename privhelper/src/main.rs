//! The privileged helper of RVPN: owns the TUN pool and the rules around it.
//!
//! Synchronous, without dependencies that parse, and with `CAP_NET_ADMIN` as
//! its only privilege. See ARCHITECTURE.md for its place, `config` for what the
//! administrator decides, `pool` for what happens to a slot.

/// One line to the log, with its priority where the journal reads it. That nobody
/// reads it, or that it is full, is no reason to stop.
macro_rules! say {
    (critical: $($text:tt)*) => { say!(2, $($text)*) };
    (error: $($text:tt)*) => { say!(3, $($text)*) };
    (warning: $($text:tt)*) => { say!(4, $($text)*) };
    (notice: $($text:tt)*) => { say!(5, $($text)*) };
    ($priority:literal, $($text:tt)*) => {{
        use std::io::Write as _;
        let line = match std::env::var_os("JOURNAL_STREAM") {
            Some(_) => format!("<{}>{}\n", $priority, format_args!($($text)*)),
            None => format!("rvpn-privhelper: {}\n", format_args!($($text)*)),
        };
        let _ = std::io::stderr().write_all(line.as_bytes());
    }};
}

mod apply;
mod check;
mod cleaner;
mod config;
mod confine;
#[cfg(feature = "fault-hooks")]
#[path = "../tests/hooks/fault.rs"]
mod fault;
mod kernel;
mod notify;
mod plan;
mod pool;
mod serve;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use rvpn_ipc::seqpacket;

use config::Config;
use kernel::{Kernel, link, raw, ruleset, sysctl};

const DEFAULT_CONFIG: &str = "/etc/rvpn/privhelper.conf";
const BACKLOG: i32 = 8;
const USAGE: &str = "\
usage: rvpn-privhelper COMMAND [--config FILE]

  provision        make the devices and rules, without serving
  serve            provision what is missing and serve the gateway
  status [--json]  what is there
  check            whether this host can carry the configuration
  teardown         remove every trace

The configuration is /etc/rvpn/privhelper.conf unless named.
Exit status: 0 done, 1 usage, 69 unavailable, 70 internal error, 78 configuration.
";

/// How a command ended badly: exit status and reason.
struct Failure(u8, String);

const BAD_USAGE: u8 = 1;
const UNAVAILABLE: u8 = 69;
const INTERNAL: u8 = 70;
const BAD_CONFIG: u8 = 78;

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        match e.kind() {
            io::ErrorKind::AlreadyExists => Failure(BAD_CONFIG, e.to_string()),
            io::ErrorKind::PermissionDenied => {
                let remedy = "CAP_NET_ADMIN is needed: run it as root";
                Failure(UNAVAILABLE, format!("{e}; {remedy}"))
            }
            _ => Failure(INTERNAL, e.to_string()),
        }
    }
}

/// What cannot be had at this place, or must not.
fn unavailable(place: &Path) -> impl Fn(io::Error) -> Failure {
    let code = |e: &io::Error| match e.kind() {
        io::ErrorKind::AlreadyExists => BAD_CONFIG,
        _ => UNAVAILABLE,
    };
    move |e| Failure(code(&e), format!("{}: {e}", place.display()))
}

fn main() -> ExitCode {
    // Half alive is worse than dead: whoever supervises starts a whole one.
    std::panic::set_hook(Box::new(|info| {
        say!(critical: "internal error: {info}");
        std::process::exit(INTERNAL.into());
    }));
    let Err(Failure(code, text)) = run() else {
        return ExitCode::SUCCESS;
    };
    let usage = if code == BAD_USAGE { USAGE } else { "" };
    say!(error: "{}", format!("{text}\n{usage}").trim_end());
    ExitCode::from(code)
}

fn run() -> Result<(), Failure> {
    let wrong = |e: io::Error| Failure(BAD_CONFIG, e.to_string());
    let passed = sd_notify::listen_fds().map_err(wrong)?.len() as u64;
    confine::settle(passed).map_err(wrong)?;
    // What is no text is understood by nobody further down.
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let args: Vec<_> = args.iter().map(|a| a.to_string_lossy()).collect();
    let mut words: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let mut path = DEFAULT_CONFIG;
    if let Some(at) = words.iter().position(|w| *w == "--config") {
        path = words.get(at + 1).copied().unwrap_or_default();
        words.drain(at..words.len().min(at + 2));
    }
    if !path.starts_with('/') {
        let why = "--config needs the absolute path of a file";
        return Err(Failure(BAD_USAGE, format!("{why}, not '{path}'")));
    }
    let load = || config::load(path.as_ref()).map_err(|e| Failure(BAD_CONFIG, e));
    let config = || load().map(Arc::new);
    match words[..] {
        ["--help" | "-h", ..] | [.., "--help" | "-h"] => print!("{USAGE}"),
        ["--version" | "-V", ..] => println!("rvpn-privhelper {}", env!("CARGO_PKG_VERSION")),
        ["provision"] => provision(&config()?)?,
        ["serve"] => serve(config()?, passed)?,
        ["status"] => status(&config()?, false)?,
        ["status", "--json"] => status(&config()?, true)?,
        ["check"] => check(&mut Kernel::open(&config()?)?, true)?,
        ["teardown"] => teardown(&config()?)?,
        [] => return Err(Failure(BAD_USAGE, "a command is needed".to_owned())),
        _ => {
            let why = format!("'{}' is not understood", words.join(" "));
            return Err(Failure(BAD_USAGE, why));
        }
    }
    Ok(())
}

/// Held while this process changes anything; the kernel lets go of it with the process.
fn lock(config: &Config) -> io::Result<Flock<File>> {
    let state = &config.state;
    DirBuilder::new().recursive(true).create(state)?;
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true);
    let file = options.open(config.lock_path())?;
    if geteuid().is_root() {
        chown(state, Some(config.helper.uid), Some(config.helper.gid))?;
    }
    let held = "held: another rvpn-privhelper is running, stop it first";
    let refused = |_| io::Error::new(io::ErrorKind::AlreadyExists, held);
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(refused)
}

/// Refuses a host that cannot carry the configuration, and says what is merely odd;
/// `show` prints every finding instead.
fn check(k: &mut Kernel, show: bool) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    for (weight, text) in check::host(k)? {
        if show {
            println!("{weight:<8} {text}");
        } else if weight == check::WARNING {
            say!(warning: "warning: {text}");
        }
        if weight == check::WRONG {
            wrong.push(text);
        }
    }
    match wrong.len() {
        0 => return Ok(()),
        n if show => wrong = vec![format!("{n} of these must be mended first")],
        _ => {}
    }
    Err(Failure(BAD_CONFIG, wrong.join("\n")))
}

fn provision(config: &Arc<Config>) -> Result<(), Failure> {
    let _lock = lock(config).map_err(unavailable(&config.state))?;
    confine::drop_privileges(config)?;
    let mut k = Kernel::open(config)?;
    check(&mut k, false)?;
    let before = apply::survey(&mut k, None)?.ours.len();
    let uplinks = apply::uplinks(&mut k)?;
    let (pool, rules) = serve::adopt(&mut k, &uplinks)?;
    let (all, n) = (pool.entries.len(), uplinks.len());
    let made = all - before;
    println!("{all} devices ({made} new), {rules} rules in table inet rvpn, {n} uplink(s)");
    Ok(())
}

fn serve(config: Arc<Config>, passed: u64) -> Result<(), Failure> {
    // Let go of by the kernel, with the process: unlocking is no call the filter allows.
    let lock = lock(&config).map_err(unavailable(&config.state))?;
    let _lock = ManuallyDrop::new(lock);
    let notify = notify::Notify::from_env();
    let listener = match passed {
        0 => listen(&config),
        _ => raw::passed(3),
    };
    let listener = listener.map_err(unavailable(&config.socket))?;
    confine::drop_privileges(&config)?;
    // The gateway checks who serves it: that is us as we are from now on, not root.
    seqpacket::listen_again(listener.as_fd(), BACKLOG)?;
    check(&mut Kernel::open(&config)?, false)?;
    Ok(serve::run(config, listener, notify)?)
}

/// A socket of our own in a directory others cannot write.
fn listen(config: &Config) -> io::Result<OwnedFd> {
    let (path, root) = (&config.socket, geteuid().is_root());
    let gateway = Some(config.gateway.gid);
    let dir = path.parent().unwrap_or(Path::new("/"));
    if !dir.exists() {
        DirBuilder::new().recursive(true).create(dir)?;
        if root {
            chown(dir, None, gateway)?;
        }
        fs::set_permissions(dir, Permissions::from_mode(0o750))?;
    }
    let meta = fs::symlink_metadata(dir)?;
    let safe = meta.uid() == 0 || meta.uid() == geteuid().as_raw();
    if !meta.is_dir() || !safe || meta.mode() & 0o022 != 0 {
        let wanted = "must be a directory of root's that nobody else can write";
        let text = format!("{} {wanted}: chown root, chmod 0750", dir.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    // The lock proves that whoever made a socket there is gone.
    sysctl::if_there(fs::remove_file(path))?;
    let listener = seqpacket::listen(path, BACKLOG)?;
    if root {
        chown(path, Some(config.helper.uid), gateway)?;
    }
    fs::set_permissions(path, Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// What is there by the kernel's account alone: no helper is asked, so none need be alive.
fn status(config: &Arc<Config>, json: bool) -> Result<(), Failure> {
    let mut k = Kernel::open(config)?;
    let found = apply::survey(&mut k, None)?;
    let rules = ruleset::rules_present(&mut k).unwrap_or(0);
    let leased = found.ours.iter().filter(|d| d.0.lease.is_some()).count();
    let unsound = found.ours.iter().filter(|d| !d.1).count();
    let (devices, foreign) = (found.ours.len(), found.foreign.len());
    let free = devices - leased;
    let mut uplinks = Vec::new();
    for index in apply::uplinks(&mut k)? {
        uplinks.extend(link::get(&mut k, Some(index))?.pop().map(|l| l.name));
    }
    let serving = check::listening(&config.socket)?;
    if json {
        let counts = format!(r#""devices":{devices},"free":{free},"leased":{leased}"#);
        let rest = format!(r#""unsound":{unsound},"foreign":{foreign},"rules":{rules}"#);
        // A list of interface names is written the same in Rust and in JSON.
        println!(r#"{{{counts},{rest},"uplinks":{uplinks:?},"serving":{serving}}}"#);
        return Ok(());
    }
    println!("{devices} devices: {free} free, {leased} with a lease, {unsound} not as made");
    println!("{rules} rules in table inet rvpn");
    println!("uplinks: {}", uplinks.join(", "));
    println!("{} helper is serving", if serving { "a" } else { "no" });
    for name in found.foreign {
        println!("in the way: {name}, not made by this helper");
    }
    Ok(())
}

fn teardown(config: &Arc<Config>) -> Result<(), Failure> {
    let lock = lock(config).map_err(unavailable(&config.state))?;
    let (devices, sysctls, kept) = apply::teardown(&mut Kernel::open(config)?)?;
    drop(lock);
    // It is ours only when nothing else is in it.
    let _ = fs::remove_dir(&config.state);
    println!("removed {devices} devices and table inet rvpn, put back {sysctls} sysctls");
    for name in kept {
        println!("kept {name}: not made by this helper");
    }
    Ok(())
}
