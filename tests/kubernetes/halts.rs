//! Halts: what a ROLLBACK does to a Rollout of Argo, a Canary of Flagger and a Deployment, and what is on record of it.

use std::{fs, path::Path, time::Duration};

use coalmine_tests::{
    components::{Aggregator, Load, Scene as Fleet},
    eventually, within,
};
use serde_json::{Value, json};

use crate::scene::{SHOP, Scene, rendered};

const FAILING: &str = "stark-bank";

/// What somebody must put right first is tried again each minute.
const RETRIED_WITHIN: Duration = Duration::from_secs(120);

/// The annotation that names the decision which was acted on.
const DECISION: &str = "coalmine.dev/decision";

/// A rollout of a workload, with its agents; requests come once there is load.
pub(crate) struct Trial {
    pub(crate) rollout: String,
    fleet: Fleet,
}

impl Trial {
    /// Starts the agents and the rollout; the canary fails for one tenant if it is to.
    pub(crate) fn begin(
        scene: &Scene,
        aggregator: &Aggregator,
        kind: &str,
        name: &str,
        failing: bool,
    ) -> Self {
        let directory = scene.cluster.file("fleet");
        fs::create_dir(&directory).unwrap();
        let fleet = Fleet::start(&directory, aggregator.grpc, failing.then_some(FAILING));
        let request = json!({
            "service": "checkout",
            "canary_version": "v2",
            "workload": { "kind": kind, "namespace": SHOP, "name": name },
        });
        let answer = aggregator.post("/v1/rollouts", &request);
        assert_eq!(answer.status, 201, "{}", answer.body);
        let rollout = answer.json()["id"].as_str().unwrap().to_owned();
        Self { rollout, fleet }
    }

    pub(crate) fn load(&self) -> Load {
        self.fleet.load(2_000, 240_000)
    }
}

/// What is on record of what was done for a rollout, in order.
pub(crate) fn actuations(data: &Path, rollout: &str) -> Vec<Value> {
    let text = fs::read_to_string(data.join("decisions.jsonl")).unwrap_or_default();
    // The last line may be half written.
    let records = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let bodies = records.map(|mut record| record["body"].take());
    bodies
        .filter(|body| body["type"] == "actuation" && body["rollout"] == rollout)
        .collect()
}

/// Of one act, the stages that are on record.
pub(crate) fn stages(data: &Path, rollout: &str, act: &str) -> Vec<String> {
    let all = actuations(data, rollout);
    let ours = all.iter().filter(|body| body["act"] == act);
    ours.map(|body| body["stage"].as_str().unwrap().to_owned())
        .collect()
}

/// The path of an object of the shop.
pub(crate) fn path(group: &str, kind: &str, name: &str) -> String {
    format!("/apis/{group}/namespaces/{SHOP}/{kind}/{name}")
}

/// Makes a Rollout of Argo; gives its path.
pub(crate) fn make_rollout(scene: &Scene, name: &str) -> String {
    let rollout = json!({
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Rollout",
        "metadata": { "name": name, "namespace": SHOP },
        "spec": {
            "replicas": 3,
            "selector": { "matchLabels": { "app": name } },
            "strategy": { "canary": { "steps": [{ "setWeight": 25 }, { "pause": {} }] } },
            "template": template(name, "v2"),
        },
    });
    scene
        .cluster
        .create(&path("argoproj.io/v1alpha1", "rollouts", ""), &rollout);
    path("argoproj.io/v1alpha1", "rollouts", name)
}

fn template(name: &str, version: &str) -> Value {
    json!({
        "metadata": { "labels": { "app": name, "app.kubernetes.io/version": version } },
        "spec": { "containers": [{ "name": "app", "image": format!("registry.example.com/checkout:{version}") }] },
    })
}

/// Makes a Deployment that went from v1 to v2, with what its controller would have made; gives its path.
pub(crate) fn make_deployment(scene: &Scene, name: &str) -> String {
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name, "namespace": SHOP,
            "annotations": { "deployment.kubernetes.io/revision": "2" },
        },
        "spec": {
            "replicas": 2,
            "selector": { "matchLabels": { "app": name } },
            "template": template(name, "v2"),
        },
    });
    let collection = path("apps/v1", "deployments", "");
    let stored = scene.cluster.create(&collection, &deployment);
    for (revision, version) in [("1", "v1"), ("2", "v2")] {
        let hash = format!("hash{revision}");
        let mut template = template(name, version);
        template["metadata"]["labels"]["pod-template-hash"] = json!(hash);
        let set = json!({
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": format!("{name}-{hash}"),
                "namespace": SHOP,
                "labels": template["metadata"]["labels"],
                "annotations": { "deployment.kubernetes.io/revision": revision },
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "Deployment", "name": name,
                    "uid": stored["metadata"]["uid"], "controller": true,
                }],
            },
            "spec": {
                "replicas": 1,
                "selector": { "matchLabels": { "app": name, "pod-template-hash": hash } },
                "template": template,
            },
        });
        scene.cluster.create(&path("apps/v1", "replicasets", ""), &set);
    }
    path("apps/v1", "deployments", name)
}

