//! The program itself, locked in, on top of a helper that hands out no real
//! devices; and visitors and operators of it.
#![expect(dead_code, reason = "every test program uses another part of this")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

#[path = "../session_support/fake_helper.rs"]
mod fake_helper;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getuid};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use tempfile::TempDir;

use fake_helper::FakeHelper;

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Somebody who owns nothing here.
const NOBODY: u32 = 65_534;

/// A running gateway.
pub(crate) struct Program {
    child: Child,
    lines: mpsc::Receiver<String>,
    /// Of the listener that tells protocols apart.
    pub(crate) port: u16,
    /// Of the one for HTTP only.
    pub(crate) plain: u16,
    // In the directory, so dropped before it.
    helper: Option<FakeHelper>,
    dir: Option<TempDir>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header's value; its name is in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|l| l.split_once(": "));
        let mut fitting = lines.filter(|(n, _)| n.eq_ignore_ascii_case(name));
        fitting.next().map(|(_, v)| v)
    }
}

pub(crate) type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A port that was free a moment ago, and is not where translated connections leave from.
fn free_port() -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

/// A directory that others may look into.
pub(crate) fn place() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvpn-gateway"));
    command.env_clear();
    command
}

impl Program {
    /// Its configuration ends with `more`, which may begin with keys of the top level.
    pub(crate) fn start(more: &str) -> Program {
        Program::again(place(), more)
    }

    /// In a place that another one has left.
    pub(crate) fn again(dir: TempDir, more: &str) -> Program {
        let mut program = Program::begin(dir, more);
        program.wait_for("ready");
        program.child.try_wait().unwrap();
        program
    }

    /// Without waiting until it serves.
    pub(crate) fn begin(dir: TempDir, more: &str) -> Program {
        let at = dir.path();
        let helper = FakeHelper::start(at, 4);
        fs::set_permissions(&helper.socket, fs::Permissions::from_mode(0o666)).unwrap();
        let (port, plain) = (free_port(), free_port());
        fs::write(
            at.join("gateway.toml"),
            configuration(at, port, plain, more),
        )
        .unwrap();
        let mut child = binary()
            .args(["--config", at.join("gateway.toml").to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (say, lines) = mpsc::channel();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let also = say.clone();
        std::thread::spawn(move || {
            let lines = BufReader::new(stderr).lines().map_while(Result::ok);
            lines
                .take_while(|l| say.send(l.clone()).is_ok())
                .for_each(drop);
        });
        std::thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            let marked = lines.map(|l| format!("stdout: {l}"));
            marked
                .take_while(|l| also.send(l.clone()).is_ok())
                .for_each(drop);
        });
        Program {
            child,
            lines,
            port,
            plain,
            helper: Some(helper),
            dir: Some(dir),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    /// The first line of the log that has this in it.
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

    /// What was said since.
    pub(crate) fn said(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    /// Ends it in order, and leaves its place to another one.
    pub(crate) fn stop(mut self) -> TempDir {
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::park_timeout(Duration::from_millis(5));
        }
        self.helper.take();
        self.dir.take().unwrap()
    }

    /// Asks the operators' API through its socket file.
    pub(crate) fn api(&self, method: &str, path: &str) -> Reply {
        let io = UnixStream::connect(self.dir().join("admin.sock")).unwrap();
        io.set_read_timeout(Some(PATIENCE)).unwrap();
        talk(
            io,
            &format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n"),
        )
    }

    /// A connection by TLS under this name, if the certificate is one of `ca`.
    pub(crate) fn tls(&self, name: &str, ca: &str) -> Result<Tls, String> {
        let mut roots = RootCertStore::empty();
        for one in CertificateDer::pem_slice_iter(ca.as_bytes()) {
            roots.add(one.unwrap()).unwrap();
        }
        let config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let tcp = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        tcp.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut tls = StreamOwned::new(connection, tcp);
        while tls.conn.is_handshaking() {
            tls.conn
                .complete_io(&mut tls.sock)
                .map_err(|e| e.to_string())?;
        }
        Ok(tls)
    }

    /// One request in the clear.
    pub(crate) fn http(&self, host: &str, path: &str) -> Reply {
        let io = TcpStream::connect(("127.0.0.1", self.plain)).unwrap();
        io.set_read_timeout(Some(PATIENCE)).unwrap();
        talk(io, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _gone = self.child.kill();
        self.child.wait().unwrap();
    }
}

/// SHA-256 of the certificate that the other side showed.
pub(crate) fn leaf(tls: &Tls) -> Vec<u8> {
    tls.conn.peer_certificates().unwrap()[0].to_vec()
}

/// One request, given without its last line, and the whole answer.
pub(crate) fn talk(mut io: impl Read + Write, head: &str) -> Reply {
    io.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes())
        .unwrap();
    let mut bytes = Vec::new();
    // An abrupt end is an end.
    let _end = io.read_to_end(&mut bytes);
    let at = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let body = bytes.split_off(at.expect("a head") + 4);
    let head = String::from_utf8(bytes).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head, body }
}

/// Waits until there is something.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

fn configuration(at: &Path, port: u16, plain: u16, more: &str) -> String {
    let user = match getuid().is_root() {
        true => format!("user = {NOBODY}\n"),
        false => String::new(),
    };
    let split = match more.starts_with('[') {
        true => 0,
        false => more.find("\n[").map_or(more.len(), |at| at + 1),
    };
    let (top, tables) = more.split_at(split);
    format!(
        "{top}\nstate-dir = {:?}\n{user}admin.address = \"unix:{}\"\n\
         [helper]\nsocket = {:?}\nuser = {}\n\
         [[listener]]\naddress = \"127.0.0.1:{port}\"\nmode = \"auto\"\n\
         [[listener]]\naddress = \"127.0.0.1:{plain}\"\nmode = \"plain\"\n{tables}",
        at.join("state"),
        at.join("admin.sock").display(),
        at.join("helper.sock"),
        getuid(),
    )
}
