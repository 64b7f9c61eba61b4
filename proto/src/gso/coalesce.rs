//! Makes super-packets of single segments and datagrams, for devices.
//!
//! One write to the TUN, one pass through the kernel's tables and one
//! segmentation at the far end instead of forty-five. Only what can be cut
//! apart again into the same packets is joined: the same headers, segments in
//! order and without a gap, datagrams of one size, checksums that were right.

use crate::checksum;
use crate::packet::{Parsed, Transport, Version, array, put, tcp_flag, word};
use crate::record::{MAX_PACKET, Offload, gso_type};
use crate::validate::{MIN_SEGMENT, pseudo_sum, transport_sum_is_right};

/// Kernels refuse super-packets of more datagrams, whatever their size.
const MAX_DATAGRAMS: u32 = 64;

/// Which super-packets the device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joins {
    /// Of TCP segments.
    pub tcp: bool,
    /// Of UDP datagrams.
    pub udp: bool,
}

/// Collects consecutive segments or datagrams of one flow at the start of a buffer of the
/// caller's, which is the same in every call and best [`MAX_PACKET`] bytes long.
///
/// What is collected has to be taken with [`Coalescer::flush`] whenever
/// [`Offer::Flush`] says so, and at the end of every batch.
#[derive(Clone, Debug)]
pub struct Coalescer {
    joins: Joins,
    pending: Option<Pending>,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// It is in the buffer.
    Taken,
    /// It does not go with what is in the buffer, and may not overtake it: flush,
    /// then offer it again.
    Flush,
    /// It is of no use here and may go as it is, now.
    Pass,
}

/// What was collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coalesced {
    /// The headers; the packet's length is [`Parsed::len`].
    pub parsed: Parsed,
    /// For a single segment, which is as it was offered, what it was offered with.
    pub offload: Offload,
    /// Segments in it.
    pub segments: u32,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    /// Of the first segment, with the length of all.
    parsed: Parsed,
    /// Of the first segment.
    offload: Offload,
    size: u16,
    segments: u32,
    /// The sequence number that has to come next; datagrams have none.
    sequence: Option<u32>,
    ids: Ids,
    /// A short or pushed segment was the last.
    closed: bool,
    pushed: bool,
}

const DONT_FRAGMENT: u16 = 0x4000;

/// How IPv4 identifications go on from segment to segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ids {
    /// IPv6 has none.
    None,
    /// One segment was seen; whether its datagram may be fragmented.
    First { id: u16, fixed_is_fine: bool },
    /// Each is the one before and one.
    Rising { next: u16 },
    /// All the same, as some systems do where nothing may be fragmented.
    Fixed { id: u16 },
}

impl Ids {
    fn of(packet: &[u8], version: Version) -> Option<Self> {
        match version {
            Version::V4 => Some(Self::First {
                id: word(packet, 4)?,
                fixed_is_fine: word(packet, 6)? & DONT_FRAGMENT != 0,
            }),
            Version::V6 => Some(Self::None),
        }
    }

    /// With one more segment; none if its identification does not go with them.
    fn then(self, packet: &[u8]) -> Option<Self> {
        let id = word(packet, 4)?;
        match self {
            Self::None => Some(Self::None),
            Self::First { id: first, .. } if id == first.wrapping_add(1) => Some(Self::Rising {
                next: id.wrapping_add(1),
            }),
            Self::First {
                id: first,
                fixed_is_fine: true,
            } if id == first => Some(Self::Fixed { id }),
            Self::Rising { next } if id == next => Some(Self::Rising {
                next: next.wrapping_add(1),
            }),
            Self::Fixed { id: fixed } if id == fixed => Some(self),
            Self::First { .. } | Self::Rising { .. } | Self::Fixed { .. } => None,
        }
    }
}

impl Coalescer {
    /// Nothing is collected.
    #[must_use]
    pub const fn new(joins: Joins) -> Self {
        Self {
            joins,
            pending: None,
        }
    }

