//! The components of a rollout: aggregator, agents, nginx as the application, the load generator.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use serde_json::{Value, json};

use crate::{
    eventually,
    http::{Answer, get, post},
    process::{Process, free_addresses, program, release_program, wait_for_listener},
    tools::tool,
};

/// The policy of the tests: windows of one second. All instances share one machine, where healthy ones may differ in
/// latency by as much again.
pub const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors:  { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms, margin: 100% }
  judge_window: 1s
  hold_deadline: 5m
rollout: { min_coverage: { requests: 10 } }
";

const AGGREGATOR: &str = "coalmine-aggregator";

/// An aggregator with its data directory; it can be killed and started again.
#[derive(Debug)]
pub struct Aggregator {
    process: Option<Process>,
    /// The program; that of this build if none was chosen.
    program: Option<PathBuf>,
    /// The command that the program is run by, such as strace with its options.
    wrapper: Vec<OsString>,
    /// The data directory.
    pub data: PathBuf,
    policy: PathBuf,
    /// Where agents connect.
    pub grpc: SocketAddr,
    /// The API.
    pub http: SocketAddr,
    /// Health and metrics.
    pub admin: SocketAddr,
    arguments: Vec<String>,
}

impl Aggregator {
    /// Chooses addresses and a data directory under `directory`; starts nothing.
    pub fn prepare(directory: &Path) -> Self {
        Self::prepare_with(directory, POLICY)
    }

    /// The same with another policy.
    ///
    /// # Panics
    /// When the policy cannot be written.
    pub fn prepare_with(directory: &Path, text: &str) -> Self {
        let [grpc, http, admin] = free_addresses();
        let policy = directory.join("sla.yaml");
        std::fs::write(&policy, text).expect("the policy is written");
        let data = directory.join("data");
        Self {
            process: None,
            program: None,
            wrapper: Vec::new(),
            data,
            policy,
            grpc,
            http,
            admin,
            arguments: Vec::new(),
        }
    }

    /// Prepares and starts.
    pub fn start(directory: &Path) -> Self {
        let mut aggregator = Self::prepare(directory);
        aggregator.launch();
        aggregator
    }

    /// Gives `serve` more arguments.
    #[must_use]
    pub fn with_arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// Runs the program as users have it, optimised.
    #[must_use]
    pub fn released(mut self) -> Self {
        self.program = Some(release_program(AGGREGATOR));
        self
    }

    /// Runs the program by another command from the next start on; by none if it is empty. That command must become
    /// the program, so that signals and the exit code are the program's own.
    pub fn run_by(&mut self, wrapper: Vec<OsString>) {
        self.wrapper = wrapper;
    }

    /// Starts the process and does not wait for it.
    pub fn spawn(&mut self) {
        let program = self.program.clone().unwrap_or_else(|| program(AGGREGATOR));
        let mut words = self.wrapper.iter().cloned().chain([program.into_os_string()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command
            .args(words)
            .arg("serve")
            .arg("--data")
            .arg(&self.data)
            .arg("--policy")
            .arg(&self.policy)
            .args([
                "--listen-grpc",
                &self.grpc.to_string(),
                "--listen-http",
                &self.http.to_string(),
                "--listen-admin",
                &self.admin.to_string(),
            ]);
        command.args(&self.arguments);
        let log = self.policy.with_file_name("aggregator.log");
        self.process = Some(Process::start(command, &log));
    }

    /// Starts the process and waits until it answers.
    pub fn launch(&mut self) {
        self.spawn();
        if let Some(process) = &mut self.process {
            wait_for_listener(process, self.admin);
        }
        eventually("the aggregator is ready", || {
            get(self.admin, "/readyz")
                .ok()
                .filter(|answer| answer.status == 200)
        });
    }

    /// Kills it without warning.
    pub fn kill_9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill_9();
        }
    }

    /// Ends it in order.
    pub fn terminate(&mut self) {
        if let Some(process) = self.process.take() {
            assert!(process.terminate().success());
        }
    }

