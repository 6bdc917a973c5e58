//! Kayenta's face, asked as Argo Rollouts and Orca ask it: a config, an execution, polls until it is complete.

use std::{fs, path::Path};

use coalmine_tests::{
    components::{Agent, Aggregator, Scene},
    eventually,
    http::{Answer, get, request},
    process::free_addresses,
};
use serde_json::{Value, json};

use crate::stage;

const FAILING: &str = "stark-bank";

const RATE: u32 = 2_000;

/// What the agents of the canary do not report: the hash that Argo has for it.
const HASH: &str = "6d4f8b9c7d";

/// A HOLD that nothing ends.
const HOLDING: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1% }
  judge_window: 1s
  hold_deadline: 3s
  on_deadline: hold
  required: [errors]
";

fn send(aggregator: &Aggregator, method: &str, path: &str, body: &str) -> Answer {
    let json = [("content-type", "application/json")];
    request(aggregator.http, method, path, &json, body).unwrap()
}

fn body(experiment: &str) -> Value {
    let side = |scope: &str| {
        json!({
            "scope": scope, "location": "eu", "step": 60,
            "start": "2026-01-01T00:00:00Z", "end": "2026-01-01T01:00:00Z",
        })
    };
    json!({
        "scopes": { "default": { "controlScope": side("*"), "experimentScope": side(experiment) } },
        "thresholds": { "pass": 95, "marginal": 75 },
    })
}

/// Argo's first two requests: the config by its name, then the execution.
fn argo_begins(aggregator: &Aggregator, experiment: &str) -> String {
    let found = get(
        aggregator.http,
        "/kayenta/canaryConfig?application=checkout&configurationAccountName=any",
    );
    let found = found.unwrap();
    assert_eq!(found.status, 200, "{}", found.body);
    let configs = found.json();
    let config = configs
        .as_array()
        .unwrap()
        .iter()
        .find(|config| config["name"] == "checkout");
    let id = config.unwrap()["id"].as_str().unwrap();
    let path = format!(
        "/kayenta/canary/{id}?application=checkout&metricsAccountName=any&configurationAccountName=any&storageAccountName=any"
    );
    begun(send(aggregator, "POST", &path, &body(experiment).to_string()))
}

fn orca_begins(aggregator: &Aggregator, experiment: &str, pipeline: &str) -> String {
    let path = format!("/kayenta/canary/checkout?application=shop&parentPipelineExecutionId={pipeline}");
    begun(send(aggregator, "POST", &path, &body(experiment).to_string()))
}

/// The execution of an answer: exactly 200, and one map of texts.
fn begun(answer: Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let fields = answer.json();
    let fields = fields.as_object().unwrap();
    assert!(fields.values().all(Value::is_string), "{fields:?}");
    fields["canaryExecutionId"].as_str().unwrap().to_owned()
}

/// A poll, held to what Orca's classes must have.
fn poll(aggregator: &Aggregator, execution: &str) -> Value {
    let answer = get(
        aggregator.http,
        &format!("/kayenta/canary/{execution}?storageAccountName=any"),
    );
    let answer = answer.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert!(
        answer["complete"].is_boolean() && answer["application"].is_string(),
        "{answer}"
    );
    assert_eq!(answer["storageAccountName"], "any");
    let status = answer["status"].as_str().unwrap();
    assert!(["running", "succeeded", "terminal"].contains(&status), "{answer}");
    assert_eq!(answer["complete"], status != "running", "{answer}");
    let thresholds = &answer["canaryExecutionRequest"]["thresholds"];
    assert_eq!(*thresholds, json!({ "pass": 95, "marginal": 75 }));
    if status == "running" {
        assert!(answer.get("result").is_none(), "{answer}");
        return answer;
    }
    let judged = &answer["result"]["judgeResult"];
    assert!(
        judged["results"].is_array() && judged["score"]["score"].is_u64(),
        "{answer}"
    );
    for text in ["classification", "classificationReason"] {
        assert!(judged["score"][text].is_string(), "{answer}");
    }
    let duration = answer["result"]["canaryDuration"].as_str().unwrap();
    assert!(duration.starts_with("PT") && duration.ends_with('S'), "{answer}");
    for time in ["buildTimeIso", "startTimeIso", "endTimeIso"] {
        assert!(answer[time].as_str().unwrap().ends_with('Z'), "{answer}");
    }
    answer
}

