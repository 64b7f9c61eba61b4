//! The client, as its user meets it.

use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::{Machine, operator};
use rvpn_lab::topology::{UP4, UP6};
use rvpn_lab::{Helper, Lab};

#[test]
fn join_and_ping() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    for host in [UP4, UP6] {
        let said = phone.rvpn(&["ping", host, "-c", "3", "-i", "0.05"]).good();
        assert!(
            said.contains("3 packets transmitted, 3 received, 0% packet loss"),
            "{said}"
        );
    }
    let sessions = operator(&lab, &gateway, &["session", "ls", "--json"]).json();
    assert_eq!(
        sessions["sessions"].as_array().map(Vec::len),
        Some(0),
        "{sessions}"
    );
}

#[test]
fn up_carries_everything() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let up = phone.up(&["--no-dns"]);
    for host in [UP4, UP6] {
        phone
            .ns
            .sh("ping", &["-c", "3", "-i", "0.1", "-W", "2", host]);
    }
    eprintln!("{}", phone.status());
    eprintln!("{}", phone.ns.ip("rule"));
    eprintln!("{}", phone.ns.ip("route show table all"));
    up.down();
    eprintln!("{}", phone.ns.ip("rule"));
}
