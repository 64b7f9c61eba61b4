//! ICMP errors: a client speaks for its own flows alone.

use rvpn_lab::capture::Capture;
use rvpn_lab::read_back::counter;
use rvpn_lab::topology::UP4;
use rvpn_lab::{Helper, Lab, Tunnel, packet, wait_until};

/// Port unreachable, quoting what the server sends to `to` as it arrives there.
fn error_about(from: &Tunnel, to: &Tunnel) -> Vec<u8> {
    let quoted = packet::udp(UP4, 6000, &to.v4(2), 4000, b"answer");
    packet::icmp4(&from.v4(2), UP4, 3, 3, &quoted)
}

fn icmp_errors(seen: &mut Capture) -> usize {
    let unreachable =
        |f: &&Vec<u8>| f.len() > 36 && f[12..14] == [8, 0] && f[23] == 1 && f[34] == 3;
    seen.frames().iter().filter(unreachable).count()
}

#[test]
fn spf_25_an_error_about_another_clients_flow() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = helper.connect();
    let a = Tunnel::acquire(&mut gateway, 1);
    let b = Tunnel::acquire(&mut gateway, 2);
    let server = lab.up.udp(&format!("{UP4}:6000"));
    b.send(&packet::udp(&b.v4(2), 4000, UP4, 6000, b"hello"));
    let (_, mapped) = server.recv_from(&mut [0; 64]).unwrap();
    server.send_to(b"answer", mapped).unwrap();
    b.expect(b"answer");

    let mut wire = Capture::on(&lab.up);
    let dropped = counter(&lab.gw, "unleased");
    a.send(&error_about(&a, &b));
    wait_until("it is counted", || {
        counter(&lab.gw, "unleased") == dropped + 1
    });
    assert_eq!(icmp_errors(&mut wire), 0, "A spoke for B");
    // What B says of its own flow does arrive: the observer sees what there is.
    b.send(&error_about(&b, &b));
    wait_until("B's own error is on the wire", || {
        icmp_errors(&mut wire) == 1
    });
    server.send_to(b"still here", mapped).ok();
    server.send_to(b"still here", mapped).unwrap();
    b.expect(b"still here");
}
