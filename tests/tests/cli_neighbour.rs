//! A neighbour on the wire looks for a tunnel.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rvpn_lab::capture::{Capture, drain_udp};
use rvpn_lab::fake_gateway::{FakeGateway, Identity, welcome_with};
use rvpn_lab::machine::Machine;
use rvpn_lab::ns::Ns;
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::ip_json;
use rvpn_lab::topology::{GW4, at};
use rvpn_lab::{Lab, packet, wait_until};
use serde_json::json;

const INSIDE: [&str; 2] = ["10.64.0.2", "fd52:5650:1::1"];
const OUTSIDE: [&str; 2] = ["1.1.1.10", "2606:4700:4700::10"];

/// Whether somebody on the wire says that the address is theirs.
fn answers_for(nb: &Ns, address: &str) -> bool {
    let length = if address.contains(':') { 128 } else { 32 };
    let six = if length == 128 { "-6 " } else { "" };
    nb.ip(&format!("{six}route replace {address}/{length} dev wan0"));
    nb.ip(&format!("neigh flush to {address}"));
    for family in ["ipv4", "ipv6"] {
        // The answer takes no longer here.
        nb.sysctl(&format!("net/{family}/neigh/wan0/retrans_time_ms"), "100");
    }
    let asks = nb.udp(&at(if length == 128 { "::" } else { "0.0.0.0" }, 0));
    let _refused = asks.send_to(b"?", at(address, 7000));
    let mut last = None;
    // The kernel asks three times and then says so.
    wait_until("somebody answers, or nobody", || {
        let all = ip_json(nb, &format!("neigh show to {address}"));
        let states = all[0]["state"].as_array().cloned().unwrap_or_default();
        last = states.first().and_then(|s| s.as_str().map(str::to_owned));
        matches!(last.as_deref(), Some("REACHABLE" | "FAILED"))
    });
    nb.ip(&format!("{six}route del {address}/{length} dev wan0"));
    last.as_deref() == Some("REACHABLE")
}

/// Whether a connection to the address comes about if its packets are given to the machine.
fn connects(nb: &Ns, address: &str, by: &str) -> bool {
    let length = if address.contains(':') { 128 } else { 32 };
    let six = if length == 128 { "-6 " } else { "" };
    nb.ip(&format!("{six}route replace {address}/{length} via {by}"));
    let to: SocketAddr = at(address, 7001).parse().expect("address");
    let connected = nb.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(700)).is_ok());
    nb.ip(&format!("{six}route del {address}/{length}"));
    connected
}

#[test]
fn cli_12_neighbours_learn_nothing_of_the_tunnels_addresses() {
    let lab = Lab::new();
    let phone = Machine::new(&lab, "phone", 10);
    let said = welcome_with(&json!({"v6": {"address": INSIDE[1], "peer": "fd52:5650:1::"}}));
    let fake = FakeGateway::start(&lab.gw, &at(GW4, 443), Identity::alone(GW4), said);
    // Programs that wait for anybody.
    let udp = phone.ns.udp("[::]:7000");
    let _tcp = phone.ns.tcp("[::]:7001");
    for more in [
        &["--no-dns"][..],
        &["--no-dns", "--kill-switch"],
        &["--no-dns", "--split", "--route", "9.9.9.0/24"],
    ] {
        let up = phone.up_with(&fake.words(&phone), more);
        let mut seen = Capture::on(&lab.nb);
        for (address, by) in INSIDE.into_iter().zip(OUTSIDE) {
            assert!(!answers_for(&lab.nb, address), "{address} {more:?}");
            assert!(!connects(&lab.nb, address, by), "{address} {more:?}");
            let canary = Canary::new();
            let from = if address.contains(':') {
                "2606:4700:4700::3"
            } else {
                "1.1.1.3"
            };
            let six = if address.contains(':') { "-6 " } else { "" };
            lab.nb.ip(&format!("{six}route replace {address} via {by}"));
            lab.nb
                .send_raw(&packet::udp(from, 9, address, 7000, &canary.0));
            lab.nb
                .send_raw(&packet::echo(from, address, 1, 1, &canary.0));
            lab.nb.ip(&format!("{six}route del {address}"));
            // A later one to the machine itself arrives; that one did not.
            let fence = Canary::new();
            lab.nb.send_raw(&packet::udp(from, 9, by, 7000, &fence.0));
            let mut arrived = Vec::new();
            wait_until("a datagram to the machine itself arrives", || {
                arrived.extend(drain_udp(&udp));
                arrived.contains(&fence.0.to_vec())
            });
            assert!(!arrived.contains(&canary.0.to_vec()), "{address} {more:?}");
        }
        // Nothing that came from the machine speaks of the address, not even to say no.
        let four: [u8; 4] = [10, 64, 0, 2];
        let own = ip_json(&phone.ns, "link show wan0")[0]["address"].clone();
        let own: Vec<u8> = own
            .as_str()
            .expect("address")
            .split(':')
            .map(|b| u8::from_str_radix(b, 16).expect("byte"))
            .collect();
        let from_phone = seen.frames().iter().filter(|f| f[6..12] == own);
        let speaks = from_phone.filter(|f| {
            // As the sender, of a packet or of an ARP answer.
            f.get(26..30) == Some(&four) && f[12..14] == [8, 0]
                || f.get(28..32) == Some(&four) && f[12..14] == [8, 6]
        });
        assert_eq!(speaks.count(), 0, "{more:?}");
        // And still the tunnel works in both directions.
        let inward = Canary::new();
        fake.send(&packet::udp("8.8.8.8", 53, INSIDE[0], 7000, &inward.0));
        wait_until("what comes through the tunnel arrives", || {
            drain_udp(&udp).contains(&inward.0.to_vec())
        });
        // Of programs here, to here.
        let own = phone
            .ns
            .run(|| TcpStream::connect(at(INSIDE[0], 7001)).is_ok());
        assert!(own, "{more:?}");
        up.down();
    }
}

#[test]
fn cli_12_an_ordinary_address_is_found_at_once() {
    let lab = Lab::new();
    let phone = lab.client("phone", 10);
    let _tcp = phone.tcp("[::]:7001");
    phone.ip("link add tn0 type veth peer name tn1");
    phone.ip("link set tn0 up");
    phone.ip("addr add 10.64.0.2/32 dev tn0");
    assert!(answers_for(&lab.nb, INSIDE[0]));
    assert!(connects(&lab.nb, INSIDE[0], OUTSIDE[0]));
    phone.ip("addr add fd52:5650:1::1/128 dev tn0 nodad");
    assert!(connects(&lab.nb, INSIDE[1], OUTSIDE[1]));
}
