//! A small language for one nf_tables table, and what it means in netlink.
//!
//! One statement a line, as a line of `nft` would read; `//` begins a comment:
//!
//! ```text
//! counters NAME...                       one named counter each
//! timeouts NAME FAMILY PROTOCOL SECONDS...   a timeout object, by state
//! set NAME KEY [verdict|mark] [counter] [interval] [count]
//! elements SET VALUE...                  prefixes, or numbers of one byte
//! chain NAME TYPE HOOK PRIORITY          one the kernel calls
//! chains NAME...                         those that others call
//! CHAIN: TERM, TERM...                   a rule
//! ```
//!
//! A term compares a field, looks one up, or acts: see [`term`]. A field that
//! is part of a network header guards itself: in an inet table the bytes may be
//! the other family's. Numbers in attributes are big-endian; what a register holds for an
//! interface, a mark or a state is native-endian, as the kernel loads it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Kernel;
use super::netlink::message;
use crate::plan::octets;
use ipnet::IpNet;

/// Table of this name, of family inet.
pub(crate) const NAME: &str = "rvpn";
pub(crate) const INET: [u8; 4] = [1, 0, 0, 0];
pub(crate) const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
pub(crate) const GET_TABLE: u16 = 1;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
pub(crate) const NEW_ELEMENT: u16 = 12;
pub(crate) const DEL_ELEMENT: u16 = 14;
const NEW_OBJECT: u16 = 18;
/// Attribute: the table's name, in every message.
pub(crate) const TABLE: u16 = 1;
/// Attribute: what user space keeps with a table.
pub(crate) const USERDATA: u16 = 6;
/// Elements per message: a nested attribute holds at most 64 KiB.
const ELEMENTS: usize = 500;

/// First of the four-byte registers; the others follow.
const R0: u32 = 8;
const VERDICT_REGISTER: u32 = 0;
const ACCEPT: i32 = 1;
const DROP: i32 = 0;
const JUMP: i32 = -3;
const GOTO: i32 = -4;
const COUNTER: u32 = 1;
const TIMEOUT: u32 = 7;

/// A field of a packet: its name, the expression that loads it, that one's
/// attributes from the second on, its width. What ends in 4 or 6 is of that family
/// alone. `payload` takes from the network header (1) or the transport header (2).
type Field = (&'static str, &'static str, &'static [u32], usize);

const FIELDS: [Field; 20] = [
    ("iif", "meta", &[4], 4),
    ("oif", "meta", &[5], 4),
    ("nfproto", "meta", &[15], 1),
    ("l4proto", "meta", &[16], 1),
    ("iifgroup", "meta", &[21], 4),
    ("oifgroup", "meta", &[22], 4),
    ("ctstate", "ct", &[0], 4),
    ("ctmark", "ct", &[3], 4),
    ("saddrtype", "fib", &[3, 1], 4),
    ("daddrtype", "fib", &[3, 2], 4),
    ("words4", "payload", &[1, 0, 1], 1),
    ("saddr4", "payload", &[1, 12, 4], 4),
    ("daddr4", "payload", &[1, 16, 4], 4),
    ("nexthdr6", "payload", &[1, 6, 1], 1),
    ("saddr6", "payload", &[1, 8, 16], 16),
    ("shost6", "payload", &[1, 22, 2], 2),
    ("daddr6", "payload", &[1, 24, 16], 16),
    ("icmptype", "payload", &[2, 0, 1], 1),
    ("dport", "payload", &[2, 2, 2], 2),
    ("tcpflags", "payload", &[2, 13, 1], 1),
];

/// Terms that stand for others: a packet's family and protocol.
const SHORT: [(&str, &str); 6] = [
    ("ip4", "nfproto = 2"),
    ("ip6", "nfproto = 10"),
    ("tcp", "l4proto = 6"),
    ("udp", "l4proto = 17"),
    ("icmp", "l4proto = 1"),
    ("icmp6", "l4proto = 58"),
];

/// Types `nft` shows elements by: name, number, width.
const TYPES: [(&str, u32, u32); 5] = [
    ("ipv4", 7, 4),
    ("ipv6", 8, 16),
    ("protocol", 12, 1),
    ("mark", 19, 4),
    ("ifindex", 20, 4),
];

/// In the kernel's order.
const COMPARISONS: [&str; 6] = ["=", "!=", "<", "<=", ">", ">="];
const HOOKS: [&str; 5] = ["prerouting", "input", "forward", "output", "postrouting"];

/// One expression: its name, then its attributes.
macro_rules! expr {
    ($name:expr $(, $kind:expr => $payload:expr)*) => {
        attrs![1 => attrs![1 => $name, 2 => attrs![$($kind => $payload),*]]]
    };
}

fn verdict(code: i32, chain: &str) -> Vec<u8> {
    let code = attrs![1 => code.cast_unsigned()];
    let chain = (!chain.is_empty()).then(|| attrs![2 => chain]);
    [code, chain.unwrap_or_default()].concat()
}

fn end(code: i32, chain: &str) -> Vec<u8> {
    expr!("immediate", 1 => VERDICT_REGISTER, 2 => attrs![2 => verdict(code, chain)])
}

fn object(kind: u32, name: &str) -> Vec<u8> {
    expr!("objref", 1 => kind, 2 => name)
}

fn cmp(op: u32, bytes: &[u8]) -> Vec<u8> {
    expr!("cmp", 1 => R0, 2 => op, 3 => attrs![1 => bytes])
}

fn and(reg: u32, mask: &[u8]) -> Vec<u8> {
    let (len, zero) = (mask.len() as u32, &vec![0; mask.len()][..]);
    expr!("bitwise", 1 => reg, 2 => reg, 3 => len, 4 => attrs![1 => mask], 5 => attrs![1 => zero])
}

fn number(s: &str) -> Option<u32> {
    match s.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => s.parse().ok(),
    }
}

