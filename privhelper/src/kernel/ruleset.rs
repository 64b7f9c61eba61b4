//! The one nf_tables table, and the elements a lease adds to it.
//!
//! A client's packet meets, in this order: its source against the lease, what
//! every client is refused, its class, its connection mark and flow cap, and
//! the way out. Whatever is dropped is counted by reason. Packets that touch
//! none of our devices and addresses pass through untouched.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use rvpn_ipc::{Class, Slot};

use crate::config::{Config, Net, Net4, Net6, Proto};
use crate::plan;

use super::Kernel;
use super::netlink::{Message, attr_of, text_of};
use super::nft::{
    Base, Batch, Cmp, Data, FAMILY_INET, FORWARD, GET_RULE, GET_TABLE, Hook, INPUT, Meta, OUTPUT,
    POSTROUTING, PREROUTING, R0, R1, Rule, SET_EVAL, SET_INTERVAL, SET_MAP, Set, TABLE,
    TYPE_IFINDEX, TYPE_IPV4, TYPE_IPV6, TYPE_MARK, TYPE_PROTOCOL, Verdict, concat,
};

pub(crate) const NAME: &str = "rvpn";
const SUBSYSTEM: u16 = 10 << 8;

/// A slot whose packets may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) slot: Slot,
    pub(crate) index: u32,
    pub(crate) class: Class,
    pub(crate) streams: bool,
}

/// Why packets are dropped; each is a counter of that name.
const REASONS: [&str; 14] = [
    "spoofed",
    "protocol",
    "options",
    "not_unicast",
    "to_host",
    "client_to_client",
    "special_purpose",
    "denied_port",
    "flow_cap",
    "invalid",
    "no_uplink",
    "unleased",
    "from_outside",
    "host_chatter",
];

const SPECIAL4: [(u32, u8); 15] = [
    (0x0000_0000, 8),
    (0x0a00_0000, 8),
    (0x6440_0000, 10),
    (0x7f00_0000, 8),
    (0xa9fe_0000, 16),
    (0xac10_0000, 12),
    (0xc000_0000, 24),
    (0xc000_0200, 24),
    (0xc058_6300, 24),
    (0xc0a8_0000, 16),
    (0xc612_0000, 15),
    (0xc633_6400, 24),
    (0xcb00_7100, 24),
    (0xe000_0000, 4),
    (0xf000_0000, 4),
];

/// What is not global unicast, and what inside it is not an internet host's.
const SPECIAL6: [(u128, u8); 7] = [
    (0, 3),
    (0x2001 << 112, 23),
    (0x2001_0db8 << 96, 32),
    (0x2002 << 112, 16),
    (0x3fff << 112, 20),
    (0x4000 << 112, 2),
    (0x8000 << 112, 1),
];

const ESTABLISHED_RELATED: u32 = 2 | 4;
const STATE_INVALID: u32 = 1;
const STATE_NEW: u32 = 8;
const PROTO_ICMP6: libc::c_int = 58;
const DROP_ORDER: i32 = -310;
const MARK_ORDER: i32 = -150;
const SOURCE_NAT_ORDER: i32 = 100;

/// Keys, each with what it leads to.
type Elements<'c> = Vec<(Vec<u8>, Data<'c>)>;

fn key4(index: u32, addr: Ipv4Addr) -> Vec<u8> {
    [&index.to_ne_bytes()[..], &addr.octets()].concat()
}

fn key6(index: u32, addr: Ipv6Addr) -> Vec<u8> {
    [&index.to_ne_bytes()[..], &addr.octets()].concat()
}

fn class_chain(class: Class) -> String {
    format!("class_{class}")
}

