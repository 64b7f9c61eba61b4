//! Certificates by ACME, with the program itself and an authority that looks.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod admin_support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use admin_support::{Program, leaf, place, talk, until};
use rvpn_lab::acme_server::AcmeServer;
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
const NAME: &str = "vpn.test.example";

/// With an authority that looks at the gateway's ports as soon as they are known.
fn start(server: &AcmeServer, more: &str) -> Program {
    let dir = place();
    let ca = server.ca_file(dir.path());
    lead(
        server,
        Program::begin(dir, &configuration(server, ca.to_str().unwrap(), more)),
    )
}

fn lead(server: &AcmeServer, program: Program) -> Program {
    server.lead(program.port, program.plain);
    program.wait_for("ready");
    program
}

fn configuration(server: &AcmeServer, ca: &str, more: &str) -> String {
    format!(
        "names = [\"{NAME}\"]\n[acme]\ndirectory = \"{}\"\nca-file = \"{ca}\"\ncontact = \"ops@test.example\"\n{more}",
        server.directory()
    )
}

fn row(program: &Program, name: &str) -> Option<Value> {
    let all = program.api("GET", "/api/v1/certificates").json();
    let rows = all["certificates"].as_array().unwrap();
    rows.iter().find(|r| r["name"] == name).cloned()
}

fn valid(program: &Program) -> Value {
    until("a certificate", || {
        row(program, NAME).filter(|r| r["state"] == "valid")
    })
}

