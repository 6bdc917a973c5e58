//! What is remembered and what is not: data that stops, trouble that is over, tenants that are gone.

use coalmine_judge::{
    budget::Metric,
    evidence::{ArmCounts, Coverage, Latency, Pool, TenantWindow, Window},
    v1::{Judge, Outcome, State, Verdict},
};
use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, TenantName},
};

use crate::script::judge_by;

fn judge(defaults: &str, rest: &str) -> Judge {
    judge_by(&["  errors: { max_rate: 1% }", defaults], rest)
}

fn errors(requests: u64, errors: u64) -> ArmCounts {
    ArmCounts {
        requests,
        errors,
        ..ArmCounts::default()
    }
}

fn window(number: u64, rows: Vec<(&str, ArmCounts, ArmCounts)>) -> Window {
    let agents = |n| Coverage {
        expected: n,
        reported: n,
    };
    Window {
        number,
        start_ms: number * 1_000,
        len_ms: 1_000,
        canary: agents(3),
        baseline: agents(9),
        rows: rows
            .into_iter()
            .map(|(tenant, canary, baseline)| TenantWindow {
                tenant: TenantName::parse(tenant.as_bytes()).unwrap(),
                canary,
                baseline,
            })
            .collect(),
        pool: Vec::new(),
        pods: None,
    }
}

fn run(judge: &mut Judge, windows: impl IntoIterator<Item = Window>) -> Vec<Outcome> {
    windows
        .into_iter()
        .map(|window| judge.step(&window).unwrap())
        .collect()
}

fn state(outcome: &Outcome, unit: &str, metric: Metric) -> State {
    let mut reports = outcome.units.iter();
    let report = reports.find(|report| report.unit.to_string() == unit && report.metric == metric);
    report.map_or(State::Clear, |report| report.state)
}

fn measured(requests: u64, latencies: u64) -> ArmCounts {
    let mut histogram = Histogram::new();
    (0..latencies).for_each(|i| histogram.record(5_000_000 + i * 1_000));
    ArmCounts {
        latency: (latencies > 0).then_some(Latency {
            histogram,
            over_sla: None,
        }),
        ..errors(requests, 0)
    }
}

#[test]
fn what_is_required_must_go_on_being_measured() {
    let mut latency = judge("  latency: { p99: 350ms }", "");
    let rows = |number: u64| {
        let known = if number <= 60 { 1_000 } else { 0 };
        window(
            number,
            vec![("acme", measured(100, known / 10), measured(900, 900))],
        )
    };
    let outcomes = run(&mut latency, (1..=80).map(rows));
    assert_eq!(outcomes[59].verdict, Verdict::Approve, "{}", outcomes[59].reason);
    assert_eq!(state(&outcomes[79], "fleet", Metric::LatencySla), State::NoData);
    assert_eq!(outcomes[79].verdict, Verdict::Hold);

    let mut pool = judge("  pool: { max_wait_rate: 1% }\n  required: [errors, pool]", "");
    let rows = |number: u64| {
        let one = |arm| Pool {
            arm,
            acquires: 300,
            waits: 0,
            timeouts: 0,
            used: 1,
            max: 9,
            at_least: false,
            estimated: false,
            agents: None,
        };
        Window {
            pool: if number <= 60 {
                vec![one(Arm::Canary), one(Arm::Baseline)]
            } else {
                Vec::new()
            },
            ..window(number, vec![("acme", errors(100, 0), errors(900, 0))])
        }
    };
    let outcomes = run(&mut pool, (1..=80).map(rows));
    assert_eq!(outcomes[59].verdict, Verdict::Approve, "{}", outcomes[59].reason);
    assert_eq!(state(&outcomes[79], "fleet", Metric::Pool), State::NoData);

    // Some latencies of many requests prove nothing about the others.
    let mut sliver = judge("  latency: { p99: 350ms }", "");
    let rows = |number| window(number, vec![("acme", measured(1_000, 20), measured(900, 900))]);
    let last = run(&mut sliver, (1..=100).map(rows)).pop().unwrap();
    assert_eq!(last.verdict, Verdict::Hold);
    assert_eq!(
        last.reason,
        "the latency of only 2 % of the canary's requests is measured"
    );
}

