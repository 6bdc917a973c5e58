//! A connection pool that is exhausted, with all of it real: PostgreSQL, an application with its pool, and agents that
//! read what the pool says of itself.
//!
//! Each instance of the application has a database of its own, so that the connections to its port are its pool's. The
//! agents have no privileges: what they see, they see without any.

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use coalmine_tests::{
    components::Aggregator,
    eventually,
    http::get,
    postgres::{DATABASE, Postgres, SUPERUSER},
    process::{Process, coalmine, free_addresses, program, wait_for_listener},
};
use rustix::process::getuid;
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

/// Timeouts at the pool are held against the tolerance of errors in `defaults`. The only tenant has another one for the
/// requests that fail with them, and waits may be many, so that nothing but the timeouts can decide. The fleet's
/// tolerance is the tenant's with a smaller difference, which timeouts could reach; with the ratio they cannot, because
/// requests fail on the baseline too.
const POLICY_FOR_TIMEOUTS: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors:  { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 2s, margin: 100% }
  pool:    { max_wait_rate: 90%, max_increase: 90pp, max_ratio: 100 }
  judge_window: 1s
  hold_deadline: 5m
  required: [errors, latency, pool]
tenants:
  acme-corp: { errors: { max_rate: 99%, max_increase: 99pp, max_ratio: 100 } }
rollout: { min_coverage: { requests: 10 } }
";

/// So many connections are never all in use, not even after a pause of this machine.
const ENOUGH: u32 = 40;

/// User and group that own nothing and may do no more than everybody.
const NOBODY: u32 = 65_534;

/// How a test is set up.
#[derive(Debug, Clone, Copy)]
struct Setting {
    policy: &'static str,
    /// Connections of the canary's pool; the baseline's has enough.
    connections: u32,
    /// What the applications are started with besides.
    canary: &'static [&'static str],
    baseline: &'static [&'static str],
    /// Tenants, and requests a second of all of them, half of which go to either arm.
    tenants: u32,
    rate: u32,
}

/// What an application has counted itself.
#[derive(Debug)]
struct Counted {
    acquires: u64,
    /// Those that gave up have waited too.
    waits: u64,
    timeouts: u64,
    /// Requests that failed and had not asked for a connection.
    failures: u64,
}

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
    fn start(arm: &'static str, connections: u32, arguments: &[&str], aggregator: SocketAddr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        // Long before it is run: no process that starts meanwhile still has the file open for writing then.
        let installed = install("coalmine-agent", path);
        let database = Postgres::start(path);
        let [application, address, admin] = free_addresses();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pool_application"));
        command.args(["--listen", &application.to_string()]);
        command.args(["--connections", &connections.to_string()]);
        command.args(["--postgres", &database.url(SUPERUSER, DATABASE)]);
        command.args(arguments);
        let mut process = Process::start(command, &path.join("application.log"));
        wait_for_listener(&mut process, application);

        let version = if arm == "canary" { "v2" } else { "v1" };
        let mut command = Command::new(&installed);
        if getuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.args(["--service", "checkout", "--version", version, "--arm", arm]);
        command.args(["--instance", arm, "--tenant", "header:x-tenant-id"]);
        command.args(["--listen", &address.to_string(), "--admin", &admin.to_string()]);
        command.args(["--upstream", &application.to_string()]);
        command.args(["--aggregator", &format!("http://{aggregator}")]);
        command.args(["--pool-scrape", &format!("http://{application}/metrics")]);
        command.args(["--pool-port", &database.address.port().to_string()]);
        let mut agent = Process::start(command, &path.join("agent.log"));
        wait_for_listener(&mut agent, address);
        let capabilities = capabilities(&installed).unwrap();
        assert!(capabilities.bytes().all(|digit| digit == b'0'), "{capabilities}");
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

    fn counted(&self) -> Counted {
        let text = get(self.application, "/metrics").unwrap().body;
        let value = |name: &str| value_of(&text, name).unwrap_or_else(|| panic!("no {name} in {text}"));
        let timeouts = value("bb8_get_timed_out_total");
        Counted {
            acquires: value("bb8_get_started_total"),
            waits: value("bb8_get_waited_total") + timeouts,
            timeouts,
            failures: value("application_failures_total"),
        }
    }

    /// The value of one of the aggregator's series about this arm.
    fn series(&self, aggregator: &Aggregator, name: &str) -> Option<u64> {
        let text = get(aggregator.admin, "/metrics").ok()?.body;
        let series = format!("{name}{{service=\"checkout\",arm=\"{}\"}}", self.arm);
        value_of(&text, &series)
    }

    /// Waits until the aggregator shows as many connections as PostgreSQL has, and a processor that works.
    fn shows_its_connections(&self, aggregator: &Aggregator, rollout: &str) {
        let clients = "SELECT count(*) FROM pg_stat_activity
                       WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        assert_eq!(self.database.value(clients), self.connections.to_string());
        // A look with psql is a connection too, for a moment.
        let context = eventually("the agent sees the connections of the pool, and work", || {
            let view = get(aggregator.http, &format!("/v1/rollouts/{rollout}"))
                .ok()?
                .json();
            let context = view["arms"][self.arm].clone();
            let host = &context["host"];
            // There is traffic, so that the processor works.
            let is_seen =
                host["database"]["established"] == self.connections && host["cpu_milli"].as_u64() > Some(0);
            is_seen.then_some(context)
        });
        assert_eq!(context["agents"], 1, "{context}");
        assert_eq!(context["pool"]["max"], self.connections, "{context}");
        assert!(
            context["pool"]["used"].as_u64().unwrap() <= self.connections.into(),
            "{context}"
        );
        let host = &context["host"];
        // Only sock_diag says how long a round trip takes.
        assert!(host["database"]["rtt_us"].as_u64() > Some(0), "{context}");
        // Without a container these are the machine's figures; in one that all of the test runs in, the container's.
        // Only an agent that is alone in its container has none.
        let memory = host["memory_bytes"].as_u64().unwrap();
        assert!(memory > 0, "{context}");
        let limit = host["memory_limit_bytes"].as_u64();
        assert!(limit.is_none_or(|limit| limit >= memory), "{context}");
        assert!(host["open_files"].as_u64() > Some(0), "{context}");
    }
}

