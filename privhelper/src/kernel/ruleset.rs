//! The one nf_tables table, and the elements a lease adds to it.
//!
//! A client's packet meets, in this order: its source against the lease, what
//! every client is refused, its class, its connection mark and flow cap, and
//! the way out. Whatever is dropped is counted by reason. Packets that touch
//! none of our devices and addresses pass through untouched.

use std::collections::BTreeMap;
use std::io;

use super::Kernel;
use super::netlink::{attr_of, message, text_of, unless};
use super::nft::{self, Batch, DEL_ELEMENT, NEW_ELEMENT, element, goto_data, mark_data};
use crate::config::{self, Config};
use crate::plan::{self, Device};

pub(crate) use super::nft::NAME;

/// The table, in the language of [`super::nft`]. A line with a `$word` stands
/// for as many as there are values: `$own` for each network we give addresses
/// from, `$stream` for those of streams, `$v`, `$family` and `$len` for each family, `$class`, `$cap` and `$bits` for each
/// policy class, `$deny` and `$allow` for each entry of its lists.
const TABLE: &str = "
    // Why packets are dropped.
    counters spoofed protocol options not_unicast to_host client_to_client special_purpose
    counters denied_port flow_cap invalid no_uplink unleased from_outside host_chatter
    timeouts tcp$v $family 6 $tcp
    timeouts udp$v $family 17 $udp

    // By device and prefix, which class a client is of; and what comes back to it.
    set lease$v ifindex.ipv$v verdict counter
    set back$v ifindex.ipv$v counter
    // Which flows are a device's: without the class, as a lease resumed in another keeps them.
    set owned ifindex.mark
    set marks ifindex mark
    set stream$v ipv$v verdict counter
    set stream_marks$v ipv$v mark
    set uplinks ifindex
    set special$v ipv$v interval
    set protocols4 protocol
    set headers6 protocol
    set flows_$class mark count

    elements special4 0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12
    elements special4 192.0.0.0/24 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24
    elements special4 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24
    elements special4 224.0.0.0/4 240.0.0.0/4
    // What is not global unicast, and what inside it is not an internet host's.
    elements special6 ::/3 2001::/23 2001:db8::/32 2002::/16 3fff::/20 4000::/2 8000::/1
    elements protocols4 1 6 17
    elements headers6 6 17 44 58

    chain pre filter prerouting -310
    chain mark filter prerouting -150
    chain fwd filter forward 0
    chain in filter input 0
    chain stream_pre filter output -310
    chain stream_mark filter output -150
    chain out filter output 0
    chain post nat postrouting 100
    chains from_client everyone new_flow fwd_out fwd_in class_$class

    // What no client may do, whatever its class.
    everyone: ip4, l4proto notin protocols4, drop protocol
    // The length of the header in words: five, or there are options.
    everyone: words4&0xf != 5, drop options
    everyone: nexthdr6 notin headers6, drop protocol
    everyone: ip6, l4proto notin headers6, drop protocol
    // Beyond echo and errors, ICMPv6 is the link's own business.
    everyone: icmp6, icmptype >= 130, drop protocol
    everyone: daddrtype = 2, drop to_host
    everyone: daddr = $own, drop client_to_client
    everyone: daddrtype != 1, drop not_unicast

    class_$class: jump everyone
    class_$class: $deny, drop denied_port
    class_$class: daddr = $allow, accept
    class_$class: daddr$v in special$v, drop special_purpose
    class_$class: accept

    pre: iifgroup = $group, goto from_client
    // From the wire nothing is addressed to a client: answers come to the uplink's own address.
    pre: iif != 1, daddr = $own, drop from_outside
    // The lease's prefix holds the host's own address too. A stream's source is the host's by intent.
    from_client: saddrtype = 2, drop spoofed
    // The kernel knows the IPv6 one as its own only a moment after it was set: it ends in zero.
    from_client: shost6 = 0, drop spoofed
    from_client: iif.saddr$v/$len vmap lease$v
    from_client: drop spoofed
    stream_pre: saddr$v vmap stream$v
    stream_pre: saddr = $stream, drop unleased

    // Marks a flow with its lease as it begins, counts it against the cap, gives it our timeouts.
    mark: iifgroup = $group, ctstate&8 != 0, iif marks marks, goto new_flow
    // A packet that met its lease in the first chain may find it gone in this one.
    mark: iifgroup = $group, ctstate&8 != 0, drop unleased
    stream_mark: ctstate&8 != 0, saddr$v marks stream_marks$v, goto new_flow
    stream_mark: ctstate&8 != 0, saddr = $stream, drop unleased
    new_flow: ctmark&0xff0000 = $bits, ctmark counts flows_$class over $cap, drop flow_cap
    new_flow: ip$v, tcp, timeout tcp$v
    new_flow: ip$v, udp, timeout udp$v

    fwd: iifgroup = $group, goto fwd_out
    fwd: oifgroup = $group, goto fwd_in
    fwd_out: oifgroup = $group, drop client_to_client
    fwd_out: oif notin uplinks, drop no_uplink
    fwd_out: ctstate&1 != 0, drop invalid
    fwd_out: clamp-segments
    // The flow bears the mark of the lease behind the interface: an ICMP error
    // belongs to the flow it quotes, which may be another client's.
    fwd_out: iif.ctmark&0xff00ffff in owned, accept
    fwd_out: drop unleased
    fwd_in: iif notin uplinks, drop no_uplink
    fwd_in: ctstate&1 != 0, drop invalid
    fwd_in: clamp-segments
    fwd_in: oif.ctmark&0xff00ffff in owned, ctstate&6 != 0, oif.daddr$v/$len in back$v, accept
    fwd_in: drop unleased

    // The host itself: clients cannot talk to it, and it tells them of errors alone.
    in: iifgroup = $group, drop to_host
    out: oifgroup = $group, icmp, icmptype = $error4, accept
    out: oifgroup = $group, icmp6, icmptype = $error6, accept
    out: oifgroup = $group, drop host_chatter
    out: saddr = $stream, oif notin uplinks, drop no_uplink
    out: saddr = $stream, clamp-segments
    // One that began while the lease ended or the table was away bears no mark of
    // ours: no flush would find it, nothing translates it.
    out: ctmark&0xff000000 = 0x52000000, saddr = $stream, accept
    out: saddr = $stream, drop unleased

    post: saddr = $own, oif in uplinks, tcp, masquerade $ports
    post: saddr = $own, oif in uplinks, udp, masquerade $ports
    post: saddr = $own, oif in uplinks, masquerade
