//! Links, addresses and routes, many to a message batch.

use std::io;
use std::net::Ipv6Addr;

use crate::config::{Net, Net4, Net6};

use super::netlink::{Buf, Message, Socket, attr_of, attrs, text_of, u16_at, u32_at};

const RTM_NEWLINK: u16 = libc::RTM_NEWLINK;
const ACK: libc::c_int = libc::NLM_F_ACK;
/// Marks our routes, so that teardown finds them and nobody else's.
const ROUTE_PROTOCOL: u8 = 0x52;
const LOOPBACK: u32 = 1;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: u8 = 1;
const DEVCONF_FORWARDING: u16 = 1;
const DEVCONF_SEND_REDIRECTS: u16 = 6;
const EXT_SKIP_STATS: u32 = 8;

/// A link as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) group: u32,
    pub(crate) alias: String,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    /// For a TUN device: its owner, and whether it persists with a single queue and a virtio header.
    pub(crate) tun: Option<TunState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TunState {
    pub(crate) owner: Option<u32>,
    pub(crate) sound: bool,
}

/// What a device of ours is to become.
pub(crate) struct Spec {
    pub(crate) index: u32,
    pub(crate) group: u32,
    pub(crate) alias: String,
    pub(crate) mtu: u16,
    pub(crate) txqueuelen: u32,
    pub(crate) host4: Net4,
}

fn ifinfo(index: u32, flags: libc::c_int, change: libc::c_int) -> [u8; 16] {
    let mut b = [0; 16];
    b[4..8].copy_from_slice(&index.to_ne_bytes());
    b[8..12].copy_from_slice(&flags.to_ne_bytes());
    b[12..16].copy_from_slice(&change.to_ne_bytes());
    b
}

/// Marks bare TUN devices as ours and makes them silent; they are still down.
pub(crate) fn tag(socket: &mut Socket, specs: &[Spec]) -> io::Result<()> {
    each(socket, specs, |b, s, ack| {
        b.message(RTM_NEWLINK, ack, &ifinfo(s.index, 0, 0), |b| {
            b.ne32(libc::IFLA_GROUP, s.group)
                .text(libc::IFLA_IFALIAS, &s.alias)
                .ne32(libc::IFLA_MTU, s.mtu.into())
                .ne32(libc::IFLA_TXQLEN, s.txqueuelen)
                .nest(libc::IFLA_AF_SPEC, |b| {
                    b.nest(libc::AF_INET as u16, |b| {
                        b.nest(IFLA_INET_CONF, |b| {
                            b.ne32(DEVCONF_FORWARDING, 1)
                                .ne32(DEVCONF_SEND_REDIRECTS, 0);
                        });
                    })
                    .nest(libc::AF_INET6 as u16, |b| {
                        b.attr(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_NONE]);
                    });
                });
        });
    })
}

/// Brings tagged devices up, with their IPv4 host address. Bare routes instead were
/// set no faster (0.9 and 1.1 times at 1,000 and 5,000 devices); they went away in a third of
/// the time at 5,000, which [`unroute`] more than makes up for.
pub(crate) fn bring_up(socket: &mut Socket, specs: &[Spec]) -> io::Result<()> {
    each(socket, specs, |b, s, ack| {
        let up = ifinfo(s.index, libc::IFF_UP, libc::IFF_UP);
        b.message(RTM_NEWLINK, 0, &up, |_| {});
        add_address(b, s.index, Net::V4(s.host4), ack);
    })
}

/// Gives leased devices their IPv6 host addresses. Whenever a descriptor is attached
/// or closed, the kernel walks every IPv6 route under its one lock for links: slots
/// nobody has must not make that longer. With 5,000 of them it takes a
/// twentieth of the time.
pub(crate) fn add_hosts6(socket: &mut Socket, hosts: &[(u32, Net6)]) -> io::Result<()> {
    each(socket, hosts, |b, (index, host), ack| {
        add_address(b, *index, Net::V6(*host), ack);
    })
}