/// Waits for the ROLLBACK; gives its decision's name.
pub(crate) fn wait_for_rollback(aggregator: &Aggregator, rollout: &str) -> String {
    let gate = aggregator.wait_for_verdict(rollout, &["ROLLBACK", "APPROVE"]);
    assert_eq!(gate["verdict"], "ROLLBACK", "{gate}");
    gate["decision_id"].as_str().unwrap().to_owned()
}

/// Waits for an Event that tells of a decision.
fn wait_for_event(scene: &Scene, kind: &str, name: &str, decision: &str) {
    let events = format!("/api/v1/namespaces/{SHOP}/events");
    let event = eventually("an Event tells of the rollback", || {
        let all = scene.cluster.get(&events)["items"].as_array()?.clone();
        all.into_iter().find(|event| {
            let object = &event["involvedObject"];
            let message = event["message"].as_str().unwrap_or_default();
            object["kind"] == kind && object["name"] == name && message.contains(decision)
        })
    });
    assert_eq!(event["type"], "Warning", "{event}");
    let message = event["message"].as_str().unwrap();
    assert!(
        message.contains("ROLLBACK") && message.contains(FAILING),
        "{event}"
    );
}

/// An aggregator that halts, and the workload `checkout` on trial.
fn on_trial(scene: &Scene, halt: &str, kind: &str, failing: bool) -> (Aggregator, Trial) {
    let mut aggregator = scene.aggregator(&["--halt", halt]);
    aggregator.launch();
    let trial = Trial::begin(scene, &aggregator, kind, "checkout", failing);
    (aggregator, trial)
}

/// A Deployment on trial that is paused, since without requests nothing is approved; its path first.
fn paused(scene: &Scene, failing: bool) -> (String, Aggregator, Trial) {
    let path = make_deployment(scene, "checkout");
    let (aggregator, trial) = on_trial(scene, "deployment", "Deployment", failing);
    eventually("the Deployment is paused", || {
        (scene.cluster.get(&path)["spec"]["paused"] == true).then_some(())
    });
    (path, aggregator, trial)
}

/// Waits until an act is on record as begun and done, and as nothing else.
fn wait_for_record(aggregator: &Aggregator, rollout: &str, act: &str) {
    eventually(&format!("{act} is on record"), || {
        (stages(&aggregator.data, rollout, act) == ["begun", "done"]).then_some(())
    });
}

/// Waits until a rollback is on record as failed.
fn wait_for_failure(aggregator: &Aggregator, rollout: &str) -> Value {
    eventually("the failure is on record", || {
        let all = actuations(&aggregator.data, rollout);
        all.into_iter()
            .find(|body| body["stage"] == "failed" && body["act"] == "rollback")
    })
}

#[test]
fn a_rollout_of_argo_is_aborted() {
    let scene = Scene::install(&["argo"]);
    scene.cluster.custom_resources("argo-rollouts.yaml");
    let path = make_rollout(&scene, "checkout");
    let (aggregator, trial) = on_trial(&scene, "argo", "Rollout", true);
    let _load = trial.load();
    let decision = wait_for_rollback(&aggregator, &trial.rollout);
    let aborted = eventually("the Rollout is aborted", || {
        Some(scene.cluster.get(&path)).filter(|object| object["status"]["abort"] == true)
    });
    assert_eq!(aborted["metadata"]["annotations"][DECISION], decision.as_str());
    // What a GitOps tool keeps is left as it was.
    assert_eq!(aborted["spec"]["paused"], Value::Null, "{aborted}");
    wait_for_event(&scene, "Rollout", "checkout", &decision);
    wait_for_record(&aggregator, &trial.rollout, "rollback");
}

#[test]
fn a_rollout_of_argo_that_is_fully_promoted_is_not_called_aborted() {
    let scene = Scene::install(&["argo"]);
    scene.cluster.custom_resources("argo-rollouts.yaml");
    let path = make_rollout(&scene, "checkout");
    let promoted = json!({ "status": { "stableRS": "5f6d8c", "currentPodHash": "5f6d8c" } });
    scene.cluster.patch(&format!("{path}/status"), &promoted);
    let (aggregator, trial) = on_trial(&scene, "argo", "Rollout", true);
    let _load = trial.load();
    wait_for_rollback(&aggregator, &trial.rollout);
    let failed = wait_for_failure(&aggregator, &trial.rollout);
    let detail = failed["detail"].as_str().unwrap();
    assert!(detail.contains("fully promoted"), "{failed}");
    assert_ne!(scene.cluster.get(&path)["status"]["abort"], true);
    assert_eq!(
        stages(&aggregator.data, &trial.rollout, "rollback"),
        ["begun", "failed"]
    );
}

