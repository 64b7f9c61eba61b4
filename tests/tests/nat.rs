//! Translation and connection tracking: port shadow, residual traffic, exhaustion.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::Write;
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, getsockopt, setsockopt, socket,
    sockopt,
};
use rvpn_ipc::{Client, ClientError, Key, Kind, Status};
use rvpn_lab::capture::{contains, drain_udp};
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::{counter, flows};
use rvpn_lab::topology::{FAR4, GW4, NB4, UP4};
use rvpn_lab::{Helper, Lab, Tunnel, naive, packet, wait_until, wait_within};

const VICTIM_PORT: u16 = 5555;

fn setup(config: &str) -> (Lab, Helper, Client) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, config);
    let client = helper.connect();
    (lab, helper, client)
}

/// Whether the victim's datagrams to a port of the gateway reach the listener, and how many reach A.
fn udp_shadow(lab: &Lab, a: &Tunnel, port: u16) -> (bool, usize) {
    let listener = lab.gw.udp(&format!("0.0.0.0:{port}"));
    let victim = lab.up.udp(&format!("{UP4}:{VICTIM_PORT}"));
    a.send(&packet::udp(&a.v4(2), port, UP4, VICTIM_PORT, b"open"));
    wait_until("A's datagram reaches the victim", || {
        drain_udp(&victim).iter().any(|d| d == b"open")
    });
    let canary = Canary::new();
    victim.send_to(&canary.0, (GW4, port)).unwrap();
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
    for port in [443, 53, 8443, 51820] {
        assert_eq!(udp_shadow(&lab, &a, port), (true, 0), "port {port}");
    }
}

#[test]
fn nat_01_control_a_plain_gateway_is_shadowed() {
    let lab = Lab::new();
    let (a, _b) = naive::gateway(&lab);
    assert_eq!(udp_shadow(&lab, &a, 443), (false, 1));
}

/// A TCP connection from a chosen source port; true when it is established in time.
fn connect_from(lab: &Lab, sport: u16, port: u16) -> bool {
    lab.up.run(|| {
        let s = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK,
            None,
        )
        .unwrap();
        setsockopt(&s, sockopt::ReuseAddr, &true).unwrap();
        bind(s.as_raw_fd(), &SockaddrIn::new(1, 1, 1, 1, sport)).unwrap();
        let _ = connect(s.as_raw_fd(), &SockaddrIn::new(1, 1, 1, 2, port));
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(&s),
            PollFlags::POLLOUT,
        )];
        let ready = poll(&mut fds, PollTimeout::from(2500_u16)).unwrap();
        ready > 0 && getsockopt(&s, sockopt::SocketError).unwrap() == 0
    })
}

fn tcp_shadow(lab: &Lab, a: &Tunnel, port: u16) -> (bool, usize) {
    // The victim does not answer A's SYN with a reset: its firewall is silent.
    lab.up.sh("nft", &["table inet quiet {\nchain o {\ntype filter hook output priority 0;\ntcp flags & rst == rst drop\n}\n}"]);
    let _listener = lab.gw.tcp(&format!("0.0.0.0:{port}"));
    a.send(&packet::tcp(
        (&a.v4(2), port),
        (UP4, VICTIM_PORT),
        "S",
        1,
        0,
        b"",
    ));
    let through = a.name();
    wait_until(&format!("the SYN of {through} is tracked"), || {
        !flows(&lab.gw, &format!("dport={VICTIM_PORT}")).is_empty()
    });
    let connected = connect_from(lab, VICTIM_PORT, port);
    let caught = a
        .drain()
        .iter()
        .filter(|p| p[9] == 6 && p[22..24] == port.to_be_bytes())
        .count();
    (connected, caught)
}

#[test]
fn nat_02_tcp_port_shadow() {
    let (lab, _helper, mut gateway) = setup("");
    let a = Tunnel::acquire(&mut gateway, 1);
    assert_eq!(tcp_shadow(&lab, &a, 443), (true, 0));
}

#[test]
fn nat_02_control_a_plain_gateway_is_shadowed() {
    let lab = Lab::new();
    let (a, _b) = naive::gateway(&lab);
    let (connected, caught) = tcp_shadow(&lab, &a, 443);
    assert!(
        !connected && caught > 0,
        "connected: {connected}, caught: {caught}"
    );
}

