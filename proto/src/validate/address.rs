//! Addresses that no packet of a tunnel is from or for, whatever the policy.
//!
//! Private and other special networks are not here: whether they may be reached
//! is the operator's to say, in the kernel's rules.

/// Whether a single host elsewhere can have this address.
pub(super) fn is_host_v4(address: [u8; 4]) -> bool {
    match address {
        // This network, this host, link-local, multicast, reserved, broadcast.
        [0 | 127 | 224.., ..] | [169, 254, ..] => false,
        _ => true,
    }
}

/// Whether a single host elsewhere can have this address.
pub(super) fn is_host_v6(address: [u8; 16]) -> bool {
    match address {
        [0xff, ..] => false,
        // Link-local, and site-local as it was.
        [0xfe, second, ..] if second >= 0x80 => false,
        // Unspecified, loopback, and IPv4 addresses written as IPv6 ones: as
        // they are (::/96), mapped (::ffff:0:0/96) and translated (::ffff:0:0:0/96).
        [0, 0, 0, 0, 0, 0, 0, 0, middle @ .., _, _, _, _] => !matches!(
            middle,
            [0, 0, 0, 0] | [0, 0, 0xff, 0xff] | [0xff, 0xff, 0, 0]
        ),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn spf_10_addresses_of_no_host() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            let address: Ipv4Addr = address.parse().unwrap();
            assert!(!is_host_v4(address.octets()), "{address}");
        }
        for address in ["1.1.1.1", "10.0.0.1", "169.253.0.1", "223.255.255.254"] {
            let address: Ipv4Addr = address.parse().unwrap();
            assert!(is_host_v4(address.octets()), "{address}");
        }
        for address in [
            "::",
            "::1",
            "::10.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:0:10.0.0.1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
        ] {
            let address: Ipv6Addr = address.parse().unwrap();
            assert!(!is_host_v6(address.octets()), "{address}");
        }
        for address in ["2606:4700:4700::1111", "fd00::2", "64:ff9b::1", "::1:0:0:1"] {
            let address: Ipv6Addr = address.parse().unwrap();
            assert!(is_host_v6(address.octets()), "{address}");
        }
    }
}
