//! What is done with the rights the process was started with.

use std::fs;
use std::io::{self, IsTerminal};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::geteuid;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use super::{Failure, load};
use crate::config::{AdminAddress, Config, KeySource, LogFile, LogTo};
use crate::front::listeners::Origin;
use crate::listener::{self, inherited::Inherited};
use crate::log::Rotating;

/// What is carried over into the locked-in process.
pub(super) struct Prepared {
    pub(super) path: PathBuf,
    pub(super) config: Config,
    pub(super) public: Vec<(TcpListener, Origin)>,
    pub(super) admin: Admin,
}

/// The admin listener.
pub(super) enum Admin {
    Tcp(TcpListener),
    Unix(UnixListener),
}

pub(super) fn prepare(path: &Path) -> Result<Prepared, Failure> {
    let config = load(path)?;
    start_logs(&config)?;
    raise_descriptors();
    let mut inherited =
        Inherited::take().map_err(|e| Failure::Unavailable(anyhow!("socket activation: {e}")))?;
    let public = config
        .listeners
        .iter()
        .map(|l| {
            match inherited.claim(l.address) {
                Some(socket) => listener::adopt(&socket).map(|()| (socket, Origin::Inherited)),
                None => listener::bind(l.address).map(|socket| (socket, Origin::Config)),
            }
            .map_err(|error| bind_failure(&l.address.to_string(), error))
        })
        .collect::<Result<_, _>>()?;
    if let [first, ..] = inherited.rest()[..] {
        return Err(Failure::Config(anyhow!(
            "the service manager passes a listener at {first}, but no [[listener]] has that address"
        )));
    }
    state_dir(&config)?;
    let admin = bind_admin(&config)?;
    lock_in(path, &config)?;
    Ok(Prepared {
        path: path.to_owned(),
        config,
        public,
        admin,
    })
}

fn bind_failure(address: &str, error: io::Error) -> Failure {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "; another program listens there",
        io::ErrorKind::PermissionDenied => {
            "; let systemd bind low ports (rvpn-gateway.socket), or start as root with user set"
        }
        _ => "",
    };
    Failure::Unavailable(anyhow!("cannot listen at {address}: {error}{hint}"))
}

pub(super) fn log_filter(config: &Config) -> Result<EnvFilter, Failure> {
    EnvFilter::try_new(&config.log.filter)
        .map_err(|e| Failure::Config(anyhow!("log.level \"{}\": {e}", config.log.filter)))
}

fn start_logs(config: &Config) -> Result<(), Failure> {
    let (to, terminal) = match &config.log.to {
        LogTo::Stderr => (BoxMakeWriter::new(io::stderr), io::stderr().is_terminal()),
        LogTo::Stdout => (BoxMakeWriter::new(io::stdout), io::stdout().is_terminal()),
        LogTo::Nowhere => (BoxMakeWriter::new(io::sink), false),
        LogTo::File(file) => (BoxMakeWriter::new(log_file(file, config.user)?), false),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(log_filter(config)?)
        .with_writer(to)
        .with_ansi(terminal);
    let started = match config.log.json {
        true => builder.json().try_init(),
        false => builder.try_init(),
    };
    started.map_err(|e| Failure::Internal(anyhow!("cannot start logging: {e}")))
}

/// The file belongs to whom the process becomes, so that a later start under
/// that user finds it writable.
fn log_file(file: &LogFile, user: Option<(u32, u32)>) -> Result<Rotating, Failure> {
    let open = || -> io::Result<Rotating> {
        let log = Rotating::open(file)?;
        if let Some((uid, gid)) = user
            && geteuid().is_root()
        {
            chown(&file.path, Some(uid), Some(gid))?;
        }
        Ok(log)
    };
    open().map_err(|e| {
        Failure::Config(anyhow!(
            "cannot write the log to {}: {e}; correct log.file, or make its directory",
            file.path.display()
        ))
    })
}

/// Every client is a socket, a TUN and a share of the rest.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files; fewer clients will fit");
    }
}

