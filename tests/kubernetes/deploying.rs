//! What the tests with real deploy tools share: a cluster with controllers and nodes, an aggregator that injects, watches
//! and halts, and one service for each trial, so that trials run beside each other.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use coalmine_tests::{
    components::Aggregator,
    http::{get, post},
    kubernetes::{Client, Nodes, Plan, Split, program},
    process::{Process, coalmine, repository},
    within,
};
use serde_json::{Value, json};

use crate::scene::Scene;

/// Longest that one step of a trial may take: some turns of a controller that looks every ten seconds.
pub(crate) const STEP: Duration = Duration::from_secs(150);

/// How often something is looked at that changes by the second.
const LOOK_EVERY: Duration = Duration::from_millis(400);

/// Requests a second for each service.
const RATE: u32 = 300;

/// The account by which the aggregator knows agents.
const AUDIENCE: &str = "coalmine";

/// Those that make pods of workloads, and take away what belongs to nobody.
const CONTROLLERS: &str = "deployment-controller,replicaset-controller,serviceaccount-controller,\
                           namespace-controller,garbage-collector-controller";

/// A service on trial, in a namespace of its name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trial {
    pub(crate) name: &'static str,
    /// For how long it may be held.
    pub(crate) hold_deadline: &'static str,
    /// Requests of the canary without which a tenant is not judged.
    pub(crate) requests: u64,
}

/// A cluster in which a deploy tool is at work.
pub(crate) struct Stage {
    pub(crate) client: Client,
    /// The API of the aggregator, and where agents connect: also while it is away.
    pub(crate) http: SocketAddr,
    grpc: SocketAddr,
    /// What deploy tools present.
    pub(crate) tool_token: String,
    /// What a person presents.
    person_token: String,
    // The controllers end before the cluster does.
    controllers: BTreeMap<&'static str, Process>,
    scene: Scene,
}

// === impl Trial ===

impl Trial {
    /// A trial that ends well before it is held too long.
    pub(crate) const fn named(name: &'static str) -> Self {
        Self {
            name,
            hold_deadline: "10m",
            requests: 10,
        }
    }

    /// Only errors are judged: everything shares one machine, where nobody knows how long an answer takes.
    fn policy(&self) -> String {
        let Self {
            name,
            hold_deadline,
            requests,
        } = self;
        format!(
            "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: {name}
defaults:
  errors: {{ max_rate: 2%, max_increase: 0.5pp, max_ratio: 1.5 }}
  judge_window: 1s
  hold_deadline: {hold_deadline}
  required: [errors]
rollout: {{ min_coverage: {{ requests: {requests} }} }}
"
        )
    }

    /// The path of an object in the trial's namespace.
    pub(crate) fn path(&self, group: &str, kind: &str, name: &str) -> String {
        format!("/apis/{group}/namespaces/{}/{kind}/{name}", self.name)
    }

    /// The template of its pods: as an application's owner writes it.
    pub(crate) fn template(&self, version: &str) -> Value {
        json!({
            "metadata": {
                "labels": {
                    "app": self.name,
                    "app.kubernetes.io/name": self.name,
                    "app.kubernetes.io/version": version,
                    "coalmine.dev/inject": "enabled",
                },
                "annotations": { "coalmine.dev/tenant": "header:x-tenant-id" },
            },
            "spec": { "containers": [{
                "name": "app",
                "image": format!("registry.example.com/{}:{version}", self.name),
                "ports": [{ "name": "http", "containerPort": 8080 }],
            }] },
        })
    }
}

// === impl Stage ===

impl Stage {
    /// Starts all but the deploy tool, with the tool's definitions. `halt` is what the aggregator does by itself.
    pub(crate) fn begin(halt: &'static str, definitions: &[&str], trials: &[Trial]) -> (Aggregator, Self) {
        let scene = Scene::install(&["webhook", "watch", "identity", halt]);
        for definition in definitions {
            scene.cluster.custom_resources(definition);
        }
        let tokens = scene.directory.path().join("tokens").display().to_string();
        let tool_token = make_token(&tokens, "tool", "gate,rollout");
        let person_token = make_token(&tokens, "person", "gate,override");
        let mut arguments = ["--watch-pods", "--tokens", &tokens].map(str::to_owned).to_vec();
        arguments.extend(["--halt", halt, "--agent-audience", AUDIENCE].map(str::to_owned));
        for trial in trials {
            scene.cluster.namespace(trial.name, &json!({}));
            let file = scene.directory.path().join(format!("{}.yaml", trial.name));
            fs::write(&file, trial.policy()).unwrap();
            arguments.extend(["--policy".to_owned(), file.display().to_string()]);
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let aggregator = scene.injecting(&arguments);
        let mut stage = Self {
            client: scene.cluster.client(),
            http: aggregator.http,
            grpc: aggregator.grpc,
            tool_token,
            person_token,
            controllers: BTreeMap::new(),
            scene,
        };
        let kubeconfig = stage.kubeconfig("--kubeconfig");
        stage.run(
            "kube-controller-manager",
            &[
                &kubeconfig,
                &format!("--controllers={CONTROLLERS}"),
                "--leader-elect=false",
                "--use-service-account-credentials=false",
                // It serves nobody.
                "--secure-port=0",
            ],
        );
        (aggregator, stage)
    }

    /// The argument by which a controller finds the cluster.
    pub(crate) fn kubeconfig(&self, flag: &str) -> String {
        format!("{flag}={}", self.scene.cluster.kubeconfig().display())
    }

    /// Runs a controller until the stage ends.
    pub(crate) fn run(&mut self, name: &'static str, arguments: &[&str]) {
        let mut command = Command::new(program(name));
        command.args(arguments);
        let log = self.scene.directory.path().join(format!("{name}.log"));
        self.controllers.insert(name, Process::start(command, &log));
    }

    /// What a controller said.
    pub(crate) fn said(&self, name: &str) -> String {
        self.controllers.get(name).map(Process::said).unwrap_or_default()
    }

    /// Begins to play the nodes of a trial.
    pub(crate) fn nodes(&self, trial: &Trial, split: Split) -> Nodes {
        let directory = self.scene.directory.path().join(trial.name);
        fs::create_dir(&directory).unwrap();
        let plan = Plan {
            namespace: trial.name.to_owned(),
            aggregator: self.grpc,
            rate: RATE,
            split,
            directory,
        };
        Nodes::start(self.client, plan)
    }

    /// Makes an object, or makes it so.
    pub(crate) fn apply(&self, object: &Value) {
        self.scene.cluster.apply(object);
    }

    /// The objects of an example as it is shipped, but with the names, addresses and the token of a trial.
    pub(crate) fn example(&self, trial: &Trial, file: &str) -> Vec<Value> {
        let path = repository().join("deploy/examples").join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let text = text
            .replace("coalmine.coalmine:8080", &self.http.to_string())
            .replace("${COALMINE_TOKEN}", &self.tool_token)
            .replace("shop", trial.name)
            .replace("checkout", trial.name);
        serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// The Secret with the token, by which the examples find it.
    pub(crate) fn apply_token(&self, trial: &Trial) {
        self.apply(&json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": { "name": "coalmine-token", "namespace": trial.name },
            "stringData": { "token": self.tool_token },
        }));
    }

