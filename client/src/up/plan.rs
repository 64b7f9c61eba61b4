//! What the user asked for, against what the gateway offers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rvpn_proto::control::{OFFLOAD, Policy, Prefix, Welcome};

use super::rules::Plan;
use crate::cli::Up;
use crate::fail::{Failure, Kind, Outcome};

/// Networks that no stranger has, which a machine may be attached to.
const PRIVATE: [(IpAddr, u8); 4] = [
    (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    (IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    (IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0)), 8),
];

/// What the tunnel has been told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Option<Ipv6Addr>,
    pub(crate) mtu: u32,
    pub(crate) offload: bool,
}

impl Terms {
    /// What matters of a welcome.
    pub(crate) fn of(welcome: &Welcome) -> Terms {
        Terms {
            v4: welcome.v4.address,
            v6: welcome.v6.map(|pair| pair.address),
            mtu: welcome.mtu,
            offload: welcome.capabilities.iter().any(|c| c == OFFLOAD),
        }
    }
}

/// Everything through the tunnel, unless a part was asked for.
pub(crate) fn is_full(args: &Up) -> bool {
    !args.split && args.route.is_empty()
}

/// Whether a device may be called so.
pub(crate) fn check_name(name: &str) -> Outcome {
    let fits = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if name.is_empty() || name.len() > 15 || !fits || name == "." || name == ".." || name == "lo" {
        return Err(Failure::usage(format!(
            "'{name}' cannot name an interface: up to 15 letters, digits, '-', '_' or '.'"
        )));
    }
    Ok(())
}

/// Before the gateway has said anything.
pub(crate) fn plan(args: &Up, local: &[Prefix]) -> Plan {
    let mut past = args.bypass.clone();
    if args.allow_lan {
        // A network with public addresses next door is how traffic is stolen (CLI-02).
        past.extend(local.iter().copied().filter(|p| is_private(*p)));
    }
    Plan {
        only: (!is_full(args)).then(|| args.route.clone()),
        past,
        kill_switch: args.kill_switch,
        interface: args.interface.clone(),
    }
}

fn is_private(prefix: Prefix) -> bool {
    PRIVATE.iter().any(|(address, length)| {
        Prefix::new(*address, *length).is_ok_and(|private| private.contains(prefix))
    })
}

/// Takes what may be taken of a welcome: its routes in split mode.
pub(crate) fn judge(args: &Up, plan: &mut Plan, welcome: &Welcome, local: &[Prefix]) -> Outcome {
    let mut judged = welcome.clone();
    // Offered to everybody; here it was not asked for.
    judged.routes.retain(|p| p.length() > 0);
    let policy = Policy {
        routes: args.split,
        default_route: false,
        over_local: false,
        local,
    };
    if let Err(refusal) = judged.validate(&policy) {
        let text = format!("the gateway asks for what it may not: {refusal}");
        return Err(Failure::new(Kind::Protocol, text));
    }
    if let Some(open) = resolvers(args, welcome)
        .into_iter()
        .find(|r| args.dns.is_empty() && plan.past.iter().any(|p| p.has(*r)))
    {
        let text = format!(
            "the gateway asks for what it may not: it pushes the resolver {open}, which goes \
             past the tunnel here; choose another with --dns"
        );
        return Err(Failure::new(Kind::Protocol, text));
    }
    if args.split {
        let mut only = args.route.clone();
        only.extend(judged.routes);
        only.dedup();
        if only.is_empty() {
            return Err(Failure::usage(
                "--split takes the routes that the gateway suggests, and it suggests none: \
                 name some with --route PREFIX",
            ));
        }
        plan.only = Some(only);
    }
    Ok(())
}

/// The resolvers to use while the tunnel is up.
pub(crate) fn resolvers(args: &Up, welcome: &Welcome) -> Vec<IpAddr> {
    if args.no_dns {
        return Vec::new();
    }
    if !args.dns.is_empty() {
        return args.dns.clone();
    }
    match is_full(args) {
        true => welcome.dns.clone(),
        // Names of everything else would go to resolvers of a part.
        false => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_networks_next_door_are_let_past() {
        let prefix = |t: &str| t.parse::<Prefix>().unwrap_or_else(|e| panic!("{t}: {e}"));
        for private in [
            "10.1.0.0/16",
            "192.168.1.0/24",
            "172.16.0.0/12",
            "fd12::/64",
        ] {
            assert!(is_private(prefix(private)), "{private}");
        }
        for public in [
            "1.1.1.0/24",
            "172.0.0.0/8",
            "0.0.0.0/0",
            "2606:4700::/32",
            "fc00::/7",
        ] {
            assert!(!is_private(prefix(public)), "{public}");
        }
    }
}
