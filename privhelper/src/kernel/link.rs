//! Links, addresses and routes, many to a message batch.

use std::io;

use rvpn_ipc::Slot;

use super::Kernel;
use super::netlink::{attr_of, attributes, message, text_of, u16_at, u32_at, unless};
use crate::net::Net;
use crate::plan::{self, Tag};

/// Marks our routes, so that teardown finds them and nobody else's.
const ROUTE_PROTOCOL: u8 = 0x52;
const LOOPBACK: u32 = 1;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: u8 = 1;
const DEVCONF_FORWARDING: u16 = 1;
const DEVCONF_SEND_REDIRECTS: u16 = 6;
const EXT_SKIP_STATS: u32 = 8;
const REPLACE: libc::c_int = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

/// A link as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) group: u32,
    pub(crate) alias: String,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    pub(crate) tun: Option<TunState>,
}

/// Of a TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TunState {
    pub(crate) owner: Option<u32>,
    /// It persists, with a single queue and a virtio header.
    pub(crate) sound: bool,
}

/// A device of ours in the making: slot, index, tag.
pub(crate) type Made = (Slot, u32, Tag);

/// A message about one link, or with index zero about those the attributes say.
fn about(kind: u16, index: u32, up: Option<bool>, attrs: &[u8]) -> Vec<u8> {
    // Family and type, index, flags, which of them change: IFF_UP is the first.
    let fields = [0, index, up.unwrap_or(false).into(), up.is_some().into()];
    message(kind, 0, &fields.map(u32::to_ne_bytes).concat(), attrs)
}

/// Marks bare TUN devices as ours and makes them silent; they are still down.
pub(crate) fn tag(k: &mut Kernel, made: &[Made]) -> io::Result<()> {
    let (yes, no, c) = (1_u32.to_ne_bytes(), 0_u32.to_ne_bytes(), &k.config);
    let conf = nest![DEVCONF_FORWARDING => yes, DEVCONF_SEND_REDIRECTS => no];
    let silent = nest![IFLA_INET6_ADDR_GEN_MODE => &[ADDR_GEN_NONE][..]];
    let families = nest![
        libc::AF_INET as u16 => nest![IFLA_INET_CONF => conf],
        libc::AF_INET6 as u16 => silent
    ];
    let common = attrs![
        libc::IFLA_GROUP => c.link_group.to_ne_bytes(),
        libc::IFLA_MTU => u32::from(c.mtu).to_ne_bytes(),
        libc::IFLA_TXQLEN => c.txqueuelen.to_ne_bytes(),
        libc::IFLA_AF_SPEC => families
    ];
    let each = |(_, index, tag): &Made| {
        let alias = attrs![libc::IFLA_IFALIAS => tag.to_alias().as_str()];
        let all = [&common[..], &alias].concat();
        about(libc::RTM_NEWLINK, *index, None, &all)
    };
    k.route.run(made.iter().flat_map(each).collect())
}

/// Brings tagged devices up, with their IPv4 host address. Bare routes instead were
/// set no faster (0.9 and 1.1 times at 1,000 and 5,000 devices); they went away in a third of
/// the time at 5,000, which [`unroute`] more than makes up for.
pub(crate) fn bring_up(k: &mut Kernel, made: &[Made]) -> io::Result<()> {
    let each = |&(slot, index, _): &Made| {
        let up = about(libc::RTM_NEWLINK, index, Some(true), &[]);
        let [host4, _] = plan::hosts(&k.config, slot);
        [up, address(libc::RTM_NEWADDR, index, host4)].concat()
    };
    k.route.run(made.iter().flat_map(each).collect())
}

/// Gives leased devices their IPv6 host addresses. Whenever a descriptor is attached
/// or closed, the kernel walks every IPv6 route under its one lock for links: slots
/// nobody has must not make that longer. With 5,000 of them it takes a
/// twentieth of the time.
pub(crate) fn add_hosts6(k: &mut Kernel, devices: &[(Slot, u32)]) -> io::Result<()> {
    let each = |&(slot, index): &(Slot, u32)| {
        let [_, host6] = plan::hosts(&k.config, slot);
        address(libc::RTM_NEWADDR, index, host6)
    };
    k.route.run(devices.iter().flat_map(each).collect())
}

/// Takes every route off the devices by its key. Each device that goes away has
/// the kernel walk all IPv6 routes there are and all IPv4 routes of dead devices:
/// with them gone first, deleting 10,000 devices takes a tenth of the time.
pub(crate) fn unroute(k: &mut Kernel, devices: &[(Slot, u32)]) {
    let each = |&(slot, index): &(Slot, u32)| {
        let [host4, host6] = plan::hosts(&k.config, slot);
        let gone = address(libc::RTM_DELADDR, index, host4);
        [routes6_gone(index, host6), gone].concat()
    };
    // What is missing already is no fault: deleting the devices decides.
    let _ = k.route.run(devices.iter().flat_map(each).collect());
}

