//! From traffic to verdicts.

use coalmine_judge::{
    evidence::{ArmCounts, Coverage, Latency, Pods, Window},
    v1::{State, Unit, Verdict},
};
use coalmine_proto::histogram::Histogram;

use crate::script::{Script, judge, run};

#[test]
fn one_failing_tenant_is_rolled_back_and_named() {
    let outcomes = run(&mut Script::new(1, 50, 2_000), 60, &|tenant, window, canary| {
        if canary && tenant == 20 && window > 10 {
            150_000
        } else {
            1_000
        }
    });
    assert!(
        outcomes[..10]
            .iter()
            .all(|outcome| outcome.verdict != Verdict::Rollback)
    );
    let halt = outcomes
        .iter()
        .position(|outcome| outcome.halted)
        .expect("the fault is found");
    assert!((13..40).contains(&halt), "halted in window {}", halt + 1);
    assert!(
        outcomes[halt..]
            .iter()
            .all(|outcome| outcome.verdict == Verdict::Rollback && outcome.score_ppm < 950_000)
    );
    let last = outcomes.last().unwrap();
    assert!(
        last.reason.starts_with("tenant tenant-020 on errors/"),
        "{}",
        last.reason
    );
    let breached: Vec<_> = last
        .units
        .iter()
        .filter(|unit| unit.state == State::Breach && unit.unit != Unit::Fleet)
        .collect();
    assert!(
        breached
            .iter()
            .all(|unit| unit.unit.to_string() == "tenant:tenant-020"),
        "{breached:?}"
    );
}

#[test]
fn a_healthy_rollout_is_approved() {
    let outcomes = run(&mut Script::new(2, 50, 2_000), 60, &|_, _, _| 1_000);
    assert_eq!(outcomes[0].verdict, Verdict::Hold);
    assert!(
        outcomes
            .iter()
            .all(|outcome| !outcome.halted && outcome.score_ppm >= 950_000)
    );
    let last = outcomes.last().unwrap();
    assert_eq!(last.verdict, Verdict::Approve, "{}", last.reason);
    assert_eq!(last.confidence_ppm, Some(990_000));
}

#[test]
fn an_outage_that_both_arms_share_holds_and_never_rolls_back() {
    let outage = |window: u64| (10..25).contains(&window);
    let outcomes = run(&mut Script::new(3, 20, 2_000), 120, &|tenant, window, _| {
        if tenant == 4 && outage(window) {
            400_000
        } else {
            1_000
        }
    });
    assert!(
        outcomes
            .iter()
            .all(|outcome| outcome.verdict != Verdict::Rollback)
    );
    let during = &outcomes[20];
    assert_eq!(during.verdict, Verdict::Hold, "{}", during.reason);
    let shared = during
        .units
        .iter()
        .find(|unit| unit.state == State::Shared && unit.unit != Unit::Fleet)
        .unwrap();
    assert_eq!(shared.unit.to_string(), "tenant:tenant-004");
    assert_eq!(during.tenants.get(State::Shared), 1);
    assert_eq!(
        outcomes.last().unwrap().verdict,
        Verdict::Approve,
        "{}",
        outcomes.last().unwrap().reason
    );
}

#[test]
fn slow_requests_on_the_canary_alone_are_rolled_back_and_on_both_arms_they_are_not() {
    let verdict = |canary_only: bool| {
        let mut judge = judge();
        let mut script = Script::new(4, 5, 2_000);
        let mut last = None;
        for number in 1..=20 {
            let mut window = script.window(number, &|_, _| 1_000, 60_000);
            if canary_only {
                let fast = script.window(number, &|_, _| 1_000, 1_000);
                window
                    .rows
                    .iter_mut()
                    .zip(fast.rows)
                    .for_each(|(row, fast)| row.baseline = fast.baseline);
            }
            last = Some(judge.step(&window).unwrap());
        }
        last.unwrap()
    };
    let alone = verdict(true);
    assert_eq!(alone.verdict, Verdict::Rollback);
    assert!(
        alone.reason.contains("took longer than 350 ms"),
        "{}",
        alone.reason
    );
    let both = verdict(false);
    assert_eq!(both.verdict, Verdict::Hold, "{}", both.reason);
    assert!(
        both.units.iter().any(|unit| unit.state == State::Shared),
        "{:?}",
        both.units
    );
}

#[test]
fn a_fault_long_after_the_planned_end_is_still_found() {
    let outcomes = run(&mut Script::new(10, 5, 2_000), 800, &|tenant, window, canary| {
        if canary && tenant == 2 && window > 720 {
            100_000
        } else {
            1_000
        }
    });
    let halt = outcomes
        .iter()
        .position(|outcome| outcome.halted)
        .expect("the fault is found");
    assert!((722..745).contains(&halt), "halted in window {}", halt + 1);
}

#[test]
fn no_canary_traffic_and_no_comparison_are_no_approval() {
    let mut script = Script::new(11, 20, 2_000);
    for missing_canary in [true, false] {
        let mut judge = judge();
        let mut last = None;
        for number in 1..=60 {
            let mut window = script.window(number, &|_, _| 1_000, 2_000);
            for row in &mut window.rows {
                match missing_canary {
                    true if number > 40 => row.canary = ArmCounts::default(),
                    false => row.baseline = ArmCounts::default(),
                    true => {}
                }
            }
            last = Some(judge.step(&window).unwrap());
        }
        let last = last.unwrap();
        assert_eq!(last.verdict, Verdict::Hold, "{}", last.reason);
        assert!(
            last.units.iter().any(|unit| unit.state == State::NoData),
            "{:?}",
            last.units
        );
    }
}

