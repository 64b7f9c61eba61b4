//! Addresses, rules and routes of the tunnel.
//!
//! What is ours carries a protocol number of its own, so it can be found and
//! removed without a list of it. The main table is never changed: rules before
//! it send everything to a table of ours, and the one connection that must not
//! go there has a mark. A route that somebody slips into the main table
//! (TunnelVision), a network that claims to be next door (LocalNet) or a name
//! that resolves to a target's address (ServerIP) thereby changes nothing.
//!
//! The tunnel's addresses are local only to what arrives through the tunnel, or
//! from here. A neighbour who asks for them finds nobody (CLI-12).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};
use rvpn_proto::control::Prefix;
use tokio::time::sleep;

use crate::fail::{Outcome, While as _};

/// Of the sockets to the gateway.
pub(crate) const MARK: u32 = 0x7276;
/// Where everything else is sent.
const TABLE: u32 = 0x7276;
/// Where the tunnel's addresses are local.
const LOCAL: u32 = 0x7277;
const MAIN: u32 = 254;
/// Whose rules and routes these are.
const OURS: RouteProtocol = RouteProtocol::Other(0x72);
/// The first of our rules; the main table's has 32766.
const FIRST: u32 = 5200;
/// Of a route that is used when there is no other.
const LAST_RESORT: u32 = u32::MAX;

/// How often, and how long between, a route is looked for that must come.
const ROUTE_TRIES: u32 = 300;
const ROUTE_WAIT: Duration = Duration::from_millis(10);

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

/// The kernel's side.
pub(crate) struct Net {
    handle: Handle,
    families: Vec<AddressFamily>,
}

