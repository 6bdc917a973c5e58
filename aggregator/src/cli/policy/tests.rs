//! Learning from a log, and the difference between two policies.

use std::{collections::BTreeMap, sync::Arc};

use coalmine_judge::{
    chain::Hash,
    record::{Body, Decision, Finding, RolloutEnd, RolloutStart},
};
use serde_json::Value;

use super::{
    diff::{Change, Changes, compare},
    learn::learn_from,
    *,
};
use crate::{
    ledger::{Blob, Ledger, LedgerFiles, Options},
    metrics::Metrics,
};

const POLICY: &str = "{ apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout,
    defaults: { errors: { max_rate: 1% }, latency: { p99: 350ms } },
    rollout: { warm_up: 10s },
    adjust: { from_history: true, floor: 0.5x, ceiling: 2x } }";

fn decision(rollout: &str, window: u64, verdict: &str, blob: &Blob, policy: &Blob) -> Body {
    Body::Decision(Box::new(Decision {
        id: format!("{rollout}-{window}"),
        execution_id: "canary".into(),
        task: "canary".into(),
        rollout: rollout.into(),
        service: "checkout".into(),
        canary_version: "v2".into(),
        finding: Finding {
            window,
            verdict: verdict.into(),
            score_ppm: 1_000_000,
            confidence_ppm: None,
            reason: String::new(),
            missing: Vec::new(),
            worst: None,
            worst_tenant: None,
            anomalies: Vec::new(),
            anomalies_detected: 0,
            traffic_ppm: 0,
            tenants_ppm: 0,
            agents_ppm: 0,
            tenants_checked: 0,
            outcome: Hash::ZERO,
        },
        evidence: blob.digest,
        manifest: blob.digest,
        snapshot: None,
        policy: policy.digest,
        judge: "judge".into(),
        build: "test".into(),
        late: false,
        steps: Vec::new(),
    }))
}

/// A window of 10 s in which the baseline had 1,000 requests of one tenant and so many errors.
fn window(number: u64, errors: u64, reported: u32) -> String {
    format!(
        r#"{{"v":1,"window":{number},"start_ms":{},"len_ms":10000,"coverage":{{"canary":{{"expected":2,"reported":{reported}}},"baseline":{{"expected":2,"reported":2}}}},"rows":[{{"tenant":"acme","arm":"baseline","requests":1000,"errors":{errors}}}]}}"#,
        (number - 1) * 10_000
    )
}

/// A log with one rollout for each list of verdicts; window 1 is warm-up, and window 4 misses an agent.
async fn log(data: &Path, rollouts: &[(&str, &str, &[&str])]) -> LedgerFiles {
    let options = Options {
        name: "test".into(),
        ..Options::default()
    };
    let opened = Ledger::open(data, options, Arc::new(Metrics::new()), |_, _| {});
    let ledger = opened.unwrap().ledger;
    let policy = Blob::pack(POLICY.as_bytes()).unwrap();
    for (rollout, service, verdicts) in rollouts {
        let start = RolloutStart {
            rollout: (*rollout).into(),
            key: (*rollout).into(),
            service: (*service).into(),
            canary_version: "v2".into(),
            baseline_version: None,
            policy: policy.digest,
            history: None,
            judge: "judge".into(),
            max_windows: 10,
            window_ms: 10_000,
            start_ms: 0,
            actor: "test".into(),
            workload: None,
        };
        ledger
            .append(Body::Rollout(start), vec![policy.clone()])
            .await
            .unwrap();
        for (number, verdict) in (1..).zip(*verdicts) {
            let (errors, reported) = match number {
                1 => (1_000, 2),
                4 => (900, 1),
                _ => (2, 2),
            };
            let evidence = Blob::pack(window(number, errors, reported).as_bytes()).unwrap();
            let body = decision(rollout, number, verdict, &evidence, &policy);
            ledger.append(body, vec![evidence]).await.unwrap();
        }
        let end = RolloutEnd {
            rollout: (*rollout).into(),
            actor: "test".into(),
            reason: "done".into(),
            verdict: "HOLD".into(),
        };
        ledger.append(Body::End(end), Vec::new()).await.unwrap();
    }
    LedgerFiles::new(data)
}

