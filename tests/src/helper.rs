//! The real helper in the laboratory, and the tunnels it hands out.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rvpn_ipc::{Client, ClientError, Key, Kind, Lease, Reply};

use crate::capture::readable;
use crate::ns::{Daemon, Ns};
use crate::topology::{Lab, many_uids};
use crate::wait_until;

/// Length of the virtio header before every packet of a TUN.
const VIRTIO: usize = 10;
pub const HELPER_UID: u32 = 65_010;
pub const GATEWAY_UID: u32 = 65_020;

/// Where the binaries under test are.
pub fn bin(name: &str) -> PathBuf {
    let dir = std::env::var_os("RVPN_BIN_DIR").map_or_else(
        || {
            // Programs live in target/PROFILE, test executables in deps below it.
            let exe = std::env::current_exe().expect("own path");
            let dir = exe.parent().expect("target directory");
            let above = dir.ends_with("deps").then(|| dir.parent()).flatten();
            above.unwrap_or(dir).to_owned()
        },
        PathBuf::from,
    );
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is missing: cargo build --workspace --bins, or run ./dev-bin/test",
        path.display()
    );
    path
}

/// The helper with faults on demand, built beside the plain one.
pub fn faulty() -> PathBuf {
    static BUILT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    BUILT
        .get_or_init(|| {
            let dir = bin("rvpn-privhelper")
                .parent()
                .expect("directory")
                .join("faulty");
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let built = Command::new(cargo)
                .args([
                    "build",
                    "--quiet",
                    "--locked",
                    "-p",
                    "rvpn-privhelper",
                    "--features",
                    "fault-hooks",
                ])
                .arg("--target-dir")
                .arg(&dir)
                .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
                .status();
            assert!(
                built.is_ok_and(|s| s.success()),
                "the helper with fault hooks does not build"
            );
            dir.join("debug/rvpn-privhelper")
        })
        .clone()
}

/// A helper process, its configuration and its log.
pub struct Helper {
    daemon: Option<Daemon>,
    program: PathBuf,
    environment: Vec<(String, String)>,
    wrapper: Vec<String>,
    pub config: PathBuf,
    pub socket: PathBuf,
    log: PathBuf,
    /// Its user, and the gateway's: the same where only one can be told.
    pub uid: u32,
    pub gateway_uid: u32,
}