/// The elements of some leases, set by set.
fn lease_elements<'c>(
    config: &Config,
    leases: &[Element],
    chains: &'c [String],
) -> [(&'static str, Elements<'c>); 10] {
    let goto = |e: &Element| {
        Data::Verdict(Verdict::Goto(
            chains.get(usize::from(e.class)).map_or("", String::as_str),
        ))
    };
    let all =
        |f: &dyn Fn(&Element) -> (Vec<u8>, Data<'c>)| leases.iter().map(f).collect::<Vec<_>>();
    let streams = |f: &dyn Fn(&Element) -> (Vec<u8>, Data<'c>)| {
        leases
            .iter()
            .filter(|e| e.streams)
            .map(f)
            .collect::<Vec<_>>()
    };
    let v4 = |e: &Element| key4(e.index, plan::v4_base(config.pool4, e.slot));
    let v6 = |e: &Element| key6(e.index, plan::v6_base(config.pool6, e.slot));
    let s4 = |e: &Element| plan::stream4(config, e.slot).octets().to_vec();
    let s6 = |e: &Element| plan::stream6(config, e.slot).octets().to_vec();
    // Without the class: a lease resumed in another keeps its flows.
    let owner = |e: &Element| key4(e.index, plan::mark(e.slot, 0).to_ne_bytes().into());
    let mark = |e: &Element| Data::Value(plan::mark(e.slot, e.class));
    [
        ("lease4", all(&|e| (v4(e), goto(e)))),
        ("lease6", all(&|e| (v6(e), goto(e)))),
        ("back4", all(&|e| (v4(e), Data::None))),
        ("back6", all(&|e| (v6(e), Data::None))),
        ("marks", all(&|e| (e.index.to_ne_bytes().to_vec(), mark(e)))),
        ("owned", all(&|e| (owner(e), Data::None))),
        ("stream4", streams(&|e| (s4(e), goto(e)))),
        ("stream6", streams(&|e| (s6(e), goto(e)))),
        ("stream_marks4", streams(&|e| (s4(e), mark(e)))),
        ("stream_marks6", streams(&|e| (s6(e), mark(e)))),
    ]
}

fn chains_of(config: &Config) -> Vec<String> {
    let last = config.classes.iter().map(|c| c.number).max().unwrap_or(0);
    (0..=last).map(class_chain).collect()
}

pub(crate) fn add_lease(k: &mut Kernel, config: &Config, lease: Element) -> io::Result<()> {
    let chains = chains_of(config);
    let mut batch = Batch::new(NAME);
    for (set, elements) in lease_elements(config, &[lease], &chains) {
        batch.add(set, &elements);
    }
    batch.run(&mut k.filter)
}

/// Takes the lease out; being out already is fine.
pub(crate) fn remove_lease(k: &mut Kernel, config: &Config, lease: Element) -> io::Result<()> {
    let chains = chains_of(config);
    let mut batch = Batch::new(NAME);
    for (set, mut elements) in lease_elements(config, &[lease], &chains) {
        for (_, data) in &mut elements {
            *data = Data::None;
        }
        batch.remove(set, &elements);
    }
    match batch.run(&mut k.filter) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

pub(crate) fn set_uplinks(k: &mut Kernel, uplinks: &[u32]) -> io::Result<()> {
    let mut batch = Batch::new(NAME);
    batch.clear("uplinks");
    batch.add("uplinks", &uplink_elements(uplinks));
    batch.run(&mut k.filter)
}

fn uplink_elements(uplinks: &[u32]) -> Vec<(Vec<u8>, Data<'static>)> {
    uplinks
        .iter()
        .map(|i| (i.to_ne_bytes().to_vec(), Data::None))
        .collect()
}

/// Removes the table. Creating it first makes the removal of none succeed.
pub(crate) fn remove(k: &mut Kernel) -> io::Result<()> {
    let mut batch = Batch::new(NAME);
    batch.new_table("");
    batch.delete_table();
    batch.run(&mut k.filter)
}

/// How many rules the table holds; zero when it is gone.
pub(crate) fn rules_present(k: &mut Kernel) -> io::Result<usize> {
    let n = std::cell::Cell::new(0);
    let each = |m: Message<'_>| {
        let table = m.body.get(4..).and_then(|b| attr_of(b, TABLE)).map(text_of);
        n.set(n.get() + usize::from(table.as_deref() == Some(NAME)));
    };
    let fixed = [FAMILY_INET, 0, 0, 0];
    k.filter
        .dump(SUBSYSTEM | GET_RULE, &fixed, |_| {}, each, || n.set(0))?;
    Ok(n.get())
}

/// Puts the table in place, live leases included, and returns its number of rules.
/// One of an earlier start with the same configuration stays and only its
/// elements are set anew: to replace a table costs packets for a millisecond.
pub(crate) fn ensure(
    k: &mut Kernel,
    config: &Config,
    uplinks: &[u32],
    leases: &[Element],
) -> io::Result<usize> {
    let whole = build(config, uplinks, leases);
    let rules = whole.rules;
    if comment(k)?.as_deref() != Some(&fingerprint(config)) || rules_present(k)? != rules {
        return install(k, config, uplinks, leases);
    }
    let chains = chains_of(config);
    let mut b = Batch::new(NAME);
    b.clear("uplinks");
    b.add("uplinks", &uplink_elements(uplinks));
    for (set, elements) in lease_elements(config, leases, &chains) {
        b.clear(set);
        b.add(set, &elements);
    }
    b.run(&mut k.filter)?;
    Ok(rules)
}

/// Replaces the whole table in one transaction; returns its number of rules.
pub(crate) fn install(
    k: &mut Kernel,
    config: &Config,
    uplinks: &[u32],
    leases: &[Element],
) -> io::Result<usize> {
    #[cfg(feature = "fault-hooks")]
    crate::fault::refuse("install")?;
    let b = build(config, uplinks, leases);
    let rules = b.rules;
    b.run(&mut k.filter)?;
    Ok(rules)
}

/// What the rules depend on, as the table's comment tells a later start.
fn fingerprint(config: &Config) -> String {
    let text = format!(
        "{} {:?}",
        env!("CARGO_PKG_VERSION"),
        Config {
            slots: 0,
            max_slots: 0,
            grow: 0,
            ..config.clone()
        }
    );
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("made and kept by rvpn-privhelper, configuration {hash:016x}")
}

/// The table's comment, if there is a table with one.
fn comment(k: &mut Kernel) -> io::Result<Option<String>> {
    const USERDATA: u16 = 6;
    let found = std::cell::RefCell::new(None);
    let each = |m: Message<'_>| {
        let attrs = m.body.get(4..).unwrap_or_default();
        if attr_of(attrs, TABLE).map(text_of).as_deref() == Some(NAME) {
            *found.borrow_mut() = attr_of(attrs, USERDATA)
                .and_then(|d| d.get(2..))
                .map(text_of);
        }
    };
    let fixed = [FAMILY_INET, 0, 0, 0];
    k.filter.dump(
        SUBSYSTEM | GET_TABLE,
        &fixed,
        |_| {},
        each,
        || *found.borrow_mut() = None,
    )?;
    Ok(found.into_inner())
}

