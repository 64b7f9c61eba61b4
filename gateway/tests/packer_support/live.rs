//! The program itself, and the older clients for Node.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::unistd::getuid;
use serde_json::Value;
use tempfile::TempDir;

use super::PATIENCE;
use super::fake_helper::FakeHelper;

/// The program, serving on top of a helper that hands out no real devices.
pub(crate) struct Program {
    child: Child,
    lines: mpsc::Receiver<String>,
    pub(crate) at: SocketAddr,
    /// Ports that clients may be granted.
    _helper: FakeHelper,
    _dir: TempDir,
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

impl Program {
    /// With the usual two blocks of older tokens, and these lines.
    pub(crate) fn start(more: &str) -> Program {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        fs::set_permissions(at, fs::Permissions::from_mode(0o755)).unwrap();
        let helper = FakeHelper::start(at, 2);
        fs::set_permissions(&helper.socket, fs::Permissions::from_mode(0o666)).unwrap();
        let port = free_port();
        let user = match getuid().is_root() {
            true => "user = 65534\n",
            false => "",
        };
        let text = format!(
            "names = [\"{}\"]\nstate-dir = \"{}\"\n{user}\
             log.level = \"info,rvpn_gateway::packer=debug\"\nadmin.address = \"unix:{}\"\n\
             [helper]\nsocket = \"{}\"\nuser = {}\n\
             [[listener]]\naddress = \"127.0.0.1:{port}\"\n{}{more}",
            super::NAME,
            at.join("state").display(),
            at.join("admin.sock").display(),
            helper.socket.display(),
            getuid(),
            super::USUAL,
        );
        let config = at.join("gateway.toml");
        fs::write(&config, text).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_rvpn-gateway"))
            .env_clear()
            .args(["--config", config.to_str().unwrap()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines_of(child.stderr.take().unwrap());
        let program = Program {
            child,
            lines,
            at: SocketAddr::from(([127, 0, 0, 1], port)),
            _helper: helper,
            _dir: dir,
        };
        program.wait_for("ready");
        program
    }

    /// The first line that has this in it.
    pub(crate) fn wait_for(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("no {text:?} in {seen:#?}"),
            }
        }
    }

    /// Memory in use, in bytes.
    pub(crate) fn memory(&self) -> usize {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kilobytes * 1024
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn lines_of(stream: impl std::io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (say, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if say.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Where the clients and their libraries are; installs them the first time.
fn installed() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/packer-client");
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let place = tmp.parent().unwrap().join("packer-client");
    fs::create_dir_all(&place).unwrap();
    let lock = fs::File::create(place.join("lock")).unwrap();
    lock.lock().unwrap();
    let wanted = fs::read(source.join("package-lock.json")).unwrap();
    let done = place.join("installed.json");
    if fs::read(&done).ok().as_ref() != Some(&wanted) {
        for name in ["package.json", "package-lock.json"] {
            fs::copy(source.join(name), place.join(name)).unwrap();
        }
        let mut npm = Command::new("npm");
        npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]);
        let output = npm.current_dir(&place).output();
        let output = output.expect("npm is needed: dev-bin/test installs it");
        assert!(output.status.success(), "{output:?}");
        fs::write(done, wanted).unwrap();
    }
    // Found beside its libraries. Others may be reading it just now.
    let (script, here) = (
        fs::read(source.join("client.js")).unwrap(),
        place.join("client.js"),
    );
    if fs::read(&here).ok().as_ref() != Some(&script) {
        fs::write(place.join("client.new"), script).unwrap();
        fs::rename(place.join("client.new"), &here).unwrap();
    }
    here
}

/// An older client, running.
pub(crate) struct Node {
    child: Child,
    lines: mpsc::Receiver<String>,
    input: ChildStdin,
}

impl Node {
    pub(crate) fn start(kind: &str, at: SocketAddr, token: &str, services: &[(&str, u16)]) -> Node {
        let url = format!("wss://127.0.0.1:{}/", at.port());
        let mut command = Command::new("node");
        command.arg(installed()).args([kind, &url, token]);
        for (service, port) in services {
            command.arg(format!("{service}={port}"));
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("node is needed: dev-bin/test installs it");
        let lines = lines_of(child.stdout.take().unwrap());
        let input = child.stdin.take().unwrap();
        Node {
            child,
            lines,
            input,
        }
    }

    /// What it says next of this kind.
    pub(crate) fn says(&self, what: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no {what:?} in {seen:#?}");
            };
            let said: Value = serde_json::from_str(&line).unwrap();
            if said[0] == what {
                return said;
            }
            seen.push(said);
        }
    }

    /// Logged in, as far as this kind knows it.
    pub(crate) fn ready(&self, kind: &str) {
        self.says("greeted");
        if kind == "c3" {
            let answer = self.says("answered");
            assert_eq!(answer[2], Value::Null, "{answer}");
        }
    }

    pub(crate) fn ends_within(&mut self, time: Duration) -> i32 {
        let deadline = Instant::now() + time;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap();
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn ask(&mut self, what: &str) {
        writeln!(self.input, "{what}").unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