/// One batch for all, of which the last message alone asks for an answer.
fn each<T>(
    socket: &mut Socket,
    all: &[T],
    put: impl Fn(&mut Buf, &T, libc::c_int),
) -> io::Result<()> {
    let mut b = Buf::default();
    for (i, one) in all.iter().enumerate() {
        put(&mut b, one, if i + 1 == all.len() { ACK } else { 0 });
    }
    if all.is_empty() {
        Ok(())
    } else {
        socket.run(&mut b)
    }
}

/// Takes every route off the devices by its key. Each device that goes away has
/// the kernel walk all IPv6 routes there are and all IPv4 routes of dead devices:
/// with them gone first, deleting 10,000 devices takes a tenth of the time.
pub(crate) fn unroute(socket: &mut Socket, hosts: &[(u32, Net4, Net6)]) {
    // What is missing already is no fault: deleting the devices decides.
    let _ = each(socket, hosts, |b, &(index, host4, host6), ack| {
        drop_routes6(b, index, host6);
        address(b, libc::RTM_DELADDR, ack, index, Net::V4(host4));
    });
}

/// Takes a device's IPv6 host address away, and every route that came with it.
pub(crate) fn drop_host6(socket: &mut Socket, index: u32, host: Net6) {
    let _ = each(socket, &[host], |b, &host, ack| {
        drop_routes6(b, index, host);
        address(b, libc::RTM_DELADDR, ack, index, Net::V6(host));
    });
}

fn drop_routes6(b: &mut Buf, index: u32, host: Net6) {
    const MULTICAST: Net6 = Net6 {
        addr: Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0),
        len: 8,
    };
    let local = Net6 { len: 128, ..host };
    for (table, net) in [
        (libc::RT_TABLE_MAIN, host),
        (libc::RT_TABLE_LOCAL, local),
        (libc::RT_TABLE_LOCAL, MULTICAST),
    ] {
        let mut fixed = [0; 12];
        fixed[..5].copy_from_slice(&[libc::AF_INET6 as u8, net.len, 0, 0, table]);
        fixed[6] = libc::RT_SCOPE_NOWHERE;
        b.message(libc::RTM_DELROUTE, 0, &fixed, |b| {
            let first = u128::from(net.addr) >> (128 - net.len) << (128 - net.len);
            b.attr(libc::RTA_DST, &first.to_be_bytes())
                .ne32(libc::RTA_OIF, index);
        });
    }
}

fn add_address(b: &mut Buf, index: u32, host: Net, ack: libc::c_int) {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE | ack;
    address(b, libc::RTM_NEWADDR, flags, index, host);
}

fn address(b: &mut Buf, kind: u16, flags: libc::c_int, index: u32, host: Net) {
    let (family, len, addr) = parts(host);
    let mut fixed = [family, len, libc::IFA_F_NODAD as u8, 0, 0, 0, 0, 0];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    b.message(kind, flags, &fixed, |b| {
        b.attr(libc::IFA_LOCAL, &addr)
            .attr(libc::IFA_ADDRESS, &addr);
    });
}

fn parts(net: Net) -> (u8, u8, Vec<u8>) {
    match net {
        Net::V4(n) => (libc::AF_INET as u8, n.len, n.addr.octets().into()),
        Net::V6(n) => (libc::AF_INET6 as u8, n.len, n.addr.octets().into()),
    }
}

pub(crate) fn set_alias(socket: &mut Socket, index: u32, alias: &str) -> io::Result<()> {
    let mut b = Buf::default();
    b.message(RTM_NEWLINK, ACK, &ifinfo(index, 0, 0), |b| {
        b.text(libc::IFLA_IFALIAS, alias);
    });
    socket.run(&mut b)
}

/// Brings every device of the group up or down at once.
pub(crate) fn set_group_up(socket: &mut Socket, group: u32, up: bool) -> io::Result<()> {
    let flags = if up { libc::IFF_UP } else { 0 };
    let mut b = Buf::default();
    b.message(RTM_NEWLINK, ACK, &ifinfo(0, flags, libc::IFF_UP), |b| {
        b.ne32(libc::IFLA_GROUP, group);
    });
    none_is_fine(socket.run(&mut b))
}

