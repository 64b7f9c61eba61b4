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
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};
use rvpn_proto::control::Prefix;
use tokio::time::sleep;

use super::rules::{LOCAL, MAIN, OURS, Plan, TABLE, place_beside, rules};
use crate::fail::{Failure, Outcome, While as _};

/// How long the kernel may take to make the route of an address.
const APPEARS: Duration = Duration::from_secs(5);
/// Of a route that is used when there is no other.
const LAST_RESORT: u32 = u32::MAX;

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
    /// from now on. Rules of another `up`, which was killed, make way only when
    /// these are there.
    pub(crate) async fn capture(&self, plan: &Plan) -> Outcome {
        for family in &self.families {
            let old = self.our_rules(*family).await?;
            let wanted = plan.wanted(*family);
            if plan.kill_switch {
                for prefix in wanted.iter().copied() {
                    self.dead_end(prefix).await?;
                }
            }
            for rule in rules(*family, plan, place_beside(&old))? {
                self.rule(rule).await?;
            }
            // From their end: what lets root see its neighbours may not outlast
            // what comes before it and sends everything else into the tunnel.
            for rule in old.into_iter().rev() {
                self.forget(rule).await?;
            }
            if plan.kill_switch {
                self.open_others(*family, &wanted).await?;
            }
        }
        Ok(())
    }

    /// Ends what a killed one blocked and this one does not.
    async fn open_others(&self, family: AddressFamily, wanted: &[Prefix]) -> Outcome {
        let left = self.our_routes(family).await?.into_iter();
        for route in left.filter(|r| r.header.kind == RouteType::Unreachable) {
            let length = route.header.destination_prefix_length;
            let to = destination(&route);
            let is_same = |p: &&Prefix| p.length() == length && to.is_none_or(|t| t == p.address());
            if wanted.iter().find(is_same).is_none() {
                self.forget_route(route).await?;
            }
        }
        Ok(())
    }

    /// Whether what leads to our table is still there.
    pub(crate) async fn is_captured(&self, plan: &Plan) -> Outcome<bool> {
        for family in &self.families {
            let there = self.our_rules(*family).await?;
            if there.len() < rules(*family, plan, place_beside(&there))?.len() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Leads what is meant for the tunnel nowhere, while there is no device.
    pub(crate) async fn shut(&self, plan: &Plan) -> Outcome {
        for family in &self.families {
            for prefix in plan.wanted(*family) {
                self.dead_end(prefix).await?;
            }
        }
        Ok(())
    }

    /// Ends that, where the tunnel leads again and nothing is to stay blocked.
    pub(crate) async fn open_up(&self, plan: &Plan) -> Outcome {
        for family in &self.families {
            let ours = self.our_routes(*family).await?;
            let leads = ours.iter().any(|r| r.header.kind == RouteType::Unicast);
            if leads && !plan.kill_switch {
                self.open_others(*family, &[]).await?;
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
        self.keep_quiet(plan, index).await?;
        let up = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        let set = self.handle.link().set(up).execute().await;
        set.while_doing(format_args!("start {}", plan.interface))?;
        // Somebody has switched it off for every device.
        let v6 = v6.filter(|_| !is_without_six(&plan.interface));
        let addresses = [Some(IpAddr::V4(v4)), v6.map(IpAddr::V6)];
        for address in addresses.into_iter().flatten() {
            self.address(index, address).await?;
        }
        for family in &self.families {
            let six = *family == AddressFamily::Inet6;
            for prefix in plan.wanted(*family) {
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

    /// The device gets no address of its own making, and nothing that comes
    /// through it can give it one, or a route.
    async fn keep_quiet(&self, plan: &Plan, index: u32) -> Outcome {
        if !self.families.contains(&AddressFamily::Inet6) {
            return Ok(());
        }
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let quiet = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![none],
            )]))
            .build();
        let set = self.handle.link().set(quiet).execute().await;
        set.while_doing(format_args!(
            "keep {} from having addresses",
            plan.interface
        ))?;
        for name in ["accept_ra", "accept_redirects"] {
            let path = format!("/proc/sys/net/ipv6/conf/{}/{name}", plan.interface);
            std::fs::write(&path, "0").while_doing(format_args!("write {path}"))?;
        }
        Ok(())
    }

    async fn address(&self, index: u32, address: IpAddr) -> Outcome {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let mut add = self.handle.address().add(index, address, length);
        // Nobody else can have it, so nobody is asked; routes are ours to make.
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        let attributes = &mut add.message_mut().attributes;
        attributes.push(AddressAttribute::Flags(flags));
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
            });
        let everywhere = everywhere.build();
        let begun = Instant::now();
        loop {
            let removed = self.handle.route().del(everywhere.clone()).execute().await;
            match removed {
                // The kernel adds the one of IPv6 in its own time.
                Err(error) if is_gone(&error) && begun.elapsed() < APPEARS => {
                    sleep(Duration::from_millis(1)).await;
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
        match add.execute().await {
            // Left by one that was killed while it took over.
            Err(error) if code(&error) == Some(libc::EEXIST) => Ok(()),
            done => done.while_doing("add a routing rule"),
        }
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
        first.ok_or_else(|| Failure::internal(format!("the device {name} is gone")))
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

    /// Settings of the reverse path check that would drop the gateway's answers,
    /// which it looks up as if they had no mark, with what to set instead. With
    /// a kill switch there may be no way back at all, so the loose check would
    /// drop them too; without, it only drops what has no route anywhere.
    pub(crate) async fn checks(&self, plan: &Plan) -> Outcome<Vec<(PathBuf, &'static str)>> {
        let path = |name: &str| PathBuf::from(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
        let check = |name: &str| -> u8 {
            let text = std::fs::read_to_string(path(name)).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        let all = check("all");
        let names = self.names().await?.into_iter().map(|(_, name)| name);
        let names = names.filter(|n| *n != plan.interface && n != "lo");
        if plan.kill_switch {
            let names = std::iter::once("all".to_owned()).chain(names);
            let on = names.filter(|n| check(n) != 0);
            return Ok(on.map(|n| (path(&n), "0")).collect());
        }
        let strict = names.filter(|n| check(n).max(all) == 1);
        Ok(strict.map(|n| (path(&n), "2")).collect())
    }

    /// Removes every rule and route of ours.
    pub(crate) async fn release(&self) -> Outcome {
        for family in &self.families {
            for rule in self.our_rules(*family).await? {
                self.forget(rule).await?;
            }
            for route in self.our_routes(*family).await? {
                self.forget_route(route).await?;
            }
        }
        Ok(())
    }

    async fn our_rules(&self, family: AddressFamily) -> Outcome<Vec<RuleMessage>> {
        let version = match family {
            AddressFamily::Inet => IpVersion::V4,
            _ => IpVersion::V6,
        };
        let rules = self.handle.rule().get(version).execute();
        let mut rules: Vec<_> = rules
            .try_collect()
            .await
            .while_doing("list routing rules")?;
        rules.retain(|rule| rule.attributes.contains(&RuleAttribute::Protocol(OURS)));
        Ok(rules)
    }

    async fn our_routes(&self, family: AddressFamily) -> Outcome<Vec<RouteMessage>> {
        let mut all = RouteMessageBuilder::<IpAddr>::default().build();
        all.header.address_family = family;
        let routes = self.handle.route().get(all).execute();
        let mut routes: Vec<_> = routes.try_collect().await.while_doing("list routes")?;
        routes.retain(|route| route.header.protocol == OURS);
        Ok(routes)
    }

    async fn forget(&self, rule: RuleMessage) -> Outcome {
        match self.handle.rule().del(rule).execute().await {
            Err(error) if !is_gone(&error) => Err(error).while_doing("remove a routing rule"),
            _ => Ok(()),
        }
    }

    async fn forget_route(&self, route: RouteMessage) -> Outcome {
        // A device that went away in the meantime took its routes along.
        match self.handle.route().del(route).execute().await {
            Err(error) if !is_gone(&error) => Err(error).while_doing("remove a route"),
            _ => Ok(()),
        }
    }

    /// Removes a device, if it is there.
    pub(crate) async fn remove(&self, name: &str) -> Outcome {
        // It goes with whoever had it, at any moment.
        let Ok(index) = self.index(name).await else {
            return Ok(());
        };
        match self.handle.link().del(index).execute().await {
            Err(error) if !is_gone(&error) => Err(error).while_doing(format_args!("remove {name}")),
            _ => Ok(()),
        }
    }
}

fn is_without_six(device: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}

fn is_gone(error: &rtnetlink::Error) -> bool {
    code(error).is_some_and(|code| [libc::ESRCH, libc::ENODEV, libc::ENOENT].contains(&code))
}

/// What the kernel answered, as an errno.
fn code(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}

fn destination(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some((*v4).into()),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some((*v6).into()),
        _ => None,
    })
}

fn route(prefix: Prefix, table: u32) -> RouteMessageBuilder<IpAddr> {
    let builder = RouteMessageBuilder::<IpAddr>::default();
    // A prefix is never longer than its address, so there is always one.
    let builder = builder
        .destination_prefix(prefix.address(), prefix.length())
        .unwrap_or_default();
    builder.table_id(table).protocol(OURS)
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
