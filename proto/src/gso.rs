//! Super-packets: what is said about them to a kernel, how they are cut for a
//! client that cannot take them, and how they are made of what it sends.
//!
//! A super-packet is one set of headers before the payload of many segments. It
//! crosses the tunnel and the kernel as one packet, which is most of our speed.

mod coalesce;
mod split;
mod trim;
mod virtio;

pub use self::coalesce::{Coalesced, Coalescer, Joins, Offer};
pub use self::split::Segments;
pub use self::trim::{shorten, trim};
pub use self::virtio::{VIRTIO_LEN, VirtioHeader};
use crate::checksum;
use crate::packet::{Parsed, Transport, put};
use crate::record::{Offload, gso_type};
use crate::validate::{DropReason, pseudo_sum};

/// How many packets, and bytes of them, this is for the programs at both ends.
/// Meters count these: whether a kernel merged them is luck.
#[must_use]
pub fn size(parsed: &Parsed, offload: Offload) -> (u64, u64) {
    size_of(parsed.len(), parsed.header_len(), offload)
}

/// The same for a packet of which only the lengths are known.
#[must_use]
pub fn size_of(len: usize, header_len: usize, offload: Offload) -> (u64, u64) {
    let count = segments_in(len.saturating_sub(header_len), offload);
    (count as u64, (len + header_len * (count - 1)) as u64)
}

/// Finishes a partial checksum in place. Does nothing to a packet that has none to finish.
pub fn finish_checksum(packet: &mut [u8], parsed: &Parsed) -> Result<(), DropReason> {
    let packet = packet
        .get_mut(..parsed.len())
        .ok_or(DropReason::Truncated)?;
    complete(packet, parsed)
}

/// Makes the virtio header for a packet that was validated with this offload,
/// and puts the right sum into the field of a partial checksum. All that comes
/// from the peer is the segment size, which validation has bounded.
///
/// `packet` holds at least all headers.
pub fn rebuild(
    packet: &mut [u8],
    parsed: &Parsed,
    offload: Offload,
) -> Result<VirtioHeader, DropReason> {
    if !offload.partial {
        return Ok(VirtioHeader::FINISHED);
    }
    let at = parsed.sum_at().ok_or(DropReason::Offload)?;
    let sum = pseudo_sum(parsed, packet, parsed.len - parsed.l4);
    put(packet, at, sum.to_be_bytes()).ok_or(DropReason::Truncated)?;
    Ok(VirtioHeader::partial(parsed, offload))
}

/// Computes the transport checksum of a whole TCP or UDP packet from nothing.
fn complete(packet: &mut [u8], parsed: &Parsed) -> Result<(), DropReason> {
    let Some(at) = parsed.sum_at() else {
        return Ok(());
    };
    let Ok(length) = u16::try_from(packet.len().saturating_sub(parsed.l4())) else {
        return Err(DropReason::TotalLength);
    };
    put(packet, at, [0, 0]).ok_or(DropReason::Truncated)?;
    let pseudo = pseudo_sum(parsed, packet, length);
    let sum = checksum::add(pseudo, checksum::sum(&packet[parsed.l4()..]));
    let check = match parsed.transport() {
        Transport::Udp { .. } => checksum::udp_check(sum),
        Transport::Tcp { .. } | Transport::Icmp(_) | Transport::Later | Transport::Other => {
            checksum::check(sum)
        }
    };
    put(packet, at, check.to_be_bytes()).ok_or(DropReason::Truncated)
}

fn segment_count(parsed: &Parsed, offload: Offload) -> usize {
    segments_in(parsed.payload_len(), offload)
}

fn segments_in(payload: usize, offload: Offload) -> usize {
    if offload.gso_type == gso_type::NONE || offload.gso_size == 0 {
        return 1;
    }
    payload.div_ceil(offload.gso_size.into()).max(1)
}
