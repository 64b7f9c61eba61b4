//! A client's machine with the real `rvpn` on it.

use std::fs;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

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
        Machine { ns, home }
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

    /// What `rvpn status --json` says.
    pub fn status(&self) -> Value {
        self.rvpn(&["status", "--json"]).json()
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
