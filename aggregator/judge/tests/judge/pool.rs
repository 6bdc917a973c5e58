//! Pools of which not everything is counted: what is judged all the same, and what is not.

use coalmine_judge::{
    budget::Metric,
    evidence::{ArmCounts, Coverage, Pool, TenantWindow, Window},
    v1::{Judge, Outcome, State, Verdict},
};
use coalmine_proto::names::{Arm, TenantName};

use crate::script::judge_by;

const REQUIRED: &str = "  pool: { max_wait_rate: 1% }\n  required: [errors, pool]";

/// What is counted at the pools of an arm, as a change of what is counted whole.
type Counted = fn(&mut Pool);

const ALL: Counted = |_| ();
const SOME_WAITS: Counted = |pool| pool.at_least = true;
const NO_ACQUIRES: Counted = |pool| pool.estimated = true;

fn judge(defaults: &str) -> Judge {
    let usual = "  errors: { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }\n  hold_deadline: 3m";
    judge_by(&[usual, defaults], "")
}

/// A pool with so many acquires, waits and timeouts.
fn pool(arm: Arm, (acquires, waits, timeouts): (u64, u64, u64), counted: Counted) -> Pool {
    let mut pool = Pool {
        arm,
        acquires,
        waits,
        timeouts,
        used: 5,
        max: 10,
        at_least: false,
        estimated: false,
        agents: None,
    };
    counted(&mut pool);
    pool
}

/// A window without an error; three agents on the canary, nine on the baseline.
fn window(number: u64, pool: Vec<Pool>) -> Window {
    let agents = |n| Coverage {
        expected: n,
        reported: n,
    };
    let requests = |requests| ArmCounts {
        requests,
        ..ArmCounts::default()
    };
    Window {
        number,
        start_ms: number * 1_000,
        len_ms: 1_000,
        canary: agents(3),
        baseline: agents(9),
        rows: vec![TenantWindow {
            tenant: TenantName::parse(b"acme").unwrap(),
            canary: requests(100),
            baseline: requests(900),
        }],
        pool,
        pods: None,
    }
}

/// The last of sixty windows, or the first in which the rollout is over.
fn last(judge: &mut Judge, pools: impl Fn(u64) -> Vec<Pool>) -> Outcome {
    let mut outcomes = Vec::new();
    for number in 1..=60 {
        let outcome = judge.step(&window(number, pools(number))).unwrap();
        let is_over = outcome.halted;
        outcomes.push(outcome);
        if is_over {
            break;
        }
    }
    outcomes.pop().unwrap()
}

/// The same pools in each window.
fn always(
    defaults: &str,
    (canary, of_canary): ((u64, u64, u64), Counted),
    (baseline, of_baseline): ((u64, u64, u64), Counted),
) -> Outcome {
    last(&mut judge(defaults), |_| {
        vec![
            pool(Arm::Canary, canary, of_canary),
            pool(Arm::Baseline, baseline, of_baseline),
        ]
    })
}

fn state(outcome: &Outcome) -> State {
    let report = outcome.units.iter().find(|unit| unit.metric == Metric::Pool);
    report.map_or(State::Clear, |report| report.state)
}

#[test]
fn a_lower_bound_of_waits_shows_harm_and_never_its_absence() {
    let (calm, waiting, baseline) = ((200, 0, 0), (200, 20, 0), (1_800, 2, 0));
    let exact = always(REQUIRED, (calm, ALL), (baseline, ALL));
    assert_eq!((exact.verdict, state(&exact)), (Verdict::Approve, State::Proven));
    let bound = always(REQUIRED, (calm, SOME_WAITS), (baseline, SOME_WAITS));
    assert_eq!((bound.verdict, state(&bound)), (Verdict::Hold, State::Clear));
    assert!(
        bound
            .reason
            .starts_with("not yet proven that fewer than 1 % of the canary's acquires")
            && bound.reason.contains("; waits are not all counted; ")
            && bound.reason.ends_with("--pool-metric waits=NAME)"),
        "{}",
        bound.reason
    );
    // It is the canary of which it is to be proven.
    let exact = always(REQUIRED, (calm, ALL), (baseline, SOME_WAITS));
    assert_eq!(exact.verdict, Verdict::Approve, "{}", exact.reason);
    let found = always(REQUIRED, (waiting, SOME_WAITS), (baseline, SOME_WAITS));
    assert_eq!((found.verdict, state(&found)), (Verdict::Rollback, State::Breach));
    assert!(
        found.reason.contains("waits are not all counted"),
        "{}",
        found.reason
    );
}