/// The batch that makes the table anew.
fn build<'c>(config: &Config, uplinks: &[u32], leases: &[Element]) -> Batch<'c> {
    let chains = chains_of(config);
    let mut b = Batch::new(NAME);
    b.new_table("");
    b.delete_table();
    b.new_table(&fingerprint(config));
    for reason in REASONS {
        b.counter(reason);
    }
    timeouts(&mut b, config);
    sets(&mut b, config);
    b.add("uplinks", &uplink_elements(uplinks));
    b.add(
        "special4",
        &intervals(SPECIAL4.iter().map(|&(a, l)| (u128::from(a), l)), 4),
    );
    b.add("special6", &intervals(SPECIAL6.iter().copied(), 16));
    b.add("protocols4", &[1, 6, 17].map(|p| (vec![p], Data::None)));
    b.add("headers6", &[6, 17, 44, 58].map(|p| (vec![p], Data::None)));
    base_chains(&mut b);
    refuse_everyone(&mut b, config);
    classes(&mut b, config);
    from_client(&mut b, config);
    marks(&mut b, config);
    forward(&mut b, config);
    host(&mut b, config);
    masquerade(&mut b, config);
    for (set, elements) in lease_elements(config, leases, &chains) {
        b.add(set, &elements);
    }
    b
}

fn timeouts(b: &mut Batch<'_>, config: &Config) {
    let t = &config.ct_timeouts;
    let short = t.tcp_transitory;
    // The states in the kernel's order: SYN sent and received, established, then the closing ones.
    let tcp: Vec<(u16, u32)> = (1..=11)
        .map(|s| (s, if s == 3 { t.tcp_established } else { short }))
        .collect();
    let udp = [(1, t.udp), (2, t.udp_replied)];
    for (family, suffix) in [(libc::AF_INET, "4"), (libc::AF_INET6, "6")] {
        b.ct_timeout(
            &format!("tcp{suffix}"),
            family,
            libc::IPPROTO_TCP as u8,
            &tcp,
        );
        b.ct_timeout(
            &format!("udp{suffix}"),
            family,
            libc::IPPROTO_UDP as u8,
            &udp,
        );
    }
}

