//! How soon the gate answers again after a crash.

use std::time::{Duration, Instant};

use coalmine_tests::{components::Aggregator, speaker::now_ms, within};

use super::{Agents, POLICY, Traffic, ask, conserves, end_all, verified};
use crate::stage;

/// What the aggregator promises.
const BUDGET: Duration = Duration::from_secs(5);

/// How long to go on waiting when the promise is broken, so that it is known by how much.
const LIMIT: Duration = Duration::from_secs(60);

/// Windows that are stored.
const WINDOWS: u64 = 100_000;

const ON_EACH_ARM: usize = 4;

const TRAFFIC: Traffic = Traffic {
    tenants: 4,
    requests: 20,
    length_ms: 1_000,
};

/// The windows are of yesterday, so that no rollout waits for them.
const AGE_MS: u64 = 24 * 3_600_000;

#[test]
fn the_gate_answers_within_five_seconds_of_a_crash_with_100_000_windows_stored() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    // By default they are not rolled up until there are many more, so each one is read again.
    let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY).released();
    aggregator.launch();
    let mut agents = Agents::new(ON_EACH_ARM, TRAFFIC);
    let (begin_ms, length_ms) = (now_ms() - AGE_MS, TRAFFIC.length_ms);
    let each = WINDOWS / agents.speakers.len() as u64;
    for speaker in &mut agents.speakers {
        for number in 0..each {
            let start_ms = begin_ms + number * u64::from(length_ms);
            speaker.count(start_ms, length_ms, TRAFFIC.rows(false));
        }
    }
    let begun = Instant::now();
    agents.flush(aggregator.grpc);
    eprintln!(
        "{WINDOWS} windows were durable after {:.1} s",
        begun.elapsed().as_secs_f64()
    );

    let rollout = aggregator.start_rollout();
    let path = format!("/v1/rollouts/{rollout}");
    let before = within(LIMIT, "five windows are judged", || {
        agents.turn(aggregator.grpc, false);
        let view = ask(aggregator.http, &path)?;
        (view["recorded"] == true && view["windows_judged"].as_u64()? >= 5).then_some(view)
    });
    agents.flush(aggregator.grpc);
    assert!(aggregator.windows() >= WINDOWS);

    aggregator.kill_9();
    let begun = Instant::now();
    aggregator.spawn();
    let gate = within(LIMIT, "the gate answers", || {
        ask(aggregator.http, &format!("{path}/gate"))
    });
    let took = begun.elapsed();
    eprintln!(
        "with {WINDOWS} windows stored the gate answered {:.2} s after a crash",
        took.as_secs_f64()
    );
    assert!(
        took < BUDGET,
        "{} ms, and {BUDGET:?} are promised",
        took.as_millis()
    );

    // It knows what it had said, or something newer, and all windows.
    assert!(gate["decision_hash"].is_string(), "{gate}");
    let after = aggregator.get(&path);
    assert!(
        after["windows_judged"].as_u64() >= before["windows_judged"].as_u64(),
        "{before} {after}"
    );
    conserves(&aggregator, &agents.made());
    end_all(&aggregator);
    aggregator.terminate();
    verified(&aggregator.data);
}