#[test]
fn a_latency_in_the_bucket_of_the_limit_is_no_proof_of_safety() {
    let mut judge = judge();
    let mut script = Script::new(12, 5, 2_000);
    let mut last = None;
    for number in 1..=40 {
        let mut window = script.window(number, &|_, _| 1_000, 0);
        for row in &mut window.rows {
            for arm in [&mut row.canary, &mut row.baseline] {
                let mut histogram = Histogram::new();
                (0..arm.requests)
                    .for_each(|i| histogram.record(if i % 20 == 0 { 352_000_000 } else { 9_000_000 }));
                // Without the agents' exact count only the histogram says.
                arm.latency = Some(Latency {
                    histogram,
                    over_sla: None,
                });
            }
        }
        last = Some(judge.step(&window).unwrap());
    }
    let last = last.unwrap();
    assert_eq!(last.verdict, Verdict::Hold, "{}", last.reason);
}

#[test]
fn a_count_that_cannot_be_computed_with_is_an_error_and_holds() {
    let mut judge = judge();
    let mut script = Script::new(13, 5, 2_000);
    let mut window = script.window(1, &|_, _| 1_000, 2_000);
    window.rows[3].canary.requests = 1 << 60;
    judge.step(&window).unwrap();
    let next = judge.step(&script.window(2, &|_, _| 1_000, 2_000)).unwrap();
    assert_eq!(next.verdict, Verdict::Hold);
    let failed: Vec<_> = next
        .units
        .iter()
        .filter(|unit| unit.state == State::Error)
        .map(|unit| unit.unit.to_string())
        .collect();
    assert!(
        failed.contains(&"tenant:tenant-003".to_owned()) && failed.contains(&"fleet".to_owned()),
        "{failed:?}"
    );
}

#[test]
fn a_canary_pod_that_nobody_sees_holds() {
    let mut judge = judge();
    let mut script = Script::new(5, 20, 2_000);
    let mut step = |number, pods| {
        let window = Window {
            pods,
            ..script.window(number, &|_, _| 1_000, 2_000)
        };
        assert_eq!(Window::from_json(&window.to_json()).unwrap(), window);
        judge.step(&window).unwrap()
    };
    let pods = |unobserved, stale| {
        Some(Pods {
            canary: 40,
            unobserved,
            stale,
        })
    };
    for number in 1..=30 {
        step(number, pods(0, false));
    }
    assert_eq!(step(31, pods(0, false)).verdict, Verdict::Approve);
    for (number, pods, reason) in [
        (32, pods(1, false), "1 of 40 canary pods has no agent"),
        (33, pods(2, true), "2 of 40 canary pods have no agent"),
        (
            34,
            pods(0, true),
            "the cluster does not say at present which pods the canary has",
        ),
    ] {
        let held = step(number, pods);
        assert_eq!((held.verdict, held.reason.as_str()), (Verdict::Hold, reason));
    }
    assert_eq!(step(35, None).verdict, Verdict::Approve);
    let bad = Window {
        pods: pods(41, false),
        ..script.window(36, &|_, _| 1_000, 2_000)
    };
    assert!(Window::from_json(&bad.to_json()).is_err(), "more than there are");
}

#[test]
fn missing_agents_hold() {
    let mut judge = judge();
    let mut script = Script::new(5, 20, 2_000);
    for number in 1..=30 {
        judge.step(&script.window(number, &|_, _| 1_000, 2_000)).unwrap();
    }
    let mut window = script.window(31, &|_, _| 1_000, 2_000);
    window.canary = Coverage {
        expected: 2,
        reported: 1,
    };
    let gap = judge.step(&window).unwrap();
    assert_eq!(gap.verdict, Verdict::Hold);
    assert_eq!(gap.reason, "1 of 2 canary agents reported, and 90 % are needed");
    let mut window = script.window(32, &|_, _| 1_000, 2_000);
    window.canary = Coverage {
        expected: 1,
        reported: 0,
    };
    window
        .rows
        .iter_mut()
        .for_each(|row| row.canary = ArmCounts::default());
    let nodata = judge.step(&window).unwrap();
    assert!(nodata.units.iter().any(|unit| unit.state == State::NoData));
    assert_eq!(nodata.verdict, Verdict::Hold);
}

#[test]
fn a_burst_of_two_windows_does_not_halt() {
    let outcomes = run(&mut Script::new(6, 20, 2_000), 40, &|_, window, canary| {
        if canary && (window == 20 || window == 21) {
            500_000
        } else {
            500
        }
    });
    assert!(outcomes.iter().all(|outcome| !outcome.halted));
}

#[test]
fn windows_must_come_in_order() {
    let mut judge = judge();
    let mut script = Script::new(7, 3, 100);
    let window = script.window(5, &|_, _| 0, 0);
    judge.step(&window).unwrap();
    assert_eq!(
        judge.step(&window).unwrap_err().to_string(),
        "window 5 comes after window 5; windows must have growing numbers"
    );
}

#[test]
fn rows_must_come_in_order() {
    let mut judge = judge();
    let mut window = Script::new(7, 3, 100).window(5, &|_, _| 0, 0);
    window.rows.swap(1, 2);
    assert_eq!(
        judge.step(&window).unwrap_err().to_string(),
        "row 2 is not after the row before; rows must be in the order of their tenants' names, one for each tenant"
    );
    window.rows.swap(1, 2);
    judge.step(&window).unwrap();
}

#[test]
fn the_order_of_rows_in_a_line_does_not_matter() {
    let mut script = Script::new(8, 20, 500);
    let window = script.window(1, &|_, _| 10_000, 2_000);
    let json = window.to_json();
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    value["rows"].as_array_mut().unwrap().reverse();
    let reversed = Window::from_json(&value.to_string()).unwrap();
    assert_eq!(reversed, window);
    assert_eq!(judge().step(&reversed).unwrap(), judge().step(&window).unwrap());
}
