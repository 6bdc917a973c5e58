//! The real Flagger, with the hooks, the metric and the policy of `deploy/examples/flagger`: five Canaries at a time, each
//! with its own pods, agents and requests.

use std::thread;

use coalmine_tests::{
    components::Aggregator,
    kubernetes::{FAILING, Nodes, Split},
    process::free_addresses,
};
use serde_json::{Value, json};

use crate::deploying::{Stage, Trial, patiently};

const ROUTES: &str = "gateway.networking.k8s.io/v1";

/// The canary's share in a route that Flagger has made.
const CANARY_WEIGHT: &str = "/spec/rules/0/backendRefs/1/weight";

const HEALTHY: Trial = Trial::named("healthy");
/// A tenant is judged from so many requests on that one in seven that fail are seen.
const BROKEN: Trial = Trial {
    requests: 100,
    ..Trial::named("broken")
};
const HELD: Trial = Trial::named("held");
/// Nothing is ever enough for it.
const EXPIRED: Trial = Trial {
    hold_deadline: "45s",
    requests: 1_000_000_000,
    ..Trial::named("expired")
};
const RESTARTED: Trial = Trial::named("restarted");

#[test]
fn canaries_are_promoted_when_approved_and_go_back_when_not() {
    let trials = [HEALTHY, BROKEN, HELD, EXPIRED, RESTARTED];
    let (mut aggregator, mut stage) = Stage::begin("flagger", &["flagger.yaml", "gateway.yaml"], &trials);
    run_flagger(&mut stage);
    thread::scope(|scope| {
        scope.spawn(|| a_healthy_canary_is_promoted(&stage));
        scope.spawn(|| one_tenants_errors_send_it_back(&stage));
        scope.spawn(|| a_held_canary_waits_until_it_is_approved(&stage));
        scope.spawn(|| a_hold_ends_at_its_deadline(&stage));
        an_outage_aborts_nothing(&stage, &mut aggregator);
    });
}

fn run_flagger(stage: &mut Stage) {
    let [port] = free_addresses();
    let metrics = format!(
        "-metrics-server=http://flagger:{}@{}",
        stage.tool_token, stage.http
    );
    let arguments: [&str; 6] = [
        &stage.kubeconfig("-kubeconfig"),
        "-mesh-provider=gatewayapi:v1",
        &metrics,
        &format!("-port={}", port.port()),
        "-log-level=info",
        "-zap-encoding=console",
    ];
    stage.run("flagger", &arguments);
    patiently("Flagger finds its metrics server online", || {
        let said = stage.said("flagger");
        said.contains("Connected to metrics server").then_some(())
    });
}

/// Makes the Canary of a trial, and the Deployment that it is for; gives their nodes once another version is deployed.
fn begin(stage: &Stage, trial: &Trial, version: &str) -> Nodes {
    stage.apply_token(trial);
    for file in ["metrictemplate.yaml", "canary.yaml"] {
        for object in stage.example(trial, &format!("flagger/{file}")) {
            stage.apply(&fitted(object));
        }
    }
    let object = trial.path(ROUTES, "httproutes", trial.name);
    let pointer = CANARY_WEIGHT;
    let nodes = stage.nodes(trial, Split::Weight { object, pointer });
    let mut template = trial.template("v1");
    template["metadata"]["labels"]["coalmine.dev/arm"] = json!("flagger");
    stage.apply(&json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": trial.name, "namespace": trial.name },
        "spec": {
            "replicas": 1,
            "selector": { "matchLabels": { "app": trial.name } },
            "template": template,
        },
    }));
    wait_for_phase(stage, trial, "Initialized");
    stage.deploy(&deployment(trial, ""), version);
    nodes
}

/// The example, but quicker.
fn fitted(mut object: Value) -> Value {
    if object["kind"] == "Canary" {
        let analysis = &mut object["spec"]["analysis"];
        // The shortest that Flagger takes.
        analysis["interval"] = json!("10s");
        analysis["stepWeight"] = json!(50);
        analysis["maxWeight"] = json!(50);
    }
    object
}

fn canary(trial: &Trial) -> String {
    trial.path("flagger.app/v1beta1", "canaries", trial.name)
}

fn deployment(trial: &Trial, suffix: &str) -> String {
    trial.path("apps/v1", "deployments", &format!("{}{suffix}", trial.name))
}

fn wait_for_phase(stage: &Stage, trial: &Trial, phase: &str) {
    stage.wait(&canary(trial), &format!("is {phase}"), |status| {
        status["phase"] == phase
    });
}

/// The version of what takes the requests when nothing is on trial.
fn primary_version(stage: &Stage, trial: &Trial) -> Value {
    let primary = stage.get(&deployment(trial, "-primary"));
    primary["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/version"].clone()
}