/// The first bits of so many bytes.
fn mask(len: u8, width: usize) -> Vec<u8> {
    let bits = u128::MAX.checked_shl(128_u32.saturating_sub(len.into()));
    let bits = bits.unwrap_or(0);
    bits.to_be_bytes()[..width].to_vec()
}

fn field(s: &str) -> Option<Field> {
    let name = s.split(['/', '&']).next()?;
    FIELDS.into_iter().find(|f| f.0 == name)
}

/// A number as the register of a field of this width holds it.
fn held(n: u32, width: usize) -> Vec<u8> {
    match width {
        4 => n.to_ne_bytes().to_vec(),
        _ => n.to_be_bytes()[4 - width.min(4)..].to_vec(),
    }
}

/// Loads fields side by side from the first register on: `FIELD.FIELD`, each
/// maybe masked as `NAME/LENGTH` or `NAME&BITS`.
fn key(s: &str) -> Option<Vec<u8>> {
    let (mut guards, mut loads) = (Vec::new(), Vec::new());
    for (reg, part) in (R0..).zip(s.split('.')) {
        let (name, expression, values, width) = field(part)?;
        if let Some(family @ ('4' | '6')) = name.chars().last() {
            guards.extend(term(&format!("ip{family}"))?);
        }
        let values = (2..).zip(values).map(|(kind, v)| attrs![kind => *v]);
        let all = [attrs![1 => reg], values.flatten().collect()].concat();
        loads.extend(attrs![1 => attrs![1 => expression, 2 => all]]);
        if let Some((_, len)) = part.split_once('/') {
            loads.extend(and(reg, &mask(len.parse().ok()?, width)));
        } else if let Some((_, bits)) = part.split_once('&') {
            loads.extend(and(reg, &held(number(bits)?, width)));
        }
    }
    Some([guards, loads].concat())
}