#[test]
fn traffic_in_pulses_with_equal_rates_does_not_halt() {
    // The canary has traffic in every sixth window only, and just then a third of all requests fail, on both arms.
    let mut judge = judge(
        "  required: [errors]\n  hold_deadline: 1h",
        "tenants: { acme: { errors: { max_rate: 50% } } }",
    );
    let outcomes = run(
        &mut judge,
        (1..=120).map(|number| {
            let (canary, failed) = if number % 6 == 0 { (100, 30) } else { (0, 0) };
            window(
                number,
                vec![("acme", errors(canary, failed), errors(100, failed))],
            )
        }),
    );
    assert!(outcomes.iter().all(|outcome| !outcome.halted));
}

#[test]
fn trouble_that_both_arms_share_stays_shared_until_it_is_over_and_then_is_forgotten() {
    let mut judge = judge("  required: [errors]\n  hold_deadline: 1h", "");
    let big = || ("big", errors(200, 0), errors(1_800, 1));
    let shared = |number: u64| {
        let canary = if number % 2 == 1 {
            errors(5, 5)
        } else {
            errors(0, 0)
        };
        window(number, vec![big(), ("small", canary, errors(45, 45))])
    };
    let healthy = |number: u64| window(number, vec![big(), ("small", errors(5, 0), errors(45, 0))]);
    run(&mut judge, (1..=40).map(healthy));
    let during = run(&mut judge, (41..=120).map(shared));
    assert!(
        during[20..]
            .iter()
            .all(|outcome| outcome.verdict == Verdict::Hold),
        "it flickers"
    );
    assert_eq!(
        state(&during[79], "tenant:small", Metric::ErrorsSla),
        State::Shared
    );
    let after = run(&mut judge, (121..=200).map(healthy));
    assert!(after.iter().all(|outcome| !outcome.halted));
    assert_eq!(after[79].verdict, Verdict::Approve, "{}", after[79].reason);
    // The canary alone is found soon, though the baseline had its trouble.
    let alone = |number: u64| window(number, vec![big(), ("small", errors(5, 2), errors(45, 0))]);
    let found = run(&mut judge, (201..=240).map(alone));
    let halt = found
        .iter()
        .position(|outcome| outcome.halted)
        .expect("it is found");
    assert!(halt < 15, "{halt}");
    assert_eq!(
        state(&found[39], "tenant:small", Metric::ErrorsSla),
        State::Breach
    );
}

#[test]
fn an_approval_by_the_deadline_stands_until_there_is_trouble_and_that_is_a_new_hold() {
    let mut judge = judge(
        "  required: [errors]\n  hold_deadline: 10s\n  on_deadline: approve",
        "",
    );
    let quiet = |number: u64, reported: u32| {
        let mut window = window(number, vec![("acme", errors(1, 0), errors(9, 0))]);
        window.canary.reported = reported;
        window
    };
    let outcomes = run(
        &mut judge,
        (1..=60).map(|number| quiet(number, if number == 20 || number > 50 { 2 } else { 3 })),
    );
    let verdict = |number: usize| outcomes[number - 1].verdict;
    assert_eq!(
        [9, 10, 19, 20].map(verdict),
        [Verdict::Hold, Verdict::Approve, Verdict::Approve, Verdict::Hold]
    );
    assert!(outcomes[9].deadline.is_some() && outcomes[10].deadline.is_none());
    // The gap is over, but a HOLD has begun, and lasts as long as a HOLD may.
    assert_eq!(
        [28, 29, 50, 51].map(verdict),
        [Verdict::Hold, Verdict::Approve, Verdict::Approve, Verdict::Hold]
    );
    // Trouble that lasts is no approval.
    assert_eq!([59, 60].map(verdict), [Verdict::Hold, Verdict::Rollback]);
}

#[test]
fn a_suspected_tenant_that_is_gone_holds_for_a_while_and_no_longer() {
    let mut judge = judge("  required: [errors]\n  hold_deadline: 1h", "");
    let rows = |number: u64| {
        let mut rows = vec![("big", errors(200, 0), errors(1_800, 1))];
        if number == 20 || number == 21 {
            rows.push(("gone", errors(6, 5), errors(50, 0)));
        }
        window(number, rows)
    };
    let outcomes = run(&mut judge, (1..=60).map(rows));
    assert_eq!(
        outcomes[21].tenants.get(State::Suspect),
        1,
        "{}",
        outcomes[21].reason
    );
    assert_eq!(outcomes[31].verdict, Verdict::Hold);
    assert_eq!(outcomes[33].tenants.get(State::Suspect), 0);
    assert_eq!(outcomes[59].verdict, Verdict::Approve, "{}", outcomes[59].reason);
}

