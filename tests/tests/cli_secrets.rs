//! Where the secrets of a client are: in one file of mode 0600, and in the
//! memory of the half that needs them.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rvpn_lab::capture::contains;
use rvpn_lab::gateway::Gateway;
use rvpn_lab::helper::field;
use rvpn_lab::machine::Machine;
use rvpn_lab::ns::Daemon;
use rvpn_lab::topology::{GW4, many_uids};
use rvpn_lab::{Helper, Lab, wait_until};

struct Scene {
    _lab: Lab,
    _helper: Helper,
    gateway: Gateway,
    phone: Machine,
}

fn scene() -> Scene {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    Scene {
        _lab: lab,
        _helper: helper,
        gateway,
        phone,
    }
}

impl Scene {
    fn profile(&self) -> PathBuf {
        self.phone.home.join("config/home.toml")
    }

    /// The device's key as it is in the profile, and the bytes that matter of it.
    fn key(&self) -> (String, Vec<u8>) {
        let text = fs::read_to_string(self.profile()).expect("profile");
        let line = text.lines().find_map(|l| l.strip_prefix("private-key = "));
        let key = line.expect("a key").trim_matches('"').to_owned();
        let der = from_base64url(&key);
        // A PKCS #8 key of Ed25519: 16 bytes that all have, then the secret.
        (key, der[16..48].to_vec())
    }
}

fn from_base64url(text: &str) -> Vec<u8> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (mut bits, mut held, mut out) = (0_u32, 0, Vec::new());
    for byte in text.bytes() {
        let at = alphabet.iter().position(|a| *a == byte).expect("base64url");
        bits = bits << 6 | u32::try_from(at).expect("below 64");
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push(u8::try_from(bits >> held & 0xff).expect("a byte"));
        }
    }
    out
}

/// How often one of these is in the memory of a process, read as root.
fn in_memory(pid: u32, needles: &[&[u8]]) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("mem");
    let mut found = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().expect("range"), words.next().expect("rights"));
        if !rights.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-').expect("a range");
        let number = |t: &str| u64::from_str_radix(t, 16).expect("a number");
        let (from, to) = (number(from), number(to));
        let mut bytes = vec![0; usize::try_from(to - from).expect("size")];
        // The kernel's own pages in it cannot be read.
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            found += needles.iter().filter(|n| contains(&bytes, n)).count();
        }
    }
    found
}

/// Every file below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).expect("directory") {
        let path = entry.expect("entry").path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => all.push(path),
        }
    }
    all
}

#[test]
fn cli_11_secrets_are_in_one_file_and_one_process() {
    let scene = scene();
    let phone = &scene.phone;
    let (text, secret) = scene.key();
    let needles: [&[u8]; 2] = [text.as_bytes(), &secret];
    let up = phone.up(&[]);
    let (parent, half, mender) = (up.pid(), up.half(), up.part("__mend"));
    // The search finds what is there.
    assert!(in_memory(parent, &needles[..1]) > 0);
    for pid in [half, mender] {
        assert_eq!(in_memory(pid, &needles), 0, "{pid}");
    }
    for pid in [parent, half, mender] {
        for part in ["cmdline", "environ", "comm", "status"] {
            let shown = fs::read(format!("/proc/{pid}/{part}")).expect("proc");
            for secret in needles {
                assert!(!contains(&shown, secret), "{pid} {part}");
            }
            assert!(!contains(&shown, b"eyJ"), "a token in {pid} {part}");
        }
    }
    let shown = [
        phone.rvpn(&["status"]).good(),
        phone.status().to_string(),
        up.log(),
        scene.gateway.log(),
    ];
    for text in &shown {
        for secret in needles {
            assert!(!contains(text.as_bytes(), secret), "{text}");
        }
        assert!(!text.contains("eyJ"), "a token in: {text}");
    }
    // In files: the profile alone, which nobody else reads.
    for path in files(&phone.home) {
        let Ok(content) = fs::read(&path) else {
            continue;
        };
        let holds = needles.iter().any(|n| contains(&content, n));
        assert_eq!(holds, path == scene.profile(), "{}", path.display());
    }
    let mode = |path: &Path| fs::metadata(path).expect("meta").mode() & 0o7777;
    assert_eq!(mode(&scene.profile()), 0o600);
    assert_eq!(mode(&phone.home.join("config")), 0o700);
    assert_eq!(mode(&phone.run_dir().join("journal.json")), 0o600);
    assert_eq!(mode(&phone.run_dir().join("lock")), 0o600);
    assert_eq!(mode(&phone.run_dir()), 0o755);
    up.down();
}

