//! Where limits come from, and how far history may move them.

use proptest::prelude::*;

use super::*;

const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors:  { max_rate: 1% }
  latency: { p99: 350ms }
tiers:
  gold: { latency: { p99: 250ms, margin: 20% }, errors: { max_ratio: 2 } }
tenants:
  acme: { tier: gold, errors: { max_rate: 0.5%, max_increase: 0.2pp } }
adjust: { from_history: true, floor: 0.5x, ceiling: 2x }
";

fn policy() -> Policy {
    Policy::parse(POLICY).unwrap()
}

fn tenant(name: &str) -> TenantName {
    TenantName::parse_counted(name).unwrap()
}

fn known(requests: u64, error_p90_ppb: u64, p99_us: u64) -> TenantHistory {
    TenantHistory {
        requests,
        windows: 10,
        rollouts: 1,
        error_p90_ppb: Some(error_p90_ppb),
        p99_us: Some(p99_us),
    }
}

fn history(difference: Option<u64>, tenants: &[(&str, TenantHistory)]) -> History {
    let empty = concat!(
        r#"{"v":1,"service":"checkout","rollouts":3,"windows":90,"first_ms":0,"last_ms":1,"sources":[],"#,
        r#""arm_difference_tenants":0,"tenants":{}}"#
    );
    let mut history = History::parse(empty).unwrap();
    history.arm_difference_millibuckets = difference;
    history.arm_difference_tenants = if difference.is_some() { 9 } else { 0 };
    let tenants = tenants.iter().cloned();
    history.tenants = tenants.map(|(name, known)| (name.to_owned(), known)).collect();
    history
}

/// The limits of a tenant, as text.
fn derived(policy: &Policy, history: Option<&History>, name: &str) -> Vec<String> {
    let name = tenant(name);
    let derivation = Derivation::of(policy, history, &name);
    assert_eq!(derivation.thresholds, Thresholds::of(policy, history, &name));
    derivation.limits().iter().map(Limit::to_string).collect()
}

#[test]
fn each_limit_says_which_level_of_the_policy_it_is_from() {
    assert_eq!(
        derived(&policy(), None, "acme"),
        [
            "errors.max_rate 0.5 % (tenants.acme 0.5 %)",
            "errors.max_ratio 2 (tiers.gold)",
            "errors.max_increase 0.2pp (tenants.acme)",
            "latency.p99 250 ms (tiers.gold 250 ms)",
            "latency.margin 4 buckets, +18.9 % (tiers.gold 20 %)",
        ]
    );
    assert_eq!(
        derived(&policy(), None, "other"),
        [
            "errors.max_rate 1 % (defaults 1 %)",
            "errors.max_ratio 1.25 (built in)",
            "errors.max_increase 0.1pp (built in)",
            "latency.p99 350 ms (defaults 350 ms)",
            "latency.margin 2 buckets, +9.05 % (built in 10 %)",
        ]
    );
    let unlimited = POLICY.replace("latency: { p99: 350ms }", "required: [errors]");
    let unlimited = Policy::parse(&unlimited).unwrap();
    let other = history(None, &[("other", known(5_000, 0, 90_000))]);
    assert_eq!(
        derived(&unlimited, Some(&other), "other")[3],
        "latency.p99 not limited (no level of the policy sets it)",
        "history never makes a limit where the policy has none"
    );
}

#[test]
fn history_moves_limits_within_the_bounds() {
    let history = history(
        Some(900),
        &[
            ("low", known(5_000, 100_000, 100_000)),
            ("middle", known(5_000, 3_100_000, 240_001)),
            ("high", known(5_000, 30_000_000, 9_000_000)),
            ("few", known(999, 3_100_000, 240_000)),
            (
                "none",
                TenantHistory {
                    rollouts: 0,
                    ..known(5_000, 3_100_000, 240_000)
                },
            ),
            (
                "blank",
                TenantHistory {
                    p99_us: None,
                    error_p90_ppb: None,
                    ..known(5_000, 0, 1)
                },
            ),
        ],
    );
    let policy = policy();
    let of = |name: &str| {
        let limits = derived(&policy, Some(&history), name);
        [limits[0].clone(), limits[3].clone()]
    };
    assert_eq!(
        of("low"),
        [
            "errors.max_rate 0.5 % (defaults 1 %; history 0.01 % x 2, clipped to the floor 0.5x)",
            "latency.p99 175 ms (defaults 350 ms; history 100 ms x 1.25, clipped to the floor 0.5x)",
        ]
    );
    assert_eq!(
        of("middle"),
        [
            "errors.max_rate 0.62 % (defaults 1 %; history 0.31 % x 2)",
            "latency.p99 300 ms (defaults 350 ms; history 240 ms x 1.25)",
        ]
    );
    assert_eq!(
        Thresholds::of(&policy, Some(&history), &tenant("middle")).p99_us,
        Some(300_002),
        "rounded up to whole microseconds"
    );
    assert_eq!(
        of("high"),
        [
            "errors.max_rate 2 % (defaults 1 %; history 3 % x 2, clipped to the ceiling 2x)",
            "latency.p99 700 ms (defaults 350 ms; history 9 s x 1.25, clipped to the ceiling 2x)",
        ]
    );
    for (name, why) in [
        ("nobody", "the history does not know the tenant"),
        ("few", "the history knows too little: 999 requests in 1 rollout"),
        (
            "none",
            "the history knows too little: 5000 requests in 0 rollouts",
        ),
        ("blank", "the history has no error rate of the tenant"),
    ] {
        let max_rate = &of(name)[0];
        assert_eq!(max_rate, &format!("errors.max_rate 1 % (defaults 1 %; {why})"));
        let (with, without) = (
            Thresholds::of(&policy, Some(&history), &tenant(name)),
            Thresholds::of(&policy, None, &tenant(name)),
        );
        assert_eq!(
            Thresholds {
                margin_buckets: without.margin_buckets,
                ..with
            },
            without
        );
    }
    let still = Policy::parse(&POLICY.replace("from_history: true", "from_history: false")).unwrap();
    assert_eq!(
        derived(&still, Some(&history), "high"),
        derived(&still, None, "high")
    );
}

