//! The rules that lead into the tunnel, or past it.

use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RuleUidRange};
use rvpn_proto::control::Prefix;

use crate::fail::{Failure, Outcome};

/// Of the sockets to the gateway.
pub(crate) const MARK: u32 = 0x7276;
/// Where everything else is sent.
pub(super) const TABLE: u32 = 0x7276;
/// Where the tunnel's addresses are local.
pub(super) const LOCAL: u32 = 0x7277;
pub(super) const MAIN: u32 = 254;
/// Whose rules and routes these are.
pub(super) const OURS: RouteProtocol = RouteProtocol::Other(0x72);
/// Where our rules may begin; the main table's has 32766. There are two places,
/// so that new rules can be there before old ones go.
const PLACES: [u32; 2] = [5200, 5300];
/// How many fit between the two.
const MOST: usize = 100;

/// What goes where.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Only these destinations through the tunnel; all if absent.
    pub(crate) only: Option<Vec<Prefix>>,
    /// These past the tunnel.
    pub(crate) past: Vec<Prefix>,
    /// What would go through the tunnel goes nowhere without it.
    pub(crate) kill_switch: bool,
    /// Name of the device.
    pub(crate) interface: String,
}

impl Plan {
    /// What goes through the tunnel.
    pub(super) fn wanted(&self, family: AddressFamily) -> Vec<Prefix> {
        let mut wanted = self.only.clone().unwrap_or_else(|| vec![whole(family)]);
        wanted.retain(|prefix| family_of(*prefix) == family);
        wanted
    }
}

/// In the order in which they are asked, from this place on.
pub(super) fn rules(family: AddressFamily, plan: &Plan, place: u32) -> Outcome<Vec<RuleMessage>> {
    let rule = |attributes: Vec<RuleAttribute>, table: Option<u32>| {
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        rule.header.action = match table {
            Some(_) => RuleAction::ToTable,
            None => RuleAction::Unreachable,
        };
        rule.attributes = attributes;
        let table = table.map(RuleAttribute::Table);
        rule.attributes.extend(table);
        rule.attributes.push(RuleAttribute::Protocol(OURS));
        rule
    };
    let to = |prefix: Prefix, table: Option<u32>| {
        let attributes = match prefix.length() {
            0 => Vec::new(),
            _ => vec![RuleAttribute::Destination(prefix.address())],
        };
        let mut rule = rule(attributes, table);
        rule.header.dst_len = prefix.length();
        rule
    };
    let marked = || vec![RuleAttribute::FwMark(MARK), RuleAttribute::FwMask(u32::MAX)];
    let from = |name: &str| vec![RuleAttribute::Iifname(name.to_owned())];
    let mut all = vec![
        rule(marked(), Some(MAIN)),
        // Never into the tunnel, whatever the main table lacks.
        rule(marked(), None),
        rule(from(&plan.interface), Some(LOCAL)),
        rule(from("lo"), Some(LOCAL)),
    ];
    let link_local = Prefix::new(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10);
    let past = plan.past.iter().copied().chain(link_local);
    let past = past.filter(|p| family_of(*p) == family);
    all.extend(past.map(|prefix| to(prefix, Some(MAIN))));
    all.push(rule(Vec::new(), Some(TABLE)));
    if plan.kill_switch {
        // A program that insists on a device or on a neighbour finds no way in
        // our table. The kernel asks in root's name whether the gateway of a new
        // route is next door, so root may see what is next door, and no further.
        let mut next_door = rule(Vec::new(), Some(MAIN));
        next_door.attributes.extend([
            RuleAttribute::UidRange(RuleUidRange { start: 0, end: 0 }),
            RuleAttribute::SuppressPrefixLen(match family {
                AddressFamily::Inet => 15,
                _ => 47,
            }),
        ]);
        all.push(next_door);
        let wanted = plan.wanted(family).into_iter();
        all.extend(wanted.map(|prefix| to(prefix, None)));
    }
    if all.len() > MOST {
        return Err(Failure::usage(format!(
            "{} destinations to treat specially are too many: up to {} are possible",
            all.len(),
            MOST - 10
        )));
    }
    for (rule, priority) in all.iter_mut().zip(place..) {
        rule.attributes.push(RuleAttribute::Priority(priority));
    }
    Ok(all)
}

/// Where new rules go while these are there.
pub(super) fn place_beside(old: &[RuleMessage]) -> u32 {
    let taken = |place: u32| old.iter().any(|rule| is_at(rule, place));
    let free = PLACES.into_iter().find(|place| !taken(*place));
    free.unwrap_or(PLACES[0])
}

fn is_at(rule: &RuleMessage, place: u32) -> bool {
    let (first, end) = (place, place + MOST as u32);
    rule.attributes.iter().any(|a| match a {
        RuleAttribute::Priority(priority) => (first..end).contains(priority),
        _ => false,
    })
}

fn whole(family: AddressFamily) -> Prefix {
    match family {
        AddressFamily::Inet => Prefix::ALL_V4,
        _ => Prefix::ALL_V6,
    }
}

fn family_of(prefix: Prefix) -> AddressFamily {
    match prefix.address() {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