#[test]
fn r_28_a_certificate_is_got_by_tls_and_shown_to_visitors() {
    let server = AcmeServer::start(HOUR);
    let program = start(&server, "");
    let row = valid(&program);
    assert_eq!((&row["kind"], &row["failures"]), (&"own".into(), &0.into()));
    let tls = program.tls(NAME, server.ca_pem()).unwrap();
    assert_eq!(
        talk(tls, &format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n")).status,
        200
    );
    let asked = server.asked();
    assert_eq!(
        asked.looks,
        [("tls-alpn-01".to_owned(), NAME.to_owned(), true)]
    );
    assert_eq!((asked.accounts, asked.orders.len()), (1, 1));
    // Keys are for nobody else's eyes.
    let state = program.dir().join("state");
    for file in ["acme-account.json".to_owned(), format!("acme-{NAME}.pem")] {
        let mode = fs::metadata(state.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    // The next one at two thirds of the life, a little later at most.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let wait = row["next"].as_u64().unwrap() - now;
    assert!((2350..=2560).contains(&wait), "{wait}");
    // The challenge is over: nobody is shown its certificate.
    assert!(
        program
            .api("GET", "/api/v1/config")
            .text()
            .contains("\"self-signed\":false")
    );
}

#[test]
fn r_28_a_certificate_outlives_the_process_without_a_new_order() {
    let server = AcmeServer::start(HOUR);
    let program = start(&server, "");
    valid(&program);
    let before = leaf(&program.tls(NAME, server.ca_pem()).unwrap());
    let dir = program.stop();
    // Not even the authority is needed for it.
    server.close(true);
    let ca = dir.path().join("acme-ca.pem");
    let more = configuration(&server, ca.to_str().unwrap(), "");
    let program = Program::again(dir, &more);
    // It is there for the first visitor.
    let after = leaf(&program.tls(NAME, server.ca_pem()).unwrap());
    assert_eq!(before, after);
    valid(&program);
    assert_eq!(server.asked().orders.len(), 1);
}

#[test]
fn r_28_renewal_needs_no_restart_and_disturbs_no_connection() {
    let server = AcmeServer::start(Duration::from_secs(9));
    let program = start(&server, "");
    valid(&program);
    let mut first = program.tls(NAME, server.ca_pem()).unwrap();
    let before = leaf(&first);
    server.life(HOUR);
    let after = until("another certificate", || {
        let tls = program.tls(NAME, server.ca_pem()).ok()?;
        (leaf(&tls) != before).then(|| leaf(&tls))
    });
    assert_ne!(before, after);
    let asked = server.asked();
    assert_eq!((asked.accounts, asked.signed.len()), (1, 2));
    // Who was there before goes on with what it has.
    let reply = talk(&mut first, &format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n"));
    assert_eq!(reply.status, 200);
}

#[test]
fn r_28_http_is_the_fallback_on_the_plain_port() {
    let server = AcmeServer::start(HOUR);
    let dir = place();
    let ca = server.ca_file(dir.path());
    let more = configuration(&server, ca.to_str().unwrap(), "");
    let program = Program::begin(dir, &more);
    // As behind a proxy that ends TLS: what asks for the protocol gets no answer.
    server.lead(1, program.plain);
    program.wait_for("ready");
    valid(&program);
    let kinds: Vec<_> = server.asked().looks.into_iter().collect();
    assert_eq!(
        kinds,
        [
            ("tls-alpn-01".to_owned(), NAME.to_owned(), false),
            ("http-01".to_owned(), NAME.to_owned(), true)
        ]
    );
    // Tokens that are not ours are nobody's.
    let path = "/.well-known/acme-challenge/token-0-0";
    assert_eq!(program.http(NAME, path).status, 404);
    program.tls(NAME, server.ca_pem()).unwrap();
}

#[test]
fn r_28_a_challenge_that_is_not_met_is_reported_once_with_a_remedy() {
    let server = AcmeServer::start(HOUR);
    let dir = place();
    let ca = server.ca_file(dir.path());
    let only = "challenge = \"tls-alpn-01\"\n";
    let more = configuration(&server, ca.to_str().unwrap(), only);
    let program = Program::begin(dir, &more);
    server.lead(1, 1);
    let line = program.wait_for("got no certificate");
    assert!(
        line.contains("tls-alpn-01") && line.contains("port 443"),
        "{line}"
    );
    let row = row(&program, NAME).unwrap();
    assert_eq!(
        (&row["state"], &row["failures"]),
        (&"none".into(), &1.into())
    );
    assert!(
        row["error"].as_str().unwrap().contains("connection"),
        "{row}"
    );
    assert!(
        row["remedy"].as_str().unwrap().contains("acme.challenge"),
        "{row}"
    );
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let wait = row["next"].as_u64().unwrap() - now;
    assert!((50..=66).contains(&wait), "{wait}");
    assert_eq!(server.asked().looks.len(), 1);
    // The gateway serves meanwhile, and an operator who mended it need not wait.
    assert_eq!(program.http(NAME, "/").status, 200);
    server.lead(program.port, program.plain);
    let retry = format!("/api/v1/certificates/{NAME}/retry");
    assert_eq!(program.api("POST", &retry).status, 202);
    assert_eq!(
        program
            .api("POST", "/api/v1/certificates/x.example/retry")
            .status,
        404
    );
    valid(&program);
}

#[test]
fn r_28_an_authority_that_nobody_vouches_for_is_not_asked() {
    let server = AcmeServer::start(HOUR);
    let other = AcmeServer::start(HOUR);
    let dir = place();
    let ca = other.ca_file(dir.path());
    let program = Program::again(dir, &configuration(&server, ca.to_str().unwrap(), ""));
    let line = program.wait_for("got no certificate");
    assert!(
        line.contains("UnknownIssuer") && line.contains("acme.ca-file"),
        "{line}"
    );
    assert_eq!(server.asked().accounts, 0);
}

#[test]
fn r_28_a_refused_name_and_a_lost_account_are_said_in_the_authoritys_words() {
    let server = AcmeServer::start(HOUR);
    server.refuse(true);
    let program = start(&server, "");
    let line = program.wait_for("got no certificate");
    assert!(
        line.contains("policy forbids") && line.contains("acme.names"),
        "{line}"
    );
    server.refuse(false);
    server.forget();
    let retry = format!("/api/v1/certificates/{NAME}/retry");
    // The account is found to be lost at the order; the next try makes another.
    until("a certificate", || {
        program.api("POST", &retry);
        row(&program, NAME).filter(|r| r["state"] == "valid")
    });
    assert_eq!(server.asked().accounts, 2);
}
