//! Saved states of a judge: one that is accepted is saved as it was restored, and can be gone on with.

#![no_main]

use std::sync::LazyLock;

use coalmine_fuzz::POLICY;
use coalmine_judge::{evidence::Window, policy::Policy, v1::Judge};
use libfuzzer_sys::fuzz_target;

static WINDOWS: LazyLock<Vec<Window>> = LazyLock::new(|| {
    let lines = coalmine_fuzz::evidence();
    lines
        .iter()
        .map(|line| Window::from_json(line).unwrap())
        .collect()
});

static RULES: LazyLock<Policy> = LazyLock::new(|| Policy::parse(POLICY).unwrap());

fn restore(saved: &[u8]) -> Result<Judge, String> {
    Judge::restore(RULES.clone(), None, None, saved)
}

fuzz_target!(|data: &[u8]| {
    let Ok(mut judge) = restore(data) else { return };
    let saved = judge.save();
    let mut again = restore(&saved).unwrap();
    assert_eq!(again.save(), saved);
    for window in &*WINDOWS {
        // The state may be of a later window.
        let outcome = judge.step(window);
        assert_eq!(again.step(window), outcome);
        if let Ok(outcome) = outcome {
            judge.explain(&outcome, None);
        }
    }
    assert_eq!(again.save(), judge.save());
});
