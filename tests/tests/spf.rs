//! Spoofing and isolation, as far as the helper's rules alone enforce them:
//! raw packets are written to a leased TUN, as a compromised gateway could.

use std::time::Duration;

use rvpn_lab::capture::{Capture, contains, drain_udp};
use rvpn_lab::probe::Canary;
use rvpn_lab::read_back::counter;
use rvpn_lab::stage::{Stage, probe, three_kinds};
use rvpn_lab::topology::{FAR4, GW4, GW6, NB4, NB6, UP4, UP6};
use rvpn_lab::{Ns, Tunnel, naive, packet, wait_until};

#[test]
fn spf_01_the_source_of_another_client() {
    let mut s = Stage::new();
    let mut probes = three_kinds(&s.b.v4(2), UP4);
    probes.extend(three_kinds(&s.b.v6(1), UP6));
    s.all_dropped(&probes, &["spoofed"]);
}

#[test]
fn spf_02_a_public_source_and_the_gateways_own() {
    let mut s = Stage::new();
    let mut probes = Vec::new();
    for src in [FAR4, NB4, GW4, &s.a.v4(1)] {
        probes.extend(three_kinds(src, UP4));
    }
    for src in [NB6, GW6, &s.a.v6(0)] {
        probes.extend(three_kinds(src, UP6));
    }
    s.all_dropped(&probes, &["spoofed"]);
}

#[test]
fn spf_03_sources_that_are_nobodys() {
    let mut s = Stage::new();
    let mut probes = Vec::new();
    for src in [
        "127.0.0.1",
        "0.0.0.0",
        "169.254.1.1",
        "224.0.0.1",
        "255.255.255.255",
    ] {
        probes.extend(three_kinds(src, UP4));
    }
    for src in ["::", "fe80::1", "::ffff:10.64.0.2"] {
        probes.extend(three_kinds(src, UP6));
    }
    s.all_dropped(&probes, &["spoofed"]);
    let refused: Vec<_> = ["::1", "ff02::1"]
        .iter()
        .flat_map(|src| three_kinds(src, UP6))
        .collect();
    s.all_gone(&refused);
}

#[test]
fn spf_04_the_address_of_a_former_lease() {
    let mut s = Stage::new();
    let (old4, old6) = (s.a.v4(2), s.a.v6(1));
    let (slot, generation) = (s.a.reply.slot, s.a.reply.generation);
    s.a = Tunnel::acquire(&mut s.gateway, 3);
    s.gateway.release(slot, generation).expect("release");
    assert_ne!(s.a.reply.slot, slot);
    let mut probes = three_kinds(&old4, UP4);
    probes.extend(three_kinds(&old6, UP6));
    s.all_dropped(&probes, &["spoofed"]);
}

#[test]
fn spf_05_from_one_client_to_another() {
    let mut s = Stage::new();
    let (src, dst) = (s.a.v4(2), s.b.v4(2));
    let mut probes = three_kinds(&src, &dst);
    probes.push(probe(|c| packet::icmp4(&src, &dst, 3, 1, c)));
    let big = [0x55; 64];
    for f in packet::fragments(&packet::udp(&src, 1, &dst, 2, &big), 32) {
        s.a.send(&f);
    }
    let (src, dst) = (s.a.v6(1), s.b.v6(1));
    probes.extend(three_kinds(&src, &dst));
    probes.push(probe(|c| packet::icmp6(&src, &dst, 1, 4, c)));
    s.watch.fence(&s.a);
    s.all_dropped(&probes, &["client_to_client"]);
}

#[test]
fn spf_06_no_port_of_the_gateway_is_open_to_a_client() {
    let mut s = Stage::new();
    let _listening = (
        s.lab.gw.tcp("[::]:443"),
        s.lab.gw.udp("[::]:443"),
        s.lab.gw.tcp("[::]:22"),
    );
    let (a4, a6) = (s.a.v4(2), s.a.v6(1));
    let targets = [
        (&a4, s.a.v4(1)),
        (&a4, s.b.v4(1)),
        (&a4, GW4.to_owned()),
        (&a6, s.a.v6(0)),
        (&a6, s.b.v6(0)),
        (&a6, GW6.to_owned()),
    ];
    let before = counter(&s.lab.gw, "to_host");
    let mut sent = 0;
    for (src, dst) in &targets {
        for port in 1..=u16::MAX {
            s.a.send(&packet::tcp((src, 3000), (dst, port), "S", 1, 0, b""));
            sent += 1;
            if port <= 1000 {
                s.a.send(&packet::udp(src, 3000, dst, port, b"?"));
                sent += 1;
            }
        }
    }
    s.watch.fence(&s.a);
    assert_eq!(s.a.drain().len(), 0, "an answer");
    assert_eq!(counter(&s.lab.gw, "to_host") - before, sent);
}