";

/// The sets whose elements are leases.
const LEASES: &str =
    "lease4 lease6 back4 back6 marks owned stream4 stream6 stream_marks4 stream_marks6";

/// Each line that holds the first of the words, once for each row of what to put for them.
fn expand(lines: &[String], words: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let fill = |line: &str, row: &Vec<String>| {
        let pairs = words.iter().zip(row);
        pairs.fold(line.to_owned(), |line, (word, text)| {
            line.replace(word, text)
        })
    };
    let each = |line: &String| match line.contains(words[0]) {
        true => rows.iter().map(|row| fill(line, row)).collect(),
        false => vec![line.clone()],
    };
    lines.iter().flat_map(each).collect()
}

/// The table's text for this configuration.
fn table(c: &Config) -> String {
    let (short, own) = (c.tcp_transitory, c.own_nets().map(|n| vec![n.to_string()]));
    let number = |n: u32| vec![n.to_string()];
    // The states in the kernel's order: SYN sent and received, established, then the closing ones.
    let closing = format!(" {short}").repeat(8);
    let tcp = format!("{short} {short} {}{closing}", c.tcp_established);
    let udp = format!("{} {}", c.udp, c.udp_replied);
    let ports = format!("{} {}", c.nat.0, c.nat.1);
    let families = [("4", "2", "24"), ("6", "10", "112")];
    let families = families.map(|(v, number, len)| [v, number, len].map(str::to_owned).to_vec());
    let (mut deny, mut allow, mut classes) = (Vec::new(), Vec::new(), Vec::new());
    for k in &c.classes {
        let class = k.number.to_string();
        for p in &k.deny_ports {
            let ports = format!("{}, dport >= {}, dport <= {}", p.proto, p.low, p.high);
            deny.push(vec![ports, class.clone()]);
        }
        let nets = k.allow.iter().map(|n| vec![n.to_string(), class.clone()]);
        allow.extend(nets);
        let bits = u32::from(k.number) << plan::MARK_CLASS_SHIFT;
        classes.push(vec![class, k.flow_cap.to_string(), bits.to_string()]);
    }
    let mut lines: Vec<String> = TABLE.lines().map(str::to_owned).collect();
    for (words, rows) in [
        (&["$tcp"][..], &[vec![tcp]][..]),
        (&["$udp"], &[vec![udp]]),
        (&["$group"], &[number(c.link_group)]),
        (&["$ports"], &[vec![ports]]),
        (&["$v", "$family", "$len"], &families),
        (&["$own"], &own),
        (&["$stream"], &own[2..]),
        (&["$error4"], &[3, 11, 12].map(number)),
        (&["$error6"], &[1, 2, 3, 4].map(number)),
        (&["$deny", "$class"], &deny),
        (&["$allow", "$class"], &allow),
        (&["$class", "$cap", "$bits"], &classes),
    ] {
        lines = expand(&lines, words, rows);
    }
    lines.join("\n")
}

