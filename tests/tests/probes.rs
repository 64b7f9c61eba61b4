//! The seventeen probes a plain `ip_forward` and `masquerade` gateway fails,
//! with that gateway beside ours as the control, on IPv4 and their IPv6 twins.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::UdpSocket;

use rvpn_lab::capture::{contains, drain_udp};
use rvpn_lab::probe::{Canary, Observers};
use rvpn_lab::topology::{FAR4, GW4, GW6, NB4, NB6, UP4, UP6};
use rvpn_lab::{Helper, Lab, Tunnel, naive, packet};

const PORT: u16 = 4001;

/// What a probe needs to know of the two clients, in one family.
struct Place {
    a: String,
    a_host: String,
    b: String,
    b_host: String,
    wan: &'static str,
    far: &'static str,
    up: &'static str,
    nb: &'static str,
}

fn v4(a: &Tunnel, b: &Tunnel) -> Place {
    Place {
        a: a.v4(2),
        a_host: a.v4(1),
        b: b.v4(2),
        b_host: b.v4(1),
        wan: GW4,
        far: FAR4,
        up: UP4,
        nb: NB4,
    }
}

fn v6(a: &Tunnel, b: &Tunnel) -> Place {
    Place {
        a: a.v6(1),
        a_host: a.v6(0),
        b: b.v6(1),
        b_host: b.v6(0),
        wan: GW6,
        far: "2606:4700:4700::8888",
        up: UP6,
        nb: NB6,
    }
}

/// Who sends a probe.
enum From {
    A,
    Neighbour,
}

/// Makes the probe's packet around a canary.
type Build<'a> = Box<dyn Fn(&[u8]) -> Vec<u8> + 'a>;

/// Name, sender, packet, and whether the naive gateway lets it through to its target.
type Probe<'a> = (&'a str, From, Build<'a>, bool);

fn to<'a>(src: &'a str, dst: &'a str) -> Build<'a> {
    Box::new(move |c| packet::udp(src, PORT, dst, PORT, c))
}

fn seventeen4(p: &Place) -> Vec<Probe<'_>> {
    let broadcast: &'static str = if p.a.starts_with("10.64.0.") {
        "10.64.0.255"
    } else {
        "10.64.1.255"
    };
    let b: Vec<u8> = p.b.split('.').map(|n| n.parse().unwrap()).collect();
    vec![
        ("own TUN address", From::A, to(&p.a, &p.a_host), true),
        ("gateway's WAN address", From::A, to(&p.a, p.wan), true),
        (
            "another client's TUN address",
            From::A,
            to(&p.a, &p.b_host),
            true,
        ),
        ("loopback", From::A, to(&p.a, "127.0.0.1"), false),
        (
            "link-local address of the host",
            From::A,
            to(&p.a, "169.254.169.253"),
            true,
        ),
        ("another client", From::A, to(&p.a, &p.b), true),
        (
            "source of another client",
            From::A,
            Box::new(move |c| packet::echo(&p.b, p.up, 1, 1, c)),
            true,
        ),
        ("loopback source", From::A, to("127.0.0.1", p.up), false),
        (
            "internet source, to the gateway",
            From::A,
            to(p.far, p.wan),
            true,
        ),
        ("own address", From::A, to(&p.a, &p.a), true),
        (
            "limited broadcast",
            From::A,
            to(&p.a, "255.255.255.255"),
            true,
        ),
        ("subnet broadcast", From::A, to(&p.a, broadcast), true),
        (
            "loose source route to another client",
            From::A,
            Box::new(move |c| {
                let route = [0x83, 7, 4, b[0], b[1], b[2], b[3], 0];
                packet::raw4(
                    &p.a,
                    p.a_host.as_str(),
                    17,
                    &route,
                    &[&[0x0f, 0xa1, 0x0f, 0xa1, 0, 24, 0, 0], c].concat(),
                )
            }),
            false,
        ),
        (
            "time to live of one",
            From::A,
            Box::new(move |c| packet::with_ttl(packet::udp(&p.a, PORT, p.up, PORT, c), 1)),
            false,
        ),
        (
            "neighbour to a client",
            From::Neighbour,
            to(p.nb, &p.a),
            true,
        ),
        (
            "metadata address",
            From::A,
            to(&p.a, "169.254.169.254"),
            true,
        ),
        (
            "multicast of all hosts",
            From::A,
            to(&p.a, "224.0.0.1"),
            false,
        ),
    ]
}