fn sets(b: &mut Batch<'_>, config: &Config) {
    let pair4 = (concat(TYPE_IFINDEX, TYPE_IPV4), 8);
    let pair6 = (concat(TYPE_IFINDEX, TYPE_IPV6), 20);
    let (ip4, ip6) = ((TYPE_IPV4, 4), (TYPE_IPV6, 16));
    let mark = Some((TYPE_MARK, 4));
    let mut id = 0;
    let mut set = |name: &str, (key_type, key_len): (u32, u32), flags, data, counters, size| {
        id += 1;
        b.set(
            id,
            Set {
                name,
                flags,
                key_type,
                key_len,
                data,
                counters,
                size,
            },
        );
    };
    set("lease4", pair4, SET_MAP, None, true, 0);
    set("lease6", pair6, SET_MAP, None, true, 0);
    set("back4", pair4, 0, None, true, 0);
    set("back6", pair6, 0, None, true, 0);
    set(
        "owned",
        (concat(TYPE_IFINDEX, TYPE_MARK), 8),
        0,
        None,
        false,
        0,
    );
    set("marks", (TYPE_IFINDEX, 4), SET_MAP, mark, false, 0);
    set("stream4", ip4, SET_MAP, None, true, 0);
    set("stream6", ip6, SET_MAP, None, true, 0);
    set("stream_marks4", ip4, SET_MAP, mark, false, 0);
    set("stream_marks6", ip6, SET_MAP, mark, false, 0);
    set("uplinks", (TYPE_IFINDEX, 4), 0, None, false, 0);
    set("special4", ip4, SET_INTERVAL, None, false, 0);
    set("special6", ip6, SET_INTERVAL, None, false, 0);
    set("protocols4", (TYPE_PROTOCOL, 1), 0, None, false, 0);
    set("headers6", (TYPE_PROTOCOL, 1), 0, None, false, 0);
    for class in &config.classes {
        let n = class.number;
        set(
            &format!("flows_{n}"),
            (TYPE_MARK, 4),
            SET_EVAL,
            None,
            false,
            65_535,
        );
    }
}

