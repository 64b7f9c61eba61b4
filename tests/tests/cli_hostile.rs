//! A gateway that turned against its clients.

use std::net::UdpSocket;

use rvpn_lab::capture::{Capture, drain_udp};
use rvpn_lab::fake_gateway::{FakeGateway, Identity, welcome, welcome_with};
use rvpn_lab::machine::Machine;
use rvpn_lab::outside::{Outside, network};
use rvpn_lab::probe::Canary;
use rvpn_lab::topology::{FAR4, GW4, NB4, NB6, UP4, UP6, at};
use rvpn_lab::{Lab, packet, wait_until};
use serde_json::{Value, json};

struct Scene {
    lab: Lab,
    fake: FakeGateway,
    phone: Machine,
}

fn scene(said: Value) -> Scene {
    let lab = Lab::new();
    let phone = Machine::new(&lab, "phone", 10);
    let fake = FakeGateway::start(&lab.gw, &at(GW4, 443), Identity::alone(GW4), said);
    Scene { lab, fake, phone }
}

/// Every wish is refused by name, with its own exit status, before anything is
/// changed, and the gateway is told so.
#[track_caller]
fn refused(scene: &Scene, words: &[&str], fields: &Value, named: &str) {
    let Scene { fake, phone, .. } = scene;
    let before = network(&phone.ns);
    let list = std::fs::read("/etc/resolv.conf").expect("list");
    *fake.heard() = Default::default();
    fake.greet(welcome_with(fields));
    let mut up = phone.begin_with(&fake.words(phone), words);
    let code = up.ended();
    let log = up.log();
    assert_eq!(code, 76, "{fields}: {log}");
    assert!(log.contains(named), "{fields}: {named} is not in: {log}");
    wait_until("the gateway is told", || fake.heard().closes == [1008]);
    assert_eq!(fake.heard().goodbyes[0].code, 1008);
    assert_eq!(network(&phone.ns), before, "{fields}");
    assert_eq!(std::fs::read("/etc/resolv.conf").expect("list"), list);
}

#[test]
fn cli_08_welcomes_that_no_gateway_needs_are_refused() {
    let scene = scene(welcome());
    let pair = |address: &str| json!({"v4": {"address": address, "peer": "10.64.0.1"}});
    let six = |address: &str| json!({"v6": {"address": address, "peer": "fd00::1"}});
    for (fields, named) in [
        (json!({"version": 9}), "version 9"),
        (json!({"mtu": 1}), "MTU 1,"),
        (json!({"mtu": 70_000}), "70000"),
        (json!({"dns": ["127.0.0.1"]}), "127.0.0.1"),
        (json!({"dns": ["9.9.9.9", "::1"]}), "::1"),
        (json!({"dns": ["224.0.0.251"]}), "224.0.0.251"),
        (pair("127.0.0.5"), "127.0.0.5"),
        (pair("224.0.0.5"), "224.0.0.5"),
        (pair("10.64.0.1"), "10.64.0.1"),
        // A neighbour's address, and our own.
        (pair("1.1.1.77"), "1.1.1.77"),
        (pair("1.1.1.10"), "1.1.1.10"),
        (six("2606:4700:4700::77"), "2606:4700:4700::77"),
        (six("fe80::1"), "fe80::1"),
        (six("::1"), "::1"),
        (json!({"keepalive_s": 3000}), "3000"),
    ] {
        refused(&scene, &[], &fields, named);
    }
    // Not before anything is blocked either, where that was asked for.
    refused(&scene, &["--kill-switch"], &json!({"mtu": 70_000}), "70000");
}

#[test]
fn cli_08_routes_beyond_what_was_asked_for_are_refused() {
    let scene = scene(welcome());
    for route in [
        "0.0.0.0/1",
        "128.0.0.0/1",
        "64.0.0.0/2",
        "::/1",
        "2000::/3",
        // The network next door, all or a part of it.
        "1.1.0.0/16",
        "1.1.1.0/24",
        "1.1.1.1/32",
        "2606:4700:4700::/64",
        "127.0.0.0/8",
        "127.0.0.1/32",
        "224.0.0.0/4",
        "169.254.0.0/16",
        "::1/128",
        "fe80::/10",
        "ff00::/8",
    ] {
        let fields = json!({"routes": ["10.9.0.0/16", route]});
        refused(&scene, &["--split"], &fields, route);
    }
    let many: Vec<String> = (16..90).map(|n| format!("{n}.0.0.0/8")).collect();
    let fields = json!({"routes": many});
    refused(&scene, &["--split"], &fields, "more than a quarter");
    // A resolver that would be asked in clear.
    scene.phone.ns.ip("addr add 192.168.7.5/24 dev wan0");
    let fields = json!({"dns": ["192.168.7.1"]});
    refused(&scene, &["--allow-lan"], &fields, "192.168.7.1");
}

/// The default route is offered to everybody; who asked for a part does not take it.
#[test]
fn cli_08_the_default_route_is_not_taken_where_a_part_was_asked_for() {
    let Scene { lab, fake, phone } = &scene(welcome());
    let mut outside = Outside::of(lab, &phone.ns);
    fake.greet(welcome_with(
        &json!({"routes": ["0.0.0.0/0", "::/0", "9.9.9.0/24"]}),
    ));
    let up = phone.up_with(&fake.words(phone), &["--split"]);
    assert_eq!(outside.probe(&phone.ns, &["9.9.9.9"]), 0);
    for past in [FAR4, UP6] {
        assert!(outside.probe(&phone.ns, &[past]) > 0, "{past}");
    }
    up.down();
    // And nothing else is no part.
    fake.greet(welcome());
    let mut up = phone.begin_with(&fake.words(phone), &["--split"]);
    assert_eq!(up.ended(), 1);
    assert!(up.log().contains("--route"), "{}", up.log());
}

