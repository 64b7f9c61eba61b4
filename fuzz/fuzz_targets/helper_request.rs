//! What the helper reads: any bytes are refused, or are exactly what they encode to.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvpn_ipc::Request;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = Request::decode(bytes) {
        assert_eq!(&request.encode()[..], bytes);
    }
});