pub(crate) fn delete(socket: &mut Socket, index: u32) -> io::Result<()> {
    let mut b = Buf::default();
    b.message(libc::RTM_DELLINK, ACK, &ifinfo(index, 0, 0), |_| {});
    none_is_fine(socket.run(&mut b))
}

/// Deletes every device of the group in one go: milliseconds each otherwise.
pub(crate) fn delete_group(socket: &mut Socket, group: u32) -> io::Result<()> {
    let mut b = Buf::default();
    b.message(libc::RTM_DELLINK, ACK, &ifinfo(0, 0, 0), |b| {
        b.ne32(libc::IFLA_GROUP, group);
    });
    none_is_fine(socket.run(&mut b))
}

fn none_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

pub(crate) fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        name: String::new(),
        group: 0,
        alias: String::new(),
        mtu: 0,
        up: u32_at(body, 8)? & libc::IFF_UP.cast_unsigned() != 0,
        tun: None,
    };
    for (kind, value) in attrs(body.get(16..)?) {
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
    if text_of(kind) != "tun" {
        return None;
    }
    // IFLA_TUN_*: type TUN, no packet information, a virtio header, persistent, one queue.
    let sound = [(3, 1), (4, 0), (5, 1), (6, 1), (7, 0)];
    Some(TunState {
        owner: attr_of(data, 1).and_then(|v| u32_at(v, 0)),
        sound: sound
            .iter()
            .all(|&(kind, v)| attr_of(data, kind) == Some(&[v])),
    })
}