    /// Gives a workload and its template another version: what a deployment is.
    pub(crate) fn deploy(&self, workload: &str, version: &str) {
        let labels = json!({ "labels": { "app.kubernetes.io/version": version } });
        let patch = json!({ "metadata": labels, "spec": { "template": { "metadata": labels } } });
        let answer = self.client.request("PATCH", workload, &patch);
        assert_eq!(answer.status, 200, "{workload}: {}", answer.body);
    }

    /// An object that is there.
    pub(crate) fn get(&self, path: &str) -> Value {
        let answer = self.client.request("GET", path, &Value::Null);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()
    }

    /// Waits until an object's status says so; gives the object.
    pub(crate) fn wait(&self, path: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        patiently(&format!("{path}: {what}"), || {
            let object = self.get(path);
            is_so(&object["status"]).then_some(object)
        })
    }

    /// What people see.
    pub(crate) fn describe(&self, trial: &Trial, kind: &str) -> String {
        self.scene
            .cluster
            .kubectl(["describe", kind, trial.name, "-n", trial.name])
    }

    /// Waits until people see all of this.
    pub(crate) fn wait_for_description(&self, trial: &Trial, kind: &str, parts: &[&str]) {
        let what = format!("{kind} {}: describe shows {parts:?}", trial.name);
        patiently(&what, || {
            let shown = self.describe(trial, kind);
            parts.iter().all(|part| shown.contains(part)).then_some(())
        });
    }

    /// The rollouts of a trial, the newest first; waits for an aggregator that is away.
    pub(crate) fn rollouts(&self, trial: &Trial) -> Vec<Value> {
        patiently("the rollouts are listed", || self.try_rollouts(trial))
    }

    /// The same; none while the aggregator is away.
    fn try_rollouts(&self, trial: &Trial) -> Option<Vec<Value>> {
        let answer = get(self.http, &self.path("/v1/rollouts")).ok()?;
        if answer.status != 200 {
            return None;
        }
        let Value::Array(all) = answer.json()["rollouts"].take() else {
            panic!("no list of rollouts: {}", answer.body);
        };
        let of_trial = all.into_iter();
        Some(
            of_trial
                .filter(|rollout| rollout["service"] == trial.name)
                .collect(),
        )
    }

    /// Waits until the newest rollout of a trial is so; gives it.
    pub(crate) fn wait_for_rollout(
        &self,
        trial: &Trial,
        what: &str,
        is_so: impl Fn(&Value) -> bool,
    ) -> Value {
        patiently(&format!("{}: the rollout {what}", trial.name), || {
            let newest = self.try_rollouts(trial)?.into_iter().next()?;
            is_so(&newest).then_some(newest)
        })
    }

    /// Decides for the judge, or gives the decision back to it.
    pub(crate) fn decide(&self, rollout: &Value, verdict: Option<&str>) {
        let path = format!("/v1/rollouts/{}/override", rollout["id"].as_str().unwrap());
        let order = json!({ "verdict": verdict, "reason": "a rehearsal" });
        // It may be away, or coming, at this very moment.
        patiently(&path, || {
            let answer = post(self.http, &self.path(&path), &order).ok()?;
            assert!(matches!(answer.status, 200 | 503), "{path}: {}", answer.body);
            (answer.status == 200).then_some(())
        });
    }

    /// A path as it is for a person.
    fn path(&self, path: &str) -> String {
        format!("/t/{}{path}", self.person_token)
    }
}

/// Makes a token for all services; it stands in the file of the aggregator's from then on.
fn make_token(file: &str, name: &str, scopes: &str) -> String {
    let output = coalmine([
        "token",
        "create",
        "--name",
        name,
        "--scope",
        scopes,
        "--service",
        "*",
        "--file",
        file,
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Waits until `condition` gives a value, and looks no more often than is of use.
pub(crate) fn patiently<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let mut next = Instant::now();
    within(STEP, what, || {
        if Instant::now() < next {
            return None;
        }
        let found = condition();
        next = Instant::now() + LOOK_EVERY;
        found
    })
}
