//! The stage: all processes of the demonstration, and what they say.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{RATE, ports::free_addresses, processes::Process};
use crate::{
    cli::{Exit, Failure},
    client::{Client, segment},
    clock,
};
use serde_json::{Value, json};

/// How long the processes may take until they answer.
const READY_WITHIN: Duration = Duration::from_secs(15);

/// How long the last windows may take to arrive.
const COUNTED_WITHIN: Duration = Duration::from_secs(10);

/// The demonstration's policy: windows of one second, fewer requests for a tenant to count as judged, and a wide margin on
/// latency, since all instances share this machine.
const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors:  { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms, margin: 50% }
  judge_window: 1s
  hold_deadline: 3m
rollout: { min_coverage: { requests: 10 } }
";

/// One instance of the service with its agent.
struct Instance {
    arm: &'static str,
    version: &'static str,
    service: SocketAddr,
    agent: SocketAddr,
    admin: SocketAddr,
}

/// All processes, in the order in which they are stopped.
#[derive(Debug)]
pub(super) struct Stage {
    load: Option<Process>,
    agents: Vec<Process>,
    services: Vec<Process>,
    aggregator: Process,
    client: Client,
    rollout: String,
    report: PathBuf,
    load_arguments: Vec<String>,
    logs: PathBuf,
    http: SocketAddr,
    admin: SocketAddr,
}

/// What the fleet did since the rollout began.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    pub(super) requests: u64,
    pub(super) canary_requests: u64,
    canary_errors: u64,
}

impl Fleet {
    /// The canary's success rate over all tenants, in parts per million.
    pub(super) fn success_ppm(&self) -> u64 {
        1_000_000
            - (self.canary_errors * 1_000_000)
                .checked_div(self.canary_requests)
                .unwrap_or(0)
    }
}

impl Stage {
    /// Starts everything and a rollout; the fault begins `fault_after` later.
    pub(super) async fn set(
        data: &Path,
        failing: Option<&str>,
        fault_after: Duration,
    ) -> Result<Self, Failure> {
        let failed =
            |what: &str, error: std::io::Error| Failure::new(Exit::Bad, format!("cannot {what}: {error}"));
        let logs = data.join("logs");
        std::fs::create_dir_all(&logs).map_err(|error| failed("create the logs", error))?;
        let policy = data.join("sla.yaml");
        std::fs::write(&policy, POLICY).map_err(|error| failed("write the policy", error))?;
        let [grpc, http, admin, rest @ ..] =
            free_addresses::<12>().map_err(|error| failed("find free ports", error))?;
        let instances: Vec<Instance> = rest
            .as_chunks::<3>()
            .0
            .iter()
            .zip([("baseline", "v1"), ("baseline", "v1"), ("canary", "v2")])
            .map(|([service, agent, admin], (arm, version))| Instance {
                arm,
                version,
                service: *service,
                agent: *agent,
                admin: *admin,
            })
            .collect();

        let aggregator = start_aggregator(data, &policy, grpc, http, admin, &logs)?;
        let fault_at_ms = clock::now_ms() + u64::try_from(fault_after.as_millis()).unwrap_or(0) + 1_500;
        let mut services = Vec::new();
        let mut agents = Vec::new();
        for (number, instance) in (1..).zip(&instances) {
            services.push(start_service(number, instance, failing, fault_at_ms, &logs)?);
            agents.push(start_agent(number, instance, grpc, &logs)?);
        }
        let report = data.join("load.json");
        let load_arguments = load_arguments(&instances, &report);
        let mut stage = Self {
            load: None,
            agents,
            services,
            aggregator,
            client: Client::new(&format!("http://{http}"), None)?,
            rollout: String::new(),
            report,
            load_arguments,
            logs,
            http,
            admin,
        };
        stage.wait_until_listening(&instances).await?;
        stage.resume_load().await?;
        stage.start_rollout().await?;
        Ok(stage)
    }

