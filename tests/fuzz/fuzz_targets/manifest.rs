//! Manifests: what is accepted is written in one form and read again.

#![no_main]

use coalmine_judge::manifest::{Manifest, SNAPSHOT_EVERY};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(manifest) = Manifest::parse(text) {
        assert!((1..=SNAPSHOT_EVERY).contains(&manifest.windows.len()));
        assert_eq!(Manifest::parse(&manifest.to_json()), Ok(manifest));
    }
});
