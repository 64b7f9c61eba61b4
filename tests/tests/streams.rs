//! Streams leave from an address of their client's own, under the same rules as packets.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use rvpn_ipc::Client;
use rvpn_lab::capture::{Capture, drain_udp};
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::{counter, flows};
use rvpn_lab::topology::{GW4, GW6, UP4, UP6};
use rvpn_lab::{Helper, Lab, Tunnel, wait_until};

const NAT: std::ops::RangeInclusive<u16> = 16384..=32767;

fn setup(config: &str) -> (Lab, Helper, Client) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, config);
    let client = helper.connect();
    (lab, helper, client)
}

fn storage(addr: IpAddr, port: u16) -> SockaddrStorage {
    SockaddrStorage::from(SocketAddr::new(addr, port))
}

/// A socket of the gateway's bound as it binds one for a stream.
fn bound(lab: &Lab, from: IpAddr, kind: SockType) -> std::os::fd::OwnedFd {
    let family = if from.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    lab.gw.run(|| {
        let s = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).expect("socket");
        if from.is_ipv6() {
            // One flag for both families.
            setsockopt(&s, sockopt::IpFreebind, &true).expect("socket");
        }
        bind(s.as_raw_fd(), &storage(from, 0)).expect("socket");
        s
    })
}

fn udp(lab: &Lab, from: IpAddr) -> UdpSocket {
    let s = UdpSocket::from(bound(lab, from, SockType::Datagram));
    s.set_read_timeout(Some(rvpn_lab::PATIENCE))
        .expect("socket");
    s
}

fn ends(a: &Tunnel) -> [(IpAddr, &'static str, &'static str); 2] {
    [
        (a.reply.stream4.into(), UP4, GW4),
        (a.reply.stream6.into(), UP6, GW6),
    ]
}

#[test]
fn a_stream_is_translated_marked_and_answered() {
    let (lab, _helper, mut gateway) = setup("");
    let a = Tunnel::acquire(&mut gateway, 1);
    for (from, to, seen_as) in ends(&a) {
        let to: IpAddr = to.parse().unwrap();
        let listener = lab.up.tcp(&SocketAddr::new(to, 7100).to_string());
        let s = bound(&lab, from, SockType::Stream);
        setsockopt(&s, sockopt::SendTimeout, &TimeVal::seconds(5)).unwrap();
        connect(s.as_raw_fd(), &storage(to, 7100)).unwrap();
        let mut s = TcpStream::from(s);
        let (mut server, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_string(), seen_as);
        assert!(NAT.contains(&peer.port()), "{peer}");
        s.write_all(b"question").unwrap();
        let mut buf = [0; 8];
        server.read_exact(&mut buf).unwrap();
        server.write_all(b"response").unwrap();
        s.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"response");
        let mark = format!("mark={}", 0x5200_0000_u32 | a.reply.slot);
        let tracked = flows(&lab.gw, "dport=7100");
        assert!(tracked.iter().any(|f| f.contains(&mark)), "{tracked:?}");
    }
}

#[test]
fn a_stream_goes_nowhere_a_packet_may_not() {
    let (lab, _helper, mut gateway) = setup("");
    let (a, b) = (
        Tunnel::acquire(&mut gateway, 1),
        Tunnel::acquire(&mut gateway, 2),
    );
    lab.gw.ip(&format!("route add 192.168.5.1 via {UP4}"));
    lab.gw.ip(&format!("-6 route add fd99:5::1 via {UP6}"));
    let (own4, own6) = (lab.gw.udp("0.0.0.0:7200"), lab.gw.udp("[::1]:7200"));
    let (a4, a6): (IpAddr, IpAddr) = (a.reply.stream4.into(), a.reply.stream6.into());
    let (b4, b6) = (b.reply.stream4.to_string(), b.reply.stream6.to_string());
    for (from, to, port, reason) in [
        (a4, "127.0.0.1", 7200, "to_host"),
        (a4, GW4, 7200, "to_host"),
        (a4, &b.v4(1), 7200, "to_host"),
        (a4, &b4, 7200, "to_host"),
        (a4, &b.v4(2), 7200, "client_to_client"),
        (a4, "192.168.5.1", 7200, "special_purpose"),
        (a6, "::1", 7200, "to_host"),
        (a6, GW6, 7200, "to_host"),
        (a6, &b6, 7200, "to_host"),
        (a6, &b.v6(1), 7200, "client_to_client"),
        (a6, "fd99:5::1", 7200, "special_purpose"),
    ] {
        let before = counter(&lab.gw, reason);
        let refused = udp(&lab, from).send_to(b"knock", (to.parse::<IpAddr>().unwrap(), port));
        assert_eq!(
            refused.map_err(|e| e.kind()),
            Err(ErrorKind::PermissionDenied),
            "{from} to {to}"
        );
        assert_eq!(counter(&lab.gw, reason), before + 1, "{from} to {to}");
    }
    assert_eq!(drain_udp(&own4).len() + drain_udp(&own6).len(), 0);
    assert_eq!((a.drain().len(), b.drain().len()), (0, 0));
}

