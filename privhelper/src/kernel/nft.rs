//! A small language for one nf_tables table, and what it means in netlink.
//!
//! One statement a line, as a line of `nft` would read; `//` begins a comment:
//!
//! ```text
//! counters NAME...                       one named counter each
//! timeouts NAME FAMILY PROTOCOL SECONDS...   a timeout object, by state
//! set NAME KEY [verdict|mark] [counter] [interval] [count]
//! nets SET PREFIX...                     elements of an interval set
//! protocols SET NUMBER...                elements of a set of protocols
//! chain NAME [TYPE HOOK PRIORITY]
//! CHAIN: TERM, TERM...                   a rule
//! ```
//!
//! A term compares a field, looks one up, or acts: see [`term`]. A field that
//! is part of a network header guards itself: in an inet table the bytes may be
//! the other family's. Numbers in attributes are big-endian; what a register holds for an
//! interface, a mark or a state is native-endian, as the kernel loads it.

use std::io;

use super::Kernel;
use super::netlink::{attr, be, message, nest, text};
use crate::net::Net;

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
const NEW_ELEMENT: u16 = 12;
const DEL_ELEMENT: u16 = 14;
const NEW_OBJECT: u16 = 18;
/// Attribute: the table's name, in every message.
pub(crate) const TABLE: u16 = 1;
/// Attribute: what user space keeps with a table.
pub(crate) const USERDATA: u16 = 6;
const CREATE: libc::c_int = libc::NLM_F_CREATE;
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

/// What loads a field.
#[derive(Clone, Copy)]
enum Source {
    Meta(u32),
    Ct(u32),
    /// The type of an address, as the routing table has it.
    Fib(u32),
    /// Of the network header (1) or the transport header (2), from this byte on.
    Header(u32, u32),
}

/// The fields of a packet: name, source, width. What ends in 4 or 6 is of that family alone.
const FIELDS: [(&str, Source, usize); 19] = [
    ("iif", Source::Meta(4), 4),
    ("oif", Source::Meta(5), 4),
    ("nfproto", Source::Meta(15), 1),
    ("l4proto", Source::Meta(16), 1),
    ("iifgroup", Source::Meta(21), 4),
    ("oifgroup", Source::Meta(22), 4),
    ("ctstate", Source::Ct(0), 4),
    ("ctmark", Source::Ct(3), 4),
    ("saddrtype", Source::Fib(1), 4),
    ("daddrtype", Source::Fib(2), 4),
    ("words4", Source::Header(1, 0), 1),
    ("saddr4", Source::Header(1, 12), 4),
    ("daddr4", Source::Header(1, 16), 4),
    ("nexthdr6", Source::Header(1, 6), 1),
    ("saddr6", Source::Header(1, 8), 16),
    ("daddr6", Source::Header(1, 24), 16),
    ("icmptype", Source::Header(2, 0), 1),
    ("dport", Source::Header(2, 2), 2),
    ("tcpflags", Source::Header(2, 13), 1),
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

const HOOKS: [&str; 5] = ["prerouting", "input", "forward", "output", "postrouting"];

fn expr(name: &str, attrs: &[Vec<u8>]) -> Vec<u8> {
    nest(1, &[text(1, name), nest(2, attrs)])
}

fn value(kind: u16, bytes: &[u8]) -> Vec<u8> {
    nest(kind, &[attr(1, bytes)])
}

fn verdict_data(code: i32, chain: &str) -> Vec<u8> {
    let chain = if chain.is_empty() {
        Vec::new()
    } else {
        text(2, chain)
    };
    nest(2, &[nest(2, &[be(1, code.cast_unsigned()), chain])])
}

fn verdict(code: i32, chain: &str) -> Vec<u8> {
    expr(
        "immediate",
        &[be(1, VERDICT_REGISTER), verdict_data(code, chain)],
    )
}

fn object(kind: u32, name: &str) -> Vec<u8> {
    expr("objref", &[be(1, kind), text(2, name)])
}

fn cmp(op: u32, bytes: &[u8]) -> Vec<u8> {
    expr("cmp", &[be(1, R0), be(2, op), value(3, bytes)])
}

fn and(reg: u32, mask: &[u8]) -> Vec<u8> {
    let (len, zero) = (mask.len() as u32, vec![0; mask.len()]);
    expr(
        "bitwise",
        &[
            be(1, reg),
            be(2, reg),
            be(3, len),
            value(4, mask),
            value(5, &zero),
        ],
    )
}

fn lookup(set: &str, rest: Vec<u8>) -> Vec<u8> {
    expr("lookup", &[text(1, set), be(2, R0), rest])
}

fn number(s: &str) -> Option<u32> {
    match s.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => s.parse().ok(),
    }
}

