//! Who asks is answered by threads of their own.

use std::fs;

use coalmine_tests::{components::Aggregator, eventually, http::get};
use serde_json::json;

use super::{SHORT, records};

/// For how long threads of a name have run, in nanoseconds.
fn has_run(aggregator: &Aggregator, name: &str) -> u64 {
    let threads = aggregator.threads(name);
    assert!(!threads.is_empty(), "{name}");
    let has_run = |thread: u32| {
        let text = fs::read_to_string(format!("/proc/{thread}/schedstat")).unwrap();
        text.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    threads.into_iter().map(has_run).sum()
}

#[test]
fn threads_that_answer_do_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), SHORT);
    aggregator.launch();
    let ran = || ["answering", "working"].map(|name| has_run(&aggregator, name));

    let before = ran();
    for _ in 0..500 {
        assert_eq!(get(aggregator.http, "/v1/rollouts").unwrap().status, 200);
    }
    let after = ran();
    let [answering, working] = [0, 1].map(|name| after[name] - before[name]);
    assert!(
        working * 4 < answering,
        "polls: {answering} ns, and {working} ns elsewhere"
    );

    let request = json!({ "service": "checkout", "canary_version": "v2" });
    assert_eq!(aggregator.post("/v1/rollouts", &request).status, 201);
    let before = ran();
    eventually("windows are judged", || {
        let decisions = records(&aggregator.data)
            .iter()
            .filter(|kind| *kind == "decision")
            .count();
        (decisions >= 3).then_some(())
    });
    let after = ran();
    let [answering, working] = [0, 1].map(|name| after[name] - before[name]);
    assert!(
        answering * 4 < working,
        "judging: {working} ns, and {answering} ns elsewhere"
    );
}