/// Interval sets hold the first address of each range and, flagged, the one after its last.
fn intervals(
    nets: impl Iterator<Item = (u128, u8)>,
    width: usize,
) -> Vec<(Vec<u8>, Data<'static>)> {
    let bits = u32::try_from(width * 8).unwrap_or(128);
    let mut ranges: Vec<(u128, u128)> = nets
        .map(|(addr, len)| (addr, addr + ((1_u128 << (bits - u32::from(len))) - 1)))
        .collect();
    ranges.sort_unstable();
    let mut out: Vec<(Vec<u8>, Data<'static>)> = Vec::new();
    let bytes = |v: u128| v.to_be_bytes()[16 - width..].to_vec();
    let top = if bits == 128 {
        u128::MAX
    } else {
        (1 << bits) - 1
    };
    let mut i = 0;
    while i < ranges.len() {
        let (low, mut high) = ranges[i];
        i += 1;
        // Ranges that touch or overlap are one.
        while i < ranges.len() && high != top && ranges[i].0 <= high + 1 {
            high = high.max(ranges[i].1);
            i += 1;
        }
        if out.is_empty() && low != 0 {
            out.push((bytes(0), Data::End));
        }
        out.push((bytes(low), Data::None));
        if high != top {
            out.push((bytes(high + 1), Data::End));
        }
    }
    out
}

fn base_chains(b: &mut Batch<'_>) {
    let hook = |kind, number, priority| {
        Some(Hook {
            kind,
            number,
            priority,
        })
    };
    for (name, place) in [
        ("pre", hook("filter", PREROUTING, DROP_ORDER)),
        ("mark", hook("filter", PREROUTING, MARK_ORDER)),
        ("fwd", hook("filter", FORWARD, 0)),
        ("in", hook("filter", INPUT, 0)),
        ("stream_pre", hook("filter", OUTPUT, DROP_ORDER)),
        ("stream_mark", hook("filter", OUTPUT, MARK_ORDER)),
        ("out", hook("filter", OUTPUT, 0)),
        ("post", hook("nat", POSTROUTING, SOURCE_NAT_ORDER)),
        ("from_client", None),
        ("everyone", None),
        ("new_flow", None),
        ("fwd_out", None),
        ("fwd_in", None),
    ] {
        b.chain(name, place);
    }
}

impl Rule<'_> {
    fn saddr4(&mut self, reg: u32) -> &mut Self {
        self.family(libc::AF_INET)
            .payload(Base::Network, 12, 4, reg)
    }

    fn daddr4(&mut self, reg: u32) -> &mut Self {
        self.family(libc::AF_INET)
            .payload(Base::Network, 16, 4, reg)
    }

    fn saddr6(&mut self, reg: u32) -> &mut Self {
        self.family(libc::AF_INET6)
            .payload(Base::Network, 8, 16, reg)
    }

    fn daddr6(&mut self, reg: u32) -> &mut Self {
        self.family(libc::AF_INET6)
            .payload(Base::Network, 24, 16, reg)
    }

    fn in_net4(&mut self, net: Net4) -> &mut Self {
        self.and(R0, &mask(net.len, 4))
            .cmp(R0, Cmp::Eq, &net.addr.octets())
    }

    fn in_net6(&mut self, net: Net6) -> &mut Self {
        self.and(R0, &mask(net.len, 16))
            .cmp(R0, Cmp::Eq, &net.addr.octets())
    }

    fn daddr_in(&mut self, net: Net) -> &mut Self {
        match net {
            Net::V4(n) => self.daddr4(R0).in_net4(n),
            Net::V6(n) => self.daddr6(R0).in_net6(n),
        }
    }

    fn saddr_in(&mut self, net: Net) -> &mut Self {
        match net {
            Net::V4(n) => self.saddr4(R0).in_net4(n),
            Net::V6(n) => self.saddr6(R0).in_net6(n),
        }
    }

    /// The flow bears a mark of ours. One that began while the lease ended or the
    /// table was away bears none: no flush would find it, nothing translates it.
    fn leased(&mut self) -> &mut Self {
        self.ct_mark(R0)
            .and(R0, &plan::MARK_TAG_MASK.to_ne_bytes())
            .cmp(R0, Cmp::Eq, &plan::MARK_TAG.to_ne_bytes())
    }

    /// The flow bears the mark of the lease behind the interface. An ICMP error
    /// belongs to the flow it quotes, which may be another client's.
    fn owned(&mut self, interface: Meta) -> &mut Self {
        self.meta(interface, R0)
            .ct_mark(R1)
            .and(R1, &plan::MARK_SLOT_MASK.to_ne_bytes())
            .lookup("owned", R0, false)
    }

    /// Interface and the slot's prefix of an address, side by side from the first register.
    fn slot_key(&mut self, interface: Meta, v6: bool, source: bool) -> &mut Self {
        match (v6, source) {
            (false, true) => self.saddr4(R1).and(R1, &mask(24, 4)),
            (false, false) => self.daddr4(R1).and(R1, &mask(24, 4)),
            (true, true) => self.saddr6(R1).and(R1, &mask(112, 16)),
            (true, false) => self.daddr6(R1).and(R1, &mask(112, 16)),
        };
        self.meta(interface, R0)
    }
}

fn mask(len: u8, width: usize) -> Vec<u8> {
    (0..width)
        .map(|i| {
            let bits = usize::from(len).saturating_sub(i * 8).min(8);
            if bits == 0 { 0 } else { 0xff_u8 << (8 - bits) }
        })
        .collect()
}

/// Every network whose addresses are ours to give out.
pub(crate) fn own_nets(c: &Config) -> [Net; 4] {
    [
        Net::V4(c.pool4),
        Net::V6(c.pool6),
        Net::V4(c.stream4),
        Net::V6(c.stream6),
    ]
}