/// The first bits of so many bytes.
fn mask(len: u8, width: usize) -> Vec<u8> {
    let bits = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
    bits.to_be_bytes()[..width].to_vec()
}

/// One field, maybe masked: `NAME`, `NAME/LENGTH` or `NAME&BITS`.
struct Field {
    from: Source,
    width: usize,
    family: Option<char>,
    mask: Option<Vec<u8>>,
}

impl Field {
    fn parse(s: &str) -> Option<Field> {
        let name = s.split(['/', '&']).next()?;
        let &(_, from, width) = FIELDS.iter().find(|f| f.0 == name)?;
        let mut field = Field {
            from,
            width,
            family: name.chars().last(),
            mask: None,
        };
        field.family.take_if(|c| !c.is_ascii_digit());
        field.mask = match (s.split_once('/'), s.split_once('&')) {
            (Some((_, len)), _) => Some(mask(len.parse().ok()?, width)),
            (_, Some((_, bits))) => Some(field.bytes(number(bits)?)),
            _ => None,
        };
        Some(field)
    }

    /// A number as the field's register holds it.
    fn bytes(&self, n: u32) -> Vec<u8> {
        match self.width {
            4 => n.to_ne_bytes().to_vec(),
            width => n.to_be_bytes()[4 - width.min(4)..].to_vec(),
        }
    }

    fn guard(&self) -> Vec<u8> {
        let family = self.family.and_then(|c| term(&format!("ip{c}")));
        family.unwrap_or_default()
    }

    fn load(&self, reg: u32) -> Vec<u8> {
        let load = match self.from {
            Source::Meta(key) => expr("meta", &[be(1, reg), be(2, key)]),
            Source::Ct(key) => expr("ct", &[be(1, reg), be(2, key)]),
            Source::Fib(of) => expr("fib", &[be(1, reg), be(2, 3), be(3, of)]),
            Source::Header(base, at) => {
                let len = self.width as u32;
                expr("payload", &[be(1, reg), be(2, base), be(3, at), be(4, len)])
            }
        };
        let masked = self.mask.as_ref().map(|m| and(reg, m));
        [load, masked.unwrap_or_default()].concat()
    }
}

/// Fields side by side from the first register on: `FIELD.FIELD`.
fn key(s: &str) -> Option<Vec<u8>> {
    let fields: Vec<Field> = s.split('.').map(Field::parse).collect::<Option<_>>()?;
    let guards = fields.iter().map(Field::guard);
    let loads = (R0..).zip(&fields).map(|(reg, f)| f.load(reg));
    Some(guards.chain(loads).collect::<Vec<_>>().concat())
}