/// Takes a device's IPv6 host address away, and every route that came with it.
pub(crate) fn drop_host6(k: &mut Kernel, slot: Slot, index: u32) {
    let [_, host6] = plan::hosts(&k.config, slot);
    let gone = address(libc::RTM_DELADDR, index, host6);
    let _ = k.route.run([routes6_gone(index, host6), gone].concat());
}

fn routes6_gone(index: u32, host: Net) -> Vec<u8> {
    let multicast = std::net::Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0);
    let (main, local) = (libc::RT_TABLE_MAIN, libc::RT_TABLE_LOCAL);
    let (own, multicast) = (host.at(0, 128), Net::new(multicast, 8));
    let nets = [(main, host), (local, own), (local, multicast)];
    let gone = |(table, net)| {
        let how = [table, 0, libc::RT_SCOPE_NOWHERE, 0];
        route(libc::RTM_DELROUTE, 0, net, how, index)
    };
    nets.map(gone).concat()
}

/// `how`: table, protocol, scope, type.
fn route(kind: u16, flags: libc::c_int, net: Net, how: [u8; 4], index: u32) -> Vec<u8> {
    let fixed = [&[family(net), net.len, 0, 0], &how[..], &[0; 4]].concat();
    let attrs = attrs![libc::RTA_DST => &net.octets()[..], libc::RTA_OIF => index.to_ne_bytes()];
    message(kind, flags, &fixed, &attrs)
}

fn address(kind: u16, index: u32, host: Net) -> Vec<u8> {
    let new = kind == libc::RTM_NEWADDR;
    let flags = if new { REPLACE } else { 0 };
    let start = [family(host), host.len, libc::IFA_F_NODAD as u8, 0];
    let addr = &host.octets()[..];
    let attrs = attrs![libc::IFA_LOCAL => addr, libc::IFA_ADDRESS => addr];
    message(kind, flags, &[start, index.to_ne_bytes()].concat(), &attrs)
}

fn family(net: Net) -> u8 {
    let v4 = net.addr.is_ipv4();
    (if v4 { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

pub(crate) fn set_alias(k: &mut Kernel, index: u32, tag: Tag) -> io::Result<()> {
    let alias = attrs![libc::IFLA_IFALIAS => tag.to_alias().as_str()];
    k.route.run(about(libc::RTM_NEWLINK, index, None, &alias))
}

/// Brings every device of our group up or down at once.
pub(crate) fn set_group_up(k: &mut Kernel, up: bool) -> io::Result<()> {
    let group = attrs![libc::IFLA_GROUP => k.config.link_group.to_ne_bytes()];
    let change = about(libc::RTM_NEWLINK, 0, Some(up), &group);
    unless(libc::ENODEV, k.route.run(change))
}

pub(crate) fn delete(k: &mut Kernel, index: u32) -> io::Result<()> {
    let gone = about(libc::RTM_DELLINK, index, None, &[]);
    unless(libc::ENODEV, k.route.run(gone))
}

/// Deletes every device of our group in one go: milliseconds each otherwise.
pub(crate) fn delete_group(k: &mut Kernel) -> io::Result<()> {
    let group = attrs![libc::IFLA_GROUP => k.config.link_group.to_ne_bytes()];
    let gone = about(libc::RTM_DELLINK, 0, None, &group);
    unless(libc::ENODEV, k.route.run(gone))
}

pub(crate) fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        up: u32_at(body, 8)? & libc::IFF_UP.cast_unsigned() != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text_of(value),
            libc::IFLA_IFALIAS => link.alias = text_of(value),
            libc::IFLA_GROUP => link.group = u32_at(value, 0)?,
            libc::IFLA_MTU => link.mtu = u32_at(value, 0)?,
            libc::IFLA_LINKINFO => link.tun = parse_tun(value),
            _ => {}
        }
    }
    Some(link)
}

fn parse_tun(info: &[u8]) -> Option<TunState> {
    let (kind, data) = (attr_of(info, 1)?, attr_of(info, 2)?);
    let owner = attr_of(data, 1).and_then(|v| u32_at(v, 0));
    // IFLA_TUN_*: type TUN, no packet information, a virtio header, persistent, one queue.
    let made = [(3, 1), (4, 0), (5, 1), (6, 1), (7, 0)];
    let as_made = |&(kind, v): &(u16, u8)| attr_of(data, kind) == Some(&[v]);
    let sound = made.iter().all(as_made);
    (text_of(kind) == "tun").then_some(TunState { owner, sound })
}

/// Without the counters, of which there are many.
fn brief() -> Vec<u8> {
    attrs![libc::IFLA_EXT_MASK => EXT_SKIP_STATS.to_ne_bytes()]
}