#[test]
fn spf_07_the_clouds_metadata() {
    let mut s = Stage::new();
    let targets4 = ["169.254.169.254", "169.254.1.1", "100.100.100.200"];
    let target6 = "fd00:ec2::254";
    let (a4, a6) = (s.a.v4(2), s.a.v6(1));
    let probes = || {
        let mut all: Vec<_> = targets4.iter().flat_map(|t| three_kinds(&a4, t)).collect();
        all.extend(three_kinds(&a6, target6));
        all
    };
    // Somewhere in the internet, then on the gateway itself.
    for t in targets4 {
        s.lab.up.ip(&format!("addr add {t}/32 dev lo"));
        s.lab.gw.ip(&format!("route add {t} via {UP4}"));
    }
    s.lab.up.ip(&format!("addr add {target6}/128 dev lo nodad"));
    let there = s.lab.up.udp("[::]:4001");
    s.all_dropped(&probes(), &["special_purpose"]);
    for t in targets4 {
        s.lab.gw.ip(&format!("addr add {t}/32 dev lo"));
    }
    s.lab.gw.ip(&format!("addr add {target6}/128 dev lo nodad"));
    wait_until("the gateway knows the address as its own", || {
        s.lab.gw.ip("-6 route show table local").contains(target6)
    });
    let here = s.lab.gw.udp("[::]:4001");
    s.all_dropped(&probes(), &["to_host"]);
    assert_eq!(drain_udp(&there).len() + drain_udp(&here).len(), 0);
}

#[test]
fn spf_08_private_networks_behind_the_gateway() {
    let mut s = Stage::with("class.1.allow = 192.168.5.0/24, fd99:5::/64\n");
    let nets = [
        "192.168.5.1",
        "192.168.6.1",
        "172.16.0.1",
        "10.1.0.1",
        "100.64.0.1",
    ];
    for n in nets {
        s.lab.up.ip(&format!("addr add {n}/32 dev lo"));
    }
    for n in ["fd99:5::1", "fd99:6::1"] {
        s.lab.up.ip(&format!("addr add {n}/128 dev lo nodad"));
    }
    let server = s.lab.up.udp("[::]:4001");
    let all = |a: &Tunnel| {
        let mut v: Vec<_> = nets
            .iter()
            .map(|n| probe(|c| packet::udp(&a.v4(2), 1, n, 4001, c)))
            .collect();
        v.extend(
            ["fd99:5::1", "fd99:6::1"]
                .iter()
                .map(|n| probe(|c| packet::udp(&a.v6(1), 1, n, 4001, c))),
        );
        v
    };
    let probes = all(&s.a);
    s.all_dropped(&probes, &["special_purpose"]);
    // The class opens its own prefixes and no other.
    let privileged = Tunnel::acquire_class(&mut s.gateway, 9, 1);
    let probes = all(&privileged);
    for (_, p) in &probes {
        privileged.send(p);
    }
    s.watch.fence(&privileged);
    let got = drain_udp(&server);
    for (i, (canary, _)) in probes.iter().enumerate() {
        let arrived = got.iter().filter(|d| contains(d, &canary.0)).count();
        assert_eq!(arrived, usize::from(i == 0 || i == 5), "probe {i}");
    }
}

#[test]
fn spf_09_loopback_and_the_hosts_other_addresses() {
    let mut s = Stage::new();
    s.lab.gw.ip("addr add 8.8.4.4/32 dev lo");
    let here = s.lab.gw.udp("[::]:4001");
    let (a4, a6) = (s.a.v4(2), s.a.v6(1));
    let mut probes = three_kinds(&a4, "127.0.0.1");
    probes.extend(three_kinds(&a4, "127.8.8.8"));
    probes.extend(three_kinds(&a4, "8.8.4.4"));
    s.all_dropped(&probes, &["to_host"]);
    s.all_gone(&three_kinds(&a6, "::1"));
    assert_eq!(drain_udp(&here).len(), 0);
    // With route_localnet the first rule is the only one left: refused at start.
    s.helper.kill();
    s.lab.gw.sysctl("net/ipv4/conf/wan0/route_localnet", "1");
    let (code, text) = s.helper.run(&s.lab.gw, "serve");
    assert_eq!(code, 78, "{text}");
    assert!(
        text.contains("net/ipv4/conf/wan0/route_localnet = 1") && text.contains("set it to 0"),
        "{text}"
    );
}

