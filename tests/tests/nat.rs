//! Translation and connection tracking: port shadow, mappings, exhaustion, a new address.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt, setsockopt,
    socket, sockopt,
};
use rvpn_ipc::Client;
use rvpn_lab::capture::{contains, drain_udp};
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::{counter, flows};
use rvpn_lab::topology::{FAMILIES, FAR4, Family, UP4, at};
use rvpn_lab::{Helper, Lab, Tunnel, naive, packet, wait_until, wait_within};

const VICTIM_PORT: u16 = 5555;

fn setup(config: &str) -> (Lab, Helper, Client) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, config);
    let client = helper.connect();
    (lab, helper, client)
}

/// Whether the victim's datagrams to a port of the gateway reach the listener, and how many reach A.
fn udp_shadow(lab: &Lab, a: &Tunnel, f: Family, port: u16) -> (bool, usize) {
    let listener = lab.gw.udp(&at(f.any, port));
    let victim = lab.up.udp(&at(f.up, VICTIM_PORT));
    a.send(&packet::udp(&f.source(a), port, f.up, VICTIM_PORT, b"open"));
    wait_until("A's datagram reaches the victim", || {
        drain_udp(&victim).iter().any(|d| d == b"open")
    });
    let canary = Canary::new();
    victim.send_to(&canary.0, at(f.gw, port)).unwrap();
    let mut caught = Vec::new();
    let mut heard = false;
    wait_until("the datagram arrives somewhere", || {
        caught.extend(a.drain());
        heard |= drain_udp(&listener).iter().any(|d| contains(d, &canary.0));
        heard || caught.iter().any(|p| contains(p, &canary.0))
    });
    (
        heard,
        caught.iter().filter(|p| contains(p, &canary.0)).count(),
    )
}

#[test]
fn nat_01_udp_port_shadow() {
    let (lab, _helper, mut gateway) = setup("");
    let a = Tunnel::acquire(&mut gateway, 1);
    for f in FAMILIES {
        for port in [443, 53, 8443, 51820] {
            assert_eq!(
                udp_shadow(&lab, &a, f, port),
                (true, 0),
                "port {port} {f:?}"
            );
        }
    }
}

#[test]
fn nat_01_control_a_plain_gateway_is_shadowed() {
    let lab = Lab::new();
    let (a, _b) = naive::gateway(&lab);
    for f in FAMILIES {
        assert_eq!(udp_shadow(&lab, &a, f, 443), (false, 1), "{f:?}");
    }
}

/// A TCP connection from a chosen source port; true when it is established in time.
fn connect_from(lab: &Lab, f: Family, sport: u16, port: u16) -> bool {
    let end =
        |address, port| SockaddrStorage::from(at(address, port).parse::<SocketAddr>().unwrap());
    let family = if f.is_v4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    lab.up.run(|| {
        let s = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
        setsockopt(&s, sockopt::ReuseAddr, &true).unwrap();
        bind(s.as_raw_fd(), &end(f.up, sport)).unwrap();
        let _ = connect(s.as_raw_fd(), &end(f.gw, port));
        let mut fds = [PollFd::new(s.as_fd(), PollFlags::POLLOUT)];
        let ready = poll(&mut fds, PollTimeout::from(2500_u16)).unwrap();
        ready > 0 && getsockopt(&s, sockopt::SocketError).unwrap() == 0
    })
}

/// The victim does not answer A's SYN with a reset: its firewall is silent.
fn quiet(lab: &Lab) {
    lab.up.sh("nft", &["table inet quiet {\nchain o {\ntype filter hook output priority 0;\ntcp flags & rst == rst drop\n}\n}"]);
}

fn tcp_shadow(lab: &Lab, a: &Tunnel, f: Family, port: u16) -> (bool, usize) {
    let _listener = lab.gw.tcp(&at(f.any, port));
    let src = f.source(a);
    a.send(&packet::tcp(
        (&src, port),
        (f.up, VICTIM_PORT),
        "S",
        1,
        0,
        b"",
    ));
    let tracked = format!("src={src} dst={} sport={port} dport={VICTIM_PORT}", f.up);
    wait_until("A's SYN is tracked", || {
        !flows(&lab.gw, &tracked).is_empty()
    });
    let connected = connect_from(lab, f, VICTIM_PORT, port);
    let caught = a
        .drain()
        .iter()
        .filter(|p| packet::tcp_header(p).is_some_and(|t| t[2..4] == port.to_be_bytes()))
        .count();
    (connected, caught)
}