impl Net {
    /// Opens a connection to the kernel.
    pub(crate) fn open() -> io::Result<Net> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let mut families = vec![AddressFamily::Inet];
        if Path::new("/proc/net/if_inet6").exists() {
            families.push(AddressFamily::Inet6);
        }
        Ok(Net { handle, families })
    }

    /// Sends what the plan says to our table. With a kill switch it ends there
    /// from now on.
    pub(crate) async fn capture(&self, plan: &Plan) -> Outcome {
        for family in &self.families {
            if plan.kill_switch {
                let wanted = plan.only.clone().unwrap_or_else(|| vec![whole(*family)]);
                for prefix in wanted.into_iter().filter(|p| family_of(*p) == *family) {
                    self.dead_end(prefix).await?;
                }
            }
            for rule in rules(*family, plan) {
                self.rule(rule).await?;
            }
        }
        Ok(())
    }

    /// Makes a device carry what was captured.
    pub(crate) async fn attach(
        &self,
        plan: &Plan,
        mtu: u32,
        v4: Ipv4Addr,
        v6: Option<Ipv6Addr>,
    ) -> Outcome {
        let index = self.index(&plan.interface).await?;
        let up = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        let set = self.handle.link().set(up).execute().await;
        set.while_doing(format_args!("start {}", plan.interface))?;
        let addresses = [Some(IpAddr::V4(v4)), v6.map(IpAddr::V6)];
        for address in addresses.into_iter().flatten() {
            self.address(index, address).await?;
        }
        for family in &self.families {
            let six = *family == AddressFamily::Inet6;
            let wanted = plan.only.clone().unwrap_or_else(|| vec![whole(*family)]);
            for prefix in wanted.into_iter().filter(|p| family_of(*p) == *family) {
                if six && v6.is_none() {
                    // Nothing may go round a tunnel that has only IPv4.
                    self.dead_end(prefix).await?;
                    continue;
                }
                let route = route(prefix, TABLE)
                    .output_interface(index)
                    .scope(RouteScope::Link);
                self.route(route.build(), "send traffic into the tunnel")
                    .await?;
            }
        }
        Ok(())
    }

    async fn address(&self, index: u32, address: IpAddr) -> Outcome {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let mut add = self.handle.address().add(index, address, length);
        if address.is_ipv6() {
            // Nobody else can have it, so nobody is asked.
            let flags = netlink_packet_route::address::AddressFlags::Nodad;
            add.message_mut()
                .attributes
                .push(AddressAttribute::Flags(flags));
        }
        add.execute()
            .await
            .while_doing(format_args!("give the tunnel {address}"))?;
        let Ok(prefix) = Prefix::new(address, length) else {
            return Ok(());
        };
        // Local to the tunnel and to ourselves, instead of to everybody.
        let here = route(prefix, LOCAL)
            .output_interface(index)
            .kind(RouteType::Local)
            .scope(RouteScope::Host);
        self.route(here.build(), "keep the tunnel's address to the tunnel")
            .await?;
        let everywhere = route(prefix, 255)
            .protocol(RouteProtocol::Kernel)
            .output_interface(index)
            .kind(RouteType::Local)
            .scope(if address.is_ipv4() {
                RouteScope::Host
            } else {
                RouteScope::Universe
            })
            .build();
        // The kernel gives an IPv6 address its route a moment later.
        let mut tries = 0;
        loop {
            let removed = self.handle.route().del(everywhere.clone()).execute().await;
            match removed {
                Err(error) if is_gone(&error) && tries < ROUTE_TRIES => {
                    tries += 1;
                    sleep(ROUTE_WAIT).await;
                }
                done => {
                    return done.while_doing(format_args!("hide {address} from neighbours"));
                }
            }
        }
    }

    async fn dead_end(&self, prefix: Prefix) -> Outcome {
        let route = route(prefix, TABLE)
            .kind(RouteType::Unreachable)
            .priority(LAST_RESORT);
        self.route(route.build(), "block what would pass the tunnel by")
            .await
    }

    async fn route(&self, route: RouteMessage, what: &str) -> Outcome {
        self.handle
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .while_doing(what)
    }

    async fn rule(&self, rule: RuleMessage) -> Outcome {
        let mut add = self.handle.rule().add();
        *add.message_mut() = rule;
        add.execute().await.while_doing("add a routing rule")
    }

    /// The number of a device.
    pub(crate) async fn index(&self, name: &str) -> Outcome<u32> {
        let found = self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute();
        let found = found.try_collect::<Vec<_>>().await;
        let found = found.while_doing(format_args!("find the device {name}"))?;
        let first = found.first().map(|link| link.header.index);
        first.ok_or_else(|| crate::fail::Failure::internal(format!("the device {name} is gone")))
    }

    /// Networks that this machine is attached to, other than by the tunnel.
    pub(crate) async fn local(&self, but: &str) -> Outcome<Vec<Prefix>> {
        let names = self.names().await?;
        let found = self.handle.address().get().execute();
        let found: Vec<_> = found.try_collect().await.while_doing("list addresses")?;
        let mut local = Vec::new();
        for one in found {
            let name = names.iter().find(|(i, _)| *i == one.header.index);
            if name.is_none_or(|(_, n)| n == but || n == "lo") {
                continue;
            }
            for attribute in &one.attributes {
                if let AddressAttribute::Address(address) = attribute
                    && let Ok(prefix) = Prefix::around(*address, one.header.prefix_len)
                {
                    local.push(prefix);
                }
            }
        }
        Ok(local)
    }

    /// The addresses of this machine and its ways out, to see changes by.
    pub(crate) async fn snapshot(&self, but: &str) -> Outcome<String> {
        let mut lines: Vec<String> = self
            .local(but)
            .await?
            .iter()
            .map(|p| format!("{p}"))
            .collect();
        for family in &self.families {
            let mut all = RouteMessageBuilder::<IpAddr>::default().build();
            all.header.address_family = *family;
            let routes = self.handle.route().get(all).execute();
            let routes: Vec<_> = routes.try_collect().await.while_doing("list routes")?;
            let ways_out = routes.iter().filter(|r| {
                r.header.destination_prefix_length == 0
                    && u32::from(r.header.table) == MAIN
                    && r.header.protocol != OURS
            });
            lines.extend(ways_out.map(|r| {
                let ways = r
                    .attributes
                    .iter()
                    .filter(|a| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Oif(_)));
                format!("{:?}", ways.collect::<Vec<_>>())
            }));
        }
        lines.sort();
        Ok(lines.join("\n"))
    }

    async fn names(&self) -> Outcome<Vec<(u32, String)>> {
        let links = self.handle.link().get().execute();
        let links: Vec<_> = links.try_collect().await.while_doing("list devices")?;
        let name = |attributes: &[LinkAttribute]| {
            attributes.iter().find_map(|a| match a {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            })
        };
        Ok(links
            .iter()
            .filter_map(|l| Some((l.header.index, name(&l.attributes)?)))
            .collect())
    }

    /// Devices whose strict reverse path check would drop the gateway's answers.
    pub(crate) async fn strict(&self, but: &str) -> Outcome<Vec<String>> {
        let check = |name: &str| -> u8 {
            let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        let all = check("all");
        let names = self.names().await?.into_iter().map(|(_, name)| name);
        Ok(names
            .filter(|n| n != but && n != "lo" && check(n).max(all) == 1)
            .collect())
    }

    /// Removes every rule and route of ours. Says how many there were.
    pub(crate) async fn release(&self) -> Outcome<usize> {
        let mut removed = 0;
        for family in &self.families {
            let version = match family {
                AddressFamily::Inet => IpVersion::V4,
                _ => IpVersion::V6,
            };
            let rules = self.handle.rule().get(version).execute();
            let rules: Vec<_> = rules
                .try_collect()
                .await
                .while_doing("list routing rules")?;
            for rule in rules.into_iter().filter(is_ours) {
                let gone = self.handle.rule().del(rule).execute().await;
                gone.while_doing("remove a routing rule")?;
                removed += 1;
            }
            let all = RouteMessageBuilder::<IpAddr>::default();
            let mut all = all.build();
            all.header.address_family = *family;
            let routes = self.handle.route().get(all).execute();
            let routes: Vec<_> = routes.try_collect().await.while_doing("list routes")?;
            for route in routes.into_iter().filter(|r| r.header.protocol == OURS) {
                // A device that went away in the meantime took its routes along.
                match self.handle.route().del(route).execute().await {
                    Err(error) if !is_gone(&error) => {
                        Err(error).while_doing("remove a route")?;
                    }
                    _ => removed += 1,
                }
            }
        }
        Ok(removed)
    }

    /// Removes a device, if it is there.
    pub(crate) async fn remove(&self, name: &str) -> Outcome {
        if !Path::new("/sys/class/net").join(name).exists() && self.index(name).await.is_err() {
            return Ok(());
        }
        let index = self.index(name).await?;
        match self.handle.link().del(index).execute().await {
            Err(error) if !is_gone(&error) => Err(error).while_doing(format_args!("remove {name}")),
            _ => Ok(()),
        }
    }
}

