//! The program itself: its log in files, the ancestor's configuration, and
//! operators on the public port.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod admin_support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use admin_support::{Program, binary, place, talk, until};
use nix::unistd::getuid;
use rvpn_lab::acme_server::AcmeServer;

/// A directory for logs, of the user whom the program becomes.
fn logs(dir: &Path) -> PathBuf {
    let logs = dir.join("logs");
    fs::create_dir(&logs).unwrap();
    if getuid().is_root() {
        chown(&logs, Some(65_534), Some(65_534)).unwrap();
    }
    logs
}

fn files(dir: &Path) -> Vec<(String, String)> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<_> = entries
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(path).unwrap_or_default())
        })
        .collect();
    all.sort();
    all
}

#[test]
fn r_20_the_log_goes_into_a_file_that_is_set_aside_from_inside_the_cage() {
    let dir = place();
    let logs = logs(dir.path());
    // Almost full, so that a few lines are enough.
    let before = format!("{}\n", "x".repeat((1 << 20) - 2000));
    fs::write(logs.join("gateway.log"), &before).unwrap();
    let more = format!(
        "[log]\nlevel = \"info,rvpn_gateway=debug\"\nfile = {:?}\nrotate-mb = 1\nkeep = 2\n",
        logs.join("gateway.log")
    );
    let program = Program::begin(dir, &more);
    let current = logs.join("gateway.log");
    let has = |text: &str| {
        let all = files(&logs);
        all.iter().any(|(_, t)| t.contains(text)).then_some(())
    };
    until("the gateway is ready", || has(" ready "));
    until("another file", || {
        // Whoever is refused is worth a line.
        for _ in 0..20 {
            program.http("elsewhere.example", "/");
            drop(std::net::TcpStream::connect(("127.0.0.1", program.port)));
        }
        (files(&logs).len() == 2).then_some(())
    });
    let all = files(&logs);
    assert_eq!(all[0].0, "gateway.log");
    assert!(all[1].0.starts_with("gateway.log.20"), "{}", all[1].0);
    assert!(all[1].1.starts_with(&before[..100]) && all[1].1.len() <= 1 << 20);
    assert!(all.iter().all(|(_, text)| text.ends_with('\n')));
    let mode = fs::metadata(&current).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    assert_eq!(program.said(), Vec::<String>::new());
    drop(program.stop());
}

#[test]
fn r_20_standard_output_nothing_and_levels() {
    let program = Program::begin(place(), "[log]\nfile = \"-\"\n");
    assert!(program.wait_for("ready").starts_with("stdout: "));
    drop(program);
    let program = Program::begin(place(), "[log]\nfile = \"none\"\n");
    until("the gateway", || {
        let sock = program.dir().join("admin.sock");
        std::os::unix::net::UnixStream::connect(sock).ok()
    });
    assert_eq!(program.api("GET", "/readyz").status, 200);
    assert_eq!(program.said(), Vec::<String>::new());
    drop(program);
    let program = Program::start("[log]\nlevel = \"debug\"\n");
    // Whoever says what nobody understands is worth a line of this level.
    drop(program.tls("vpn.test.example", ""));
    program.wait_for("DEBUG");
}

#[test]
fn r_20_a_log_that_cannot_be_written_is_said_before_the_start() {
    let dir = place();
    let config = dir.path().join("gateway.toml");
    let text = "helper.user = 7\n[[listener]]\naddress = \"127.0.0.1:1\"\n[log]\n";
    let run = |log: &str, arguments: &[&str]| {
        fs::write(&config, format!("{text}{log}\n")).unwrap();
        let config = config.to_str().unwrap();
        let output = binary()
            .args(["--config", config])
            .args(arguments)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, said) = run("file = \"/nowhere/at/all.log\"", &[]);
    assert_eq!(code, Some(78), "{said}");
    assert!(
        said.contains("/nowhere/at/all.log") && said.contains("log.file"),
        "{said}"
    );
    let (code, said) = run("file = \"stdout\"\nkeep = 3", &["--check"]);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("log: keep is about a file"), "{said}");
}

#[test]
fn r_26_an_unknown_protocol_is_told_so_where_that_is_configured() {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    let answer = |program: &Program, first: &[u8]| {
        let mut io = TcpStream::connect(("127.0.0.1", program.port)).unwrap();
        io.set_read_timeout(Some(admin_support::PATIENCE)).unwrap();
        io.write_all(first).unwrap();
        let mut bytes = Vec::new();
        let _end = io.read_to_end(&mut bytes);
        bytes
    };
    let program = Program::start("[front]\nunknown = \"json\"\n");
    for first in [
        &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
        b"\x00\x01binary\xff\xfe more of it than a few bytes",
    ] {
        let said: serde_json::Value = serde_json::from_slice(&answer(&program, first)).unwrap();
        assert_eq!(said["error"]["code"], "E_INVALID_PROTOCOL");
        assert!(said["error"]["message"].is_string());
    }
    drop(program);
    let program = Program::start("");
    assert_eq!(answer(&program, b"SSH-2.0-OpenSSH_9.2\r\n"), b"");
}

const ANCESTOR: &str = "\
# as it came with the program
rvpn:
  serverName: rvpn1
  wssdomain: vpn.ancestor.example
  admindomain: rvpn.ancestor.example
  genericlistener: 8443
  deadtime:
    dwell: 300
    idle: 60
    cancelcheck: 10
  domains:
    a.ancestor.example:
      secret: abc123
    b.ancestor.example:
      secret: 'another, longer secret of this name'
  loadbalancing:
    defaultmethod: round-robin
