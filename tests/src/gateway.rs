//! The real gateway in the laboratory, on the real helper.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

use crate::helper::{Helper, bin};
use crate::ns::Daemon;
use crate::token::{Signer, claims};
use crate::topology::{GW4, Lab, at, many_uids};
use crate::{PATIENCE, wait_until};

/// The one name it answers to.
pub const NAME: &str = "vpn.test";

/// A gateway process, its configuration, its log and the operator's key.
pub struct Gateway {
    daemon: Option<Daemon>,
    /// Where it lives, to start it again.
    ns: File,
    pub dir: PathBuf,
    ops: Signer,
    environment: Vec<(String, String)>,
    /// The public port, when somebody else holds it.
    held: Option<TcpListener>,
}

impl Gateway {
    /// Configured, started in `gw`, and ready. `extra` goes between the top-level
    /// keys and the tables, so it may have both; without a `[[listener]]` in it
    /// the gateway speaks TLS at port 443.
    pub fn start(lab: &Lab, helper: &Helper, extra: &str) -> Gateway {
        let mut gateway = Gateway::prepared(lab, helper, extra);
        gateway.launch();
        gateway.until_ready();
        gateway
    }

    /// Configured but not started.
    pub fn prepared(lab: &Lab, helper: &Helper, extra: &str) -> Gateway {
        let dir = lab.dir.join("gateway");
        fs::create_dir_all(&dir).expect("directory");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("mode");
        let ops = Signer::new();
        fs::write(dir.join("ops.pem"), ops.public_pem()).expect("key");
        let gateway = Gateway {
            daemon: None,
            ns: lab
                .gw
                .run(|| File::open("/proc/thread-self/ns/net").expect("namespace")),
            dir,
            ops,
            environment: Vec::new(),
            held: None,
        };
        gateway.configure(helper, extra);
        gateway
    }

    /// Holds the public port for it, as a service manager does.
    pub fn hold_port(&mut self, lab: &Lab) {
        self.held = Some(lab.gw.tcp("[::]:443"));
    }

    /// Sets what its program finds in its environment.
    pub fn environment(&mut self, variables: &[(&str, &str)]) {
        let owned = variables
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        self.environment = owned.collect();
    }

    /// Starts one that was prepared.
    pub fn launch_ready(&mut self) {
        self.launch();
        self.until_ready();
    }

    /// Writes the configuration anew, for the next start or SIGHUP.
    pub fn configure(&self, helper: &Helper, extra: &str) {
        let mut text = String::new();
        if !extra.lines().any(|l| l.starts_with("names ")) {
            text += &format!("names = [\"{NAME}\"]\n");
        }
        if many_uids() {
            text += &format!("user = {}\n", helper.gateway_uid);
        }
        text += &format!(
            "state-dir = {:?}\nadmin.address = \"unix:{}\"\n{extra}\n\
             [helper]\nsocket = {:?}\nuser = {}\n\
             [[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"ops.pem\"\n",
            self.dir.join("state"),
            self.admin().display(),
            helper.socket,
            helper.uid,
        );
        if !extra.contains("[[listener]]") {
            text += "[[listener]]\naddress = \"[::]:443\"\n";
        }
        fs::write(self.dir.join("gateway.toml"), text).expect("configuration");
    }

