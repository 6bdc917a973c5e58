//! What is learned from windows, and how a digest is read.

use proptest::prelude::*;

use super::*;
use crate::{
    evidence::{Coverage, Latency, TenantWindow},
    policy::Policy,
    threshold::Thresholds,
};

const EXAMPLE: &str = concat!(
    r#"{"arm_difference_millibuckets":310,"arm_difference_tenants":42,"first_ms":1700000000000,"#,
    r#""last_ms":1700600000000,"rollouts":6,"service":"checkout","#,
    r#""sources":["0101010101010101010101010101010101010101010101010101010101010101"],"#,
    r#""tenants":{"acme-corp":{"error_p90_ppb":3100000,"p99_us":181020,"requests":1200000,"rollouts":6,"windows":900}},"#,
    r#""v":1,"windows":1080}"#
);

const FULL: Coverage = Coverage {
    expected: 2,
    reported: 2,
};

fn tenant(name: &str) -> TenantName {
    TenantName::parse_counted(name).unwrap()
}

fn counts(requests: u64, errors: u64, latency_us: &[(u64, u64)]) -> ArmCounts {
    let mut histogram = Histogram::new();
    for (us, count) in latency_us {
        (0..*count).for_each(|_| histogram.record(us * 1_000));
    }
    ArmCounts {
        requests,
        errors,
        latency: (!latency_us.is_empty()).then_some(Latency {
            histogram,
            over_sla: None,
        }),
        probes: Default::default(),
    }
}

fn window(number: u64, rows: &[(&str, ArmCounts, ArmCounts)]) -> Window {
    Window {
        number,
        start_ms: number * 10_000,
        len_ms: 10_000,
        canary: FULL,
        baseline: FULL,
        rows: rows
            .iter()
            .map(|(name, canary, baseline)| TenantWindow {
                tenant: tenant(name),
                canary: canary.clone(),
                baseline: baseline.clone(),
            })
            .collect(),
        pool: Vec::new(),
        pods: None,
    }
}

#[test]
fn the_example_reads_and_writes_the_same_bytes() {
    let history = History::parse(EXAMPLE).unwrap();
    assert_eq!(history.to_json(), EXAMPLE);
    assert_eq!(history.margin_buckets(), Some(1));
    assert!(history.tenant(&tenant("acme-corp")).unwrap().is_enough());
    assert_eq!(History::parse(&format!(" {EXAMPLE}\n")), Ok(history));
}

#[test]
fn a_mistake_is_named() {
    for (from, to, hint) in [
        ("\"v\":1", "\"v\":2", "v: version 2 is not known"),
        ("\"v\":1", "\"v\":1,\"w\":1", "unknown field `w`"),
        ("\"windows\":900", "\"windows\":-9", "line 1 column"),
        (
            "\"windows\":900",
            "\"windows\":9000",
            "tenants.acme-corp.windows: 9000 of 1080",
        ),
        (
            "\"rollouts\":6,\"windows\"",
            "\"rollouts\":7,\"windows\"",
            "tenants.acme-corp.rollouts: 7 of 6",
        ),
        ("3100000", "1000000001", "tenants.acme-corp.error_p90_ppb"),
        ("181020", "0", "tenants.acme-corp.p99_us: 0 is out of range"),
        ("181020", "128000001", "tenants.acme-corp.p99_us"),
        ("acme-corp", "acme corp", "character ' '"),
        ("acme-corp", "__none__", "kept for names"),
        ("\"checkout\"", "\"\"", "service: the name is empty"),
        ("1700600000000", "1600000000000", "last_ms: is before first_ms"),
        (
            "310",
            "431001",
            "arm_difference_millibuckets: 431001 is out of range",
        ),
        (
            "\"arm_difference_millibuckets\":310,",
            "",
            "at least 5, which is 42",
        ),
        (":42", ":4", "at least 5, which is 4"),
        ("01010101\"]", "0101010\"]", "64 lower-case hexadecimal digits"),
        (
            "\"tenants\":{",
            "\"tenants\":{\"acme-corp\":{\"requests\":1,\"rollouts\":1,\"windows\":1},",
            "tenant \"acme-corp\" stands twice",
        ),
        ("{\"arm", "[\"arm", "what `coalmine policy learn` writes"),
    ] {
        let text = EXAMPLE.replacen(from, to, 1);
        assert_ne!(text, EXAMPLE, "{from}");
        let error = History::parse(&text).unwrap_err().to_string();
        assert!(error.contains(hint), "{error:?} does not say {hint:?}");
    }
}

