//! A client's machine with the real `rvpn` on it.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use serde_json::Value;

use crate::gateway::Gateway;
use crate::helper::bin;
use crate::ns::{Daemon, Ns};
use crate::topology::{GW4, Lab};
use crate::wait_until;

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// Its standard output; panics if it failed.
    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!(self.code, 0, "{}\n{}", self.out, self.err);
        self.out
    }

    /// The same as JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.good();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }
}

/// The list of resolvers before any tunnel. It is not even all text.
pub const RESOLVERS: &[u8] = b"# of the lab, \xff\nnameserver 1.1.1.1\noptions edns0\n";

/// A machine and the files of its one user.
pub struct Machine {
    pub ns: Ns,
    pub home: PathBuf,
}

impl Machine {
    /// On the wire of the lab.
    pub fn new(lab: &Lab, name: &'static str, n: u8) -> Machine {
        Machine::on(lab, lab.client(name, n))
    }

    /// In a namespace that exists.
    pub fn on(lab: &Lab, ns: Ns) -> Machine {
        let home = lab.dir.join(format!("home-{}", ns.name));
        fs::create_dir_all(&home).expect("home");
        private_etc(lab);
        Machine { ns, home }
    }

    /// A file that its user alone reads; its path.
    pub fn secret(&self, name: &str, text: &str) -> String {
        let path = self.home.join(name);
        fs::write(&path, text).expect("secret");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
        path.display().to_string()
    }

    /// Where the running `up` keeps its files.
    pub fn run_dir(&self) -> PathBuf {
        self.home.join("run")
    }

    /// Joined by an invite, as its user would.
    pub fn joined(lab: &Lab, gateway: &Gateway, name: &'static str, n: u8) -> Machine {
        let machine = Machine::new(lab, name, n);
        machine.join(lab, gateway, name, GW4);
        machine
    }

    /// Joins the gateway at this address on behalf of an account.
    pub fn join(&self, lab: &Lab, gateway: &Gateway, account: &str, address: &str) {
        let link = operator(lab, gateway, &["invite", account, "--address", address]).good();
        self.rvpn(&["join", link.trim(), "--name", "home"]).good();
    }

    /// The program with these words, not started yet.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(bin("rvpn"));
        command
            .args(words)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &self.home)
            .env("RVPN_HOME", self.home.join("config"))
            .env("RVPN_RUN", self.home.join("run"))
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub fn rvpn(&self, words: &[&str]) -> Said {
        said(&self.ns, &mut self.command(words))
    }

    /// Brings a tunnel up and waits until it is connected.
    pub fn up(&self, words: &[&str]) -> Up<'_> {
        let mut up = self.begin(words);
        up.until_connected();
        up
    }

    /// Starts `up` without waiting for anything.
    pub fn begin(&self, words: &[&str]) -> Up<'_> {
        let log = self.home.join("up.log");
        let file = fs::File::create(&log).expect("log");
        let all = [&["up"], words].concat();
        let mut command = self.command(&all);
        command.stdout(file.try_clone().expect("log")).stderr(file);
        Up {
            daemon: self.ns.daemon(&mut command),
            machine: self,
            log,
        }
    }

    /// Brings a tunnel up with words that were put together.
    pub fn up_with(&self, base: &[String], more: &[&str]) -> Up<'_> {
        let words: Vec<&str> = base.iter().map(String::as_str).collect();
        self.up(&[&words, more].concat())
    }

    /// The same without waiting.
    pub fn begin_with(&self, base: &[String], more: &[&str]) -> Up<'_> {
        let words: Vec<&str> = base.iter().map(String::as_str).collect();
        self.begin(&[&words, more].concat())
    }

    /// What `rvpn status --json` says.
    pub fn status(&self) -> Value {
        self.rvpn(&["status", "--json"]).json()
    }
}

impl Drop for Machine {
    /// One in the background outlives its test otherwise.
    fn drop(&mut self) {
        if self.run_dir().join("control.sock").exists() {
            let mut down = self.command(&["down"]);
            let _gone = self.ns.output(down.stdout(Stdio::null()));
        }
    }
}

/// A tunnel that is up.
pub struct Up<'a> {
    pub daemon: Daemon,
    machine: &'a Machine,
    log: PathBuf,
}