#[test]
fn a_canary_of_flagger_is_told() {
    let scene = Scene::install(&["flagger"]);
    scene.cluster.custom_resources("flagger.yaml");
    let canary = json!({
        "apiVersion": "flagger.app/v1beta1",
        "kind": "Canary",
        "metadata": { "name": "checkout", "namespace": SHOP },
        "spec": {
            "targetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "checkout" },
            "service": { "port": 80 },
            "analysis": { "interval": "10s", "threshold": 5, "stepWeight": 20, "maxWeight": 60 },
        },
    });
    let collection = path("flagger.app/v1beta1", "canaries", "");
    scene.cluster.create(&collection, &canary);
    let path = path("flagger.app/v1beta1", "canaries", "checkout");
    let (aggregator, trial) = on_trial(&scene, "flagger", "Canary", true);
    let _load = trial.load();
    let decision = wait_for_rollback(&aggregator, &trial.rollout);
    let told = eventually("the Canary is told", || {
        let object = scene.cluster.get(&path);
        let is_told = object["metadata"]["annotations"][DECISION] == decision.as_str();
        is_told.then_some(object)
    });
    // The controller's own fields are its own.
    assert_eq!(told["status"], Value::Null, "{told}");
    wait_for_event(&scene, "Canary", "checkout", &decision);
    wait_for_record(&aggregator, &trial.rollout, "rollback");
}

#[test]
fn a_deployment_is_paused_and_then_restored() {
    let scene = Scene::install(&["deployment"]);
    let (path, aggregator, trial) = paused(&scene, true);
    let _load = trial.load();
    let decision = wait_for_rollback(&aggregator, &trial.rollout);
    let restored = eventually("the former template is back", || {
        let object = scene.cluster.get(&path);
        is_restored(&object).then_some(object)
    });
    assert_eq!(restored["metadata"]["annotations"][DECISION], decision.as_str());
    let labels = &restored["spec"]["template"]["metadata"]["labels"];
    assert_eq!(labels["pod-template-hash"], Value::Null, "{restored}");
    let image = &restored["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(*image, "registry.example.com/checkout:v1", "{restored}");
    wait_for_event(&scene, "Deployment", "checkout", &decision);
    wait_for_record(&aggregator, &trial.rollout, "rollback");
}

/// Whether a Deployment has v1 again and goes on to it.
pub(crate) fn is_restored(deployment: &Value) -> bool {
    let spec = &deployment["spec"];
    let version = &spec["template"]["metadata"]["labels"]["app.kubernetes.io/version"];
    *version == "v1" && spec["paused"] != true
}

#[test]
fn a_deployment_that_was_held_goes_on_when_it_is_approved() {
    let scene = Scene::install(&["deployment"]);
    let (path, aggregator, trial) = paused(&scene, false);
    let _load = trial.load();
    let gate = aggregator.wait_for_verdict(&trial.rollout, &["APPROVE", "ROLLBACK"]);
    assert_eq!(gate["verdict"], "APPROVE", "{gate}");
    let resumed = eventually("the Deployment goes on", || {
        let object = scene.cluster.get(&path);
        (object["spec"]["paused"] != true).then_some(object)
    });
    let image = &resumed["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(*image, "registry.example.com/checkout:v2", "{resumed}");
}

#[test]
fn a_deployment_that_was_held_stays_paused_when_the_rollout_ends_without_an_approval() {
    let scene = Scene::install(&["deployment"]);
    let (path, aggregator, trial) = paused(&scene, false);
    let end = format!("/v1/rollouts/{}/end", trial.rollout);
    let answer = aggregator.post(&end, &json!({}));
    assert_eq!(answer.status, 200, "{}", answer.body);
    wait_for_record(&aggregator, &trial.rollout, "release");
    let all = actuations(&aggregator.data, &trial.rollout);
    let said = all
        .iter()
        .find(|body| body["act"] == "release" && body["stage"] == "done")
        .unwrap();
    assert!(
        said["detail"].as_str().unwrap().contains("rollout resume"),
        "{said}"
    );
    assert_eq!(scene.cluster.get(&path)["spec"]["paused"], true);
}

#[test]
fn a_halt_that_is_forbidden_is_on_record_as_failed_and_says_what_is_missing() {
    // The account has no role at all.
    let scene = Scene::install(&[]);
    scene.cluster.custom_resources("argo-rollouts.yaml");
    let path = make_rollout(&scene, "checkout");
    let (aggregator, trial) = on_trial(&scene, "argo", "Rollout", true);
    let _load = trial.load();
    wait_for_rollback(&aggregator, &trial.rollout);
    let failed = wait_for_failure(&aggregator, &trial.rollout);
    let detail = failed["detail"].as_str().unwrap();
    assert!(
        detail.contains("rollouts") && (detail.contains("patch") || detail.contains("get")),
        "{failed}"
    );
    assert_ne!(scene.cluster.get(&path)["status"]["abort"], true);

    // Once the role is there the halt is done after all.
    for object in rendered(scene.directory.path(), &["argo"]) {
        if object["apiVersion"] == "rbac.authorization.k8s.io/v1" {
            scene.cluster.apply(&object);
        }
    }
    within(RETRIED_WITHIN, "the Rollout is aborted", || {
        (scene.cluster.get(&path)["status"]["abort"] == true).then_some(())
    });
}
