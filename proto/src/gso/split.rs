//! Cuts a super-packet into what a network card would have sent.

use super::{complete, segment_count};
use crate::checksum;
use crate::packet::{
    Parsed, TCP_HEADER_MOST, Transport, UDP_HEADER, V4_HEADER, V6_HEADER, Version, put, tcp_flag,
    word,
};
use crate::record::{Offload, gso_type};
use crate::validate::DropReason;

/// Headers of the longest packet that may be cut: there are neither options nor
/// extension headers in it.
const HEADERS: usize = V6_HEADER + TCP_HEADER_MOST;

/// The finished segments of one packet, each made where its payload lies.
///
/// The payload is not copied: a segment's headers are written over the end of
/// the segment before, so each is there only until the next one is cut, and of
/// the packet nothing sensible is left. Any validated packet will do: one that
/// is no super-packet is its only segment, with its checksum finished if it was
/// partial.
#[derive(Debug)]
pub struct Segments<'a> {
    packet: &'a mut [u8],
    headers: [u8; HEADERS],
    parsed: Parsed,
    offload: Offload,
    next: usize,
    count: usize,
}

impl<'a> Segments<'a> {
    /// Begins at the first.
    pub fn new(
        packet: &'a mut [u8],
        parsed: &Parsed,
        offload: Offload,
    ) -> Result<Self, DropReason> {
        let packet = packet
            .get_mut(..parsed.len())
            .ok_or(DropReason::Truncated)?;
        let cut = offload.gso_type != gso_type::NONE;
        let possible = parsed.is_plain() && parsed.sum_at().is_some() && offload.gso_size > 0;
        if cut && !possible {
            return Err(DropReason::Offload);
        }
        let count = segment_count(parsed, offload);
        let mut headers = [0; HEADERS];
        if count > 1 {
            let original = packet.get(..parsed.header_len());
            let kept = headers.get_mut(..parsed.header_len());
            let (Some(original), Some(kept)) = (original, kept) else {
                return Err(DropReason::Offload);
            };
            kept.copy_from_slice(original);
        }
        Ok(Self {
            packet,
            headers,
            parsed: *parsed,
            offload,
            next: 0,
            count,
        })
    }

    /// How many are left.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.count - self.next
    }

    /// The next one; none when there were all.
    pub fn cut(&mut self) -> Option<&mut [u8]> {
        if self.next >= self.count {
            return None;
        }
        if self.count == 1 {
            if self.offload.partial {
                complete(self.packet, &self.parsed).ok()?;
            }
            self.next = 1;
            return Some(self.packet);
        }
        let header_len = self.parsed.header_len();
        let step = usize::from(self.offload.gso_size);
        let begin = self.next * step;
        let end = (begin + step + header_len).min(self.packet.len());
        let this = Place {
            index: self.next,
            begin,
            last: self.next + 1 == self.count,
        };
        let segment = self.packet.get_mut(begin..end)?;
        let headers = self.headers.get(..header_len)?;
        segment.get_mut(..header_len)?.copy_from_slice(headers);
        ip_header(segment, &self.parsed, &this)?;
        transport_header(segment, &self.parsed, &this)?;
        complete(segment, &self.parsed).ok()?;
        self.next += 1;
        Some(segment)
    }
}

/// Which of the segments.
struct Place {
    index: usize,
    /// Payload before it.
    begin: usize,
    last: bool,
}

fn ip_header(segment: &mut [u8], parsed: &Parsed, this: &Place) -> Option<()> {
    let length = u16::try_from(segment.len()).ok()?;
    match parsed.version() {
        Version::V4 => {
            put(segment, 2, length.to_be_bytes())?;
            let id = word(segment, 4)?.wrapping_add(u16::try_from(this.index).ok()?);
            put(segment, 4, id.to_be_bytes())?;
            put(segment, 10, [0, 0])?;
            let check = checksum::check(checksum::sum(segment.get(..V4_HEADER)?));
            put(segment, 10, check.to_be_bytes())
        }
        Version::V6 => {
            let payload = length.checked_sub(u16::try_from(V6_HEADER).ok()?)?;
            put(segment, 4, payload.to_be_bytes())
        }
    }
}

fn transport_header(segment: &mut [u8], parsed: &Parsed, this: &Place) -> Option<()> {
    let l4 = parsed.l4();
    match parsed.transport() {
        Transport::Tcp { .. } => {
            let sequence = super::coalesce::sequence(segment, l4)?;
            let sequence = sequence.wrapping_add(u32::try_from(this.begin).ok()?);
            put(segment, l4 + 4, sequence.to_be_bytes())?;
            let flags = segment.get_mut(l4 + 13)?;
            if this.index > 0 {
                // Congestion window reduced: said once.
                *flags &= !tcp_flag::CWR;
            }
            if !this.last {
                // The end and the push come with the last byte.
                *flags &= !(tcp_flag::FIN | tcp_flag::PSH);
            }
            Some(())
        }
        Transport::Udp { .. } => {
            let length = u16::try_from(segment.len().checked_sub(l4)?).ok()?;
            debug_assert!(usize::from(length) >= UDP_HEADER);
            put(segment, l4 + 4, length.to_be_bytes())
        }
        Transport::Icmp(_) | Transport::Later | Transport::Other => None,
    }
}