/// What no client may do, whatever its class.
fn refuse_everyone(b: &mut Batch<'_>, config: &Config) {
    let c = "everyone";
    b.rule(c, |r| {
        r.family(libc::AF_INET)
            .meta(Meta::L4Proto, R0)
            .lookup("protocols4", R0, true)
            .drop("protocol");
    });
    // The length of the header in words: five, or there are options.
    b.rule(c, |r| {
        r.family(libc::AF_INET)
            .payload(Base::Network, 0, 1, R0)
            .and(R0, &[0x0f])
            .cmp(R0, Cmp::Ne, &[5])
            .drop("options");
    });
    b.rule(c, |r| {
        r.family(libc::AF_INET6)
            .payload(Base::Network, 6, 1, R0)
            .lookup("headers6", R0, true)
            .drop("protocol");
    });
    b.rule(c, |r| {
        r.family(libc::AF_INET6)
            .meta(Meta::L4Proto, R0)
            .lookup("headers6", R0, true)
            .drop("protocol");
    });
    // Beyond echo and errors, ICMPv6 is the link's own business.
    b.rule(c, |r| {
        r.l4proto(PROTO_ICMP6)
            .payload(Base::Transport, 0, 1, R0)
            .cmp(R0, Cmp::Ge, &[130])
            .drop("protocol");
    });
    b.rule(c, |r| {
        r.fib_daddr_type(Cmp::Eq, libc::RTN_LOCAL).drop("to_host")
    });
    for net in own_nets(config) {
        b.rule(c, |r| r.daddr_in(net).drop("client_to_client"));
    }
    b.rule(c, |r| {
        r.fib_daddr_type(Cmp::Ne, libc::RTN_UNICAST)
            .drop("not_unicast")
    });
}

fn classes(b: &mut Batch<'_>, config: &Config) {
    for class in &config.classes {
        let chain = class_chain(class.number);
        b.chain(&chain, None);
        b.rule(&chain, |r| {
            r.verdict(Verdict::Jump("everyone"));
        });
        for ports in &class.deny_ports {
            let proto = match ports.proto {
                Proto::Tcp => libc::IPPROTO_TCP,
                Proto::Udp => libc::IPPROTO_UDP,
            };
            b.rule(&chain, |r| {
                r.l4proto(proto)
                    .payload(Base::Transport, 2, 2, R0)
                    .cmp(R0, Cmp::Ge, &ports.low.to_be_bytes())
                    .cmp(R0, Cmp::Le, &ports.high.to_be_bytes())
                    .drop("denied_port");
            });
        }
        for net in &class.allow {
            b.rule(&chain, |r| {
                r.daddr_in(*net).verdict(Verdict::Accept);
            });
        }
        b.rule(&chain, |r| {
            r.daddr4(R0)
                .lookup("special4", R0, false)
                .drop("special_purpose")
        });
        b.rule(&chain, |r| {
            r.daddr6(R0)
                .lookup("special6", R0, false)
                .drop("special_purpose")
        });
        b.rule(&chain, |r| {
            r.verdict(Verdict::Accept);
        });
    }
}

fn from_client(b: &mut Batch<'_>, config: &Config) {
    b.rule("pre", |r| {
        r.meta_is(Meta::IifGroup, Cmp::Eq, config.link_group)
            .verdict(Verdict::Goto("from_client"));
    });
    // The lease's prefix holds the host's own address too. A stream's source is the host's by intent.
    b.rule("from_client", |r| r.saddr_is_local().drop("spoofed"));
    for v6 in [false, true] {
        b.rule("from_client", |r| {
            r.slot_key(Meta::Iif, v6, true)
                .vmap(if v6 { "lease6" } else { "lease4" }, R0);
        });
    }
    b.rule("from_client", |r| r.drop("spoofed"));
    // From the wire nothing is addressed to a client: answers come to the uplink's own address.
    for net in own_nets(config) {
        b.rule("pre", |r| {
            r.meta_is(Meta::Iif, Cmp::Ne, 1)
                .daddr_in(net)
                .drop("from_outside");
        });
    }
    for (set, net) in [
        ("stream4", Net::V4(config.stream4)),
        ("stream6", Net::V6(config.stream6)),
    ] {
        b.rule("stream_pre", |r| {
            let offsets = if set == "stream4" {
                (libc::AF_INET, 12, 4)
            } else {
                (libc::AF_INET6, 8, 16)
            };
            r.family(offsets.0)
                .payload(Base::Network, offsets.1, offsets.2, R0)
                .vmap(set, R0);
        });
        b.rule("stream_pre", |r| r.saddr_in(net).drop("unleased"));
    }
}

