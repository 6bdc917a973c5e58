//! A connection pool that is exhausted, with all of it real: PostgreSQL, an application with its pool, and agents that
//! read what the pool says of itself.
//!
//! Each instance of the application has a database of its own, so that the connections to its port are its pool's.

use std::{net::SocketAddr, process::Command};

use coalmine_tests::{
    components::Aggregator,
    eventually,
    http::get,
    postgres::{DATABASE, Postgres, SUPERUSER},
    process::{Process, coalmine, free_addresses, program, wait_for_listener},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::stage;

/// Requests take some 50 ms, whether they wait for a connection or not.
const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors:  { max_rate: 1% }
  latency: { p99: 2s, margin: 100% }
  pool:    { max_wait_rate: 1% }
  judge_window: 1s
  hold_deadline: 5m
  required: [errors, latency, pool]
rollout: { min_coverage: { requests: 10 } }
";

/// So many connections are never all in use, not even after a pause of this machine.
const ENOUGH: u32 = 40;

/// An instance of the application, with its database and the agent before it.
#[derive(Debug)]
struct Instance {
    _agent: Process,
    _process: Process,
    database: Postgres,
    /// Where the application listens.
    application: SocketAddr,
    /// Where the agent listens.
    address: SocketAddr,
    arm: &'static str,
    connections: u32,
    // Last, since it goes when nothing uses it any more.
    _directory: TempDir,
}

impl Instance {
    fn start(arm: &'static str, connections: u32, aggregator: SocketAddr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let database = Postgres::start(path);
        let [application, address, admin] = free_addresses();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pool_application"));
        command.args(["--listen", &application.to_string()]);
        command.args(["--connections", &connections.to_string()]);
        command.args(["--postgres", &database.url(SUPERUSER, DATABASE)]);
        let mut process = Process::start(command, &path.join("application.log"));
        wait_for_listener(&mut process, application);

        let version = if arm == "canary" { "v2" } else { "v1" };
        let mut command = Command::new(program("coalmine-agent"));
        command.args(["--service", "checkout", "--version", version, "--arm", arm]);
        command.args(["--instance", arm, "--tenant", "header:x-tenant-id"]);
        command.args(["--listen", &address.to_string(), "--admin", &admin.to_string()]);
        command.args(["--upstream", &application.to_string()]);
        command.args(["--aggregator", &format!("http://{aggregator}")]);
        command.args(["--pool-scrape", &format!("http://{application}/metrics")]);
        command.args(["--pool-port", &database.address.port().to_string()]);
        let mut agent = Process::start(command, &path.join("agent.log"));
        wait_for_listener(&mut agent, address);
        Self {
            _agent: agent,
            _process: process,
            database,
            application,
            address,
            arm,
            connections,
            _directory: directory,
        }
    }

    /// What the application's pool has counted itself: connections asked for, and waits.
    fn counted(&self) -> (u64, u64) {
        let text = get(self.application, "/metrics").unwrap().body;
        let value = |name: &str| value_of(&text, name).unwrap_or_else(|| panic!("no {name} in {text}"));
        (value("bb8_get_started_total"), value("bb8_get_waited_total"))
    }

    /// The value of one of the aggregator's series about this arm.
    fn series(&self, aggregator: &Aggregator, name: &str) -> Option<u64> {
        let text = get(aggregator.admin, "/metrics").ok()?.body;
        let series = format!("{name}{{service=\"checkout\",arm=\"{}\"}}", self.arm);
        value_of(&text, &series)
    }

    /// Waits until the aggregator shows as many connections as PostgreSQL has.
    fn shows_its_connections(&self, aggregator: &Aggregator, rollout: &str) {
        let clients = "SELECT count(*) FROM pg_stat_activity
                       WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        assert_eq!(self.database.value(clients), self.connections.to_string());
        // A look with psql is a connection too, for a moment.
        let context = eventually("the agent sees the connections of the pool", || {
            let view = get(aggregator.http, &format!("/v1/rollouts/{rollout}"))
                .ok()?
                .json();
            let context = view["arms"][self.arm].clone();
            (context["host"]["database"]["established"] == self.connections).then_some(context)
        });
        assert_eq!(context["agents"], 1, "{context}");
        assert_eq!(context["pool"]["max"], self.connections, "{context}");
        assert!(
            context["pool"]["used"].as_u64().unwrap() <= self.connections.into(),
            "{context}"
        );
    }
}

/// The value in a line that begins with this series.
fn value_of(text: &str, series: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let value = line.strip_prefix(series)?.strip_prefix(' ')?;
        value.trim().parse().ok()
    })
}

/// A rollout with traffic to both arms, half of it each.
#[derive(Debug)]
struct Play {
    traffic: Process,
    canary: Instance,
    baseline: Instance,
    aggregator: Aggregator,
    rollout: String,
    directory: TempDir,
}

