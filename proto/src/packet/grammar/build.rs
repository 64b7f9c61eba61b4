//! Puts packets together, field by field.

use super::{ROOM, Rng, Touched};
use crate::packet::{Side, Version, protocol};

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Tcp,
    Udp,
    Echo,
    /// An ICMP error with the packet it is about.
    Error,
    /// The first fragment of one of those above.
    First,
    /// Another fragment.
    Later,
}

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Size {
    UpTo(usize),
    Super(usize),
}

/// Who sends to whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub(super) version: Version,
    pub(super) source: [u8; 16],
    pub(super) destination: [u8; 16],
    /// Which of them is the client.
    pub(super) client: Side,
}

#[derive(Debug)]
pub(super) struct Builder<'a> {
    out: &'a mut [u8; ROOM],
    touched: Touched,
}

const FLAGS: [u8; 9] = [0x02, 0x12, 0x10, 0x18, 0x11, 0x14, 0x04, 0x30, 0x19];
const BULK_FLAGS: [u8; 4] = [0x10, 0x18, 0x11, 0x19];

impl<'a> Builder<'a> {
    pub(super) fn new(out: &'a mut [u8; ROOM]) -> Self {
        Self {
            out,
            touched: Touched::default(),
        }
    }

    pub(super) fn touched(&self) -> Touched {
        self.touched
    }