/// Marks a flow with its lease as it begins, gives it our timeouts and counts it against the cap.
fn marks(b: &mut Batch<'_>, config: &Config) {
    b.rule("mark", |r| {
        r.meta_is(Meta::IifGroup, Cmp::Eq, config.link_group)
            .ct_state(STATE_NEW)
            .meta(Meta::Iif, R0)
            .map("marks", R0, R0)
            .set_ct_mark(R0)
            .verdict(Verdict::Goto("new_flow"));
    });
    for v6 in [false, true] {
        b.rule("stream_mark", |r| {
            r.ct_state(STATE_NEW);
            if v6 {
                r.saddr6(R0)
            } else {
                r.saddr4(R0)
            };
            r.map(if v6 { "stream_marks6" } else { "stream_marks4" }, R0, R0)
                .set_ct_mark(R0)
                .verdict(Verdict::Goto("new_flow"));
        });
    }
    // A packet that met its lease in the first chain may find it gone in this one.
    b.rule("mark", |r| {
        r.meta_is(Meta::IifGroup, Cmp::Eq, config.link_group)
            .ct_state(STATE_NEW)
            .drop("unleased");
    });
    for net in [Net::V4(config.stream4), Net::V6(config.stream6)] {
        b.rule("stream_mark", |r| {
            r.ct_state(STATE_NEW).saddr_in(net).drop("unleased")
        });
    }
    for class in &config.classes {
        let n = u32::from(class.number) << plan::MARK_CLASS_SHIFT;
        b.rule("new_flow", |r| {
            r.ct_mark(R0)
                .and(R0, &(0xff_u32 << plan::MARK_CLASS_SHIFT).to_ne_bytes())
                .cmp(R0, Cmp::Eq, &n.to_ne_bytes())
                .ct_mark(R0)
                .ct_count_over(&format!("flows_{}", class.number), R0, class.flow_cap)
                .drop("flow_cap");
        });
    }
    for (family, suffix) in [(libc::AF_INET, "4"), (libc::AF_INET6, "6")] {
        for (proto, name) in [(libc::IPPROTO_TCP, "tcp"), (libc::IPPROTO_UDP, "udp")] {
            b.rule("new_flow", |r| {
                r.family(family)
                    .l4proto(proto)
                    .object(7, &format!("{name}{suffix}"));
            });
        }
    }
}

fn forward(b: &mut Batch<'_>, config: &Config) {
    let group = config.link_group;
    b.rule("fwd", |r| {
        r.meta_is(Meta::IifGroup, Cmp::Eq, group)
            .verdict(Verdict::Goto("fwd_out"));
    });
    b.rule("fwd", |r| {
        r.meta_is(Meta::OifGroup, Cmp::Eq, group)
            .verdict(Verdict::Goto("fwd_in"));
    });
    b.rule("fwd_out", |r| {
        r.meta_is(Meta::OifGroup, Cmp::Eq, group)
            .drop("client_to_client")
    });
    for (chain, way) in [("fwd_out", Meta::Oif), ("fwd_in", Meta::Iif)] {
        b.rule(chain, |r| {
            r.meta(way, R0)
                .lookup("uplinks", R0, true)
                .drop("no_uplink")
        });
        b.rule(chain, |r| r.ct_state(STATE_INVALID).drop("invalid"));
        b.rule(chain, |r| {
            r.clamp_mss();
        });
    }
    b.rule("fwd_out", |r| {
        r.owned(Meta::Iif).verdict(Verdict::Accept);
    });
    b.rule("fwd_out", |r| r.drop("unleased"));
    for v6 in [false, true] {
        b.rule("fwd_in", |r| {
            r.owned(Meta::Oif)
                .ct_state(ESTABLISHED_RELATED)
                .slot_key(Meta::Oif, v6, false)
                .lookup(if v6 { "back6" } else { "back4" }, R0, false)
                .verdict(Verdict::Accept);
        });
    }
    b.rule("fwd_in", |r| r.drop("unleased"));
}

