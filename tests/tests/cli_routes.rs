//! What a hostile network can do to the routes of a machine whose traffic goes
//! through a tunnel: nothing. The same done to a set-up of plain routes shows
//! that the attacks are real.

use std::net::UdpSocket;

use nix::sys::socket::{setsockopt, sockopt};
use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::Machine;
use rvpn_lab::ns::Ns;
use rvpn_lab::outside::{Outside, PORT, network};
use rvpn_lab::probe::Canary;
use rvpn_lab::topology::{FAR4, GW4, GW6, NB4, NB6, UP4, UP6, at, many_uids};
use rvpn_lab::{Helper, Lab, naive};

/// An IPv6 host of the internet beyond the wire.
const FAR6: &str = "2001:4860:4860::8888";

/// Somebody with no rights.
const USER: u32 = 65_030;

struct Scene {
    lab: Lab,
    _helper: Helper,
    _gateway: Gateway,
    phone: Machine,
}

fn scene() -> Scene {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    lab.up.ip(&format!("addr add {FAR6}/64 dev wan0 nodad"));
    Scene {
        lab,
        _helper: helper,
        _gateway: gateway,
        phone,
    }
}

impl Scene {
    /// Nothing leaves in clear, and everything arrives all the same.
    #[track_caller]
    fn all_inside(&self, outside: &mut Outside, to: &[&str]) {
        assert_eq!(outside.probe(&self.phone.ns, to), 0, "leaked");
        for host in [FAR4, UP6] {
            let words = ["-c", "1", "-W", "5", host];
            self.phone.ns.sh("ping", &words);
        }
    }
}

/// A tunnel as many a guide makes it, of which nobody is at the other end: two
/// routes into a device, and one past it to the gateway.
fn plain_tunnel(ns: &Ns) -> rvpn_lab::Tunnel {
    let tunnel = naive::tun(ns, "nv0", 0);
    for route in [
        "route add 0.0.0.0/1 dev nv0",
        "route add 128.0.0.0/1 dev nv0",
        "-6 route add ::/1 dev nv0",
        "-6 route add 8000::/1 dev nv0",
    ] {
        ns.ip(route);
    }
    ns.ip(&format!("route add {GW4}/32 dev wan0"));
    tunnel
}

/// What a hostile DHCP server and router advertise.
fn stolen_routes() -> [String; 6] {
    let (four, six) = (format!("via {NB4} dev wan0"), format!("via {NB6} dev wan0"));
    [
        format!("0.0.0.0/1 {four}"),
        format!("128.0.0.0/1 {four}"),
        format!("{FAR4}/32 {four}"),
        format!("::/1 {six}"),
        format!("8000::/1 {six}"),
        format!("{UP6}/128 {six}"),
    ]
}

fn routes(ns: &Ns, verb: &str, metric: &str) {
    for route in stolen_routes() {
        let six = if route.contains("::") { "-6 " } else { "" };
        ns.ip(&format!("{six}route {verb} {route} metric {metric}"));
    }
}

#[test]
fn cli_01_routes_in_the_main_table_steal_nothing() {
    let scene = scene();
    let phone = &scene.phone;
    let mut outside = Outside::of(&scene.lab, &phone.ns);
    let targets = [FAR4, UP4, UP6, FAR6, "9.9.9.9"];
    assert!(
        outside.probe(&phone.ns, &[FAR4]) > 0,
        "without a tunnel it is seen"
    );
    for more in [&["--no-dns"][..], &["--no-dns", "--kill-switch"]] {
        let up = phone.up(more);
        scene.all_inside(&mut outside, &targets);
        routes(&phone.ns, "add", "1");
        scene.all_inside(&mut outside, &targets);
        // Nor at the next connection, which is made with them in place.
        up.down();
        let up = phone.up(more);
        scene.all_inside(&mut outside, &targets);
        up.down();
        routes(&phone.ns, "del", "1");
    }
}

#[test]
fn cli_01_the_same_routes_empty_a_plain_tunnel() {
    let lab = Lab::new();
    let phone = lab.client("phone", 10);
    let mut outside = Outside::of(&lab, &phone);
    let _tunnel = plain_tunnel(&phone);
    assert_eq!(outside.probe(&phone, &[FAR4, "9.9.9.9"]), 0);
    phone.ip(&format!("route add {FAR4}/32 via {NB4} dev wan0"));
    assert!(outside.probe(&phone, &[FAR4]) > 0);
}

/// The network next door says that it has the target's addresses.
fn claim(ns: &Ns, verb: &str) {
    ns.ip(&format!("addr {verb} 8.8.8.77/24 dev wan0"));
    let nodad = if verb == "add" { " nodad" } else { "" };
    ns.ip(&format!(
        "addr {verb} 2001:4860:4860::77/64 dev wan0{nodad}"
    ));
}

#[test]
fn cli_02_a_network_next_door_with_public_addresses_gets_nothing() {
    let scene = scene();
    let phone = &scene.phone;
    let mut outside = Outside::of(&scene.lab, &phone.ns);
    let targets = [FAR4, FAR6, UP4, UP6, NB4, NB6];
    for more in [
        &["--no-dns"][..],
        &["--no-dns", "--allow-lan"],
        &["--no-dns", "--kill-switch", "--allow-lan"],
    ] {
        let up = phone.up(more);
        claim(&phone.ns, "add");
        scene.all_inside(&mut outside, &targets);
        up.down();
        // Now it is there from the beginning.
        let up = phone.up(more);
        scene.all_inside(&mut outside, &targets);
        up.down();
        claim(&phone.ns, "del");
    }
}

