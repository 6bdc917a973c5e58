//! What is defined at the edges: nothing there, too much there, everything at once.

use coalmine_judge::{
    evidence::{ArmCounts, Coverage, TenantWindow, Window},
    policy::{OnDeadline, Policy},
    v1::{Judge, Outcome, State, Unit, Verdict},
};
use coalmine_proto::names::TenantName;

use crate::script::{Random, Script, judge};

const MINIMAL: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults: { errors: { max_rate: 1% }, required: [errors], judge_window: 1s, hold_deadline: 1m, on_deadline: ON }
";

fn minimal(on_deadline: &str) -> Judge {
    Judge::new(
        Policy::parse(&MINIMAL.replace("ON", on_deadline)).unwrap(),
        None,
        None,
    )
    .unwrap()
}

fn window(number: u64, rows: impl IntoIterator<Item = (String, [u64; 2], [u64; 2])>) -> Window {
    let arm = |[requests, errors]: [u64; 2]| ArmCounts {
        requests,
        errors,
        ..ArmCounts::default()
    };
    let agents = Coverage {
        expected: 1,
        reported: 1,
    };
    Window {
        number,
        start_ms: number * 1_000,
        len_ms: 1_000,
        canary: agents,
        baseline: agents,
        rows: rows
            .into_iter()
            .map(|(tenant, canary, baseline)| TenantWindow {
                tenant: TenantName::parse(tenant.as_bytes()).unwrap(),
                canary: arm(canary),
                baseline: arm(baseline),
            })
            .collect(),
        pool: Vec::new(),
        pods: None,
    }
}

fn one(number: u64, canary: [u64; 2], baseline: [u64; 2]) -> Window {
    window(number, [("acme".to_owned(), canary, baseline)])
}

fn run(judge: &mut Judge, windows: impl IntoIterator<Item = Window>) -> Vec<Outcome> {
    windows
        .into_iter()
        .map(|window| judge.step(&window).unwrap())
        .collect()
}

#[test]
fn nothing_at_all_holds_and_the_deadline_ends_it() {
    let outcomes = run(
        &mut minimal("rollback"),
        (1..=70).map(|number| window(number, [])),
    );
    for outcome in &outcomes[..59] {
        assert_eq!((outcome.verdict, outcome.halted), (Verdict::Hold, false));
        assert_eq!(outcome.deadline, None);
    }
    let ended = &outcomes[59];
    assert_eq!(
        (ended.verdict, ended.halted, ended.confidence_ppm),
        (Verdict::Rollback, true, None)
    );
    let deadline = ended.deadline.unwrap();
    assert_eq!(
        (deadline.held_ms, deadline.action),
        (60_000, OnDeadline::Rollback)
    );
    assert!(
        ended
            .reason
            .starts_with("on HOLD for 1m, as long as hold_deadline allows (on_deadline: rollback); last: "),
        "{}",
        ended.reason
    );
    // It stays so, and the deadline is told once.
    for outcome in &outcomes[60..] {
        assert_eq!(
            (outcome.verdict, outcome.halted, outcome.deadline),
            (Verdict::Rollback, true, None)
        );
        assert_eq!(outcome.reason, ended.reason);
    }
}

#[test]
fn the_policy_says_what_ends_a_hold() {
    // Too few requests to prove anything, and nothing suspected.
    let quiet = || (1..=70).map(|number| one(number, [1, 0], [9, 0]));
    let approved = run(&mut minimal("approve"), quiet());
    assert_eq!(approved[58].verdict, Verdict::Hold);
    assert_eq!(
        (approved[59].verdict, approved[59].confidence_ppm),
        (Verdict::Approve, None)
    );
    assert_eq!(
        (approved[69].verdict, approved[69].deadline),
        (Verdict::Approve, None)
    );
    assert!(
        approved[59].reason.contains("approve, as nothing is suspected"),
        "{}",
        approved[59].reason
    );
    let held = run(&mut minimal("hold"), quiet());
    assert_eq!((held[59].verdict, held[59].halted), (Verdict::Hold, false));
    assert!(held[59].deadline.is_some() && held[60].deadline.is_none());
    // Something is suspected: approval at the deadline is out of the question.
    let suspect = (1..=70).map(|number| one(number, [1, u64::from(number % 7 == 0)], [9, 0]));
    let outcomes = run(&mut minimal("approve"), suspect);
    let last = outcomes.last().unwrap();
    assert_eq!(last.verdict, Verdict::Rollback, "{}", last.reason);
}