impl Up<'_> {
    /// What it said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The half with rights.
    pub fn pid(&self) -> u32 {
        self.daemon.child.id()
    }

    /// The half without, once it is there.
    #[track_caller]
    pub fn half(&self) -> u32 {
        self.part("__carry")
    }

    /// The process of `up` that was started with this word.
    #[track_caller]
    pub fn part(&self, word: &str) -> u32 {
        let mut found = None;
        wait_until("a process of 'rvpn up' is there", || {
            let path = format!("/proc/{0}/task/{0}/children", self.pid());
            let children = fs::read_to_string(path).unwrap_or_default();
            found = children.split_whitespace().find_map(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
                let has = line.split(|b| *b == 0).any(|w| w == word.as_bytes());
                has.then(|| pid.parse().ok()).flatten()
            });
            found.is_some()
        });
        found.expect("found")
    }

    /// `kill -9` of the half with rights alone.
    pub fn kill(&mut self) {
        self.daemon.child.kill().expect("kill");
        let _killed = self.daemon.child.wait();
    }

    #[track_caller]
    pub fn until_connected(&mut self) {
        wait_until("the tunnel is up", || {
            if let Some(status) = self.daemon.child.try_wait().expect("wait") {
                panic!("'rvpn up' ended with {status}: {}", self.log());
            }
            self.machine.status()["state"] == "connected"
        });
    }

    /// How it ended by itself.
    #[track_caller]
    pub fn ended(&mut self) -> i32 {
        let mut code = None;
        wait_until("'rvpn up' ends", || {
            let status = self.daemon.child.try_wait().expect("wait");
            code = status.map(|s| s.code().unwrap_or(-1));
            code.is_some()
        });
        code.expect("ended")
    }

    /// Ends it as its user would.
    #[track_caller]
    pub fn down(mut self) {
        self.machine.rvpn(&["down"]).good();
        assert_eq!(self.ended(), 0, "{}", self.log());
    }
}

impl Drop for Up<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of 'rvpn up':\n{}", self.log());
        }
    }
}

/// A copy of `/etc` of the test's own: the client replaces a file there.
fn private_etc(lab: &Lab) {
    let own = lab.dir.join("etc");
    if own.exists() {
        return;
    }
    // What a user alone may not read is not needed.
    let _partly = Command::new("cp")
        .args(["-a", "/etc"])
        .arg(&own)
        .stderr(Stdio::null())
        .status();
    let none = None::<&str>;
    let bind = |from: &Path, to: &Path| {
        mount(Some(from), to, none, MsFlags::MS_BIND, none).expect("own /etc");
    };
    let was = lab.dir.join("etc-was");
    fs::create_dir_all(&was).expect("directory");
    mount(
        Some("/etc"),
        &was,
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )
    .expect("the old /etc");
    bind(&own, Path::new("/etc"));
    // A gateway that runs already may read the files it knew, and no others.
    for name in ["hosts", "host.conf", "nsswitch.conf", "gai.conf"] {
        if was.join(name).exists() {
            bind(&was.join(name), &Path::new("/etc").join(name));
        }
    }
    let resolvers = Path::new("/etc/resolv.conf");
    let _link = fs::remove_file(resolvers);
    fs::write(resolvers, RESOLVERS).expect("resolv.conf");
}

/// The same program in an operator's hands, on the gateway's machine.
pub fn operator(lab: &Lab, gateway: &Gateway, words: &[&str]) -> Said {
    let mut command = Command::new(bin("rvpn"));
    command
        .args(words)
        .env_clear()
        .env("RVPN_ADMIN", format!("unix:{}", gateway.admin().display()))
        .stdin(Stdio::null());
    said(&lab.gw, &mut command)
}

fn said(ns: &Ns, command: &mut Command) -> Said {
    let mut child = ns.spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut err = child.stderr.take().expect("piped");
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        // What is not text is not worth more than what came before it.
        let _read = err.read_to_string(&mut text);
        text
    });
    let mut out = String::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_string(&mut out)
        .expect("text");
    let status = child.wait().expect("wait");
    Said {
        code: status.code().unwrap_or(-1),
        out,
        err: errors.join().expect("reader"),
    }
}