/// The expressions of one term; `None` when it makes no sense.
fn term(s: &str) -> Option<Vec<u8>> {
    if let Some((_, long)) = SHORT.iter().find(|(short, _)| *short == s) {
        return term(long);
    }
    let words: Vec<&str> = s.split_whitespace().collect();
    let parts = match words[..] {
        ["accept"] => vec![end(ACCEPT, "")],
        // Counts by reason.
        ["drop", reason] => vec![object(COUNTER, reason), end(DROP, "")],
        ["jump", chain] => vec![end(JUMP, chain)],
        ["goto", chain] => vec![end(GOTO, chain)],
        ["timeout", name] => vec![object(TIMEOUT, name)],
        [fields, "in", set] => vec![key(fields)?, expr!("lookup", 1 => set, 2 => R0)],
        [fields, "notin", set] => vec![key(fields)?, expr!("lookup", 1 => set, 2 => R0, 5 => 1)],
        // Takes the verdict the map holds for the key, or goes on.
        [fields, "vmap", map] => {
            let look = expr!("lookup", 1 => map, 2 => R0, 3 => VERDICT_REGISTER);
            vec![key(fields)?, look]
        }
        // Marks the flow with what the map holds for the key.
        [fields, "marks", map] => {
            let look = expr!("lookup", 1 => map, 2 => R0, 3 => R0);
            vec![key(fields)?, look, expr!("ct", 2 => 3, 4 => R0)]
        }
        // True when the set counts more flows than this with the same key.
        [fields, "counts", set, "over", most] => {
            let limit = attrs![1 => "connlimit", 2 => attrs![1 => number(most)?, 2 => 1]];
            let count = expr!("dynset", 1 => set, 3 => 0, 4 => R0, 7 => limit);
            vec![key(fields)?, count]
        }
        // Lowers the segment size a SYN offers to what the path carries.
        ["clamp-segments"] => vec![
            term("tcp")?,
            term("tcpflags&6 = 2")?,
            expr!("rt", 1 => R0, 2 => 3),
            expr!("byteorder", 1 => R0, 2 => R0, 3 => 1, 4 => 2, 5 => 2),
            expr!("exthdr", 7 => R0, 2 => &[2][..], 3 => 2, 4 => 2, 6 => 1),
        ],
        // To ports nobody here listens on, in an order nobody can guess.
        ["masquerade", low, high] => {
            const PORTS_GIVEN: u32 = 1 << 1;
            const FULLY_RANDOM: u32 = 1 << 4;
            let port = |p: &str| Some(attrs![1 => &p.parse::<u16>().ok()?.to_be_bytes()[..]]);
            vec![
                expr!("immediate", 1 => R0, 2 => port(low)?),
                expr!("immediate", 1 => R0 + 1, 2 => port(high)?),
                expr!("masq", 1 => PORTS_GIVEN | FULLY_RANDOM, 2 => R0, 3 => R0 + 1),
            ]
        }
        ["masquerade"] => vec![expr!("masq")],
        // A prefix says which family's field is meant.
        [field, "=", prefix] if prefix.contains('/') => {
            let net = prefix.parse().ok().filter(|n: &IpNet| *n == n.trunc())?;
            let family = if net.max_prefix_len() == 32 { 4 } else { 6 };
            let masked = format!("{field}{family}/{}", net.prefix_len());
            vec![key(&masked)?, cmp(0, &octets(net.addr()))]
        }
        [name, op, n] => {
            let op = COMPARISONS.iter().position(|o| *o == op)? as u32;
            vec![key(name)?, cmp(op, &held(number(n)?, field(name)?.3))]
        }
        _ => return None,
    };
    Some(parts.concat())
}

/// An element of a set or map; `data` is empty, [`mark_data`] or [`goto_data`].
pub(crate) fn element(key: &[u8], data: &[u8]) -> Vec<u8> {
    attrs![1 => [attrs![1 => attrs![1 => key]], data.to_vec()].concat()]
}

pub(crate) fn mark_data(mark: u32) -> Vec<u8> {
    attrs![2 => attrs![1 => mark.to_ne_bytes()]]
}

pub(crate) fn goto_data(chain: &str) -> Vec<u8> {
    attrs![2 => attrs![2 => verdict(GOTO, chain)]]
}

/// Interval sets hold the first address of each range and, flagged, the one
/// after its last. Ranges that touch are one.
fn intervals(nets: Vec<IpNet>) -> Vec<(Vec<u8>, bool)> {
    let mut out = Vec::new();
    for net in IpNet::aggregate(&nets) {
        let start = octets(net.addr());
        if out.last() == Some(&(start.clone(), true)) {
            out.pop();
        } else {
            out.push((start, false));
        }
        let next: Option<IpAddr> = match net.broadcast() {
            IpAddr::V4(a) => u32::from(a)
                .checked_add(1)
                .map(|n| Ipv4Addr::from(n).into()),
            IpAddr::V6(a) => u128::from(a)
                .checked_add(1)
                .map(|n| Ipv6Addr::from(n).into()),
        };
        out.extend(next.map(|next| (octets(next), true)));
    }
    out
}

