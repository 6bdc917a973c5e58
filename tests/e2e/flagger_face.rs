//! Flagger's side of a rollout, played by HTTP against a real aggregator: which hooks pass, and which rollouts there are.

use std::{fs, net::SocketAddr, path::Path, thread};

use coalmine_tests::{
    components::{Agent, Aggregator, Scene},
    eventually,
    http::{Answer, get, post, request},
    process::{coalmine, free_addresses},
};
use serde_json::{Value, json};

use crate::stage;

const FAILING: &str = "stark-bank";

/// A HOLD that ends soon.
const SHORT_HOLD: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1% }
  judge_window: 1s
  hold_deadline: 3s
  required: [errors]
";

/// One revision of the Canary shop/checkout, as Flagger tells of it.
#[derive(Clone, Copy)]
struct Revision {
    http: SocketAddr,
    checksum: &'static str,
}

impl Revision {
    fn body(self, phase: &str) -> Value {
        json!({
            "name": "checkout", "namespace": "shop", "phase": phase, "checksum": self.checksum,
            "metadata": { "service": "checkout" },
        })
    }

    fn call(self, path: &str, body: &Value) -> Answer {
        post(self.http, path, body).unwrap()
    }

    fn hook(self, hook: &str, phase: &str) -> Answer {
        self.call(&format!("/v1/flagger/{hook}"), &self.body(phase))
    }

    /// The same with a token, which Flagger presents among the metadata.
    fn call_with(self, token: &str, path: &str) -> Answer {
        let mut body = self.body("Progressing");
        body["metadata"]["token"] = json!(token);
        self.call(path, &body)
    }

    /// Whether Flagger takes the answer for a success: it goes by the status alone, and 202 is the last that passes.
    fn passes(self, hook: &str) -> bool {
        let answer = self.hook(hook, "Progressing");
        assert!(matches!(answer.status, 200 | 403), "{hook}: {}", answer.body);
        answer.status <= 202
    }

    fn event(self, message: &str) -> u16 {
        let mut body = self.body("Progressing");
        body["metadata"]["eventMessage"] = json!(message);
        body["metadata"]["eventType"] = json!("Normal");
        body["metadata"]["timestamp"] = json!("1700000000000");
        self.call("/v1/flagger/event", &body).status
    }

    /// Opens or closes a gate, as people do it: nothing says that the body is JSON.
    fn turn(self, gate: &str, metadata: &Value) -> Answer {
        let body = json!({ "name": "checkout", "namespace": "shop", "metadata": metadata });
        request(self.http, "POST", gate, &[], &body.to_string()).unwrap()
    }
}

fn revision(aggregator: &Aggregator, checksum: &'static str) -> Revision {
    Revision {
        http: aggregator.http,
        checksum,
    }
}

/// All rollouts, oldest first.
fn rollouts(aggregator: &Aggregator) -> Vec<Value> {
    let mut all = aggregator.get("/v1/rollouts")["rollouts"]
        .as_array()
        .unwrap()
        .clone();
    all.sort_by_key(|rollout| (rollout["state"] != "ended", rollout["start_ms"].as_u64()));
    all
}

fn keys(aggregator: &Aggregator) -> Vec<String> {
    let mut keys: Vec<_> = rollouts(aggregator)
        .iter()
        .map(|rollout| text(&rollout["key"]))
        .collect();
    keys.sort();
    keys
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
        .to_owned()
}

/// The rollout that is open.
fn open(aggregator: &Aggregator) -> Value {
    let all = rollouts(aggregator);
    let mut open = all.into_iter().filter(|rollout| rollout["state"] != "ended");
    let found = open.next().unwrap();
    assert_eq!(open.next(), None, "two are open");
    found
}

/// Starts the instances with their agents, and waits until all agents are connected.
fn connected(directory: &Path, aggregator: &Aggregator, failing: Option<&str>) -> Scene {
    let scene = Scene::start(directory, aggregator.grpc, failing);
    for agent in &scene.agents {
        eventually("the agent is connected", || {
            let metrics = get(agent.admin, "/metrics").ok()?.body;
            metrics
                .contains("coalmine_agent_session_connected 1")
                .then_some(())
        });
    }
    scene
}