    /// Whether nothing is collected.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pending.is_none()
    }

    /// Takes a packet that was validated with this offload, or says what to do
    /// with it.
    pub fn offer(
        &mut self,
        buffer: &mut [u8],
        packet: &[u8],
        parsed: &Parsed,
        offload: Offload,
    ) -> Offer {
        let Some(packet) = packet.get(..parsed.len()) else {
            return Offer::Pass;
        };
        let bulk = is_bulk(packet, parsed, offload, self.joins);
        let Some(pending) = &mut self.pending else {
            return match bulk.and_then(|bulk| begin(buffer, packet, parsed, &bulk)) {
                Some(pending) => {
                    self.pending = Some(pending);
                    Offer::Taken
                }
                None => Offer::Pass,
            };
        };
        if let Some(bulk) = &bulk
            && pending.append(buffer, packet, parsed, bulk).is_some()
        {
            return Offer::Taken;
        }
        // Only one flow is collected, and the one that sends now is more likely
        // to go on. What is no bulk of another flow does not disturb this one,
        // nor do small datagrams a stream.
        let begins = bulk.is_some_and(|bulk| {
            bulk.begins() && (bulk.payload >= MIN_SEGMENT || pending.sequence.is_none())
        });
        if begins || pending.may_be_same_flow(buffer, packet, parsed) {
            Offer::Flush
        } else {
            Offer::Pass
        }
    }

    /// Finishes what lies in the buffer, if anything does.
    pub fn flush(&mut self, buffer: &mut [u8]) -> Option<Coalesced> {
        let pending = self.pending.take()?;
        let parsed = pending.parsed;
        if pending.segments == 1 {
            return Some(Coalesced {
                parsed,
                offload: pending.offload,
                segments: 1,
            });
        }
        let packet = buffer.get_mut(..parsed.len())?;
        let gso_type = pending.finish(packet)?;
        Some(Coalesced {
            parsed,
            offload: Offload {
                partial: true,
                gso_type,
                gso_size: pending.size,
            },
            segments: pending.segments,
        })
    }
}

fn begin(buffer: &mut [u8], packet: &[u8], parsed: &Parsed, bulk: &Bulk) -> Option<Pending> {
    if !bulk.begins() || !bulk.right(packet, parsed) {
        return None;
    }
    let ids = Ids::of(packet, parsed.version())?;
    buffer.get_mut(..packet.len())?.copy_from_slice(packet);
    Some(Pending {
        parsed: *parsed,
        offload: bulk.offload,
        size: bulk.payload,
        segments: 1,
        sequence: bulk.sequence_after(),
        ids,
        closed: false,
        pushed: false,
    })
}

impl Pending {
    fn append(
        &mut self,
        buffer: &mut [u8],
        packet: &[u8],
        parsed: &Parsed,
        bulk: &Bulk,
    ) -> Option<()> {
        let length = self.parsed.len.checked_add(bulk.payload)?;
        let ids = self.ids.then(packet)?;
        let fits = !self.closed
            && bulk.payload <= self.size
            && bulk.sequence == self.sequence
            && (bulk.sequence.is_some() || self.segments < MAX_DATAGRAMS)
            && parsed.protocol == self.parsed.protocol
            && usize::from(length) <= buffer.len().min(MAX_PACKET)
            && parsed.header_len == self.parsed.header_len
            && same_headers(buffer, packet, parsed)?
            && bulk.right(packet, parsed);
        if !fits {
            return None;
        }
        let begin = self.parsed.len();
        buffer
            .get_mut(begin..length.into())?
            .copy_from_slice(packet.get(parsed.header_len()..)?);
        self.parsed.len = length;
        self.segments += 1;
        self.sequence = bulk.sequence_after();
        self.ids = ids;
        self.pushed = bulk.pushed;
        self.closed = bulk.pushed || bulk.payload < self.size;
        Some(())
    }

    /// Whether the packet could belong to the flow that is collected. A fragment
    /// has no ports, so the hosts decide.
    fn may_be_same_flow(&self, buffer: &[u8], packet: &[u8], parsed: &Parsed) -> bool {
        let hosts = match parsed.version() {
            Version::V4 => 12..20,
            Version::V6 => 8..40,
        };
        let may_have_ports = parsed.ports().is_none() || parsed.ports() == self.parsed.ports();
        parsed.version() == self.parsed.version()
            && parsed.protocol() == self.parsed.protocol()
            && may_have_ports
            && packet.get(hosts.clone()) == buffer.get(hosts)
    }

