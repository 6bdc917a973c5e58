//! A rollout on real traffic: nginx behind agents, driven by a real HTTP client.

use std::path::Path;

use coalmine_tests::{
    components::{Agent, Aggregator, Scene},
    eventually,
    http::get,
    process::coalmine,
};
use serde_json::Value;

use crate::stage;

/// The tenant of the sixth rank in the load generator's traffic.
const FAILING: &str = "stark-bank";

const RATE: u32 = 2_000;

fn replays(data: &Path) {
    let output = coalmine(["replay", "--all", "--data", &data.display().to_string()]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("the same bytes, all of them"),
        "{said}"
    );
    let output = coalmine(["audit", "verify", "--data", &data.display().to_string()]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

/// Ends the agents, so that their last windows arrive, and holds the book against what was sent.
fn conserves(aggregator: &Aggregator, agents: Vec<Agent>, sent: &coalmine_tests::components::Counts) {
    agents.into_iter().for_each(Agent::terminate);
    let counted = eventually("the book holds all requests", || {
        let counts = aggregator.counts();
        (counts.total() >= sent.total()).then_some(counts)
    });
    assert_eq!(&counted, sent, "requests by arm, tenant and outcome");
    let service = aggregator.get("/v1/services/checkout");
    for arm in ["canary", "baseline"] {
        assert_eq!(service["arms"][arm]["gap_requests"], 0);
    }
}

#[test]
fn one_failing_tenant_is_rolled_back_and_named_and_the_others_are_not() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let scene = Scene::start(directory.path(), aggregator.grpc, Some(FAILING));
    let load = scene.load(RATE, 80_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));
    let rollout = aggregator.start_rollout();

    let gate = aggregator.wait_for_verdict(&rollout, &["ROLLBACK", "APPROVE"]);
    assert_eq!(gate["verdict"], "ROLLBACK", "{gate}");
    assert_eq!(gate["worst_tenant"], FAILING, "{gate}");
    assert_eq!(aggregator.gates(), [403, 200]);
    assert!(gate["score_ppm"].as_u64().unwrap() < 950_000, "{gate}");
    // The fleet may be the first in breach; the sentence names the tenant in any case.
    assert!(
        gate["reason"]
            .as_str()
            .unwrap()
            .contains(&format!("tenant {FAILING}")),
        "{gate}"
    );

    let decision = aggregator.get(&format!(
        "/v1/decisions/{}",
        gate["decision_id"].as_str().unwrap()
    ));
    let breached: Vec<_> = decision["record"]["body"]["anomalies"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|anomaly| anomaly["state"] == "BREACH" && anomaly["unit"] != "fleet")
        .map(|anomaly| anomaly["unit"].as_str().unwrap().to_owned())
        .collect();
    assert!(
        breached.iter().all(|unit| *unit == format!("tenant:{FAILING}")),
        "{breached:?}"
    );
    assert!(
        decision["record"]["body"]["tenants_checked"].as_u64().unwrap() >= 190,
        "{decision}"
    );

    let gate = coalmine([
        "gate",
        &rollout,
        "--server",
        &format!("http://{}", aggregator.http),
    ]);
    assert_eq!(gate.status.code(), Some(1));
    conserves(&aggregator, scene.agents, &load.finish());
    replays(&aggregator.data);
}

#[test]
fn a_healthy_rollout_is_approved() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let scene = Scene::start(directory.path(), aggregator.grpc, None);
    let load = scene.load(RATE, 80_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));
    assert_eq!(
        aggregator.gates(),
        [503, 503],
        "nobody has said that it is on trial"
    );
    let rollout = aggregator.start_rollout();
    assert_eq!(aggregator.gates(), [403, 403], "too early to say");
    let server = format!("http://{}", aggregator.http);
    let gate = coalmine([
        "gate",
        &rollout,
        "--wait",
        "--timeout",
        "60s",
        "--output",
        "json",
        "--server",
        &server,
    ]);
    let said: Value = serde_json::from_slice(&gate.stdout).unwrap();
    assert_eq!(
        (gate.status.code(), &said["verdict"]),
        (Some(0), &Value::from("APPROVE")),
        "{said}"
    );
    assert!(said["score_ppm"].as_u64().unwrap() >= 950_000);
    assert_eq!(aggregator.gates(), [200, 403]);
    let end = coalmine(["rollout", "end", &rollout, "--server", &server]);
    assert!(end.status.success());
    assert_eq!(aggregator.gates(), [503, 503], "it is over");
    conserves(&aggregator, scene.agents, &load.finish());
    replays(&aggregator.data);
}

#[test]
fn killing_the_aggregator_in_the_middle_changes_no_count_and_no_verdict() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::start(directory.path());
    let scene = Scene::start(directory.path(), aggregator.grpc, Some(FAILING));
    let load = scene.load(RATE, 90_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));
    let rollout = aggregator.start_rollout();
    let path = format!("/v1/rollouts/{rollout}");
    let judged =
        |aggregator: &Aggregator| get(aggregator.http, &path).ok()?.json()["windows_judged"].as_u64();

    let over = |aggregator: &Aggregator| {
        get(aggregator.http, &format!("{path}/gate")).is_ok_and(|gate| gate.json()["verdict"] == "ROLLBACK")
    };

    for after in [3, 6] {
        // A rollout that is rolled back judges no more windows; then the verdict must survive.
        let after = eventually("some windows are judged", || {
            judged(&aggregator).filter(|windows| *windows >= after || over(&aggregator))
        });
        aggregator.kill_9();
        aggregator.launch();
        assert!(
            judged(&aggregator).unwrap() >= after,
            "decisions that were shown are lost"
        );
    }
    let gate = aggregator.wait_for_verdict(&rollout, &["ROLLBACK", "APPROVE"]);
    assert_eq!(
        (&gate["verdict"], &gate["worst_tenant"]),
        (&"ROLLBACK".into(), &FAILING.into()),
        "{gate}"
    );
    conserves(&aggregator, scene.agents, &load.finish());
    replays(&aggregator.data);

    // Each window was judged once, in order, with the windows of every agent.
    let decisions = aggregator.get(&format!("/v1/decisions?rollout={rollout}&limit=1000"));
    let mut windows: Vec<_> = decisions["decisions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|decision| {
            let body = &decision["record"]["body"];
            assert_eq!(body["agents_ppm"], 1_000_000, "{body}");
            body["window"].as_u64().unwrap()
        })
        .collect();
    windows.reverse();
    assert_eq!(windows, (1..=windows.len() as u64).collect::<Vec<_>>());
}

#[test]
fn agents_that_start_before_the_aggregator_lose_nothing() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare(directory.path());
    let scene = Scene::start(directory.path(), aggregator.grpc, None);
    let sent = scene.load(1_000, 5_000).finish();
    let metrics = get(scene.agents[0].admin, "/metrics").unwrap().body;
    assert!(
        metrics.contains("coalmine_agent_session_connected 0"),
        "{metrics}"
    );
    aggregator.launch();
    conserves(&aggregator, scene.agents, &sent);
    aggregator.terminate();
}
