//! Policies: one that is accepted can be explained and judged by.

#![no_main]

use std::sync::LazyLock;

use coalmine_judge::{evidence::Window, policy::Policy, v1::Judge};
use libfuzzer_sys::fuzz_target;

static WINDOWS: LazyLock<Vec<Window>> = LazyLock::new(|| {
    let lines = coalmine_fuzz::evidence();
    lines
        .iter()
        .map(|line| Window::from_json(line).unwrap())
        .collect()
});

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match Policy::parse(text) {
        Ok(policy) => {
            assert_eq!(policy.source, text);
            assert!(policy.window_ms() > 0);
            assert!(!policy.notes(None).is_empty());
            if let Ok(mut judge) = Judge::new(policy, None, None) {
                for window in &*WINDOWS {
                    // It may have limits that the arithmetic cannot express.
                    drop(judge.step(window));
                }
            }
        }
        Err(error) => assert!(error.line > 0 && error.column > 0 && !error.message.is_empty()),
    }
});
