//! Pods as the API server writes them, and what followers may tell.

use coalmine_proto::names::Arm;
use serde_json::{Value, json};

use super::*;
use crate::inject::Setting;

/// A pod of a Deployment as a cluster has it, ready, with an agent; and then what is merged into it (RFC 7396).
fn pod(changes: &Value) -> Pod {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "checkout-canary-7d9f-x2v",
            "namespace": "shop",
            "uid": "u1",
            "creationTimestamp": "2026-11-01T10:00:00Z",
            "labels": {
                "app.kubernetes.io/name": "checkout",
                "app.kubernetes.io/version": "v2",
                "coalmine.dev/arm": "canary",
                "pod-template-hash": "7d9f",
            },
            "ownerReferences": [
                { "apiVersion": "v1", "kind": "Thing", "name": "other", "uid": "o0" },
                {
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "checkout-canary-7d9f", "uid": "o1",
                    "controller": true,
                },
            ],
        },
        "spec": {
            "initContainers": [{ "name": "coalmine-agent" }],
            "containers": [{ "name": "app" }],
        },
        "status": {
            "phase": "Running",
            "startTime": "2026-11-01T10:00:01Z",
            "conditions": [
                { "type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-01T10:00:00Z" },
                { "type": "Ready", "status": "True", "lastTransitionTime": "2026-11-01T10:00:30Z" },
            ],
            "containerStatuses": [{
                "name": "app", "image": "app", "imageID": "", "ready": true, "restartCount": 0,
                "state": { "running": { "startedAt": "2026-11-01T10:00:10Z" } },
            }],
        },
    });
    merge(&mut pod, changes);
    serde_json::from_value(pod).unwrap()
}

fn merge(into: &mut Value, changes: &Value) {
    let Some(changes) = changes.as_object() else {
        *into = changes.clone();
        return;
    };
    for (key, change) in changes {
        if change.is_null() {
            into.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut into[key], change);
        }
    }
}

fn found(changes: &Value) -> Found {
    read::read(&pod(changes)).unwrap().unwrap()
}

fn labelled(labels: &Value) -> Value {
    json!({ "metadata": { "labels": labels } })
}

fn annotated(annotations: &Value) -> Value {
    json!({ "metadata": { "annotations": annotations } })
}

/// Milliseconds of a second of 10:00 on that day.
fn at(second: u64) -> u64 {
    1_793_527_200_000 + second * 1_000
}

/// The condition Ready, false since a second.
fn not_ready(second: u64) -> Value {
    let time = format!("2026-11-01T10:00:{second:02}Z");
    json!([{ "type": "Ready", "status": "False", "lastTransitionTime": time }])
}

#[test]
fn a_pod_is_read() {
    let expected = Found {
        service: "checkout".to_owned(),
        uid: "u1".to_owned(),
        pod: RosterPod {
            namespace: "shop".to_owned(),
            name: "checkout-canary-7d9f-x2v".to_owned(),
            build: Build {
                arm: Arm::Canary,
                version: "v2".to_owned(),
            },
            has_agent: true,
            since_ms: at(30),
            created_ms: at(0),
            workload: Some(Workload {
                kind: "Deployment".to_owned(),
                namespace: "shop".to_owned(),
                name: "checkout-canary".to_owned(),
            }),
            starts_rollout: false,
        },
    };
    assert_eq!(found(&json!({})), expected);
}

#[test]
fn a_pod_counts_while_requests_may_reach_it() {
    let no_agent = json!([]);
    let agent = json!([{ "name": "coalmine-agent" }]);
    for (what, agents, status, counts) in [
        ("ready", &agent, json!({}), true),
        ("about to run", &agent, json!({ "phase": "Pending" }), false),
        ("about to run", &no_agent, json!({ "phase": "Pending" }), false),
        ("done", &no_agent, json!({ "phase": "Succeeded" }), false),
        ("failed", &no_agent, json!({ "phase": "Failed" }), false),
        ("without a status", &no_agent, json!({ "phase": null }), false),
        (
            "never ready yet",
            &agent,
            json!({ "conditions": not_ready(1) }),
            false,
        ),
        (
            "never ready yet",
            &agent,
            json!({ "conditions": not_ready(2) }),
            false,
        ),
        (
            "never ready yet",
            &no_agent,
            json!({ "conditions": not_ready(1) }),
            true,
        ),
        (
            "ready no more",
            &agent,
            json!({ "conditions": not_ready(40) }),
            true,
        ),
        ("nobody says", &agent, json!({ "conditions": null }), true),
        (
            "nobody says since when",
            &agent,
            json!({ "conditions": not_ready(1), "startTime": null }),
            true,
        ),
    ] {
        let pod = pod(&json!({ "spec": { "initContainers": agents }, "status": status }));
        let found = read::read(&pod).unwrap();
        assert_eq!(found.is_some(), counts, "{what}, agents {agents}");
    }
    let deleted = json!({ "metadata": { "deletionTimestamp": "2026-11-01T10:01:00Z" } });
    assert_eq!(read::read(&pod(&deleted)), Ok(None));
}