impl Helper {
    /// Configured but not started. Later lines of `extra` are appended to the configuration.
    pub fn prepared(lab: &Lab, extra: &str) -> Helper {
        let dir = lab.dir.join("helper");
        fs::create_dir_all(&dir).expect("directory");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("mode");
        let (uid, gateway_uid) = if many_uids() {
            (HELPER_UID, GATEWAY_UID)
        } else {
            (0, 0)
        };
        let config = dir.join("privhelper.conf");
        let socket = dir.join("sock/helper.sock");
        let mut text = format!(
            "helper-user = {uid}\ngateway-user = {gateway_uid}\nsocket = {}\nstate = {}\npool6 = fd52:5650:1::/48\n",
            socket.display(),
            dir.join("state").display()
        );
        for (key, value) in [
            ("slots", "4"),
            ("grow", "4"),
            ("max-slots", "16"),
            ("linger", "0"),
        ] {
            if !extra.lines().any(|l| l.starts_with(&format!("{key} "))) {
                text.push_str(&format!("{key} = {value}\n"));
            }
        }
        text.push_str(extra);
        fs::write(&config, text).expect("configuration");
        fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).expect("mode");
        Helper {
            daemon: None,
            program: bin("rvpn-privhelper"),
            environment: Vec::new(),
            wrapper: Vec::new(),
            config,
            socket,
            log: dir.join("log"),
            uid,
            gateway_uid,
        }
    }

    /// Configured, started in `gw`, and serving.
    pub fn serving(lab: &Lab, extra: &str) -> Helper {
        let mut helper = Helper::prepared(lab, extra);
        helper.start(&lab.gw);
        helper
    }

    /// Another program in the helper's place, such as one built with fault hooks.
    pub fn program(&mut self, program: PathBuf, environment: &[(&str, &str)]) {
        self.program = program;
        self.environment = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
    }

    /// A program that runs the helper, such as strace.
    pub fn wrapped_in(&mut self, words: &[&str]) {
        self.wrapper = words.iter().map(|w| (*w).to_owned()).collect();
    }

    pub fn command(&self, verb: &str) -> Command {
        let mut words = self.wrapper.clone();
        words.push(self.program.display().to_string());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .arg(verb)
            .arg("--config")
            .arg(&self.config);
        command.envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Starts it and waits until it serves.
    pub fn start(&mut self, ns: &Ns) {
        self.launch(ns);
        wait_until("the helper serves", || {
            if let Some(status) = self.exited() {
                panic!("the helper ended with {status}: {}", self.log());
            }
            self.log().contains("serving")
        });
    }

    /// Starts it without waiting.
    pub fn launch(&mut self, ns: &Ns) {
        let _ = fs::remove_file(&self.log);
        let log = File::create(&self.log).expect("log");
        let out = log.try_clone().expect("log");
        let mut command = self.command("serve");
        command.stdin(Stdio::null()).stdout(out).stderr(log);
        self.daemon = Some(ns.daemon(&mut command));
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("started").child.id()
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.daemon
            .as_mut()
            .and_then(|d| d.child.try_wait().expect("wait"))
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> ExitStatus {
        wait_until("the helper ends", || self.exited().is_some());
        let mut daemon = self.daemon.take().expect("started");
        daemon.child.wait().expect("wait")
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("pid");
        kill(Pid::from_raw(pid), signal).expect("kill");
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.daemon = None;
    }

    /// Runs one of its commands to the end; exit code and everything printed.
    pub fn run(&self, ns: &Ns, verb: &str) -> (i32, String) {
        let out = ns.output(&mut self.command(verb));
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        (out.status.code().unwrap_or(-1), text)
    }

    /// Connects from the gateway's user.
    pub fn try_connect(&self, successor: bool) -> Result<(Client, Reply), ClientError> {
        as_user(self.gateway_uid, || {
            Client::connect(&self.socket, self.uid, successor)
        })
    }

    #[track_caller]
    pub fn connect(&self) -> Client {
        match self.try_connect(false) {
            Ok((client, _)) => client,
            Err(e) => panic!("{e}; log: {}", self.log()),
        }
    }

    /// Open descriptors of the process.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    /// Resident memory in KiB.
    pub fn resident(&self) -> u64 {
        self.status_field("VmRSS")
            .split_whitespace()
            .next()
            .and_then(|w| w.parse().ok())
            .unwrap_or(0)
    }

    /// What of it is no file's, in KiB: exactly, unlike the figures of `status`.
    pub fn anonymous(&self) -> u64 {
        let rollup = format!("/proc/{}/smaps_rollup", self.pid());
        let field = field(&rollup, "Pss_Anon");
        let kib = field.split_whitespace().next().and_then(|w| w.parse().ok());
        kib.unwrap_or_else(|| panic!("no Pss_Anon in {rollup}"))
    }

    pub fn status_field(&self, name: &str) -> String {
        field(&format!("/proc/{}/status", self.pid()), name)
    }
}

/// A field of a `/proc` status file.
pub fn field(path: &str, name: &str) -> String {
    let status = fs::read_to_string(path).unwrap_or_default();
    let found = status
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    found.unwrap_or_default().trim().to_owned()
}

impl Drop for Helper {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("helper's log:\n{}", self.log());
        }
        self.kill();
    }
}

/// Runs the closure as another effective user, on a thread of its own.
pub fn as_user<T: Send>(uid: u32, f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| {
        s.spawn(|| {
            if uid != nix::unistd::geteuid().as_raw() {
                crate::ns::become_user(uid);
            }
            f()
        })
        .join()
        .expect("thread of another user")
    })
}

/// A lease with its TUN: what a gateway process holds for one client.
pub struct Tunnel {
    pub reply: Reply,
    pub key: Key,
    tun: File,
}

