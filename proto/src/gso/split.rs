//! Cuts a super-packet into what a network card would have sent.

use super::{complete, segment_count};
use crate::checksum;
use crate::packet::{
    Parsed, Transport, UDP_HEADER, V4_HEADER, V6_HEADER, Version, put, tcp_flag, word,
};
use crate::record::{Offload, gso_type};
use crate::validate::DropReason;

/// The segments of one packet, finished ones, written to a buffer of the caller's.
///
/// Any validated packet will do: one that is no super-packet is its only segment,
/// with its checksum finished if it was partial.
#[derive(Clone, Debug)]
pub struct Segments<'a> {
    packet: &'a [u8],
    parsed: Parsed,
    offload: Offload,
    next: usize,
    count: usize,
}

impl<'a> Segments<'a> {
    /// Begins at the first.
    pub fn new(packet: &'a [u8], parsed: &Parsed, offload: Offload) -> Result<Self, DropReason> {
        let packet = packet.get(..parsed.len()).ok_or(DropReason::Truncated)?;
        let cut = offload.gso_type != gso_type::NONE;
        let possible = parsed.is_plain() && parsed.sum_at().is_some() && offload.gso_size > 0;
        if cut && !possible {
            return Err(DropReason::Offload);
        }
        Ok(Self {
            packet,
            parsed: *parsed,
            offload,
            next: 0,
            count: segment_count(parsed, offload),
        })
    }

    /// How many are left.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.count - self.next
    }

    /// Bytes that the longest one needs.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.count == 1 {
            return self.packet.len();
        }
        self.parsed.header_len() + usize::from(self.offload.gso_size)
    }

    /// Writes the next one to the start of `out` and gives it back; none when all
    /// were written, or when `out` is too short for it.
    pub fn write<'b>(&mut self, out: &'b mut [u8]) -> Option<&'b mut [u8]> {
        if self.next >= self.count {
            return None;
        }
        let segment = self.segment(out)?;
        self.next += 1;
        Some(segment)
    }

    fn segment<'b>(&self, out: &'b mut [u8]) -> Option<&'b mut [u8]> {
        if self.count == 1 {
            let segment = out.get_mut(..self.packet.len())?;
            segment.copy_from_slice(self.packet);
            if self.offload.partial {
                complete(segment, &self.parsed).ok()?;
            }
            return Some(segment);
        }
        let (headers, payload) = self.packet.split_at_checked(self.parsed.header_len())?;
        let step = usize::from(self.offload.gso_size);
        let begin = self.next * step;
        let end = payload.len().min(begin + step);
        let payload = payload.get(begin..end)?;
        let segment = out.get_mut(..headers.len() + payload.len())?;
        segment[..headers.len()].copy_from_slice(headers);
        segment[headers.len()..].copy_from_slice(payload);
        self.ip_header(segment)?;
        self.transport_header(segment, begin)?;
        complete(segment, &self.parsed).ok()?;
        Some(segment)
    }

    fn ip_header(&self, segment: &mut [u8]) -> Option<()> {
        let length = u16::try_from(segment.len()).ok()?;
        match self.parsed.version() {
            Version::V4 => {
                put(segment, 2, length.to_be_bytes())?;
                let n = u16::try_from(self.next).ok()?;
                let id = word(segment, 4)?.wrapping_add(n);
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

    fn transport_header(&self, segment: &mut [u8], begin: usize) -> Option<()> {
        let l4 = self.parsed.l4();
        match self.parsed.transport() {
            Transport::Tcp { .. } => {
                let (first, last) = (self.next == 0, self.next + 1 == self.count);
                let sequence = super::coalesce::sequence(segment, l4)?;
                let sequence = sequence.wrapping_add(u32::try_from(begin).ok()?);
                put(segment, l4 + 4, sequence.to_be_bytes())?;
                let flags = segment.get_mut(l4 + 13)?;
                if !first {
                    // Congestion window reduced: said once.
                    *flags &= !tcp_flag::CWR;
                }
                if !last {
                    // The end and the push come with the last byte.
                    *flags &= !(tcp_flag::FIN | tcp_flag::PSH);
                }
                Some(())
            }
            Transport::Udp { .. } => {
                let length = u16::try_from(segment.len() - l4).ok()?;
                debug_assert!(usize::from(length) >= UDP_HEADER);
                put(segment, l4 + 4, length.to_be_bytes())
            }
            Transport::Icmp(_) | Transport::Later | Transport::Other => None,
        }
    }
}
