//! Frames of data messages (RFC 6455, 5.2), for whoever sends past a library
//! that would copy what it is given.
//!
//! A message is one final binary frame. What a client sends is masked, which
//! is done in place: the sender has no more use for the bytes.

/// The longest header: two bytes, a length of eight, a mask of four.
pub const MAX_HEADER: usize = 14;

/// The header of a binary message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; MAX_HEADER],
    len: u8,
}

impl Header {
    /// Of so many bytes; a client says with what they are masked.
    pub fn new(payload: usize, mask: Option<[u8; 4]>) -> Header {
        let mut bytes = [0; MAX_HEADER];
        bytes[0] = 0x82;
        let mut len = match payload {
            0..=125 => {
                bytes[1] = payload as u8;
                2
            }
            126..=0xffff => {
                bytes[1] = 126;
                bytes[2..4].copy_from_slice(&(payload as u16).to_be_bytes());
                4
            }
            _ => {
                bytes[1] = 127;
                bytes[2..10].copy_from_slice(&(payload as u64).to_be_bytes());
                10
            }
        };
        if let Some(mask) = mask {
            bytes[1] |= 0x80;
            bytes[len..len + 4].copy_from_slice(&mask);
            len += 4;
        }
        Header {
            bytes,
            len: len as u8,
        }
    }

    /// As it is sent.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len.into()]
    }
}

/// Masks a payload, or takes the mask off again.
pub fn mask(payload: &mut [u8], key: [u8; 4]) {
    let wide = u64::from_ne_bytes([
        key[0], key[1], key[2], key[3], key[0], key[1], key[2], key[3],
    ]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_those_of_rfc_6455() {
        for (payload, bytes) in [
            (0, &[0x82, 0][..]),
            (125, &[0x82, 125]),
            (126, &[0x82, 126, 0, 126]),
            (65_535, &[0x82, 126, 0xff, 0xff]),
            (65_536, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            assert_eq!(Header::new(payload, None).bytes(), bytes);
            let masked = Header::new(payload, Some([1, 2, 3, 4]));
            let (header, key) = masked.bytes().split_at(bytes.len());
            assert_eq!(key, [1, 2, 3, 4]);
            assert_eq!(header[1], bytes[1] | 0x80);
            assert_eq!(header[2..], bytes[2..]);
        }
    }

    #[test]
    fn every_byte_is_masked_by_its_place() {
        let key = [0x12, 0x9a, 0, 0xff];
        for len in 0..70 {
            for from in 0..8 {
                let plain: Vec<u8> = (0..len + from).map(|n| (n * 37) as u8).collect();
                let mut bytes = plain.clone();
                mask(&mut bytes[from..], key);
                for (n, (masked, plain)) in bytes.iter().zip(&plain).enumerate() {
                    let by = n.checked_sub(from).map_or(0, |n| key[n % 4]);
                    assert_eq!(masked ^ plain, by);
                }
                mask(&mut bytes[from..], key);
                assert_eq!(bytes, plain);
            }
        }
    }
}