#[test]
fn the_fleet_is_proven_against_its_tenants_own_limits() {
    let rows = |number| {
        window(
            number,
            vec![
                ("loose", errors(200, 10), errors(1_800, 90)),
                ("usual", errors(20, 0), errors(180, 0)),
            ],
        )
    };
    let mut loose = judge(
        "  required: [errors]",
        "tenants: { loose: { errors: { max_rate: 10% } } }",
    );
    let last = run(&mut loose, (1..=60).map(rows)).pop().unwrap();
    assert_eq!(last.verdict, Verdict::Approve, "{}", last.reason);
    assert!(
        last.reason.contains("below the mean of its tenants' limits"),
        "{}",
        last.reason
    );
    // With a strict limit what was enough above is not.
    let rows = |number: u64| {
        window(
            number,
            vec![("strict", errors(200, number % 2), errors(1_800, 9))],
        )
    };
    let mut strict = judge(
        "  required: [errors]\n  on_deadline: hold",
        "tenants: { strict: { tier: gold, errors: { max_rate: 0.1% } } }\ntiers: { gold: {} }",
    );
    let last = run(&mut strict, (1..=60).map(rows)).pop().unwrap();
    assert_ne!(state(&last, "fleet", Metric::ErrorsSla), State::Proven);
    assert_ne!(state(&last, "cohort:tier:gold", Metric::ErrorsSla), State::Proven);
}

#[test]
fn what_could_not_be_computed_does_not_hide_what_comes_later() {
    let mut judge = judge("  required: [errors]\n  hold_deadline: 1h", "");
    let rows = |number: u64| {
        let canary = if number == 5 { 1 << 41 } else { 100 };
        let failed = if number > 10 { 20 } else { 0 };
        window(
            number,
            vec![
                ("acme", errors(canary, failed.min(canary)), errors(900, 1)),
                ("other", errors(100, 0), errors(900, 1)),
            ],
        )
    };
    let outcomes = run(&mut judge, (1..=40).map(rows));
    for unit in ["tenant:acme", "fleet"] {
        assert_eq!(state(&outcomes[8], unit, Metric::ErrorsLive), State::Error);
        assert_eq!(state(&outcomes[39], unit, Metric::ErrorsLive), State::Breach);
    }
    assert_eq!(outcomes[8].verdict, Verdict::Hold);
    assert_eq!(outcomes[39].verdict, Verdict::Rollback);
}

#[test]
fn agents_that_come_or_leave_are_not_agents_that_fall_silent() {
    let mut judge = judge("  required: [errors]\n  hold_deadline: 1h", "");
    let rows = |number: u64| {
        let mut window = window(number, vec![("acme", errors(100, 0), errors(900, 1))]);
        // Twice as many every fourth window, whose first report comes one window late; in the end all but two leave.
        let agents = match number {
            0..=39 => 2 << (number / 4),
            _ => 2,
        };
        window.canary.expected = agents;
        window.canary.reported = if number < 40 && number.is_multiple_of(4) && number > 0 {
            agents / 2
        } else {
            agents
        };
        window
    };
    let outcomes = run(&mut judge, (1..=60).map(rows));
    assert!(outcomes.iter().all(|outcome| !outcome.halted));
    assert_eq!(outcomes[59].verdict, Verdict::Approve, "{}", outcomes[59].reason);
}

#[test]
fn windows_that_never_came_are_missed_reports_and_time_goes_on() {
    let mut judge = judge("  required: [errors]\n  hold_deadline: 1h", "");
    let rows = |number| window(number, vec![("acme", errors(100, 0), errors(900, 1))]);
    let before = run(&mut judge, (1..=30).map(rows));
    assert_eq!(before[29].verdict, Verdict::Approve, "{}", before[29].reason);
    let after = run(&mut judge, (100..=110).map(rows));
    assert_eq!(after[0].verdict, Verdict::Hold);
    assert!(
        after[0]
            .reason
            .starts_with("only 10 % of the canary agents' windows arrived"),
        "{}",
        after[0].reason
    );
    assert_eq!(after[10].verdict, Verdict::Approve, "{}", after[10].reason);
    let back = Window {
        start_ms: 109_999,
        ..rows(111)
    };
    assert_eq!(
        judge.step(&back).unwrap_err().to_string(),
        "window 111 begins at 109999 ms, before the window ahead of it, which begins at 110000 ms"
    );
    assert_eq!(judge.step(&rows(111)).unwrap().verdict, Verdict::Approve);
}