#[test]
fn cli_11_the_half_that_reads_strangers_bytes_has_no_rights() {
    let scene = scene();
    let up = scene.phone.up(&["--no-dns"]);
    let status = format!("/proc/{}/status", up.half());
    for set in ["CapPrm", "CapEff", "CapAmb"] {
        let all = field(&status, set);
        assert!(
            all.bytes().all(|b| b == b'0') || !many_uids(),
            "{set}: {all}"
        );
    }
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Groups"), "");
    if many_uids() {
        for (name, own) in [("Uid", nix::unistd::getuid().as_raw()), ("Gid", 0)] {
            let all = field(&status, name);
            let all: Vec<&str> = all.split_whitespace().collect();
            assert_eq!(all.len(), 4);
            assert!(all.iter().all(|id| *id == all[0]), "{all:?}");
            assert_ne!(all[0], own.to_string());
        }
    }
    // What it holds: its own sockets and the device; no file of ours.
    let fds = fs::read_dir(format!("/proc/{}/fd", up.half())).expect("fds");
    for fd in fds {
        let to = fs::read_link(fd.expect("fd").path()).expect("link");
        let to = to.to_string_lossy();
        let fits = [
            "socket:",
            "anon_inode:",
            "pipe:",
            "/dev/net/tun",
            "/dev/null",
        ];
        let log = to.ends_with("up.log");
        assert!(log || fits.iter().any(|f| to.starts_with(f)), "{to}");
    }
    up.down();
}

/// Whether a process leaves a core when it is killed so.
fn leaves_core(daemon: &mut Daemon, pid: u32) -> bool {
    let limit = Command::new("prlimit")
        .args(["--core=unlimited:unlimited", "--pid", &pid.to_string()])
        .status();
    assert!(limit.is_ok_and(|s| s.success()), "prlimit");
    let target = Pid::from_raw(i32::try_from(pid).expect("pid"));
    kill(target, Signal::SIGABRT).expect("kill");
    let status = daemon.child.wait().expect("wait");
    assert_eq!(status.signal(), Some(libc::SIGABRT));
    status.core_dumped()
}

#[test]
fn cli_11_no_half_leaves_a_core() {
    let scene = scene();
    let phone = &scene.phone;
    let mut sleep = Command::new("sleep");
    let mut other = Daemon::start(sleep.arg("1000").current_dir(&phone.home));
    let pid = other.child.id();
    assert!(leaves_core(&mut other, pid), "cores are possible here");
    let mut up = phone.up(&["--no-dns"]);
    // Only a process that may be dumped belongs to its own user in /proc.
    let owner = |pid: u32| {
        fs::metadata(format!("/proc/{pid}/mem"))
            .expect("proc")
            .uid()
    };
    assert_eq!(owner(up.half()), 0);
    let pid = up.pid();
    assert!(!leaves_core(&mut up.daemon, pid));
    wait_until("it is mended", || phone.status()["left-behind"] == false);
}

#[test]
fn cli_11_secrets_that_others_may_read_are_refused() {
    let scene = scene();
    let phone = &scene.phone;
    let token = phone.secret("token", &scene.gateway.token("phone"));
    let pin = scene.gateway.fingerprint();
    let words = [
        "up",
        "--no-dns",
        "--server",
        GW4,
        "--token-file",
        &token,
        "--fingerprint",
        &pin,
    ];
    for (path, words) in [
        (scene.profile(), &["up", "--no-dns"][..]),
        (PathBuf::from(&token), &words[..]),
    ] {
        for mode in [0o640, 0o604, 0o660, 0o644] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
            let said = phone.rvpn(words);
            assert_eq!(said.code, 78, "{said:?}");
            assert!(said.err.contains("chmod 600"), "{said:?}");
            assert!(said.err.contains(&path.display().to_string()), "{said:?}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
        let up = phone.up(&words[1..]);
        up.down();
    }
    // It is looked at again before each login. A tunnel that is up waits for one
    // that is right: whoever replaces the file must not end it.
    let up = phone.up(&words[1..]);
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).expect("mode");
    kill(
        Pid::from_raw(i32::try_from(up.half()).expect("pid")),
        Signal::SIGKILL,
    )
    .expect("kill");
    wait_until("the file is named", || {
        let status = phone.status();
        let trouble = status["trouble"].as_str().unwrap_or_default();
        status["state"] == "reconnecting" && trouble.contains("chmod 600")
    });
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).expect("mode");
    wait_until("connected again", || phone.status()["state"] == "connected");
    up.down();
}