/// The host itself: clients cannot talk to it, and it tells them of errors alone.
fn host(b: &mut Batch<'_>, config: &Config) {
    let group = config.link_group;
    b.rule("in", |r| {
        r.meta_is(Meta::IifGroup, Cmp::Eq, group).drop("to_host")
    });
    for (proto, types) in [
        (libc::IPPROTO_ICMP, &[3, 11, 12][..]),
        (PROTO_ICMP6, &[1, 2, 3, 4][..]),
    ] {
        for kind in types {
            b.rule("out", |r| {
                r.meta_is(Meta::OifGroup, Cmp::Eq, group)
                    .l4proto(proto)
                    .payload(Base::Transport, 0, 1, R0)
                    .cmp(R0, Cmp::Eq, &[*kind])
                    .verdict(Verdict::Accept);
            });
        }
    }
    b.rule("out", |r| {
        r.meta_is(Meta::OifGroup, Cmp::Eq, group)
            .drop("host_chatter")
    });
    for net in [Net::V4(config.stream4), Net::V6(config.stream6)] {
        b.rule("out", |r| {
            r.saddr_in(net)
                .meta(Meta::Oif, R0)
                .lookup("uplinks", R0, true)
                .drop("no_uplink");
        });
        b.rule("out", |r| {
            r.saddr_in(net).clamp_mss();
        });
        b.rule("out", |r| {
            r.leased().saddr_in(net).verdict(Verdict::Accept);
        });
        b.rule("out", |r| r.saddr_in(net).drop("unleased"));
    }
}

fn masquerade(b: &mut Batch<'_>, config: &Config) {
    for net in own_nets(config) {
        for proto in [libc::IPPROTO_TCP, libc::IPPROTO_UDP] {
            b.rule("post", |r| {
                r.saddr_in(net)
                    .meta(Meta::Oif, R0)
                    .lookup("uplinks", R0, false)
                    .l4proto(proto)
                    .masquerade_ports(config.nat_low, config.nat_high);
            });
        }
        b.rule("post", |r| {
            r.saddr_in(net)
                .meta(Meta::Oif, R0)
                .lookup("uplinks", R0, false)
                .masquerade();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_merge_and_close() {
        let out = intervals([(0_u128, 8), (1 << 24, 8), (240 << 24, 4)].into_iter(), 4);
        let flat: Vec<(Vec<u8>, bool)> = out
            .into_iter()
            .map(|(k, d)| (k, matches!(d, Data::End)))
            .collect();
        assert_eq!(
            flat,
            [
                (vec![0, 0, 0, 0], false),
                (vec![2, 0, 0, 0], true),
                (vec![240, 0, 0, 0], false),
            ]
        );
    }

    #[test]
    fn masks_have_their_length() {
        assert_eq!(mask(24, 4), [255, 255, 255, 0]);
        assert_eq!(mask(10, 4), [255, 0xc0, 0, 0]);
        assert_eq!(mask(112, 16)[14..], [0, 0]);
        assert_eq!(mask(0, 4), [0; 4]);
    }

    fn config() -> Config {
        crate::config::tests_support::example()
    }

    /// Runs in a network namespace of its own.
    fn isolated<T: Send>(f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|s| {
            s.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                f()
            })
            .join()
            .unwrap()
        })
    }

    #[test]
    fn the_kernel_takes_the_table_and_counts_its_rules() {
        isolated(|| {
            let mut k = Kernel::open().unwrap();
            let lease = Element {
                slot: 3,
                index: 9,
                class: 0,
                streams: true,
            };
            let rules = install(&mut k, &config(), &[7], &[lease]).unwrap();
            assert_eq!(rules_present(&mut k).unwrap(), rules);
            assert_eq!(
                install(&mut k, &config(), &[7], &[]).unwrap(),
                rules,
                "again"
            );
            add_lease(&mut k, &config(), lease).unwrap();
            assert!(add_lease(&mut k, &config(), Element { class: 9, ..lease }).is_err());
            remove_lease(&mut k, &config(), lease).unwrap();
            remove_lease(&mut k, &config(), lease).unwrap();
            set_uplinks(&mut k, &[4, 5]).unwrap();
            remove(&mut k).unwrap();
            remove(&mut k).unwrap();
            assert_eq!(rules_present(&mut k).unwrap(), 0);
        });
    }
}