    fn finish(&self, packet: &mut [u8]) -> Option<u8> {
        let parsed = &self.parsed;
        let udp = matches!(parsed.transport(), Transport::Udp { .. });
        let l4_len = parsed.len - parsed.l4;
        let kind = match parsed.version() {
            Version::V4 => {
                put(packet, 2, parsed.len.to_be_bytes())?;
                put(packet, 10, [0, 0])?;
                let check = checksum::check(checksum::sum(packet.get(..parsed.l4())?));
                put(packet, 10, check.to_be_bytes())?;
                gso_type::TCP_V4
            }
            Version::V6 => {
                put(packet, 4, l4_len.to_be_bytes())?;
                gso_type::TCP_V6
            }
        };
        if udp {
            put(packet, parsed.l4() + 4, l4_len.to_be_bytes())?;
        }
        if self.pushed {
            *packet.get_mut(parsed.l4() + 13)? |= tcp_flag::PSH;
        }
        let sum = pseudo_sum(parsed, packet, l4_len);
        put(packet, parsed.sum_at()?, sum.to_be_bytes())?;
        Some(if udp { gso_type::UDP_L4 } else { kind })
    }
}

/// A segment or datagram that can be part of a super-packet.
struct Bulk {
    sequence: Option<u32>,
    payload: u16,
    pushed: bool,
    offload: Offload,
}

fn is_bulk(packet: &[u8], parsed: &Parsed, offload: Offload, joins: Joins) -> Option<Bulk> {
    let payload = parsed.len - parsed.header_len;
    if !parsed.is_plain() || payload == 0 || offload.gso_type != gso_type::NONE {
        return None;
    }
    match parsed.transport() {
        Transport::Tcp { flags, .. } if joins.tcp => {
            let plain = flags & !tcp_flag::PSH == tcp_flag::ACK;
            plain.then_some(Bulk {
                sequence: Some(sequence(packet, parsed.l4())?),
                payload,
                pushed: flags & tcp_flag::PSH != 0,
                offload,
            })
        }
        // One without a checksum would come out with one.
        Transport::Udp { .. }
            if joins.udp && (offload.partial || word(packet, parsed.sum_at()?)? != 0) =>
        {
            Some(Bulk {
                sequence: None,
                payload,
                pushed: false,
                offload,
            })
        }
        Transport::Tcp { .. }
        | Transport::Udp { .. }
        | Transport::Icmp(_)
        | Transport::Later
        | Transport::Other => None,
    }
}

impl Bulk {
    /// What the next one's has to be.
    fn sequence_after(&self) -> Option<u32> {
        let after = |sequence: u32| sequence.wrapping_add(self.payload.into());
        self.sequence.map(after)
    }

    /// A segment that ends its stretch is no beginning of one, and small ones are
    /// not worth it. Datagrams are: their senders seldom make fewer of them.
    fn begins(&self) -> bool {
        !self.pushed && (self.payload >= MIN_SEGMENT || self.sequence.is_none())
    }

    /// A wrong checksum must not become a right one; a partial one is still to be made.
    fn right(&self, packet: &[u8], parsed: &Parsed) -> bool {
        parsed.verified || self.offload.partial || transport_sum_is_right(parsed, packet)
    }
}

/// All that every segment's headers have to have in common.
fn same_headers(buffer: &[u8], packet: &[u8], parsed: &Parsed) -> Option<bool> {
    let same = |from: usize, to: usize| {
        let (a, b) = (buffer.get(from..to)?, packet.get(from..to)?);
        Some(a == b)
    };
    let ip = match parsed.version() {
        // All but length, identification and checksum.
        Version::V4 => same(0, 2)? && same(6, 10)? && same(12, 20)?,
        Version::V6 => same(0, 4)? && same(6, 40)?,
    };
    let l4 = parsed.l4();
    if matches!(parsed.transport(), Transport::Udp { .. }) {
        return Some(ip && same(l4, l4 + 4)?);
    }
    // Ports; acknowledgement, header length; window; urgent pointer, options.
    let tcp = same(l4, l4 + 4)?
        && same(l4 + 8, l4 + 13)?
        && same(l4 + 14, l4 + 16)?
        && same(l4 + 18, parsed.header_len())?;
    Some(ip && tcp)
}

/// The sequence number of a TCP header.
pub(super) fn sequence(packet: &[u8], l4: usize) -> Option<u32> {
    Some(u32::from_be_bytes(array(packet, l4 + 4)?))
}