/// Messages for the table, gathered and then run: applied whole or not at all.
pub(crate) struct Batch {
    bytes: Vec<u8>,
    sets: u32,
    /// Rules added, to compare with what a read-back finds.
    pub(crate) rules: usize,
}

impl Batch {
    pub(crate) fn new() -> Batch {
        let bytes = message(BATCH_BEGIN, 0, &[0, 0, 0, 10], &[]);
        Batch {
            bytes,
            sets: 0,
            rules: 0,
        }
    }

    pub(crate) fn run(self, k: &mut Kernel) -> io::Result<()> {
        let end = message(BATCH_END, 0, &[0, 0, 0, 10], &[]);
        k.filter.transact(self.bytes, &end)
    }

    fn put(&mut self, op: u16, attrs: &[u8]) {
        let removes = [DEL_TABLE, DEL_ELEMENT].contains(&op);
        let adds = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
        let flags = if removes { 0 } else { adds };
        let attrs = [&attrs![TABLE => NAME], attrs].concat();
        let message = message(SUBSYSTEM | op, flags, &INET, &attrs);
        self.bytes.extend(message);
    }

    pub(crate) fn new_table(&mut self, comment: &str) {
        let len = u8::try_from(comment.len() + 1).unwrap_or_default();
        let data = [&[0, len], comment.as_bytes(), &[0]].concat();
        self.put(NEW_TABLE, &attrs![2 => 0, USERDATA => &data[..]]);
    }

    pub(crate) fn delete_table(&mut self) {
        self.put(DEL_TABLE, &[]);
    }

    /// [`NEW_ELEMENT`] or [`DEL_ELEMENT`].
    pub(crate) fn elements(&mut self, op: u16, set: &str, elements: &[Vec<u8>]) {
        for some in elements.chunks(ELEMENTS) {
            self.put(op, &attrs![2 => set, 3 => some.concat()]);
        }
    }

    /// Removes every element.
    pub(crate) fn clear(&mut self, set: &str) {
        self.put(DEL_ELEMENT, &attrs![2 => set]);
    }

    /// Adds what a text in the language says.
    pub(crate) fn compile(&mut self, text: &str) -> io::Result<()> {
        for line in text.lines().map(str::trim) {
            if !line.is_empty() && !line.starts_with("//") && self.statement(line).is_none() {
                let why = format!("no statement for the table: {line}");
                return Err(io::Error::other(why));
            }
        }
        Ok(())
    }