#[test]
fn error_rates_are_those_of_groups_of_windows() {
    let mut learner = Learner::new("checkout");
    learner.take_rollout(Hash::of(b"1"));
    // Ten groups of two windows with 0, 1, ... 9 errors in 500, and one window that is left over.
    for number in 1..=20_u64 {
        let errors = if number.is_multiple_of(2) {
            number / 2 - 1
        } else {
            0
        };
        let row = ("acme", counts(900, 900, &[]), counts(250, errors, &[]));
        assert_eq!(learner.take_window(&window(number, &[row])), Taken::Used);
    }
    let rest = ("acme", counts(0, 0, &[]), counts(400, 400, &[]));
    let own = ("__overflow__", counts(0, 0, &[]), counts(5_000, 0, &[]));
    let canary_only = ("new", counts(10, 0, &[]), ArmCounts::default());
    learner.take_window(&window(21, &[own, rest, canary_only]));
    let history = learner.finish();
    assert_eq!((history.rollouts, history.windows), (1, 21));
    assert_eq!((history.first_ms, history.last_ms), (10_000, 220_000));
    assert_eq!(history.sources, [Hash::of(b"1")]);
    assert_eq!(
        history.tenants.keys().collect::<Vec<_>>(),
        ["acme"],
        "neither what Coalmine puts together nor a tenant of the canary alone"
    );
    let acme = history.tenant(&tenant("acme")).unwrap();
    // The ninth of ten: 8 errors in 500.
    assert_eq!(acme.error_p90_ppb, Some(16_000_000));
    assert_eq!((acme.requests, acme.windows, acme.rollouts), (5_400, 21, 1));
    assert_eq!((acme.p99_us, history.arm_difference_tenants), (None, 0));
    assert_eq!(History::parse(&history.to_json()), Ok(history));
}

#[test]
fn the_p99_is_the_upper_edge_of_its_bucket_over_all_rollouts() {
    let mut learner = Learner::new("checkout");
    for rollout in [b"1", b"2"] {
        learner.take_rollout(Hash::of(rollout));
        let row = (
            "acme",
            counts(1_000, 0, &[(900_000, 1_000)]),
            counts(500, 0, &[(10_000, 490), (200_000, 10)]),
        );
        learner.take_window(&window(1, &[row]));
    }
    let history = learner.finish();
    let acme = history.tenant(&tenant("acme")).unwrap();
    let mut histogram = Histogram::new();
    histogram.record(200_000_000);
    let edge = histogram.quantile(0).unwrap().upper_ns.div_ceil(1_000);
    assert_eq!((acme.p99_us, acme.rollouts, history.rollouts), (Some(edge), 2, 2));
    assert!((200_000..210_000).contains(&edge));
}

#[test]
fn windows_with_a_gap_are_not_learned_from() {
    let gap = Coverage {
        expected: 2,
        reported: 1,
    };
    let nobody = Coverage::default();
    let row = || [("acme", counts(500, 0, &[]), counts(500, 50, &[]))];
    for (canary, baseline) in [(gap, FULL), (FULL, gap), (nobody, FULL), (FULL, nobody)] {
        let mut learner = Learner::new("checkout");
        learner.take_rollout(Hash::of(b"1"));
        let missing = Window {
            canary,
            baseline,
            ..window(1, &row())
        };
        assert_eq!(learner.take_window(&missing), Taken::Skipped);
        assert_eq!(learner.skipped(), 1);
        let history = learner.finish();
        assert_eq!((history.rollouts, history.windows), (0, 0));
        assert!(history.tenants.is_empty() && history.sources.is_empty());
    }
}