/// Polls until the execution is complete.
fn complete(aggregator: &Aggregator, execution: &str) -> Value {
    eventually("the execution is complete", || {
        Some(poll(aggregator, execution)).filter(|answer| answer["complete"] == true)
    })
}

fn score(answer: &Value) -> &Value {
    &answer["result"]["judgeResult"]["score"]["score"]
}

fn rollouts(aggregator: &Aggregator) -> usize {
    aggregator.get("/v1/rollouts")["rollouts"]
        .as_array()
        .unwrap()
        .len()
}

/// How many records the log has.
fn records(aggregator: &Aggregator) -> usize {
    fs::read_to_string(aggregator.data.join("decisions.jsonl"))
        .unwrap()
        .lines()
        .count()
}

#[test]
fn a_failing_tenant_fails_the_canary_for_orca_and_argo_across_a_restart() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::start(directory.path());
    let scene = Scene::start(directory.path(), aggregator.grpc, Some(FAILING));
    let _load = scene.load(RATE, 80_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));

    let execution = orca_begins(&aggregator, "v2", "01ARZ3NDEKTSV4RRFFQ69G5FAV");
    let again = orca_begins(&aggregator, "v2", "01ARZ3NDEKTSV4RRFFQ69G5FAV");
    assert_eq!(again, execution, "each interval asks about the same rollout");
    aggregator.kill_9();
    aggregator.launch();
    let answer = complete(&aggregator, &execution);
    assert_eq!(
        (&answer["status"], score(&answer)),
        (&json!("succeeded"), &json!(0)),
        "{answer}"
    );
    assert_eq!(answer["coalmine"]["verdict"], "ROLLBACK", "{answer}");
    assert_eq!(answer["coalmine"]["worst_tenant"], FAILING, "{answer}");
    let reason = &answer["result"]["judgeResult"]["score"]["classificationReason"];
    assert!(
        reason.as_str().unwrap().contains(&format!("tenant {FAILING}")),
        "{answer}"
    );

    // Whoever asks about the version meanwhile is told the same, and nothing is recorded because of it.
    let before = records(&aggregator);
    let argo = argo_begins(&aggregator, "shop/checkout/v2");
    assert_eq!(score(&complete(&aggregator, &argo)), &json!(0));
    for _ in 0..100 {
        poll(&aggregator, &execution);
    }
    let beyond = fs::read_to_string(aggregator.data.join("decisions.jsonl")).unwrap();
    let mut beyond = beyond.lines().skip(before);
    assert!(beyond.all(|line| line.contains(r#""type":"heartbeat""#)));
    assert_eq!(rollouts(&aggregator), 1);

    aggregator.kill_9();
    aggregator.launch();
    let after = poll(&aggregator, &execution);
    assert_eq!(
        (score(&after), &after["coalmine"]["decision_id"]),
        (&json!(0), &answer["coalmine"]["decision_id"])
    );

    // Another pipeline is another attempt, and the one before is over.
    let next = orca_begins(&aggregator, "v2", "01BX5ZZKBKACTAV9WEVGEMMVRZ");
    assert_ne!(next, execution);
    assert_eq!(
        score(&poll(&aggregator, &execution)),
        &json!(0),
        "it keeps its verdict"
    );
    assert_eq!(rollouts(&aggregator), 2);
}

#[test]
fn a_healthy_canary_passes_and_is_found_by_the_hash_of_its_pods() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let unknown = send(
        &aggregator,
        "POST",
        "/kayenta/canary/checkout",
        &body(&format!("shop/checkout/{HASH}")).to_string(),
    );
    assert_eq!(
        unknown.status, 409,
        "nobody knows which version it is: {}",
        unknown.body
    );
    let scene = Scene::start(directory.path(), aggregator.grpc, None);
    let _load = scene.load(RATE, 80_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));

    let execution = argo_begins(&aggregator, &format!("shop/checkout/{HASH}"));
    let first = poll(&aggregator, &execution);
    assert_eq!(
        (&first["complete"], &first["status"]),
        (&json!(false), &json!("running"))
    );
    let list = aggregator.get("/v1/rollouts");
    assert_eq!(list["rollouts"][0]["canary_version"], "v2", "{list}");
    let standalone = send(
        &aggregator,
        "POST",
        "/kayenta/standalone_canary_analysis/checkout?user=ci",
        &json!({
            "scopes": [{ "experimentScope": "v2", "experimentLocation": "eu" }],
            "thresholds": { "pass": 95.0, "marginal": 75.0 },
            "lifetimeDurationMins": 60,
        })
        .to_string(),
    );
    assert_eq!(standalone.status, 200, "{}", standalone.body);
    assert_eq!(
        standalone.json(),
        json!({ "canaryAnalysisExecutionId": execution })
    );

    let answer = complete(&aggregator, &execution);
    assert_eq!(
        (&answer["status"], score(&answer)),
        (&json!("succeeded"), &json!(100)),
        "{answer}"
    );
    let analysis = aggregator.get(&format!("/kayenta/standalone_canary_analysis/{execution}"));
    assert_eq!(
        (&analysis["complete"], &analysis["executionStatus"]),
        (&json!(true), &json!("SUCCEEDED"))
    );
    let result = &analysis["canaryAnalysisExecutionResult"];
    assert_eq!(
        (&result["didPassThresholds"], &result["canaryScores"]),
        (&json!(true), &json!([100])),
        "{analysis}"
    );
    let again = argo_begins(&aggregator, &format!("shop/checkout/{HASH}"));
    assert_eq!(again, execution, "the hash stands for the open rollout");
    let by_name = argo_begins(
        &aggregator,
        &format!("rollout:{}", list["rollouts"][0]["id"].as_str().unwrap()),
    );
    assert_eq!(by_name, execution);
    assert_eq!(rollouts(&aggregator), 1);
}