impl Tunnel {
    pub fn new(key: Key, lease: Lease) -> Tunnel {
        let tun = lease.tun.expect("a TUN");
        Tunnel {
            reply: lease.reply,
            key,
            tun: tun.into(),
        }
    }

    /// Acquires a lease of both kinds for a key made of one byte.
    #[track_caller]
    pub fn acquire(client: &mut Client, key: u8) -> Tunnel {
        Tunnel::acquire_class(client, key, 0)
    }

    #[track_caller]
    pub fn acquire_class(client: &mut Client, key: u8, class: u8) -> Tunnel {
        let key = Key([key; 16]);
        match client.acquire(key, Kind::Both, class) {
            Ok(lease) => Tunnel::new(key, lease),
            Err(e) => panic!("acquire: {e}"),
        }
    }

    pub fn name(&self) -> String {
        format!("rv{}", self.reply.slot)
    }

    /// The n-th address of the slot's IPv4 subnet; the client's first is 2.
    pub fn v4(&self, n: u32) -> String {
        Ipv4Addr::from(u32::from(self.reply.v4) + n).to_string()
    }

    /// The n-th address of the slot's IPv6 subnet; the client's first is 1.
    pub fn v6(&self, n: u128) -> String {
        Ipv6Addr::from(u128::from(self.reply.v6) + n).to_string()
    }

    /// Writes a packet as the gateway would, without checksum or segmentation work left.
    pub fn send(&self, packet: &[u8]) {
        self.try_send(packet)
            .unwrap_or_else(|e| panic!("{}: write: {e}", self.name()));
    }

    pub fn try_send(&self, packet: &[u8]) -> std::io::Result<usize> {
        let mut frame = vec![0; VIRTIO];
        frame.extend(packet);
        (&self.tun).write(&frame)
    }

    /// The next packet the kernel sends through the device, if one comes in time.
    pub fn recv(&self, limit: Duration) -> Option<Vec<u8>> {
        if !readable(&self.tun, limit) {
            return None;
        }
        let mut frame = vec![0; 70_000];
        let n = (&self.tun).read(&mut frame).ok()?;
        Some(frame.get(VIRTIO..n)?.to_vec())
    }

    /// What can be read or written without a wait, as the raw calls say.
    pub fn try_read(&self) -> std::io::Result<usize> {
        (&self.tun).read(&mut [0; 2000])
    }

    /// The next packet that holds these bytes, past others.
    #[track_caller]
    pub fn expect(&self, needle: &[u8]) -> Vec<u8> {
        let end = Instant::now() + crate::PATIENCE;
        while let Some(p) = self.recv(end.saturating_duration_since(Instant::now())) {
            if crate::capture::contains(&p, needle) {
                return p;
            }
        }
        panic!("{}: the expected packet did not come", self.name());
    }

    /// The sequence number of the SYN and ACK from this port, past whatever else comes.
    #[track_caller]
    pub fn syn_answered(&self, port: u16) -> u32 {
        let end = Instant::now() + crate::PATIENCE;
        while let Some(p) = self.recv(end.saturating_duration_since(Instant::now())) {
            match crate::packet::tcp_header(&p) {
                Some(t) if t[..2] == port.to_be_bytes() && t[13] & 0x12 == 0x12 => {
                    return u32::from_be_bytes([t[4], t[5], t[6], t[7]]);
                }
                _ => {}
            }
        }
        panic!("{}: no answer to a SYN to port {port}", self.name());
    }

    /// Everything that waits to be read.
    pub fn drain(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.recv(Duration::ZERO)).collect()
    }

    /// The descriptor, to keep or to duplicate.
    pub fn file(&self) -> &File {
        &self.tun
    }

    pub fn into_fd(self) -> OwnedFd {
        self.tun.into()
    }

    pub fn borrow(&self) -> std::os::fd::BorrowedFd<'_> {
        self.tun.as_fd()
    }
}

/// Makes a file or directory somebody else's.
pub fn give(path: &Path, uid: u32) {
    chown(path, Some(uid), Some(uid)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
