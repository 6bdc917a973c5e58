//! Every metric and every kind of unit, each with a fault that only it can see.

use coalmine_judge::{
    budget::Metric,
    evidence::{ArmCounts, Coverage, Latency, Pool, Probes, TenantWindow, Window},
    v1::{Judge, Outcome, State, Unit, Verdict},
};
use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, TenantName},
};

use crate::script::{Random, Script, judge_by};

/// A judge by the usual policy with further lines in `defaults` and after it.
fn judge_with(defaults: &str, rest: &str) -> Judge {
    let usual = "  errors: { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 10s }
  hold_deadline: 3m";
    judge_by(&[usual, defaults], rest)
}

/// The first window in which something is in breach, and what is.
fn first_breach(
    judge: &mut Judge,
    windows: impl IntoIterator<Item = Window>,
) -> Option<(u64, Vec<(String, Metric)>)> {
    windows.into_iter().find_map(|window| {
        let outcome = judge.step(&window).unwrap();
        let breached = breached(&outcome);
        assert_eq!(breached.is_empty(), !outcome.halted, "{}", outcome.reason);
        (!breached.is_empty()).then_some((outcome.window, breached))
    })
}

fn breached(outcome: &Outcome) -> Vec<(String, Metric)> {
    let in_breach = outcome.units.iter().filter(|unit| unit.state == State::Breach);
    in_breach
        .map(|unit| (unit.unit.to_string(), unit.metric))
        .collect()
}

/// Latencies with a long tail: 10 ms times 2^(k/16) for a sum k of eight random numbers, then times `permille`.
fn latencies(random: &mut Random, requests: u64, permille: u64) -> Latency {
    let mut histogram = Histogram::new();
    for _ in 0..requests {
        let doublings: u64 = (0..8).map(|_| random.next() >> 61).sum();
        let ns = 10_000_000 * (1 << (doublings / 16)) + (doublings % 16) * 600_000 * (1 << (doublings / 16));
        histogram.record(ns * permille / 1_000 + (random.next() >> 46));
    }
    Latency {
        histogram,
        over_sla: None,
    }
}

/// Windows of one tenant with 100 requests on the canary and 900 on the baseline, whose canary is slower.
fn slower(seed: u64, windows: u64, permille: u64) -> Vec<Window> {
    let mut random = Random(seed);
    let mut arm = |requests, permille| ArmCounts {
        requests,
        latency: Some(latencies(&mut random, requests, permille)),
        ..ArmCounts::default()
    };
    let mut all = Vec::new();
    for number in 1..=windows {
        let (canary, baseline) = (arm(100, permille), arm(900, 1_000));
        all.push(window(number, vec![row("acme", canary, baseline)]));
    }
    all
}

fn row(tenant: &str, canary: ArmCounts, baseline: ArmCounts) -> TenantWindow {
    TenantWindow {
        tenant: TenantName::parse(tenant.as_bytes()).unwrap(),
        canary,
        baseline,
    }
}

fn window(number: u64, rows: Vec<TenantWindow>) -> Window {
    let agents = |n| Coverage {
        expected: n,
        reported: n,
    };
    Window {
        number,
        start_ms: 1_700_000_000_000 + number * 1_000,
        len_ms: 1_000,
        canary: agents(1),
        baseline: agents(9),
        rows,
        pool: Vec::new(),
        pods: None,
    }
}

fn plain(requests: u64, errors: u64) -> ArmCounts {
    ArmCounts {
        requests,
        errors,
        ..ArmCounts::default()
    }
}

#[test]
fn a_slower_canary_is_found_against_the_baseline_and_the_margin_is_kept() {
    let metric = |permille| first_breach(&mut judge_with("", ""), slower(1, 120, permille));
    let (window, breached) = metric(1_300).expect("30 % slower is found");
    assert!(window < 60, "{window}");
    assert!(
        breached.iter().all(|(_, metric)| *metric == Metric::LatencyLive),
        "{breached:?}"
    );
    for tolerated in [1_000, 1_060, 700] {
        assert_eq!(metric(tolerated), None, "{tolerated}");
    }
    // With a wider margin the same canary is within it.
    let wide = first_breach(
        &mut judge_with("", "tenants: { acme: { latency: { margin: 50% } } }"),
        slower(1, 120, 1_300),
    );
    assert_eq!(wide, None);
}