/// Copies a program to where every user may run it; the build's directory may be closed to others.
fn install(name: &str, directory: &Path) -> PathBuf {
    let place = directory.join("programs");
    let installed = place.join(name);
    fs::create_dir(&place).unwrap();
    fs::copy(program(name), &installed).unwrap();
    for path in [&place, &installed] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    installed
}

/// The capabilities in force of the process that runs this program, as the kernel writes them.
fn capabilities(program: &Path) -> Option<String> {
    let program = program.as_os_str().as_encoded_bytes();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let process = entry.path();
        let command = fs::read(process.join("cmdline")).ok()?;
        if command.split(|byte| *byte == 0).next()? != program {
            return None;
        }
        let status = fs::read_to_string(process.join("status")).ok()?;
        let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        Some(set.trim().to_owned())
    })
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
    /// Requests come until the end.
    fn begin(setting: &Setting) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut aggregator = Aggregator::prepare_with(directory.path(), setting.policy);
        aggregator.launch();
        let canary = Instance::start("canary", setting.connections, setting.canary, aggregator.grpc);
        let baseline = Instance::start("baseline", ENOUGH, setting.baseline, aggregator.grpc);
        // What was counted before an agent first looked is not known to it.
        for instance in [&canary, &baseline] {
            eventually("the agent has read the pool", || {
                let max = instance.series(&aggregator, "coalmine_pool_max_connections");
                (max == Some(instance.connections.into())).then_some(())
            });
        }
        let mut command = Command::new(program("coalmine"));
        command.args(["demo", "load", "--canary-percent", "50"]);
        command.args(["--tenants", &setting.tenants.to_string()]);
        command.args(["--rate", &setting.rate.to_string()]);
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

    /// The gate, once it has the verdict that is expected of it.
    fn ends_with(&self, verdict: &str) -> Value {
        let wanted = ["ROLLBACK", "APPROVE"];
        let gate = self.aggregator.wait_for_verdict(&self.rollout, &wanted);
        assert_eq!(gate["verdict"], verdict, "{gate}");
        gate
    }

    /// The record of a decision that the gate has named.
    fn decision(&self, gate: &Value) -> (Value, Value) {
        let path = format!("/v1/decisions/{}", gate["decision_id"].as_str().unwrap());
        let record = self.aggregator.get(&path)["record"]["body"].clone();
        (record, self.aggregator.get(&format!("{path}/evidence")))
    }

    /// Ends the traffic. Each timeout at the pool has failed one request, and no other has but those that were meant to
    /// fail; and the aggregator must know what the pools have counted. Gives that, canary first.
    fn finish(self) -> [Counted; 2] {
        assert!(self.traffic.terminate().success());
        let report = fs::read_to_string(self.directory.path().join("load.json")).unwrap();
        let report: Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["unanswered"], 0, "requests without an answer");
        let all = [&self.canary, &self.baseline].map(|instance| {
            let counted = instance.counted();
            assert_eq!(
                failed(&report, instance.arm),
                counted.timeouts + counted.failures,
                "{counted:?}: {report}"
            );
            assert!(counted.acquires > 0);
            let series = |name| instance.series(&self.aggregator, name);
            eventually("the aggregator has what the pool has counted", || {
                let known = series("coalmine_pool_waits_total") == Some(counted.waits)
                    && series("coalmine_pool_timeouts_total") == Some(counted.timeouts)
                    && series("coalmine_pool_acquires_total") >= Some(counted.acquires);
                known.then_some(())
            });
            // A connection that was asked for before one look at the pool and waited for until the next is in both.
            let known = series("coalmine_pool_acquires_total").unwrap();
            assert!(
                (counted.acquires..counted.acquires + 10).contains(&known),
                "{known} acquires: {counted:?}"
            );
            counted
        });
        let data = self.aggregator.data.display().to_string();
        let replayed = coalmine(["replay", "--all", "--data", &data]);
        let said = String::from_utf8_lossy(&replayed.stdout);
        assert!(
            replayed.status.success() && said.contains("the same bytes, all of them"),
            "{said}"
        );
        all
    }
}

