//! What gates read of rollouts that match.

use proptest::prelude::*;

use super::*;
use crate::faces::prometheus::expression::parse_selector;

/// A rollout of checkout, held since its second window.
fn held<'a>(id: &'a str, version: &'a str) -> Reading<'a> {
    Reading {
        labels: [id, "checkout", version, "shop", "checkout", "checkout", "running"],
        verdict: Verdict::Hold,
        score_ppm: 990_000,
        agents_ppm: 1_000_000,
        traffic_ppm: 500_000,
        tenants_in_breach: 0,
        tenants: BTreeMap::new(),
        decision: Some("dec-2"),
        worst_tenant: None,
        reason: "12 tenants are not proven yet",
        is_over: false,
        decided_ms: 2_000,
    }
}

fn rolled_back<'a>(id: &'a str, version: &'a str) -> Reading<'a> {
    Reading {
        labels: [id, "checkout", version, "shop", "checkout", "checkout", "halted"],
        verdict: Verdict::Rollback,
        score_ppm: 400_000,
        tenants_in_breach: 1,
        tenants: BTreeMap::from([("acme", 400_000), ("bolt", 970_000)]),
        worst_tenant: Some("acme"),
        reason: "tenant acme is in breach",
        decided_ms: 9_000,
        ..held(id, version)
    }
}

fn selected<'a>(source: &str, readings: &[Reading<'a>]) -> Option<Selected<'a>> {
    let selector = parse_selector(source).unwrap();
    select(selector.name().unwrap(), &selector, readings)
}

