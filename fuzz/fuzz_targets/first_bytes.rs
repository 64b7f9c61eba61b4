//! What strangers send first: it means the same whole and in pieces, and an
//! answer once given stays.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvpn_proto::sniff::{HelloReader, Reading, classify};

fuzz_target!(|bytes: &[u8]| {
    let class = classify(bytes);
    let whole = HelloReader::new().read(bytes);
    let mut pieces = HelloReader::new();
    let mut first = None;
    for end in 0..=bytes.len() {
        let early = classify(&bytes[..end]);
        assert!(early.is_none() || early == class);
        if first.is_none() {
            let reading = pieces.read(&bytes[..end]);
            first = (reading != Reading::More).then_some(reading);
        }
    }
    assert_eq!(first.unwrap_or(Reading::More), whole);
});
