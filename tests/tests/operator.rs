//! The operators' commands against a running gateway.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::{Machine, operator};
use rvpn_lab::topology::{GW4, UP4};
use rvpn_lab::{Helper, Lab, wait_until};

fn scene() -> (Lab, Helper, Gateway) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    (lab, helper, gateway)
}

#[test]
fn a_token_from_key_to_revocation() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let phone = Machine::new(&lab, "phone", 10);
    let file = |name: &str| phone.home.join(name).display().to_string();
    let key = file("mine.pem");
    let made = phone
        .rvpn(&["token", "key", "--out", &key, "--name", "mine"])
        .good();
    assert!(made.contains("[[key]]\nname = \"mine\""), "{made}");
    let mode = fs::metadata(&key).expect("key").permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    assert_eq!(
        phone.rvpn(&["token", "key", "--out", &key]).code,
        1,
        "it is not overwritten"
    );

    let public = file("mine.pub.pem");
    let block = format!("[[key]]\nname = \"mine\"\nalgorithm = \"EdDSA\"\nfile = {public:?}\n");
    let gateway = Gateway::start(&lab, &helper, &block);
    let pin = gateway.fingerprint();
    let mint = |account: &str, more: &[&str]| {
        let words = [
            "token",
            "mint",
            "--key",
            &key,
            "--kid",
            "mine",
            "--account",
            account,
        ];
        let token = phone.rvpn(&[&words[..], more].concat()).good();
        let path = file(account);
        fs::write(&path, &token).expect("token");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
        path
    };
    let ping = |token: &str| {
        let server = [
            "--server",
            GW4,
            "--fingerprint",
            &pin,
            "--token-file",
            token,
        ];
        phone.rvpn(&[&["ping", UP4, "-c", "1"][..], &server].concat())
    };
    let alice = mint("alice", &["--valid", "10m", "--jti", "one"]);
    let bob = mint("bob", &[]);
    ping(&alice).good();
    ping(&bob).good();

    let shown = phone.rvpn(&["token", "inspect", &alice]).good();
    for part in ["EdDSA", "mine", "alice", "one", "(in "] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let json = phone.rvpn(&["token", "inspect", &alice, "--json"]).json();
    assert_eq!(json["claims"]["sub"], "alice");

    // By its identifier, by its file, by the account; and back.
    let revoke =
        |words: &[&str]| operator(&lab, &gateway, &[&["token", "revoke"], words].concat()).good();
    revoke(&["--jti", "one", "--reason", "lost"]);
    assert_eq!(ping(&alice).code, 2);
    let list = operator(&lab, &gateway, &["token", "revoked"]).good();
    assert!(list.contains("one") && list.contains("lost"), "{list}");
    ping(&mint("alice", &["--jti", "two"])).good();
    revoke(&["--file", &bob]);
    assert_eq!(ping(&bob).code, 2);
    revoke(&["--account", "alice"]);
    assert_eq!(ping(&mint("alice", &["--jti", "three"])).code, 2);
    revoke(&["--account", "alice", "--undo"]);
    ping(&mint("alice", &["--jti", "four"])).good();

    for (words, why) in [
        (
            &["token", "mint", "--key", &alice, "--account", "x"][..],
            "is no private key",
        ),
        (
            &[
                "token",
                "mint",
                "--key",
                &key,
                "--account",
                "x",
                "--valid",
                "1w",
            ],
            "'1w' is not a time",
        ),
        (&["token", "inspect", &key], "this is no token"),
        (&["token", "revoke"], "say what to revoke"),
    ] {
        let said = phone.rvpn(words);
        assert!(
            said.code != 0 && said.err.contains(why),
            "{words:?}: {said:?}"
        );
        // What was wrong is never shown, as it may be secret.
        assert!(!said.err.contains("PRIVATE KEY"), "{}", said.err);
    }
}

#[test]
fn r_16_ports_are_opened_listed_and_closed() {
    let (lab, _helper, gateway) = scene();
    let run = |words: &[&str]| operator(&lab, &gateway, words);
    let made = run(&["listener", "add", "9001"]).good();
    assert!(made.contains("9001: added"), "{made}");
    let again = run(&["listener", "add", "9001", "--json"]).json();
    assert_eq!(again["status"], "exists");
    let list = run(&["listener", "ls"]).good();
    for part in ["9001", ":443", "api", "config", "auto"] {
        assert!(list.contains(part), "{part}: {list}");
    }
    // A device joins and pings through the port that was just opened.
    let link = run(&[
        "invite",
        "alice",
        "--json",
        "--address",
        &format!("{GW4}:9001"),
    ])
    .json();
    let phone = Machine::new(&lab, "phone", 10);
    let link = link["link"].as_str().expect("a link").to_owned();
    phone.rvpn(&["join", &link]).good();
    phone.rvpn(&["ping", "-c", "1", UP4]).good();
    run(&["listener", "add", "9002", "--for", "box.example"]).good();
    let named = run(&["listener", "ls"]).good();
    assert!(named.contains("box.example"), "{named}");
    for (words, why) in [
        (&["listener", "add", "9002"][..], "box.example already"),
        (&["listener", "add", "20000"], "16384 to 32767"),
        (&["listener", "add", "x"], "address"),
        (&["listener", "rm", "9003"], "no such listener"),
    ] {
        let said = run(words);
        let clear = said.code == 1 && said.err.contains(why);
        assert!(clear, "{words:?}: {said:?}");
    }
    run(&["listener", "rm", "9001"]).good();
    run(&["listener", "rm", "9002"]).good();
    assert_ne!(phone.rvpn(&["ping", "-c", "1", UP4]).code, 0);
    let list = run(&["listener", "ls"]).good();
    assert!(!list.contains("900") && list.contains(":443"), "{list}");
}