#[test]
fn a_hold_runs_until_its_deadline_and_an_ended_one_stops() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), HOLDING);
    aggregator.launch();
    // No agent, no traffic: nothing can be proven.
    let execution = argo_begins(&aggregator, "v2");
    assert_eq!(poll(&aggregator, &execution)["status"], "running");
    let answer = complete(&aggregator, &execution);
    assert_eq!(
        (&answer["status"], score(&answer)),
        (&json!("succeeded"), &json!(85)),
        "{answer}"
    );
    assert_eq!(answer["coalmine"]["verdict"], "HOLD");
    aggregator.kill_9();
    aggregator.launch();
    assert_eq!(score(&complete(&aggregator, &execution)), &json!(85));

    let cancel = format!("/kayenta/pipelines/{execution}/cancel");
    let cancelled = send(&aggregator, "PUT", &cancel, "\"\"");
    assert_eq!(
        (cancelled.status, cancelled.json()),
        (200, json!({ "ended": true }))
    );
    let ended = poll(&aggregator, &execution);
    assert_eq!(
        (&ended["status"], score(&ended)),
        (&json!("terminal"), &json!(85)),
        "{ended}"
    );
    let error = &ended["exception"]["details"]["errors"][0];
    assert!(error.as_str().unwrap().contains("was cancelled"), "{ended}");

    // What is over is over: the same version again is another rollout.
    let next = argo_begins(&aggregator, "v2");
    assert_ne!(next, execution);
    assert_eq!(poll(&aggregator, &next)["status"], "running");
    // What others have begun is theirs.
    send(
        &aggregator,
        "PUT",
        &format!("/kayenta/pipelines/{next}/cancel"),
        "",
    );
    let theirs = aggregator.start_rollout();
    let execution = argo_begins(&aggregator, "shop/checkout/v2");
    assert!(
        execution.starts_with(&format!("{theirs}.")),
        "{execution} is not of {theirs}"
    );
    let cancel = format!("/kayenta/pipelines/{execution}/cancel");
    let cancelled = send(&aggregator, "PUT", &cancel, "");
    assert_eq!(
        (cancelled.status, cancelled.json()),
        (200, json!({ "ended": false }))
    );
    let elsewhere = send(
        &aggregator,
        "POST",
        "/kayenta/canary/checkout",
        &body("shop/basket/v2").to_string(),
    );
    assert_eq!(elsewhere.status, 409, "{}", elsewhere.body);
}