fn state_dir(config: &Config) -> Result<(), Failure> {
    let dir = &config.state_dir;
    let make = || -> io::Result<()> {
        if !dir.exists() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)?;
        }
        if let Some((uid, gid)) = config.user
            && geteuid().is_root()
        {
            chown(dir, Some(uid), Some(gid))?;
            // What a former start as root left would be unreadable from here on.
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    chown(entry.path(), Some(uid), Some(gid))?;
                }
            }
        }
        if fs::metadata(dir)?.permissions().mode() & 0o007 != 0 {
            warn!(dir = %dir.display(), "the state directory is open to others; run chmod o= on it");
        }
        Ok(())
    };
    make()
        .with_context(|| format!("cannot use the state directory {}", dir.display()))
        .map_err(Failure::Config)
}

fn bind_admin(config: &Config) -> Result<Admin, Failure> {
    let bound = match &config.admin {
        AdminAddress::Tcp(address) => listener::bind(*address).map(Admin::Tcp),
        AdminAddress::Unix(path) => bind_unix(path, config.user).map(Admin::Unix),
    };
    bound.map_err(|error| bind_failure(&config.admin.to_string(), error))
}

fn bind_unix(path: &Path, user: Option<(u32, u32)>) -> io::Result<UnixListener> {
    if path.exists() {
        if UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        // Nobody answers: it is left from a process that was killed.
        fs::remove_file(path)?;
    }
    let socket = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    if let Some((uid, gid)) = user
        && geteuid().is_root()
    {
        chown(path, Some(uid), Some(gid))?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// No right that is not needed from here on, for any thread to come.
fn lock_in(path: &Path, config: &Config) -> Result<(), Failure> {
    if !config.sandbox {
        warn!(
            "sandbox = \"off\": the process keeps all rights it was started with; never do this in production"
        );
        return Ok(());
    }
    let mut read = rvpn_sandbox::system_files();
    // A reload looks up the users that the configuration names.
    read.extend(["/etc/passwd", "/etc/group"].map(PathBuf::from));
    read.extend(beside(path));
    let named = config.certificates.iter().map(|c| &c.files);
    for files in config.certificate.iter().chain(named) {
        read.extend(beside(&files.chain));
        read.extend(beside(&files.key));
    }
    if let Some(acme) = &config.acme {
        read.extend(beside(&acme.ca_file));
    }
    for key in &config.keys {
        match &key.source {
            KeySource::Pem { file, .. } | KeySource::JwksFile(file) => read.extend(beside(file)),
            KeySource::JwksUrl { ca_file, .. } => read.extend(beside(ca_file)),
            KeySource::Secret(_) => {}
        }
    }
    let mut write = vec![config.state_dir.clone()];
    if let LogTo::File(file) = &config.log.to {
        write.extend(file.path.parent().map(Path::to_owned));
    }
    if let AdminAddress::Unix(socket) = &config.admin {
        write.extend(socket.parent().map(Path::to_owned));
    }
    let policy = rvpn_sandbox::Policy {
        read,
        write,
        sockets: config
            .helper
            .socket
            .parent()
            .into_iter()
            .map(Path::to_owned)
            .collect(),
        user: config.user,
        ..rvpn_sandbox::Policy::default()
    };
    let report = rvpn_sandbox::enter(&policy).map_err(|error| {
        Failure::Unavailable(anyhow!(
            "{error}; the gateway does not run without its sandbox (sandbox = \"off\" is for tests only)"
        ))
    })?;
    info!(?report, "locked in");
    Ok(())
}

/// The directories of a file, by its name and where that leads: whoever renews
/// a certificate puts another file or link in its place.
fn beside(path: &Path) -> Vec<PathBuf> {
    let real = path.canonicalize();
    let both = [Some(path), real.as_deref().ok()];
    let dirs = both.into_iter().flatten().filter_map(Path::parent);
    dirs.map(|dir| match dir.as_os_str().is_empty() {
        true => PathBuf::from("."),
        false => dir.to_owned(),
    })
    .collect()
}
