//! A HOLD that lasts too long ends, and that is on record.

use std::fs;

use coalmine_tests::{components::Aggregator, eventually, process::coalmine};

const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1% }
  judge_window: 1s
  hold_deadline: 3s
  required: [errors]
";

#[test]
fn the_hold_deadline_rolls_back_and_has_a_record_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY);
    aggregator.launch();
    // No agent, no traffic: nothing can be proven.
    let rollout = aggregator.start_rollout();
    let gate = aggregator.wait_for_verdict(&rollout, &["ROLLBACK"]);
    let reason = gate["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("on HOLD for 3s, as long as hold_deadline allows (on_deadline: rollback); last: "),
        "{gate}"
    );

    let log = aggregator.data.join("decisions.jsonl");
    let deadlines = || {
        let text = fs::read_to_string(&log).unwrap();
        let lines = text.lines().filter(|line| line.contains(r#""type":"deadline""#));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let recorded = eventually("the deadline is on record", || {
        Some(deadlines()).filter(|found| !found.is_empty())
    });
    let decision = gate["decision_id"].as_str().unwrap();
    for part in [
        format!(r#""decision":"{decision}""#),
        r#""held_ms":3000"#.to_owned(),
        r#""on_deadline":"rollback""#.to_owned(),
        r#""verdict":"ROLLBACK""#.to_owned(),
    ] {
        assert!(recorded[0].contains(&part), "{part} is not in {}", recorded[0]);
    }

    // It survives a crash, and is not told again.
    aggregator.kill_9();
    aggregator.launch();
    assert_eq!(
        aggregator.wait_for_verdict(&rollout, &["ROLLBACK"])["reason"],
        reason
    );
    let server = format!("http://{}", aggregator.http);
    assert_eq!(
        coalmine(["gate", &rollout, "--server", &server]).status.code(),
        Some(1)
    );
    assert_eq!(deadlines().len(), 1);

    let data = aggregator.data.display().to_string();
    for arguments in [
        vec!["replay", "--all", "--data", &data],
        vec!["audit", "verify", "--data", &data],
        vec!["explain", decision, "--data", &data],
    ] {
        let output = coalmine(&arguments);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{arguments:?}: {said}");
    }
}
