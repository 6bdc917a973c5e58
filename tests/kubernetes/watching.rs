//! Pods that the aggregator sees: one without an agent holds the rollout, and one that changes its side is followed.

use std::{fs, path::Path};

use coalmine_tests::{
    components::{Agent, Aggregator, Nginx, Scene as Fleet},
    eventually,
    http::{get, request},
};
use serde_json::{Value, json};

use crate::scene::{PODS, SHOP, Scene, has_agent, pod, uid};

#[test]
fn a_canary_without_an_agent_holds_the_rollout_for_as_long_as_it_is_there() {
    let scene = Scene::install(&["webhook", "watch"]);
    let mut aggregator = scene.injecting(&["--watch-pods"]);
    let observed = create_observed(&scene);
    // Nobody is there to inject; the pod is created all the same.
    aggregator.kill_9();
    assert!(!has_agent(&scene.create(&pod("canary-2", "canary"))));
    aggregator.launch();
    is_held_by_canary_2(&scene, &aggregator, &observed);
}

#[test]
fn a_canary_without_a_version_and_an_agent_holds_the_rollout_of_any_version() {
    let scene = Scene::install(&["webhook", "watch"]);
    let aggregator = scene.injecting(&["--watch-pods"]);
    let observed = create_observed(&scene);
    // It asks for an agent and cannot have one, since nobody says what would be measured.
    let mut nameless = pod("canary-2", "canary");
    let labels = nameless["metadata"]["labels"].as_object_mut().unwrap();
    labels.remove("app.kubernetes.io/version").unwrap();
    assert!(!has_agent(&scene.create(&nameless)));
    is_held_by_canary_2(&scene, &aggregator, &observed);
}

/// Two pods of the baseline and one of the canary, all with agents; gives their uids.
fn create_observed(scene: &Scene) -> [String; 3] {
    [
        ("baseline-1", "baseline"),
        ("baseline-2", "baseline"),
        ("canary-1", "canary"),
    ]
    .map(|(name, arm)| {
        let stored = scene.create(&pod(name, arm));
        assert!(has_agent(&stored), "{stored}");
        uid(&stored)
    })
}

/// Runs all pods and a rollout, which is held until the pod without an agent, `canary-2`, is gone.
fn is_held_by_canary_2(scene: &Scene, aggregator: &Aggregator, observed: &[String; 3]) {
    for name in ["baseline-1", "baseline-2", "canary-1", "canary-2"] {
        scene.cluster.run_pod(SHOP, name);
    }
    let instances = [observed[0].as_str(), observed[1].as_str(), observed[2].as_str()];
    let fleet = Fleet::start_as(scene.directory.path(), aggregator.grpc, None, instances);
    let _load = fleet.load(1_500, 300_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));
    let rollout = aggregator.start_rollout();
    let path = format!("/v1/rollouts/{rollout}");
    // Longer than a healthy rollout takes.
    eventually("many windows are judged", || {
        let judged = get(aggregator.http, &path).ok()?.json()["windows_judged"].as_u64()?;
        (judged >= 20).then_some(())
    });
    let decisions = aggregator.get(&format!("/v1/decisions?rollout={rollout}&limit=1000"));
    for decision in decisions["decisions"].as_array().unwrap() {
        assert_eq!(decision["record"]["body"]["verdict"], "HOLD", "{decision}");
    }
    let gate = aggregator.get(&format!("{path}/gate"));
    let reason = gate["reason"].as_str().unwrap();
    assert!(reason.contains("1 of 2 canary pods has no agent"), "{gate}");

    scene.cluster.delete(&format!("{PODS}/canary-2"));
    let gate = aggregator.wait_for_verdict(&rollout, &["APPROVE", "ROLLBACK"]);
    assert_eq!(gate["verdict"], "APPROVE", "{gate}");
}