fn seventeen6(p: &Place) -> Vec<Probe<'_>> {
    vec![
        ("own TUN address", From::A, to(&p.a, &p.a_host), true),
        ("gateway's WAN address", From::A, to(&p.a, p.wan), true),
        (
            "another client's TUN address",
            From::A,
            to(&p.a, &p.b_host),
            true,
        ),
        ("loopback", From::A, to(&p.a, "::1"), false),
        (
            "metadata address on the host",
            From::A,
            to(&p.a, "fd00:ec2::254"),
            true,
        ),
        ("another client", From::A, to(&p.a, &p.b), true),
        (
            "source of another client",
            From::A,
            Box::new(move |c| packet::echo(&p.b, p.up, 1, 1, c)),
            true,
        ),
        ("loopback source", From::A, to("::1", p.up), false),
        (
            "internet source, to the gateway",
            From::A,
            to(p.far, p.wan),
            true,
        ),
        ("own address", From::A, to(&p.a, &p.a), true),
        (
            "all nodes",
            From::A,
            Box::new(move |c| packet::echo(&p.a, "ff02::1", 1, 1, c)),
            true,
        ),
        (
            "all routers",
            From::A,
            Box::new(move |c| packet::echo(&p.a, "ff02::2", 1, 1, c)),
            true,
        ),
        (
            "routing header to another client",
            From::A,
            Box::new(move |c| {
                let b: std::net::Ipv6Addr = p.b.parse().unwrap();
                let header = [
                    &[17, 2, 0, 1, 0, 0, 0, 0][..],
                    &b.octets(),
                    &[0x0f, 0xa1, 0x0f, 0xa1, 0, 24, 0, 0],
                    c,
                ]
                .concat();
                packet::raw6(&p.a, &p.a_host, 43, &header)
            }),
            false,
        ),
        (
            "hop limit of one",
            From::A,
            Box::new(move |c| packet::with_ttl(packet::udp(&p.a, PORT, p.up, PORT, c), 1)),
            false,
        ),
        (
            "neighbour to a client",
            From::Neighbour,
            to(p.nb, &p.a),
            true,
        ),
        (
            "router solicitation",
            From::A,
            Box::new(move |c| packet::icmp6(&p.a, "ff02::2", 133, 0, c)),
            false,
        ),
        (
            "unique local network beyond",
            From::A,
            to(&p.a, "fd99::1"),
            true,
        ),
    ]
}

/// Whether each probe reached anything but the error that answers it.
fn play(lab: &Lab, a: &Tunnel, b: &Tunnel, probes: &[Probe<'_>]) -> Vec<bool> {
    for address in [
        "169.254.169.253/32",
        "169.254.169.254/32",
        "fd00:ec2::254/128",
    ] {
        lab.gw.ip(&format!("addr add {address} dev lo"));
    }
    lab.up.ip("addr add fd99::1/128 dev lo");
    lab.nb.ip(&format!("route add 10.64.0.0/10 via {GW4}"));
    lab.nb
        .ip(&format!("-6 route add fd52:5650:1::/48 via {GW6}"));
    let here: UdpSocket = lab.gw.udp(&format!("[::]:{PORT}"));
    let there: UdpSocket = lab.up.udp(&format!("[::]:{PORT}"));
    let mut watch = Observers::new(lab);
    let mut verdicts = Vec::new();
    for (_, from, build, _) in probes {
        let canary = Canary::new();
        let p = build(&canary.0);
        match from {
            From::A => a.send(&p),
            From::Neighbour => lab.nb.send_raw(&p),
        }
        watch.fence(a);
        let held = |all: &[Vec<u8>]| all.iter().any(|d| contains(d, &canary.0));
        // An error quotes the packet; its own protocol field tells it from an answer or a visit.
        let error = |p: &Vec<u8>| {
            (p[0] >> 4 == 4 && p[9] == 1 && matches!(p[20], 3 | 11))
                || (p[0] >> 4 == 6 && p[6] == 58 && p[40] < 128)
        };
        let at_clients: Vec<_> = a
            .drain()
            .into_iter()
            .chain(b.drain())
            .filter(|p| !error(p))
            .collect();
        let (in_host, in_internet) = (drain_udp(&here), drain_udp(&there));
        // The neighbour's own probe is on the wire whatever becomes of it.
        let on_wire = matches!(from, From::A) && watch.seen(canary) > 0;
        verdicts.push(held(&at_clients) || held(&in_host) || held(&in_internet) || on_wire);
    }
    verdicts
}

#[track_caller]
fn compare(probes: &[Probe<'_>], verdicts: &[bool], expected: impl Fn(&Probe<'_>) -> bool) {
    let wrong: Vec<&str> = probes
        .iter()
        .zip(verdicts)
        .filter(|(p, v)| expected(p) != **v)
        .map(|(p, _)| p.0)
        .collect();
    assert_eq!(wrong, [""; 0], "not as expected");
    assert_eq!(probes.len(), 17);
}

#[test]
fn seventeen_probes_are_closed_on_ipv4() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = helper.connect();
    let (a, b) = (
        Tunnel::acquire(&mut gateway, 1),
        Tunnel::acquire(&mut gateway, 2),
    );
    let place = v4(&a, &b);
    let probes = seventeen4(&place);
    compare(&probes, &play(&lab, &a, &b, &probes), |_| false);
}

#[test]
fn seventeen_probes_are_closed_on_ipv6() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = helper.connect();
    let (a, b) = (
        Tunnel::acquire(&mut gateway, 1),
        Tunnel::acquire(&mut gateway, 2),
    );
    let place = v6(&a, &b);
    let probes = seventeen6(&place);
    compare(&probes, &play(&lab, &a, &b, &probes), |_| false);
}

#[test]
fn a_plain_gateway_leaks_them_on_ipv4() {
    let lab = Lab::new();
    let (a, b) = naive::gateway(&lab);
    let place = v4(&a, &b);
    let probes = seventeen4(&place);
    compare(&probes, &play(&lab, &a, &b, &probes), |p| p.3);
}

#[test]
fn a_plain_gateway_leaks_them_on_ipv6() {
    let lab = Lab::new();
    let (a, b) = naive::gateway(&lab);
    let place = v6(&a, &b);
    let probes = seventeen6(&place);
    compare(&probes, &play(&lab, &a, &b, &probes), |p| p.3);
}