/// The one number that a gate reads.
fn value(source: &str, readings: &[Reading<'_>]) -> f64 {
    let found = selected(source, readings).unwrap_or_else(|| panic!("{source} has no rollout"));
    let [sample] = found.samples.as_slice() else {
        panic!("{source}: {found:?}")
    };
    assert!(sample.value.is_finite(), "{source}");
    assert!(!found.warnings.is_empty(), "{source}");
    sample.value
}

#[test]
fn each_verdict_is_a_number_under_each_name() {
    let approved = Reading {
        verdict: Verdict::Approve,
        score_ppm: 1_000_000,
        ..held("r", "v2")
    };
    for (reading, score, verdict, is_approved, is_rollback) in [
        (approved, 1.0, 1.0, 1.0, 0.0),
        (held("r", "v2"), 0.99, 0.0, 0.0, 0.0),
        (rolled_back("r", "v2"), 0.4, -1.0, 0.0, 1.0),
    ] {
        let readings = [reading];
        for (name, wanted) in [
            ("coalmine_health_score", score),
            ("canary_health_score", score),
            ("coalmine_rollout_health_score_ratio", score),
            ("coalmine_verdict", verdict),
            ("coalmine_approved", is_approved),
            ("coalmine_rollback", is_rollback),
            ("coalmine_coverage_agents", 1.0),
            ("coalmine_coverage_traffic", 0.5),
        ] {
            assert_eq!(value(name, &readings), wanted, "{name}");
        }
    }
    assert_eq!(
        value("coalmine_tenants_in_breach", &[rolled_back("r", "v2")]),
        1.0
    );
}

#[test]
fn a_rollout_is_found_by_each_of_its_labels() {
    let readings = [held("r", "v2")];
    for matchers in [
        "",
        "rollout=\"r\"",
        "service=\"checkout\"",
        "version=\"v2\"",
        "namespace=\"shop\",canary=\"checkout\"",
        "workload=\"checkout\"",
        "canary=~\"check.*\",version!=\"v1\",rollout!~\"x|y\"",
        "tenant=\"\"",
        "state=\"running\"",
        "state!=\"ended\"",
    ] {
        value(&format!("coalmine_approved{{{matchers}}}"), &readings);
    }
    for matchers in [
        "rollout=\"other\"",
        "canary=\"checkout\",namespace=\"other\"",
        "tenant=\"acme\"",
        "namespace=\"\"",
        "state=\"ended\"",
        "state!~\"running|halted\"",
    ] {
        let source = format!("coalmine_approved{{{matchers}}}");
        assert!(selected(&source, &readings).is_none(), "{source}");
    }
    let mut unnamed = held("r", "v2");
    for place in 3..6 {
        unnamed.labels[place] = "";
    }
    let found = selected("coalmine_approved{namespace=\"\"}", &[unnamed]).unwrap();
    let labels: Vec<_> = found.samples[0].labels.keys().copied().collect();
    assert_eq!(labels, [NAME, "rollout", "service", "state", "version"]);
}

#[test]
fn several_rollouts_are_one_series_that_shows_the_worst() {
    let readings = [
        Reading {
            score_ppm: 100_000,
            traffic_ppm: 1,
            ..held("r-1", "v2")
        },
        rolled_back("r-2", "v3"),
        held("r-3", "v2"),
    ];
    assert_eq!(value("coalmine_verdict", &readings), -1.0);
    assert_eq!(value("coalmine_health_score", &readings), 0.1);
    assert_eq!(value("coalmine_coverage_traffic", &readings), 0.5);
    let found = selected("coalmine_verdict", &readings).unwrap();
    assert_eq!(
        found.samples[0].labels,
        BTreeMap::from([
            (NAME, "coalmine_verdict"),
            ("service", "checkout"),
            ("namespace", "shop"),
            ("canary", "checkout"),
            ("workload", "checkout"),
        ])
    );
    assert_eq!(found.samples[0].from_ms, 9_000);
    assert_eq!(
        found.warnings,
        [
            "ROLLBACK (dec-2): tenant acme is in breach; look at tenant acme first",
            "3 rollouts match, of which this is the worst: r-1, r-2, r-3",
        ]
    );
    // Of equals, the lower score.
    assert_eq!(
        value("coalmine_coverage_traffic{version=\"v2\"}", &readings),
        1e-6
    );
}

#[test]
fn a_warning_names_the_decision_or_the_rollout_and_says_that_it_is_over() {
    let over = Reading {
        decision: None,
        is_over: true,
        ..held("r", "v2")
    };
    assert_eq!(
        selected("coalmine_approved", &[over]).unwrap().warnings,
        ["HOLD (r): 12 tenants are not proven yet; this rollout is ended"]
    );
}

#[test]
fn tenants_are_series_of_another_name() {
    let readings = [rolled_back("r-1", "v2"), held("r-2", "v2")];
    let found = selected("coalmine_tenant_score", &readings).unwrap();
    let values: Vec<_> = found
        .samples
        .iter()
        .map(|sample| (sample.labels[TENANT], sample.value))
        .collect();
    assert_eq!(values, [("acme", 0.4), ("bolt", 0.97)]);
    let one = selected(
        "coalmine_tenant_score{tenant=\"bolt\",rollout=\"r-1\"}",
        &readings,
    )
    .unwrap();
    assert_eq!(one.samples.len(), 1);
    let none = selected("coalmine_tenant_score{rollout=\"r-2\"}", &readings).unwrap();
    assert!(none.samples.is_empty());
    assert!(selected("coalmine_tenant_score", &[]).unwrap().samples.is_empty());
}

#[test]
fn the_lowest_score_of_a_tenant_counts_and_fleet_and_cohorts_do_not() {
    let anomaly = |unit: &str, state: UnitState, score_ppm| Anomaly {
        unit: unit.to_owned(),
        metric: "errors".to_owned(),
        state: state.as_str().to_owned(),
        severity: String::new(),
        detail: String::new(),
        limits: String::new(),
        bits_q32: 0,
        budget_q32: 0,
        score_ppm,
    };
    let anomalies = [
        anomaly("fleet", UnitState::Breach, 1),
        anomaly("tenant:acme", UnitState::Suspect, 600_000),
        anomaly("tenant:acme", UnitState::Breach, 900_000),
        anomaly("tenant:acme", UnitState::Breach, 950_000),
        anomaly("cohort:tier=gold", UnitState::Breach, 2),
        anomaly("tenant:bolt", UnitState::Suspect, 800_000),
    ];
    let (scores, in_breach) = tenants(&anomalies);
    assert_eq!(scores, BTreeMap::from([("acme", 600_000), ("bolt", 800_000)]));
    assert_eq!(in_breach, 1);
}

#[test]
fn all_series_are_listed_with_their_labels() {
    let readings = [rolled_back("r-1", "v2"), held("r-2", "v2")];
    assert_eq!(listed(None, &readings).len(), 2 * GATES.len() + 2);
    let of = |source: &str| listed(Some(&parse_selector(source).unwrap()), &readings);
    assert_eq!(of("{rollout=\"r-2\"}").len(), GATES.len());
    assert_eq!(of("{__name__=~\".*_score\",rollout=\"r-1\"}").len(), 4);
    assert!(of("up").is_empty());
}

#[test]
fn names_are_unique_and_described() {
    let names: BTreeMap<_, _> = GATES.iter().map(|gate| (gate.name, gate.help)).collect();
    assert_eq!(names.len(), GATES.len());
    assert!(names.values().all(|help| !help.is_empty()));
    assert!(!names.contains_key(TENANT_SCORE));
    assert!(is_known(TENANT_SCORE) && is_known("canary_health_score") && !is_known("up"));
}

fn any_reading() -> impl Strategy<Value = Reading<'static>> {
    let verdict = prop::sample::select(Verdict::ALL.to_vec());
    let id = prop::sample::select(vec!["r-1", "r-2", "r-3"]);
    (verdict, id, 0..=1_000_000_u32).prop_map(|(verdict, id, score_ppm)| Reading {
        verdict,
        score_ppm,
        ..held(id, "v2")
    })
}

proptest! {
    /// Whatever rollouts there are, a gate reads one finite number, or is told that there is none.
    #[test]
    fn a_gate_reads_one_number(readings in prop::collection::vec(any_reading(), 0..6)) {
        for gate in &GATES {
            let found = selected(gate.name, &readings);
            prop_assert_eq!(found.is_none(), readings.is_empty());
            if found.is_some() {
                let value = value(gate.name, &readings);
                prop_assert!((-1.0..=1.0).contains(&value));
            }
        }
        if !readings.is_empty() {
            let all = |verdict| readings.iter().all(|reading| reading.verdict == verdict);
            let any = |verdict| readings.iter().any(|reading| reading.verdict == verdict);
            prop_assert_eq!(value("coalmine_approved", &readings) == 1.0, all(Verdict::Approve));
            prop_assert_eq!(value("coalmine_rollback", &readings) == 1.0, any(Verdict::Rollback));
        }
    }
}
