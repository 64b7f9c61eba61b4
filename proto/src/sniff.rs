//! What a connection is by its first bytes.
//!
//! One table for all: equal bytes mean the same however they were cut into
//! segments, and nothing is decided as long as two answers are possible.
//! Nothing here is kept, allocated or answered.

pub mod alert;
mod cursor;
mod hello;

pub use self::hello::{ClientHello, HELLO_LIMIT, HelloReader, Protocols, RECORDS_LIMIT, Reading};

/// What a connection begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// A TLS record with a handshake in it.
    Tls,
    /// A greeting of SSL 2, which nobody speaks any more.
    Ssl2,
    /// A request of HTTP/1.
    Http,
    /// The preface of HTTP/2 without TLS.
    Http2,
    /// The banner of SSH.
    Ssh,
    /// Something else.
    Other,
}

/// Methods that a request may begin with, as registered.
const METHODS: [&[u8]; 39] = [
    b"ACL ",
    b"BASELINE-CONTROL ",
    b"BIND ",
    b"CHECKIN ",
    b"CHECKOUT ",
    b"CONNECT ",
    b"COPY ",
    b"DELETE ",
    b"GET ",
    b"HEAD ",
    b"LABEL ",
    b"LINK ",
    b"LOCK ",
    b"MERGE ",
    b"MKACTIVITY ",
    b"MKCALENDAR ",
    b"MKCOL ",
    b"MKREDIRECTREF ",
    b"MKWORKSPACE ",
    b"MOVE ",
    b"OPTIONS ",
    b"ORDERPATCH ",
    b"PATCH ",
    b"POST ",
    b"PROPFIND ",
    b"PROPPATCH ",
    b"PUT ",
    b"QUERY ",
    b"REBIND ",
    b"REPORT ",
    b"SEARCH ",
    b"TRACE ",
    b"UNBIND ",
    b"UNCHECKOUT ",
    b"UNLINK ",
    b"UNLOCK ",
    b"UPDATE ",
    b"UPDATEREDIRECTREF ",
    b"VERSION-CONTROL ",
];

/// Tells what the bytes begin; `None` as long as it can still be more than one
/// thing. More bytes never change an answer.
pub fn classify(bytes: &[u8]) -> Option<Class> {
    match *bytes {
        [] | [0x16] | [0x16, 0x03] => None,
        [0x16, 0x03, 0x00..=0x03, ..] => Some(Class::Tls),
        [0x80..=0xff, ..] => ssl2(bytes),
        [b'A'..=b'Z', ..] => text(bytes),
        _ => Some(Class::Other),
    }
}

/// A two-byte length with its highest bit set, the kind of message, a version.
fn ssl2(bytes: &[u8]) -> Option<Class> {
    match *bytes {
        [_] | [_, _] | [_, _, 1] | [_, _, 1, 0 | 3] => None,
        [_, _, 1, 0, 2, ..] | [_, _, 1, 3, 0..=3, ..] => Some(Class::Ssl2),
        _ => Some(Class::Other),
    }
}

fn text(bytes: &[u8]) -> Option<Class> {
    let words = METHODS.iter().map(|m| (*m, Class::Http));
    let others = [(&b"PRI "[..], Class::Http2), (b"SSH-", Class::Ssh)];
    let mut open = false;
    for (word, class) in words.chain(others) {
        if bytes.starts_with(word) {
            return Some(class);
        }
        open |= word.starts_with(bytes);
    }
    (!open).then_some(Class::Other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pro_04_all_two_byte_prefixes_have_one_meaning() {
        let mut open = 0;
        for both in 0..=u16::MAX {
            let bytes = both.to_be_bytes();
            let whole = classify(&bytes);
            // One byte says the same or nothing yet.
            let first = classify(&bytes[..1]);
            assert!(first.is_none() || first == whole, "{bytes:x?}");
            // Two bytes are a whole answer for rubbish only.
            assert!(whole.is_none() || whole == Some(Class::Other), "{bytes:x?}");
            open += u32::from(whole.is_none());
        }
        // One of TLS, the upper half for SSL 2, and the beginnings of words.
        let words = METHODS.iter().copied().chain([&b"PRI "[..], b"SSH-"]);
        let beginnings: std::collections::BTreeSet<_> = words.map(|w| &w[..2]).collect();
        assert_eq!(open, 1 + 128 * 256 + beginnings.len() as u32);
    }

    #[test]
    fn pro_04_ambiguous_prefixes() {
        let table: &[(&[u8], Option<Class>)] = &[
            (b"", None),
            (b"GE", None),
            (b"GET", None),
            (b"GET ", Some(Class::Http)),
            (b"GET\t", Some(Class::Other)),
            (b"get / HTTP/1.1", Some(Class::Other)),
            (b"GETS / HTTP/1.1", Some(Class::Other)),
            (b"P", None),
            (b"PR", None),
            (b"PRI", None),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(Class::Http2)),
            (b"PRO", None),
            (b"PROX", Some(Class::Other)),
            (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", Some(Class::Other)),
            (b"PROPFIND / HTTP/1.1\r\n", Some(Class::Http)),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11", Some(Class::Other)),
            (b"S", None),
            (b"SSH", None),
            (b"SSH-2.0-x\r\n", Some(Class::Ssh)),
            (b"SSHD", Some(Class::Other)),
            (b"\x16", None),
            (b"\x16\x03", None),
            (b"\x16\x03\x01", Some(Class::Tls)),
            (b"\x16\x03\x04", Some(Class::Other)),
            (b"\x16\x02\x00", Some(Class::Other)),
            (b"\x80", None),
            (b"\x80\x2e\x01\x00", None),
            (b"\x80\x2e\x01\x00\x02", Some(Class::Ssl2)),
            (b"\x80\x2e\x01\x03\x01", Some(Class::Ssl2)),
            (b"\x80\x2e\x02", Some(Class::Other)),
            (b"\0", Some(Class::Other)),
            (b"\n", Some(Class::Other)),
        ];
        for (bytes, class) in table {
            assert_eq!(
                classify(bytes),
                *class,
                "{:?}",
                bytes.escape_ascii().to_string()
            );
        }
    }
}