#[test]
fn the_hash_of_the_next_version_ends_what_was_begun_for_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let first = argo_begins(&aggregator, "shop/checkout/v1");
    let next = body(&format!("shop/checkout/{HASH}")).to_string();
    let ask = || send(&aggregator, "POST", "/kayenta/canary/checkout", &next);
    let early = ask();
    assert_eq!(
        early.status, 409,
        "nobody knows what the hash stands for: {}",
        early.body
    );
    assert_eq!(poll(&aggregator, &first)["status"], "running");

    let [upstream] = free_addresses();
    let _agent = Agent::start(directory.path(), "canary-1", "canary", upstream, aggregator.grpc);
    let second = eventually("the canary's agent is connected", || {
        let answer = ask();
        (answer.status == 200).then(|| begun(answer))
    });
    assert_ne!(second, first);
    assert_eq!(poll(&aggregator, &first)["status"], "terminal");
    assert_eq!(poll(&aggregator, &second)["status"], "running");
    let list = aggregator.get("/v1/rollouts");
    let all = list["rollouts"].as_array().unwrap();
    let open = all.iter().find(|rollout| rollout["state"] != "ended").unwrap();
    assert_eq!(open["canary_version"], "v2", "{list}");
    // Without a place it is a version like any other, and nobody has seen it.
    let bare = send(
        &aggregator,
        "POST",
        "/kayenta/canary/checkout",
        &body(HASH).to_string(),
    );
    assert_eq!(bare.status, 409, "{}", bare.body);
    assert!(bare.body.contains("is still open"), "{}", bare.body);
}

/// A rollout that Argo has begun and that cannot be judged any more; gives the execution that has asked for it.
fn broken(directory: &Path) -> (Aggregator, String) {
    let policy = HOLDING.replace("3s", "1h");
    let mut aggregator = Aggregator::prepare_with(directory, &policy);
    aggregator.launch();
    let execution = argo_begins(&aggregator, "v2");
    assert_eq!(poll(&aggregator, &execution)["status"], "running");
    aggregator.kill_9();
    // The same addresses and data, another policy.
    let changed = policy.replace("judge_window: 1s", "judge_window: 2s");
    fs::write(directory.join("sla.yaml"), changed).unwrap();
    aggregator.launch();
    (aggregator, execution)
}

#[test]
fn what_can_be_judged_no_more_is_over_and_makes_way_for_another_attempt() {
    let directory = tempfile::tempdir().unwrap();
    let (aggregator, execution) = broken(directory.path());
    assert_eq!(complete(&aggregator, &execution)["status"], "terminal");
    let next = argo_begins(&aggregator, "v2");
    assert_ne!(next, execution);
    assert_eq!(poll(&aggregator, &next)["status"], "running");
    assert_eq!(argo_begins(&aggregator, "v2"), next);
}