#[test]
fn nat_02_tcp_port_shadow() {
    let (lab, _helper, mut gateway) = setup("");
    quiet(&lab);
    let a = Tunnel::acquire(&mut gateway, 1);
    for f in FAMILIES {
        for port in [443, 22, 8443] {
            assert_eq!(
                tcp_shadow(&lab, &a, f, port),
                (true, 0),
                "port {port} {f:?}"
            );
        }
    }
}

#[test]
fn nat_02_control_a_plain_gateway_is_shadowed() {
    let lab = Lab::new();
    quiet(&lab);
    let (a, _b) = naive::gateway(&lab);
    for f in FAMILIES {
        let (connected, caught) = tcp_shadow(&lab, &a, f, 443);
        assert!(
            !connected && caught > 0,
            "connected: {connected}, caught: {caught}, {f:?}"
        );
    }
}

/// Admin, metrics, ports granted to serving clients: below and above the translation range.
const GRANTED: [u16; 7] = [1024, 8080, 9090, 16383, 32768, 61000, 65535];

#[test]
fn nat_03_every_port_of_the_gateway() {
    let (lab, _helper, mut gateway) = setup("");
    quiet(&lab);
    let a = Tunnel::acquire(&mut gateway, 1);
    for f in FAMILIES {
        for port in GRANTED {
            assert_eq!(
                udp_shadow(&lab, &a, f, port),
                (true, 0),
                "port {port} {f:?}"
            );
            assert_eq!(
                tcp_shadow(&lab, &a, f, port),
                (true, 0),
                "port {port} {f:?}"
            );
        }
    }
}

#[test]
fn nat_03_control_a_plain_gateway_loses_each_of_them() {
    let lab = Lab::new();
    let (a, _b) = naive::gateway(&lab);
    for f in FAMILIES {
        for port in GRANTED {
            assert_eq!(
                udp_shadow(&lab, &a, f, port),
                (false, 1),
                "port {port} {f:?}"
            );
        }
    }
}

#[test]
fn nat_03_the_gateways_own_connections() {
    let (lab, _helper, mut gateway) = setup("flow-cap = 5000\n");
    let a = Tunnel::acquire(&mut gateway, 1);
    for f in FAMILIES {
        // A has flows from a thousand ports to the server the gateway is about to talk to.
        let server = lab.up.udp(&at(f.up, 7000));
        for port in 33_000..34_000 {
            a.send(&packet::udp(&f.source(&a), port, f.up, 7000, b"shadow"));
        }
        let own = format!("src={} ", f.source(&a));
        wait_until("A's flows exist", || flows(&lab.gw, &own).len() >= 1000);
        drain_udp(&server);
        a.drain();
        for port in 33_000..33_050 {
            let own = lab.gw.udp(&at(f.gw, port));
            own.send_to(b"own", at(f.up, 7000)).unwrap();
            let mut buf = [0; 16];
            let from = loop {
                let (n, from) = server.recv_from(&mut buf).unwrap();
                if &buf[..n] == b"own" {
                    break from;
                }
            };
            server.send_to(b"answer", from).unwrap();
            let (n, _) = own.recv_from(&mut buf).expect("the gateway's own answer");
            assert_eq!(&buf[..n], b"answer");
        }
        assert_eq!(a.drain().len(), 0);
    }
}

#[test]
fn nat_08_nobody_else_can_use_a_mapping() {
    let (lab, _helper, mut client) = setup("");
    let a = Tunnel::acquire(&mut client, 1);
    for f in FAMILIES {
        let server = lab.up.udp(&at(f.up, 6000));
        a.send(&packet::udp(&f.source(&a), 4000, f.up, 6000, b"hello"));
        let (_, mapped) = server.recv_from(&mut [0; 64]).unwrap();
        let mut others = vec![lab.up.udp(&at(f.up, 6001)), lab.nb.udp(&at(f.nb, 6000))];
        if f.is_v4() {
            others.push(lab.up.udp(&at(FAR4, 6000)));
        }
        for o in &others {
            o.send_to(b"unsolicited", mapped).unwrap();
        }
        server.send_to(b"expected", mapped).unwrap();
        a.expect(b"expected");
        assert!(!a.drain().iter().any(|p| contains(p, b"unsolicited")));
    }
}