/// The expressions of one term; `None` when it makes no sense.
fn term(s: &str) -> Option<Vec<u8>> {
    if let Some((_, long)) = SHORT.iter().find(|(short, _)| *short == s) {
        return term(long);
    }
    let words: Vec<&str> = s.split_whitespace().collect();
    Some(match words[..] {
        ["accept"] => verdict(ACCEPT, ""),
        // Counts by reason.
        ["drop", reason] => [object(COUNTER, reason), verdict(DROP, "")].concat(),
        ["jump", chain] => verdict(JUMP, chain),
        ["goto", chain] => verdict(GOTO, chain),
        ["timeout", name] => object(TIMEOUT, name),
        [fields, "in", set] => [key(fields)?, lookup(set, vec![])].concat(),
        [fields, "notin", set] => [key(fields)?, lookup(set, be(5, 1))].concat(),
        // Takes the verdict the map holds for the key, or goes on.
        [fields, "vmap", map] => [key(fields)?, lookup(map, be(3, VERDICT_REGISTER))].concat(),
        // Marks the flow with what the map holds for the key.
        [fields, "marks", map] => {
            let set = expr("ct", &[be(2, 3), be(4, R0)]);
            [key(fields)?, lookup(map, be(3, R0)), set].concat()
        }
        // True when the set counts more flows than this with the same key.
        [fields, "counts", set, "over", most] => {
            let limit = nest(2, &[be(1, number(most)?), be(2, 1)]);
            let count = nest(7, &[text(1, "connlimit"), limit]);
            [
                key(fields)?,
                expr("dynset", &[text(1, set), be(3, 0), be(4, R0), count]),
            ]
            .concat()
        }
        // Lowers the segment size a SYN offers to what the path carries.
        ["clamp-segments"] => [
            term("tcp")?,
            term("tcpflags&6 = 2")?,
            expr("rt", &[be(1, R0), be(2, 3)]),
            expr(
                "byteorder",
                &[be(1, R0), be(2, R0), be(3, 1), be(4, 2), be(5, 2)],
            ),
            expr(
                "exthdr",
                &[be(7, R0), attr(2, &[2]), be(3, 2), be(4, 2), be(6, 1)],
            ),
        ]
        .concat(),
        // To ports nobody here listens on, in an order nobody can guess.
        ["masquerade", low, high] => {
            const PORTS_GIVEN: u32 = 1 << 1;
            const FULLY_RANDOM: u32 = 1 << 4;
            let port = |reg, port: &str| {
                let port: u16 = port.parse().ok()?;
                Some(expr(
                    "immediate",
                    &[be(1, reg), value(2, &port.to_be_bytes())],
                ))
            };
            let how = [be(1, PORTS_GIVEN | FULLY_RANDOM), be(2, R0), be(3, R0 + 1)];
            [port(R0, low)?, port(R0 + 1, high)?, expr("masq", &how)].concat()
        }
        ["masquerade"] => expr("masq", &[]),
        // A prefix says which family's field is meant.
        [field, "=", prefix] if prefix.contains('/') => {
            let net: Net = prefix.parse().ok()?;
            let family = if net.width() == 32 { 4 } else { 6 };
            [
                key(&format!("{field}{family}/{}", net.len))?,
                cmp(0, &net.octets()),
            ]
            .concat()
        }
        [field, op, n] => {
            let op = ["=", "!=", "<", "<=", ">", ">="]
                .iter()
                .position(|o| *o == op)?;
            let bytes = Field::parse(field)?.bytes(number(n)?);
            [key(field)?, cmp(op as u32, &bytes)].concat()
        }
        _ => return None,
    })
}

/// An element of a set or map; `data` is empty, [`mark_data`] or [`goto_data`].
pub(crate) fn element(key: &[u8], data: &[u8]) -> Vec<u8> {
    nest(1, &[value(1, key), data.to_vec()])
}

pub(crate) fn mark_data(mark: u32) -> Vec<u8> {
    value(2, &mark.to_ne_bytes())
}

pub(crate) fn goto_data(chain: &str) -> Vec<u8> {
    verdict_data(GOTO, chain)
}

