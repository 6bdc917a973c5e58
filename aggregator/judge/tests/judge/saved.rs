//! A judgement that is saved and gone on with is the same judgement.

use coalmine_judge::{policy::Policy, v1::Judge};

use crate::{
    golden::{EVERYTHING, MINIMAL, with_everything},
    script::{POLICY, Script},
};

fn judge(policy: &str, saved: Option<&[u8]>) -> Result<Judge, String> {
    let policy = Policy::parse(policy).unwrap();
    match saved {
        None => Judge::new(policy, None, None).map_err(|error| error.to_string()),
        Some(saved) => Judge::restore(policy, None, None, saved),
    }
}

/// A policy whose HOLD ends after some windows, in one way or the other; the fleet is never proven.
fn deadline(on_deadline: &str) -> String {
    format!(
        "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: {{ max_rate: 1% }}
  required: [errors]
  judge_window: 1s
  hold_deadline: 20s
  on_deadline: {on_deadline}
rollout: {{ cohorts: [tail], min_windows: 50 }}
"
    )
}

#[test]
fn whoever_goes_on_with_a_saved_state_says_the_same_for_ever() {
    let (approves, rolls_back) = (deadline("approve"), deadline("rollback"));
    let policies = [POLICY, MINIMAL, EVERYTHING, &approves, &rolls_back];
    let mut deadlines = 0;
    for policy in policies {
        // From five hundred requests a window to one in two windows: blocks stay open, and tenants are in the tail.
        let mut script = Script::new(9, 120, 500);
        let mut whole = judge(policy, None).unwrap();
        // Saved and restored before each window, and every seventh only.
        let mut again = [1, 7].map(|every| (every, judge(policy, None).unwrap()));
        for number in (1..=60).filter(|number| !(20..23).contains(number)) {
            let failing = policy == POLICY || policy == MINIMAL || policy == EVERYTHING;
            let error_ppm = |tenant, canary| match (tenant, canary) {
                (7, true) if failing && number > 8 => 150_000,
                (11, _) if failing => 60_000,
                _ => 1_500,
            };
            let mut window = script.window(number, &error_ppm, 2_000);
            // One is suspected and falls silent, others come in turns.
            window.rows.retain(|row| match row.tenant.as_str() {
                "tenant-007" => number < 12,
                name => name.len() + (number as usize) % 3 != 11 || name < "tenant-050",
            });
            if policy == EVERYTHING {
                with_everything(&mut window);
                // What is not counted, and who does not report, is remembered too.
                for pool in &mut window.pool {
                    pool.at_least = number.is_multiple_of(5);
                    pool.estimated = (30..34).contains(&number);
                    pool.agents = (number > 10).then_some(number as u32 % 4);
                }
                if number == 47 {
                    window.pool.clear();
                }
            }
            let outcome = whole.step(&window).unwrap();
            deadlines += usize::from(outcome.deadline.is_some());
            for (every, judged) in &mut again {
                if number % *every == 0 {
                    let saved = judged.save();
                    *judged = judge(policy, Some(&saved)).unwrap();
                    assert_eq!(judged.save(), saved, "window {number}");
                }
                let said = judged.step(&window).unwrap();
                assert_eq!(
                    said.to_json(),
                    outcome.to_json(),
                    "window {number}, saved every {every}"
                );
                assert_eq!(said.deadline, outcome.deadline, "window {number}");
                assert_eq!(judged.explain(&said, None), whole.explain(&outcome, None));
            }
            assert!(again.iter().all(|(_, judged)| judged.save() == whole.save()));
        }
    }
    assert!(deadlines >= 2, "{deadlines} deadlines were reached");
}

#[test]
fn bytes_that_are_no_state_are_refused_and_never_a_panic() {
    let mut script = Script::new(3, 2, 100);
    let mut whole = judge(POLICY, None).unwrap();
    for number in 1..=3 {
        whole.step(&script.window(number, &|_, _| 20_000, 2_000)).unwrap();
    }
    let next = script.window(4, &|_, _| 20_000, 2_000);
    let saved = whole.save();
    for cut in 0..saved.len() {
        assert!(judge(POLICY, Some(&saved[..cut])).is_err(), "cut at {cut}");
    }
    assert!(judge(POLICY, Some(&[saved.as_slice(), b"x"].concat())).is_err());
    let mut taken = 0;
    for at in 0..saved.len() {
        for flip in [1, 0x40, 0xff] {
            let mut bad = saved.clone();
            bad[at] ^= flip;
            // A digest is what tells states apart; here it only matters that what is taken can be gone on with.
            if let Ok(mut judged) = judge(POLICY, Some(&bad)) {
                taken += 1;
                if let Ok(outcome) = judged.step(&next) {
                    drop(outcome.to_json());
                }
            }
        }
    }
    assert!(taken > 0);
    let other = judge(EVERYTHING, Some(&saved)).unwrap_err();
    assert!(other.contains("is no state of this judge"), "{other}");
}
