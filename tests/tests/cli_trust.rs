//! Whoever is not the gateway gets nothing, not even a token.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;

use rvpn_lab::fake_gateway::{Authority, FakeGateway, Identity, welcome};
use rvpn_lab::machine::Machine;
use rvpn_lab::outside::{Chatter, Outside, network};
use rvpn_lab::topology::{FAR4, GW4, NB4, UP6, at};
use rvpn_lab::{Lab, wait_until};

struct Scene {
    lab: Lab,
    phone: Machine,
}

fn scene() -> Scene {
    let lab = Lab::new();
    let phone = Machine::new(&lab, "phone", 10);
    Scene { lab, phone }
}

fn trusting(words: Vec<String>, more: &[&str]) -> Vec<String> {
    let more = more.iter().map(|w| (*w).to_owned());
    words.into_iter().chain(more).collect()
}

/// `up` and `ping` end at once, and for good, before a login was sent.
#[track_caller]
fn refused(phone: &Machine, fake: &FakeGateway, words: &[String], named: &str) {
    let before = network(&phone.ns);
    let mut up = phone.begin_with(words, &["--no-dns"]);
    assert_eq!(up.ended(), 76, "{}", up.log());
    assert!(up.log().contains(named), "{named}: {}", up.log());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let said = phone.rvpn(&[&["ping", FAR4, "-c", "1"], &words[..]].concat());
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.err.contains(named), "{named}: {said:?}");
    let heard = fake.heard();
    assert_eq!(heard.connections, 2, "{named}");
    assert!(heard.logins.is_empty(), "{:?}", heard.logins);
    assert_eq!(network(&phone.ns), before);
}

#[test]
fn cli_10_certificates_that_prove_nothing_end_it_before_the_login() {
    let Scene { lab, phone } = &scene();
    let (known, other) = (Authority::new(), Authority::new());
    let file = known.file(&phone.home).display().to_string();
    for (port, identity, named) in [
        (1, known.identity(NB4, false), "another name"),
        (2, known.identity("vpn.test", false), "another name"),
        (3, known.identity(GW4, true), "expired"),
        (4, Identity::alone(GW4), "signed by nobody known"),
        (5, other.identity(GW4, false), "signed by nobody known"),
    ] {
        let fake = FakeGateway::start(&lab.gw, &at(GW4, 8440 + port), identity, welcome());
        let words = trusting(fake.words_without_trust(phone), &["--ca-file", &file]);
        refused(phone, &fake, &words, named);
    }
    // The same words and a proper certificate.
    let good = known.identity(GW4, false);
    let fake = FakeGateway::start(&lab.gw, &at(GW4, 8450), good, welcome());
    let words = trusting(fake.words_without_trust(phone), &["--ca-file", &file]);
    let up = phone.up_with(&words, &["--no-dns"]);
    assert_eq!(fake.heard().logins, ["Bearer canary.of.token"]);
    up.down();
}

#[test]
fn cli_10_without_a_word_the_systems_authorities_count() {
    let Scene { lab, phone } = &scene();
    let (known, other) = (Authority::new(), Authority::new());
    // Of the test's own /etc.
    let dir = std::path::Path::new("/etc/ssl/certs");
    std::fs::create_dir_all(dir).expect("directory");
    let pem = std::fs::read(known.file(&phone.home)).expect("pem");
    std::fs::write(dir.join("ca-certificates.crt"), pem).expect("authorities");
    let fake = FakeGateway::start(
        &lab.gw,
        &at(GW4, 8451),
        other.identity(GW4, false),
        welcome(),
    );
    refused(phone, &fake, &fake.words_without_trust(phone), "signed by");
    fake.turn_into(known.identity(GW4, false));
    let up = phone.up_with(&fake.words_without_trust(phone), &["--no-dns"]);
    up.down();
}

#[test]
fn cli_10_a_pin_is_for_one_certificate() {
    let Scene { lab, phone } = &scene();
    let (first, second) = (Identity::alone(GW4), Identity::alone(GW4));
    let pin = first.fingerprint();
    let fake = FakeGateway::start(&lab.gw, &at(GW4, 8452), second, welcome());
    let words = trusting(fake.words_without_trust(phone), &["--fingerprint", &pin]);
    refused(phone, &fake, &words, "not the pinned one");
    fake.turn_into(first);
    let up = phone.up_with(&words, &["--no-dns"]);
    up.down();
}