/// How often Flagger said that it does not go on. Its log has it all: of the Events of one object, only so many are kept.
fn halts(stage: &Stage, trial: &Trial) -> usize {
    let halt = format!("Halt {name}.{name} advancement waiting for", name = trial.name);
    stage.said("flagger").matches(&halt).count()
}

fn a_healthy_canary_is_promoted(stage: &Stage) {
    let _nodes = begin(stage, &HEALTHY, "v2");
    wait_for_phase(stage, &HEALTHY, "Succeeded");
    assert_eq!(primary_version(stage, &HEALTHY), "v2");
    let rollout = stage.wait_for_rollout(&HEALTHY, "is ended", |rollout| rollout["state"] == "ended");
    // Nothing was led to it before Coalmine let it.
    assert_eq!(rollout["bootstrapped"], true, "{rollout}");
    assert_eq!(rollout["canary_version"], "v2", "{rollout}");
    assert_eq!(rollout["workload"]["kind"], "Canary", "{rollout}");
    assert_eq!(stage.rollouts(&HEALTHY).len(), 1);
}

fn one_tenants_errors_send_it_back(stage: &Stage) {
    let _nodes = begin(stage, &BROKEN, "v2-broken");
    wait_for_phase(stage, &BROKEN, "Failed");
    assert_eq!(primary_version(stage, &BROKEN), "v1");
    let rollout = stage.wait_for_rollout(&BROKEN, "is ended", |rollout| rollout["state"] == "ended");
    assert_eq!(rollout["verdict"], "ROLLBACK", "{rollout}");
    assert_eq!(rollout["worst_tenant"], FAILING, "{rollout}");
    let decision = rollout["decision_id"].as_str().unwrap();
    stage.wait_for_description(&BROKEN, "canary", &["CoalmineRollback", FAILING, decision]);
}

fn a_held_canary_waits_until_it_is_approved(stage: &Stage) {
    let _nodes = begin(stage, &HELD, "v2");
    // An override is no reason to let a canary have its first requests, so these come before.
    let rollout = stage.wait_for_rollout(&HELD, "has its first requests", |rollout| {
        rollout["bootstrapped"] == true
    });
    stage.decide(&rollout, Some("hold"));
    // Flagger does not say why it waits, and a HOLD after a HOLD is no other verdict: it is told all the same.
    let held = stage.wait_for_rollout(&HELD, "is held by a person", |rollout| {
        rollout["overridden"]["verdict"] == "HOLD"
    });
    let decision = held["decision_id"].as_str().unwrap();
    let parts = ["CoalmineHold", decision, "has decided: a rehearsal"];
    stage.wait_for_description(&HELD, "canary", &parts);
    stage.wait_for_rollout(&HELD, "would be approved", |rollout| {
        rollout["overridden"]["judged"] == "APPROVE"
    });
    let before = halts(stage, &HELD);
    patiently("Flagger waits", || (halts(stage, &HELD) > before).then_some(()));
    let phase = stage.get(&canary(&HELD))["status"]["phase"].clone();
    assert!(phase == "Progressing" || phase == "WaitingPromotion", "{phase}");
    assert_eq!(primary_version(stage, &HELD), "v1");
    stage.decide(&rollout, None);
    wait_for_phase(stage, &HELD, "Succeeded");
    assert_eq!(primary_version(stage, &HELD), "v2");
}

fn a_hold_ends_at_its_deadline(stage: &Stage) {
    let _nodes = begin(stage, &EXPIRED, "v2");
    wait_for_phase(stage, &EXPIRED, "Failed");
    assert_eq!(primary_version(stage, &EXPIRED), "v1");
    // Why it was held stands there still.
    let parts = ["CoalmineHold", "CoalmineRollback", "hold_deadline"];
    stage.wait_for_description(&EXPIRED, "canary", &parts);
}

fn an_outage_aborts_nothing(stage: &Stage, aggregator: &mut Aggregator) {
    // Nobody injects while it is away: by now the other canaries have their pods.
    for trial in [HEALTHY, BROKEN, HELD, EXPIRED] {
        stage.wait_for_rollout(&trial, "is begun", |_| true);
    }
    let _nodes = begin(stage, &RESTARTED, "v2");
    let path = canary(&RESTARTED);
    stage.wait(&path, "has requests", |status| status["canaryWeight"] == 50);
    let before = stage.rollouts(&RESTARTED);
    aggregator.kill_9();
    stage.wait(&path, "has met the outage", |status| {
        status["failedChecks"].as_u64() >= Some(1)
    });
    aggregator.launch();
    wait_for_phase(stage, &RESTARTED, "Succeeded");
    assert_eq!(primary_version(stage, &RESTARTED), "v2");
    let after = stage.rollouts(&RESTARTED);
    assert_eq!(after.len(), 1, "it is the same attempt: {after:?}");
    assert_eq!(after[0]["id"], before[0]["id"]);
}
