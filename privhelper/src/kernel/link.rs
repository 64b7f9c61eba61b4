//! Links, addresses and routes, many to a message batch.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::Kernel;
use super::netlink::{attr_of, attributes, message, text_of, u16_at, u32_at, unless};
use crate::plan::{Device, octets};

/// Marks our routes, so that teardown finds them and nobody else's.
const ROUTE_PROTOCOL: u8 = 0x52;
const LOOPBACK: u32 = 1;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: &[u8] = &[1];
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
    /// It is a TUN device.
    pub(crate) tun: bool,
    /// Of a TUN device.
    pub(crate) owner: Option<u32>,
    /// A TUN device that persists, with a single queue and a virtio header.
    pub(crate) whole: bool,
}

/// An address or route destination found on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// A default route's has length zero.
    pub(crate) net: IpNet,
    /// The interface it is on, zero when none.
    pub(crate) index: u32,
    pub(crate) ours: bool,
}

/// A message about one link, or with index zero about those the attributes say.
fn about(kind: u16, index: u32, up: Option<bool>, attrs: &[u8]) -> Vec<u8> {
    // Family and type, index, flags, which of them change: IFF_UP is the first.
    let fields = [0, index, up.unwrap_or(false).into(), up.is_some().into()];
    message(kind, 0, &fields.map(u32::to_ne_bytes).concat(), attrs)
}

fn alias(d: &Device) -> Vec<u8> {
    attrs![libc::IFLA_IFALIAS => d.alias().as_str()]
}

/// Marks bare TUN devices as ours and makes them silent; they are still down.
pub(crate) fn tag(k: &mut Kernel, devices: &[Device]) -> io::Result<()> {
    let (yes, no, c) = (1_u32.to_ne_bytes(), 0_u32.to_ne_bytes(), &k.config);
    let conf = attrs![DEVCONF_FORWARDING => yes, DEVCONF_SEND_REDIRECTS => no];
    let families = attrs![
        libc::AF_INET as u16 => attrs![IFLA_INET_CONF => conf],
        libc::AF_INET6 as u16 => attrs![IFLA_INET6_ADDR_GEN_MODE => ADDR_GEN_NONE]
    ];
    let common = attrs![
        libc::IFLA_GROUP => c.link_group.to_ne_bytes(),
        libc::IFLA_MTU => u32::from(c.mtu).to_ne_bytes(),
        libc::IFLA_TXQLEN => c.txqueuelen.to_ne_bytes(),
        libc::IFLA_AF_SPEC => families
    ];
    let each = |d: &Device| {
        let all = [&common[..], &alias(d)].concat();
        about(libc::RTM_NEWLINK, d.index, None, &all)
    };
    k.route.run(devices.iter().flat_map(each).collect())
}

/// Brings tagged devices up, with their IPv4 host address. Bare routes instead were
/// set no faster (0.9 and 1.1 times at 1,000 and 5,000 devices); they went away in a third of
/// the time at 5,000, which [`unroute`] more than makes up for.
pub(crate) fn bring_up(k: &mut Kernel, devices: &[Device]) -> io::Result<()> {
    let each = |d: &Device| {
        let up = about(libc::RTM_NEWLINK, d.index, Some(true), &[]);
        let [host4, _] = d.hosts(&k.config);
        [up, address(libc::RTM_NEWADDR, d.index, host4)].concat()
    };
    k.route.run(devices.iter().flat_map(each).collect())
}

/// Gives leased devices their IPv6 host addresses. Whenever a descriptor is attached
/// or closed, the kernel walks every IPv6 route under its one lock for links: slots
/// nobody has must not make that longer. With 5,000 of them it takes a
/// twentieth of the time.
pub(crate) fn add_hosts6(k: &mut Kernel, devices: &[Device]) -> io::Result<()> {
    let each = |d: &Device| address(libc::RTM_NEWADDR, d.index, d.hosts(&k.config)[1]);
    k.route.run(devices.iter().flat_map(each).collect())
}

/// Takes the IPv6 host address off devices with every route that came with it, by
/// its key; with `all` the IPv4 one too. Each device that goes away has
/// the kernel walk all IPv6 routes there are and all IPv4 routes of dead devices:
/// with them gone first, deleting 10,000 devices takes a tenth of the time.
pub(crate) fn unroute(k: &mut Kernel, devices: &[Device], all: bool) {
    let multicast = Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0);
    let each = |d: &Device| {
        let [host4, host6] = d.hosts(&k.config);
        let (main, local) = (libc::RT_TABLE_MAIN, libc::RT_TABLE_LOCAL);
        let gone = |(table, net)| {
            let how = [table, 0, libc::RT_SCOPE_NOWHERE, 0];
            route(libc::RTM_DELROUTE, 0, net, how, d.index)
        };
        let routes = [
            (main, host6),
            (local, host6.addr().into()),
            (local, IpNet::new_assert(multicast.into(), 8)),
        ];
        let hosts = if all { &[host6, host4][..] } else { &[host6] };
        let hosts = hosts
            .iter()
            .map(|h| address(libc::RTM_DELADDR, d.index, *h));
        [routes.map(gone).concat(), hosts.flatten().collect()].concat()
    };
    // What is missing already is no fault: deleting the devices decides.
    let _ = k.route.run(devices.iter().flat_map(each).collect());
}