#[test]
fn an_approval_begins_the_hold_anew() {
    let mut judge = minimal("rollback");
    let healthy = run(&mut judge, (1..=55).map(|number| one(number, [100, 0], [900, 0])));
    assert_eq!(healthy[54].verdict, Verdict::Approve, "{}", healthy[54].reason);
    // No canary any more: NODATA after a while, and a minute of that is too long.
    let idle = run(&mut judge, (56..=130).map(|number| one(number, [0, 0], [900, 0])));
    let first_hold = idle
        .iter()
        .position(|outcome| outcome.verdict == Verdict::Hold)
        .unwrap();
    let ended = idle
        .iter()
        .position(|outcome| outcome.verdict == Verdict::Rollback)
        .unwrap();
    assert_eq!(ended - first_hold, 59);
}

#[test]
fn a_failing_baseline_and_a_fine_canary_do_not_halt() {
    let outcomes = run(
        &mut minimal("hold"),
        (1..=200).map(|number| one(number, [100, 0], [900, 300])),
    );
    assert!(outcomes.iter().all(|outcome| !outcome.halted));
    assert_eq!(outcomes.last().unwrap().verdict, Verdict::Approve);
}

#[test]
fn a_tenant_on_one_arm_only_is_held_against_its_sla_alone() {
    let rows = |errors: u64| {
        (1..=60).map(move |number| {
            window(
                number,
                [
                    ("both".to_owned(), [100, 0], [900, 0]),
                    ("canary-only".to_owned(), [50, errors], [0, 0]),
                    ("old-only".to_owned(), [0, 0], [50, 50]),
                ],
            )
        })
    };
    let failing = run(&mut minimal("hold"), rows(10));
    let last = failing.last().unwrap();
    assert_eq!(last.verdict, Verdict::Rollback);
    assert!(
        last.reason.starts_with("tenant canary-only on errors/sla: "),
        "{}",
        last.reason
    );
    let healthy = run(&mut minimal("hold"), rows(0));
    assert_eq!(
        healthy.last().unwrap().verdict,
        Verdict::Approve,
        "{}",
        healthy.last().unwrap().reason
    );
}

#[test]
fn no_baseline_at_all_holds() {
    let outcomes = run(
        &mut minimal("hold"),
        (1..=60).map(|number| one(number, [100, 0], [0, 0])),
    );
    let last = outcomes.last().unwrap();
    assert_eq!(last.verdict, Verdict::Hold);
    assert!(
        last.units.iter().any(|unit| unit.state == State::NoData),
        "{:?}",
        last.units
    );
}

#[test]
fn counters_at_their_limits_are_an_error_and_hold() {
    for counts in [[u64::MAX, u64::MAX], [u64::MAX, 0], [1 << 41, 1]] {
        for (canary, baseline) in [(counts, [9, 0]), ([9, 0], counts), (counts, counts)] {
            let mut judge = minimal("hold");
            let outcomes = run(&mut judge, (1..=4).map(|number| one(number, canary, baseline)));
            let last = outcomes.last().unwrap();
            assert_eq!(
                last.verdict,
                Verdict::Hold,
                "{canary:?} {baseline:?}: {}",
                last.reason
            );
            let failed = |unit: &Unit| {
                last.units
                    .iter()
                    .any(|report| report.unit == *unit && report.state == State::Error)
            };
            assert!(failed(&Unit::Fleet), "{:?}", last.units);
            assert!(
                failed(&Unit::Tenant(TenantName::parse(b"acme").unwrap())),
                "{:?}",
                last.units
            );
        }
    }
}

#[test]
fn a_window_of_no_length_is_refused_and_nothing_is_lost() {
    let line = one(2, [9, 0], [9, 0])
        .to_json()
        .replace("\"len_ms\":1000", "\"len_ms\":0");
    let error = Window::from_json(&line).unwrap_err().to_string();
    assert_eq!(error, "len_ms: a window cannot have length 0");
    // The judge itself takes whatever has a number.
    let mut judge = minimal("rollback");
    let empty = Window {
        len_ms: 0,
        ..one(1, [9, 0], [9, 0])
    };
    assert_eq!(judge.step(&empty).unwrap().verdict, Verdict::Hold);
}

