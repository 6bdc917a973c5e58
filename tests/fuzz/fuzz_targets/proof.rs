//! Proofs that a record is in the log. One that is read is written with the same bytes, and none shows another record
//! than the one that is there.

#![no_main]

use std::sync::LazyLock;

use coalmine_judge::{
    chain::Hash,
    note::{Proof, VerifierKey},
};
use libfuzzer_sys::fuzz_target;

static KEYS: LazyLock<[VerifierKey; 2]> = LazyLock::new(coalmine_fuzz::keys);
static LINES: LazyLock<Vec<String>> = LazyLock::new(coalmine_fuzz::lines);

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(proof) = Proof::parse(text) else { return };
    assert_eq!(proof.to_string(), text);
    let line = proof.extra.as_deref().unwrap_or_default();
    if let Ok(checkpoint) = proof.verify(Hash::leaf(line), &*KEYS) {
        assert!(proof.index < checkpoint.size);
        assert_eq!(LINES[proof.index as usize].as_bytes(), line);
    }
});