#[test]
fn nat_03_every_port_of_the_gateway_and_its_own_connections() {
    let (lab, _helper, mut gateway) = setup("flow-cap = 5000\n");
    let a = Tunnel::acquire(&mut gateway, 1);
    // Admin, metrics, ports granted to serving clients: below and above the translation range.
    for port in [1024, 8080, 9090, 16383, 32768, 61000, 65535] {
        assert_eq!(udp_shadow(&lab, &a, port), (true, 0), "port {port}");
    }
    assert_eq!(tcp_shadow(&lab, &a, 61000), (true, 0));
    // A has flows from a thousand ports to the server the gateway is about to talk to.
    let server = lab.up.udp(&format!("{UP4}:7000"));
    for port in 33_000..34_000 {
        a.send(&packet::udp(&a.v4(2), port, UP4, 7000, b"shadow"));
    }
    wait_until("A's flows exist", || {
        flows(&lab.gw, "dport=7000").len() >= 1000
    });
    drain_udp(&server);
    a.drain();
    for port in 33_000..33_050 {
        let own = lab.gw.udp(&format!("{GW4}:{port}"));
        own.send_to(b"own", (UP4, 7000)).unwrap();
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

/// Acquires as soon as the one slot is free again.
fn acquire_when_free(client: &mut Client, key: u8) -> Tunnel {
    let mut got = None;
    wait_until("the slot is free again", || {
        match client.acquire(Key([key; 16]), Kind::Both, 0) {
            Ok(lease) => {
                got = Some(Tunnel::new(Key([key; 16]), lease));
                true
            }
            Err(ClientError::Refused(r)) if r.status == Status::NoCapacity => false,
            Err(e) => panic!("{e}"),
        }
    });
    got.unwrap()
}

/// A opens a flow; the server keeps sending to it while A leaves and B gets the
/// very slot. Returns what B received in all, after the server has sent on.
fn residual_udp(lab: &Lab, client: &mut Client) -> usize {
    let server = lab.up.udp(&format!("{UP4}:6000"));
    let a = Tunnel::acquire(client, 1);
    a.send(&packet::udp(&a.v4(2), 4000, UP4, 6000, b"hello"));
    let mut buf = [0; 64];
    let (_, mapped) = server.recv_from(&mut buf).unwrap();
    let stop = AtomicBool::new(false);
    let sent = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = server.send_to(b"residual datagram", mapped);
                sent.fetch_add(1, Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_micros(500));
            }
        });
        a.expect(b"residual datagram");
        let (slot, generation) = (a.reply.slot, a.reply.generation);
        drop(a);
        client.release(slot, generation).unwrap();
        let b = acquire_when_free(client, 2);
        assert_eq!(b.reply.slot, slot);
        let from = sent.load(Ordering::Relaxed);
        wait_until("the server has sent a thousand more", || {
            sent.load(Ordering::Relaxed) > from + 1000
        });
        stop.store(true, Ordering::Relaxed);
        let got = b.drain().len();
        client.release(b.reply.slot, b.reply.generation).unwrap();
        drop(b);
        wait_until("it is clean", || client.describe().unwrap().free == 1);
        got
    })
}

#[test]
fn nat_04_residual_udp() {
    let (lab, _helper, mut client) = setup("slots = 1\nmax-slots = 1\n");
    assert_eq!(residual_udp(&lab, &mut client), 0);
}

/// The sequence number of the SYN and ACK from this port, past whatever else comes.
#[track_caller]
fn answered(a: &Tunnel, port: u16) -> u32 {
    let mut found = None;
    wait_until("SYN and ACK", || {
        found = a
            .recv(Duration::from_millis(100))
            .filter(|p| p[9] == 6 && p[20..22] == port.to_be_bytes() && p[33] & 0x12 == 0x12);
        found.is_some()
    });
    let p = found.unwrap();
    u32::from_be_bytes(p[24..28].try_into().unwrap())
}

/// A completes a handshake and acknowledges nothing more; the server retransmits into B's time.
fn residual_tcp(lab: &Lab, client: &mut Client) -> usize {
    let listener = lab.up.tcp(&format!("{UP4}:6001"));
    let a = Tunnel::acquire(client, 1);
    let src = a.v4(2);
    a.send(&packet::tcp((&src, 4000), (UP4, 6001), "S", 100, 0, b""));
    let theirs = answered(&a, 6001);
    a.send(&packet::tcp(
        (&src, 4000),
        (UP4, 6001),
        ".",
        101,
        theirs.wrapping_add(1),
        b"",
    ));
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"residual segment").unwrap();
    a.expect(b"residual segment");
    let (slot, generation) = (a.reply.slot, a.reply.generation);
    drop(a);
    client.release(slot, generation).unwrap();
    let b = acquire_when_free(client, 2);
    assert_eq!(b.reply.slot, slot);
    // It sends again, into nothing, or is told that nobody is there.
    server.set_nonblocking(true).unwrap();
    let before = retransmitted(lab);
    wait_until("the server has sent again or was reset", || {
        let reset = matches!(std::io::Read::read(&mut &server, &mut [0; 8]), Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset);
        reset || retransmitted(lab) > before + 1
    });
    let got = b.drain().len();
    let _ = server.shutdown(Shutdown::Both);
    client.release(b.reply.slot, b.reply.generation).unwrap();
    drop(b);
    wait_until("it is clean", || client.describe().unwrap().free == 1);
    got
}