/// The index that bears this name at the moment.
pub(crate) fn index_of(socket: &mut Socket, name: &str) -> io::Result<Option<u32>> {
    let mut b = Buf::default();
    b.message(libc::RTM_GETLINK, 0, &ifinfo(0, 0, 0), |b| {
        b.text(libc::IFLA_IFNAME, name)
            .ne32(libc::IFLA_EXT_MASK, EXT_SKIP_STATS);
    });
    match socket.ask(&mut b) {
        Ok(body) => Ok(parse_link(&body).map(|l| l.index)),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The link of this index.
pub(crate) fn get(socket: &mut Socket, index: u32) -> io::Result<Link> {
    let mut b = Buf::default();
    b.message(libc::RTM_GETLINK, 0, &ifinfo(index, 0, 0), |b| {
        b.ne32(libc::IFLA_EXT_MASK, EXT_SKIP_STATS);
    });
    parse_link(&socket.ask(&mut b)?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// All links.
pub(crate) fn dump(socket: &mut Socket) -> io::Result<Vec<Link>> {
    let links = std::cell::RefCell::new(Vec::new());
    socket.dump(
        libc::RTM_GETLINK,
        &ifinfo(0, 0, 0),
        |b| {
            b.ne32(libc::IFLA_EXT_MASK, EXT_SKIP_STATS);
        },
        |m| links.borrow_mut().extend(parse_link(m.body)),
        || links.borrow_mut().clear(),
    )?;
    Ok(links.into_inner())
}

/// An address or route destination found on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) net: Net,
    /// The interface it is on, zero when none.
    pub(crate) index: u32,
    pub(crate) ours: bool,
}

fn net_of(family: u8, len: u8, bytes: &[u8]) -> Option<Net> {
    match i32::from(family) {
        libc::AF_INET => Some(Net::V4(Net4 {
            addr: <[u8; 4]>::try_from(bytes).ok()?.into(),
            len,
        })),
        libc::AF_INET6 => Some(Net::V6(Net6 {
            addr: <[u8; 16]>::try_from(bytes).ok()?.into(),
            len,
        })),
        _ => None,
    }
}

/// Every unicast route of the main table and every local one; defaults have length zero.
pub(crate) fn routes(socket: &mut Socket) -> io::Result<Vec<Found>> {
    let found = std::cell::RefCell::new(Vec::new());
    let each = |m: Message<'_>| {
        let (family, len) = (m.body[0], m.body[1]);
        let (table, protocol, kind) = (m.body[4], m.body[5], m.body[7]);
        let wanted = table == libc::RT_TABLE_MAIN || table == libc::RT_TABLE_LOCAL;
        if !wanted || (kind != libc::RTN_UNICAST && kind != libc::RTN_LOCAL) {
            return;
        }
        let rest = m.body.get(12..).unwrap_or_default();
        let zero: &[u8] = if i32::from(family) == libc::AF_INET {
            &[0; 4]
        } else {
            &[0; 16]
        };
        let net = net_of(family, len, attr_of(rest, libc::RTA_DST).unwrap_or(zero));
        let mut indexes: Vec<u32> = attr_of(rest, libc::RTA_OIF)
            .and_then(|v| u32_at(v, 0))
            .into_iter()
            .collect();
        // A multipath route names its interfaces in its next hops.
        let mut hops = attr_of(rest, libc::RTA_MULTIPATH).unwrap_or_default();
        while let (Some(hop), Some(index)) = (u16_at(hops, 0), u32_at(hops, 4)) {
            indexes.push(index);
            hops = hops
                .get(usize::from(hop.max(8)).next_multiple_of(4)..)
                .unwrap_or_default();
        }
        if indexes.is_empty() {
            indexes.push(0);
        }
        let ours = protocol == ROUTE_PROTOCOL;
        found
            .borrow_mut()
            .extend(indexes.into_iter().filter_map(|index| {
                Some(Found {
                    net: net?,
                    index,
                    ours,
                })
            }));
    };
    socket.dump(
        libc::RTM_GETROUTE,
        &[0; 12],
        |_| {},
        |m| {
            if m.body.len() >= 12 {
                each(m)
            }
        },
        || {
            found.borrow_mut().clear();
        },
    )?;
    Ok(found.into_inner())
}

/// The addresses of one interface.
pub(crate) fn addresses_of(socket: &mut Socket, index: u32) -> io::Result<Vec<Net>> {
    let mut fixed = [0; 8];
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    let all = dump_addresses(socket, &fixed)?;
    Ok(all
        .into_iter()
        .filter(|f| f.index == index)
        .map(|f| f.net)
        .collect())
}

/// Every address, with its prefix length.
pub(crate) fn addresses(socket: &mut Socket) -> io::Result<Vec<Found>> {
    dump_addresses(socket, &[0; 8])
}

fn dump_addresses(socket: &mut Socket, fixed: &[u8; 8]) -> io::Result<Vec<Found>> {
    let found = std::cell::RefCell::new(Vec::new());
    let each = |m: Message<'_>| {
        let (Some(index), Some(rest)) = (u32_at(m.body, 4), m.body.get(8..)) else {
            return;
        };
        let addr = attr_of(rest, libc::IFA_LOCAL).or(attr_of(rest, libc::IFA_ADDRESS));
        if let Some(net) = addr.and_then(|a| net_of(m.body[0], m.body[1], a)) {
            found.borrow_mut().push(Found {
                net,
                index,
                ours: false,
            });
        }
    };
    socket.dump(
        libc::RTM_GETADDR,
        fixed,
        |_| {},
        each,
        || found.borrow_mut().clear(),
    )?;
    Ok(found.into_inner())
}

/// Makes a whole range local without an address of each: streams are bound to them.
pub(crate) fn any_ip(socket: &mut Socket, net: Net, add: bool) -> io::Result<()> {
    let (family, len, addr) = parts(net);
    let scope = if add {
        libc::RT_SCOPE_HOST
    } else {
        libc::RT_SCOPE_NOWHERE
    };
    let mut fixed = [0; 12];
    fixed[..8].copy_from_slice(&[
        family,
        len,
        0,
        0,
        libc::RT_TABLE_LOCAL,
        ROUTE_PROTOCOL,
        scope,
        libc::RTN_LOCAL,
    ]);
    let (kind, flags) = if add {
        (
            libc::RTM_NEWROUTE,
            libc::NLM_F_CREATE | libc::NLM_F_REPLACE | ACK,
        )
    } else {
        (libc::RTM_DELROUTE, ACK)
    };
    let mut b = Buf::default();
    b.message(kind, flags, &fixed, |b| {
        b.attr(libc::RTA_DST, &addr).ne32(libc::RTA_OIF, LOOPBACK);
    });
    match socket.run(&mut b) {
        Err(e) if !add && e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}