#[test]
fn an_agent_is_a_container_or_an_init_container() {
    for (init, containers, has_agent) in [
        (
            json!([{ "name": "coalmine-agent" }]),
            json!([{ "name": "app" }]),
            true,
        ),
        (
            json!([]),
            json!([{ "name": "app" }, { "name": "coalmine-agent" }]),
            true,
        ),
        (json!([{ "name": "coalmine" }]), json!([{ "name": "app" }]), false),
    ] {
        let spec = json!({ "spec": { "initContainers": init, "containers": containers } });
        assert_eq!(found(&spec).pod.has_agent, has_agent, "{spec}");
    }
}

#[test]
fn requests_may_reach_a_pod_since_a_moment() {
    let crashed = json!([{
        "name": "app", "image": "app", "imageID": "", "ready": false, "restartCount": 1,
        "state": { "waiting": { "reason": "CrashLoopBackOff" } },
        "lastState": { "terminated": { "exitCode": 1, "startedAt": "2026-11-01T10:00:20Z" } },
    }]);
    let no_agent = json!({ "initContainers": [] });
    let has_agent = json!({});
    for (spec, status, since) in [
        (&has_agent, json!({}), at(30)),
        (&has_agent, json!({ "conditions": not_ready(40) }), at(10)),
        (&no_agent, json!({}), at(10)),
        (&no_agent, json!({ "containerStatuses": crashed }), at(20)),
        (&no_agent, json!({ "containerStatuses": null }), at(1)),
        (
            &no_agent,
            json!({ "containerStatuses": null, "startTime": null }),
            at(0),
        ),
    ] {
        let pod = json!({ "spec": spec, "status": status });
        assert_eq!(found(&pod).pod.since_ms, since, "{pod}");
    }
}

#[test]
fn names_are_those_that_the_injector_gives() {
    for (setting, changes, service, version) in [
        (None, json!({}), "checkout", "v2"),
        (
            Some(Setting::Service),
            json!({ "coalmine.dev/service": "eu/checkout" }),
            "eu/checkout",
            "v2",
        ),
        (
            Some(Setting::Version),
            json!({ "coalmine.dev/version": "v2+3" }),
            "checkout",
            "v2+3",
        ),
    ] {
        for key in changes.as_object().unwrap().keys() {
            assert_eq!(
                setting,
                Setting::named(key.strip_prefix("coalmine.dev/").unwrap())
            );
        }
        let found = found(&annotated(&changes));
        assert_eq!(
            (found.service.as_str(), found.pod.build.version.as_str()),
            (service, version)
        );
    }
}

