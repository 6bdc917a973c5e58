//! The text of a checkpoint: it is written as it was read, and can be signed and opened.

#![no_main]

use std::sync::LazyLock;

use coalmine_judge::note::{Checkpoint, SignerKey, is_name};
use libfuzzer_sys::fuzz_target;

static KEY: LazyLock<SignerKey> = LazyLock::new(coalmine_fuzz::log_key);

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(checkpoint) = Checkpoint::parse(text) else {
        return;
    };
    let written = checkpoint.to_string();
    // What follows are extension lines, which mean nothing.
    assert!(text.starts_with(&written));
    assert_eq!(Checkpoint::parse(&written).as_ref(), Ok(&checkpoint));
    if is_name(&checkpoint.origin) {
        let note = checkpoint.sign([&*KEY]);
        assert_eq!(Checkpoint::open(&note, &[KEY.verifier()]), Ok(checkpoint));
    }
});