#[test]
fn a_healthy_canary_gets_its_first_traffic_and_then_all_of_it() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let scene = connected(directory.path(), &aggregator, None);
    let run = revision(&aggregator, "5d7f9c");

    assert_eq!(run.hook("confirm-rollout", "Initialized").status, 200);
    assert_eq!(run.event("New revision detected! Scaling up checkout.shop"), 200);
    assert_eq!(rollouts(&aggregator).len(), 0, "nothing is on trial yet");

    // Flagger asks for a way back before anything else.
    assert!(!run.passes("rollback"));
    assert!(run.passes("pre-rollout"));
    let rollout = open(&aggregator);
    assert_eq!(rollout["key"], "flagger/shop/checkout/5d7f9c/1");
    assert_eq!(
        (&rollout["canary_version"], &rollout["actor"]),
        (&json!("v2"), &json!("flagger"))
    );
    let workload = json!({ "kind": "Canary", "namespace": "shop", "name": "checkout" });
    assert_eq!(rollout["workload"], workload);
    let id = text(&rollout["id"]);

    // Without traffic nothing can be judged, so the first is granted; a hook that is called again hears the same.
    for _ in 0..2 {
        let granted = run.hook("confirm-traffic-increase", "Progressing");
        assert_eq!(granted.status, 200, "{}", granted.body);
        assert!(granted.body.starts_with("BOOTSTRAP"), "{}", granted.body);
    }
    assert!(!run.passes("confirm-promotion"), "that is for traffic alone");
    assert_eq!(open(&aggregator)["bootstrapped"], true);
    let record = aggregator.get(&format!("/v1/decisions/{id}-bootstrap"));
    assert_eq!(record["record"]["body"]["type"], "bootstrap", "{record}");

    // Flagger comes again as it came at first: it could not act on the grant, so there is another.
    assert!(!run.passes("rollback") && run.passes("pre-rollout"));
    let granted = run.hook("confirm-traffic-increase", "Progressing");
    assert!(granted.body.starts_with("BOOTSTRAP"), "{}", granted.body);
    // It leads traffic to the canary now, and no more than the first is granted.
    assert!(
        !run.passes("rollback") && run.passes("rollout"),
        "HOLD is no failed check"
    );
    assert!(!run.passes("confirm-traffic-increase"));

    let _load = scene.load(2_000, 80_000);
    let gate = aggregator.wait_for_verdict(&id, &["ROLLBACK", "APPROVE"]);
    assert_eq!(gate["verdict"], "APPROVE", "{gate}");
    let increase = run.hook("confirm-traffic-increase", "Progressing");
    assert_eq!(increase.status, 200, "{}", increase.body);
    assert!(
        increase.body.starts_with("APPROVE (") && increase.body.contains(&id),
        "{}",
        increase.body
    );
    assert!(run.passes("rollout") && run.passes("confirm-promotion") && !run.passes("rollback"));

    assert_eq!(run.hook("post-rollout", "Succeeded").status, 200);
    let ended = aggregator.get(&format!("/v1/rollouts/{id}"));
    assert_eq!(ended["state"], "ended");
    assert!(text(&ended["ended"]["reason"]).contains("Succeeded"), "{ended}");
    // Twice does no harm, and nothing begins any more.
    assert_eq!(run.hook("post-rollout", "Succeeded").status, 200);
    assert_eq!(run.hook("rollback", "Promoting").status, 503);
    assert_eq!(rollouts(&aggregator).len(), 1);
}

/// Makes a token for checkout in this file.
fn create_token(file: &Path, name: &str, scopes: &str) -> String {
    let wanted = format!("token create --name {name} --scope {scopes} --service checkout --file");
    let created = coalmine(wanted.split(' ').chain([file.to_str().unwrap()]));
    assert!(created.status.success(), "{created:?}");
    String::from_utf8(created.stdout).unwrap().trim().to_owned()
}

/// An aggregator with this file of tokens, which everybody may ask.
fn with_tokens(directory: &Path, file: &Path) -> Aggregator {
    let arguments = ["--tokens", file.to_str().unwrap(), "--anonymous", "gate"];
    let mut aggregator = Aggregator::prepare(directory).with_arguments(&arguments);
    aggregator.launch();
    aggregator
}