fn refusal(files: &LedgerFiles, service: Option<&str>) -> (Exit, String) {
    match learn_from(files, service) {
        Ok(lesson) => panic!("learned {:?}", lesson.history),
        Err(failure) => (failure.exit, failure.message),
    }
}

#[tokio::test]
async fn a_history_is_learned_from_approved_rollouts() {
    let data = tempfile::tempdir().unwrap();
    let files = log(
        data.path(),
        &[
            ("a", "checkout", &["HOLD", "HOLD", "APPROVE", "HOLD", "APPROVE"]),
            ("b", "checkout", &["HOLD", "APPROVE", "ROLLBACK"]),
            ("c", "checkout", &[]),
            ("d", "checkout", &["APPROVE"]),
        ],
    )
    .await;
    let lesson = learn_from(&files, None).unwrap();
    let history = lesson.history;
    assert_eq!((history.rollouts, history.windows), (1, 3));
    assert_eq!((lesson.skipped, lesson.warm_up), (1, 2));
    assert_eq!(
        lesson.ignored,
        [
            "b: its last verdict is ROLLBACK",
            "c: it has no decision",
            "d: it was approved, but no window of it can be used: 1 in the warm-up, 0 miss an agent",
        ]
    );
    let acme = history.tenants.get("acme").unwrap();
    assert_eq!((acme.requests, acme.error_p90_ppb), (3_000, Some(2_000_000)));
    // The source is the record of the last decision.
    let mut leaves = BTreeMap::new();
    files
        .scan(|record, leaf, _| {
            if let Body::Decision(decision) = record.body {
                leaves.insert(decision.id, leaf);
            }
        })
        .unwrap();
    assert_eq!(history.sources, [leaves["a-5"]]);

    let file = data.path().join("history.json");
    assert_eq!(
        learn::run(data.path(), Some("checkout"), Some(&file)).unwrap(),
        Exit::Good
    );
    assert_eq!(read_history(&file).unwrap(), history);
}

#[tokio::test]
async fn without_an_approved_rollout_nothing_is_learned() {
    let data = tempfile::tempdir().unwrap();
    let files = log(
        data.path(),
        &[("a", "checkout", &["ROLLBACK"]), ("b", "cart", &["HOLD"])],
    )
    .await;
    for (service, says) in [
        (
            Some("checkout"),
            "no approved rollout of checkout to learn from: ignored a: its last verdict is ROLLBACK",
        ),
        (None, "choose one with --service: cart, checkout"),
        (
            Some("shop"),
            "no rollout of service \"shop\" (it has some of: cart, checkout)",
        ),
    ] {
        let (exit, message) = refusal(&files, service);
        assert!(exit == Exit::Usage && message.contains(says), "{message}");
    }
    let empty = tempfile::tempdir().unwrap();
    let error = learn::run(empty.path(), None, None).unwrap_err();
    assert!(error.message.contains("there is no decision log in"), "{error}");
    let files = log(empty.path(), &[]).await;
    assert!(refusal(&files, None).1.contains("no rollout to learn from"));
}

#[tokio::test]
async fn evidence_that_was_changed_is_not_learned_from() {
    let data = tempfile::tempdir().unwrap();
    let files = log(data.path(), &[("a", "checkout", &["HOLD", "APPROVE"])]).await;
    let evidence = Blob::pack(window(2, 2, 2).as_bytes()).unwrap();
    let path = files.blobs.path(&evidence.digest);
    std::fs::write(&path, b"something else").unwrap();
    let (exit, message) = refusal(&files, None);
    assert_eq!(exit, Exit::Bad);
    assert!(
        message.contains("a-2: its evidence") && message.contains("was changed"),
        "{message}"
    );
    std::fs::remove_file(&path).unwrap();
    assert!(refusal(&files, None).1.contains("cannot be read"));
}

fn side(policy: &str, history: Option<&str>) -> Side {
    Side {
        policy: Policy::parse(policy).unwrap(),
        history: history.map(|text| History::parse(text).unwrap()),
    }
}