#[test]
fn spf_10_broadcast_and_multicast() {
    let mut s = Stage::new();
    let here = s.lab.gw.udp("[::]:4001");
    let (a4, a6) = (s.a.v4(2), s.a.v6(1));
    let mut probes = Vec::new();
    for dst in [
        "255.255.255.255",
        "1.1.1.255",
        "224.0.0.1",
        "224.0.0.251",
        "239.255.255.250",
    ] {
        probes.push(probe(|c| packet::udp(&a4, 4000, dst, 4001, c)));
    }
    for dst in ["ff02::1", "ff02::fb", "ff05::2", "ff0e::1"] {
        probes.push(probe(|c| packet::udp(&a6, 4000, dst, 4001, c)));
    }
    s.all_dropped(&probes, &["not_unicast"]);
    let subnet = vec![probe(|c| {
        packet::udp(&a4, 4000, &a4.replace(".2", ".255"), 4001, c)
    })];
    s.all_dropped(&subnet, &["not_unicast", "client_to_client"]);
    assert_eq!(drain_udp(&here).len(), 0);
}

#[test]
fn spf_11_to_its_own_address() {
    let mut s = Stage::new();
    let (a4, a6) = (s.a.v4(2), s.a.v6(1));
    let mut probes = Vec::new();
    for (own, ttl) in [(&a4, 64), (&a4, 255), (&a6, 64), (&a6, 255)] {
        for (c, p) in three_kinds(own, own) {
            probes.push((c, packet::with_ttl(p, ttl)));
        }
    }
    s.all_dropped(&probes, &["client_to_client"]);
}

#[test]
fn spf_12_ipv6_of_the_link_itself() {
    let mut s = Stage::new();
    let a6 = s.a.v6(1);
    // From its address: solicitations, advertisements, redirects.
    let mut probes = Vec::new();
    for kind in [130, 131, 132, 133, 134, 135, 136, 137, 143] {
        probes.push(probe(|c| packet::icmp6(&a6, UP6, kind, 0, c)));
    }
    s.all_dropped(&probes, &["protocol"]);
    let mut others = Vec::new();
    for (src, dst) in [
        ("fe80::2", "ff02::2"),
        ("fe80::2", "fe80::1"),
        (a6.as_str(), "fe80::1"),
        (a6.as_str(), "::ffff:1.1.1.1"),
    ] {
        others.push(probe(|c| packet::icmp6(src, dst, 133, 0, c)));
        others.push(probe(|c| packet::echo(src, dst, 1, 1, c)));
    }
    s.all_dropped(
        &others,
        &[
            "spoofed",
            "protocol",
            "special_purpose",
            "not_unicast",
            "to_host",
        ],
    );
}

#[test]
fn spf_13_the_kernel_says_nothing_of_its_own() {
    let s = Stage::new();
    // A device as the kernel makes it, on a host that does not forward: it solicits at once,
    // then every four seconds. Two of them are longer than ours could stay silent by chance.
    let other = Ns::new("other");
    let control = naive::tun(&other, "nv0", 7);
    let mut solicited = 0;
    wait_until("the kernel talks into a plain device", || {
        let heard = control.recv(Duration::from_millis(100));
        solicited += usize::from(heard.is_some_and(|p| p[6] == 58 && p[40] == 133));
        solicited >= 2
    });
    assert_eq!(
        s.a.drain(),
        [[0_u8; 0]; 0],
        "the kernel talks into the tunnel"
    );
    assert_eq!(s.b.drain(), [[0_u8; 0]; 0]);
}