fn is_gone(error: &rtnetlink::Error) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            let code = -message.raw_code();
            [libc::ESRCH, libc::ENODEV, libc::ENOENT].contains(&code)
        }
        _ => false,
    }
}

fn is_ours(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Protocol(OURS))
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

fn route(prefix: Prefix, table: u32) -> RouteMessageBuilder<IpAddr> {
    let builder = RouteMessageBuilder::<IpAddr>::default();
    // A prefix is never longer than its address, so there is always one.
    let builder = builder
        .destination_prefix(prefix.address(), prefix.length())
        .unwrap_or_default();
    builder.table_id(table).protocol(OURS)
}

/// In the order in which they are asked.
fn rules(family: AddressFamily, plan: &Plan) -> Vec<RuleMessage> {
    let marked = || vec![RuleAttribute::FwMark(MARK), RuleAttribute::FwMask(u32::MAX)];
    let from = |name: &str| vec![RuleAttribute::Iifname(name.to_owned())];
    let mut all: Vec<(Vec<RuleAttribute>, Option<u32>)> = vec![
        (marked(), Some(MAIN)),
        // Never into the tunnel, whatever the main table lacks.
        (marked(), None),
        (from(&plan.interface), Some(LOCAL)),
        (from("lo"), Some(LOCAL)),
    ];
    let link_local = Prefix::new(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10);
    let past = plan.past.iter().copied().chain(link_local);
    for prefix in past.filter(|p| family_of(*p) == family) {
        all.push((
            vec![RuleAttribute::Destination(prefix.address())],
            Some(MAIN),
        ));
    }
    all.push((Vec::new(), Some(TABLE)));
    let numbered = all.into_iter().zip(FIRST..);
    numbered
        .map(|((mut attributes, table), priority)| {
            let mut rule = RuleMessage::default();
            rule.header.family = family;
            rule.header.action = match table {
                Some(_) => RuleAction::ToTable,
                None => RuleAction::Unreachable,
            };
            if let Some(RuleAttribute::Destination(address)) = attributes.first() {
                let length = plan.past.iter().find(|p| p.address() == *address);
                rule.header.dst_len = length.map_or(10, |p| p.length());
            }
            attributes.extend(table.map(RuleAttribute::Table));
            attributes.push(RuleAttribute::Priority(priority));
            attributes.push(RuleAttribute::Protocol(OURS));
            rule.attributes = attributes;
            rule
        })
        .collect()
}

/// Whether this process may change the network.
pub(crate) fn may_change() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let held = line
        .and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
        .unwrap_or(0);
    // CAP_NET_ADMIN
    held & (1 << 12) != 0
}

/// Whether a second user can be told apart here, to whom the parser of
/// strangers' bytes can be confined.
pub(crate) fn many_users() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let sizes = map.lines().filter_map(|l| l.split_whitespace().nth(2));
    sizes.filter_map(|s| s.parse::<u64>().ok()).sum::<u64>() > 65_534
}