#[test]
fn the_finding_about_latency_says_what_was_slow() {
    let mut judge = judge_with("", "");
    let outcome = slower(1, 120, 1_400)
        .iter()
        .map(|window| judge.step(window).unwrap())
        .find(|outcome| outcome.halted)
        .unwrap();
    let worst = outcome.worst.unwrap();
    assert_eq!(worst.unit.to_string(), "tenant:acme");
    for part in [
        " canary requests took longer than ",
        " ms (",
        "on the baseline",
        "9.05 % slower is tolerated",
    ] {
        assert!(worst.seen.contains(part), "{}", worst.seen);
    }
    assert!(worst.limits.starts_with("latency.margin "), "{}", worst.limits);
    assert!(
        outcome.reason.starts_with("tenant acme on latency/live: "),
        "{}",
        outcome.reason
    );
}

#[test]
fn a_fault_spread_over_a_tier_is_found_in_the_tier_and_over_small_tenants_in_the_tail() {
    // 400 tenants with a canary request every second window; none can be judged alone.
    let windows = |failing: fn(u64) -> bool| {
        let mut random = Random(5);
        (1..=400).map(move |number| {
            let rows = (0..400)
                .map(|tenant| {
                    let canary = (number + tenant) % 2;
                    let errors = random.events(canary, if failing(tenant) { 12_000 } else { 500 });
                    let failed = random.events(9, 500);
                    row(
                        &format!("tenant-{tenant:03}"),
                        plain(canary, errors),
                        plain(9, failed),
                    )
                })
                .collect();
            window(number, rows)
        })
    };
    let gold: Vec<String> = (0..200)
        .map(|tenant| format!("  tenant-{tenant:03}: {{ tier: gold }}"))
        .collect();
    let policy = format!(
        "tiers: {{ gold: {{ errors: {{ max_rate: 2% }} }} }}\ntenants:\n{}\nrollout: {{ cohorts: [tier, tail] }}",
        gold.join("\n")
    );
    let (_, breached) = first_breach(
        &mut judge_with("  on_deadline: hold", &policy),
        windows(|tenant| tenant < 200),
    )
    .unwrap();
    assert!(
        breached.iter().any(|(unit, _)| unit == "cohort:tier:gold"),
        "{breached:?}"
    );
    assert!(
        breached.iter().all(|(unit, _)| !unit.starts_with("tenant:")),
        "{breached:?}"
    );
    let (_, breached) = first_breach(
        &mut judge_with("  on_deadline: hold", "rollout: { cohorts: [tail] }"),
        windows(|_| true),
    )
    .unwrap();
    assert!(
        breached.iter().any(|(unit, _)| unit == "cohort:tail"),
        "{breached:?}"
    );
    assert_eq!(
        first_breach(
            &mut judge_with("  on_deadline: hold", &policy),
            windows(|_| false)
        ),
        None
    );
}

fn pools(canary: (u64, u64, u64), baseline: (u64, u64, u64), used: u64) -> Vec<Pool> {
    let pool = |arm, (acquires, waits, timeouts), used| Pool {
        arm,
        acquires,
        waits,
        timeouts,
        used,
        max: 10,
        at_least: false,
        estimated: false,
        agents: None,
    };
    vec![pool(Arm::Canary, canary, used), pool(Arm::Baseline, baseline, 5)]
}

fn with_pools(windows: u64, pools: impl Fn(u64) -> Vec<Pool>) -> Vec<Window> {
    (1..=windows)
        .map(|number| Window {
            pool: pools(number),
            ..window(number, vec![row("acme", plain(100, 0), plain(900, 0))])
        })
        .collect()
}

const POOL: &str = "  pool: { max_wait_rate: 1% }\n  required: [errors, pool]";

#[test]
fn waits_and_timeouts_at_the_pool_are_judged_as_events() {
    let find = |canary, baseline| {
        first_breach(
            &mut judge_with(POOL, ""),
            with_pools(60, |_| pools(canary, baseline, 5)),
        )
    };
    for (canary, baseline) in [
        // Waits over the limit and over the baseline's; timeouts alone.
        ((200, 20, 0), (1_800, 2, 0)),
        ((200, 2, 2), (1_800, 18, 0)),
    ] {
        let (_, breached) = find(canary, baseline).expect("it is found");
        assert_eq!(breached, [("fleet".to_owned(), Metric::Pool)]);
    }
    // Both arms wait: nothing new.
    assert_eq!(find((200, 20, 1), (1_800, 180, 9)), None);
    assert_eq!(find((200, 1, 0), (1_800, 9, 0)), None);
}