#[test]
fn nat_09_one_clients_flood_leaves_room_for_another() {
    let (lab, _helper, mut client) = setup("");
    let a = Tunnel::acquire(&mut client, 1);
    let b = Tunnel::acquire(&mut client, 2);
    let servers = FAMILIES.map(|f| lab.up.udp(&at(f.up, 6000)));
    let capped = counter(&lab.gw, "flow_cap");
    // One cap for both families together.
    for port in 1..=60_000 {
        let f = FAMILIES[usize::from(port % 2)];
        a.send(&packet::udp(&f.source(&a), port, f.up, 6000, b"flood"));
    }
    let own: usize = FAMILIES
        .iter()
        .map(|f| flows(&lab.gw, &format!("src={} ", f.source(&a))).len())
        .sum();
    assert!((1000..=1024).contains(&own), "{own} flows of one client");
    assert!(counter(&lab.gw, "flow_cap") - capped >= 58_000);
    for (f, server) in FAMILIES.iter().zip(&servers) {
        drain_udp(server);
        for port in 1..=5 {
            let canary = Canary::new();
            b.send(&packet::udp(&f.source(&b), port, f.up, 6000, &canary.0));
            wait_until("B's new flow arrives", || {
                drain_udp(server).iter().any(|d| contains(d, &canary.0))
            });
        }
    }
}

#[test]
fn nat_16_no_helper_reads_what_clients_say() {
    let (lab, _helper, mut client) = setup("");
    let a = Tunnel::acquire(&mut client, 1);
    let src = a.v4(2);
    for (port, says) in [
        (21, &b"PORT 10,64,0,2,31,144\r\n"[..]),
        (
            5060,
            b"INVITE sip:x SIP/2.0\r\nContact: <sip:a@10.64.0.2:8080>\r\n\r\n",
        ),
        (1720, b"\x03\x00\x00\x20h323"),
        (1723, b"\x00\x9c\x00\x01\x1a\x2b\x3c\x4d"),
    ] {
        let listener = lab.up.tcp(&format!("{UP4}:{port}"));
        a.send(&packet::tcp((&src, 4000), (UP4, port), "S", 100, 0, b""));
        let theirs = a.syn_answered(port).wrapping_add(1);
        a.send(&packet::tcp(
            (&src, 4000),
            (UP4, port),
            ".",
            101,
            theirs,
            b"",
        ));
        a.send(&packet::tcp(
            (&src, 4000),
            (UP4, port),
            "P.",
            101,
            theirs,
            says,
        ));
        let (server, _): (TcpStream, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(rvpn_lab::PATIENCE)).unwrap();
        let mut buf = vec![0; says.len()];
        std::io::Read::read_exact(&mut &server, &mut buf).unwrap();
        assert_eq!(buf, says, "the payload is untouched");
        a.drain();
    }
    let expected = lab.gw.sh("conntrack", &["-L", "expect"]);
    assert_eq!(expected.trim(), "", "an expected connection");
    assert_eq!(flows(&lab.gw, "helper="), [""; 0]);
}

#[test]
fn nat_17_the_uplinks_address_changes() {
    let (lab, _helper, mut client) = setup("");
    let a = Tunnel::acquire(&mut client, 1);
    for f in FAMILIES {
        let server = lab.up.udp(&at(f.up, 6000));
        let reach = |port: u16| {
            let canary = Canary::new();
            let mut from = None;
            wait_within(Duration::from_secs(5), "a new flow works", || {
                let _ = a.try_send(&packet::udp(&f.source(&a), port, f.up, 6000, &canary.0));
                let mut buf = [0; 64];
                server
                    .set_read_timeout(Some(Duration::from_millis(50)))
                    .unwrap();
                while let Ok((n, s)) = server.recv_from(&mut buf) {
                    if contains(&buf[..n], &canary.0) {
                        from = Some(s.ip().to_string());
                    }
                }
                from.is_some()
            });
            from.unwrap()
        };
        let (family, bits) = if f.is_v4() { ("-4", 24) } else { ("-6", 64) };
        let change = |word: &str, address: &str| {
            let flag = if f.is_v4() || word == "del" {
                ""
            } else {
                "nodad"
            };
            lab.gw
                .ip(&format!("addr {word} {address}/{bits} dev wan0 {flag}"));
            if word != "del" {
                // The last address of a family took the routes with it.
                lab.gw
                    .ip(&format!("{family} route replace default via {}", f.up));
            }
        };
        let (first, second) = (f.gw, format!("{}2", f.gw));
        assert_eq!(reach(1), first);
        change("del", first);
        change("add", &second);
        assert_eq!(reach(2), second);
        // A second address beside the first: flows that begin now have one source, not two.
        change("add", first);
        let sources: BTreeSet<String> = (10..30).map(reach).collect();
        assert_eq!(sources.len(), 1, "{sources:?}");
        change("del", &second);
        change("replace", first);
        assert_eq!(reach(3), first);
    }
}