/// Otherwise whoever may only ask could keep its first traffic from a canary.
#[test]
fn what_is_remembered_of_the_traffic_is_from_whoever_may_change_something() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let token = create_token(&file, "flagger", "gate,rollout");
    let aggregator = with_tokens(directory.path(), &file);
    let _scene = connected(directory.path(), &aggregator, None);
    let run = revision(&aggregator, "5d7f9c");
    let by_flagger = |hook: &str| run.call_with(&token, &format!("/v1/flagger/{hook}"));
    let begun = by_flagger("pre-rollout");
    assert_eq!(begun.status, 200, "{}", begun.body);
    // Nobody in particular says that traffic is led to the canary.
    assert!(run.passes("rollout"), "HOLD is no failed check");
    let granted = by_flagger("confirm-traffic-increase");
    assert!(granted.body.starts_with("BOOTSTRAP"), "{}", granted.body);
    // Flagger says it.
    assert_eq!(by_flagger("rollout").status, 200);
    let refused = by_flagger("confirm-traffic-increase");
    assert_eq!(refused.status, 403, "{}", refused.body);
}

#[test]
fn a_verdict_on_one_revision_is_none_on_the_next_for_whoever_may_only_ask() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let deploys = create_token(&file, "flagger", "gate,rollout,override");
    let asks = create_token(&file, "reader", "gate");
    let aggregator = with_tokens(directory.path(), &file);
    let (first, next) = (revision(&aggregator, "aaaa"), revision(&aggregator, "bbbb"));
    let promotes = "/v1/flagger/confirm-promotion";
    assert_eq!(first.call_with(&deploys, "/v1/flagger/pre-rollout").status, 200);
    assert_eq!(first.call_with(&deploys, "/gate/open").status, 202);
    let approved = first.call_with(&asks, promotes);
    assert_eq!(approved.status, 200, "{}", approved.body);
    // That the first is over was never told, so it is open still.
    for path in [promotes, "/gate/check", "/rollback/check", "/v1/flagger/rollout"] {
        let held = next.call_with(&asks, path);
        assert_eq!(held.status, 503, "{path}: {}", held.body);
        assert!(held.body.contains("is of another revision"), "{}", held.body);
    }
    assert_eq!(keys(&aggregator), ["flagger/shop/checkout/aaaa/1/unknown"]);
    // Whoever may begin another does, and then there is a verdict on it for everybody.
    for token in [&deploys, &asks] {
        let answer = next.call_with(token, promotes);
        assert_eq!(answer.status, 403, "{}", answer.body);
        assert!(answer.body.starts_with("HOLD ("), "{}", answer.body);
    }
    assert_eq!(open(&aggregator)["key"], "flagger/shop/checkout/bbbb/1/unknown");
}

#[test]
fn a_failing_tenant_sends_the_canary_back() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let scene = connected(directory.path(), &aggregator, Some(FAILING));
    let run = revision(&aggregator, "5d7f9c");
    assert!(!run.passes("rollback") && run.passes("pre-rollout"));
    let id = text(&open(&aggregator)["id"]);
    let _load = scene.load(2_000, 80_000);
    let gate = aggregator.wait_for_verdict(&id, &["ROLLBACK", "APPROVE"]);
    assert_eq!(gate["verdict"], "ROLLBACK", "{gate}");

    let refused = run.hook("rollout", "Progressing");
    assert_eq!(refused.status, 403, "{}", refused.body);
    assert!(
        refused.body.starts_with("ROLLBACK (") && refused.body.contains(FAILING),
        "{}",
        refused.body
    );
    assert!(!run.passes("confirm-traffic-increase") && !run.passes("confirm-promotion"));
    assert!(run.passes("rollback"), "go back");
    // Until Flagger has done it, it hears the same, also where it has not led any traffic to it yet.
    assert!(run.passes("rollback") && !run.passes("pre-rollout") && !run.passes("rollout"));
    assert_eq!(open(&aggregator)["id"], id.as_str());

    assert_eq!(run.hook("post-rollout", "Failed").status, 200);
    assert!(!run.passes("rollback") && run.passes("pre-rollout"));
    let again = open(&aggregator);
    assert_eq!(again["key"], "flagger/shop/checkout/5d7f9c/2");
    assert_eq!(aggregator.get(&format!("/v1/rollouts/{id}"))["state"], "ended");
}