#[test]
fn a_pod_without_a_good_name_is_left_out() {
    let long = "x".repeat(200);
    for (changes, part) in [
        (
            labelled(&json!({ "app.kubernetes.io/name": null })),
            "Deployment shop/checkout-canary has no service; set the label app.kubernetes.io/name or",
        ),
        (
            labelled(&json!({ "app.kubernetes.io/version": null })),
            "has no version; set the label app.kubernetes.io/version or the annotation coalmine.dev/version",
        ),
        (
            labelled(&json!({ "app.kubernetes.io/name": "" })),
            "app.kubernetes.io/name of Deployment shop/checkout-canary is empty",
        ),
        // As the injector does, which refuses the pod.
        (
            annotated(&json!({ "coalmine.dev/service": "check out" })),
            "coalmine.dev/service of Deployment shop/checkout-canary has the character ' '",
        ),
        (
            annotated(&json!({ "coalmine.dev/version": long })),
            "is 200 bytes long",
        ),
    ] {
        let error = read::read(&pod(&changes)).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    // Of those that do not count nothing is said.
    let changes = json!({
        "metadata": { "labels": { "app.kubernetes.io/name": null } },
        "status": { "phase": "Pending" },
    });
    assert_eq!(read::read(&pod(&changes)), Ok(None));
}

#[test]
fn the_arm_is_the_label() {
    for (arm, expected) in [
        (json!("canary"), Some(Arm::Canary)),
        (json!("baseline"), Some(Arm::Baseline)),
        (json!("Canary"), None),
        (Value::Null, None),
    ] {
        let pod = pod(&labelled(&json!({ "coalmine.dev/arm": arm })));
        let found = read::read(&pod).unwrap();
        assert_eq!(found.map(|found| found.pod.build.arm), expected, "{arm}");
    }
    for (arm, rollout, starts) in [
        ("canary", "auto", true),
        ("canary", "manual", false),
        ("baseline", "auto", false),
    ] {
        let labels = json!({ "coalmine.dev/arm": arm, "coalmine.dev/rollout": rollout });
        assert_eq!(found(&labelled(&labels)).pod.starts_rollout, starts, "{labels}");
    }
}

#[test]
fn a_workload_is_what_would_make_another_pod() {
    let owner = |kind: &str, name: &str| {
        let mut owners = json!([{ "apiVersion": "apps/v1", "uid": "o1", "controller": true }]);
        owners[0]["kind"] = json!(kind);
        owners[0]["name"] = json!(name);
        owners
    };
    let argo = json!({ "pod-template-hash": null, "rollouts-pod-template-hash": "7d9f" });
    let none = json!({ "pod-template-hash": null });
    for (owners, labels, expected) in [
        (
            owner("ReplicaSet", "checkout-7d9f"),
            json!({}),
            Some(("Deployment", "checkout")),
        ),
        (
            owner("ReplicaSet", "checkout-7d9f"),
            argo,
            Some(("Rollout", "checkout")),
        ),
        (
            owner("ReplicaSet", "checkout-7d9f"),
            none,
            Some(("ReplicaSet", "checkout-7d9f")),
        ),
        (
            owner("ReplicaSet", "by-hand"),
            json!({}),
            Some(("ReplicaSet", "by-hand")),
        ),
        (
            owner("ReplicaSet", "-7d9f"),
            json!({}),
            Some(("ReplicaSet", "-7d9f")),
        ),
        (owner("StatefulSet", "db"), json!({}), Some(("StatefulSet", "db"))),
        (owner("DaemonSet", "edge"), json!({}), Some(("DaemonSet", "edge"))),
        (
            json!([{ "apiVersion": "v1", "kind": "X", "name": "x", "uid": "o1" }]),
            json!({}),
            None,
        ),
        (json!([]), json!({}), None),
    ] {
        let changes = json!({ "metadata": { "ownerReferences": owners, "labels": labels } });
        let workload = found(&changes).pod.workload;
        let workload = workload.as_ref().map(|it| (it.kind.as_str(), it.name.as_str()));
        assert_eq!(workload, expected, "{changes}");
    }
}

/// A pod that counts, of another uid and version.
fn named(uid: &str, version: &str) -> Found {
    found(&json!({
        "metadata": { "uid": uid, "labels": { "app.kubernetes.io/version": version } },
    }))
}

fn put(uid: &str, version: &str) -> News {
    News::Put(Box::new(named(uid, version)))
}

fn uids(sheet: &Sheet) -> Vec<String> {
    let roster = sheet.roster(false);
    roster
        .services
        .values()
        .flat_map(BTreeMap::keys)
        .cloned()
        .collect()
}

#[test]
fn followers_are_merged() {
    let mut sheet = Sheet::new(2);
    assert!(sheet.take(0, News::Listed(vec![named("a", "v1"), named("b", "v1")])));
    assert!(sheet.take(1, News::Listed(vec![named("c", "v1")])));
    assert_eq!(uids(&sheet), ["a", "b", "c"]);

    // A list takes the place of what its own follower had told, and of nothing else.
    assert!(sheet.take(0, News::Listed(vec![named("a", "v1")])));
    assert_eq!(uids(&sheet), ["a", "c"]);
    assert!(!sheet.take(0, News::Listed(vec![named("a", "v1")])));

    assert!(!sheet.take(0, put("a", "v1")));
    assert!(sheet.take(0, put("a", "v2")));
    assert!(sheet.take(1, put("d", "v1")));
    assert_eq!(uids(&sheet), ["a", "c", "d"]);
    assert_eq!(sheet.roster(false).services["checkout"]["a"].build.version, "v2");

    assert!(sheet.take(1, News::Gone("c".to_owned())));
    assert!(!sheet.take(1, News::Gone("c".to_owned())));
    assert!(!sheet.take(0, News::Gone("d".to_owned())));
    assert_eq!(uids(&sheet), ["a", "d"]);
    assert!(!sheet.take(2, put("e", "v1")));
}

#[test]
fn a_roster_is_stale_until_all_is_heard_and_when_nothing_was_for_a_while() {
    let begun = Instant::now();
    let after = |seconds: u64| begun + Duration::from_secs(seconds);
    let mut sheet = Sheet::new(2);
    sheet.take(0, News::InSync(after(0)));
    assert!(sheet.is_stale(after(0)), "one has told nothing yet");
    sheet.take(1, News::InSync(after(10)));
    assert!(!sheet.is_stale(after(59)));
    assert!(sheet.is_stale(after(60)));
    sheet.take(0, News::InSync(after(20)));
    assert_eq!(sheet.stale_at(), Some(after(70)));
    // News alone do not say that none was missed.
    sheet.take(1, put("a", "v1"));
    assert!(!sheet.is_stale(after(69)));
    assert!(sheet.is_stale(after(70)));
    assert_eq!(uids(&sheet), ["a"]);
}

#[test]
fn a_roster_with_pods_missing_is_stale() {
    let begun = Instant::now();
    let mut sheet = Sheet::new(1);
    let mut many = Vec::new();
    let one = named("a", "v1");
    for number in 0..MAX_PODS {
        let uid = format!("p{number}");
        many.push(Found { uid, ..one.clone() });
    }
    sheet.take(0, News::Listed(many));
    sheet.take(0, News::InSync(begun));
    assert!(!sheet.is_stale(begun));
    assert!(sheet.take(0, put("p1", "v2")), "one that is kept already");
    assert!(!sheet.is_stale(begun));
    assert!(!sheet.take(0, put("another", "v1")));
    sheet.take(0, News::InSync(begun));
    assert!(sheet.is_stale(begun));
    sheet.take(0, News::Listed(vec![one]));
    assert!(!sheet.is_stale(begun));
}

#[tokio::test]
async fn what_comes_together_is_published_once() {
    let (publish, mut published) = watch::channel(Arc::new(Roster::default()));
    let (news, inbox) = mpsc::channel(QUEUE);
    assert!(published.borrow_and_update().for_book().is_stale);
    let keeping = tokio::spawn(keep(Sheet::new(1), inbox, publish));
    for (uid, version) in [("a", "v1"), ("b", "v1"), ("a", "v2")] {
        news.send((0, put(uid, version))).await.unwrap();
    }
    news.send((0, News::InSync(Instant::now()))).await.unwrap();
    let within = Duration::from_secs(10);
    tokio::time::timeout(within, published.changed())
        .await
        .unwrap()
        .unwrap();
    let roster = published.borrow_and_update().for_book();
    assert!(!roster.is_stale);
    let pods = &roster.services["checkout"];
    assert_eq!(pods.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(pods["a"].build.version, "v2");

    // The same again is no news; then nobody is left to tell any.
    news.send((0, put("a", "v2"))).await.unwrap();
    drop(news);
    tokio::time::timeout(within, keeping).await.unwrap().unwrap();
    assert!(published.changed().await.is_err(), "published again");
}

#[tokio::test]
async fn silence_is_published() {
    let (publish, mut published) = watch::channel(Arc::new(Roster::default()));
    let (news, inbox) = mpsc::channel(QUEUE);
    let keeping = tokio::spawn(keep(Sheet::new(1), inbox, publish));
    let almost = STALE_AFTER - Duration::from_secs(1);
    let heard = Instant::now().checked_sub(almost).unwrap();
    news.send((0, put("a", "v1"))).await.unwrap();
    news.send((0, News::InSync(heard))).await.unwrap();
    let within = Duration::from_secs(10);
    let told = tokio::time::timeout(within, published.changed()).await;
    told.unwrap().unwrap();
    let stale = published.wait_for(|roster| roster.is_stale());
    let roster = tokio::time::timeout(within, stale)
        .await
        .unwrap()
        .unwrap()
        .for_book();
    assert_eq!(roster.services["checkout"].len(), 1);
    keeping.abort();
}
