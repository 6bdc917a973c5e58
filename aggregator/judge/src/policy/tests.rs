//! Policies that are read, and those that are refused.

use super::*;
use crate::threshold::Thresholds;

/// The example of the module's documentation.
const EXAMPLE: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors:  { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms, margin: 10% }
  pool:    { max_wait_rate: 1%, max_increase: 1pp, max_ratio: 1.25 }
  hold_deadline: 30m
  on_deadline: rollback
  required: [errors, latency]
  judge_window: 10s
tiers:
  gold: { latency: { p99: 250ms } }
tenants:
  acme-corp: { tier: gold, labels: { region: eu }, errors: { max_rate: 0.5% } }
rollout:
  alpha: 1%
  rollback_threshold: 0.95
  warm_up: 30s
  min_coverage: { traffic: 90%, agents: 90%, tenants: 0% }
  cohorts: [tier, region, tail]
  critical: [acme-corp]
adjust: { from_history: true, floor: 0.5x, ceiling: 2x }
tenant_rules: [\"header:x-tenant-id\", \"path:/t/{tenant}/\"]
";

/// The shortest policy that is valid.
const SHORT: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults: { errors: { max_rate: 1% }, required: [errors] }
";

fn tenant(name: &str) -> TenantName {
    TenantName::parse(name.as_bytes()).unwrap()
}

#[test]
fn the_example_is_read() {
    let policy = Policy::parse(EXAMPLE).unwrap();
    assert_eq!((policy.window_ms(), policy.planned_windows()), (10_000, 180));
    let acme = Thresholds::of(&policy, None, &tenant("acme-corp"));
    assert_eq!(
        (acme.max_rate_ppb, acme.p99_us, acme.max_ratio_milli),
        (5_000_000, Some(250_000), 1_250)
    );
    let other = Thresholds::default_of(&policy, None);
    assert_eq!((other.max_rate_ppb, other.p99_us), (10_000_000, Some(350_000)));
    assert_eq!(other.margin_buckets, 2);
    assert_eq!(policy.rollout.critical().count(), 1);
    assert_eq!(policy.rollout.warm_up_us(), 30_000_000);
    assert_eq!(policy.rollout.min_coverage.tenants.ppm, 0);
    assert_eq!(policy.defaults.on_deadline, OnDeadline::Rollback);
    assert_eq!(
        policy.notes(None),
        [
            "latency.margin 10 % is judged as 2 buckets, +9.05 %",
            "adjust.from_history: limits follow a history only where one is given with --history",
            "hold_deadline 30m: a rollout is planned for 180 windows of 10s; a HOLD that lasts so long ends in ROLLBACK",
        ]
    );
}

#[test]
fn the_documentation_shows_the_example() {
    let documented: String = include_str!("../policy.rs")
        .lines()
        .skip_while(|line| *line != "//! ```yaml")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| format!("{}\n", line.strip_prefix("//! ").unwrap()))
        .collect();
    assert_eq!(documented, EXAMPLE);
}

#[test]
fn what_is_left_out_has_its_default() {
    let policy = Policy::parse(SHORT).unwrap();
    assert_eq!(policy.defaults.on_deadline, OnDeadline::Rollback);
    assert!(policy.defaults.pool.is_none() && policy.rollout.warm_up.is_none());
    assert_eq!(policy.rollout.cohorts().collect::<Vec<_>>(), ["tier", "tail"]);
    assert_eq!(policy.rollout.min_coverage.tenants.ppm, 0);
    assert!(policy.has_tail() && policy.cohorts().is_empty());
    assert_eq!(
        policy.notes(None)[0],
        "latency.margin 10 % is judged as 2 buckets, +9.05 %"
    );
    let with = |more: &str| Policy::parse(&SHORT.replace("required: [errors]", more)).unwrap();
    let pool = with("required: [errors, pool], pool: { max_wait_rate: 2% }");
    assert_eq!(pool.defaults.required, [Requirement::Errors, Requirement::Pool]);
    let limits = pool.defaults.pool.unwrap();
    assert_eq!(
        (
            limits.max_wait_rate.ppb,
            limits.max_increase.ppb,
            limits.max_ratio.milli
        ),
        (20_000_000, 10_000_000, 1_250)
    );
    for (word, on_deadline, note) in [
        ("hold", OnDeadline::Hold, "stays a HOLD"),
        (
            "approve",
            OnDeadline::Approve,
            "only proof or coverage is missing",
        ),
        ("rollback", OnDeadline::Rollback, "ends in ROLLBACK"),
    ] {
        let policy = with(&format!("required: [errors], on_deadline: {word}"));
        assert_eq!(
            (policy.defaults.on_deadline, on_deadline.as_str()),
            (on_deadline, word)
        );
        assert!(policy.notes(None).last().unwrap().contains(note));
    }
}

