//! Blobs: whatever stands in a file, no more is unpacked than allowed, and what was packed is unpacked.

#![no_main]

use coalmine_aggregator::ledger::unpack;
use libfuzzer_sys::fuzz_target;

const MAX_BYTES: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    if let Ok(content) = unpack(data, MAX_BYTES) {
        assert!(content.len() as u64 <= MAX_BYTES);
    }
    let stored = zstd::bulk::compress(data, 3).unwrap();
    let length = data.len() as u64;
    assert_eq!(unpack(&stored, length).as_deref(), Ok(data));
    if length > 0 {
        assert!(unpack(&stored, length - 1).is_err());
    }
});