#[test]
fn a_hold_past_its_deadline_opens_the_way_back_and_needs_no_agent() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), SHORT_HOLD);
    aggregator.launch();
    let run = revision(&aggregator, "5d7f9c");
    assert!(!run.passes("rollback") && run.passes("pre-rollout"));
    let rollout = open(&aggregator);
    assert_eq!(rollout["canary_version"], "unknown");
    // Without an agent there is nobody whom first traffic would reach.
    assert!(!run.passes("confirm-traffic-increase"));
    // To call pre-rollout again, as Flagger does while the first increase waits, is no new attempt.
    eventually("the deadline opens the way back", || {
        (run.passes("rollback") && !run.passes("pre-rollout")).then_some(())
    });
    assert_eq!(rollouts(&aggregator).len(), 1);
    assert!(!run.passes("rollout"));
    assert_eq!(open(&aggregator)["id"], rollout["id"]);
}

#[test]
fn an_attempt_survives_a_crash_and_concurrent_calls_begin_one() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::start(directory.path());
    let run = revision(&aggregator, "5d7f9c");
    let calls: Vec<_> = ["pre-rollout", "rollback", "confirm-traffic-increase", "rollout"]
        .into_iter()
        .cycle()
        .take(12)
        .map(|hook| thread::spawn(move || run.hook(hook, "Progressing").status))
        .collect();
    for call in calls {
        assert!(matches!(call.join().unwrap(), 200 | 403));
    }
    assert_eq!(keys(&aggregator), ["flagger/shop/checkout/5d7f9c/1/unknown"]);
    assert_eq!(run.turn("/gate/close", &json!({})).status, 202);
    let before = open(&aggregator);

    aggregator.kill_9();
    aggregator.launch();
    assert!(!run.passes("rollback") && run.passes("pre-rollout") && !run.passes("confirm-promotion"));
    let after = open(&aggregator);
    assert_eq!(
        (&after["id"], &after["overridden"]),
        (&before["id"], &before["overridden"])
    );
    assert_eq!(rollouts(&aggregator).len(), 1);
    assert_eq!(
        run.hook("confirm-rollout", "Waiting").status,
        403,
        "a person holds it"
    );
}

#[test]
fn a_revision_that_comes_again_is_another_attempt() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let (v2, v3) = (revision(&aggregator, "aaaa"), revision(&aggregator, "bbbb"));
    assert!(!v2.passes("rollback") && v2.passes("pre-rollout"));
    assert!(!v2.passes("rollback") && v2.passes("rollout"));
    assert_eq!(v2.hook("post-rollout", "Succeeded").status, 200);
    assert!(!v3.passes("rollback") && v3.passes("pre-rollout"));
    // Flagger was away when this one ended. The first that it asks of the next one is the way back.
    assert!(!v2.passes("rollback"));
    let expected = ["aaaa/1/unknown", "aaaa/2/unknown", "bbbb/1/unknown"];
    assert_eq!(
        keys(&aggregator),
        expected.map(|key| format!("flagger/shop/checkout/{key}"))
    );
    let first = open(&aggregator);
    assert_eq!(first["key"], "flagger/shop/checkout/aaaa/2/unknown");

    assert_eq!(v2.event("Advance checkout.shop canary weight 10"), 200);
    assert_eq!(open(&aggregator)["id"], first["id"], "nothing has happened");
    assert_eq!(
        v2.event("New revision detected! Restarting analysis for checkout.shop"),
        200
    );
    let ended = aggregator.get(&format!("/v1/rollouts/{}", text(&first["id"])));
    assert_eq!(ended["state"], "ended");
    assert!(
        text(&ended["ended"]["reason"]).contains("new revision"),
        "{ended}"
    );
}

#[test]
fn a_canary_that_nobody_has_named_is_named_by_its_agents() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let run = revision(&aggregator, "5d7f9c");
    assert!(run.passes("pre-rollout"));
    let before = text(&open(&aggregator)["id"]);
    let [upstream] = free_addresses();
    let _agent = Agent::start(directory.path(), "canary-1", "canary", upstream, aggregator.grpc);
    let rollout = eventually("the version is known", || {
        run.passes("rollout");
        Some(open(&aggregator)).filter(|rollout| rollout["canary_version"] == "v2")
    });
    assert_eq!(rollout["key"], "flagger/shop/checkout/5d7f9c/1");
    let ended = aggregator.get(&format!("/v1/rollouts/{before}"));
    assert!(
        text(&ended["ended"]["reason"]).contains("known now: v2"),
        "{ended}"
    );
    assert_eq!(rollouts(&aggregator).len(), 2);
}

