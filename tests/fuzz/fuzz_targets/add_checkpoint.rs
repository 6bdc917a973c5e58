//! Requests to a witness. It cosigns no other checkpoints than those of the log, and none that goes back.

#![no_main]

use std::sync::LazyLock;

use coalmine_fuzz::{COSIGNED, LOG};
use coalmine_judge::{
    note::{Checkpoint, VerifierKey},
    witness::AddCheckpoint,
};
use libfuzzer_sys::fuzz_target;

static KEYS: LazyLock<[VerifierKey; 2]> = LazyLock::new(coalmine_fuzz::keys);
static SIGNED: LazyLock<Vec<Checkpoint>> = LazyLock::new(coalmine_fuzz::checkpoints);

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let request = match AddCheckpoint::parse(text) {
        Ok(request) => request,
        Err(refusal) => return assert_eq!(refusal.status(), 400),
    };
    assert_eq!(request.to_string(), text);
    let Ok(said) = request.statement() else { return };
    let latest = (said.origin == LOG).then_some(&SIGNED[COSIGNED]);
    for latest in [None, latest] {
        if let Ok(cosigned) = request.decide(&*KEYS, latest) {
            assert_eq!(cosigned, said);
            assert!(SIGNED.contains(&cosigned));
            assert_eq!(request.old, latest.map_or(0, |latest| latest.size));
            assert!(request.old <= cosigned.size);
        }
    }
});
