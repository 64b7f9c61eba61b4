//! What is refused whole is refused in pieces, and what belongs to no flow goes nowhere.

use rvpn_lab::capture::{contains, drain_udp};
use rvpn_lab::probe::{Canary, Observers};
use rvpn_lab::read_back::counter;
use rvpn_lab::stage::{Probe, Stage, probe};
use rvpn_lab::topology::{FAMILIES, UP4, UP6, at};
use rvpn_lab::{Lab, Tunnel, naive, packet, wait_until};

/// A canary in the first piece, and enough after it for a second.
fn long(c: &[u8]) -> Vec<u8> {
    [c, &[0x55; 80]].concat()
}

/// The packet in two pieces, as one probe each: the canary is in the first.
fn in_pieces((canary, p): Probe, id: u32) -> Vec<Probe> {
    let all = if p[0] >> 4 == 4 {
        packet::fragments(&p, 64)
    } else {
        packet::fragments6(&p, 64, id)
    };
    assert_eq!(all.len(), 2);
    all.into_iter().map(|f| (canary, f)).collect()
}

/// An IPv6 packet whose fragment header says that it is whole.
fn atomic((canary, p): Probe, id: u32) -> Probe {
    let mut all = packet::fragments6(&p, 2000, id);
    (canary, all.swap_remove(0))
}

#[test]
fn pieces_of_what_may_pass_arrive() {
    let mut s = Stage::new();
    let mut id = 0;
    for f in FAMILIES {
        let server = s.lab.up.udp(&at(f.up, 4001));
        let src = f.source(&s.a);
        let whole = || probe(|c| packet::udp(&src, 4000, f.up, 4001, &long(c)));
        let mut wanted = Vec::new();
        for turned in [false, true] {
            id += 1;
            let mut pieces = in_pieces(whole(), id);
            if turned {
                pieces.reverse();
            }
            wanted.push(pieces[0].0);
            pieces.iter().for_each(|(_, p)| s.a.send(p));
        }
        wait_until("each datagram is whole again", || {
            for d in drain_udp(&server) {
                wanted.retain(|c| !contains(&d, &c.0));
            }
            wanted.is_empty()
        });
    }
    s.watch.fence(&s.a);
    assert_eq!(s.watch.private_frames(), 0, "a private source on the wire");
}

#[test]
fn spf_01_the_source_of_another_client_in_pieces() {
    let mut s = Stage::new();
    let (b4, b6) = (s.b.v4(2), s.b.v6(1));
    let mut probes = in_pieces(probe(|c| packet::udp(&b4, 1, UP4, 4001, &long(c))), 1);
    probes.extend(in_pieces(
        probe(|c| packet::udp(&b6, 1, UP6, 4001, &long(c))),
        1,
    ));
    probes.push(atomic(probe(|c| packet::udp(&b6, 1, UP6, 4001, c)), 2));
    s.all_gone(&probes);
}

#[test]
fn spf_05_from_one_client_to_another_in_pieces() {
    let mut s = Stage::new();
    let mut probes = Vec::new();
    for (id, f) in (1..).zip(FAMILIES) {
        let (src, dst) = (f.source(&s.a), f.source(&s.b));
        for whole in [
            probe(|c| packet::udp(&src, 1, &dst, 4001, &long(c))),
            probe(|c| packet::echo(&src, &dst, 1, 1, &long(c))),
        ] {
            probes.extend(in_pieces(whole, id));
        }
    }
    let (src, dst) = (s.a.v6(1), s.b.v6(1));
    probes.push(atomic(probe(|c| packet::udp(&src, 1, &dst, 4001, c)), 9));
    let before = counter(&s.lab.gw, "client_to_client");
    s.all_gone(&probes);
    // Four datagrams and echoes in two pieces each, one in a single piece.
    assert_eq!(counter(&s.lab.gw, "client_to_client") - before, 5);
}

/// What is neither TCP, UDP, echo nor error, in pieces.
fn foreign(a: &Tunnel) -> Vec<Probe> {
    let (a4, a6) = (a.v4(2), a.v6(1));
    let mut probes = Vec::new();
    let mut id = 100;
    for proto in [4, 41, 47, 50, 51, 132, 253] {
        id += 1;
        probes.extend(in_pieces(
            probe(|c| packet::raw4(&a4, UP4, proto, &[], &long(c))),
            id,
        ));
        let v6 = || probe(|c| packet::raw6(&a6, UP6, proto, &long(c)));
        probes.extend(in_pieces(v6(), id));
        probes.push(atomic(v6(), id + 1000));
    }
    // Extension headers and the link's own messages behind a fragment header.
    for header in [0, 43, 60] {
        id += 1;
        let datagram = |c: &[u8]| {
            [
                &[17, 0, 1, 4, 0, 0, 0, 0, 15, 160, 15, 161, 0, 104, 0, 0],
                &long(c)[..],
            ]
            .concat()
        };
        let v6 = || probe(|c| packet::raw6(&a6, UP6, header, &datagram(c)));
        probes.extend(in_pieces(v6(), id));
        probes.push(atomic(v6(), id + 1000));
    }
    for kind in [133, 134, 135, 136, 137] {
        id += 1;
        let v6 = || probe(|c| packet::icmp6(&a6, UP6, kind, 0, &long(c)));
        probes.extend(in_pieces(v6(), id));
        probes.push(atomic(v6(), id + 1000));
    }
    probes
}

