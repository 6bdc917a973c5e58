//! Lines of evidence: what is accepted is written in one form, and the judge takes it.

#![no_main]

use std::sync::LazyLock;

use coalmine_fuzz::POLICY;
use coalmine_judge::{evidence::Window, policy::Policy, v1::Judge};
use libfuzzer_sys::fuzz_target;

static JUDGE: LazyLock<Judge> =
    LazyLock::new(|| Judge::new(Policy::parse(POLICY).unwrap(), None, None).unwrap());

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut judge = JUDGE.clone();
    for line in text.lines() {
        let Ok(window) = Window::from_json(line) else {
            continue;
        };
        let written = window.to_json();
        let read = Window::from_json(&written).unwrap();
        assert_eq!(read.to_json(), written);
        // Rows in which nothing was counted are not written, and say nothing.
        let mut counted = window.clone();
        counted
            .rows
            .retain(|row| !row.canary.is_empty() || !row.baseline.is_empty());
        assert_eq!(read, counted);
        let mut again = judge.clone();
        match judge.step(&window) {
            Ok(outcome) => {
                assert_eq!(again.step(&read).as_ref(), Ok(&outcome));
                assert_eq!(outcome.window, window.number);
                assert!(outcome.score_ppm <= 1_000_000 && !outcome.reason.is_empty());
            }
            Err(error) => assert_eq!(again.step(&read), Err(error)),
        }
    }
});
