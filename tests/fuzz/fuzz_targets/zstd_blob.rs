//! Blobs: whatever stands in a file, no more is unpacked than allowed, and what was packed is unpacked.

#![no_main]

use coalmine_aggregator::ledger::unpack;
use libfuzzer_sys::fuzz_target;

const MAX_BYTES: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = unpack(data, MAX_BYTES) {
        assert!(text.len() as u64 <= MAX_BYTES);
    }
    let stored = zstd::bulk::compress(data, 3).unwrap();
    match std::str::from_utf8(data) {
        Ok(text) => {
            assert_eq!(unpack(&stored, MAX_BYTES).as_deref(), Ok(text));
            if !text.is_empty() {
                assert!(unpack(&stored, text.len() as u64 - 1).is_err());
            }
        }
        Err(_) => assert!(unpack(&stored, MAX_BYTES).is_err()),
    }
});
