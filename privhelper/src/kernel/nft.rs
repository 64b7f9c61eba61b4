//! nf_tables messages: one batch, applied whole or not at all.
//!
//! Numbers in attributes are big-endian; what a register holds for an
//! interface, a mark or a state is native-endian, as the kernel loads it.

use std::io;

use super::netlink::{Buf, Socket};

pub(crate) const FAMILY_INET: u8 = 1;
const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

pub(crate) const NEW_TABLE: u16 = 0;
pub(crate) const GET_TABLE: u16 = 1;
pub(crate) const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const DEL_ELEMENT: u16 = 14;
const NEW_OBJECT: u16 = 18;

pub(crate) const TABLE: u16 = 1;
/// Elements per message: a nested attribute holds at most 64 KiB.
const ELEMENTS: usize = 500;

/// First of the four-byte registers; the others follow.
pub(crate) const R0: u32 = 8;
pub(crate) const R1: u32 = 9;
const VERDICT_REGISTER: u32 = 0;

/// Type numbers `nft` shows elements by.
pub(crate) const TYPE_IPV4: u32 = 7;
pub(crate) const TYPE_IPV6: u32 = 8;
pub(crate) const TYPE_PROTOCOL: u32 = 12;
pub(crate) const TYPE_MARK: u32 = 19;
pub(crate) const TYPE_IFINDEX: u32 = 20;
pub(crate) const fn concat(a: u32, b: u32) -> u32 {
    a << 6 | b
}

pub(crate) const SET_INTERVAL: u32 = 0x04;
pub(crate) const SET_MAP: u32 = 0x08;
pub(crate) const SET_EVAL: u32 = 0x20;

#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Meta {
    Iif = 4,
    Oif = 5,
    NfProto = 15,
    L4Proto = 16,
    IifGroup = 21,
    OifGroup = 22,
}

#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Cmp {
    Eq = 0,
    Ne = 1,
    Le = 3,
    Ge = 5,
}

#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Base {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy)]
pub(crate) enum Verdict<'a> {
    Drop,
    Accept,
    Jump(&'a str),
    Goto(&'a str),
}

impl Verdict<'_> {
    fn put(self, b: &mut Buf) {
        let (code, chain) = match self {
            Verdict::Drop => (0, None),
            Verdict::Accept => (1, None),
            Verdict::Jump(c) => (-3, Some(c)),
            Verdict::Goto(c) => (-4, Some(c)),
        };
        b.nest(2, |b| {
            b.be32(1, i32::cast_unsigned(code));
            if let Some(c) = chain {
                b.text(2, c);
            }
        });
    }
}

/// What a map's element leads to.
#[derive(Clone, Copy)]
pub(crate) enum Data<'a> {
    None,
    Value(u32),
    Verdict(Verdict<'a>),
    /// Closes the interval the element before it opened.
    End,
}

/// A named set or map.
#[derive(Clone, Copy, Default)]
pub(crate) struct Set<'a> {
    pub(crate) name: &'a str,
    pub(crate) flags: u32,
    pub(crate) key_type: u32,
    pub(crate) key_len: u32,
    /// Type and length of a map's data; none for verdicts.
    pub(crate) data: Option<(u32, u32)>,
    pub(crate) counters: bool,
    pub(crate) size: u32,
}

/// A base chain's place.
pub(crate) struct Hook {
    pub(crate) kind: &'static str,
    pub(crate) number: u32,
    pub(crate) priority: i32,
}

pub(crate) const PREROUTING: u32 = 0;
pub(crate) const INPUT: u32 = 1;
pub(crate) const FORWARD: u32 = 2;
pub(crate) const OUTPUT: u32 = 3;
pub(crate) const POSTROUTING: u32 = 4;

/// Messages for one table, gathered and then run.
pub(crate) struct Batch<'a> {
    buf: Buf,
    table: &'a str,
    /// Rules added, to compare with what a read-back finds.
    pub(crate) rules: usize,
}