#[test]
fn a_person_can_decide_what_can_be_judged_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let (aggregator, execution) = broken(directory.path());
    let answer = complete(&aggregator, &execution);
    assert_eq!(
        (&answer["status"], score(&answer)),
        (&json!("terminal"), &json!(85)),
        "{answer}"
    );
    let error = answer["exception"]["details"]["errors"][0].as_str().unwrap();
    assert!(error.contains("cannot be judged any more"), "{answer}");
    let id = answer["coalmine"]["rollout"].as_str().unwrap();
    let approves = json!({ "verdict": "approve", "reason": "seen" });
    let decided = aggregator.post(&format!("/v1/rollouts/{id}/override"), &approves);
    assert_eq!(decided.status, 200, "{}", decided.body);
    let answer = poll(&aggregator, &execution);
    assert_eq!(
        (&answer["status"], score(&answer)),
        (&json!("succeeded"), &json!(100)),
        "{answer}"
    );
}

#[test]
fn whoever_is_not_let_in_is_told_where_callers_of_kayenta_look() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    for path in ["/kayenta/canaryConfig", "/t/nobody/kayenta/canaryConfig"] {
        let token = [("authorization", "Bearer nobody")];
        let answer = request(aggregator.http, "GET", path, &token, "").unwrap();
        assert_eq!(answer.status, 401, "{path}: {}", answer.body);
        let fields = answer.json();
        assert!(fields["message"].is_string(), "{path}: {fields}");
        assert_eq!(fields["message"], fields["detail"]);
    }
    let elsewhere = get(aggregator.http, "/v1/rollouts/nothing").unwrap().json();
    assert!(elsewhere.get("message").is_none(), "{elsewhere}");
}

/// Sends a request that is refused with this status and with something like this, said where callers of Kayenta look.
fn refuses(aggregator: &Aggregator, (method, path, body): (&str, &str, &str), status: u16, message: &str) {
    let answer = send(aggregator, method, path, body);
    assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
    assert!(
        answer
            .head
            .to_ascii_lowercase()
            .contains("application/problem+json"),
        "{}",
        answer.head
    );
    let fields = answer.json();
    let said = fields["message"].as_str().unwrap();
    assert!(said.contains(message), "{method} {path}: {said}");
    assert_eq!(fields["message"], fields["detail"]);
}

#[test]
fn what_else_there_is_of_kayenta_is_not_offered_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let execution = argo_begins(&aggregator, "v2");
    let canary = format!("/kayenta/canary/{execution}");
    let standalone = format!("/kayenta/standalone_canary_analysis/{execution}");
    let cancel = format!("/kayenta/pipelines/{execution}/cancel");
    for (method, path) in [
        ("GET", "/kayenta/canary/executions?application=checkout"),
        ("POST", "/kayenta/canary"),
        ("PUT", &canary),
        ("DELETE", &canary),
        ("DELETE", &standalone),
        ("POST", "/kayenta/standalone_canary_analysis"),
        ("GET", &cancel),
        ("POST", "/kayenta/canaryConfig"),
        ("PUT", "/kayenta/canaryConfig/checkout"),
        ("DELETE", "/kayenta/canaryConfig/checkout"),
        ("POST", "/kayenta/credentials"),
        ("POST", "/kayenta/judges"),
        ("POST", "/kayenta/judges/judge"),
        ("DELETE", "/kayenta/health"),
        ("GET", "/kayenta/metadata/metricsService"),
        ("GET", "/kayenta/metricSetPairList/1"),
        ("POST", "/kayenta/fetch/prometheus/query"),
    ] {
        refuses(&aggregator, (method, path, "{}"), 501, "not offered");
    }
    assert_eq!(poll(&aggregator, &execution)["status"], "running");
    // A service may have that name: what is begun is begun by a config.
    let asked = body("v2").to_string();
    let begins = ("POST", "/kayenta/canary/executions", asked.as_str());
    refuses(&aggregator, begins, 404, "no canary config");
}