    /// Writes a packet and returns where it ends. Only quoted ones may have options.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one choice of the grammar"
    )]
    pub(super) fn packet(
        &mut self,
        rng: &mut Rng,
        at: usize,
        ends: &Ends,
        body: Body,
        size: Size,
        partial: bool,
        options: bool,
    ) -> usize {
        let v6 = ends.version == Version::V6;
        let pieces = matches!(body, Body::First | Body::Later);
        let (one_of, atomic) = (rng.below(3), rng.one_in(16));
        let carried = match body {
            Body::First | Body::Later => [Body::Tcp, Body::Udp, Body::Echo][one_of],
            Body::Tcp | Body::Udp | Body::Echo | Body::Error => body,
        };
        // IPv6 says in a header of its own that it is a fragment, even of one.
        let lone = atomic && !matches!(size, Size::Super(_));
        let fragment_header = v6 && (pieces || lone);
        let protocol = match (carried, v6) {
            (Body::Tcp, _) => protocol::TCP,
            (Body::Udp, _) => protocol::UDP,
            (_, false) => protocol::ICMP,
            (_, true) => protocol::ICMPV6,
        };
        let optional = if options && !v6 && rng.one_in(8) {
            4 * (1 + rng.below(10))
        } else {
            0
        };
        let ip = at;
        let l4 = ip + if v6 { 40 } else { 20 + optional } + if fragment_header { 8 } else { 0 };
        rng.fill(&mut self.out[ip..l4]);
        let (offset, more, end);
        if body == Body::Later {
            more = rng.one_in(2);
            let length = 8 * (1 + rng.below(20)) + if more { 0 } else { rng.below(8) };
            rng.fill(&mut self.out[l4..l4 + length]);
            (offset, end) = (24 + 8 * rng.below(8000), l4 + length);
        } else {
            let full = self.transport(rng, l4, ends.version, carried, size, pieces);
            (offset, more) = (0, pieces);
            self.ip_header(rng, ip, l4, full, ends, protocol);
            self.transport_sum(rng, ip, l4, full, ends, carried, partial);
            end = if pieces {
                self.cut_first(l4, full)
            } else {
                full
            };
        }
        self.ip_header(rng, ip, l4, end, ends, protocol);
        if fragment_header {
            self.out[ip + 6] = 44;
            let bits = to_u16(offset) | u16::from(more);
            self.out[l4 - 8] = protocol;
            self.put(l4 - 6, bits);
        } else if !v6 {
            let bits = to_u16(offset / 8) | if more { 0x2000 } else { 0 };
            self.put(ip + 6, bits);
        }
        if !v6 {
            self.put(ip + 10, 0);
            let sum = !plain_sum(&self.out[ip..ip + 20 + optional], 0);
            self.put(ip + 10, sum);
        }
        end
    }

    /// Writes an ICMP error and the packet that it quotes, which went the other way.
    pub(super) fn error(&mut self, rng: &mut Rng, ends: &Ends, other: &Ends) -> usize {
        let v6 = ends.version == Version::V6;
        let l4 = if v6 { 40 } else { 20 };
        let ip = l4 + 8;
        let body = [Body::Tcp, Body::Udp, Body::Echo, Body::Later][rng.below(4)];
        let end = self.packet(rng, ip, other, body, Size::UpTo(200), false, true);
        let header = ip
            + if v6 {
                40
            } else {
                usize::from(self.out[ip] & 15) * 4
            };
        let cut = match rng.below(4) {
            0 => header + 8,
            1 => end,
            _ => header + rng.below(end - header + 1),
        };
        // Half a checksum cannot be brought up to date by anybody.
        let end = self.touched.cut(cut.clamp(header, end));
        rng.fill(&mut self.out[..ip]);
        let (kind, code) = if v6 {
            (1 + rng.below(4), rng.below(7))
        } else {
            ([3, 4, 11, 12][rng.below(4)], rng.below(14))
        };
        self.out[l4] = to_u8(kind);
        self.out[l4 + 1] = to_u8(code);
        let protocol = if v6 { protocol::ICMPV6 } else { protocol::ICMP };
        self.ip_header(rng, 0, l4, end, ends, protocol);
        self.transport_sum(rng, 0, l4, end, ends, Body::Error, false);
        if !v6 {
            self.put(6, 0);
            self.put(10, 0);
            let sum = !plain_sum(&self.out[..20], 0);
            self.put(10, sum);
        }
        end
    }

    /// Fills in what the random bytes of a header must not be.
    fn ip_header(
        &mut self,
        rng: &mut Rng,
        ip: usize,
        l4: usize,
        end: usize,
        ends: &Ends,
        protocol: u8,
    ) {
        match ends.version {
            Version::V4 => {
                self.out[ip] = 0x40 | to_u8((l4 - ip) / 4);
                self.put(ip + 2, to_u16(end - ip));
                self.put(ip + 6, if rng.one_in(2) { 0x4000 } else { 0 });
                self.out[ip + 8] |= 1;
                self.out[ip + 9] = protocol;
                self.out[ip + 12..ip + 16].copy_from_slice(&ends.source[..4]);
                self.out[ip + 16..ip + 20].copy_from_slice(&ends.destination[..4]);
                self.touch_address(ip, ends, 4);
                self.touch(ip + 10, 2);
            }
            Version::V6 => {
                self.out[ip] = 0x60 | (self.out[ip] & 15);
                self.put(ip + 4, to_u16(end - ip - 40));
                self.out[ip + 6] = protocol;
                self.out[ip + 7] |= 1;
                if l4 - ip == 48 {
                    self.out[ip + 6] = 44;
                    self.out[ip + 40] = protocol;
                    self.put(ip + 42, 0);
                }
                self.out[ip + 8..ip + 24].copy_from_slice(&ends.source);
                self.out[ip + 24..ip + 40].copy_from_slice(&ends.destination);
                self.touch_address(ip, ends, 16);
            }
        }
    }

    /// Writes a transport header with its payload, without a checksum.
    fn transport(
        &mut self,
        rng: &mut Rng,
        l4: usize,
        version: Version,
        body: Body,
        size: Size,
        pieces: bool,
    ) -> usize {
        let (payload, bulk) = match size {
            Size::Super(payload) => (payload, true),
            // The first of several fragments is cut off behind all headers.
            Size::UpTo(limit) => (rng.below(limit + 1) + if pieces { 80 } else { 0 }, false),
        };
        let header = match body {
            Body::Tcp => 4 * [5, 5, 8, 5 + rng.below(11)][rng.below(4)],
            Body::Udp | Body::Echo | Body::Error | Body::First | Body::Later => 8,
        };
        let end = l4 + header + payload;
        rng.fill(&mut self.out[l4..end]);
        match body {
            Body::Tcp => {
                self.out[l4 + 12] = to_u8(header / 4) << 4 | (self.out[l4 + 12] & 15);
                let flags: &[u8] = if bulk { &BULK_FLAGS } else { &FLAGS };
                let congestion = self.out[l4 + 13] & 0xc0;
                self.out[l4 + 13] = flags[rng.below(flags.len())] | congestion;
            }
            Body::Udp => self.put(l4 + 4, to_u16(end - l4)),
            Body::Echo | Body::Error | Body::First | Body::Later => {
                let [request, reply] = match version {
                    Version::V4 => [8, 0],
                    Version::V6 => [128, 129],
                };
                self.out[l4] = if rng.one_in(2) { request } else { reply };
                self.out[l4 + 1] = 0;
            }
        }
        end
    }

    #[expect(clippy::too_many_arguments, reason = "a checksum depends on all of it")]
    fn transport_sum(
        &mut self,
        rng: &mut Rng,
        ip: usize,
        l4: usize,
        end: usize,
        ends: &Ends,
        body: Body,
        partial: bool,
    ) {
        let v6 = ends.version == Version::V6;
        let (at, protocol) = match body {
            Body::Tcp => (l4 + 16, protocol::TCP),
            Body::Udp => (l4 + 6, protocol::UDP),
            Body::Echo | Body::Error | Body::First | Body::Later if v6 => {
                (l4 + 2, protocol::ICMPV6)
            }
            Body::Echo | Body::Error | Body::First | Body::Later => (l4 + 2, protocol::ICMP),
        };
        let addresses = if v6 {
            ip + 8..ip + 40
        } else {
            ip + 12..ip + 20
        };
        let pseudo = plain_sum(
            &self.out[addresses],
            u32::from(protocol) + u32::from(to_u16(end - l4)),
        );
        let none = rng.one_in(12);
        if body == Body::Udp && !v6 && none && !partial {
            self.put(at, 0);
            return;
        }
        if body != Body::Echo || v6 {
            self.touch(at, 2);
        }
        if partial {
            self.put(at, pseudo);
            return;
        }
        self.put(at, 0);
        let pseudo = if protocol == protocol::ICMP {
            0
        } else {
            pseudo
        };
        let sum = !plain_sum(&self.out[l4..end], pseudo.into());
        let sum = if body == Body::Udp && sum == 0 {
            0xffff
        } else {
            sum
        };
        self.put(at, sum);
    }

    fn cut_first(&self, l4: usize, end: usize) -> usize {
        // Longer than any header, a multiple of eight, and never all of it.
        l4 + ((end - l4 - 8) / 8 * 8).max(64)
    }

    fn touch_address(&mut self, ip: usize, ends: &Ends, length: usize) {
        self.touch(ip + ends.client.at(ends.version), length);
    }

    fn touch(&mut self, at: usize, length: usize) {
        if !self.touched.contains(at) {
            self.touched.push(at, length);
        }
    }

    fn put(&mut self, at: usize, value: u16) {
        self.out[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }
}

/// The checksum's definition, word for word.
fn plain_sum(bytes: &[u8], start: u32) -> u16 {
    let mut total = start;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        total += u32::from(pair[0]) << 8 | u32::from(low);
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    to_u16(total as usize)
}

fn to_u16(value: usize) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

fn to_u8(value: usize) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}