    /// The status, if the process has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut().and_then(Process::ended)
    }

    /// Asks it to end, if it has not; gives the status.
    ///
    /// # Panics
    /// When it was not started.
    pub fn finish(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("it was started");
        process.ended().unwrap_or_else(|| process.terminate())
    }

    /// The number of one of its threads, by name; none while there is no such thread.
    pub fn thread(&self, name: &str) -> Option<u32> {
        self.threads(name).first().copied()
    }

    /// The numbers of its threads of a name.
    pub fn threads(&self, name: &str) -> Vec<u32> {
        let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
        let is_ours = |pid: &u32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = command.split(|byte| *byte == 0);
            let runs = words
                .next()
                .is_some_and(|word| word.ends_with(AGGREGATOR.as_bytes()));
            runs && words.any(|word| word == self.data.as_os_str().as_encoded_bytes())
        };
        let is_called = |thread: &u32| {
            let found = fs::read_to_string(format!("/proc/{thread}/comm"));
            found.is_ok_and(|found| found.trim_end() == name)
        };
        let numbers = |directory: String| {
            fs::read_dir(directory)
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(number)
        };
        numbers("/proc".to_owned())
            .find(is_ours)
            .into_iter()
            .flat_map(|pid| numbers(format!("/proc/{pid}/task")))
            .filter(is_called)
            .collect()
    }

    /// GET of the API, as JSON.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn get(&self, path: &str) -> Value {
        let answer = get(self.http, path).expect("the aggregator answers");
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()
    }

    /// POST to the API.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        post(self.http, path, body).expect("the aggregator answers")
    }

    /// Starts a rollout of v2; gives its name.
    ///
    /// # Panics
    /// When it is refused.
    pub fn start_rollout(&self) -> String {
        let workload = json!({ "kind": "Canary", "namespace": "shop", "name": "checkout" });
        let answer = self.post(
            "/v1/rollouts",
            &json!({ "service": "checkout", "canary_version": "v2", "workload": workload }),
        );
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.json()["id"]
            .as_str()
            .expect("the rollout has a name")
            .to_owned()
    }

    /// What Flagger is told at its gate and at its way back, as statuses.
    pub fn gates(&self) -> [u16; 2] {
        let canary =
            json!({ "name": "checkout", "namespace": "shop", "phase": "Promoting", "checksum": "1" });
        ["/gate/check", "/rollback/check"].map(|path| self.post(path, &canary).status)
    }

    /// Waits until the rollout has one of these verdicts; gives the gate's answer.
    pub fn wait_for_verdict(&self, rollout: &str, wanted: &[&str]) -> Value {
        eventually(&format!("the verdict is one of {wanted:?}"), || {
            let gate = get(self.http, &format!("/v1/rollouts/{rollout}/gate"))
                .ok()?
                .json();
            wanted.contains(&gate["verdict"].as_str()?).then_some(gate)
        })
    }

    /// How many windows have arrived from agents.
    pub fn windows(&self) -> u64 {
        let answer = get(self.http, "/v1/services/checkout").ok();
        answer
            .filter(|answer| answer.status == 200)
            .map_or(0, |answer| answer.json()["windows"].as_u64().unwrap_or(0))
    }

    /// What the book holds.
    pub fn counts(&self) -> Counts {
        let Ok(answer) = get(self.http, "/v1/services/checkout") else {
            return Counts::default();
        };
        if answer.status == 200 {
            Counts::of(&answer.json()["totals"])
        } else {
            Counts::default()
        }
    }
}

/// Requests by arm, tenant and outcome; zeros are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts(pub BTreeMap<(String, String, String), u64>);

impl Counts {
    fn of(rows: &Value) -> Self {
        let mut counts = BTreeMap::new();
        for row in rows.as_array().into_iter().flatten() {
            for (outcome, count) in row["outcomes"].as_object().into_iter().flatten() {
                let key = (text(&row["arm"]), text(&row["tenant"]), outcome.clone());
                let count = count.as_u64().unwrap_or(0);
                if count > 0 {
                    *counts.entry(key).or_insert(0) += count;
                }
            }
        }
        Self(counts)
    }

    /// Adds other counts.
    pub fn add(&mut self, other: &Self) {
        for (key, count) in &other.0 {
            *self.0.entry(key.clone()).or_insert(0) += count;
        }
    }

    /// The number of all requests.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// nginx as the application: 15 % of a tenant's requests fail on `failing` instances.
#[derive(Debug)]
pub struct Nginx {
    _process: Process,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Nginx {
    /// Starts nginx; `failing` names the tenant that gets 500s.
    ///
    /// # Panics
    /// When nginx is missing and cannot be installed.
    pub fn start(directory: &Path, name: &str, failing: Option<&str>) -> Self {
        let nginx = tool("nginx", "nginx-light");
        let [address] = free_addresses();
        let prefix = directory.join(name);
        std::fs::create_dir_all(&prefix).expect("a directory for nginx");
        let tenant = failing.unwrap_or("nobody");
        // One process, so that killing it leaves no worker behind. request_id is random, so split_clients draws a lot for each request.
        let config = format!(
            "daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr warn;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  keepalive_requests 1000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  split_clients $request_id $lot {{ 15% bad; * good; }}
  map $http_x_tenant_id:$lot $fails {{ {tenant}:bad 1; default 0; }}
  server {{
    listen {address};
    location / {{
      if ($fails) {{ return 500 failed; }}
      return 200 fine;
    }}
  }}
}}
"
        );
        let file = prefix.join("nginx.conf");
        std::fs::write(&file, config).expect("the configuration is written");
        let mut command = Command::new(nginx);
        command.arg("-p").arg(&prefix).arg("-c").arg(&file);
        let mut process = Process::start(command, &directory.join(format!("{name}.log")));
        wait_for_listener(&mut process, address);
        Self {
            _process: process,
            address,
        }
    }
}