#[test]
fn spf_20_protocols_in_pieces() {
    let mut s = Stage::new();
    let probes = foreign(&s.a);
    s.all_gone(&probes);
}

/// Segments and answers that belong to no flow, and packets that are broken.
fn astray(a: &Tunnel) -> Vec<Probe> {
    let mut probes = Vec::new();
    for f in FAMILIES {
        let src = f.source(a);
        // Reset, finished, none, all of the flags.
        for flags in ["R", "R.", "F.", "", "FPU", "SF", "SR"] {
            probes.push(probe(|c| {
                packet::tcp((&src, 4000), (f.up, 4001), flags, 1, 1, c)
            }));
        }
        // Checksums that are wrong.
        let broken = |p: Vec<u8>, at: usize| {
            let mut p = p;
            let at = at + if f.is_v4() { 20 } else { 40 };
            p[at] ^= 0x5a;
            p
        };
        probes.push(probe(|c| broken(packet::udp(&src, 4000, f.up, 4001, c), 6)));
        probes.push(probe(|c| {
            broken(packet::tcp((&src, 4000), (f.up, 4001), "S", 1, 0, c), 16)
        }));
        probes.push(probe(|c| broken(packet::echo(&src, f.up, 1, 1, c), 2)));
        // An answer to nothing that was asked.
        if f.is_v4() {
            probes.push(probe(|c| packet::icmp4(&src, f.up, 0, 0, c)));
        } else {
            probes.push(probe(|c| packet::icmp6(&src, f.up, 129, 0, c)));
        }
    }
    probes
}

#[test]
fn spf_21_segments_without_a_flow() {
    let mut s = Stage::new();
    let probes = astray(&s.a);
    s.all_dropped(&probes, &["invalid", "unleased"]);
}

/// Every one of the probes leaves a gateway of `masquerade` alone: they are worth sending.
#[track_caller]
fn all_leak(probes: impl Fn(&Tunnel) -> Vec<Probe>) {
    let lab = Lab::new();
    let (a, _b) = naive::gateway(&lab);
    let mut watch = Observers::new(&lab);
    let probes = probes(&a);
    for (_, p) in &probes {
        a.send(p);
    }
    watch.fence(&a);
    for (i, (canary, _)) in probes.iter().enumerate() {
        assert!(watch.seen(*canary) > 0, "probe {i} does not leak");
    }
}

#[test]
fn spf_20_control_a_plain_gateway_forwards_them() {
    all_leak(foreign);
}

#[test]
fn spf_21_control_a_plain_gateway_forwards_them() {
    all_leak(astray);
}

#[test]
fn denied_ports_are_denied_whole_and_in_pieces() {
    let mut s = Stage::with("deny-ports = tcp/25, udp/100-200\nclass.1.deny-ports = tcp/26\n");
    let b = Tunnel::acquire_class(&mut s.gateway, 9, 1);
    for f in FAMILIES {
        let src = f.source(&s.a);
        let refused: Vec<Probe> = vec![
            probe(|c| packet::tcp((&src, 4000), (f.up, 25), "S", 1, 0, c)),
            probe(|c| packet::udp(&src, 4000, f.up, 100, c)),
            probe(|c| packet::udp(&src, 4000, f.up, 150, c)),
            probe(|c| packet::udp(&src, 4000, f.up, 200, c)),
        ];
        s.all_dropped(&refused, &["denied_port"]);
        let mut pieces = in_pieces(probe(|c| packet::udp(&src, 4000, f.up, 150, &long(c))), 7);
        if !f.is_v4() {
            pieces.push(atomic(probe(|c| packet::udp(&src, 4000, f.up, 150, c)), 8));
        }
        s.all_gone(&pieces);
        // Their neighbours, and what another class says, are open.
        for (from, to) in [(&s.a, 99), (&s.a, 201), (&b, 150)] {
            let server = s.lab.up.udp(&at(f.up, to));
            let canary = Canary::new();
            from.send(&packet::udp(&f.source(from), 4000, f.up, to, &canary.0));
            let (n, _) = server.recv_from(&mut [0; 64]).expect("open");
            assert_eq!(n, canary.0.len());
        }
        let listener = s.lab.up.tcp(&at(f.up, 25));
        b.send(&packet::tcp(
            (&f.source(&b), 4000),
            (f.up, 25),
            "S",
            1,
            0,
            b"",
        ));
        b.syn_answered(25);
        drop(listener);
    }
}