#[test]
fn a_required_pool_must_be_measured_and_proven() {
    let run = |windows: Vec<Window>| {
        let mut judge = judge_with(POOL, "");
        windows
            .iter()
            .map(|window| judge.step(window).unwrap())
            .last()
            .unwrap()
    };
    let unmeasured = run(with_pools(60, |_| Vec::new()));
    assert_eq!(unmeasured.verdict, Verdict::Hold);
    assert!(
        unmeasured.reason.contains("no connection pool is measured"),
        "{}",
        unmeasured.reason
    );
    assert!(
        unmeasured
            .units
            .iter()
            .any(|unit| (unit.metric, unit.state) == (Metric::Pool, State::NoData))
    );
    let proven = run(with_pools(60, |_| pools((200, 0, 0), (1_800, 2, 0), 5)));
    assert_eq!(proven.verdict, Verdict::Approve, "{}", proven.reason);
    assert!(
        proven
            .reason
            .contains("fewer than 1 % of the canary's acquires of a connection wait"),
        "{}",
        proven.reason
    );
    assert!(
        proven
            .units
            .iter()
            .any(|unit| (unit.metric, unit.state) == (Metric::Pool, State::Proven))
    );
    // A pool that stays full holds, though nobody has waited yet.
    let full = run(with_pools(60, |number| {
        pools((200, 0, 0), (1_800, 2, 0), if number > 57 { 10 } else { 5 })
    }));
    assert_eq!(full.verdict, Verdict::Hold);
    assert!(
        full.reason
            .contains("its pool has been full for 3 windows (10 of 10"),
        "{}",
        full.reason
    );
}

#[test]
fn failing_probes_are_found_where_requests_are_fine() {
    let probed = |failed_canary: u64, failed_baseline: u64| {
        let arm = |requests, failed| ArmCounts {
            probes: Probes { checks: 5, failed },
            ..plain(requests, 0)
        };
        (1..=40).map(move |number| {
            window(
                number,
                vec![
                    row("acme", arm(50, failed_canary), arm(450, failed_baseline)),
                    row("other", plain(50, 0), plain(450, 0)),
                ],
            )
        })
    };
    let (_, breached) = first_breach(&mut judge_with("", ""), probed(2, 0)).expect("it is found");
    assert!(
        breached.iter().all(|(_, metric)| *metric == Metric::Probes),
        "{breached:?}"
    );
    assert!(
        breached.iter().any(|(unit, _)| unit == "tenant:acme"),
        "{breached:?}"
    );
    assert_eq!(first_breach(&mut judge_with("", ""), probed(0, 0)), None);
    assert_eq!(
        first_breach(&mut judge_with("", ""), probed(1, 1)),
        None,
        "the baseline's probes fail as well"
    );
}

#[test]
fn probes_within_the_limit_are_held_against_the_baseline_all_the_same() {
    let arm = |requests, failed| ArmCounts {
        probes: Probes { checks: 5, failed },
        ..plain(requests, 0)
    };
    let windows = (1..=40).map(|number| window(number, vec![row("acme", arm(50, 2), arm(450, 0))]));
    let mut judge = judge_with("", "tenants: { acme: { errors: { max_rate: 60% } } }");
    let (_, breached) = first_breach(&mut judge, windows).expect("it is found");
    assert!(
        breached.contains(&("tenant:acme".to_owned(), Metric::Probes)),
        "{breached:?}"
    );
    // Without a baseline the limit alone decides.
    let alone = (1..=40).map(|number| window(number, vec![row("acme", arm(50, 2), plain(450, 0))]));
    let (_, breached) = first_breach(&mut judge_with("", ""), alone).expect("it is found");
    assert!(
        breached.contains(&("tenant:acme".to_owned(), Metric::Probes)),
        "{breached:?}"
    );
}

#[test]
fn agents_that_keep_falling_silent_are_found_and_one_that_died_is_a_gap() {
    let with_silent = |silent: fn(u64) -> u32| {
        (1..=160).map(move |number| Window {
            canary: Coverage {
                expected: 4,
                reported: 4 - silent(number),
            },
            ..window(number, vec![row("acme", plain(100, 0), plain(900, 0))])
        })
    };
    // Two of four restart again and again.
    let (_, breached) = first_breach(
        &mut judge_with("", ""),
        with_silent(|n| if n % 4 == 0 { 2 } else { 0 }),
    )
    .unwrap();
    assert_eq!(breached, [("fleet".to_owned(), Metric::Gaps)]);
    // One dies once and for all.
    let mut judge = judge_with("", "");
    let last = with_silent(|n| u32::from(n > 20))
        .map(|window| judge.step(&window).unwrap())
        .last()
        .unwrap();
    assert_eq!(last.verdict, Verdict::Hold, "{}", last.reason);
    assert!(
        last.units
            .iter()
            .any(|unit| (unit.metric, unit.state) == (Metric::Gaps, State::Gap))
    );
}

