//! Cuts segments off a TCP super-packet: single ones at its front, as a queue
//! drops them that wants to tell a sender to slow down without losing forty-five
//! segments for it, and those at its end that go later.

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

/// Cuts so many bytes, whole segments, off the end of a TCP super-packet, in
/// place. They go later: [`trim`] makes of a copy what is left then.
pub fn shorten(
    packet: &mut [u8],
    parsed: &Parsed,
    offload: Offload,
    rest: u16,
) -> Result<(Parsed, Offload), DropReason> {
    let tcp = matches!(parsed.transport(), Transport::Tcp { .. });
    let kept = parsed.payload_len().checked_sub(rest.into());
    let kept = kept.filter(|kept| *kept > 0 && kept.is_multiple_of(offload.gso_size.into()));
    let (true, true, Some(kept)) = (tcp && offload.is_tcp_super(), parsed.is_plain(), kept) else {
        return Err(DropReason::Offload);
    };
    let left = Parsed {
        len: parsed.len - rest,
        ..*parsed
    };
    let packet = packet.get_mut(..left.len()).ok_or(DropReason::Truncated)?;
    rewrite(packet, &left, 0, 0).ok_or(DropReason::Truncated)?;
    // The end and the push come with the last byte.
    if rest > 0
        && let Some(flags) = packet.get_mut(left.l4() + 13)
    {
        *flags &= !(tcp_flag::FIN | tcp_flag::PSH);
    }
    let offload = if kept > usize::from(offload.gso_size) {
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
    if segments > 0 {
        // Said by the segment that is gone; TCP says it again if it matters.
        *packet.get_mut(l4 + 13)? &= !tcp_flag::CWR;
    }
    let sum = pseudo_sum(left, packet, left.len - left.l4);
    put(packet, left.sum_at()?, sum.to_be_bytes())
}