#[test]
fn what_makes_no_sense_is_refused_and_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), HOLDING);
    aggregator.launch();
    let canary = "/kayenta/canary/checkout";
    let standalone = "/kayenta/standalone_canary_analysis/checkout";
    let with = |field: &str, value: Value| {
        let mut body = body("v2");
        body[field] = value;
        body.to_string()
    };
    let thresholds =
        |pass: Value, marginal: Value| with("thresholds", json!({ "pass": pass, "marginal": marginal }));
    let two = json!({
        "a": { "experimentScope": { "scope": "v2" } },
        "b": { "experimentScope": { "scope": "v3" } },
    });
    let huge = with("more", json!("x".repeat(70_000)));
    let deep = format!(r#"{{"thresholds":{{"pass":{}"#, "[".repeat(10_000));
    for (method, path, body, status, message) in [
        ("POST", canary, "{".to_owned(), 400, "JSON"),
        ("POST", canary, deep, 400, "recursion"),
        ("POST", canary, huge, 413, ""),
        ("POST", canary, with("scopes", json!({})), 400, "no scopes"),
        ("POST", canary, with("scopes", json!([1])), 422, "scopes"),
        ("POST", canary, with("scopes", two), 400, "different canaries"),
        (
            "POST",
            canary,
            body("shop/v2").to_string(),
            400,
            "NAMESPACE/WORKLOAD/VERSION",
        ),
        (
            "POST",
            canary,
            body("rollout:nothing").to_string(),
            404,
            "there is no rollout",
        ),
        (
            "POST",
            canary,
            with("thresholds", json!(null)),
            400,
            "thresholds are missing",
        ),
        (
            "POST",
            canary,
            thresholds(json!(101), json!(75)),
            400,
            "thresholds.pass is 101",
        ),
        (
            "POST",
            canary,
            thresholds(json!(95), json!(0)),
            400,
            "thresholds.marginal is 0",
        ),
        (
            "POST",
            canary,
            thresholds(json!(95), json!(94)),
            400,
            "marginal + 2",
        ),
        (
            "POST",
            canary,
            thresholds(json!(95.5), json!(75)),
            400,
            "whole number",
        ),
        ("POST", standalone, "{}".to_owned(), 400, "no scopes"),
        (
            "POST",
            standalone,
            r#"{"lifetimeDurationMins":-1}"#.to_owned(),
            422,
            "lifetimeDurationMins",
        ),
        (
            "POST",
            "/kayenta/canary/basket",
            body("v2").to_string(),
            404,
            "no canary config",
        ),
        (
            "GET",
            "/kayenta/canaryConfig/basket",
            String::new(),
            404,
            "no canary config",
        ),
        (
            "GET",
            "/kayenta/canary/nothing",
            String::new(),
            404,
            "no execution",
        ),
        (
            "GET",
            "/kayenta/canary/nothing.95.75",
            String::new(),
            404,
            "no execution",
        ),
        ("GET", "/kayenta/canary/%ff.95.75", String::new(), 400, "UTF-8"),
        (
            "GET",
            "/kayenta/standalone_canary_analysis/nothing.95.75",
            String::new(),
            404,
            "no execution",
        ),
        (
            "PUT",
            "/kayenta/pipelines/nothing.95.75/cancel",
            String::new(),
            404,
            "no execution",
        ),
    ] {
        refuses(&aggregator, (method, path, &body), status, message);
    }
    let text = request(
        aggregator.http,
        "POST",
        canary,
        &[("content-type", "text/plain")],
        "{}",
    )
    .unwrap();
    assert_eq!(text.status, 415, "{}", text.body);
    assert_eq!(rollouts(&aggregator), 0, "nothing was begun");
    assert_eq!(aggregator.get("/kayenta/health"), json!({ "status": "UP" }));
    assert_eq!(aggregator.get("/kayenta/judges")[0]["name"], "coalmine");
    assert_eq!(aggregator.get("/kayenta/credentials")[0]["name"], "coalmine");
    assert_eq!(
        aggregator.get("/kayenta/canaryConfig?application=basket"),
        json!([])
    );
    let config = aggregator.get("/kayenta/canaryConfig/checkout");
    assert_eq!(config["judge"]["name"], "coalmine");
}
