//! The privileged helper of RVPN: owns the TUN pool and the rules around it.
//!
//! Synchronous, without dependencies that parse, and with `CAP_NET_ADMIN` as
//! its only privilege. See ARCHITECTURE.md for its place, `config` for what the
//! administrator decides, `pool` for what happens to a slot.

/// One line to the log, with its priority where the journal reads it. That nobody
/// reads it, or that it is full, is no reason to stop.
macro_rules! say {
    ($priority:expr, $($text:tt)*) => {{
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
mod fault;
mod journal;
mod kernel;
mod notify;
mod plan;
mod pool;
mod serve;
mod undo;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use rvpn_ipc::seqpacket;

use check::Finding;
use config::Config;
use config::parse::Invalid;
use kernel::Kernel;

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

/// How a command ended badly.
enum Failure {
    Usage(String),
    Config(String),
    Unavailable(String),
    Internal(String),
}

impl From<Invalid> for Failure {
    fn from(e: Invalid) -> Failure {
        Failure::Config(e.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        match e.kind() {
            io::ErrorKind::AlreadyExists => Failure::Config(e.to_string()),
            io::ErrorKind::PermissionDenied => {
                Failure::Unavailable(format!("{e}; CAP_NET_ADMIN is needed: run it as root"))
            }
            _ => Failure::Internal(e.to_string()),
        }
    }
}

fn main() -> ExitCode {
    // Half alive is worse than dead: whoever supervises starts a whole one.
    std::panic::set_hook(Box::new(|info| {
        say!(2, "internal error: {info}");
        std::process::exit(70);
    }));
    let (code, text) = match run() {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(t)) => (1, format!("{t}\n{USAGE}")),
        Err(Failure::Config(t)) => (78, t),
        Err(Failure::Unavailable(t)) => (69, t),
        Err(Failure::Internal(t)) => (70, t),
    };
    say!(3, "{text}");
    ExitCode::from(code)
}

struct Arguments {
    command: String,
    config: PathBuf,
    json: bool,
}

fn arguments() -> Result<Option<Arguments>, Failure> {
    let mut found = Arguments {
        command: String::new(),
        config: DEFAULT_CONFIG.into(),
        json: false,
    };
    // What is no text is understood by nobody further down.
    let text = |a: std::ffi::OsString| a.to_string_lossy().into_owned();
    let mut args = std::env::args_os().skip(1).map(text);
    while let Some(a) = args.next() {
        match a.as_str() {
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(None);
            }
            "--version" | "-V" => {
                println!("rvpn-privhelper {}", env!("CARGO_PKG_VERSION"));
                return Ok(None);
            }
            "--config" => match args.next() {
                Some(path) if Path::new(&path).is_absolute() => found.config = path.into(),
                Some(path) => {
                    return Err(Failure::Usage(format!(
                        "--config '{path}' is not an absolute path"
                    )));
                }
                None => return Err(Failure::Usage("--config needs a file".to_owned())),
            },
            "--json" if found.command == "status" => found.json = true,
            "provision" | "serve" | "status" | "check" | "teardown" if found.command.is_empty() => {
                found.command = a;
            }
            _ => return Err(Failure::Usage(format!("'{a}' is not understood here"))),
        }
    }
    if found.command.is_empty() {
        return Err(Failure::Usage("a command is needed".to_owned()));
    }
    Ok(Some(found))
}

fn run() -> Result<(), Failure> {
    let listeners = notify::passed_listeners();
    confine::settle(listeners).map_err(|e| Failure::Config(e.to_string()))?;
    let Some(args) = arguments()? else {
        return Ok(());
    };
    let config = config::parse::load(&args.config)?;
    match args.command.as_str() {
        "provision" => provision(&config),
        "serve" => serve(config, listeners),
        "status" => status(&config, args.json),
        "check" => check(&config),
        _ => teardown(&config),
    }
}

/// Held while this process changes anything; the kernel lets go of it with the process.
fn lock(config: &Config) -> Result<Flock<File>, Failure> {
    let failed = |e: io::Error| Failure::Unavailable(format!("{}: {e}", config.state.display()));
    if !config.state.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(&config.state)
            .map_err(failed)?;
    }
    let path = config.lock_path();
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    if geteuid().is_root() {
        chown(
            &config.state,
            Some(config.helper_uid),
            Some(config.helper_gid),
        )
        .map_err(failed)?;
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        Failure::Config(format!(
            "{} is held: another rvpn-privhelper is running, stop it first",
            path.display()
        ))
    })
}

/// Refuses a host that cannot carry the configuration, and warns of what is merely odd.
fn insist(k: &mut Kernel, config: &Config) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    for finding in check::host(k, config)? {
        match finding {
            Finding::Wrong(t) => wrong.push(t),
            Finding::Warning(t) => say!(4, "warning: {t}"),
            Finding::Good(_) => {}
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(Failure::Config(wrong.join("\n")))
    }
}

fn provision(config: &Config) -> Result<(), Failure> {
    let lock = lock(config)?;
    confine::drop_privileges(config)?;
    let mut k = Kernel::open()?;
    insist(&mut k, config)?;
    let before = apply::survey(&mut k, config)?.ours.len();
    let uplinks = kernel::host::uplinks(&mut k, config)?;
    let (pool, rules) = serve::adopt(&mut k, config, &uplinks)?;
    let (all, made) = (
        pool.len() as usize,
        (pool.len() as usize).saturating_sub(before),
    );
    println!(
        "{all} devices ({made} new), {rules} rules in table inet rvpn, {} uplink(s)",
        uplinks.len()
    );
    drop(lock);
    Ok(())
}