/// What people have decided and given back, as it is on record.
fn overrides(aggregator: &Aggregator) -> Vec<Value> {
    let log = fs::read_to_string(aggregator.data.join("decisions.jsonl")).unwrap();
    // The last line may not be whole yet.
    let records = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let bodies = records.map(|mut record| record["body"].take());
    bodies.filter(|body| body["type"] == "override").collect()
}

fn is_said_by_alice(body: &Value, said: &Value) {
    assert_eq!(
        (&body["type"], &body["reason"]),
        (&json!("override"), &said["reason"])
    );
    assert!(text(&body["actor"]).ends_with("alice"), "{body}");
}

#[test]
fn a_gate_that_is_asked_before_a_canary_is_tried_lets_it_be_tried() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let run = revision(&aggregator, "5d7f9c");
    let check = |phase: &str| run.call("/gate/check", &run.body(phase)).status;
    // As Flagger's documents have it: the first canary, and one that was told to wait.
    for phase in ["Initialized", "Waiting", "Succeeded", "Failed"] {
        assert_eq!(check(phase), 200, "{phase}");
    }
    assert_eq!(rollouts(&aggregator).len(), 0, "nothing is on trial yet");
    // The same gate holds the promotion.
    assert_eq!(check("Progressing"), 403);
    assert_eq!([check("WaitingPromotion"), check("")], [403, 403]);
    // What is found of one canary does not keep the next one from being tried.
    assert_eq!(run.turn("/rollback/open", &json!({})).status, 202);
    assert_eq!([check("Failed"), check("Waiting")], [200, 200]);
}

#[test]
fn a_gate_that_is_asked_by_hand_replaces_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let run = revision(&aggregator, "5d7f9c");
    assert!(!run.passes("rollback") && run.passes("pre-rollout"));
    let id = open(&aggregator)["id"].clone();
    let by_hand = json!({ "name": "checkout", "namespace": "shop", "phase": "Progressing" });
    for path in ["/gate/check", "/rollback/check", "/v1/flagger/rollout"] {
        let answer = run.call(path, &by_hand);
        assert!(matches!(answer.status, 200 | 403), "{path}: {}", answer.body);
    }
    assert_eq!(open(&aggregator)["id"], id);
    assert_eq!(rollouts(&aggregator).len(), 1);
}

#[test]
fn gates_that_a_person_opens_and_closes_are_on_record() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let run = revision(&aggregator, "5d7f9c");
    let early = run.turn("/gate/open", &json!({}));
    assert_eq!(early.status, 404, "{}", early.body);
    assert!(early.body.contains("coalmine rollout start"), "{}", early.body);
    // A Canary that was switched over from the load tester has no other hook than these.
    let check = |path: &str| run.call(path, &run.body("Progressing")).status;
    let gates = || ["/gate/check", "/rollback/check"].map(check);
    assert_eq!(gates(), [403, 403]);
    let id = text(&open(&aggregator)["id"]);

    let said = json!({ "actor": "alice", "reason": "seen with my own eyes" });
    // The gate before the next canary: only a person's HOLD closes it.
    let before_a_canary = || {
        ["/v1/flagger/confirm-rollout", "/gate/check"].map(|path| run.call(path, &run.body("Waiting")).status)
    };
    for (gate, expected, before) in [
        ("/gate/open", [200, 403], [200, 200]),
        ("/gate/close", [403, 403], [403, 403]),
        ("/rollback/open", [403, 200], [200, 200]),
    ] {
        let turned = run.turn(gate, &said);
        assert_eq!(turned.status, 202, "{gate}: {}", turned.body);
        assert_eq!(gates(), expected, "after {gate}");
        assert_eq!(before_a_canary(), before, "after {gate}");
        let decision = text(&open(&aggregator)["decision_id"]);
        assert!(turned.body.contains(&decision), "{}", turned.body);
        let decision = aggregator.get(&format!("/v1/decisions/{decision}"));
        is_said_by_alice(&decision["record"]["body"], &said);
    }
    assert_eq!(run.turn("/rollback/close", &said).status, 202);
    assert_eq!(gates(), [403, 403], "after /rollback/close");
    let rollout = open(&aggregator);
    assert_eq!(
        (&rollout["id"], &rollout["overridden"]),
        (&json!(id), &Value::Null),
        "the judge decides again"
    );
    let given_back = overrides(&aggregator);
    assert_eq!(given_back.len(), 4, "{given_back:?}");
    is_said_by_alice(&given_back[3], &said);
    assert_eq!(given_back[3]["verdict"], Value::Null);
    // There is nothing to take back.
    assert_eq!(run.turn("/rollback/close", &said).status, 202);
    assert_eq!(overrides(&aggregator).len(), 4);
    for (gate, status) in [("/gate/approve", 200), ("/gate/halt", 403)] {
        assert_eq!(run.turn(gate, &json!({})).status, status, "{gate}");
    }
}