#[test]
fn a_rollout_begins_by_itself_where_a_label_says_so() {
    let scene = Scene::install(&["watch"]);
    let mut aggregator = scene.aggregator(&["--watch-pods"]);
    aggregator.launch();
    let mut canary = pod("canary-1", "canary");
    canary["metadata"]["labels"]["coalmine.dev/rollout"] = json!("auto");
    canary["metadata"]["labels"]["pod-template-hash"] = json!("6d4f");
    canary["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "checkout-6d4f", "uid": "1", "controller": true,
    }]);
    let rollouts = || get(aggregator.http, "/v1/rollouts").unwrap().json()["rollouts"].clone();
    scene.create(&canary);
    scene.create(&pod("baseline-1", "baseline"));
    scene.cluster.run_pod(SHOP, "baseline-1");
    // One watch tells of pods in order: when this one is known, so are the two above.
    let mut unnamed = pod("unnamed", "canary");
    let labels = unnamed["metadata"]["labels"].as_object_mut().unwrap();
    labels.remove("app.kubernetes.io/name").unwrap();
    scene.create(&unnamed);
    scene.cluster.run_pod(SHOP, "unnamed");
    let log = aggregator.data.with_file_name("aggregator.log");
    eventually("the pods are known", || {
        let said = fs::read_to_string(&log).ok()?;
        said.contains("a pod is in no rollout").then_some(())
    });
    assert_eq!(rollouts(), json!([]), "no canary runs yet");
    scene.cluster.run_pod(SHOP, "canary-1");
    let found = eventually("a rollout begins", || {
        rollouts()
            .as_array()
            .unwrap()
            .first()
            .filter(|first| first["service"] == "checkout")
            .cloned()
    });
    assert_eq!(found["canary_version"], "v2", "{found}");
    let workload = json!({ "kind": "Deployment", "namespace": SHOP, "name": "checkout" });
    assert_eq!(found["workload"], workload, "{found}");
    assert_eq!(rollouts().as_array().unwrap().len(), 1);
}

fn write_labels(file: &Path, arm: &str) {
    // As the kubelet does it: another file in the place of this one.
    let fresh = file.with_extension("fresh");
    let text = format!("app.kubernetes.io/version=\"v2\"\ncoalmine.dev/arm=\"{arm}\"\n");
    fs::write(&fresh, text).unwrap();
    fs::rename(fresh, file).unwrap();
}

#[test]
fn requests_are_counted_on_the_side_that_the_pod_is_on_when_they_come() {
    const BEFORE: u64 = 40;
    const AFTER: u64 = 25;
    let scene = Scene::install(&["watch"]);
    let mut aggregator = scene.aggregator(&["--watch-pods"]);
    aggregator.launch();
    let stored = scene.create(&pod("moves", "canary"));
    scene.cluster.run_pod(SHOP, "moves");
    let (directory, instance) = (scene.directory.path(), uid(&stored));
    let labels = directory.join("labels");
    write_labels(&labels, "canary");
    let application = Nginx::start(directory, "nginx", None);
    let path = labels.display().to_string();
    let agent = Agent::start_with(
        directory,
        &instance,
        "canary",
        application.address,
        aggregator.grpc,
        &["--labels-file", &path],
    );
    let rollout = aggregator.start_rollout();
    let is_on = |arm: &str| {
        let rollout = aggregator.get(&format!("/v1/rollouts/{rollout}"));
        let agents = rollout["agents"].as_array().unwrap().clone();
        let ours = |agent: &&Value| agent["instance"] == instance.as_str();
        agents.iter().find(ours).is_some_and(|agent| agent["arm"] == arm)
    };
    eventually("the agent is the canary's", || is_on("canary").then_some(()));
    let ask = |times: u64| {
        for _ in 0..times {
            let answer = request(agent.address, "GET", "/", &[("x-tenant-id", "acme")], "").unwrap();
            assert_eq!(answer.status, 200);
        }
    };
    ask(BEFORE);
    // As Argo does it when a ReplicaSet becomes the stable one: on the pod that runs.
    let patch = json!({ "metadata": { "labels": { "coalmine.dev/arm": "baseline" } } });
    scene.cluster.patch(&format!("{PODS}/moves"), &patch);
    write_labels(&labels, "baseline");
    eventually("the agent is the baseline's", || is_on("baseline").then_some(()));
    ask(AFTER);
    agent.terminate();
    let counts = eventually("all requests are counted", || {
        let counts = aggregator.counts();
        (counts.total() >= BEFORE + AFTER).then_some(counts)
    });
    let of = |arm: &str| -> u64 {
        let rows = counts.0.iter().filter(|((of, _, _), _)| of == arm);
        rows.map(|(_, count)| count).sum()
    };
    assert_eq!((of("canary"), of("baseline")), (BEFORE, AFTER), "{counts:?}");
}