fn header(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

impl<'a> Batch<'a> {
    pub(crate) fn new(table: &'a str) -> Batch<'a> {
        let mut buf = Buf::default();
        buf.message(BATCH_BEGIN, 0, &[0, 0, 0, 10], |_| {});
        Batch {
            buf,
            table,
            rules: 0,
        }
    }

    fn put(&mut self, op: u16, flags: libc::c_int, f: impl FnOnce(&mut Buf)) {
        let table = self.table;
        self.buf
            .message(SUBSYSTEM | op, flags, &header(FAMILY_INET), |b| {
                b.text(TABLE, table);
                f(b);
            });
    }

    pub(crate) fn new_table(&mut self, comment: &str) {
        self.put(NEW_TABLE, libc::NLM_F_CREATE, |b| {
            let mut data = vec![0, u8::try_from(comment.len() + 1).unwrap_or_default()];
            data.extend(comment.bytes());
            data.push(0);
            b.be32(2, 0).attr(6, &data);
        });
    }

    pub(crate) fn delete_table(&mut self) {
        self.put(DEL_TABLE, 0, |_| {});
    }

    pub(crate) fn chain(&mut self, name: &str, hook: Option<Hook>) {
        self.put(NEW_CHAIN, libc::NLM_F_CREATE, |b| {
            b.text(3, name);
            if let Some(h) = hook {
                b.nest(4, |b| {
                    b.be32(1, h.number).be32(2, h.priority.cast_unsigned());
                });
                b.be32(5, 1).text(7, h.kind);
            }
        });
    }

    pub(crate) fn rule(&mut self, chain: &str, f: impl FnOnce(&mut Rule<'_>)) {
        self.rules += 1;
        self.put(NEW_RULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, |b| {
            b.text(2, chain).nest(4, |b| f(&mut Rule(b)));
        });
    }

    pub(crate) fn set(&mut self, id: u32, set: Set<'_>) {
        self.put(NEW_SET, libc::NLM_F_CREATE, |b| {
            b.text(2, set.name)
                .be32(3, set.flags)
                .be32(4, set.key_type)
                .be32(5, set.key_len);
            if set.flags & SET_MAP != 0 {
                let (kind, len) = set.data.unwrap_or((0xffff_ff00, 0));
                b.be32(6, kind);
                if len != 0 {
                    b.be32(7, len);
                }
            }
            b.be32(10, id);
            if set.size != 0 {
                b.nest(9, |b| {
                    b.be32(1, set.size);
                });
            }
            if set.counters {
                b.nest(17, |b| {
                    b.text(1, "counter").nest(2, |_| {});
                });
            }
        });
    }

    pub(crate) fn counter(&mut self, name: &str) {
        self.put(NEW_OBJECT, libc::NLM_F_CREATE, |b| {
            b.text(2, name).be32(3, 1).nest(4, |b| {
                b.attr(1, &[0; 8]).attr(2, &[0; 8]);
            });
        });
    }

    /// An object that gives flows timeouts of their own, by state.
    pub(crate) fn ct_timeout(
        &mut self,
        name: &str,
        family: libc::c_int,
        proto: u8,
        states: &[(u16, u32)],
    ) {
        self.put(NEW_OBJECT, libc::NLM_F_CREATE, |b| {
            b.text(2, name).be32(3, 7).nest(4, |b| {
                b.attr(1, &(family as u16).to_be_bytes())
                    .attr(2, &[proto])
                    .nest(3, |b| {
                        for (state, seconds) in states {
                            b.be32(*state, *seconds);
                        }
                    });
            });
        });
    }

    pub(crate) fn add<'d>(&mut self, set: &str, elements: &[(Vec<u8>, Data<'d>)]) {
        self.elements(NEW_ELEMENT, libc::NLM_F_CREATE, set, elements);
    }

    pub(crate) fn remove<'d>(&mut self, set: &str, elements: &[(Vec<u8>, Data<'d>)]) {
        self.elements(DEL_ELEMENT, 0, set, elements);
    }

    /// Removes every element.
    pub(crate) fn clear(&mut self, set: &str) {
        self.put(DEL_ELEMENT, 0, |b| {
            b.text(2, set);
        });
    }

    fn elements(&mut self, op: u16, flags: libc::c_int, set: &str, all: &[(Vec<u8>, Data<'_>)]) {
        for some in all.chunks(ELEMENTS) {
            self.put(op, flags, |b| {
                b.text(2, set).nest(3, |b| {
                    for (key, data) in some {
                        b.nest(1, |b| {
                            b.nest(1, |b| {
                                b.attr(1, key);
                            });
                            match *data {
                                Data::None => {}
                                Data::Value(v) => {
                                    b.nest(2, |b| {
                                        b.attr(1, &v.to_ne_bytes());
                                    });
                                }
                                Data::Verdict(v) => {
                                    b.nest(2, |b| v.put(b));
                                }
                                Data::End => {
                                    b.be32(3, 1);
                                }
                            }
                        });
                    }
                });
            });
        }
    }

    /// Closes the batch and applies it.
    pub(crate) fn run(mut self, socket: &mut Socket) -> io::Result<()> {
        // The acknowledgement of the last message stands for all: they are one transaction.
        let mut at = 0;
        let mut last = 0;
        while at < self.buf.0.len() {
            last = at;
            let len = super::netlink::u32_at(&self.buf.0, at).unwrap_or(u32::MAX);
            at += (len as usize).next_multiple_of(4);
        }
        self.buf.0[last + 6] |= libc::NLM_F_ACK as u8;
        let end = self.buf.0.len();
        self.buf.message(BATCH_END, 0, &[0, 0, 0, 10], |_| {});
        socket.run_batch(&mut self.buf, end)
    }
}

/// The expressions of one rule.
pub(crate) struct Rule<'a>(&'a mut Buf);