";

#[test]
fn r_19_the_ancestors_configuration_becomes_one_that_passes_the_check() {
    let dir = place();
    let at = dir.path();
    fs::create_dir(at.join("certs")).unwrap();
    let pair = rcgen::generate_simple_self_signed(vec!["vpn.ancestor.example".to_owned()]).unwrap();
    fs::write(at.join("certs/fullchain.pem"), pair.cert.pem()).unwrap();
    fs::write(
        at.join("certs/privkey.pem"),
        pair.signing_key.serialize_pem(),
    )
    .unwrap();
    let yaml = at.join("go-rvpn-server.yaml");
    fs::write(&yaml, ANCESTOR).unwrap();
    let import = binary()
        .args(["config", "import"])
        .arg(&yaml)
        .output()
        .unwrap();
    assert!(import.status.success());
    let text = String::from_utf8(import.stdout).unwrap();
    assert!(
        text.contains("[[legacy]]") && text.contains("has 6 characters"),
        "{text}"
    );
    // The user of the helper need not be there where the tests run.
    fs::write(at.join("gateway.toml"), format!("helper.user = 7\n{text}")).unwrap();
    let check = binary()
        .args(["--check", "--config"])
        .arg(at.join("gateway.toml"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(check.status.success(), "{said}\n{text}");

    for (wrong, what) in [
        (ANCESTOR.replace("8443", "port"), "rvpn.genericlistener"),
        (ANCESTOR.replace("    dwell: 300", "    - dwell"), "line 8"),
        ("a: 1\n".to_owned(), "no key rvpn"),
    ] {
        fs::write(&yaml, wrong).unwrap();
        let import = binary()
            .args(["config", "import"])
            .arg(&yaml)
            .output()
            .unwrap();
        let said = String::from_utf8(import.stderr).unwrap();
        assert_eq!(import.status.code(), Some(78), "{said}");
        assert!(
            said.contains(what) && said.contains("go-rvpn-server.yaml"),
            "{said}"
        );
        assert!(import.stdout.is_empty());
    }
    let missing = binary()
        .args(["config", "import", "/nowhere.yaml"])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(78));
}

#[test]
fn r_17_operators_come_in_by_a_name_of_their_own_with_tls_and_the_token() {
    const ADMIN: &str = "rvpn.test.example";
    let server = AcmeServer::start(Duration::from_secs(3600));
    let dir = place();
    let ca = server.ca_file(dir.path());
    let more = format!(
        "names = [\"vpn.test.example\"]\nadmin.public = [\"{ADMIN}\"]\nlimits.login-failures = 5\n\
         [acme]\ndirectory = \"{}\"\nca-file = {ca:?}\n",
        server.directory()
    );
    let program = Program::begin(dir, &more);
    server.lead(program.port, program.plain);
    program.wait_for("ready");
    // Its certificate is got with the others.
    let open = || until("a certificate", || program.tls(ADMIN, server.ca_pem()).ok());
    let ask = |method: &str, path: &str, more: &str| {
        talk(
            open(),
            &format!("{method} {path} HTTP/1.1\r\nHost: {ADMIN}\r\n{more}"),
        )
    };
    let root = ask("GET", "/", "");
    assert_eq!(
        (root.status, root.header("location")),
        (301, Some("/admin"))
    );
    assert!(ask("GET", "/admin/", "").text().contains("admin.js"));
    let token = fs::read_to_string(program.dir().join("state/admin.token")).unwrap();
    let bearer = format!("Authorization: Bearer {}\r\n", token.trim());
    let status = ask("GET", "/api/com.daplie.tunnel/status/", &bearer).json();
    assert_eq!(status["result"]["admin_domain"], ADMIN);
    assert_eq!(ask("GET", "/api/v1/servers", "").status, 401);
    // A page of another origin has no business here, one of this host has.
    let foreign = format!("{bearer}Origin: https://evil.example\r\n");
    assert_eq!(ask("GET", "/api/v1/servers", &foreign).status, 403);
    let own = format!("{bearer}Origin: https://{ADMIN}\r\n");
    assert_eq!(ask("GET", "/api/v1/servers", &own).status, 200);

    // Not without TLS, not under another name, and not by claiming to be local.
    let in_clear = program.http(ADMIN, "/api/v1/servers");
    assert!(matches!(in_clear.status, 404 | 421), "{in_clear:?}");
    for host in [ADMIN, "127.0.0.1", "localhost", "[::1]"] {
        let other = until("a certificate", || {
            program.tls("vpn.test.example", server.ca_pem()).ok()
        });
        let reply = talk(
            other,
            &format!("GET /api/v1/servers HTTP/1.1\r\nHost: {host}\r\n{bearer}"),
        );
        assert!(matches!(reply.status, 404 | 421), "{host}: {reply:?}");
    }
    let guesses = (0..10).map(|n| {
        ask(
            "GET",
            "/api/v1/servers",
            &format!("Authorization: Bearer guess{n}\r\n"),
        )
        .status
    });
    let guesses: Vec<_> = guesses.collect();
    assert_eq!(guesses[0], 401);
    assert_eq!(guesses[9], 429);
}