/// The split between the halves is one between users. A user namespace may have but one.
fn two_users(config: &Config) -> Result<(), Failure> {
    let (helper, gateway) = (config.helper_uid, config.gateway_uid);
    if confine::in_user_namespace() || (helper != gateway && helper != 0 && gateway != 0) {
        return Ok(());
    }
    Err(Failure::Config(format!(
        "helper-user is uid {helper} and gateway-user is uid {gateway}: each needs a user of its own, which is not root's"
    )))
}

fn serve(config: Config, passed: u32) -> Result<(), Failure> {
    two_users(&config)?;
    // Let go of by the kernel, with the process: unlocking is no call the filter allows.
    let _lock = ManuallyDrop::new(lock(&config)?);
    let notify = notify::Notify::from_env();
    let listener = listen(&config, passed)?;
    confine::drop_privileges(&config)?;
    // The gateway checks who serves it: that is us as we are from now on, not root.
    seqpacket::listen_again(listener.as_fd(), BACKLOG)?;
    insist(&mut Kernel::open()?, &config)?;
    Ok(serve::run(config, listener, notify)?)
}

/// The socket passed in, or one of our own in a directory others cannot write.
fn listen(config: &Config, passed: u32) -> Result<OwnedFd, Failure> {
    if passed > 0 {
        return confine::landlock::passed(3)
            .map_err(|e| Failure::Unavailable(format!("the socket passed in: {e}")));
    }
    let path = &config.socket;
    let failed = |e: io::Error| Failure::Unavailable(format!("{}: {e}", path.display()));
    let dir = path.parent().unwrap_or(Path::new("/"));
    if !dir.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(dir)
            .map_err(failed)?;
        if geteuid().is_root() {
            chown(dir, None, Some(config.gateway_gid)).map_err(failed)?;
        }
        fs::set_permissions(dir, Permissions::from_mode(0o750)).map_err(failed)?;
    }
    let meta = fs::symlink_metadata(dir).map_err(failed)?;
    let trusted = meta.is_dir()
        && (meta.uid() == 0 || meta.uid() == geteuid().as_raw())
        && meta.mode() & 0o022 == 0;
    if !trusted {
        return Err(Failure::Config(format!(
            "{}: must be a directory of root's that nobody else can write: chown root, chmod 0750",
            dir.display()
        )));
    }
    // The lock proves that whoever made a socket there is gone.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = seqpacket::listen(path, BACKLOG).map_err(failed)?;
    if geteuid().is_root() {
        chown(path, Some(config.helper_uid), Some(config.gateway_gid)).map_err(failed)?;
    }
    fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

fn check(config: &Config) -> Result<(), Failure> {
    let mut findings = check::host(&mut Kernel::open()?, config)?;
    if let Err(Failure::Config(t)) = two_users(config) {
        findings.push(Finding::Wrong(t));
    }
    let mut wrong = 0;
    for finding in findings {
        match finding {
            Finding::Wrong(t) => {
                wrong += 1;
                println!("wrong    {t}");
            }
            Finding::Warning(t) => println!("warning  {t}"),
            Finding::Good(t) => println!("good     {t}"),
        }
    }
    if wrong == 0 {
        Ok(())
    } else {
        Err(Failure::Config(format!(
            "{wrong} of these must be mended first"
        )))
    }
}

/// What is there by the kernel's account alone: no helper is asked, so none need be alive.
fn status(config: &Config, json: bool) -> Result<(), Failure> {
    let mut k = Kernel::open()?;
    let found = apply::survey(&mut k, config)?;
    let rules = kernel::ruleset::rules_present(&mut k).unwrap_or(0);
    let leased = found.ours.iter().filter(|d| d.tag.lease.is_some()).count();
    let unsound = found.ours.iter().filter(|d| !d.sound).count();
    let (devices, foreign) = (found.ours.len(), found.foreign.len());
    let free = devices - leased;
    let mut uplinks = Vec::new();
    for index in kernel::host::uplinks(&mut k, config)? {
        uplinks.push(kernel::link::get(&mut k.route, index)?.name);
    }
    let serving = kernel::host::listening(&config.socket)?;
    if json {
        // A list of interface names is written the same in Rust and in JSON.
        println!(
            "{{\"devices\":{devices},\"free\":{free},\"leased\":{leased},\"unsound\":{unsound},\"foreign\":{foreign},\"rules\":{rules},\"uplinks\":{uplinks:?},\"serving\":{serving}}}"
        );
        return Ok(());
    }
    let served = if serving { "a" } else { "no" };
    println!(
        "{devices} devices: {free} free, {leased} with a lease, {unsound} not as made\n{rules} rules in table inet rvpn\nuplinks: {}\n{served} helper is serving",
        if uplinks.is_empty() {
            "none".to_owned()
        } else {
            uplinks.join(", ")
        }
    );
    for name in found.foreign {
        println!("in the way: {name}, not made by this helper");
    }
    Ok(())
}

fn teardown(config: &Config) -> Result<(), Failure> {
    let lock = lock(config)?;
    let removed = undo::teardown(&mut Kernel::open()?, config)?;
    drop(lock);
    // Both are ours only when nothing else is in them.
    let _ = fs::remove_dir(&config.state);
    println!(
        "removed {} devices and table inet rvpn, put back {} sysctls",
        removed.devices,
        removed.sysctls.len()
    );
    for name in removed.kept {
        println!("kept {name}: not made by this helper");
    }
    Ok(())
}
