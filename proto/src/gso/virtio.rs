//! The ten bytes before every packet of a TUN with `IFF_VNET_HDR`.

use crate::packet::{Parsed, Transport, tcp_flag};
use crate::record::{Offload, gso_type};

/// Its length.
pub const VIRTIO_LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const ECN: u8 = 0x80;
const TCP_SUM: u16 = 16;
const UDP_SUM: u16 = 6;

/// What is left to do for a packet, in the kernel's form. In the byte order of
/// the machine, as a TUN has it unless told otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioHeader {
    /// Whether the checksum is partial.
    pub flags: u8,
    /// What the segments are, and whether the first one tells of congestion.
    pub gso_type: u8,
    /// Bytes of all headers.
    pub hdr_len: u16,
    /// Payload of one segment.
    pub gso_size: u16,
    /// Where the checksum begins to count.
    pub csum_start: u16,
    /// Where the checksum is stored, from there.
    pub csum_offset: u16,
}

impl VirtioHeader {
    /// Nothing is left to do.
    pub const FINISHED: Self = Self {
        flags: 0,
        gso_type: 0,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    };

    /// Reads the header at the start of what a TUN gave.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = *bytes.first_chunk()?;
        Some(Self {
            flags,
            gso_type,
            hdr_len: u16::from_ne_bytes([h0, h1]),
            gso_size: u16::from_ne_bytes([g0, g1]),
            csum_start: u16::from_ne_bytes([s0, s1]),
            csum_offset: u16::from_ne_bytes([o0, o1]),
        })
    }

    /// Its bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; VIRTIO_LEN] {
        let [h0, h1] = self.hdr_len.to_ne_bytes();
        let [g0, g1] = self.gso_size.to_ne_bytes();
        let [s0, s1] = self.csum_start.to_ne_bytes();
        let [o0, o1] = self.csum_offset.to_ne_bytes();
        let Self {
            flags, gso_type, ..
        } = self;
        [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1]
    }

    /// The same in the words of a record.
    #[must_use]
    pub const fn offload(self) -> Offload {
        let gso_type = self.gso_type & !ECN;
        Offload {
            partial: self.flags & NEEDS_CSUM != 0,
            gso_type,
            gso_size: if gso_type == gso_type::NONE {
                // Without a type the kernel does not promise anything here.
                0
            } else {
                self.gso_size
            },
        }
    }

    /// Whether a kernel's header means the transport checksum that we found.
    /// Another one, as of a packet within a packet, we could not finish.
    #[must_use]
    pub fn describes(self, parsed: &Parsed) -> bool {
        self.flags & NEEDS_CSUM == 0
            || (self.csum_start == parsed.l4 && Some(self.csum_offset) == sum_offset(parsed))
    }

    pub(super) fn partial(parsed: &Parsed, offload: Offload) -> Self {
        let mut header = Self {
            flags: NEEDS_CSUM,
            csum_start: parsed.l4,
            csum_offset: sum_offset(parsed).unwrap_or_default(),
            ..Self::FINISHED
        };
        // One segment is no super-packet, and some kernels refuse what says otherwise.
        if parsed.payload_len() > usize::from(offload.gso_size) {
            header.gso_type = offload.gso_type;
            header.gso_size = offload.gso_size;
        }
        if header.gso_type != gso_type::NONE {
            header.hdr_len = parsed.header_len;
            if let Transport::Tcp { flags, .. } = parsed.transport {
                header.gso_type |= if flags & tcp_flag::CWR != 0 { ECN } else { 0 };
            }
        } else {
            header.gso_size = 0;
        }
        header
    }
}

fn sum_offset(parsed: &Parsed) -> Option<u16> {
    match parsed.transport {
        Transport::Tcp { .. } => Some(TCP_SUM),
        Transport::Udp { .. } => Some(UDP_SUM),
        Transport::Icmp(_) | Transport::Later | Transport::Other => None,
    }
}