/// Interval sets hold the first address of each range and, flagged, the one
/// after its last. Ranges that touch are one.
fn intervals(mut nets: Vec<Net>) -> Vec<(Vec<u8>, bool)> {
    nets.sort_unstable_by_key(|n| n.bits());
    let mut out = Vec::new();
    for net in nets {
        let start = net.octets();
        if out.last() == Some(&(start.clone(), true)) {
            out.pop();
        } else {
            out.push((start, false));
        }
        let size = 1_u128 << (net.width() - net.len);
        let next = net.bits().checked_add(size).unwrap_or(0);
        if next.trailing_zeros() < net.width().into() {
            out.push((net.at(size, net.len).octets(), true));
        }
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

    fn put(&mut self, op: u16, flags: libc::c_int, attrs: &[Vec<u8>]) {
        let attrs = [&[text(TABLE, NAME)], attrs].concat();
        self.bytes
            .extend(message(SUBSYSTEM | op, flags, &INET, &attrs));
    }

    pub(crate) fn new_table(&mut self, comment: &str) {
        let len = u8::try_from(comment.len() + 1).unwrap_or_default();
        let data = [&[0, len], comment.as_bytes(), &[0]].concat();
        self.put(NEW_TABLE, CREATE, &[be(2, 0), attr(USERDATA, &data)]);
    }

    pub(crate) fn delete_table(&mut self) {
        self.put(DEL_TABLE, 0, &[]);
    }

    pub(crate) fn add(&mut self, set: &str, elements: &[Vec<u8>]) {
        self.elements(NEW_ELEMENT, CREATE, set, elements);
    }

    pub(crate) fn remove(&mut self, set: &str, elements: &[Vec<u8>]) {
        self.elements(DEL_ELEMENT, 0, set, elements);
    }

    /// Removes every element.
    pub(crate) fn clear(&mut self, set: &str) {
        self.put(DEL_ELEMENT, 0, &[text(2, set)]);
    }

    fn elements(&mut self, op: u16, flags: libc::c_int, set: &str, elements: &[Vec<u8>]) {
        for some in elements.chunks(ELEMENTS) {
            self.put(op, flags, &[text(2, set), nest(3, some)]);
        }
    }

    /// Adds what a text in the language says.
    pub(crate) fn compile(&mut self, text: &str) -> io::Result<()> {
        for line in text.lines().map(str::trim) {
            if !line.is_empty() && !line.starts_with("//") && self.statement(line).is_none() {
                return Err(io::Error::other(format!(
                    "no statement for the table: {line}"
                )));
            }
        }
        Ok(())
    }

    fn statement(&mut self, line: &str) -> Option<()> {
        if let Some((chain, terms)) = line.split_once(": ") {
            let terms: Vec<_> = terms.split(", ").map(term).collect::<Option<_>>()?;
            self.rules += 1;
            let flags = CREATE | libc::NLM_F_APPEND;
            self.put(NEW_RULE, flags, &[text(2, chain), nest(4, &terms)]);
            return Some(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["counters", ref names @ ..] => {
                let zero = nest(4, &[attr(1, &[0; 8]), attr(2, &[0; 8])]);
                for name in names {
                    self.put(
                        NEW_OBJECT,
                        CREATE,
                        &[text(2, name), be(3, COUNTER), zero.clone()],
                    );
                }
            }
            ["timeouts", name, family, proto, ref seconds @ ..] => {
                let states = (1..)
                    .zip(seconds)
                    .map(|(state, s)| Some(be(state, number(s)?)));
                let states: Vec<_> = states.collect::<Option<_>>()?;
                let family = attr(1, &family.parse::<u16>().ok()?.to_be_bytes());
                let proto = attr(2, &[proto.parse().ok()?]);
                let data = nest(4, &[family, proto, nest(3, &states)]);
                self.put(NEW_OBJECT, CREATE, &[text(2, name), be(3, TIMEOUT), data]);
            }
            ["set", name, key, ref features @ ..] => self.set(name, key, features)?,
            ["nets", set, ref nets @ ..] => {
                let nets = nets.iter().map(|n| n.parse().ok()).collect::<Option<_>>()?;
                let end = |last: bool| if last { be(3, 1) } else { Vec::new() };
                let all = intervals(nets)
                    .into_iter()
                    .map(|(k, last)| element(&k, &end(last)));
                self.add(set, &all.collect::<Vec<_>>());
            }
            ["protocols", set, ref numbers @ ..] => {
                let all = numbers
                    .iter()
                    .map(|n| Some(element(&[n.parse().ok()?], &[])));
                self.add(set, &all.collect::<Option<Vec<_>>>()?);
            }
            ["chain", name] => self.put(NEW_CHAIN, CREATE, &[text(3, name)]),
            ["chain", name, kind, hook, priority] => {
                let hook = HOOKS.iter().position(|h| *h == hook)? as u32;
                let priority: i32 = priority.parse().ok()?;
                let place = nest(4, &[be(1, hook), be(2, priority.cast_unsigned())]);
                self.put(
                    NEW_CHAIN,
                    CREATE,
                    &[text(3, name), place, be(5, ACCEPT as u32), text(7, kind)],
                );
            }
            _ => return None,
        }
        Some(())
    }

    fn set(&mut self, name: &str, key: &str, features: &[&str]) -> Option<()> {
        let of = |name: &str| TYPES.iter().find(|t| t.0 == name).map(|t| (t.1, t.2));
        let parts: Vec<_> = key.split('.').map(of).collect::<Option<_>>()?;
        let kind = parts.iter().fold(0, |all, part| all << 6 | part.0);
        let len = parts.iter().map(|p| p.1).sum();
        let (mut flags, mut rest) = (0, Vec::new());
        self.sets += 1;
        let id = be(10, self.sets);
        for feature in features {
            let (flag, attrs) = match *feature {
                "interval" => (0x04, vec![]),
                "verdict" => (0x08, vec![be(6, 0xffff_ff00)]),
                "mark" => (0x08, vec![be(6, of("mark")?.0), be(7, 4)]),
                "count" => (0x20, vec![nest(9, &[be(1, 65_535)])]),
                "counter" => (0, vec![nest(17, &[text(1, "counter"), nest(2, &[])])]),
                _ => return None,
            };
            flags |= flag;
            rest.extend(attrs);
        }
        let attrs = [text(2, name), be(3, flags), be(4, kind), be(5, len), id];
        self.put(NEW_SET, CREATE, &[&attrs, &rest[..]].concat());
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::{attr_of, attrs, messages, text_of};

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
        let names: Vec<_> = attrs(expressions)
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
            "nets s 10.0.0.0",
            "protocols s 256",
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
