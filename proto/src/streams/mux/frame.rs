//! The header of a yamux frame.

/// Its bytes on the wire.
pub(super) const LEN: usize = 12;

/// What a stream may send before it is granted more, by yamux's own rules.
pub const INITIAL_WINDOW: u32 = 256 * 1024;

pub(super) mod flag {
    pub(in crate::streams::mux) const SYN: u16 = 1;
    pub(in crate::streams::mux) const ACK: u16 = 2;
    pub(in crate::streams::mux) const FIN: u16 = 4;
    pub(in crate::streams::mux) const RST: u16 = 8;
    pub(super) const ALL: u16 = 15;
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Data = 0,
    Window = 1,
    Ping = 2,
    GoAway = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) flags: u16,
    pub(super) stream: u32,
    /// Bytes that follow, or are granted; a ping's number; why the other side goes.
    pub(super) length: u32,
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[1] = self.kind as u8;
        bytes[2..4].copy_from_slice(&self.flags.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// None if no header of this protocol looks like that.
    pub(super) fn read(bytes: [u8; LEN]) -> Option<Header> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = bytes;
        let kind = match kind {
            0 => Kind::Data,
            1 => Kind::Window,
            2 => Kind::Ping,
            3 => Kind::GoAway,
            _ => return None,
        };
        let flags = u16::from_be_bytes([f0, f1]);
        (version == 0 && flags & !flag::ALL == 0).then_some(Header {
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    pub(super) fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}