impl Rule<'_> {
    fn expr(&mut self, name: &str, f: impl FnOnce(&mut Buf)) -> &mut Self {
        self.0.nest(1, |b| {
            b.text(1, name).nest(2, f);
        });
        self
    }

    pub(crate) fn meta(&mut self, key: Meta, reg: u32) -> &mut Self {
        self.expr("meta", |b| {
            b.be32(1, reg).be32(2, key as u32);
        })
    }

    pub(crate) fn cmp(&mut self, reg: u32, op: Cmp, value: &[u8]) -> &mut Self {
        self.expr("cmp", |b| {
            b.be32(1, reg).be32(2, op as u32).nest(3, |b| {
                b.attr(1, value);
            });
        })
    }

    pub(crate) fn meta_is(&mut self, key: Meta, op: Cmp, value: u32) -> &mut Self {
        self.meta(key, R0).cmp(R0, op, &value.to_ne_bytes())
    }

    /// Guards every load of a network header: in an inet table the bytes may be the other family's.
    pub(crate) fn family(&mut self, family: libc::c_int) -> &mut Self {
        self.meta(Meta::NfProto, R0)
            .cmp(R0, Cmp::Eq, &[family as u8])
    }

    pub(crate) fn l4proto(&mut self, proto: libc::c_int) -> &mut Self {
        self.meta(Meta::L4Proto, R0)
            .cmp(R0, Cmp::Eq, &[proto as u8])
    }

    pub(crate) fn payload(&mut self, base: Base, offset: u32, len: u32, reg: u32) -> &mut Self {
        self.expr("payload", |b| {
            b.be32(1, reg)
                .be32(2, base as u32)
                .be32(3, offset)
                .be32(4, len);
        })
    }

    pub(crate) fn and(&mut self, reg: u32, mask: &[u8]) -> &mut Self {
        let len = u32::try_from(mask.len()).unwrap_or_default();
        self.expr("bitwise", |b| {
            b.be32(1, reg).be32(2, reg).be32(3, len);
            b.nest(4, |b| {
                b.attr(1, mask);
            });
            b.nest(5, |b| {
                b.attr(1, &vec![0; mask.len()]);
            });
        })
    }

    pub(crate) fn lookup(&mut self, set: &str, reg: u32, inverted: bool) -> &mut Self {
        self.expr("lookup", |b| {
            b.text(1, set).be32(2, reg);
            if inverted {
                b.be32(5, 1);
            }
        })
    }

    /// Takes the verdict the map holds for the key, or goes on.
    pub(crate) fn vmap(&mut self, map: &str, reg: u32) -> &mut Self {
        self.expr("lookup", |b| {
            b.text(1, map).be32(2, reg).be32(3, VERDICT_REGISTER);
        })
    }

    pub(crate) fn map(&mut self, map: &str, reg: u32, to: u32) -> &mut Self {
        self.expr("lookup", |b| {
            b.text(1, map).be32(2, reg).be32(3, to);
        })
    }

    pub(crate) fn fib_daddr_type(&mut self, op: Cmp, kind: u8) -> &mut Self {
        self.expr("fib", |b| {
            b.be32(1, R0).be32(2, 3).be32(3, 2);
        })
        .cmp(R0, op, &u32::from(kind).to_ne_bytes())
    }

    /// The packet claims to come from an address of this host.
    pub(crate) fn saddr_is_local(&mut self) -> &mut Self {
        self.expr("fib", |b| {
            b.be32(1, R0).be32(2, 3).be32(3, 1);
        })
        .cmp(R0, Cmp::Eq, &u32::from(libc::RTN_LOCAL).to_ne_bytes())
    }

    /// True when the flow's state is one of these bits.
    pub(crate) fn ct_state(&mut self, bits: u32) -> &mut Self {
        self.expr("ct", |b| {
            b.be32(1, R0).be32(2, 0);
        })
        .and(R0, &bits.to_ne_bytes())
        .cmp(R0, Cmp::Ne, &[0; 4])
    }

    pub(crate) fn ct_mark(&mut self, reg: u32) -> &mut Self {
        self.expr("ct", |b| {
            b.be32(1, reg).be32(2, 3);
        })
    }

    pub(crate) fn set_ct_mark(&mut self, reg: u32) -> &mut Self {
        self.expr("ct", |b| {
            b.be32(2, 3).be32(4, reg);
        })
    }

    /// True when the key in the register holds more than this many flows.
    pub(crate) fn ct_count_over(&mut self, set: &str, reg: u32, limit: u32) -> &mut Self {
        self.expr("dynset", |b| {
            b.text(1, set).be32(3, 0).be32(4, reg).nest(7, |b| {
                b.text(1, "connlimit").nest(2, |b| {
                    b.be32(1, limit).be32(2, 1);
                });
            });
        })
    }

    pub(crate) fn object(&mut self, kind: u32, name: &str) -> &mut Self {
        self.expr("objref", |b| {
            b.be32(1, kind).text(2, name);
        })
    }

    pub(crate) fn verdict(&mut self, verdict: Verdict<'_>) -> &mut Self {
        self.expr("immediate", |b| {
            b.be32(1, VERDICT_REGISTER).nest(2, |b| verdict.put(b));
        })
    }

    /// Counts by reason, then drops.
    pub(crate) fn drop(&mut self, reason: &str) {
        self.object(1, reason).verdict(Verdict::Drop);
    }

    /// Lowers the MSS a SYN offers to what the path carries.
    pub(crate) fn clamp_mss(&mut self) -> &mut Self {
        self.l4proto(libc::IPPROTO_TCP)
            .payload(Base::Transport, 13, 1, R0)
            .and(R0, &[0x06])
            .cmp(R0, Cmp::Eq, &[0x02])
            .expr("rt", |b| {
                b.be32(1, R0).be32(2, 3);
            })
            .expr("byteorder", |b| {
                b.be32(1, R0).be32(2, R0).be32(3, 1).be32(4, 2).be32(5, 2);
            })
            .expr("exthdr", |b| {
                b.be32(7, R0).attr(2, &[2]).be32(3, 2).be32(4, 2).be32(6, 1);
            })
    }

    /// Translates to ports nobody here listens on, in an order nobody can guess.
    pub(crate) fn masquerade_ports(&mut self, low: u16, high: u16) {
        const PORTS_GIVEN: u32 = 1 << 1;
        const FULLY_RANDOM: u32 = 1 << 4;
        for (reg, port) in [(R0, low), (R1, high)] {
            self.expr("immediate", |b| {
                b.be32(1, reg).nest(2, |b| {
                    b.attr(1, &port.to_be_bytes());
                });
            });
        }
        self.expr("masq", |b| {
            b.be32(1, PORTS_GIVEN | FULLY_RANDOM)
                .be32(2, R0)
                .be32(3, R1);
        });
    }

    pub(crate) fn masquerade(&mut self) {
        self.expr("masq", |_| {});
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::{attr_of, messages};

    #[test]
    fn a_batch_is_one_transaction_acknowledged_once() {
        let mut batch = Batch::new("t");
        batch.new_table("note");
        batch.rule("c", |r| r.meta_is(Meta::Iif, Cmp::Eq, 7).drop("why"));
        let bytes = batch.buf.0;
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(
            all.iter().map(|m| m.kind).collect::<Vec<_>>(),
            [BATCH_BEGIN, SUBSYSTEM | NEW_TABLE, SUBSYSTEM | NEW_RULE]
        );
        let rule = &all[2].body[4..];
        assert_eq!(attr_of(rule, TABLE), Some(&b"t\0"[..]));
        let expressions = attr_of(rule, 4).unwrap();
        let names: Vec<_> = crate::kernel::netlink::attrs(expressions)
            .map(|(_, e)| crate::kernel::netlink::text_of(attr_of(e, 1).unwrap()))
            .collect();
        assert_eq!(names, ["meta", "cmp", "objref", "immediate"]);
    }
}
