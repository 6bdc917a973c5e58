//! The real controller of Argo Rollouts, with the analyses and the Rollout of `deploy/examples/argo`: five Rollouts at a
//! time, by the web, prometheus and kayenta providers. Jobs are not run, since no node runs their pods.

use std::thread;

use coalmine_tests::{
    components::Aggregator,
    kubernetes::{FAILING, Nodes, Split},
    process::free_addresses,
};
use serde_json::{Value, json};

use crate::deploying::{Stage, Trial, patiently};

const GROUP: &str = "argoproj.io/v1alpha1";

/// The annotation that names the decision which was acted on.
const DECISION: &str = "coalmine.dev/decision";

/// The examples' templates, one of each provider.
const TEMPLATES: [&str; 3] = ["analysis-web", "analysis-prometheus", "analysis-kayenta"];

/// Their names in the cluster.
const WEB: &str = "coalmine";
const PROMETHEUS: &str = "coalmine-prometheus";
const KAYENTA: &str = "coalmine-kayenta";

const HEALTHY: Trial = Trial::named("healthy");
/// A tenant is judged from so many requests on that one in seven that fail are seen.
const BROKEN: Trial = Trial {
    requests: 100,
    ..Trial::named("broken")
};
const HELD: Trial = Trial::named("held");
/// Nothing is ever enough for it.
const EXPIRED: Trial = Trial {
    hold_deadline: "30s",
    requests: 1_000_000_000,
    ..Trial::named("expired")
};
const RESTARTED: Trial = Trial::named("restarted");

#[test]
fn rollouts_go_on_when_approved_and_are_aborted_when_not() {
    let trials = [HEALTHY, BROKEN, HELD, EXPIRED, RESTARTED];
    let (mut aggregator, mut stage) = Stage::begin("argo", &["argo-rollouts.yaml"], &trials);
    let [metrics, health] = free_addresses();
    let arguments: [&str; 4] = [
        &stage.kubeconfig("--kubeconfig"),
        "--leader-elect=false",
        &format!("--metricsPort={}", metrics.port()),
        &format!("--healthzPort={}", health.port()),
    ];
    stage.run("rollouts-controller", &arguments);
    thread::scope(|scope| {
        scope.spawn(|| all_providers_let_a_healthy_canary_go_on(&stage));
        scope.spawn(|| one_tenants_errors_abort_it(&stage));
        scope.spawn(|| a_held_canary_waits_until_it_is_approved(&stage));
        scope.spawn(|| a_hold_ends_at_its_deadline(&stage));
        an_outage_aborts_nothing(&stage, &mut aggregator);
    });
}

/// Makes the Rollout of a trial, with these analyses one after the other; gives its nodes once another version is
/// deployed. `label` is whether a rollout begins by itself.
fn begin(stage: &Stage, trial: &Trial, version: &str, analyses: &[&str], label: bool) -> Nodes {
    stage.apply_token(trial);
    for file in TEMPLATES {
        for mut template in stage.example(trial, &format!("argo/{file}.yaml")) {
            // The example, but quicker.
            let metric = &mut template["spec"]["metrics"][0];
            metric["initialDelay"] = json!("5s");
            metric["interval"] = json!("5s");
            stage.apply(&template);
        }
    }
    let nodes = stage.nodes(trial, Split::Pods);
    let mut rollout = stage.example(trial, "argo/rollout.yaml").swap_remove(0);
    rollout["metadata"]["labels"]["app.kubernetes.io/version"] = json!("v1");
    let spec = &mut rollout["spec"];
    spec["replicas"] = json!(2);
    spec["template"] = trial.template("v1");
    let canary = &mut spec["strategy"]["canary"];
    let arguments = canary["steps"][1]["analysis"]["args"].take();
    canary["steps"] = steps(trial, analyses, &arguments);
    if !label {
        let labels = canary["canaryMetadata"]["labels"].as_object_mut().unwrap();
        labels.remove("coalmine.dev/rollout").unwrap();
    }
    stage.apply(&rollout);
    wait_for_version(stage, trial, "v1");
    stage.deploy(&path(trial), version);
    nodes
}

fn steps(trial: &Trial, analyses: &[&str], arguments: &Value) -> Value {
    // As the example's comment has them.
    let of_kayenta = json!([
        { "name": "service", "value": trial.name },
        { "name": "workload", "value": trial.name },
        { "name": "stable-hash", "valueFrom": { "podTemplateHashValue": "Stable" } },
        { "name": "canary-hash", "valueFrom": { "podTemplateHashValue": "Latest" } },
    ]);
    let analyses = analyses.iter().map(|name| {
        let arguments = if *name == KAYENTA { &of_kayenta } else { arguments };
        json!({ "analysis": { "templates": [{ "templateName": name }], "args": arguments } })
    });
    [json!({ "setWeight": 50 })].into_iter().chain(analyses).collect()
}

fn path(trial: &Trial) -> String {
    trial.path(GROUP, "rollouts", trial.name)
}

/// Waits until a version is all that runs.
fn wait_for_version(stage: &Stage, trial: &Trial, version: &str) {
    patiently(&format!("{}: {version} is everywhere", trial.name), || {
        let object = stage.get(&path(trial));
        let (spec, status) = (&object["spec"], &object["status"]);
        assert!(status["abort"] != true, "{}: {status}", trial.name);
        let wanted = &spec["template"]["metadata"]["labels"]["app.kubernetes.io/version"];
        // The status is of the template only if it was seen.
        let generation = object["metadata"]["generation"].to_string();
        let is_seen = status["observedGeneration"] == generation.as_str();
        let is_stable = status["stableRS"].is_string() && status["stableRS"] == status["currentPodHash"];
        (*wanted == version && is_seen && is_stable && status["phase"] == "Healthy").then_some(())
    });
}