/// Puts elements of devices' leases into the batch, to be added or taken away.
fn put_leases(batch: &mut Batch, op: u16, c: &Config, devices: &[Device]) {
    let mut sets = BTreeMap::<_, Vec<_>>::new();
    for (d, lease) in devices.iter().filter_map(|d| Some((d, d.lease?))) {
        let (at, a) = (&d.index.to_ne_bytes()[..], plan::addresses(c, d.slot));
        let v4 = &[at, &a.v4.octets()].concat()[..];
        let v6 = &[at, &a.v6.octets()].concat()[..];
        let (stream4, stream6) = (&a.stream4.octets()[..], &a.stream6.octets()[..]);
        let slot = d.mark() & plan::MARK_SLOT_MASK;
        let owner = [at, &slot.to_ne_bytes()].concat();
        let mark = &mark_data(d.mark())[..];
        let goto = &goto_data(&format!("class_{}", lease.class))[..];
        let rows = [
            ("lease4", v4, goto),
            ("lease6", v6, goto),
            ("back4", v4, &[]),
            ("back6", v6, &[]),
            ("marks", at, mark),
            ("owned", &owner, &[]),
            ("stream4", stream4, goto),
            ("stream6", stream6, goto),
            ("stream_marks4", stream4, mark),
            ("stream_marks6", stream6, mark),
        ];
        for (set, key, data) in rows {
            if lease.kind.has_streams() || !set.starts_with("stream") {
                sets.entry(set).or_default().push(element(key, data));
            }
        }
    }
    for (set, elements) in sets {
        batch.elements(op, set, &elements);
    }
}

fn put_uplinks(batch: &mut Batch, uplinks: &[u32]) {
    let one = |i: &u32| element(&i.to_ne_bytes(), &[]);
    let all: Vec<_> = uplinks.iter().map(one).collect();
    batch.clear("uplinks");
    batch.elements(NEW_ELEMENT, "uplinks", &all);
}

pub(crate) fn add_lease(k: &mut Kernel, d: Device) -> io::Result<()> {
    let mut batch = Batch::new();
    put_leases(&mut batch, NEW_ELEMENT, &k.config, &[d]);
    batch.run(k)
}

/// Takes the device's lease out; being out already is fine.
pub(crate) fn remove_lease(k: &mut Kernel, d: Device) -> io::Result<()> {
    let mut batch = Batch::new();
    put_leases(&mut batch, DEL_ELEMENT, &k.config, &[d]);
    unless(libc::ENOENT, batch.run(k))
}

pub(crate) fn set_uplinks(k: &mut Kernel, uplinks: &[u32]) -> io::Result<()> {
    let mut batch = Batch::new();
    put_uplinks(&mut batch, uplinks);
    batch.run(k)
}

/// Removes the table. Creating it first makes the removal of none succeed.
pub(crate) fn remove(k: &mut Kernel) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.new_table("");
    batch.delete_table();
    batch.run(k)
}

