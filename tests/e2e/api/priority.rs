//! Who asks is answered by threads of their own, to which all others give way.

use std::fs;

use coalmine_tests::{components::Aggregator, eventually, http::get};
use serde_json::json;

use super::{SHORT, records};

/// By how much the others are behind.
const BEHIND: i64 = 3;

/// The lowest priority that there is, as `nice` counts it.
const LOWEST: i64 = 19;

fn nice(thread: u32) -> i64 {
    let stat = fs::read_to_string(format!("/proc/{thread}/stat")).unwrap();
    // The name, in brackets, may have spaces in it; priority and nice are fields 18 and 19 (proc_pid_stat(5)).
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(16).unwrap().parse().unwrap()
}

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
fn threads_that_answer_do_nothing_else_and_the_others_give_way() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), SHORT);
    aggregator.launch();
    let own = nice(aggregator.thread("answering").unwrap());
    for name in ["working", "ledger", "windows"] {
        for thread in aggregator.threads(name) {
            assert_eq!(nice(thread), (own + BEHIND).min(LOWEST), "{name}");
        }
    }
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