    /// Waits until every process takes connections.
    async fn wait_until_listening(&mut self, instances: &[Instance]) -> Result<(), Failure> {
        let deadline = Instant::now() + READY_WITHIN;
        let listening = instances
            .iter()
            .flat_map(|instance| [instance.service, instance.agent]);
        for address in [self.http, self.admin].into_iter().chain(listening) {
            while tokio::net::TcpStream::connect(address).await.is_err() {
                self.check()?;
                if Instant::now() > deadline {
                    return Err(Failure::new(Exit::Bad, format!("nothing listens on {address}")));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }

    async fn start_rollout(&mut self) -> Result<(), Failure> {
        // Wait for the agents, so that the first window is whole.
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let connected = match self.client.get("/v1/services/checkout").await {
                Ok(service) => service.get("windows").and_then(Value::as_u64).unwrap_or(0),
                Err(_) => 0,
            };
            if connected >= 3 {
                break;
            }
            self.check()?;
            if Instant::now() > deadline {
                return Err(Failure::new(Exit::Bad, "the agents do not reach the aggregator"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let request = json!({ "service": "checkout", "canary_version": "v2", "actor": "demo" });
        let view = self.client.post("/v1/rollouts", &request).await?;
        self.rollout = view
            .get("id")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        Ok(())
    }

    /// Starts the load generator.
    pub(super) async fn resume_load(&mut self) -> Result<(), Failure> {
        self.load = Some(Process::start(
            "coalmine",
            "load",
            &self.load_arguments,
            &self.logs,
        )?);
        Ok(())
    }

    /// Stops the load generator; gives the number of requests that it sent.
    pub(super) async fn stop_load(&mut self) -> Result<u64, Failure> {
        if let Some(mut load) = self.load.take() {
            load.stop().await;
        }
        let report = std::fs::read_to_string(&self.report).unwrap_or_default();
        let report: Value = serde_json::from_str(&report).map_err(|error| {
            Failure::new(Exit::Bad, format!("the load generator left no report: {error}"))
        })?;
        let count = |field: &str| report.get(field).and_then(Value::as_u64).unwrap_or(0);
        Ok(count("answered") + count("unanswered"))
    }

    /// All requests that the aggregator holds, once the agents have nothing more to report.
    pub(super) async fn counted(&mut self) -> Result<u64, Failure> {
        let deadline = Instant::now() + COUNTED_WITHIN;
        let mut last = (u64::MAX, Instant::now());
        loop {
            let fleet = self.fleet().await?;
            if fleet.requests != last.0 {
                last = (fleet.requests, Instant::now());
            }
            // Agents report every second.
            if last.1.elapsed() > Duration::from_secs(2) || Instant::now() > deadline {
                return Ok(fleet.requests);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The rollout as the aggregator shows it.
    pub(super) async fn rollout(&self) -> Result<Value, Failure> {
        Ok(self
            .client
            .get(&format!("/v1/rollouts/{}", segment(&self.rollout)))
            .await?)
    }

    /// What the fleet did.
    pub(super) async fn fleet(&self) -> Result<Fleet, Failure> {
        let service = self.client.get("/v1/services/checkout").await?;
        let mut fleet = Fleet::default();
        for row in service
            .get("totals")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let outcomes = row
                .get("outcomes")
                .and_then(Value::as_object)
                .into_iter()
                .flatten();
            let is_canary = row.get("arm").and_then(Value::as_str) == Some("canary");
            for (outcome, count) in outcomes {
                let count = count.as_u64().unwrap_or(0);
                fleet.requests += count;
                if is_canary {
                    fleet.canary_requests += count;
                    fleet.canary_errors += if outcome == "success" { 0 } else { count };
                }
            }
        }
        Ok(fleet)
    }

    /// An error if any process has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), Failure> {
        let all = self
            .load
            .iter_mut()
            .chain(&mut self.agents)
            .chain(&mut self.services);
        for process in all.chain([&mut self.aggregator]) {
            process.check()?;
        }
        Ok(())
    }

    /// Where people can look.
    pub(super) fn addresses(&self) -> String {
        format!(
            "API http://{}  metrics http://{}/metrics  rollout {}",
            self.http, self.admin, self.rollout
        )
    }

    /// Stops everything, the aggregator last.
    pub(super) async fn strike(mut self) {
        if let Some(mut load) = self.load.take() {
            load.stop().await;
        }
        for process in self.agents.iter_mut().chain(&mut self.services) {
            process.stop().await;
        }
        self.aggregator.stop().await;
    }
}

fn strings(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|argument| (*argument).to_owned()).collect()
}

fn start_aggregator(
    data: &Path,
    policy: &Path,
    grpc: SocketAddr,
    http: SocketAddr,
    admin: SocketAddr,
    logs: &Path,
) -> Result<Process, Failure> {
    let (data, policy) = (data.display().to_string(), policy.display().to_string());
    let (grpc, http, admin) = (grpc.to_string(), http.to_string(), admin.to_string());
    let arguments = strings(&[
        "serve",
        "--data",
        &data,
        "--policy",
        &policy,
        "--log-name",
        "coalmine/demo",
        "--listen-grpc",
        &grpc,
        "--listen-http",
        &http,
        "--listen-admin",
        &admin,
    ]);
    Process::start("coalmine-aggregator", "aggregator", &arguments, logs)
}

fn start_service(
    number: u32,
    instance: &Instance,
    failing: Option<&str>,
    fault_at_ms: u64,
    logs: &Path,
) -> Result<Process, Failure> {
    let (listen, seed, at) = (
        instance.service.to_string(),
        number.to_string(),
        fault_at_ms.to_string(),
    );
    let mut arguments = strings(&["demo", "service", "--listen", &listen, "--seed", &seed]);
    if let Some(tenant) = failing.filter(|_| instance.arm == "canary") {
        arguments.extend(strings(&["--fail", tenant, "--fail-at-ms", &at]));
    }
    Process::start("coalmine", &format!("service-{number}"), &arguments, logs)
}

fn start_agent(number: u32, instance: &Instance, grpc: SocketAddr, logs: &Path) -> Result<Process, Failure> {
    let (listen, upstream, admin) = (
        instance.agent.to_string(),
        instance.service.to_string(),
        instance.admin.to_string(),
    );
    let (aggregator, name) = (format!("http://{grpc}"), format!("{}-{number}", instance.arm));
    let arguments = strings(&[
        "--listen",
        &listen,
        "--upstream",
        &upstream,
        "--admin",
        &admin,
        "--aggregator",
        &aggregator,
        "--service",
        "checkout",
        "--version",
        instance.version,
        "--arm",
        instance.arm,
        "--instance",
        &name,
        "--tenant",
        "header:x-tenant-id",
    ]);
    Process::start("coalmine-agent", &format!("agent-{number}"), &arguments, logs)
}

fn load_arguments(instances: &[Instance], report: &Path) -> Vec<String> {
    let (rate, report) = (RATE.to_string(), report.display().to_string());
    let mut arguments = strings(&["demo", "load", "--rate", &rate, "--report", &report]);
    for instance in instances {
        arguments.extend([format!("--{}", instance.arm), instance.agent.to_string()]);
    }
    arguments
}