/// Segments the internet's end has sent again.
fn retransmitted(lab: &Lab) -> u64 {
    let text = lab
        .up
        .run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))
        .unwrap();
    let mut lines = text.lines().filter(|l| l.starts_with("Tcp:"));
    let names: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    let values: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    let at = names.iter().position(|n| *n == "RetransSegs").unwrap();
    values[at].parse().unwrap()
}

#[test]
fn nat_05_residual_tcp() {
    let (lab, _helper, mut client) = setup("slots = 1\nmax-slots = 1\n");
    assert_eq!(residual_tcp(&lab, &mut client), 0);
}

#[test]
fn nat_06_packets_in_flight_while_a_lease_is_released() {
    let (lab, _helper, mut client) = setup("slots = 1\nmax-slots = 1\n");
    let server = lab.up.udp(&format!("{UP4}:6000"));
    for round in 0..10 {
        let a = Tunnel::acquire(&mut client, 1);
        let (slot, generation) = (a.reply.slot, a.reply.generation);
        // A copy of the descriptor goes on sending whatever the gateway does.
        std::thread::scope(|s| {
            let sender = s.spawn(|| {
                let mut port = 1;
                let packet = |port| packet::udp(&a.v4(2), port, UP4, 6000, b"late");
                let end = Instant::now() + rvpn_lab::PATIENCE;
                while a.try_send(&packet(port)).is_ok() && Instant::now() < end {
                    port = if port == 900 { 1 } else { port + 1 };
                }
            });
            wait_until("packets flow", || !drain_udp(&server).is_empty());
            client.release(slot, generation).unwrap();
            sender.join().unwrap();
        });
        drop(a);
        let b = acquire_when_free(&mut client, 2);
        assert_eq!(
            flows(&lab.gw, "src=10.64.0.2"),
            [""; 0],
            "round {round}: flows of the former lease"
        );
        client.release(b.reply.slot, b.reply.generation).unwrap();
        wait_until("it is clean", || client.describe().unwrap().free == 1);
        drain_udp(&server);
    }
}

/// Fills the gateway's flow table from the internet's side.
fn foreign_flows(lab: &Lab, wanted: u64) {
    lab.gw
        .sysctl("net/netfilter/nf_conntrack_udp_timeout", "900");
    let count = || {
        lab.gw
            .sysctl_get("net/netfilter/nf_conntrack_count")
            .parse::<u64>()
            .unwrap()
    };
    lab.up.run(|| {
        use nix::sys::socket::{MsgFlags, SockProtocol, sendto};
        let s = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::empty(),
            SockProtocol::Raw,
        )
        .unwrap();
        let to = SockaddrIn::new(1, 1, 1, 2, 0);
        let mut p = packet::udp(FAR4, 1, GW4, 9, b"foreign");
        for n in 0..wanted + wanted / 50 {
            let (port, host) = (
                u16::try_from(n % 60_000).unwrap() + 1000,
                u8::try_from(n / 60_000).unwrap(),
            );
            p[15] = 10 + host;
            p[20..22].copy_from_slice(&port.to_be_bytes());
            // Without a checksum, which UDP allows.
            p[26..28].fill(0);
            packet::fix_header(&mut p[..20]);
            sendto(s.as_raw_fd(), &p, &to, MsgFlags::empty()).unwrap();
        }
    });
    wait_until("the flow table is full of others' flows", || {
        count() >= wanted
    });
}

