//! The way a client's packet is meant to go, before all the ways it is not.

use rvpn_lab::probe::Canary;
use rvpn_lab::topology::{FAR4, GW4, GW6, UP4, UP6};
use rvpn_lab::{Helper, Lab, Tunnel, packet};

#[test]
fn a_lease_reaches_the_internet_and_hears_back_on_both_families() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = helper.connect();
    let a = Tunnel::acquire(&mut gateway, 1);
    for (local, far, port, wan) in [
        (a.v4(2), UP4, "1.1.1.1:5353", GW4),
        (a.v6(1), UP6, "[2606:4700:4700::1111]:5353", GW6),
    ] {
        let server = lab.up.udp(port);
        let there = Canary::new();
        a.send(&packet::udp(&local, 4000, far, 5353, &there.0));
        let mut buf = [0; 64];
        let (n, from) = server.recv_from(&mut buf).expect("the datagram arrives");
        assert_eq!(
            (&buf[..n], from.ip().to_string().as_str()),
            (&there.0[..], wan)
        );
        assert!((16384..=32767).contains(&from.port()), "{from}");
        let back = Canary::new();
        server.send_to(&back.0, from).unwrap();
        a.expect(&back.0);
        let echo = Canary::new();
        a.send(&packet::echo(&local, far, 7, 1, &echo.0));
        a.expect(&echo.0);
    }
    let echo = Canary::new();
    a.send(&packet::echo(&a.v4(2), FAR4, 7, 2, &echo.0));
    a.expect(&echo.0);
}
