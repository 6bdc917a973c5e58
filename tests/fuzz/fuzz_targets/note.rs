//! Signed notes and the text forms of keys. No other text than those that were signed is verified.

#![no_main]

use std::sync::LazyLock;

use coalmine_judge::note::{Checkpoint, Note, SignerKey, VerifierKey};
use libfuzzer_sys::fuzz_target;

static KEYS: LazyLock<[VerifierKey; 2]> = LazyLock::new(coalmine_fuzz::keys);
static SIGNED: LazyLock<Vec<Checkpoint>> = LazyLock::new(coalmine_fuzz::checkpoints);

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(note) = Note::parse(text) {
        let unverified = note.unverified();
        assert!(text.starts_with(unverified) && unverified.ends_with('\n'));
        if let Ok(verified) = note.verify(&*KEYS) {
            assert_eq!(verified, unverified);
        }
        let made = note.signatures_of(&*KEYS).concat();
        if !made.is_empty() {
            assert!(SIGNED.iter().any(|signed| signed.to_string() == unverified));
            let kept = format!("{unverified}\n{made}");
            assert_eq!(Checkpoint::open(&kept, &*KEYS).unwrap().to_string(), unverified);
        }
    }
    if let Ok(checkpoint) = Checkpoint::open(text, &*KEYS) {
        assert!(SIGNED.contains(&checkpoint));
    }
    if let Ok(key) = VerifierKey::parse(text) {
        assert_eq!(key.to_string(), text);
    }
    if let Ok(key) = SignerKey::parse(text) {
        assert_eq!(key.to_secret_text().trim_end(), text.trim_end());
    }
});
