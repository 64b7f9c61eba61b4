//! The program itself: exit codes, start, sandbox, reload, end. AUT-23.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

#[expect(dead_code, reason = "other tests use the rest of it")]
#[path = "session_support/fake_helper.rs"]
mod fake_helper;
mod front_support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fake_helper::FakeHelper;
use front_support::PATIENCE;
use front_support::client::{NATIVE, upgrade};
use front_support::tokens::Signer;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getuid};
use tempfile::TempDir;

/// Somebody who owns nothing here.
const NOBODY: u32 = 65_534;

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvpn-gateway"));
    command.env_clear();
    command
}

/// Runs it until it ends by itself.
fn outcome(arguments: &[&str]) -> (i32, String) {
    let output = binary().args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), said)
}

/// A directory that others may look into.
fn place() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn write(dir: &Path, text: &str) -> String {
    let path = dir.join("gateway.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

#[test]
fn exit_codes_tell_usage_from_configuration() {
    assert_eq!(outcome(&["--help"]).0, 0);
    assert_eq!(outcome(&["--version"]).0, 0);
    assert_eq!(outcome(&["--confg", "x"]).0, 1);
    let (code, said) = outcome(&["--config", "/nowhere/gateway.toml"]);
    assert_eq!(code, 78);
    assert!(said.contains("/nowhere/gateway.toml"), "{said}");
    let dir = place();
    let path = write(dir.path(), "[[listner]]\n");
    let (code, said) = outcome(&["--check", "--config", &path]);
    assert_eq!(code, 78);
    assert!(said.contains("did you mean `listener`?"), "{said}");
    let path = write(
        dir.path(),
        "helper.user = 7\n[[listener]]\naddress = \"[::]:443\"\n",
    );
    assert_eq!(outcome(&["--check", "--config", &path]).0, 0);
    let path = write(
        dir.path(),
        "helper.user = 7\nlog.level = \"no=such=level\"\n[[listener]]\naddress = \"[::]:443\"\n",
    );
    assert_eq!(outcome(&["--check", "--config", &path]).0, 78);
}

#[test]
fn aut_23_a_key_that_cannot_work_is_found_at_start() {
    let dir = place();
    let at = dir.path();
    let (ed, es, rs) = (Signer::ed25519(), Signer::es256(), Signer::rs256());
    ed.write_public(&at.join("ed.pem"));
    es.write_public(&at.join("es.pem"));
    rs.write_public(&at.join("rs.pem"));
    fs::write(at.join("empty.pem"), "").unwrap();
    fs::write(at.join("cut.pem"), &ed.public_pem[..60]).unwrap();
    let private = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    fs::write(at.join("private.pem"), private.serialize_pem()).unwrap();
    fs::write(at.join("short"), "too short").unwrap();
    fs::write(
        at.join("jwks.json"),
        r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#,
    )
    .unwrap();
    let try_key = |lines: &str| {
        let text = format!(
            "helper.user = 7\n[[listener]]\naddress = \"127.0.0.1:1\"\n[[key]]\nname = \"k\"\n{lines}"
        );
        let path = write(at, &text);
        outcome(&["--check", "--config", &path])
    };
    for (algorithm, file) in [("EdDSA", "ed"), ("ES256", "es"), ("RS256", "rs")] {
        let (code, said) = try_key(&format!(
            "algorithm = \"{algorithm}\"\nfile = \"{file}.pem\""
        ));
        assert_eq!(code, 0, "{algorithm}: {said}");
    }
    for lines in [
        "algorithm = \"ES256\"\nfile = \"ed.pem\"",
        "algorithm = \"EdDSA\"\nfile = \"rs.pem\"",
        "algorithm = \"RS256\"\nfile = \"es.pem\"",
        "algorithm = \"EdDSA\"\nfile = \"empty.pem\"",
        "algorithm = \"EdDSA\"\nfile = \"cut.pem\"",
        "algorithm = \"EdDSA\"\nfile = \"private.pem\"",
        "algorithm = \"EdDSA\"\nfile = \"missing.pem\"",
        "secret-file = \"short\"",
        "jwks-file = \"jwks.json\"",
        "jwks-file = \"ed.pem\"",
    ] {
        let (code, said) = try_key(lines);
        assert_eq!(code, 78, "{lines}: {said}");
        assert!(said.contains("\"k\""), "it says which: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_helper_that_is_not_there_is_69_and_says_what_to_do() {
    let dir = place();
    let text = format!(
        "state-dir = {:?}\nsandbox = \"off\"\nadmin.address = \"unix:{}\"\n\
         [helper]\nsocket = \"/nowhere/helper.sock\"\nuser = 7\n\
         [[listener]]\naddress = \"127.0.0.1:{}\"\n",
        dir.path().join("state"),
        dir.path().join("admin.sock").display(),
        free_port(),
    );
    let path = write(dir.path(), &text);
    let (code, said) = outcome(&["--config", &path]);
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("rvpn-privhelper"), "{said}");
}

#[test]
fn a_port_that_is_taken_is_69() {
    let dir = place();
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let text = format!(
        "state-dir = {:?}\nhelper.user = 7\n[[listener]]\naddress = \"{}\"\n",
        dir.path(),
        held.local_addr().unwrap()
    );
    let path = write(dir.path(), &text);
    let (code, said) = outcome(&["--config", &path]);
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("another program"), "{said}");
}

#[test]
fn no_listener_may_be_where_translated_connections_come_from() {
    let listener = |port| rvpn_gateway::config::Listener {
        address: SocketAddr::new("::".parse().unwrap(), port),
        mode: rvpn_gateway::config::Mode::Tls,
        proxy_from: Vec::new(),
        forwarded_from: Vec::new(),
    };
    let check = rvpn_gateway::lifecycle::check_nat_range;
    let range = (16_384, 32_767);
    for port in [443, 16_383, 32_768] {
        assert_eq!(check(&[listener(port)], range), Ok(()));
    }
    for port in [16_384, 20_000, 32_767] {
        let error = check(&[listener(443), listener(port)], range).unwrap_err();
        assert!(error.contains(&port.to_string()), "{error}");
    }
}

/// The program, serving on top of a helper that hands out no real devices.
struct Served {
    child: Child,
    lines: mpsc::Receiver<String>,
    port: u16,
    ops: Signer,
    // In the directory, so dropped before it.
    _helper: FakeHelper,
    dir: TempDir,
}

impl Served {
    fn start(more: &str) -> Served {
        let dir = place();
        let at = dir.path();
        let ops = Signer::ed25519();
        ops.write_public(&at.join("ops.pem"));
        let helper = FakeHelper::start(at, 4);
        fs::set_permissions(&helper.socket, fs::Permissions::from_mode(0o666)).unwrap();
        let port = free_port();
        write(at, &configuration(at, port, more));
        let mut child = binary()
            .args(["--config", at.join("gateway.toml").to_str().unwrap()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let (say, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if say.send(line).is_err() {
                    return;
                }
            }
        });
        let served = Served {
            child,
            lines,
            dir,
            port,
            ops,
            _helper: helper,
        };
        served.wait_for("ready");
        served
    }

    /// The first line that has this in it.
    fn wait_for(&self, text: &str) -> String {
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

    fn signal(&self, signal: Signal) {
        kill(
            Pid::from_raw(i32::try_from(self.child.id()).unwrap()),
            signal,
        )
        .unwrap();
    }

    fn exit_code(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
    }

    fn ask(&self, request: &str) -> (String, TcpStream) {
        self.ask_at(self.port, request)
    }

    fn ask_at(&self, port: u16, request: &str) -> (String, TcpStream) {
        let mut io = TcpStream::connect(("127.0.0.1", port)).unwrap();
        io.set_read_timeout(Some(PATIENCE)).unwrap();
        io.write_all(request.as_bytes()).unwrap();
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && io.read(&mut byte).unwrap_or(0) == 1 {
            head.push(byte[0]);
        }
        (String::from_utf8(head).unwrap(), io)
    }

    fn login(&self) -> (String, TcpStream) {
        self.login_at(self.port)
    }

    fn login_at(&self, port: u16) -> (String, TcpStream) {
        let token = self.ops.good();
        let more =
            format!("Sec-WebSocket-Protocol: rvpn.packets.1\r\nAuthorization: Bearer {token}\r\n");
        self.ask_at(port, &upgrade(NATIVE, "127.0.0.1", &more))
    }

    fn status(&self, field: &str) -> String {
        let path = format!("/proc/{}/status", self.child.id());
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find(|l| l.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _gone = self.child.kill();
        self.child.wait().unwrap();
    }
}

fn configuration(at: &Path, port: u16, more: &str) -> String {
    let user = match getuid().is_root() {
        true => format!("user = {NOBODY}\n"),
        false => String::new(),
    };
    format!(
        "state-dir = {:?}\n{user}admin.address = \"unix:{}\"\n\
         [helper]\nsocket = {:?}\nuser = {}\n\
         [[listener]]\naddress = \"127.0.0.1:{port}\"\nmode = \"plain\"\n\
         [[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"ops.pem\"\n{more}",
        at.join("state"),
        at.join("admin.sock").display(),
        at.join("helper.sock"),
        getuid(),
    )
}

#[test]
fn it_serves_locked_in_reloads_without_a_drop_and_ends_in_order() {
    let mut served = Served::start("");
    assert_eq!(served.status("CapEff:"), "0000000000000000");
    assert_eq!(served.status("NoNewPrivs:"), "1");
    assert_eq!(served.status("Seccomp:"), "2");
    if getuid().is_root() {
        assert_eq!(served.status("Uid:"), NOBODY.to_string());
    }

    let (head, mut session) = served.login();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(
        served
            .ask("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            .0
            .starts_with("HTTP/1.1 200 ")
    );

    // A broken file changes nothing.
    let at = served.dir.path().to_owned();
    write(&at, "[[listner]]\n");
    served.signal(Signal::SIGHUP);
    let line = served.wait_for("was not reloaded");
    assert!(line.contains("did you mean"), "{line}");
    assert!(served.login().0.starts_with("HTTP/1.1 101 "));

    // A good one is taken over: another key, another path; who is here stays.
    let new = Signer::ed25519();
    new.write_public(&at.join("ops.pem"));
    let more = "[[dialect]]\npath = \"/open\"\nanonymous = true\n[limits]\ndrain-seconds = 3\n";
    write(&at, &configuration(&at, served.port, more));
    served.signal(Signal::SIGHUP);
    served.wait_for("configuration reloaded");
    assert!(
        served.login().0.starts_with("HTTP/1.1 403 "),
        "the old key is gone"
    );
    served.ops = new;
    assert!(served.login().0.starts_with("HTTP/1.1 101 "));
    let open = upgrade("/open", "127.0.0.1", "");
    assert!(served.ask(&open).0.starts_with("HTTP/1.1 101 "));
    session.set_nonblocking(true).unwrap();
    let still = session.read(&mut [0; 16]).unwrap_err();
    assert_eq!(
        still.kind(),
        std::io::ErrorKind::WouldBlock,
        "the first session is still open"
    );

    let start = Instant::now();
    served.signal(Signal::SIGTERM);
    assert_eq!(served.exit_code(), 0);
    assert!(start.elapsed() < Duration::from_secs(15));
    assert!(TcpStream::connect(("127.0.0.1", served.port)).is_err());
}

/// R-16, with the process locked in: a port is opened and closed by the file
/// and by the API; one that cannot be opened changes nothing.
#[test]
fn r_16_a_caged_gateway_opens_and_closes_ports() {
    let served = Served::start("");
    let at = served.dir.path().to_owned();
    let (second, third) = (free_port(), free_port());
    let with = |ports: &[u16]| {
        let blocks = ports.iter().map(|port| {
            format!("[[listener]]\naddress = \"127.0.0.1:{port}\"\nmode = \"plain\"\n")
        });
        configuration(&at, served.port, &blocks.collect::<String>())
    };
    let reload = |text: &str, said: &str| {
        write(&at, text);
        served.signal(Signal::SIGHUP);
        served.wait_for(said)
    };
    let page = |port: u16| {
        let mut io = TcpStream::connect(("127.0.0.1", port)).ok()?;
        io.set_read_timeout(Some(PATIENCE)).unwrap();
        io.write_all(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        io.read_to_string(&mut answer).unwrap();
        Some(answer.starts_with("HTTP/1.1 200 "))
    };
    reload(&with(&[second]), "configuration reloaded");
    assert_eq!((page(second), page(third)), (Some(true), None));
    // Taken, in the helper's range: nothing of the file comes into force.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    for (port, why) in [
        (
            taken.local_addr().unwrap().port(),
            "another listener or program",
        ),
        (20_000, "16384 to 32767"),
    ] {
        let line = reload(&with(&[third, port]), "was not reloaded");
        assert!(line.contains(why), "{line}");
        assert_eq!((page(second), page(third)), (Some(true), None));
    }
    // Who is here through one that goes stays.
    let (head, mut session) = served.login_at(second);
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    reload(&with(&[third]), "configuration reloaded");
    assert_eq!(page(third), Some(true));
    let deadline = Instant::now() + PATIENCE;
    while page(second).is_some() {
        assert!(Instant::now() < deadline, "it does not close");
    }
    session.set_nonblocking(true).unwrap();
    let still = session.read(&mut [0; 16]).unwrap_err();
    assert_eq!(still.kind(), std::io::ErrorKind::WouldBlock);

    // By the API, and by its absence from the file it is not closed.
    let asked = free_port();
    let body = format!("{{\"address\": \"127.0.0.1:{asked}\", \"mode\": \"plain\"}}");
    let api = |method: &str, path: &str, body: &str| {
        let mut io = std::os::unix::net::UnixStream::connect(at.join("admin.sock")).unwrap();
        let request = format!(
            "{method} /api/v1/listeners{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        io.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        io.read_to_string(&mut answer).unwrap();
        answer
    };
    let added = api("POST", "", &body);
    assert!(
        added.starts_with("HTTP/1.1 201 ") && added.contains("added"),
        "{added}"
    );
    assert_eq!(page(asked), Some(true));
    assert!(api("POST", "", &body).contains("exists"));
    reload(&with(&[third]), "configuration reloaded");
    assert_eq!(page(asked), Some(true));
    if getuid().is_root() {
        // Not root any more.
        let low = api("POST", "", "{\"address\": \"127.0.0.1:1023\"}");
        let open = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
        if open.trim() == "1024" {
            assert!(
                low.starts_with("HTTP/1.1 422 ") && low.contains("under 1024"),
                "{low}"
            );
        }
    }
    let gone = api("DELETE", &format!("/127.0.0.1:{asked}"), "");
    assert!(gone.starts_with("HTTP/1.1 204 "), "{gone}");
    assert_eq!(page(asked), None);
}

#[test]
fn a_killed_gateway_starts_again_on_what_it_left() {
    let mut served = Served::start("");
    let (head, _session) = served.login();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    served.signal(Signal::SIGKILL);
    served.exit_code();
    // The admin socket's file, the store and the state directory are all still there.
    assert!(served.dir.path().join("admin.sock").exists());
    let again = binary()
        .args([
            "--config",
            served.dir.path().join("gateway.toml").to_str().unwrap(),
        ])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = std::mem::replace(&mut served.child, again).stderr;
    drop(stderr);
    let (say, lines) = mpsc::channel();
    let stderr = served.child.stderr.take().unwrap();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if say.send(line).is_err() {
                return;
            }
        }
    });
    served.lines = lines;
    served.wait_for("ready");
    assert!(served.login().0.starts_with("HTTP/1.1 101 "));
}

#[test]
fn a_listener_is_inherited_from_the_service_manager() {
    // systemd's protocol: descriptor 3 and two variables, of which one names
    // the process, so a shell has to become it.
    let dir = place();
    let at = dir.path();
    Signer::ed25519().write_public(&at.join("ops.pem"));
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let text = configuration(at, address.port(), "").replace(
        &format!("{:?}", at.join("helper.sock")),
        "\"/nowhere/helper.sock\"",
    );
    let path = write(at, &text);
    if getuid().is_root() {
        chown(at, Some(NOBODY), None).unwrap();
    }
    let run = |fd: &str| {
        let script = format!(
            "exec 3<&{fd}; LISTEN_PID=$$ LISTEN_FDS=1 exec {} --config {path}",
            env!("CARGO_BIN_EXE_rvpn-gateway")
        );
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).env_clear();
        command.stdin(Stdio::from(std::os::fd::OwnedFd::from(
            socket.try_clone().unwrap(),
        )));
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), said)
    };
    // It got past its listeners, although the address is taken, and misses the helper.
    let (code, said) = run("0");
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("the helper does not answer"), "{said}");
    // One that no [[listener]] asks for is an error.
    let other = text.replace(
        &format!(":{}\"", address.port()),
        &format!(":{}\"", free_port()),
    );
    fs::write(&path, other).unwrap();
    let (code, said) = run("0");
    assert_eq!(code, 78, "{said}");
    assert!(said.contains(&address.to_string()), "{said}");
}