#[test]
fn a_warm_up_is_no_evidence() {
    let failing_first = |warm_up: &str| {
        let mut judge = judge_with("  required: [errors]", &format!("rollout: {{ {warm_up} }}"));
        let mut outcomes = Vec::new();
        for number in 1..=60 {
            let errors = if number <= 20 { 30 } else { 0 };
            outcomes.push(
                judge
                    .step(&window(
                        number,
                        vec![row("acme", plain(100, errors), plain(900, 1))],
                    ))
                    .unwrap(),
            );
        }
        outcomes
    };
    assert!(failing_first("alpha: 1%").iter().any(|outcome| outcome.halted));
    let outcomes = failing_first("warm_up: 20s");
    assert!(outcomes.iter().all(|outcome| !outcome.halted));
    assert!(
        outcomes[19]
            .reason
            .contains("requests of the first 20s are no evidence"),
        "{}",
        outcomes[19].reason
    );
    assert!(
        !outcomes[20].reason.contains("no evidence"),
        "{}",
        outcomes[20].reason
    );
    assert_eq!(outcomes[59].verdict, Verdict::Approve, "{}", outcomes[59].reason);
}

#[test]
fn newcomers_draw_on_the_reserve_and_the_account_says_so() {
    let mut judge = judge_with("  required: [errors]", "");
    let names = ["1-first", "2-second", "3-third", "4-fourth"];
    let mut last = None;
    for number in 1..=60 {
        let known = if number < 5 {
            1
        } else if number < 10 {
            3
        } else {
            4
        };
        let rows = names[..known]
            .iter()
            .map(|name| {
                row(
                    name,
                    plain(40, u64::from(*name == "3-third" && number > 10) * 8),
                    plain(360, 0),
                )
            })
            .collect();
        let outcome = judge.step(&window(number, rows)).unwrap();
        if outcome.halted {
            last = Some(outcome);
            break;
        }
    }
    let found = breached(&last.expect("the newcomer's fault is found"));
    assert!(
        found.iter().any(|(unit, _)| unit == "tenant:3-third"),
        "{found:?}"
    );
    assert_eq!(
        judge.account(),
        [
            "alpha is 1 % for the whole rollout",
            "12.5 % of it to the fleet",
            "12.5 % of it to the one cohort",
            "62.5 % of it to 1 tenants known at the start, equal parts",
            "7.6 % of it to newcomers, group 1: 2 that appeared together, equal parts",
            "1.9 % of it to newcomers, group 2: 1 that appeared together, equal parts",
            "3 % of it is left for newcomers",
        ]
    );
}

#[test]
fn the_tree_goes_from_the_policy_to_the_verdict() {
    let mut judge = judge_with(
        "  required: [errors]",
        "tenants: { gold-one: { errors: { max_rate: 0.5% } } }",
    );
    let mut script = Script::new(3, 3, 1_000);
    let mut outcome = None;
    for number in 1..=30 {
        let mut window = script.window(
            number,
            &|tenant, canary| if canary && tenant == 1 { 150_000 } else { 1_000 },
            0,
        );
        window.rows.iter_mut().for_each(|row| {
            row.canary.latency = None;
            row.baseline.latency = None;
        });
        outcome = Some(judge.step(&window).unwrap());
    }
    let outcome = outcome.unwrap();
    let asked = TenantName::parse(b"gold-one").unwrap();
    let unknown = TenantName::parse(b"nobody").unwrap();
    let tree = judge.explain(&outcome, Some(&asked)).join("\n");
    for part in [
        "policy of service checkout",
        "a HOLD lasts at most 3m, then rollback",
        "alpha is 1 % for the whole rollout",
        "threshold errors.max_rate 0.5 % (tenants.gold-one 0.5 %)",
        "tenant tenant-001: ",
        " bits of harm -> BREACH -> score ",
        "verdict ROLLBACK\n  tenant tenant-001 on errors/",
        "the lowest score is 0.000, ",
        "below the threshold of 0.950",
    ] {
        assert!(tree.contains(part), "{part:?} is not in\n{tree}");
    }
    assert!(
        judge
            .explain(&outcome, Some(&unknown))
            .join("\n")
            .contains("tenant nobody\n  has not been seen")
    );
    assert!(matches!(&outcome.worst.unwrap().unit, Unit::Tenant(name) if name.as_str() == "tenant-001"));
}
