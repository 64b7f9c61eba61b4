//! What an ICMP error quotes: the beginning of a packet, cut off anywhere.

use super::{V4_HEADER, V6_HEADER, Version, walk_v6};

/// The beginning of a packet that an error quotes, which may end anywhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quoted {
    /// Where its IP header begins.
    pub(crate) ip: usize,
    /// Protocol and place of its transport header, if it had one.
    pub(crate) transport: Option<(u8, usize)>,
}

/// Reads what an error quotes; none if not even its IP header is there.
pub(crate) fn parse_quoted(packet: &[u8], version: Version, ip: usize) -> Option<Quoted> {
    let rest = packet.get(ip..)?;
    let transport = match version {
        Version::V4 => {
            let header = rest.first_chunk::<V4_HEADER>()?;
            if header[0] >> 4 != 4 || header[0] & 0x0f < 5 {
                return None;
            }
            let later = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
            let l4 = ip + usize::from(header[0] & 0x0f) * 4;
            (!later).then_some((header[9], l4))
        }
        Version::V6 => {
            let header = rest.first_chunk::<V6_HEADER>()?;
            if header[0] >> 4 != 6 {
                return None;
            }
            match walk_v6(rest, header[6]) {
                Ok(walk) => {
                    let later = walk.fragment.is_some_and(|fragment| fragment.offset != 0);
                    (!later).then(|| (walk.protocol, ip + usize::from(walk.l4)))
                }
                // Cut off within its extension headers: no transport header to see.
                Err(_) => None,
            }
        }
    };
    Some(Quoted { ip, transport })
}
