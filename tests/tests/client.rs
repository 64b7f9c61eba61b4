//! `rvpn join`, `ping`, `doctor` and what they say, as a user meets them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::{Machine, operator};
use rvpn_lab::outside::Outside;
use rvpn_lab::topology::{GW4, GW6, UP4, UP6};
use rvpn_lab::{Helper, Lab, wait_until};
use serde_json::Value;

fn with(extra: &str) -> (Lab, Helper, Gateway) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, extra);
    (lab, helper, gateway)
}

/// As the client would, with the same rights.
fn may_use_bbr() -> bool {
    let (family, kind) = (AddressFamily::Inet, SockType::Stream);
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    setsockopt(&socket, sockopt::TcpCongestion, &"bbr".into()).is_ok()
}

#[test]
fn join_and_ping() {
    let (lab, _helper, gateway) = with("");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    for host in [UP4, UP6] {
        let said = phone.rvpn(&["ping", host, "-c", "3", "-i", "0.05"]).good();
        let all = "3 packets transmitted, 3 received, 0% packet loss";
        assert!(said.contains(all), "{said}");
        assert!(said.contains("rtt min/avg/max/mdev = "), "{said}");
        assert_eq!(said.matches(" bytes from ").count(), 3, "{said}");
    }
    // Whoever is done holds nothing.
    wait_until("the leases are given back", || {
        gateway.sessions().is_empty()
    });
}

#[test]
fn ping_for_programs_and_its_statuses() {
    let (lab, _helper, gateway) = with("");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let quick = ["-c", "2", "-i", "0.05", "-W", "0.5"];
    let ping = |words: &[&str]| phone.rvpn(&[&["ping"], words, &quick].concat());

    let said = ping(&[UP4, "--json", "-s", "1000"]).good();
    let lines: Vec<Value> = said
        .lines()
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 3, "{said}");
    assert_eq!(
        (&lines[0]["seq"], &lines[0]["bytes"]),
        (&1.into(), &1008.into())
    );
    assert_eq!(
        (&lines[2]["sent"], &lines[2]["received"]),
        (&2.into(), &2.into())
    );
    assert_eq!(lines[2]["loss"], 0.0);
    assert!(
        lines[2]["ms"]["avg"].as_f64().is_some_and(|ms| ms > 0.0),
        "{said}"
    );

    // 1: nobody answers there. The neighbour's own neighbour does not exist.
    let silent = ping(&["8.8.4.4"]);
    assert_eq!(silent.code, 1, "{silent:?}");
    assert!(
        silent.out.contains("2 packets transmitted, 0 received"),
        "{silent:?}"
    );
    // 2: everything else.
    for (words, why) in [
        (&["no.such.host"][..], "no.such.host"),
        (&["not a name"], "'not a name' is neither an address"),
        (&["http://one.test/"], "'http://one.test/' is neither"),
        (&[UP6, "-4"], "no IPv4 address"),
        (&[UP4, "-6"], "no IPv6 address"),
        (&[UP4, "-s", "1473"], "at most 1472"),
        (&[UP4, "-s", "65001"], "65001"),
        (&[UP4, "-g", "nowhere"], "no gateway is called 'nowhere'"),
    ] {
        let said = ping(words);
        assert_eq!(said.code, 2, "{words:?}: {said:?}");
        assert!(said.err.contains(why), "{words:?}: {}", said.err);
    }
    // The largest that fits arrives.
    ping(&[UP4, "-s", "1472"]).good();
    ping(&[UP6, "-s", "1452", "-q"]).good();
}

#[test]
fn a_name_is_looked_up_at_the_gateway() {
    let lab = Lab::new();
    // Of the gateway's machine, and in this test's own mounts only.
    let hosts = lab.dir.join("hosts");
    let names = format!("{UP4} one.test\n{UP6} one.test\n10.9.9.9 inside.test\n");
    fs::write(&hosts, names).expect("hosts");
    rvpn_lab::topology::bind(&hosts, "/etc/hosts");
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    for (flag, address) in [("-4", UP4), ("-6", UP6)] {
        let said = phone.rvpn(&["ping", "one.test", flag, "-c", "1"]).good();
        assert!(said.contains(&format!("one.test ({address})")), "{said}");
    }
    let inside = phone.rvpn(&["ping", "inside.test", "-c", "1"]);
    assert_eq!(inside.code, 2, "{inside:?}");
    assert!(inside.err.contains("no public address"), "{}", inside.err);
}