#[test]
fn an_address_without_a_lease_sends_nothing() {
    let (lab, _helper, mut gateway) = setup("");
    let a = Tunnel::acquire(&mut gateway, 1);
    let server = lab.up.udp(&format!("{UP4}:7300"));
    let a4 = a.reply.stream4;
    let s = udp(&lab, a4.into());
    s.send_to(b"held", (UP4, 7300)).unwrap();
    let (_, mapped) = server.recv_from(&mut [0; 16]).unwrap();
    let (slot, generation) = (a.reply.slot, a.reply.generation);
    drop(a);
    gateway.release(slot, generation).unwrap();
    wait_until("the slot is clean", || {
        gateway.describe().unwrap().free == 4
    });
    let before = counter(&lab.gw, "unleased");
    let former = a4;
    let never = Ipv4Addr::from(u32::from(former) + 9);
    for from in [former, never].map(IpAddr::from) {
        let refused = udp(&lab, from).send_to(b"without", (UP4, 7300));
        assert_eq!(
            refused.map_err(|e| e.kind()),
            Err(ErrorKind::PermissionDenied),
            "{from}"
        );
    }
    assert_eq!(counter(&lab.gw, "unleased"), before + 2);
    // What the server still sends to the former mapping reaches nobody.
    let mut wire = Capture::on(&lab.up);
    let canary = Canary::new();
    server.send_to(&canary.0, mapped).unwrap();
    wait_until("it was on the wire", || wire.count(&canary.0) > 0);
    s.set_nonblocking(true).unwrap();
    assert_eq!(drain_udp(&s).len(), 0);
}

#[test]
fn streams_and_packets_share_the_flow_cap() {
    let (lab, _helper, mut gateway) = setup("flow-cap = 20\n");
    let a = Tunnel::acquire(&mut gateway, 1);
    let _server = lab.up.udp(&format!("{UP4}:7400"));
    for port in 1..=10 {
        a.send(&rvpn_lab::packet::udp(&a.v4(2), port, UP4, 7400, b"packet"));
    }
    let sockets: Vec<_> = (0..15).map(|_| udp(&lab, a.reply.stream4.into())).collect();
    let through = sockets
        .iter()
        .filter(|s| s.send_to(b"stream", (UP4, 7400)).is_ok())
        .count();
    assert_eq!(through, 10);
    assert_eq!(counter(&lab.gw, "flow_cap"), 5);
}

#[test]
fn nobody_on_the_wire_reaches_a_streams_address() {
    let (lab, _helper, mut gateway) = setup("");
    let a = Tunnel::acquire(&mut gateway, 1);
    let (s4, s6) = (a.reply.stream4.to_string(), a.reply.stream6.to_string());
    lab.nb.ip(&format!("route add {s4} via {GW4}"));
    lab.nb.ip(&format!("-6 route add {s6} via {GW6}"));
    let here = [
        udp(&lab, a.reply.stream4.into()),
        udp(&lab, a.reply.stream6.into()),
    ];
    let (nb4, nb6) = (lab.nb.udp("0.0.0.0:0"), lab.nb.udp("[::]:0"));
    for (out, at) in [(nb4, &here[0]), (nb6, &here[1])] {
        let before = counter(&lab.gw, "from_outside");
        out.send_to(b"unasked", at.local_addr().unwrap()).unwrap();
        wait_until("it is dropped", || {
            counter(&lab.gw, "from_outside") == before + 1
        });
        at.set_nonblocking(true).unwrap();
        assert_eq!(drain_udp(at).len(), 0);
    }
    // On the wire itself nobody answers for the address.
    lab.nb.ip(&format!("route replace {s4} dev wan0"));
    let asked = lab.nb.udp("0.0.0.0:0");
    let _ = asked.send_to(b"who has it", (s4.as_str(), 1));
    wait_until("the question goes unanswered", || {
        lab.nb.ip(&format!("neigh show {s4}")).contains("FAILED")
    });
}
