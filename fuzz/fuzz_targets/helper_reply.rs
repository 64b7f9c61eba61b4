//! What the gateway reads: any bytes are refused, or are exactly what they encode to.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvpn_ipc::Reply;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(reply) = Reply::decode(bytes) {
        assert_eq!(&reply.encode()[..], bytes);
    }
});