#[test]
fn joining_says_what_is_wrong() {
    let (lab, _helper, gateway) = with("");
    let phone = Machine::new(&lab, "phone", 10);
    let link = operator(&lab, &gateway, &["invite", "alice", "--address", GW4]).good();
    let link = link.trim();

    // Before anything was joined.
    let nothing = phone.rvpn(&["ping", UP4]);
    assert!(nothing.err.contains("rvpn join LINK"), "{}", nothing.err);

    let other = "ab".repeat(32);
    let pin = link
        .split("fp=")
        .nth(1)
        .and_then(|r| r.split('&').next())
        .expect("a pin");
    for (words, code, why) in [
        (vec!["join", "http://vpn.test/"], 1, "rvpn://"),
        (
            vec!["join", link, "--name", "../x"],
            1,
            "'../x' cannot name a gateway",
        ),
        (
            vec!["join", &link.replace(pin, &other), "--name", "a"],
            76,
            "not the pinned one",
        ),
        (
            vec!["join", &link.replace(GW4, "1.1.1.99"), "--name", "a"],
            69,
            "cannot connect",
        ),
        (
            vec![
                "join",
                &link.replace(&format!("fp={pin}&"), ""),
                "--name",
                "a",
            ],
            76,
            "signed by nobody known",
        ),
    ] {
        let said = phone.rvpn(&words);
        assert_eq!(said.code, code, "{words:?}: {said:?}");
        assert!(said.err.contains(why), "{words:?}: {}", said.err);
    }
    // None of these used it up, nor left a file.
    phone.rvpn(&["join", link, "--name", "home"]).good();
    let profile = phone.home.join("config/home.toml");
    let mode = |p| fs::metadata(p).expect("kept").permissions().mode() & 0o777;
    assert_eq!(mode(&profile), 0o600);
    assert_eq!(mode(&phone.home.join("config")), 0o700);
    assert_eq!(
        fs::read_dir(phone.home.join("config"))
            .expect("kept")
            .count(),
        1
    );
    let before = fs::read(&profile).expect("kept");

    let again = phone.rvpn(&["join", link, "--name", "home"]);
    assert_eq!(again.code, 1, "{again:?}");
    let used = phone.rvpn(&["join", link, "--name", "second"]);
    assert_eq!(used.code, 77, "{used:?}");
    assert!(used.err.contains("was used"), "{}", used.err);
    assert_eq!(
        fs::read(&profile).expect("kept"),
        before,
        "nothing was lost"
    );

    // Open to others, it is not used.
    fs::set_permissions(&profile, fs::Permissions::from_mode(0o640)).expect("mode");
    let open = phone.rvpn(&["status", "--json"]);
    assert_eq!(open.code, 0);
    let open = phone.rvpn(&["doctor"]);
    assert_eq!(open.code, 69, "{open:?}");
    assert!(open.out.contains("chmod 600"), "{}", open.out);
}

#[test]
fn several_gateways_by_name_and_over_ipv6() {
    let (lab, _helper, gateway) = with("");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let six = format!("[{GW6}]");
    let link = operator(&lab, &gateway, &["invite", "bob", "--address", &six]).good();
    phone.rvpn(&["join", link.trim(), "--name", "six"]).good();
    let which = phone.rvpn(&["ping", UP4, "-c", "1"]);
    assert!(which.err.contains("home, six"), "{}", which.err);
    let said = phone.rvpn(&["ping", "-g", "six", UP4, "-c", "1"]).good();
    assert!(said.contains(&format!("through [{GW6}]:443")), "{said}");
}