    fn launch(&mut self) {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .expect("log");
        // Tells the lines of this start from those of the one before.
        let mut marked = log.try_clone().expect("log");
        writeln!(marked, "{MARK}").expect("log");
        let mut command = match &self.held {
            None => Command::new(bin("rvpn-gateway")),
            Some(port) => {
                // The variable must name the program's own process.
                let mut command = Command::new("/bin/sh");
                let fd = port.as_raw_fd();
                fcntl(port, FcntlArg::F_SETFD(FdFlag::empty())).expect("inheritable");
                let script = format!(
                    "exec 3<&{fd} {fd}<&-; LISTEN_PID=$$ LISTEN_FDS=1 exec {} \"$@\"",
                    bin("rvpn-gateway").display()
                );
                command.args(["-c", &script, "rvpn-gateway"]);
                command
            }
        };
        command
            .env_clear()
            .envs(self.environment.iter().cloned())
            .arg("--config")
            .arg(self.dir.join("gateway.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log);
        let ns = &self.ns;
        self.daemon = Some(std::thread::scope(|s| {
            s.spawn(move || {
                setns(ns, CloneFlags::CLONE_NEWNET).expect("setns");
                Daemon::start(&mut command)
            })
            .join()
            .expect("thread of the gateway's namespace")
        }));
    }

    fn until_ready(&mut self) {
        wait_until("the gateway is ready", || {
            if let Some(status) = self.exited() {
                panic!("the gateway ended with {status}: {}", self.log());
            }
            let log = self.log();
            let said = log.rsplit(MARK).next().unwrap_or("");
            said.contains(" ready ") || said.contains("\"message\":\"ready\"")
        });
    }

    /// Starts one again that does not say when it is ready: it is when it accepts.
    pub fn start_quiet(&mut self) {
        self.launch();
        let (ns, at) = (&self.ns, self.address());
        wait_until("the gateway accepts", || {
            std::thread::scope(|s| {
                let tried = s.spawn(|| {
                    setns(ns, CloneFlags::CLONE_NEWNET).expect("setns");
                    std::net::TcpStream::connect(at).is_ok()
                });
                tried.join().expect("thread of the gateway's namespace")
            })
        });
    }

    /// Stops it in order, or finds it gone, and starts it again.
    pub fn restart(&mut self) {
        if self.daemon.is_some() {
            self.stop();
        }
        self.launch();
        self.until_ready();
    }

    /// SIGTERM, and how it ended.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended()
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> ExitStatus {
        wait_until("the gateway ends", || self.exited().is_some());
        let mut daemon = self.daemon.take().expect("started");
        daemon.child.wait().expect("wait")
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.daemon = None;
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("pid");
        kill(Pid::from_raw(pid), signal).expect("kill");
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("started").child.id()
    }

    fn exited(&mut self) -> Option<ExitStatus> {
        let daemon = self.daemon.as_mut().expect("started");
        daemon.child.try_wait().expect("wait")
    }

    /// Everything it ever said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Where clients find it over IPv4.
    pub fn address(&self) -> SocketAddr {
        at(GW4, 443).parse().expect("address")
    }

    /// A token of this account, good for half an hour.
    pub fn token(&self, account: &str) -> String {
        self.token_with(&claims(account))
    }

    /// A token with these claims, signed by the operator's key.
    pub fn token_with(&self, claims: &Value) -> String {
        self.ops.sign("ops", claims)
    }

    /// The certificate it made for itself.
    pub fn certificate(&self) -> CertificateDer<'static> {
        let file = self.dir.join("state/tls.crt");
        CertificateDer::from_pem_file(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
    }

    /// The SHA-256 of the certificate in lower-case hexadecimal, as clients pin it.
    pub fn fingerprint(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.certificate());
        digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The socket of the operators' API.
    pub fn admin(&self) -> PathBuf {
        self.dir.join("admin.sock")
    }

    /// A call of the operators' API that must succeed; `Value::Null` is no body.
    #[track_caller]
    pub fn api(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.try_api(method, path, body);
        assert!(
            (200..300).contains(&status),
            "{method} {path}: {status} {answer}"
        );
        answer
    }

    /// The same whatever the answer is.
    pub fn try_api(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let mut io = UnixStream::connect(self.admin()).expect("the API's socket");
        io.set_read_timeout(Some(PATIENCE)).expect("timeout");
        write!(
            io,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("request");
        let mut answer = String::new();
        io.read_to_string(&mut answer).expect("an answer");
        let (head, text) = answer.split_once("\r\n\r\n").expect("a whole head");
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        let value = serde_json::from_str(text).unwrap_or(Value::Null);
        (status.expect("a status"), value)
    }

    /// The sessions that are running.
    pub fn sessions(&self) -> Vec<Value> {
        let mut answer = self.api("GET", "/api/v1/sessions", &Value::Null);
        match answer["sessions"].take() {
            Value::Array(rows) => rows,
            other => panic!("sessions: {other}"),
        }
    }
}

/// Between the lines of one start and the next.
const MARK: &str = "---- started by the test ----";

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("gateway's log:\n{}", self.log());
        }
        self.kill();
    }
}