    fn statement(&mut self, line: &str) -> Option<()> {
        if let Some((chain, terms)) = line.split_once(": ") {
            let terms: Vec<_> = terms.split(", ").map(term).collect::<Option<_>>()?;
            let rule = attrs![2 => chain, 4 => terms.concat()];
            self.put(NEW_RULE, &rule);
            self.rules += 1;
            return Some(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["counters", ref names @ ..] => {
                let zero = &[0; 8][..];
                for &name in names {
                    let counter =
                        attrs![2 => name, 3 => COUNTER, 4 => attrs![1 => zero, 2 => zero]];
                    self.put(NEW_OBJECT, &counter);
                }
            }
            ["timeouts", name, family, proto, ref seconds @ ..] => {
                let state = |(state, s): (u16, &&str)| Some(attrs![state => number(s)?]);
                let states: Vec<_> = (1..).zip(seconds).map(state).collect::<Option<_>>()?;
                let family = &family.parse::<u16>().ok()?.to_be_bytes()[..];
                let proto = &[proto.parse().ok()?][..];
                let data = attrs![1 => family, 2 => proto, 3 => states.concat()];
                self.put(NEW_OBJECT, &attrs![2 => name, 3 => TIMEOUT, 4 => data]);
            }
            ["set", name, key, ref features @ ..] => self.set(name, key, features)?,
            ["elements", set, ref values @ ..] => {
                let nets = values.iter().map(|v| v.parse().ok()).collect::<Option<_>>();
                let number = |v: &&str| Some((vec![v.parse::<u8>().ok()?], false));
                let numbers = || values.iter().map(number).collect::<Option<_>>();
                let keys: Vec<_> = nets.map(intervals).or_else(numbers)?;
                let last = |last: bool| if last { attrs![3 => 1] } else { Vec::new() };
                let all = keys.iter().map(|(key, end)| element(key, &last(*end)));
                self.elements(NEW_ELEMENT, set, &all.collect::<Vec<_>>());
            }
            ["chains", ref names @ ..] => {
                for &name in names {
                    self.put(NEW_CHAIN, &attrs![3 => name]);
                }
            }
            ["chain", name, kind, hook, priority] => {
                let hook = HOOKS.iter().position(|h| *h == hook)? as u32;
                let priority = priority.parse::<i32>().ok()?.cast_unsigned();
                let place = attrs![1 => hook, 2 => priority];
                let chain = attrs![3 => name, 4 => place, 5 => ACCEPT.cast_unsigned(), 7 => kind];
                self.put(NEW_CHAIN, &chain);
            }
            _ => return None,
        }
        Some(())
    }

    fn set(&mut self, name: &str, key: &str, features: &[&str]) -> Option<()> {
        let of = |name: &str| TYPES.iter().find(|t| t.0 == name).map(|t| (t.1, t.2));
        let parts: Vec<_> = key.split('.').map(of).collect::<Option<_>>()?;
        let kind = parts.iter().fold(0, |all, part| all << 6 | part.0);
        let len = parts.iter().map(|p| p.1).sum::<u32>();
        let (mut flags, mut rest) = (0, Vec::new());
        for feature in features {
            let (flag, attrs) = match *feature {
                "interval" => (0x04, vec![]),
                "verdict" => (0x08, attrs![6 => 0xffff_ff00]),
                "mark" => (0x08, attrs![6 => of("mark")?.0, 7 => 4]),
                "count" => (0x20, attrs![9 => attrs![1 => 65_535]]),
                "counter" => (0, attrs![17 => attrs![1 => "counter", 2 => attrs![]]]),
                _ => return None,
            };
            flags |= flag;
            rest.extend(attrs);
        }
        self.sets += 1;
        let attrs = attrs![2 => name, 3 => flags, 4 => kind, 5 => len, 10 => self.sets];
        self.put(NEW_SET, &[attrs, rest].concat());
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::{attr_of, attributes, messages, text_of};

    #[test]
    fn a_rule_becomes_its_expressions() {
        let mut batch = Batch::new();
        batch.new_table("note");
        batch.compile("c: iifgroup = 7, drop why").unwrap();
        let bytes = batch.bytes;
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(
            all.iter().map(|m| m.kind).collect::<Vec<_>>(),
            [BATCH_BEGIN, SUBSYSTEM | NEW_TABLE, SUBSYSTEM | NEW_RULE]
        );
        let rule = &all[2].body[4..];
        assert_eq!(attr_of(rule, TABLE), Some(&b"rvpn\0"[..]));
        let expressions = attr_of(rule, 4).unwrap();
        let names: Vec<_> = attributes(expressions)
            .map(|(_, e)| text_of(attr_of(e, 1).unwrap()))
            .collect();
        assert_eq!(names, ["meta", "cmp", "objref", "immediate"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "nothing",
            "c: iifgroup",
            "c: iffgroup = 1",
            "c: iif ~ 1",
            "c: iif = x",
            "c: daddr = 10.0.0.1/8",
            "c: saddr4/x in s",
            "chain c filter nowhere 0",
            "set s ipv5",
            "set s ipv4 verdikt",
            "elements s 10.0.0.0",
            "elements s 256",
            "timeouts t 2 6 soon",
        ] {
            assert!(Batch::new().compile(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn intervals_merge_and_close() {
        let nets = ["0.0.0.0/8", "1.0.0.0/8", "240.0.0.0/4"].map(|n| n.parse().unwrap());
        assert_eq!(
            intervals(nets.to_vec()),
            [
                (vec![0, 0, 0, 0], false),
                (vec![2, 0, 0, 0], true),
                (vec![240, 0, 0, 0], false),
            ]
        );
        let nets = ["2000::/3", "8000::/1"].map(|n| n.parse().unwrap());
        assert_eq!(intervals(nets.to_vec()).len(), 3);
    }

    #[test]
    fn masks_have_their_length() {
        assert_eq!(mask(24, 4), [255, 255, 255, 0]);
        assert_eq!(mask(10, 4), [255, 0xc0, 0, 0]);
        assert_eq!(mask(112, 16)[14..], [0, 0]);
        assert_eq!(mask(0, 4), [0; 4]);
    }
}