#[test]
fn invites_are_listed_taken_back_and_drawn() {
    let (lab, _helper, gateway) = scene();
    let run = |words: &[&str]| operator(&lab, &gateway, words);
    let drawn = run(&["invite", "alice", "--qr", "--uses", "3", "--valid", "2h"]).good();
    let link = drawn.lines().last().expect("a link").to_owned();
    assert!(link.starts_with("rvpn://vpn.test/?fp="), "{link}");
    assert!(drawn.lines().count() > 20 && drawn.contains('█'), "{drawn}");
    let json = run(&["invite", "bob", "--json"]).json();
    let list = run(&["invite", "--list"]).good();
    let id = json["invite"]["id"].as_str().expect("an id");
    for part in ["alice", "bob", id] {
        assert!(list.contains(part), "{part}: {list}");
    }
    run(&["invite", "--remove", id]).good();
    let list = run(&["invite", "--list"]).good();
    assert!(!list.contains(id) && list.contains("alice"), "{list}");
    let gone = run(&["invite", "--remove", id]);
    assert_eq!(gone.code, 1, "{gone:?}");
    assert_eq!(
        gone.err,
        run(&["invite", "--remove", "-r1yW"])
            .err
            .replace("-r1yW", id)
    );
    run(&["token", "revoke", "--jti", "-x", "--reason", "lost"]).good();
    let phone = Machine::new(&lab, "phone", 10);
    let taken = json["link"]
        .as_str()
        .expect("a link")
        .replace("vpn.test", GW4);
    assert_eq!(phone.rvpn(&["join", &taken]).code, 77);

    for (words, why) in [
        (&["invite", "a b"][..], "account"),
        (&["invite", "carol", "--uses", "0"], "uses is between"),
        (&["invite", "carol", "--valid", "x"], "'x' is not a time"),
        (&["invite"], "ACCOUNT"),
    ] {
        let said = run(words);
        assert!(
            said.code == 1 && said.err.contains(why),
            "{words:?}: {said:?}"
        );
    }
}

#[test]
fn sessions_are_seen_and_ended_and_their_use_remains() {
    let (lab, _helper, gateway) = scene();
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let run = |words: &[&str]| operator(&lab, &gateway, words);
    let mut up = phone.up(&["--no-dns"]);
    phone
        .ns
        .sh("ping", &["-c", "5", "-i", "0.05", "-s", "972", UP4]);
    // 5 echo requests of 1000 bytes each way, and nothing else from a machine at rest.
    wait_until("the counters show it", || {
        let row = &run(&["session", "ls", "--json"]).json()["sessions"][0];
        row["outbound"]["payload"] == 5000 && row["inbound"]["payload"] == 5000
    });
    let list = run(&["session", "ls"]).good();
    for part in ["phone", "packets", "1.1.1.10:", "5.0 kB"] {
        assert!(list.contains(part), "{part}: {list}");
    }
    let id = list
        .lines()
        .nth(1)
        .and_then(|l| l.split(' ').next())
        .expect("an id")
        .to_owned();
    assert_eq!(run(&["session", "end", "zz"]).code, 1);
    run(&["session", "end", &id]).good();
    // It was ended for good, so the client does not come back.
    assert_eq!(up.ended(), 77, "{}", up.log());
    assert_eq!(
        phone.ns.ip("rule").lines().count(),
        3,
        "everything was put back"
    );
    wait_until("the ledger has it", || {
        let usage = run(&["usage", "--json"]).json();
        let row = &usage["accounts"][0];
        row["account"] == "phone" && row["outbound"]["payload"] == 5000
    });
    let usage = run(&["usage", "phone", "--sessions", "--last", "1h"]).good();
    assert!(
        usage.contains("5.0 kB") && !usage.contains("(running)"),
        "{usage}"
    );
    let nobody = run(&["usage", "nobody"]).good();
    assert_eq!(nobody.lines().count(), 1, "{nobody}");
}

#[test]
fn an_api_that_is_not_there_is_named() {
    let lab = Lab::new();
    let phone = Machine::new(&lab, "phone", 10);
    let token = phone.home.join("token");
    fs::write(&token, "0123456789012345678901234567890123456789").expect("token");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).expect("mode");
    let token = token.display().to_string();
    for (words, code, why) in [
        (
            &["session", "ls", "--admin-token-file", &token][..],
            69,
            "127.0.0.1:7980",
        ),
        (&["session", "ls"], 78, "/var/lib/rvpn/admin.token"),
        (
            &["session", "ls", "--admin", "unix:/nowhere"],
            69,
            "unix:/nowhere",
        ),
    ] {
        let said = phone.rvpn(words);
        assert_eq!(said.code, code, "{words:?}: {said:?}");
        assert!(said.err.contains(why), "{words:?}: {}", said.err);
    }
}
