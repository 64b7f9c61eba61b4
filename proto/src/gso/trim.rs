//! Drops single segments of a TCP super-packet, as a queue does that wants to
//! tell a sender to slow down without losing forty-five segments for it.

use crate::checksum;
use crate::packet::{Parsed, Transport, V4_HEADER, Version, put, tcp_flag, word};
use crate::record::Offload;
use crate::validate::{DropReason, pseudo_sum};

/// Cuts so many segments off the front of a TCP super-packet, in place. What
/// remains is the packet's first [`Parsed::len`] bytes and what is left to do for it.
pub fn trim(
    packet: &mut [u8],
    parsed: &Parsed,
    offload: Offload,
    segments: u16,
) -> Result<(Parsed, Offload), DropReason> {
    let tcp = matches!(parsed.transport(), Transport::Tcp { .. });
    let gone = segments.checked_mul(offload.gso_size);
    let gone = gone.filter(|gone| usize::from(*gone) < parsed.payload_len());
    let (true, true, Some(gone)) = (tcp && offload.is_tcp_super(), parsed.is_plain(), gone) else {
        return Err(DropReason::Offload);
    };
    let packet = packet
        .get_mut(..parsed.len())
        .ok_or(DropReason::Truncated)?;
    let header_len = parsed.header_len();
    packet.copy_within(header_len + usize::from(gone).., header_len);
    let left = Parsed {
        len: parsed.len - gone,
        ..*parsed
    };
    rewrite(packet, &left, gone, segments).ok_or(DropReason::Truncated)?;
    let offload = if left.payload_len() > usize::from(offload.gso_size) {
        offload
    } else {
        Offload {
            partial: true,
            ..Offload::NONE
        }
    };
    Ok((left, offload))
}

fn rewrite(packet: &mut [u8], left: &Parsed, gone: u16, segments: u16) -> Option<()> {
    match left.version() {
        Version::V4 => {
            put(packet, 2, left.len.to_be_bytes())?;
            let id = word(packet, 4)?.wrapping_add(segments);
            put(packet, 4, id.to_be_bytes())?;
            put(packet, 10, [0, 0])?;
            let check = checksum::check(checksum::sum(packet.get(..V4_HEADER)?));
            put(packet, 10, check.to_be_bytes())?;
        }
        Version::V6 => put(packet, 4, (left.len - left.l4).to_be_bytes())?,
    }
    let l4 = left.l4();
    let sequence = super::coalesce::sequence(packet, l4)?.wrapping_add(gone.into());
    put(packet, l4 + 4, sequence.to_be_bytes())?;
    // Said by the segment that is gone; TCP says it again if it matters.
    *packet.get_mut(l4 + 13)? &= !tcp_flag::CWR;
    let sum = pseudo_sum(left, packet, left.len - left.l4);
    put(packet, left.sum_at()?, sum.to_be_bytes())
}