#[test]
fn what_somebody_else_has_begun_is_taken_and_left_to_them() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let run = revision(&aggregator, "5d7f9c");
    let id = aggregator.start_rollout();
    assert!(run.passes("pre-rollout") && !run.passes("rollback"));
    assert_eq!(run.hook("post-rollout", "Failed").status, 200);
    assert_eq!(run.event("New revision detected! Scaling up checkout.shop"), 200);
    assert_eq!(open(&aggregator)["id"], id.as_str());

    // Of another Canary, it is in the way.
    let mut other = run.body("Progressing");
    other["name"] = json!("till");
    let conflict = run.call("/v1/flagger/pre-rollout", &other);
    assert_eq!(conflict.status, 409, "{}", conflict.body);
    assert!(conflict.body.contains(&id), "{}", conflict.body);
    // Unless it is named.
    other["metadata"]["rollout"] = json!(id);
    assert_eq!(run.call("/v1/flagger/pre-rollout", &other).status, 200);
    assert_eq!(run.call("/v1/flagger/post-rollout", &other).status, 200);
    assert_eq!(open(&aggregator)["id"], id.as_str());

    // Rollouts that begin by their pods' labels name the Deployment that the Canary is for.
    aggregator.post(&format!("/v1/rollouts/{id}/end"), &json!({}));
    let request = json!({
        "service": "checkout",
        "canary_version": "v2",
        "workload": { "kind": "Deployment", "namespace": "shop", "name": "checkout" },
    });
    let id = text(&aggregator.post("/v1/rollouts", &request).json()["id"]);
    assert!(run.passes("pre-rollout") && !run.passes("rollback"));
    assert_eq!(run.hook("post-rollout", "Failed").status, 200);
    assert_eq!(aggregator.get(&format!("/v1/rollouts/{id}"))["state"], "running");
    let mut elsewhere = run.body("Progressing");
    elsewhere["namespace"] = json!("market");
    elsewhere["metadata"]["service"] = json!("checkout");
    let conflict = run.call("/v1/flagger/pre-rollout", &elsewhere);
    assert_eq!(conflict.status, 409, "{}", conflict.body);
}

#[test]
fn what_somebody_else_has_begun_for_something_else_answers_no_question() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let run = revision(&aggregator, "5d7f9c");
    let id = aggregator.start_rollout();
    let in_the_way = |path: &str, body: &Value, says: &str| {
        let answer = run.call(path, body);
        assert_eq!(answer.status, 409, "{path}: {}", answer.body);
        assert!(
            answer.body.contains(&id) && answer.body.contains(says),
            "{path}: {}",
            answer.body
        );
    };
    // The verdict on v2 is none on v3.
    let mut next = run.body("Progressing");
    next["metadata"]["version"] = json!("v3");
    for path in [
        "/v1/flagger/pre-rollout",
        "/v1/flagger/rollback",
        "/gate/check",
        "/gate/open",
    ] {
        in_the_way(
            path,
            &next,
            "is of checkout v2, and the Canary shop/checkout is v3",
        );
    }
    // That is so where nothing would begin, too.
    next["phase"] = json!("Promoting");
    in_the_way("/v1/flagger/rollback", &next, "is v3");
    next["phase"] = json!("Waiting");
    assert_eq!(run.call("/v1/flagger/confirm-rollout", &next).status, 200);
    // Unless it is named.
    next["metadata"]["rollout"] = json!(id);
    assert_eq!(run.call("/v1/flagger/rollback", &next).status, 403);
    let mut same = run.body("Progressing");
    same["metadata"]["version"] = json!("v2");
    assert_eq!(run.call("/v1/flagger/pre-rollout", &same).status, 200);

    // A Deployment of another name is another one's, as long as nobody says that it is the service's.
    aggregator.post(&format!("/v1/rollouts/{id}/end"), &json!({}));
    let request = json!({
        "service": "checkout",
        "canary_version": "v2",
        "workload": { "kind": "Deployment", "namespace": "shop", "name": "till" },
    });
    let id = text(&aggregator.post("/v1/rollouts", &request).json()["id"]);
    let unnamed =
        json!({ "name": "checkout", "namespace": "shop", "phase": "Progressing", "checksum": "5d7f9c" });
    let conflict = run.call("/v1/flagger/pre-rollout", &unnamed);
    assert_eq!(conflict.status, 409, "{}", conflict.body);
    assert!(
        conflict.body.contains("of Deployment shop/till"),
        "{}",
        conflict.body
    );
    assert!(run.passes("pre-rollout"));
    assert_eq!(open(&aggregator)["id"], id.as_str());
}

