//! Segments fit the path in both directions, whatever the ends offered.

use rvpn_lab::capture::{Capture, contains};
use rvpn_lab::topology::UP4;
use rvpn_lab::{Helper, Lab, PATIENCE, Tunnel, packet, wait_until};

/// A SYN that offers this segment size.
fn syn(a: &Tunnel, port: u16, mss: u16) -> Vec<u8> {
    let src = a.v4(2);
    let mut p = packet::tcp((&src, 4000), (UP4, port), "S", 7, 0, &[0; 4]);
    // The payload's place becomes the option's: the header is a word longer.
    let option = p.len() - 4;
    p[32] = 0x60;
    p[option..option + 2].copy_from_slice(&[2, 4]);
    p[option + 2..].copy_from_slice(&mss.to_be_bytes());
    p[36..38].fill(0);
    let mut sum = p[12..20].to_vec();
    sum.extend([0, 6]);
    sum.extend(u16::try_from(p.len() - 20).expect("length").to_be_bytes());
    sum.extend(&p[20..]);
    let sum = packet::checksum(&sum);
    p[36..38].copy_from_slice(&sum.to_be_bytes());
    p
}

fn offer(mss: u16) -> [u8; 4] {
    let [high, low] = mss.to_be_bytes();
    [2, 4, high, low]
}

#[test]
fn both_ends_are_told_what_the_uplink_carries() {
    let lab = Lab::new();
    lab.gw.ip("link set wan0 mtu 1400");
    let helper = Helper::serving(&lab, "");
    let mut gateway = helper.connect();
    let a = Tunnel::acquire(&mut gateway, 1);
    let _listener = lab.up.tcp(&format!("{UP4}:7500"));
    let mut wire = Capture::on(&lab.up);
    a.send(&syn(&a, 7500, 1460));
    wait_until("the SYN is on the wire, clamped", || {
        wire.count(&offer(1360)) > 0
    });
    assert_eq!(
        wire.frames()
            .iter()
            .filter(|f| f[14..].len() > 33 && f[47] == 2 && contains(f, &offer(1460)))
            .count(),
        0,
        "the offer as the client made it"
    );
    let answer = a.recv(PATIENCE).expect("SYN and ACK");
    assert_eq!(answer[33], 0x12, "SYN and ACK");
    assert!(contains(&answer[40..], &offer(1360)), "{answer:?}");

    // A smaller offer is the client's own business.
    a.send(&syn(&a, 7501, 536));
    wait_until("a small offer is left as it is", || {
        wire.count(&offer(536)) > 0
    });
}