#[test]
fn a_hundred_thousand_tenants_are_judged_and_the_broken_one_is_named() {
    let mut judge = minimal("hold");
    let names: Vec<String> = (0..100_000).map(|tenant| format!("tenant-{tenant:06}")).collect();
    let mut last = None;
    for number in 1..=5 {
        let rows = names.iter().enumerate().map(|(tenant, name)| {
            let errors = if tenant == 77_777 { 10 } else { 0 };
            (name.clone(), [10, errors], [90, 0])
        });
        last = Some(judge.step(&window(number, rows)).unwrap());
    }
    let last = last.unwrap();
    assert_eq!(last.verdict, Verdict::Rollback, "{}", last.reason);
    assert_eq!(last.worst_tenant.unwrap().as_str(), "tenant-077777");
    assert_eq!(last.tenants.total(), 100_000);
    let in_breach = last.units.iter().filter(|unit| unit.state == State::Breach);
    assert!(
        in_breach
            .clone()
            .any(|unit| unit.unit.to_string() == "tenant:tenant-077777")
    );
    assert!(in_breach.clone().all(|unit| match &unit.unit {
        Unit::Tenant(name) => name.as_str() == "tenant-077777",
        Unit::Fleet | Unit::Cohort(_) => true,
    }));
}

/// Weights go from 5 % to 50 % while the error rate, the same on both arms, goes from 0.1 % to 0.5 %. Added up, the
/// canary looks twice as bad as the baseline; window by window it is the same. (Simpson's paradox.)
#[test]
fn weight_steps_with_a_shared_drift_do_not_halt() {
    let mut random = Random(11);
    let mut added_up = [[0_u64; 2]; 2];
    for seed in 0..20 {
        let mut judge = minimal("hold");
        random.0 ^= seed << 32 | 1;
        for number in 1..=60 {
            let part = [50, 100, 200, 300, 400, 500][(number as usize - 1) / 10];
            let ppm = 1_000 + 4_000 * number / 60;
            let mut arm = |requests| [requests, random.events(requests, ppm)];
            let (canary, baseline) = (arm(2 * part), arm(2_000 - 2 * part));
            for (sum, counts) in added_up.iter_mut().zip([canary, baseline]) {
                sum[0] += counts[0];
                sum[1] += counts[1];
            }
            let outcome = judge.step(&one(number, canary, baseline)).unwrap();
            assert!(!outcome.halted, "{}", outcome.reason);
        }
    }
    let rate = |[requests, errors]: [u64; 2]| errors * 1_000_000 / requests;
    let (canary, baseline) = (rate(added_up[0]), rate(added_up[1]));
    assert!(
        canary * 10 > baseline * 12,
        "added up it looks worse: {canary} ppm against {baseline}"
    );
}

#[test]
fn a_silent_tenant_costs_nothing_and_keeps_its_state() {
    let mut judge = judge();
    let mut script = Script::new(21, 5, 1_000);
    for number in 1..=20 {
        judge
            .step(&script.window(
                number,
                &|tenant, canary| if canary && tenant == 4 { 30_000 } else { 1_000 },
                0,
            ))
            .unwrap();
    }
    let mut states = Vec::new();
    for number in 21..=30 {
        let mut window = script.window(number, &|_, _| 1_000, 0);
        window.rows.truncate(4);
        let outcome = judge.step(&window).unwrap();
        let reports = outcome
            .units
            .iter()
            .filter(|unit| unit.unit.to_string() == "tenant:tenant-004");
        states.push(
            reports
                .map(|unit| (unit.metric, unit.state, unit.bits))
                .collect::<Vec<_>>(),
        );
        assert_eq!(outcome.tenants.total(), 5);
    }
    // The open block is closed in time; after that nothing changes.
    assert!(states[6..].iter().all(|state| *state == states[6]), "{states:?}");
}