fn family(net: IpNet) -> u8 {
    let v4 = matches!(net, IpNet::V4(_));
    (if v4 { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// `how`: table, protocol, scope, type.
fn route(kind: u16, flags: libc::c_int, net: IpNet, how: [u8; 4], index: u32) -> Vec<u8> {
    let fixed = [&[family(net), net.prefix_len(), 0, 0], &how[..], &[0; 4]].concat();
    let destination = &octets(net.addr())[..];
    let attrs = attrs![libc::RTA_DST => destination, libc::RTA_OIF => index.to_ne_bytes()];
    message(kind, flags, &fixed, &attrs)
}

fn address(kind: u16, index: u32, host: IpNet) -> Vec<u8> {
    let new = kind == libc::RTM_NEWADDR;
    let flags = if new { REPLACE } else { 0 };
    let start = [family(host), host.prefix_len(), libc::IFA_F_NODAD as u8, 0];
    let addr = &octets(host.addr())[..];
    let attrs = attrs![libc::IFA_LOCAL => addr, libc::IFA_ADDRESS => addr];
    message(kind, flags, &[start, index.to_ne_bytes()].concat(), &attrs)
}

pub(crate) fn set_alias(k: &mut Kernel, d: &Device) -> io::Result<()> {
    k.route
        .run(about(libc::RTM_NEWLINK, d.index, None, &alias(d)))
}

/// Deletes one device.
pub(crate) fn delete(k: &mut Kernel, index: u32) -> io::Result<()> {
    let gone = about(libc::RTM_DELLINK, index, None, &[]);
    unless(libc::ENODEV, k.route.run(gone))
}

/// Brings every device of our group up or down at once, or deletes them all:
/// milliseconds each otherwise.
pub(crate) fn set_group(k: &mut Kernel, up: Option<bool>) -> io::Result<()> {
    let group = attrs![libc::IFLA_GROUP => k.config.link_group.to_ne_bytes()];
    let kind = up.map_or(libc::RTM_DELLINK, |_| libc::RTM_NEWLINK);
    unless(libc::ENODEV, k.route.run(about(kind, 0, up, &group)))
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
            libc::IFLA_LINKINFO => {
                let data = attr_of(value, 2).unwrap_or_default();
                link.tun = attr_of(value, 1).is_some_and(|kind| text_of(kind) == "tun");
                link.owner = attr_of(data, 1).and_then(|v| u32_at(v, 0));
                // IFLA_TUN_*: type TUN, no packet information, a virtio header, persistent, one queue.
                let mut made = [(3, 1), (4, 0), (5, 1), (6, 1), (7, 0)].iter();
                link.whole = made.all(|&(kind, v)| attr_of(data, kind) == Some(&[v]));
            }
            _ => {}
        }
    }
    Some(link)
}

/// Without the counters, of which there are many.
fn brief() -> Vec<u8> {
    attrs![libc::IFLA_EXT_MASK => EXT_SKIP_STATS.to_ne_bytes()]
}

/// The link of this name, if there is one.
pub(crate) fn named(k: &mut Kernel, name: &str) -> io::Result<Option<Link>> {
    let what = [attrs![libc::IFLA_IFNAME => name], brief()].concat();
    let question = about(libc::RTM_GETLINK, 0, None, &what);
    found(k, question).map(|mut links| links.pop())
}

/// The link of this index, if there is one, or all links.
pub(crate) fn get(k: &mut Kernel, of: Option<u32>) -> io::Result<Vec<Link>> {
    let question = match of {
        Some(index) => about(libc::RTM_GETLINK, index, None, &brief()),
        None => message(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; 16], &brief()),
    };
    found(k, question)
}

fn found(k: &mut Kernel, question: Vec<u8>) -> io::Result<Vec<Link>> {
    match k.route.ask(question, parse_link) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
        answer => answer,
    }
}

fn net_of(family: u8, len: u8, bytes: Option<&[u8]>) -> Option<IpNet> {
    let bytes = bytes.unwrap_or(&[0; 16]);
    let addr: IpAddr = match i32::from(family) {
        libc::AF_INET => Ipv4Addr::from(*bytes.first_chunk::<4>()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(*bytes.first_chunk::<16>()?).into(),
        _ => return None,
    };
    IpNet::new(addr, len).ok()
}

/// Every unicast route of the main table and every local one.
pub(crate) fn routes(k: &mut Kernel) -> io::Result<Vec<Found>> {
    let question = message(libc::RTM_GETROUTE, libc::NLM_F_DUMP, &[0; 12], &[]);
    let read = |body: &[u8]| parse_route(body).unwrap_or_default();
    k.route.ask(question, read)
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
    let question = message(libc::RTM_GETADDR, libc::NLM_F_DUMP, &fixed, &[]);
    let mut found = k.route.ask(question, parse_address)?;
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
    let [.., stream4, stream6] = k.config.own_nets();
    for net in [stream4, stream6] {
        let change = route(kind, flags, net, how, LOOPBACK);
        unless(missing, k.route.run(change))?;
    }
    Ok(())
}