/// Units and metrics that a decision has found in breach.
fn breached(record: &Value) -> Vec<(&str, &str)> {
    let anomalies = record["anomalies"].as_array().unwrap().iter();
    let breached = anomalies.filter(|anomaly| anomaly["state"] == "BREACH");
    breached
        .map(|anomaly| {
            let word = |name: &str| anomaly[name].as_str().unwrap();
            (word("unit"), word("metric"))
        })
        .collect()
}

/// How many requests to an arm did not succeed, as the clients saw it.
fn failed(report: &Value, arm: &str) -> u64 {
    let rows = report["counts"].as_array().unwrap().iter();
    let outcomes = rows
        .filter(|row| row["arm"] == arm)
        .flat_map(|row| row["outcomes"].as_object().unwrap());
    outcomes
        .filter(|(outcome, _)| *outcome != "success")
        .map(|(_, count)| count.as_u64().unwrap())
        .sum()
}

#[test]
fn an_exhausted_pool_is_rolled_back_although_no_request_fails() {
    let _stage = stage();
    // 70 requests a second use each of the two connections for a third of the time: one request in ten has to wait, for a
    // few milliseconds.
    let mut play = Play::begin(&Setting {
        policy: POLICY,
        connections: 2,
        canary: &[],
        baseline: &[],
        tenants: 10,
        rate: 140,
    });
    let gate = play.ends_with("ROLLBACK");
    let reason = gate["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("the fleet on pool: ") && reason.contains("acquires of a connection"),
        "{reason}"
    );

    let (record, evidence) = play.decision(&gate);
    assert_eq!(breached(&record), [("fleet", "pool")], "{record}");
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
    let counted = play.finish();
    assert!(counted.iter().all(|counted| counted.timeouts == 0), "{counted:?}");
}

#[test]
fn a_pool_that_times_out_is_rolled_back_although_its_errors_are_tolerated() {
    let _stage = stage();
    // 50 requests a second use the only connection for half of the time, and who finds it in use waits for half as long
    // as a query takes: about one request in ten fails.
    let play = Play::begin(&Setting {
        policy: POLICY_FOR_TIMEOUTS,
        connections: 1,
        canary: &["--timeout-ms", "4"],
        baseline: &["--fail-every", "10"],
        tenants: 1,
        rate: 100,
    });
    let gate = play.ends_with("ROLLBACK");
    let reason = gate["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("the fleet on pool: ")
            && reason.contains(" acquires of a connection timed out on the canary ("),
        "{reason}"
    );
    let (record, evidence) = play.decision(&gate);
    assert_eq!(breached(&record), [("fleet", "pool")], "{record}");
    let pool = &evidence["pool"][0];
    assert_eq!(pool["arm"], "canary", "{evidence}");
    assert!(pool["timeouts"].as_u64() > Some(0), "{evidence}");

    let [canary, baseline] = play.finish();
    assert!(canary.timeouts > 0 && canary.failures == 0, "{canary:?}");
    assert!(baseline.timeouts == 0 && baseline.failures > 0, "{baseline:?}");
}

#[test]
fn a_pool_that_is_large_enough_is_proven_to_be() {
    let _stage = stage();
    let play = Play::begin(&Setting {
        policy: POLICY,
        connections: ENOUGH,
        canary: &[],
        baseline: &[],
        tenants: 10,
        rate: 400,
    });
    let gate = play.ends_with("APPROVE");
    let proven = "fewer than 1 % of the canary's acquires of a connection wait";
    assert!(gate["reason"].as_str().unwrap().contains(proven), "{gate}");
    let (_, evidence) = play.decision(&gate);
    assert_eq!(evidence["v"], 1, "{evidence}");
    for instance in [&play.canary, &play.baseline] {
        instance.shows_its_connections(&play.aggregator, &play.rollout);
    }
    let counted = play.finish();
    assert!(counted.iter().all(|counted| counted.timeouts == 0), "{counted:?}");
}