#[test]
fn cohorts_come_from_tiers_and_labels() {
    let text = EXAMPLE.replace(
        "rollout:\n",
        "  b: { labels: { region: us, team: x } }\n  c: { tier: gold, labels: { team: y } }\nrollout:\n",
    );
    let policy = Policy::parse(&text).unwrap();
    assert_eq!(
        policy.cohorts_of(&tenant("acme-corp")),
        ["tier:gold", "region:eu"]
    );
    assert_eq!(policy.cohorts_of(&tenant("b")), ["region:us"]);
    assert!(policy.cohorts_of(&tenant("nobody")).is_empty());
    assert_eq!(policy.cohorts(), ["region:eu", "region:us", "tier:gold"]);
    assert!(policy.has_tail());

    let turned = Policy::parse(&text.replace("[tier, region, tail]", "[team, tier]")).unwrap();
    assert_eq!(turned.cohorts_of(&tenant("c")), ["team:y", "tier:gold"]);
    assert!(!turned.has_tail());
    let none = Policy::parse(&text.replace("[tier, region, tail]", "[]")).unwrap();
    assert!(none.cohorts().is_empty() && !none.has_tail());
}

#[test]
fn a_mistake_is_named_with_its_place() {
    for (from, to, place, hint) in [
        ("judge_window: 10s", "judge_windw: 10s", (11, 3), "judge_windw"),
        ("max_rate: 1%", "max_rate: -1%", (5, 24), "negative"),
        ("max_rate: 1%", "max_rate: 1", (5, 24), "like 1% or 500ppm"),
        ("p99: 350ms", "p99: 350", (6, 19), "350ms"),
        ("p99: 350ms, ", "", (10, 3), "defaults.latency.p99 is missing"),
        ("coalmine.dev/v1", "coalmine.dev/v2", (1, 13), "coalmine.dev/v2"),
        ("tier: gold", "tier: golden", (15, 3), "(there are: gold)"),
        ("max_rate: 1%, ", "", (4, 1), "max_rate is missing"),
        (
            "judge_window: 10s",
            "judge_window: 10ms",
            (11, 3),
            "from 1s to 10m",
        ),
        ("alpha: 1%", "alpha: 60%", (17, 3), "at most 50%"),
        (
            "critical: [acme-corp]",
            "critical: [\"a b\"]",
            (22, 14),
            "character ' '",
        ),
        ("floor: 0.5x", "floor: 2x", (23, 1), "at most 1x"),
        (
            "hold_deadline: 30m",
            "hold_deadline: 30m\n  hold_deadline: 31m",
            (9, 3),
            "duplicate",
        ),
        (
            "on_deadline: rollback",
            "on_deadline: wait",
            (9, 16),
            "unknown variant `wait`",
        ),
        (
            "max_wait_rate: 1%, ",
            "",
            (7, 33),
            "missing field `max_wait_rate`",
        ),
        ("max_increase: 1pp", "max_increase: 1%", (7, 47), "like 0.1pp"),
        ("[errors, latency]", "[errors, probes]", (10, 22), "probes"),
        ("warm_up: 30s", "warm_up: 16m", (19, 3), "half of hold_deadline"),
        ("warm_up: 30s", "warm_up: 30", (19, 12), "like 350ms"),
        ("tenants: 0%", "tenants: 101%", (20, 55), "from 0% to 100%"),
        ("margin: 10%", "margin: 101%", (6, 34), "from 0% to 100%"),
        (
            "[tier, region, tail]",
            "[tier, zone, tail]",
            (21, 19),
            "\"zone\" in rollout.cohorts is a label that no tenant has",
        ),
        (
            "[tier, region, tail]",
            "[tier, region, tier]",
            (21, 13),
            "stands twice",
        ),
        (
            "[tier, region, tail]",
            "[tier, \"a b\"]",
            (21, 19),
            "character ' '",
        ),
        ("region: eu", "region: \"e u\"", (15, 46), "character ' '"),
        ("region: eu", "\"re gion\": eu", (15, 38), "character ' '"),
        (
            "region: eu",
            "tail: eu",
            (15, 38),
            "a label cannot be named \"tail\"",
        ),
        ("  gold:", "  \"go ld\":", (13, 3), "character ' '"),
        (
            "header:x-tenant-id",
            "cookie:x-tenant-id",
            (24, 16),
            "\"cookie:x-tenant-id\" is not a rule; say header:NAME",
        ),
        ("/{tenant}/", "/{tenant}x/", (24, 38), "must be a whole segment"),
        (
            "header:x-tenant-id",
            "fixed:acme",
            (24, 1),
            "in tenant_rules, no rule can follow fixed:acme",
        ),
    ] {
        let text = EXAMPLE.replacen(from, to, 1);
        assert_ne!(text, EXAMPLE, "{from}");
        let error = Policy::parse(&text).unwrap_err();
        assert!(error.message.contains(hint), "{error} does not say {hint:?}");
        assert_eq!((error.line, error.column), place, "{error}");
    }
    let no_pool = SHORT.replace("[errors]", "[errors, pool]");
    let error = Policy::parse(&no_pool).unwrap_err();
    assert!(error.message.contains("defaults.pool is missing"), "{error}");
    assert_eq!((error.line, error.column), (4, 39));
    let long = EXAMPLE.replace("acme-corp:", &format!("{}:", "x".repeat(200)));
    let error = Policy::parse(&long).unwrap_err();
    assert!(
        error.message.contains("200 bytes long") && error.line == 15,
        "{error}"
    );
}