#[test]
fn what_was_proven_is_not_while_windows_with_a_lower_bound_follow() {
    let mut judge = judge(REQUIRED);
    let outcome = last(&mut judge, |number| {
        let counted = if number > 50 { SOME_WAITS } else { ALL };
        vec![
            pool(Arm::Canary, (200, 0, 0), counted),
            pool(Arm::Baseline, (1_800, 2, 0), ALL),
        ]
    });
    assert_eq!((outcome.verdict, state(&outcome)), (Verdict::Hold, State::Clear));
    let tree = judge.explain(&outcome, None).join("\n");
    assert!(tree.contains("; waits are not all counted"), "{tree}");
}

#[test]
fn waits_are_not_compared_with_a_lower_bound_unless_both_are_one() {
    // The limit is far away.
    let find = |canary, baseline| {
        let policy = "  pool: { max_wait_rate: 30% }\n  required: [errors]";
        always(policy, canary, baseline).verdict == Verdict::Rollback
    };
    let (waiting, baseline) = ((200, 20, 0), (1_800, 0, 0));
    assert!(find((waiting, ALL), (baseline, ALL)));
    assert!(find((waiting, SOME_WAITS), (baseline, SOME_WAITS)));
    // The canary waits at least so often, and the baseline no more often than that.
    assert!(find((waiting, SOME_WAITS), (baseline, ALL)));
    assert!(!find((waiting, ALL), (baseline, SOME_WAITS)));
    // Timeouts are counted whole.
    assert!(find(((200, 20, 20), ALL), (baseline, SOME_WAITS)));
}

#[test]
fn estimated_acquires_are_not_held_against_the_limit() {
    let (waiting, baseline) = ((200, 20, 0), (1_800, 180, 0));
    // One over the limit, and the other too: neither harm nor safety is shown.
    for canary in [(200, 0, 0), waiting] {
        let outcome = always(REQUIRED, (canary, NO_ACQUIRES), (baseline, NO_ACQUIRES));
        assert_eq!((outcome.verdict, state(&outcome)), (Verdict::Hold, State::NoData));
        assert!(
            outcome
                .reason
                .starts_with("acquires of a connection are not counted, and requests do not tell")
                && outcome.reason.contains("--pool-metric acquires=NAME"),
            "{}",
            outcome.reason
        );
    }
    // A baseline that is estimated says nothing of the limit, and the canary is judged by it.
    let outcome = always(REQUIRED, (waiting, ALL), (baseline, NO_ACQUIRES));
    assert_eq!(
        (outcome.verdict, state(&outcome)),
        (Verdict::Rollback, State::Breach)
    );
    let outcome = always(REQUIRED, ((200, 0, 0), ALL), (baseline, NO_ACQUIRES));
    assert_eq!(outcome.verdict, Verdict::Approve, "{}", outcome.reason);
    // Where nobody requires a proof, nothing stands in the way.
    let policy = "  pool: { max_wait_rate: 1% }\n  required: [errors]";
    let outcome = always(policy, (waiting, NO_ACQUIRES), (baseline, NO_ACQUIRES));
    assert_eq!(outcome.verdict, Verdict::Approve, "{}", outcome.reason);
}