/// An agent before an application.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    /// Where clients connect.
    pub address: SocketAddr,
    /// Health and metrics.
    pub admin: SocketAddr,
}

impl Agent {
    /// Starts an agent.
    pub fn start(
        directory: &Path,
        name: &str,
        arm: &str,
        upstream: SocketAddr,
        aggregator: SocketAddr,
    ) -> Self {
        Self::start_with(directory, name, arm, upstream, aggregator, &[])
    }

    /// Starts one with more arguments.
    pub fn start_with(
        directory: &Path,
        name: &str,
        arm: &str,
        upstream: SocketAddr,
        aggregator: SocketAddr,
        more: &[&str],
    ) -> Self {
        let [address, admin] = free_addresses();
        let version = if arm == "canary" { "v2" } else { "v1" };
        let mut command = Command::new(program("coalmine-agent"));
        command.args([
            "--service",
            "checkout",
            "--version",
            version,
            "--arm",
            arm,
            "--instance",
            name,
        ]);
        command.args(["--tenant", "header:x-tenant-id", "--listen", &address.to_string()]);
        command.args(["--upstream", &upstream.to_string(), "--admin", &admin.to_string()]);
        command.args(["--aggregator", &format!("http://{aggregator}")]);
        command.args(more);
        let mut process = Process::start(command, &directory.join(format!("{name}.log")));
        wait_for_listener(&mut process, address);
        Self {
            process,
            address,
            admin,
        }
    }

    /// Ends it in order: its last windows are sent.
    pub fn terminate(self) {
        assert!(self.process.terminate().success());
    }
}

/// A whole rollout: two baseline instances and one canary, each nginx with an agent before it.
#[derive(Debug)]
pub struct Scene {
    /// The instances of the application.
    pub applications: Vec<Nginx>,
    /// Their agents: two of the baseline, then the canary's.
    pub agents: Vec<Agent>,
    directory: PathBuf,
}

impl Scene {
    /// Starts the instances; the canary fails for one tenant, if it is named.
    pub fn start(directory: &Path, aggregator: SocketAddr, failing: Option<&str>) -> Self {
        let instances = ["baseline-1", "baseline-2", "canary-1"];
        Self::start_as(directory, aggregator, failing, instances)
    }

    /// Starts them by these names: two of the baseline, then the canary.
    pub fn start_as(
        directory: &Path,
        aggregator: SocketAddr,
        failing: Option<&str>,
        instances: [&str; 3],
    ) -> Self {
        let mut scene = Self {
            applications: Vec::new(),
            agents: Vec::new(),
            directory: directory.to_owned(),
        };
        for (name, arm) in instances.into_iter().zip(["baseline", "baseline", "canary"]) {
            let failing = failing.filter(|_| arm == "canary");
            let application = Nginx::start(directory, &format!("nginx-{name}"), failing);
            scene.agents.push(Agent::start(
                directory,
                name,
                arm,
                application.address,
                aggregator,
            ));
            scene.applications.push(application);
        }
        scene
    }

    /// Starts the load generator.
    pub fn load(&self, rate: u32, requests: u64) -> Load {
        let report = self.directory.join(format!("load-{requests}.json"));
        let mut command = Command::new(program("coalmine"));
        command.args([
            "demo",
            "load",
            "--rate",
            &rate.to_string(),
            "--requests",
            &requests.to_string(),
        ]);
        command.arg("--report").arg(&report);
        for (agent, arm) in self.agents.iter().zip(["--baseline", "--baseline", "--canary"]) {
            command.args([arm, &agent.address.to_string()]);
        }
        Load {
            process: Process::start(command, &self.directory.join("load.log")),
            report,
        }
    }
}

/// A running load generator.
#[derive(Debug)]
pub struct Load {
    process: Process,
    report: PathBuf,
}

impl Load {
    /// Waits until all requests are sent and answered; gives what was sent.
    ///
    /// # Panics
    /// When a request was not answered.
    pub fn finish(mut self) -> Counts {
        let status = eventually("the load generator ends", || self.process.ended());
        assert!(status.success(), "{}", self.process.said());
        let report: Value =
            serde_json::from_str(&std::fs::read_to_string(&self.report).expect("a report")).expect("JSON");
        assert_eq!(report["unanswered"], 0, "requests without an answer");
        Counts::of(&report["counts"])
    }
}
