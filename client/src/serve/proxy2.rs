//! The PROXY protocol, version 2, as a sender.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rvpn_proto::streams::Visit;
use tokio::net::TcpStream;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, on behalf of somebody.
const PROXIED: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// Where the visitor comes from and came to, before its first byte.
pub(super) fn header(visit: &Visit, local: &TcpStream) -> Vec<u8> {
    let to = local.peer_addr().map(|a| a.ip());
    build(visit, to.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)))
}

fn build(visit: &Visit, to: IpAddr) -> Vec<u8> {
    let mut bytes = SIGNATURE.to_vec();
    bytes.push(PROXIED);
    let peer = visit.peer.ip().to_canonical();
    let (kind, addresses) = match (peer, to.to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (TCP4, [from.octets(), to.octets()].concat()),
        (IpAddr::V4(from), IpAddr::V6(_)) => (
            TCP4,
            [from.octets(), Ipv4Addr::UNSPECIFIED.octets()].concat(),
        ),
        (IpAddr::V6(from), IpAddr::V6(to)) => (TCP6, [from.octets(), to.octets()].concat()),
        (IpAddr::V6(from), IpAddr::V4(_)) => (
            TCP6,
            [from.octets(), Ipv6Addr::UNSPECIFIED.octets()].concat(),
        ),
    };
    bytes.push(kind);
    let length = addresses.len() as u16 + 4;
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&addresses);
    bytes.extend_from_slice(&visit.peer.port().to_be_bytes());
    bytes.extend_from_slice(&visit.port.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvpn_proto::streams::Visitors;

    fn visit(peer: &str) -> Visit {
        Visit {
            offer: 1,
            peer: peer.parse().unwrap(),
            port: 443,
            name: None,
            service: Visitors::Tls,
        }
    }

    #[test]
    fn both_families_are_written_as_the_specification_has_them() {
        let four = build(&visit("198.51.100.7:4660"), "127.0.0.1".parse().unwrap());
        let hex: String = four.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "0d0a0d0a000d0a515549540a2111000cc63364077f000001123401bb"
        );
        let six = build(&visit("[2606:4700::2]:4660"), "127.0.0.1".parse().unwrap());
        assert_eq!((six[13], six.len()), (TCP6, 16 + 36));
        assert_eq!(six[16..20], [0x26, 6, 0x47, 0]);
        // What came in the other family's clothes is the visitor all the same.
        let mapped = build(
            &visit("[::ffff:198.51.100.7]:4660"),
            "127.0.0.1".parse().unwrap(),
        );
        assert_eq!(mapped, four);
    }
}