/// The index that bears this name at the moment.
pub(crate) fn index_of(k: &mut Kernel, name: &str) -> io::Result<Option<u32>> {
    let what = [attrs![libc::IFLA_IFNAME => name], brief()].concat();
    match k.route.ask(about(libc::RTM_GETLINK, 0, None, &what)) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        answer => Ok(parse_link(&answer?).map(|l| l.index)),
    }
}

/// The link of this index.
pub(crate) fn get(k: &mut Kernel, index: u32) -> io::Result<Link> {
    let question = about(libc::RTM_GETLINK, index, None, &brief());
    let answer = k.route.ask(question)?;
    parse_link(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// All links.
pub(crate) fn dump(k: &mut Kernel) -> io::Result<Vec<Link>> {
    let read = |body: &[u8], found: &mut Vec<Link>| found.extend(parse_link(body));
    k.route.dump(libc::RTM_GETLINK, &[0; 16], &brief(), read)
}

/// An address or route destination found on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// A default route's has length zero.
    pub(crate) net: Net,
    /// The interface it is on, zero when none.
    pub(crate) index: u32,
    pub(crate) ours: bool,
}

fn net_of(family: u8, len: u8, bytes: Option<&[u8]>) -> Option<Net> {
    let bytes = bytes.unwrap_or(&[0; 16]);
    Some(match i32::from(family) {
        libc::AF_INET => Net::new(*bytes.first_chunk::<4>()?, len),
        libc::AF_INET6 => Net::new(*bytes.first_chunk::<16>()?, len),
        _ => return None,
    })
}

/// Every unicast route of the main table and every local one.
pub(crate) fn routes(k: &mut Kernel) -> io::Result<Vec<Found>> {
    let read = |body: &[u8], all: &mut Vec<_>| all.extend(parse_route(body).unwrap_or_default());
    k.route.dump(libc::RTM_GETROUTE, &[0; 12], &[], read)
}

fn parse_route(body: &[u8]) -> Option<Vec<Found>> {
    let (&head, rest) = body.split_first_chunk::<12>()?;
    let [family, len, _, _, table, protocol, _, kind, ..] = head;
    let tables = [libc::RT_TABLE_MAIN, libc::RT_TABLE_LOCAL];
    if !tables.contains(&table) || ![libc::RTN_UNICAST, libc::RTN_LOCAL].contains(&kind) {
        return None;
    }
    let net = net_of(family, len, attr_of(rest, libc::RTA_DST))?;
    let one = attr_of(rest, libc::RTA_OIF).and_then(|v| u32_at(v, 0));
    let mut indexes: Vec<u32> = one.into_iter().collect();
    // A multipath route names its interfaces in its next hops.
    let mut hops = attr_of(rest, libc::RTA_MULTIPATH).unwrap_or_default();
    while let (Some(len), Some(index)) = (u16_at(hops, 0), u32_at(hops, 4)) {
        indexes.push(index);
        let next = usize::from(len.max(8)).next_multiple_of(4);
        hops = hops.get(next..).unwrap_or_default();
    }
    if indexes.is_empty() {
        indexes.push(0);
    }
    let ours = protocol == ROUTE_PROTOCOL;
    let found = |index| Found { net, index, ours };
    Some(indexes.into_iter().map(found).collect())
}

/// Every address with its prefix length, or those of the interface with this index.
pub(crate) fn addresses(k: &mut Kernel, of: Option<u32>) -> io::Result<Vec<Found>> {
    let fixed = [0, of.unwrap_or(0)].map(u32::to_ne_bytes).concat();
    let read = |body: &[u8], all: &mut Vec<Found>| all.extend(parse_address(body));
    let mut found = k.route.dump(libc::RTM_GETADDR, &fixed, &[], read)?;
    found.retain(|f| of.is_none_or(|of| of == f.index));
    Ok(found)
}

fn parse_address(body: &[u8]) -> Option<Found> {
    let (index, rest, ours) = (u32_at(body, 4)?, body.get(8..)?, false);
    let addr = attr_of(rest, libc::IFA_LOCAL).or(attr_of(rest, libc::IFA_ADDRESS))?;
    let net = net_of(body[0], body[1], Some(addr))?;
    Some(Found { net, index, ours })
}

/// Makes the stream ranges local without an address of each, so that streams
/// can be bound to them; or undoes it.
pub(crate) fn any_ip(k: &mut Kernel, add: bool) -> io::Result<()> {
    let (kind, flags, scope, missing) = match add {
        true => (libc::RTM_NEWROUTE, REPLACE, libc::RT_SCOPE_HOST, 0),
        false => (libc::RTM_DELROUTE, 0, libc::RT_SCOPE_NOWHERE, libc::ESRCH),
    };
    let how = [libc::RT_TABLE_LOCAL, ROUTE_PROTOCOL, scope, libc::RTN_LOCAL];
    for net in [k.config.stream4, k.config.stream6] {
        let change = route(kind, flags, net, how, LOOPBACK);
        unless(missing, k.route.run(change))?;
    }
    Ok(())
}