/// How many rules the table holds; zero when it is gone.
pub(crate) fn rules_present(k: &mut Kernel) -> io::Result<usize> {
    let (kind, ours) = (nft::SUBSYSTEM | nft::GET_RULE, attrs![nft::TABLE => NAME]);
    let question = message(kind, libc::NLM_F_DUMP, &nft::INET, &ours);
    k.filter
        .ask(question, |_| Some(()))
        .map(|rules| rules.len())
}

/// The comment of the table, if there is one.
fn comment(k: &mut Kernel) -> io::Result<Option<String>> {
    let kind = nft::SUBSYSTEM | nft::GET_TABLE;
    let question = message(kind, libc::NLM_F_DUMP, &nft::INET, &[]);
    let comments = k.filter.ask(question, |body| {
        let attrs = body.get(4..)?;
        let ours = text_of(attr_of(attrs, nft::TABLE)?) == NAME;
        ours.then_some(text_of(attr_of(attrs, nft::USERDATA)?.get(2..)?))
    });
    comments.map(|mut c| c.pop())
}

/// Puts the table in place, live leases included, and returns its number of rules.
/// One of an earlier start with the same configuration stays and only its
/// elements are set anew: to replace a table costs packets for a millisecond.
pub(crate) fn ensure(k: &mut Kernel, uplinks: &[u32], live: &[Device]) -> io::Result<usize> {
    let text = table(&k.config);
    let mut whole = Batch::new();
    whole.compile(&text)?;
    if comment(k)? != Some(fingerprint(&text)) || rules_present(k)? != whole.rules {
        return install(k, uplinks, live);
    }
    let mut batch = Batch::new();
    put_uplinks(&mut batch, uplinks);
    LEASES.split(' ').for_each(|set| batch.clear(set));
    put_leases(&mut batch, NEW_ELEMENT, &k.config, live);
    batch.run(k)?;
    Ok(whole.rules)
}

/// Replaces the whole table in one transaction; returns its number of rules.
pub(crate) fn install(k: &mut Kernel, uplinks: &[u32], live: &[Device]) -> io::Result<usize> {
    #[cfg(feature = "fault-hooks")]
    crate::fault::refuse("install")?;
    let text = table(&k.config);
    let mut batch = Batch::new();
    batch.new_table("");
    batch.delete_table();
    batch.new_table(&fingerprint(&text));
    batch.compile(&text)?;
    put_uplinks(&mut batch, uplinks);
    put_leases(&mut batch, NEW_ELEMENT, &k.config, live);
    let rules = batch.rules;
    batch.run(k).map(|()| rules)
}

/// What the table was made from, as its comment tells a later start.
fn fingerprint(table: &str) -> String {
    let hash = config::hash(table.bytes().chain(env!("CARGO_PKG_VERSION").bytes()));
    format!("made and kept by rvpn-privhelper, configuration {hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests_support::example;
    use crate::plan::Lease;
    use rvpn_ipc::{Key, Kind};
    use std::sync::Arc;

    fn live(slot: u32, index: u32, class: u8, kind: Kind) -> Device {
        let key = Key([1; 16]);
        Device {
            index,
            lease: Some(Lease { key, kind, class }),
            ..Device::new(slot)
        }
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
            let mut k = Kernel::open(&Arc::new(example())).unwrap();
            let lease = live(3, 9, 0, Kind::Both);
            let rules = install(&mut k, &[7], &[lease]).unwrap();
            assert_eq!(rules_present(&mut k).unwrap(), rules);
            assert_eq!(ensure(&mut k, &[7], &[lease]).unwrap(), rules, "kept");
            assert_eq!(install(&mut k, &[7], &[]).unwrap(), rules, "again");
            add_lease(&mut k, lease).unwrap();
            assert!(add_lease(&mut k, live(3, 9, 9, Kind::Both)).is_err());
            remove_lease(&mut k, lease).unwrap();
            remove_lease(&mut k, lease).unwrap();
            set_uplinks(&mut k, &[4, 5]).unwrap();
            remove(&mut k).unwrap();
            remove(&mut k).unwrap();
            assert_eq!(rules_present(&mut k).unwrap(), 0);
        });
    }
}