#[test]
fn cli_02_the_same_network_empties_a_plain_tunnel() {
    let lab = Lab::new();
    let phone = lab.client("phone", 10);
    let mut outside = Outside::of(&lab, &phone);
    let _tunnel = plain_tunnel(&phone);
    assert_eq!(outside.probe(&phone, &[FAR4]), 0);
    claim(&phone, "add");
    assert!(outside.probe(&phone, &[FAR4]) > 0);
}

#[test]
fn cli_03_only_the_client_itself_reaches_the_gateway_past_the_tunnel() {
    let scene = scene();
    let phone = &scene.phone;
    let mut outside = Outside::of(&scene.lab, &phone.ns);
    assert!(outside.probe(&phone.ns, &[GW4]) > 0);
    for more in [&["--no-dns"][..], &["--no-dns", "--kill-switch"]] {
        let up = phone.up(more);
        scene.all_inside(&mut outside, &[GW4, GW6]);
        // Who says that its name has this address gets no more.
        phone
            .ns
            .ip(&format!("route add {GW4}/32 via {NB4} dev wan0"));
        // (That cuts the connection, which is all it does.)
        assert_eq!(outside.probe(&phone.ns, &[GW4, GW6, FAR4]), 0, "leaked");
        phone.ns.ip(&format!("route del {GW4}/32"));
        up.down();
    }
}

#[test]
fn cli_03_a_plain_tunnel_lets_everybody_reach_the_gateway() {
    let lab = Lab::new();
    let phone = lab.client("phone", 10);
    let mut outside = Outside::of(&lab, &phone);
    let _tunnel = plain_tunnel(&phone);
    assert!(outside.probe(&phone, &[GW4]) > 0);
}

/// A strict reverse path check would drop the gateway's answers; so would a
/// loose one, where a kill switch has left no way back.
#[test]
fn cli_03_reverse_path_checks_are_loosened_and_restored() {
    let scene = scene();
    let phone = &scene.phone;
    let mut outside = Outside::of(&scene.lab, &phone.ns);
    for (all, own) in [("0", "1"), ("1", "0"), ("2", "0"), ("0", "2"), ("1", "2")] {
        phone.ns.sysctl("net/ipv4/conf/all/rp_filter", all);
        phone.ns.sysctl("net/ipv4/conf/wan0/rp_filter", own);
        let before = network(&phone.ns);
        for more in [&["--no-dns"][..], &["--no-dns", "--kill-switch"]] {
            let up = phone.up(more);
            scene.all_inside(&mut outside, &[FAR4]);
            up.down();
            assert_eq!(network(&phone.ns), before, "{all} {own} {more:?}");
        }
    }
}

/// A program that insists on its neighbours, or in IPv6 on a device, does not
/// get round a kill switch. (In IPv4 the kernel asks no route about a device.)
#[test]
fn cli_03_insisting_does_not_lead_round_a_kill_switch() {
    if !many_uids() {
        // Everybody is root here, who may do anything.
        return;
    }
    let scene = scene();
    let phone = &scene.phone;
    let mut outside = Outside::of(&scene.lab, &phone.ns);
    let far = [FAR4, NB4, NB6, UP6];
    let insist = |how: fn(&UdpSocket)| far.map(|to| send_by(&phone.ns, to, how));
    let ways = [(true, in_wan0 as fn(&UdpSocket)), (false, without_router)];
    for (_, way) in ways {
        let free = insist(way);
        outside.fence(&phone.ns);
        // Without routers no host beyond the wire is reached.
        assert!(free.iter().filter(|c| outside.leaked(**c) > 0).count() >= 2);
    }
    let mut up = phone.up(&["--no-dns", "--kill-switch"]);
    for stage in ["connected", "killed"] {
        for (by_device, way) in ways {
            let held = insist(way);
            outside.fence(&phone.ns);
            let leaked = held.map(|c| outside.leaked(c));
            let judged = if by_device { &leaked[2..] } else { &leaked[..] };
            assert!(judged.iter().all(|n| *n == 0), "{stage}: {leaked:?}");
        }
        // Its own way out of the machine can still be changed.
        phone.ns.ip(&format!("route replace default via {UP4}"));
        up.kill();
    }
    phone.rvpn(&["down", "--repair"]).good();
}

/// Sends as an ordinary user, after this was done to the socket.
fn send_by(ns: &Ns, to: &str, how: fn(&UdpSocket)) -> Canary {
    let canary = Canary::new();
    let any = if to.contains(':') {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    ns.run(|| {
        rvpn_lab::ns::become_user(USER);
        let socket = UdpSocket::bind(any).expect("socket");
        how(&socket);
        let _unreachable = socket.send_to(&canary.0, at(to, PORT));
    });
    canary
}

fn in_wan0(socket: &UdpSocket) {
    setsockopt(socket, sockopt::BindToDevice, &"wan0".into()).expect("device");
}

fn without_router(socket: &UdpSocket) {
    setsockopt(socket, sockopt::DontRoute, &true).expect("neighbours only");
}