#[test]
fn rules_for_tenants_are_read_and_change_nothing_that_is_judged() {
    let shown = |text: &str| -> Vec<String> {
        let rules = Policy::parse(text).unwrap().tenant_rules;
        rules.iter().map(ToString::to_string).collect()
    };
    assert_eq!(shown(EXAMPLE), ["header:x-tenant-id", "path:/t/{tenant}/"]);
    assert!(shown(SHORT).is_empty());
    let block = format!("{SHORT}tenant_rules:\n  - header:X-Tenant|lower\n  - 'jwt:org.id|regex=(a|b).*'\n");
    assert_eq!(
        shown(&block),
        ["header:x-tenant|lower", "jwt:org.id|regex=(a|b).*"]
    );
    let [with, without] = [block.as_str(), SHORT].map(|text| Policy::parse(text).unwrap());
    assert_eq!(
        Thresholds::default_of(&with, None),
        Thresholds::default_of(&without, None)
    );
    assert_eq!(with.notes(None), without.notes(None));
}

#[test]
fn too_many_cohorts_are_refused() {
    let tenants: String = (0..=MAX_COHORTS)
        .map(|i| format!("  t{i}: {{ labels: {{ id: v{i} }} }}\n"))
        .collect();
    let text = format!("{SHORT}tenants:\n{tenants}rollout: {{ cohorts: [id] }}\n");
    let error = Policy::parse(&text).unwrap_err();
    assert!(error.message.contains("1001 cohorts; at most 1000"), "{error}");
    assert!(Policy::parse(&text.replace("cohorts: [id]", "cohorts: [tail]")).is_ok());
}