#[test]
fn a_canary_that_is_not_called_like_its_service_is_known_by_the_rollout_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let http = aggregator.http;
    let body = |name: &str, metadata: Value| {
        json!({
            "name": name, "namespace": "shop", "phase": "Progressing", "checksum": "1", "metadata": metadata,
        })
    };
    let ask = |body: &Value| post(http, "/v1/flagger/rollout", body).unwrap();
    let begun = |name: &str| {
        let workload = json!({ "kind": "Canary", "namespace": "shop", "name": name });
        let request = json!({ "service": "checkout", "canary_version": "v2", "workload": workload });
        text(&aggregator.post("/v1/rollouts", &request).json()["id"])
    };
    let id = begun("till");
    let answer = ask(&body("till", json!({})));
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.body.contains(&id), "{}", answer.body);
    // Whoever says which service it is means no other.
    let answer = ask(&body("till", json!({ "service": "till" })));
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert!(answer.body.contains("checkout"), "{}", answer.body);
    let answer = ask(&body("till", json!({ "service": "checkout" })));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[test]
fn what_cannot_be_answered_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let good = revision(&aggregator, "5d7f9c").body("Progressing");
    let with = |field: &str, value: Value| {
        let mut body = good.clone();
        body[field] = value;
        body
    };
    let table = [
        (
            "/v1/flagger/rolout",
            good.clone(),
            404,
            "confirm-traffic-increase",
        ),
        ("/gate/shut", good.clone(), 404, "check, open, close"),
        ("/rollback/approve", good.clone(), 404, "check, open, close"),
        (
            "/v1/flagger/rollout",
            with("metadata", json!({ "service": "cart" })),
            404,
            "metadata.service",
        ),
        (
            "/v1/flagger/rollout",
            with("metadata", json!({ "rollout": "none-1" })),
            404,
            "none-1",
        ),
        (
            "/v1/flagger/rollout",
            with("phase", json!("Promoting")),
            503,
            "no rollout of the Canary shop/checkout",
        ),
        (
            "/v1/flagger/rollout",
            with("name", json!("Check out")),
            400,
            "as Kubernetes has it",
        ),
        (
            "/v1/flagger/rollout",
            with("checksum", json!("x".repeat(65))),
            400,
            "checksum",
        ),
        (
            "/v1/flagger/rollout",
            with("metadata", json!({ "version": "v 2" })),
            400,
            "metadata.version",
        ),
        (
            "/v1/flagger/rollout",
            with("metadata", json!([])),
            422,
            "metadata",
        ),
        ("/gate/check", with("name", json!(7)), 422, "name"),
        (
            "/gate/check",
            with("checksum", json!("x".repeat(100_000))),
            413,
            "length limit",
        ),
    ];
    for (path, body, status, says) in table {
        let answer = post(aggregator.http, path, &body).unwrap();
        assert_eq!(answer.status, status, "{path} {}", answer.body);
        assert!(answer.body.contains(says), "{path} {}", answer.body);
        assert!(
            answer.head.to_lowercase().contains("application/problem+json"),
            "{}",
            answer.head
        );
    }
    let broken = request(aggregator.http, "POST", "/gate/check", &[], "{").unwrap();
    assert_eq!(broken.status, 400, "{}", broken.body);
    assert_eq!(rollouts(&aggregator).len(), 0, "nothing has begun");
    // Events and the end are taken note of, whatever is known.
    let unknown = revision(&aggregator, "none");
    assert_eq!(
        unknown.event("New revision detected! Scaling up checkout.shop"),
        200
    );
    assert_eq!(unknown.hook("post-rollout", "Failed").status, 200);
}
