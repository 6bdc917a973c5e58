//! The aggregator is killed between an act and its record, and between the record and the act: after the restart the halt
//! is done, once, and is on record.

use coalmine_tests::{eventually, kubernetes::When};
use serde_json::{Value, json};

use crate::{
    halts::{Trial, actuations, is_restored, make_deployment, make_rollout, stages},
    scene::{HOME, Scene},
};

/// Something that can be halted.
struct Target {
    component: &'static str,
    kind: &'static str,
    make: fn(&Scene, &str) -> String,
    /// Whether the object is as a halt leaves it.
    is_halted: fn(&Value) -> bool,
    /// Whether a HOLD has left something on the object before.
    is_held_first: bool,
    /// The parts of the object that a halt changes, in order, by the end of their paths.
    changes: &'static [&'static str],
}

/// What the log calls it.
const ACT: &str = "rollback";

const ARGO: Target = Target {
    component: "argo",
    kind: "Rollout",
    make: make_rollout,
    is_halted: |object| object["status"]["abort"] == true,
    is_held_first: false,
    changes: &["", "/status"],
};

const DEPLOYMENT: Target = Target {
    component: "deployment",
    kind: "Deployment",
    make: make_deployment,
    is_halted: is_restored,
    is_held_first: true,
    changes: &[""],
};

#[test]
fn a_rollout_of_argo_is_aborted_once_wherever_the_aggregator_is_killed() {
    let scene = Scene::install(&[ARGO.component]);
    scene.cluster.custom_resources("argo-rollouts.yaml");
    killed_everywhere(&scene, &ARGO);
}

#[test]
fn a_deployment_is_restored_once_wherever_the_aggregator_is_killed() {
    let scene = Scene::install(&[DEPLOYMENT.component]);
    killed_everywhere(&scene, &DEPLOYMENT);
}

#[test]
fn a_deployment_that_somebody_has_resumed_is_not_paused_again_after_a_crash() {
    let scene = Scene::install(&[DEPLOYMENT.component]);
    let path = make_deployment(&scene, "checkout");
    let proxy = scene.cluster.proxy();
    let kubeconfig = scene.cluster.kubeconfig_through(&proxy, HOME, "coalmine");
    let mut aggregator = scene.aggregator_with(&kubeconfig, &["--halt", DEPLOYMENT.component]);
    aggregator.launch();
    let held = proxy.hold(When::After, "PATCH", &path);
    // Without requests nothing is approved.
    let trial = Trial::begin(&scene, &aggregator, DEPLOYMENT.kind, "checkout", false);
    held.wait();
    aggregator.kill_9();
    drop(held);
    assert_eq!(scene.cluster.get(&path)["spec"]["paused"], true);
    scene
        .cluster
        .patch(&path, &json!({ "spec": { "paused": false } }));
    aggregator.launch();
    eventually("the HOLD is on record as done", || {
        let stages = stages(&aggregator.data, &trial.rollout, "hold");
        (stages.last()? == "done").then_some(())
    });
    assert_ne!(scene.cluster.get(&path)["spec"]["paused"], true);
    assert_eq!(proxy.done("PATCH", &path), 1);
}

fn killed_everywhere(scene: &Scene, target: &Target) {
    let moments = target
        .changes
        .iter()
        .flat_map(|change| [(When::Before, *change), (When::After, *change)]);
    for (number, (when, change)) in moments.enumerate() {
        killed(scene, target, &format!("checkout-{number}"), when, change);
    }
}

fn killed(scene: &Scene, target: &Target, name: &str, when: When, change: &str) {
    let what = format!("{} killed {when:?} the change of {change:?}", target.kind);
    println!("{what}");
    let path = (target.make)(scene, name);
    let proxy = scene.cluster.proxy();
    let kubeconfig = scene.cluster.kubeconfig_through(&proxy, HOME, "coalmine");
    let mut aggregator = scene.aggregator_with(&kubeconfig, &["--halt", target.component]);
    aggregator.launch();
    let trial = Trial::begin(scene, &aggregator, target.kind, name, true);
    let held_before = if target.is_held_first {
        eventually("the HOLD is done and on record", || {
            let stages = stages(&aggregator.data, &trial.rollout, "hold");
            (stages.last()? == "done").then_some(())
        });
        proxy.done("PATCH", &path)
    } else {
        0
    };
    let held = proxy.hold(when, "PATCH", &format!("{path}{change}"));
    let _load = trial.load();
    held.wait();

    // What is about to be done is on record before; what was done cannot be yet.
    assert_eq!(stages(&aggregator.data, &trial.rollout, ACT), ["begun"], "{what}");
    aggregator.kill_9();
    drop(held);
    if when == When::Before {
        assert!(!(target.is_halted)(&scene.cluster.get(&path)), "{what}");
    }
    aggregator.launch();

    eventually(&format!("{what}: done is on record"), || {
        let stages = stages(&aggregator.data, &trial.rollout, ACT);
        (stages.last()? == "done").then_some(())
    });
    let object = scene.cluster.get(&path);
    assert!((target.is_halted)(&object), "{what}: {object}");

    // One decision, and each change of the object once.
    let all = actuations(&aggregator.data, &trial.rollout);
    let ours: Vec<_> = all.iter().filter(|body| body["act"] == ACT).collect();
    let done = ours.iter().filter(|body| body["stage"] == "done").count();
    assert_eq!(done, 1, "{what}: {ours:#?}");
    let decision = &object["metadata"]["annotations"]["coalmine.dev/decision"];
    assert!(
        ours.iter().all(|body| body["decision"] == *decision),
        "{what}: {decision} {ours:#?}"
    );
    for changed in target.changes {
        let before = if changed.is_empty() { held_before } else { 0 };
        let times = proxy.done("PATCH", &format!("{path}{changed}"));
        assert_eq!(times - before, 1, "{what}: how often {changed:?} was changed");
    }
}