const HISTORY: &str = r#"{"v":1,"service":"checkout","rollouts":1,"windows":9,"first_ms":0,"last_ms":1,"sources":[],
    "arm_difference_tenants":0,"tenants":{"acme":{"requests":5000,"windows":9,"rollouts":1,"error_p90_ppb":3100000},
    "few":{"requests":9,"windows":9,"rollouts":1}}}"#;

#[test]
fn a_difference_says_whose_limits_change_and_why() {
    let changes = |old: &Side, new: &Side| {
        let Changes {
            changes,
            tenants,
            tenants_changed,
        } = compare(old, new);
        let shown = |change: Change| {
            let from = change.from.unwrap_or_default();
            [&change.who, change.limit, &change.old, &change.new, &from].join("|")
        };
        let shown: Vec<String> = changes.into_iter().map(shown).collect();
        (shown, tenants, tenants_changed)
    };
    let plain = || side(POLICY, None);
    assert_eq!(changes(&plain(), &plain()), (Vec::new(), 0, 0));
    assert_eq!(
        changes(&plain(), &side(POLICY, Some(HISTORY))),
        (
            vec!["acme|errors.max_rate|1 %|0.62 %|defaults 1 %; history 0.31 % x 2".to_owned()],
            2,
            1
        )
    );
    let other = POLICY
        .replace("p99: 350ms", "p99: 300ms, margin: 20%")
        .replace("rollout: {", "tiers: { gold: {} }, tenants: { beta: { tier: gold, latency: { p99: 350ms } } }, rollout: { alpha: 2%,");
    let (shown, tenants, changed) = changes(&plain(), &side(&other, None));
    assert_eq!(
        shown,
        [
            "(rollout)|rollout.alpha|1 %|2 %|",
            "(rollout)|tiers|[]|[gold]|",
            "(default)|latency.p99|350 ms|300 ms|defaults 300 ms",
            "(default)|latency.margin|2 buckets, +9.05 %|4 buckets, +18.9 %|defaults 20 %",
            "beta|latency.margin|2 buckets, +9.05 %|4 buckets, +18.9 %|defaults 20 %",
            "beta|cohorts|[]|[tier:gold]|",
        ]
    );
    assert_eq!((tenants, changed), (1, 1));
    let change: Value = serde_json::to_value(&compare(&plain(), &side(&other, None)).changes[2]).unwrap();
    assert_eq!(change["who"], "(default)");
    assert_eq!(change["raw"], serde_json::json!([350_000, 300_000]));
    let foreign = side(&POLICY.replace("checkout", "cart"), None);
    let error = diff::run(&plain(), &foreign, Output::Table).unwrap_err();
    assert!(
        error.message.contains("two services, checkout and cart"),
        "{error}"
    );
}

#[test]
fn a_history_belongs_to_the_policy_of_its_service() {
    let directory = tempfile::tempdir().unwrap();
    let [policy, history] = ["sla.yaml", "history.json"].map(|name| directory.path().join(name));
    std::fs::write(&policy, POLICY).unwrap();
    std::fs::write(&history, HISTORY).unwrap();
    assert_eq!(
        validate(&policy, Some(&history), Output::Table).unwrap(),
        Exit::Good
    );
    for (content, says) in [
        (
            HISTORY.replace("checkout", "cart"),
            "it is the history of service cart, and the policy is for checkout",
        ),
        (HISTORY.replace("\"v\":1", "\"v\":7"), "version 7 is not known"),
        ("{}".to_owned(), "missing field"),
    ] {
        std::fs::write(&history, content).unwrap();
        let error = validate(&policy, Some(&history), Output::Json).unwrap_err();
        assert_eq!(error.exit, Exit::Usage);
        assert!(
            error.message.contains(says) && error.message.contains("history.json"),
            "{error}"
        );
    }
    std::fs::remove_file(&history).unwrap();
    let error = validate(&policy, Some(&history), Output::Table).unwrap_err();
    assert!(error.message.contains("cannot read the history"), "{error}");
}