#[test]
fn nat_07_release_among_200_000_foreign_flows() {
    let (lab, _helper, mut client) = setup("slots = 1\nmax-slots = 1\n");
    foreign_flows(&lab, 200_000);
    let mut took = Vec::new();
    for _ in 0..5 {
        let a = Tunnel::acquire(&mut client, 1);
        for port in 1..=500 {
            a.send(&packet::udp(&a.v4(2), port, UP4, 6000, b"own"));
        }
        let (slot, generation) = (a.reply.slot, a.reply.generation);
        drop(a);
        client.release(slot, generation).unwrap();
        took.push(wait_within(rvpn_lab::PATIENCE, "the slot is clean", || {
            client.describe().unwrap().free == 1
        }));
    }
    took.sort();
    println!("clean after {took:?}");
    assert!(
        took[2] < Duration::from_millis(500),
        "half of them took longer than half a second: {took:?}"
    );
    let own = flows(&lab.gw, "src=10.64.0.2");
    assert_eq!(own.len(), 0);
    // "Must show" 2: reused at once by another key, among all those flows.
    assert_eq!(
        residual_udp(&lab, &mut client),
        0,
        "datagrams of the former holder"
    );
    assert_eq!(
        residual_tcp(&lab, &mut client),
        0,
        "segments of the former holder"
    );
    let left: u64 = lab
        .gw
        .sysctl_get("net/netfilter/nf_conntrack_count")
        .parse()
        .unwrap();
    assert!(left >= 200_000, "others' flows were touched: {left} left");
}

#[test]
fn nat_08_nobody_else_can_use_a_mapping() {
    let (lab, _helper, mut client) = setup("");
    let server = lab.up.udp(&format!("{UP4}:6000"));
    let a = Tunnel::acquire(&mut client, 1);
    a.send(&packet::udp(&a.v4(2), 4000, UP4, 6000, b"hello"));
    let (_, mapped) = server.recv_from(&mut [0; 64]).unwrap();
    let others: Vec<UdpSocket> = vec![
        lab.up.udp(&format!("{UP4}:6001")),
        lab.up.udp(&format!("{FAR4}:6000")),
        lab.nb.udp(&format!("{NB4}:6000")),
    ];
    for o in &others {
        o.send_to(b"unsolicited", mapped).unwrap();
    }
    server.send_to(b"expected", mapped).unwrap();
    a.expect(b"expected");
    assert!(!a.drain().iter().any(|p| contains(p, b"unsolicited")));
}

#[test]
fn nat_09_one_clients_flood_leaves_room_for_another() {
    let (lab, _helper, mut client) = setup("");
    let a = Tunnel::acquire(&mut client, 1);
    let b = Tunnel::acquire(&mut client, 2);
    let server = lab.up.udp(&format!("{UP4}:6000"));
    let capped = counter(&lab.gw, "flow_cap");
    for port in 1..=60_000 {
        a.send(&packet::udp(&a.v4(2), port, UP4, 6000, b"flood"));
    }
    let own = flows(&lab.gw, &format!("src={}", a.v4(2))).len();
    assert!(own <= 1024, "{own} flows of one client");
    assert!(counter(&lab.gw, "flow_cap") - capped >= 58_000);
    drain_udp(&server);
    for port in 1..=5 {
        let canary = Canary::new();
        b.send(&packet::udp(&b.v4(2), port, UP4, 6000, &canary.0));
        wait_until("B's new flow arrives", || {
            drain_udp(&server).iter().any(|d| contains(d, &canary.0))
        });
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
        let theirs = answered(&a, port).wrapping_add(1);
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
    let server = lab.up.udp(&format!("{UP4}:6000"));
    let reach = |port: u16| {
        let canary = Canary::new();
        let mut from = None;
        wait_within(Duration::from_secs(5), "a new flow works", || {
            let _ = a.try_send(&packet::udp(&a.v4(2), port, UP4, 6000, &canary.0));
            let mut buf = [0; 64];
            server
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            while let Ok((n, f)) = server.recv_from(&mut buf) {
                if contains(&buf[..n], &canary.0) {
                    from = Some(f.ip().to_string());
                }
            }
            from.is_some()
        });
        from.unwrap()
    };
    assert_eq!(reach(1), GW4);
    lab.gw.ip("addr del 1.1.1.2/24 dev wan0");
    lab.gw.ip("addr add 1.1.1.22/24 dev wan0");
    lab.gw.ip(&format!("route replace default via {UP4}"));
    assert_eq!(reach(2), "1.1.1.22");
    // A second address beside the first changes nothing for flows that begin.
    lab.gw.ip("addr add 1.1.1.2/24 dev wan0");
    for port in 10..30 {
        assert_eq!(reach(port), "1.1.1.22", "port {port}");
    }
    // Deleting the first address takes the second with it.
    lab.gw.ip("addr del 1.1.1.22/24 dev wan0");
    lab.gw.ip("addr replace 1.1.1.2/24 dev wan0");
    lab.gw.ip(&format!("route replace default via {UP4}"));
    assert_eq!(reach(3), GW4);
}