#[test]
fn estimated_acquires_are_compared_with_their_like() {
    let (waiting, baseline) = ((200, 20, 0), (1_800, 2, 0));
    let outcome = always(REQUIRED, (waiting, NO_ACQUIRES), (baseline, NO_ACQUIRES));
    assert_eq!(
        (outcome.verdict, state(&outcome)),
        (Verdict::Rollback, State::Breach)
    );
    assert!(
        outcome
            .reason
            .contains("acquires of a connection (estimated by the requests) had to wait on the canary"),
        "{}",
        outcome.reason
    );
    for (canary, baseline) in [
        ((waiting, NO_ACQUIRES), (baseline, ALL)),
        ((waiting, NO_ACQUIRES), ((0, 0, 0), NO_ACQUIRES)),
    ] {
        let outcome = always(REQUIRED, canary, baseline);
        assert_eq!(
            (outcome.verdict, state(&outcome)),
            (Verdict::Hold, State::NoData),
            "{}",
            outcome.reason
        );
    }
}

#[test]
fn what_was_proven_is_not_known_once_acquires_are_not_counted() {
    let run = |judge: &mut Judge| {
        last(judge, |number| {
            // In the last window no scrape succeeded, which does not make it better.
            if number == 60 {
                return Vec::new();
            }
            let counted = if number > 55 { NO_ACQUIRES } else { ALL };
            vec![
                pool(Arm::Canary, (200, 0, 0), counted),
                pool(Arm::Baseline, (1_800, 2, 0), counted),
            ]
        })
    };
    let outcome = run(&mut judge("  pool: { max_wait_rate: 1% }\n  required: [errors]"));
    assert_eq!(
        (outcome.verdict, state(&outcome)),
        (Verdict::Approve, State::Clear)
    );
    // Where it is required, it is missing.
    let mut judge = judge(REQUIRED);
    let outcome = run(&mut judge);
    assert_eq!((outcome.verdict, state(&outcome)), (Verdict::Hold, State::NoData));
    let tree = judge.explain(&outcome, None).join("\n");
    assert!(
        tree.contains("acquires of a connection are not counted"),
        "{tree}"
    );
}

/// Pools that so many agents of the canary have read, and all of the baseline.
fn read_by(agents: u32) -> Vec<Pool> {
    let mut canary = pool(Arm::Canary, (200, 0, 0), ALL);
    canary.agents = Some(agents);
    let mut baseline = pool(Arm::Baseline, (1_800, 2, 0), ALL);
    baseline.agents = Some(9);
    vec![canary, baseline]
}

#[test]
fn a_required_pool_is_read_by_enough_agents() {
    let run = |pools: &dyn Fn(u64) -> Vec<Pool>| last(&mut judge(REQUIRED), pools);
    let approved = |outcome: &Outcome| {
        assert_eq!(outcome.verdict, Verdict::Approve, "{}", outcome.reason);
    };
    let short = |outcome: &Outcome, arm: &str| {
        assert_eq!((outcome.verdict, state(outcome)), (Verdict::Hold, State::Gap));
        let said = format!("of the {arm} agents' reports of the last 10 windows, and 90 % are needed");
        assert!(
            outcome.reason.starts_with("a connection pool was read in only ")
                && outcome.reason.contains(&said),
            "{}",
            outcome.reason
        );
    };
    approved(&run(&|_| read_by(3)));
    // One scrape failed; what it missed is in the next.
    approved(&run(&|number| read_by(if number == 59 { 2 } else { 3 })));
    short(&run(&|_| read_by(1)), "canary");
    short(&run(&|number| read_by(if number > 57 { 1 } else { 3 })), "canary");
    // None of them reads it any more.
    let vanished = |number: u64| if number > 57 { Vec::new() } else { read_by(3) };
    short(&run(&vanished), "canary");
    let without_baseline = |number: u64| {
        let mut pools = read_by(3);
        if number > 57 {
            pools.truncate(1);
        }
        pools
    };
    short(&run(&without_baseline), "baseline");
    // More than reported make up for nothing.
    short(
        &run(&|number| read_by(if number.is_multiple_of(2) { 100 } else { 0 })),
        "canary",
    );

    // It is asked only where the pool is required, and of evidence that counts agents.
    let policy = "  pool: { max_wait_rate: 1% }\n  required: [errors]";
    approved(&last(&mut judge(policy), |_| read_by(1)));
    approved(&always(REQUIRED, ((200, 0, 0), ALL), ((1_800, 2, 0), ALL)));
}