#[test]
fn the_margin_is_widened_for_every_tenant_up_to_the_ceiling() {
    let margin = |difference, name| derived(&policy(), Some(&history(difference, &[])), name)[4].clone();
    assert_eq!(
        margin(Some(900), "other"),
        "latency.margin 3 buckets, +13.9 % (built in 10 %; history: arms differ by 0.9 buckets, x 3 = 3)"
    );
    assert_eq!(
        margin(Some(5_000), "other"),
        "latency.margin 4 buckets, +18.9 % (built in 10 %; history: arms differ by 5 buckets, x 3 = 15, clipped to \
         the ceiling 2x)"
    );
    assert_eq!(
        margin(Some(900), "acme"),
        "latency.margin 4 buckets, +18.9 % (tiers.gold 20 %; history: arms differ by 0.9 buckets, x 3 = 3, not below \
         the policy's margin)"
    );
    assert_eq!(
        margin(None, "other"),
        "latency.margin 2 buckets, +9.05 % (built in 10 %)"
    );
    let widened = Thresholds::default_of(&policy(), Some(&history(Some(900), &[])));
    assert_eq!(widened.margin_buckets, 3);
    assert_eq!(
        Thresholds {
            margin_buckets: 2,
            ..widened
        },
        Thresholds::default_of(&policy(), None)
    );
}

#[test]
fn a_tiny_rate_is_not_shown_as_nothing() {
    assert_eq!(
        [1, 500, 9_999, 10_000, 0].map(rate),
        ["0.001 ppm", "0.5 ppm", "9.999 ppm", "0.001 %", "0 %"]
    );
}

proptest! {
    #[test]
    fn a_limit_stays_between_floor_and_ceiling(
        max_rate_ppm in 1_u64..999_999, p99_us in 1_u64..=128_000_000, margin in 0_u32..=100,
        floor in 1_u64..=1_000, ceiling in 1_000_u64..=100_000,
        requests in 0_u64..3_000, rollouts in 0_u64..3, error_p90_ppb in 0_u64..=1_000_000_000,
        seen_p99_us in 1_u64..=128_000_000, difference in proptest::option::of(0_u64..=431_000),
    ) {
        let text = format!(
            "{{apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout,
              defaults: {{ errors: {{ max_rate: {max_rate_ppm}ppm }}, latency: {{ p99: {p99_us}us, margin: {margin}% }} }},
              adjust: {{ from_history: true, floor: {}x, ceiling: {}x }} }}",
            times(floor), times(ceiling),
        );
        let policy = Policy::parse(&text).unwrap();
        let known = TenantHistory { rollouts, ..known(requests, error_p90_ppb, seen_p99_us) };
        let is_enough = known.is_enough();
        let history = history(difference, &[("acme", known)]);
        let plain = Thresholds::of(&policy, None, &tenant("acme"));
        let moved = Thresholds::of(&policy, Some(&history), &tenant("acme"));
        let within = |value: u64, limit: u64| {
            value * 1_000 >= limit * floor && value * 1_000 <= limit * ceiling
        };
        let (plain_p99, p99) = (plain.p99_us.unwrap(), moved.p99_us.unwrap());
        prop_assert!(within(moved.max_rate_ppb, plain.max_rate_ppb) && moved.max_rate_ppb < 1_000_000_000);
        prop_assert!(within(p99, plain_p99) && (1..=MAX_LATENCY_US).contains(&p99));
        let widest = u64::from(margin) * 10 * ceiling;
        let widest = margin_buckets(u32::try_from(widest).unwrap());
        prop_assert!((plain.margin_buckets..=widest).contains(&moved.margin_buckets));
        prop_assert_eq!(
            (moved.max_ratio_milli, moved.max_increase_ppb),
            (plain.max_ratio_milli, plain.max_increase_ppb)
        );
        if !is_enough {
            prop_assert_eq!((moved.max_rate_ppb, moved.p99_us), (plain.max_rate_ppb, plain.p99_us));
        }
        // A tenant that the history does not know has the policy's limits, and everybody's margin.
        let unknown = Thresholds::of(&policy, Some(&history), &tenant("nobody"));
        prop_assert_eq!(unknown, Thresholds { margin_buckets: moved.margin_buckets, ..plain });
        prop_assert_eq!(unknown, Thresholds::default_of(&policy, Some(&history)));
    }
}