#[test]
fn the_median_lies_within_its_bucket_by_counts() {
    let histogram = |counts: &[u64], underflow, overflow| {
        Histogram::from_parts(-100, counts, underflow, overflow, 0).unwrap()
    };
    assert_eq!(median(&histogram(&[10], 0, 0)), Some(-99_500));
    assert_eq!(median(&histogram(&[1], 0, 0)), Some(-99_500));
    assert_eq!(median(&histogram(&[25, 50, 25], 0, 0)), Some(-98_500));
    assert_eq!(median(&histogram(&[1, 3], 0, 0)), Some(-99_000 + 333));
    assert_eq!(median(&histogram(&[2, 2], 0, 0)), Some(-99_000));
    assert_eq!(median(&histogram(&[1], 5, 0)), None);
    assert_eq!(median(&histogram(&[1], 0, 5)), None);
    assert_eq!(median(&Histogram::new()), None);
}

#[test]
fn the_arms_differ_by_the_root_of_the_mean_square() {
    let run = |rollouts: u8, latencies: u64| {
        let mut learner = Learner::new("checkout");
        for rollout in 0..rollouts {
            learner.take_rollout(Hash::of(&[rollout]));
            // All values of an arm are in one bucket, so its median is in the bucket's middle; the arms are two
            // buckets apart, now one, now the other ahead.
            let (fast, slow) = (
                counts(9_000, 0, &[(100_000, latencies)]),
                counts(9_000, 0, &[(109_000, latencies)]),
            );
            let (canary, baseline) = if rollout % 2 == 0 {
                (fast, slow)
            } else {
                (slow, fast)
            };
            learner.take_window(&window(1, &[("acme", canary, baseline)]));
        }
        let history = learner.finish();
        assert_eq!(History::parse(&history.to_json()).as_ref(), Ok(&history));
        (
            history.arm_difference_tenants,
            history.arm_difference_millibuckets,
            history.margin_buckets(),
        )
    };
    assert_eq!(run(5, 5_000), (5, Some(2_000), Some(6)));
    assert_eq!(run(4, 5_000), (4, None, None));
    assert_eq!(run(5, 4_999), (0, None, None));
}

proptest! {
    /// Gaps never loosen: windows with a gap teach the same as windows that are not there, and whichever windows are
    /// left, no limit passes the ceiling.
    #[test]
    fn a_gap_is_the_same_as_no_window(
        windows in proptest::collection::vec((1_u64..3_000, 0_u64..3_000, proptest::bool::ANY), 1..40),
    ) {
        let policy = Policy::parse(
            "{ apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout,
               defaults: { errors: { max_rate: 1% }, latency: { p99: 350ms } },
               adjust: { from_history: true, floor: 0.5x, ceiling: 2x } }",
        ).unwrap();
        let mut with_gaps = Learner::new("checkout");
        let mut without = Learner::new("checkout");
        for learner in [&mut with_gaps, &mut without] {
            learner.take_rollout(Hash::of(b"1"));
        }
        for (number, (requests, errors, is_whole)) in (1..).zip(windows) {
            let row = ("acme", counts(9, 0, &[]), counts(requests, errors.min(requests), &[(900_000, 3)]));
            let mut window = window(number, &[row]);
            if is_whole {
                without.take_window(&window);
            } else {
                window.baseline.reported -= 1;
            }
            with_gaps.take_window(&window);
        }
        let (with_gaps, without) = (with_gaps.finish(), without.finish());
        prop_assert_eq!(&with_gaps, &without);
        prop_assert_eq!(History::parse(&with_gaps.to_json()), Ok(with_gaps.clone()));
        let limits = Thresholds::of(&policy, Some(&with_gaps), &tenant("acme"));
        prop_assert!((5_000_000..=20_000_000).contains(&limits.max_rate_ppb));
        prop_assert!((175_000..=700_000).contains(&limits.p99_us.unwrap()));
        if !with_gaps.tenant(&tenant("acme")).is_some_and(TenantHistory::is_enough) {
            prop_assert_eq!(limits, Thresholds::of(&policy, None, &tenant("acme")));
        }
    }
}