#[test]
fn a_block_of_few_requests_is_closed_after_six_windows_though_its_tenant_is_silent() {
    let mut judge = minimal("hold");
    let score = |outcome: &Outcome| {
        let small = outcome
            .worst_tenants
            .iter()
            .find(|(name, _)| name.as_str() == "small");
        small.map_or(1_000_000, |(_, score)| *score)
    };
    let mut scores = Vec::new();
    for number in 1..=9 {
        let mut rows = vec![("busy".to_owned(), [100, 0], [900, 0])];
        if number == 2 {
            // Against the SLA one failure of one request counts at once; against the baseline the block waits.
            rows.push(("small".to_owned(), [1, 1], [3, 0]));
        }
        scores.push(score(&judge.step(&window(number, rows)).unwrap()));
    }
    assert_eq!(scores[0], 1_000_000);
    assert!(
        scores[1] < 1_000_000 && scores[1..6].iter().all(|score| *score == scores[1]),
        "{scores:?}"
    );
    let tree = judge.explain(
        &judge.clone().step(&window(10, [])).unwrap(),
        Some(&TenantName::parse(b"small").unwrap()),
    );
    let live = tree
        .iter()
        .skip_while(|line| !line.starts_with("tenant small: 1 canary"))
        .find(|line| line.contains("failed"));
    assert_eq!(
        live.map(|line| line.trim()),
        Some("1 of 1 canary requests failed (100 %), on the baseline 0 of 3 (0 %); up to 0.1 % is tolerated")
    );
}

#[test]
fn coverage_counts_tenants_with_enough_requests_and_no_suspicion() {
    let policy = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults: { errors: { max_rate: 1% }, required: [errors], judge_window: 1s, hold_deadline: 1h }
rollout: { critical: [slow], min_coverage: { tenants: 60%, traffic: 90%, requests: 20 } }
";
    let mut judge = Judge::new(Policy::parse(policy).unwrap(), None, None).unwrap();
    let mut outcomes = Vec::new();
    for number in 1..=40 {
        let failed = if (10..14).contains(&number) { 4 } else { 0 };
        outcomes.push(
            judge
                .step(&window(
                    number,
                    [
                        ("absent".to_owned(), [0, 0], [9, 0]),
                        ("fast".to_owned(), [96, 0], [900, 0]),
                        ("idle".to_owned(), [0, 0], [0, 0]),
                        ("shaky".to_owned(), [3, failed.min(3)], [30, 0]),
                        ("slow".to_owned(), [1, 0], [9, 0]),
                    ],
                ))
                .unwrap(),
        );
    }
    let at = |number: usize| {
        let outcome = &outcomes[number - 1];
        (outcome.traffic_ppm, outcome.tenants_ppm)
    };
    // Of three tenants with canary traffic one has enough requests, then two, then three.
    assert_eq!(at(1), (960_000, 333_333));
    assert_eq!(at(6), (960_000, 333_333));
    assert_eq!(at(7), (990_000, 666_666));
    // While one is suspected it does not count.
    let suspected = outcomes
        .iter()
        .position(|outcome| outcome.tenants.get(State::Suspect) == 1)
        .unwrap();
    assert_eq!(at(suspected + 1), (960_000, 333_333));
    // The idle one was never seen; the policy's and the one without canary are there.
    assert_eq!(outcomes[0].tenants.total(), 4);
    let critical = |number: usize| {
        outcomes[number - 1]
            .missing
            .iter()
            .any(|missing| missing.starts_with("critical tenant slow has "))
    };
    assert!(critical(19) && !critical(20));
    let short = |number: usize| {
        outcomes[number - 1]
            .missing
            .iter()
            .any(|missing| missing.starts_with("only 1 of 3 tenants"))
    };
    assert!(short(6) && !short(7));
}

#[test]
fn the_tail_is_those_with_less_than_one_canary_request_a_window() {
    let mut judge = minimal("hold");
    let rows = |number: u64| {
        [
            ("exactly-one".to_owned(), [1, 0], [9, 0]),
            ("every-second".to_owned(), [number % 2, 0], [9, 0]),
            ("not-on-canary".to_owned(), [0, 0], [9, 0]),
        ]
    };
    let sorted = |number| {
        let mut rows = rows(number);
        rows.sort();
        window(number, rows)
    };
    for number in 1..=100 {
        judge.step(&sorted(number)).unwrap();
    }
    let last = judge.step(&sorted(101)).unwrap();
    let tree = judge.explain(&last, None);
    let tail = tree
        .iter()
        .skip_while(|line| *line != "cohort tail")
        .nth(1)
        .unwrap();
    // From the window on in which each is known to be small.
    assert_eq!(
        tail.trim(),
        "50 canary requests, 0 failed; on the baseline 1791, 0 failed"
    );
}