impl Play {
    /// Requests come at this rate, until the end.
    fn begin(canary_connections: u32, rate: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY);
        aggregator.launch();
        let canary = Instance::start("canary", canary_connections, aggregator.grpc);
        let baseline = Instance::start("baseline", ENOUGH, aggregator.grpc);
        // What was counted before an agent first looked is not known to it.
        for instance in [&canary, &baseline] {
            eventually("the agent has read the pool", || {
                let max = instance.series(&aggregator, "coalmine_pool_max_connections");
                (max == Some(instance.connections.into())).then_some(())
            });
        }
        let mut command = Command::new(program("coalmine"));
        command.args(["demo", "load", "--tenants", "10", "--canary-percent", "50"]);
        command.args(["--rate", &rate.to_string()]);
        command.args(["--canary", &canary.address.to_string()]);
        command.args(["--baseline", &baseline.address.to_string()]);
        command.arg("--report").arg(directory.path().join("load.json"));
        let traffic = Process::start(command, &directory.path().join("load.log"));
        let rollout = aggregator.start_rollout();
        Self {
            traffic,
            canary,
            baseline,
            aggregator,
            rollout,
            directory,
        }
    }

    /// The record of a decision that the gate has named.
    fn decision(&self, gate: &Value) -> (Value, Value) {
        let path = format!("/v1/decisions/{}", gate["decision_id"].as_str().unwrap());
        let record = self.aggregator.get(&path)["record"]["body"].clone();
        (record, self.aggregator.get(&format!("{path}/evidence")))
    }

    /// Ends the traffic. No request may have failed, and the aggregator must know what the pools have counted.
    fn finish(self) {
        assert!(self.traffic.terminate().success());
        let report = std::fs::read_to_string(self.directory.path().join("load.json")).unwrap();
        let report: Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["unanswered"], 0, "requests without an answer");
        for row in report["counts"].as_array().unwrap() {
            for (outcome, count) in row["outcomes"].as_object().unwrap() {
                assert!(outcome == "success" || *count == 0, "{row}");
            }
        }
        for instance in [&self.canary, &self.baseline] {
            let (acquires, waits) = instance.counted();
            assert!(acquires > 0);
            let series = |name| instance.series(&self.aggregator, name);
            eventually("the aggregator has what the pool has counted", || {
                let known = series("coalmine_pool_waits_total") == Some(waits)
                    && series("coalmine_pool_acquires_total") >= Some(acquires);
                known.then_some(())
            });
            // A connection that was asked for before one look at the pool and waited for until the next is in both.
            let known = series("coalmine_pool_acquires_total").unwrap();
            assert!(
                (acquires..acquires + 10).contains(&known),
                "{known} acquires of {acquires}"
            );
            assert_eq!(series("coalmine_pool_timeouts_total"), Some(0));
        }
        let data = self.aggregator.data.display().to_string();
        let replayed = coalmine(["replay", "--all", "--data", &data]);
        let said = String::from_utf8_lossy(&replayed.stdout);
        assert!(
            replayed.status.success() && said.contains("the same bytes, all of them"),
            "{said}"
        );
    }
}

#[test]
fn an_exhausted_pool_is_rolled_back_although_no_request_fails() {
    let _stage = stage();
    // 70 requests a second use each of the two connections for a third of the time: one request in ten has to wait, for a
    // few milliseconds.
    let mut play = Play::begin(2, 140);
    let gate = play
        .aggregator
        .wait_for_verdict(&play.rollout, &["ROLLBACK", "APPROVE"]);
    assert_eq!(gate["verdict"], "ROLLBACK", "{gate}");
    let reason = gate["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("the fleet on pool: ") && reason.contains("acquires of a connection"),
        "{reason}"
    );

    let (record, evidence) = play.decision(&gate);
    let breached: Vec<_> = record["anomalies"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|anomaly| anomaly["state"] == "BREACH")
        .map(|anomaly| (anomaly["unit"].as_str(), anomaly["metric"].as_str()))
        .collect();
    assert_eq!(breached, [(Some("fleet"), Some("pool"))], "{record}");
    let pool = &evidence["pool"][0];
    assert_eq!(
        (&pool["arm"], &pool["max"]),
        (&"canary".into(), &2_u64.into()),
        "{evidence}"
    );
    let told = record["steps"].as_array().unwrap().iter().any(|step| {
        let detail = step["detail"].as_str().unwrap();
        step["action"] == "validate_metrics_connectivity"
            && detail.contains("; pool of the canary: ")
            && detail.contains("; pods of the canary: ")
    });
    assert!(told, "{}", record["steps"]);

    for instance in [&play.canary, &play.baseline] {
        instance.shows_its_connections(&play.aggregator, &play.rollout);
    }
    let server = format!("http://{}", play.aggregator.http);
    let status = coalmine(["rollout", "status", &play.rollout, "--server", &server]);
    let said = String::from_utf8_lossy(&status.stdout);
    assert!(
        said.contains("canary     1 agent, ") && said.contains(" of 2 connections in use"),
        "{said}"
    );

    // What the pools have done survives the aggregator.
    let before = play.canary.series(&play.aggregator, "coalmine_pool_waits_total");
    play.aggregator.kill_9();
    play.aggregator.launch();
    eventually("the aggregator has the waits again", || {
        let now = play.canary.series(&play.aggregator, "coalmine_pool_waits_total");
        (now >= before).then_some(())
    });
    play.finish();
}

#[test]
fn a_pool_that_is_large_enough_is_proven_to_be() {
    let _stage = stage();
    let play = Play::begin(ENOUGH, 400);
    let gate = play
        .aggregator
        .wait_for_verdict(&play.rollout, &["ROLLBACK", "APPROVE"]);
    assert_eq!(gate["verdict"], "APPROVE", "{gate}");
    let proven = "fewer than 1 % of the canary's acquires of a connection wait";
    assert!(gate["reason"].as_str().unwrap().contains(proven), "{gate}");
    let (_, evidence) = play.decision(&gate);
    assert_eq!(evidence["v"], 1, "{evidence}");
    for instance in [&play.canary, &play.baseline] {
        instance.shows_its_connections(&play.aggregator, &play.rollout);
    }
    play.finish();
}
