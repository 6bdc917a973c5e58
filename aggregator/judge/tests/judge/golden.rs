//! The golden vectors: the bytes of each version of the judge.

use std::fmt::Write as _;

use coalmine_judge::{
    chain::Hash,
    evidence::{Latency, Pool, Probes, Window},
    policy::Policy,
    v1::Judge,
};
use coalmine_proto::{histogram::Histogram, names::Arm};

use crate::script::{POLICY, Script};

/// A policy that leaves everything to the defaults, so that a change of a default is noticed.
pub(crate) const MINIMAL: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults: { errors: { max_rate: 2% }, latency: { p99: 400ms } }
";

/// A policy that asks for everything.
pub(crate) const EVERYTHING: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1% }
  latency: { p99: 350ms, margin: 5% }
  pool: { max_wait_rate: 1% }
  required: [errors, latency, pool]
  judge_window: 1s
  hold_deadline: 45s
  on_deadline: hold
tenants:
  tenant-002: { tier: gold, labels: { region: eu } }
  tenant-007: { labels: { region: eu } }
tiers: { gold: { errors: { max_rate: 0.9% } } }
rollout: { cohorts: [tier, region, tail], warm_up: 3s, min_coverage: { tenants: 20% } }
";

/// What only `EVERYTHING` looks at: the pool, probes, silent agents, latencies that are slower on the canary, and
/// newcomers.
pub(crate) fn with_everything(window: &mut Window) {
    let number = window.number;
    let pool = |arm, acquires, waits| Pool {
        arm,
        acquires,
        waits,
        timeouts: waits / 5,
        used: if number > 30 { 10 } else { 4 },
        max: 10,
        at_least: false,
        estimated: false,
        agents: None,
    };
    window.pool = vec![
        pool(Arm::Canary, 150, number % 7),
        pool(Arm::Baseline, 1_400, number % 3),
    ];
    window.canary.expected = 4;
    window.canary.reported = 4 - u32::from(number.is_multiple_of(5));
    for (row, place) in window.rows.iter_mut().zip(0..) {
        for (arm, failed) in [
            (&mut row.canary, u64::from(place == 3 && number.is_multiple_of(2))),
            (&mut row.baseline, 0),
        ] {
            if place < 5 {
                arm.probes = Probes { checks: 3, failed };
            }
        }
        let slower = if place < 2 { 3 } else { 2 };
        for (arm, part) in [(&mut row.canary, slower), (&mut row.baseline, 2)] {
            let mut histogram = Histogram::new();
            let recorded = 0..arm.requests;
            recorded.for_each(|request| histogram.record((request * 7_919 % 97 + 3) * part * 1_000_000));
            arm.latency = Some(Latency {
                histogram,
                over_sla: None,
            });
        }
    }
    if number < 12 {
        window.rows.truncate(25);
    }
}

/// The bytes of judge-fx/1. A difference here means that recorded decisions no longer replay: make a new
/// version of the judge instead.
#[test]
fn golden_vectors() {
    let mut text = String::new();
    for policy in [POLICY, MINIMAL, EVERYTHING] {
        let mut judge = Judge::new(Policy::parse(policy).unwrap(), None, None).unwrap();
        let mut script = Script::new(9, 30, 1_500);
        for number in 1..=if policy == EVERYTHING { 60 } else { 40 } {
            let error_ppm = |tenant, canary| match (tenant, canary) {
                (7, true) if number > 8 => 150_000,
                (11, _) => 60_000,
                _ => 1_500,
            };
            let mut window = script.window(number, &error_ppm, 2_000);
            if policy == EVERYTHING {
                with_everything(&mut window);
            }
            let outcome = judge.step(&window).unwrap();
            // Every tenth outcome in full, of the others their digests.
            let json = outcome.to_json();
            let line = if number % 10 == 0 {
                json
            } else {
                Hash::of(json.as_bytes()).to_string()
            };
            writeln!(text, "{line}\n# {}", outcome.reason).unwrap();
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/judge-fx-1.txt");
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    if golden.is_empty() {
        std::fs::write(path, &text).unwrap();
        panic!("{path} was missing and has been written");
    }
    assert!(
        text == golden,
        "digest {} is not that of {path}",
        Hash::of(text.as_bytes())
    );
}