/// Answers a client's first message with this, and keeps what it said.
fn answering(listener: TcpListener, answer: Vec<u8>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut tcp, _): (TcpStream, _) = listener.accept().expect("a client");
        let mut first = [0; 4096];
        let n = tcp.read(&mut first).expect("its hello");
        assert!(n > 0 && first[0] == 22, "a handshake begins");
        tcp.write_all(&answer).expect("answer");
        let mut rest = Vec::new();
        // How it ends is its choice; what it said is kept.
        let _cut = tcp.read_to_end(&mut rest);
        rest
    })
}

/// A ServerHello of this version, with this end of its random part.
fn server_hello(version: u8, suite: [u8; 2], random_end: &[u8; 8]) -> Vec<u8> {
    let mut body = vec![3, version];
    body.extend([0x5a; 24]);
    body.extend(random_end);
    body.push(0);
    body.extend(suite);
    body.push(0);
    let mut record = vec![
        22,
        3,
        version,
        0,
        u8::try_from(body.len() + 4).expect("short"),
    ];
    record.extend([2, 0, 0, u8::try_from(body.len()).expect("short")]);
    record.extend(body);
    record
}

#[test]
fn cli_10_older_tls_is_no_tls() {
    let Scene { lab, phone } = &scene();
    let before = network(&phone.ns);
    let pin = Identity::alone(GW4).fingerprint();
    let token = phone.secret("token", "canary.of.token");
    for (port, what, answer) in [
        (8460, "1.0", server_hello(1, [0xc0, 0x13], &[1; 8])),
        (8461, "1.1", server_hello(2, [0xc0, 0x13], &[1; 8])),
        // A good version, but what a server says that was made to fall back to it.
        (8462, "1.2", server_hello(3, [0xc0, 0x2f], b"DOWNGRD\x01")),
        // And the suites of old.
        (8463, "RC4", server_hello(3, [0, 5], &[1; 8])),
        (8464, "SSL 3", server_hello(0, [0, 5], &[1; 8])),
    ] {
        let listener = lab.gw.tcp(&at(GW4, port));
        let server = answering(listener, answer);
        let address = at(GW4, port);
        let words = [
            "--no-dns",
            "--server",
            &address,
            "--token-file",
            &token,
            "--fingerprint",
            &pin,
        ];
        let mut up = phone.begin(&words);
        assert_eq!(up.ended(), 76, "{what}: {}", up.log());
        assert!(up.log().contains("no TLS with"), "{what}: {}", up.log());
        let rest = server.join().expect("server");
        // An alert, and no application data.
        assert_eq!(rest.first(), Some(&21), "{what}: {rest:x?}");
        assert!(rest.len() < 16, "{what}: {rest:x?}");
    }
    assert_eq!(network(&phone.ns), before);
}

/// Who cuts the connection and answers in the gateway's place neither gets the
/// token nor ends the tunnel, which would open what it protects.
#[test]
fn cli_10_an_impostor_later_on_opens_nothing() {
    let Scene { lab, phone } = &scene();
    let mut outside = Outside::of(lab, &phone.ns);
    for more in [&["--no-dns"][..], &["--no-dns", "--kill-switch"]] {
        let authority = Authority::new();
        let file = authority.file(&phone.home).display().to_string();
        let good = || authority.identity(GW4, false);
        let port = 8470 + u16::try_from(more.len()).expect("few");
        let fake = FakeGateway::start(&lab.gw, &at(GW4, port), good(), welcome());
        let words = trusting(fake.words_without_trust(phone), &["--ca-file", &file]);
        let up = phone.up_with(&words, more);
        let chatter = Chatter::start(&phone.ns, &[FAR4, UP6]);
        let canary = chatter.change();
        fake.turn_into(Identity::alone(GW4));
        fake.cut();
        wait_until("it has tried several times", || {
            fake.heard().connections > 3
        });
        assert_eq!(fake.heard().logins.len(), 1);
        let status = phone.status();
        assert_eq!(status["state"], "reconnecting", "{status}");
        assert_eq!(outside.probe(&phone.ns, &[FAR4, UP6]), 0);
        fake.turn_into(good());
        wait_until("the gateway is back", || {
            phone.status()["state"] == "connected"
        });
        outside.fence(&phone.ns);
        assert_eq!(outside.leaked(canary), 0);
        drop(chatter);
        up.down();
    }
}