const OWN4: &str = "10.64.0.2";
const OWN6: &str = "fd52:5650:1::1";

/// What arrives on a machine, whatever address it was sent to.
struct Listener(UdpSocket);

impl Listener {
    fn new(phone: &Machine) -> Listener {
        // Of both families.
        Listener(phone.ns.udp("[::]:7000"))
    }

    #[track_caller]
    fn has(&self, canary: Canary) {
        wait_until("the packet arrives", || {
            drain_udp(&self.0).into_iter().any(|d| d == canary.0)
        });
    }
}

#[test]
fn cli_09_packets_to_anybody_else_are_neither_taken_nor_passed_on() {
    let said = welcome_with(&json!({"v6": {"address": OWN6, "peer": "fd52:5650:1::"}}));
    let Scene { lab, fake, phone } = &scene(said);
    // Even where the machine is a router by itself.
    phone.ns.sysctl("net/ipv4/ip_forward", "1");
    phone.ns.sysctl("net/ipv6/conf/all/forwarding", "1");
    let up = phone.up_with(&fake.words(phone), &["--no-dns"]);
    let listener = Listener::new(phone);
    let mut outside = Outside::of(lab, &phone.ns);
    let mut inside = Capture::on(&phone.ns);
    let mut sent = Vec::new();
    for to in [
        "1.1.1.10",
        "127.0.0.1",
        "127.0.0.53",
        "1.1.1.255",
        "255.255.255.255",
        "224.0.0.1",
        "224.0.0.251",
        "10.64.0.3",
        "0.0.0.0",
        NB4,
        UP4,
    ] {
        let canary = Canary::new();
        fake.send(&packet::udp(FAR4, 53, to, 7000, &canary.0));
        sent.push(canary);
    }
    for to in [
        "2606:4700:4700::10",
        "::1",
        "ff02::1",
        "fe80::1",
        "fd52:5650:1::2",
        "::ffff:1.1.1.10",
        NB6,
    ] {
        let canary = Canary::new();
        fake.send(&packet::udp("2001:db8::5", 53, to, 7000, &canary.0));
        sent.push(canary);
    }
    // From the tunnel's own address, and from the wire that it does not have.
    for (from, to) in [(OWN4, OWN4), (OWN6, OWN6), ("fe80::1", OWN6)] {
        let canary = Canary::new();
        fake.send(&packet::udp(from, 53, to, 7000, &canary.0));
        sent.push(canary);
    }
    // What is no packet at all.
    for junk in [&[0x45][..], &[0; 60], &[0xff; 1400]] {
        fake.send(junk);
    }
    let refused = sent.len() + 3;
    // The proper ones go the same way, behind the others.
    let (four, six) = (Canary::new(), Canary::new());
    fake.send(&packet::udp(FAR4, 53, OWN4, 7000, &four.0));
    fake.send(&packet::udp("2606::5", 53, OWN6, 7000, &six.0));
    let mut missing = vec![four, six];
    wait_until("the proper ones arrive", || {
        for datagram in drain_udp(&listener.0) {
            assert!(
                missing.iter().any(|c| datagram == c.0),
                "one that should not have arrived: {datagram:x?}"
            );
            missing.retain(|c| datagram != c.0);
        }
        missing.is_empty()
    });
    outside.fence(&phone.ns);
    for canary in sent {
        assert_eq!((outside.leaked(canary), inside.count(&canary.0)), (0, 0));
    }
    wait_until("they are counted", || {
        phone.status()["inbound"]["dropped"] == refused
    });
    assert_eq!(phone.status()["inbound"]["packets"], 2);
    up.down();
}

/// A router's advertisement through the tunnel, as good as one can be.
#[test]
fn cli_09_nothing_that_comes_through_the_tunnel_changes_routes_or_addresses() {
    let said = welcome_with(&json!({"v6": {"address": OWN6, "peer": "fd52:5650:1::"}}));
    let Scene { fake, phone, .. } = &scene(said);
    let up = phone.up_with(&fake.words(phone), &["--no-dns"]);
    let listener = Listener::new(phone);
    let state = || network(&phone.ns) + &phone.ns.ip("-br addr");
    let before = state();
    assert!(!phone.ns.ip("addr show rvpn0").contains("fe80"), "{before}");
    // Lifetime, timers, then a prefix to make addresses and routes of.
    let mut body = vec![0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 64, 0xc0];
    body.extend([0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    body.extend([0x26, 0x20, 0, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for from in ["fe80::1", "fd52:5650:1::"] {
        fake.send(&packet::icmp6(from, OWN6, 134, 0, &body));
        fake.send(&packet::icmp6(from, "ff02::1", 134, 0, &body));
    }
    let redirect = packet::udp(OWN4, 7000, UP4, 7000, &[0; 8]);
    fake.send(&packet::icmp4("10.64.0.1", OWN4, 5, 1, &redirect));
    let last = Canary::new();
    fake.send(&packet::udp("2606::5", 53, OWN6, 7000, &last.0));
    listener.has(last);
    assert_eq!(state(), before);
    up.down();
}