#[test]
fn spf_14_ip_options() {
    let mut s = Stage::new();
    let a4 = s.a.v4(2);
    let b =
        s.b.v4(2)
            .split('.')
            .map(|n| n.parse().unwrap())
            .collect::<Vec<u8>>();
    let mut probes = Vec::new();
    // Loose and strict source route through B, record route, timestamp, router alert.
    for options in [
        vec![0x83, 7, 4, b[0], b[1], b[2], b[3], 0],
        vec![0x89, 7, 4, b[0], b[1], b[2], b[3], 0],
        vec![0x07, 7, 4, 0, 0, 0, 0, 0],
        vec![0x44, 8, 5, 0, 0, 0, 0, 0],
        vec![0x94, 4, 0, 0],
    ] {
        probes.push(probe(|c| {
            packet::raw4(
                &a4,
                UP4,
                17,
                &options,
                &[&[0x0f, 0xa0, 0x0f, 0xa1, 0, 24, 0, 0], c].concat(),
            )
        }));
    }
    for words in 1..=10 {
        probes.push(probe(|c| {
            packet::raw4(
                &a4,
                UP4,
                17,
                &vec![1; words * 4],
                &[&[0x0f, 0xa0, 0x0f, 0xa1, 0, 24, 0, 0], c].concat(),
            )
        }));
    }
    let before = counter(&s.lab.gw, "options");
    for (_, p) in &probes {
        s.a.send(p);
    }
    s.watch.fence(&s.a);
    s.nothing_seen(&probes);
    // A source route is refused by the kernel before any rule; the rest by the rule.
    assert!(counter(&s.lab.gw, "options") - before >= 13);
}

#[test]
fn spf_15_time_exceeded() {
    let mut s = Stage::new();
    let (a4, a6) = (s.a.v4(2), s.a.v6(1));
    let (host4, host6) = (s.a.v4(1), s.a.v6(0));
    let canary = Canary::new();
    s.a.send(&packet::with_ttl(
        packet::udp(&a4, 1, UP4, 33434, &canary.0),
        1,
    ));
    let error = s.a.expect(&canary.0);
    let source: std::net::Ipv4Addr = <[u8; 4]>::try_from(&error[12..16]).unwrap().into();
    assert_eq!((source.to_string(), error[9], error[20]), (host4, 1, 11));
    s.a.send(&packet::with_ttl(
        packet::udp(&a6, 1, UP6, 33434, &canary.0),
        1,
    ));
    let error = s.a.expect(&canary.0);
    let source: std::net::Ipv6Addr = <[u8; 16]>::try_from(&error[8..24]).unwrap().into();
    assert_eq!((source.to_string(), error[6], error[40]), (host6, 58, 3));
    // A flood of them is answered sparsely, and none leaves.
    let flood = packet::with_ttl(packet::udp(&a4, 1, UP4, 33434, b"flood"), 1);
    let mut answers = 0;
    for _ in 0..10_000 {
        s.a.send(&flood);
        answers += s.a.drain().len();
    }
    s.watch.fence(&s.a);
    answers += s.a.drain().len();
    assert!(answers < 1000, "{answers} answers to 10,000");
    let zero = [probe(|c| {
        packet::with_ttl(packet::udp(&a4, 1, UP4, 33434, c), 0)
    })];
    s.a.send(&zero[0].1);
    s.watch.fence(&s.a);
    assert_eq!(s.watch.seen(zero[0].0), 0);
}

#[test]
fn spf_16_a_neighbour_routes_to_a_client() {
    let s = Stage::new();
    s.lab.nb.ip(&format!("route add 10.64.0.0/10 via {GW4}"));
    s.lab
        .nb
        .ip(&format!("-6 route add fd52:5650:1::/48 via {GW6}"));
    let before = counter(&s.lab.gw, "from_outside");
    let mut probes = three_kinds(NB4, &s.a.v4(2));
    probes.extend(three_kinds(NB6, &s.a.v6(1)));
    probes.extend(three_kinds(NB4, &s.b.v4(1)));
    for (_, p) in &probes {
        s.lab.nb.send_raw(p);
    }
    wait_until("the gateway has seen all of them", || {
        counter(&s.lab.gw, "from_outside") - before == probes.len() as u64
    });
    assert_eq!(s.a.drain().len() + s.b.drain().len(), 0);
}

