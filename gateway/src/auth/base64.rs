//! Base64 in the two alphabets that are met here.

/// Decodes the standard alphabet, padded or not. `None` for anything else,
/// stray bits at the end included.
pub(crate) fn standard(text: &str) -> Option<Vec<u8>> {
    decode(text.trim_end_matches('='), b'+', b'/')
}

/// Decodes the URL alphabet without padding.
pub(crate) fn url(text: &str) -> Option<Vec<u8>> {
    decode(text, b'-', b'_')
}

/// Encodes in the URL alphabet without padding.
pub(crate) fn to_url(bytes: &[u8]) -> String {
    encode(bytes, b'-', b'_')
}

/// Encodes in the standard alphabet with padding.
pub(crate) fn to_standard(bytes: &[u8]) -> String {
    let mut text = encode(bytes, b'+', b'/');
    text.extend(std::iter::repeat_n('=', (4 - text.len() % 4) % 4));
    text
}

fn encode(bytes: &[u8], sixty_two: u8, sixty_three: u8) -> String {
    let letter = |value: u8| match value {
        0..26 => b'A' + value,
        26..52 => b'a' + value - 26,
        52..62 => b'0' + value - 52,
        62 => sixty_two,
        _ => sixty_three,
    };
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut bits = 0_u32;
        for i in 0..3 {
            bits = bits << 8 | u32::from(chunk.get(i).copied().unwrap_or(0));
        }
        for i in 0..=chunk.len() {
            let value = (bits >> (18 - 6 * i)) as u8 & 63;
            text.push(char::from(letter(value)));
        }
    }
    text
}

fn decode(text: &str, sixty_two: u8, sixty_three: u8) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut held) = (0_u32, 0);
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b if b == sixty_two => 62,
            b if b == sixty_three => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    (held < 6 && bits == 0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_and_nothing_else() {
        for len in 0..40_usize {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 37 + 250) as u8).collect();
            assert_eq!(url(&to_url(&bytes)).as_ref(), Some(&bytes));
            assert_eq!(standard(&to_standard(&bytes)), Some(bytes));
        }
        assert_eq!(standard("dXNlcjpwYXNz").as_deref(), Some(&b"user:pass"[..]));
        assert_eq!(standard("YQ==").as_deref(), Some(&b"a"[..]));
        assert_eq!(standard("+/8=").as_deref(), Some(&[0xfb, 0xff][..]));
        for wrong in ["A", "YR==", "a b", "é", "-_8"] {
            assert_eq!(standard(wrong), None, "{wrong}");
        }
        assert_eq!(url("YR"), None, "stray bits");
    }
}