#[test]
fn the_doctor_finds_what_is_broken() {
    let (lab, _helper, mut gateway) = with("");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let results = |said: &Value| -> Vec<(String, String)> {
        let checks = said["checks"].as_array().cloned().unwrap_or_default();
        let text = |c: &Value, k: &str| c[k].as_str().unwrap_or_default().to_owned();
        checks
            .iter()
            .map(|c| (text(c, "check"), text(c, "result")))
            .collect()
    };
    let of = |all: &[(String, String)], what: &str| {
        all.iter()
            .find(|(c, _)| c == what)
            .map(|(_, r)| r.clone())
            .unwrap_or_default()
    };
    let good = phone.rvpn(&["doctor", "--json"]).json();
    let all = results(&good);
    assert_eq!(good["failed"], 0, "{good}");
    for what in [
        "credential",
        "name",
        "connection",
        "tls",
        "login",
        "welcome",
        "through",
    ] {
        assert_eq!(of(&all, what), "ok", "{what}: {good}");
    }
    let bbr = phone.ns.run(may_use_bbr);
    let expected = if bbr { "ok" } else { "weak" };
    assert_eq!(of(&all, "long roads"), expected, "{good}");
    // What is behind the gateway does not answer.
    let said = phone.rvpn(&["doctor", "--json", "--host", "8.8.4.4"]);
    assert_eq!(said.code, 69);
    let all = results(&serde_json::from_str(&said.out).expect("JSON"));
    assert_eq!(
        (of(&all, "welcome"), of(&all, "through")),
        ("ok".into(), "FAILED".into())
    );
    // The device was removed.
    operator(&lab, &gateway, &["token", "revoke", "--account", "phone"]).good();
    let said = phone.rvpn(&["doctor", "--json"]);
    let all = results(&serde_json::from_str(&said.out).expect("JSON"));
    assert_eq!(
        (of(&all, "tls"), of(&all, "login")),
        ("ok".into(), "FAILED".into())
    );
    assert_eq!(of(&all, "through"), "skipped");
    // The gateway is gone.
    gateway.kill();
    let said = phone.rvpn(&["doctor", "--json"]);
    let all = results(&serde_json::from_str(&said.out).expect("JSON"));
    assert_eq!(
        (of(&all, "name"), of(&all, "connection")),
        ("ok".into(), "FAILED".into())
    );
}

/// CLI-07 as far as there is something that could listen: no command of the
/// client opens a port, so none can be open to others; and names are asked where
/// the packets leave, never on the client's own network.
#[test]
fn cli_07_nothing_listens_and_names_are_asked_at_the_far_side() {
    let (lab, _helper, gateway) = with("");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let mut outside = Outside::of(&lab, &phone.ns);
    // A program that asks for itself is seen, so one that is not seen does not.
    let mut asking = Command::new("getent");
    asking
        .args(["ahosts", "canary-here.test"])
        .stdout(Stdio::null());
    let asking = phone.ns.daemon(&mut asking);
    wait_until("the question is seen on the wire", || {
        outside.holding(b"canary-here") > 0
    });
    drop(asking);
    let said = phone.rvpn(&["ping", "canary-there.test", "-c", "1"]);
    assert!(said.err.contains("asked at the gateway"), "{said:?}");
    outside.fence(&phone.ns);
    assert_eq!(outside.holding(b"canary-there"), 0);

    let listening = || phone.ns.sh("ss", &["-Hlntu"]);
    assert_eq!(listening(), "");
    let up = phone.up(&["--no-dns"]);
    let mut ping = phone.command(&["ping", UP4, "-c", "0", "-i", "0.2"]);
    let _pinging = phone.ns.daemon(ping.stdout(Stdio::null()));
    phone.ns.sh("ping", &["-c", "5", "-i", "0.2", UP4]);
    // One bound without listening would not be seen as one; there is none either.
    let udp = phone.ns.sh("ss", &["-Hanu"]);
    assert_eq!((listening().as_str(), udp.as_str()), ("", ""));
    up.down();
}