#[test]
fn spf_17_a_neighbour_asks_who_has_a_client() {
    let s = Stage::new();
    let mut seen = Capture::on(&s.lab.nb);
    for t in [
        s.a.v4(1),
        s.a.v4(2),
        s.b.v4(1),
        "10.63.192.0".to_owned(),
        "10.63.192.1".to_owned(),
    ] {
        s.lab.nb.ip(&format!("route add {t}/32 dev wan0"));
        s.lab.nb.send_raw(&packet::udp(NB4, 1, &t, 1, b"who"));
    }
    for t in [s.a.v6(0), s.b.v6(0), "fd52:5650:1:ffff::".to_owned()] {
        s.lab.nb.ip(&format!("-6 route add {t}/128 dev wan0"));
        s.lab.nb.send_raw(&packet::udp(NB6, 1, &t, 1, b"who"));
    }
    // The address of the wire itself answers, after all of those were asked.
    s.lab.nb.send_raw(&packet::udp(NB4, 1, GW4, 1, b"who"));
    s.lab.nb.send_raw(&packet::udp(NB6, 1, GW6, 1, b"who"));
    // Sender's address of an ARP reply; target of a neighbour advertisement.
    let arp = |f: &[u8]| (f[12..14] == [8, 6] && f[20..22] == [0, 2]).then(|| f[28..32].to_vec());
    let advertised = |f: &[u8]| {
        (f.len() > 78 && f[12..14] == [0x86, 0xdd] && f[20] == 58 && f[54] == 136)
            .then(|| f[62..78].to_vec())
    };
    let gw4: Vec<u8> = GW4.parse::<std::net::Ipv4Addr>().unwrap().octets().to_vec();
    let gw6: Vec<u8> = GW6.parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec();
    wait_until("the gateway's own addresses answer", || {
        let frames = seen.frames();
        frames.iter().any(|f| arp(f).as_ref() == Some(&gw4))
            && frames.iter().any(|f| advertised(f).as_ref() == Some(&gw6))
    });
    let answered: Vec<Vec<u8>> = seen
        .frames()
        .iter()
        .filter_map(|f| arp(f).or_else(|| advertised(f)))
        .collect();
    assert!(
        answered.iter().all(|a| a[0] != 10 && a[0] != 0xfd),
        "{answered:?}"
    );
}

#[test]
fn spf_18_segments_out_of_nowhere() {
    let mut s = Stage::new();
    s.lab.nb.ip(&format!("route add 10.0.0.0/8 via {GW4}"));
    s.lab
        .nb
        .ip(&format!("-6 route add fd52:5650:1::/48 via {GW6}"));
    let mut seen = Capture::on(&s.lab.nb);
    let before = counter(&s.lab.gw, "from_outside");
    let mut n = 0;
    for flags in ["S.", "R", ".", "R.", "F."] {
        for (src, dst) in [
            (NB4, s.a.v4(1)),
            (NB4, s.a.v4(2)),
            (NB4, "10.63.192.0".to_owned()),
            (NB6, s.a.v6(0)),
            (NB6, s.a.v6(1)),
        ] {
            s.lab
                .nb
                .send_raw(&packet::tcp((src, 443), (&dst, 40_000), flags, 1, 1, b""));
            n += 1;
        }
    }
    wait_until("the gateway has seen all of them", || {
        counter(&s.lab.gw, "from_outside") - before == n
    });
    s.watch.fence(&s.a);
    let tunnel = |a: &[u8]| a[0] == 10 || a[0] == 0xfd;
    let answers = seen.frames().iter().filter(|f| match (f[12], f[13]) {
        (8, 0) => tunnel(&f[26..30]),
        (0x86, 0xdd) => tunnel(&f[22..38]),
        _ => false,
    });
    assert_eq!(answers.count(), 0, "a reply of some kind");
    assert_eq!(s.a.drain().len(), 0);
}

#[test]
fn spf_19_whatever_rp_filter_says() {
    let mut s = Stage::new();
    for all in ["0", "1", "2"] {
        for one in ["0", "1", "2"] {
            s.lab.gw.sysctl("net/ipv4/conf/all/rp_filter", all);
            s.lab
                .gw
                .sysctl(&format!("net/ipv4/conf/{}/rp_filter", s.a.name()), one);
            let probes = three_kinds(&s.b.v4(2), UP4);
            s.all_dropped(&probes, &["spoofed"]);
        }
    }
}

#[test]
fn spf_20_protocols_that_are_not_translated() {
    let mut s = Stage::new();
    let (a4, a6) = (s.a.v4(2), s.a.v6(1));
    let mut probes = Vec::new();
    for proto in [4, 41, 47, 50, 51, 132, 253] {
        probes.push(probe(|c| packet::raw4(&a4, UP4, proto, &[], c)));
        probes.push(probe(|c| packet::raw6(&a6, UP6, proto, c)));
    }
    // Extension headers: hop-by-hop, routing, destination options.
    for header in [0, 43, 60] {
        probes.push(probe(|c| {
            packet::raw6(&a6, UP6, header, &[&[17, 0, 1, 4, 0, 0, 0, 0], c].concat())
        }));
    }
    s.all_dropped(&probes, &["protocol"]);
}