fn wait_for_abort(stage: &Stage, trial: &Trial) -> Value {
    stage.wait(&path(trial), "is aborted", |status| {
        status["abort"] == true && status["phase"] == "Degraded"
    })
}

/// How many measurements of a trial came out so: `successful`, `failed`, `inconclusive` or `error`.
fn measured(stage: &Stage, trial: &Trial, outcome: &str) -> u64 {
    let runs = stage.get(&trial.path(GROUP, "analysisruns", ""));
    let runs = runs["items"].as_array().unwrap();
    let results = runs
        .iter()
        .filter_map(|run| run["status"]["metricResults"].as_array());
    let counts = results.flatten().filter_map(|result| result[outcome].as_u64());
    counts.sum()
}

fn all_providers_let_a_healthy_canary_go_on(stage: &Stage) {
    let _nodes = begin(stage, &HEALTHY, "v2", &[WEB, PROMETHEUS, KAYENTA], true);
    wait_for_version(stage, &HEALTHY, "v2");
    let rollouts = stage.rollouts(&HEALTHY);
    // Each provider asked for the same one.
    assert_eq!(rollouts.len(), 1, "{rollouts:?}");
    let rollout = &rollouts[0];
    assert_eq!(rollout["canary_version"], "v2", "{rollout}");
    assert_eq!(rollout["workload"]["kind"], "Rollout", "{rollout}");
    // Two in a row of those that ask again, and one that lasts.
    assert!(measured(stage, &HEALTHY, "successful") >= 5);
}

fn one_tenants_errors_abort_it(stage: &Stage) {
    let _nodes = begin(stage, &BROKEN, "v2-broken", &[WEB], true);
    wait_for_abort(stage, &BROKEN);
    let rollout = stage.wait_for_rollout(&BROKEN, "is rolled back", |rollout| {
        rollout["verdict"] == "ROLLBACK"
    });
    assert_eq!(rollout["worst_tenant"], FAILING, "{rollout}");
    let decision = rollout["decision_id"].as_str().unwrap();
    let annotation = format!("{DECISION}: {decision}");
    let parts = ["CoalmineRollback", "RolloutAborted", FAILING, &annotation];
    stage.wait_for_description(&BROKEN, "rollout", &parts);
}

fn a_held_canary_waits_until_it_is_approved(stage: &Stage) {
    let _nodes = begin(stage, &HELD, "v2", &[PROMETHEUS], true);
    let rollout = stage.wait_for_rollout(&HELD, "is begun", |_| true);
    stage.decide(&rollout, Some("hold"));
    stage.wait_for_rollout(&HELD, "would be approved", |rollout| {
        rollout["overridden"]["judged"] == "APPROVE"
    });
    let before = measured(stage, &HELD, "inconclusive");
    patiently("Argo asks, and waits", || {
        (measured(stage, &HELD, "inconclusive") > before).then_some(())
    });
    assert_eq!(measured(stage, &HELD, "failed"), 0);
    stage.decide(&rollout, None);
    wait_for_version(stage, &HELD, "v2");
}

/// Here the analysis alone aborts: it has begun the rollout, so nothing else is known to be halted.
fn a_hold_ends_at_its_deadline(stage: &Stage) {
    let _nodes = begin(stage, &EXPIRED, "v2", &[KAYENTA], false);
    let aborted = wait_for_abort(stage, &EXPIRED);
    let message = aborted["status"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("assessed Failed"), "{message}");
    let rollouts = stage.rollouts(&EXPIRED);
    assert_eq!(rollouts.len(), 1, "{rollouts:?}");
    let rollout = &rollouts[0];
    let reason = rollout["reason"].as_str().unwrap();
    assert!(reason.contains("hold_deadline"), "{rollout}");
    assert_eq!(rollout["workload"], Value::Null, "{rollout}");
}

fn an_outage_aborts_nothing(stage: &Stage, aggregator: &mut Aggregator) {
    // Nobody injects while it is away: by now the other canaries have their pods.
    for trial in [HEALTHY, BROKEN, HELD, EXPIRED] {
        stage.wait_for_rollout(&trial, "is begun", |_| true);
    }
    let _nodes = begin(stage, &RESTARTED, "v2", &[WEB], true);
    let rollout = stage.wait_for_rollout(&RESTARTED, "is begun", |_| true);
    patiently("Argo asks", || {
        let outcomes = ["successful", "inconclusive", "error"];
        let all: u64 = outcomes
            .map(|outcome| measured(stage, &RESTARTED, outcome))
            .iter()
            .sum();
        (all > 0).then_some(())
    });
    aggregator.kill_9();
    let before = measured(stage, &RESTARTED, "error");
    patiently("Argo meets the outage", || {
        (measured(stage, &RESTARTED, "error") > before).then_some(())
    });
    aggregator.launch();
    wait_for_version(stage, &RESTARTED, "v2");
    let after = stage.rollouts(&RESTARTED);
    assert_eq!(after.len(), 1, "{after:?}");
    assert_eq!(after[0]["id"], rollout["id"]);
}
