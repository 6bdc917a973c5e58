//! Nodes, played: what a scheduler and a kubelet would do with pods that ask for an agent, by real processes on loopback.
//!
//! For each namespace one thread asks which pods there are, and
//! - binds a pod to a node, starts its application (nginx) and, with the arguments of the container that was injected,
//!   its agent. Addresses and files are those of this machine. Then the pod is running and ready;
//! - writes the agent's file of labels anew when the pod's labels change;
//! - leads requests to the pods by their arm, as something says that routes them;
//! - ends a pod that is being deleted, once no request is led to it any more, and takes it away.
//!
//! A pod that was made while nobody could inject has no agent, and requests go to its application.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread::{JoinHandle, panicking, spawn},
    time::Duration,
};

use coalmine_proto::names::Arm;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Client;
use crate::{
    components::Nginx,
    http::Answer,
    process::{Process, free_addresses, program, wait_for_listener},
};

/// The tenant that gets 500s from a version whose name ends so: `-broken`. It is the sixth by traffic.
pub const FAILING: &str = "stark-bank";

const BROKEN: &str = "-broken";

/// How often a namespace is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(400);

/// So few that each is seen often.
const TENANTS: &str = "20";

const SELECTOR: &str = "labelSelector=coalmine.dev%2Finject%3Denabled";
const VERSION: &str = "app.kubernetes.io/version";
const AGENT: &str = "coalmine-agent";

/// What says how many requests each arm gets.
#[derive(Debug, Clone)]
pub enum Split {
    /// No pod is preferred, as behind a Service.
    Pods,
    /// The canary's share in percent, at a place in an object; none while it is not there.
    Weight {
        /// The object's path.
        object: String,
        /// The place (RFC 6901).
        pointer: &'static str,
    },
}

/// What is played for a namespace.
#[derive(Debug)]
pub struct Plan {
    /// The namespace.
    pub namespace: String,
    /// Where agents send their windows.
    pub aggregator: SocketAddr,
    /// Requests a second.
    pub rate: u32,
    /// Who gets them.
    pub split: Split,
    /// Where the files of its processes go.
    pub directory: PathBuf,
}

/// The nodes of a namespace; its pods end when this is dropped.
#[derive(Debug)]
pub struct Nodes {
    running: Option<(Sender<()>, JoinHandle<()>)>,
}

struct Node {
    plan: Plan,
    client: Client,
    /// By uid.
    pods: BTreeMap<String, Pod>,
    aim: Option<Aim>,
    load: Option<Process>,
}

/// A pod that runs.
struct Pod {
    /// Ended first: what it has counted is sent, and nobody asks the application any more.
    agent: Option<Process>,
    _application: Nginx,
    /// Where requests to it go.
    address: SocketAddr,
    labels_file: PathBuf,
    labels: Value,
}

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Aim {
    canaries: Vec<SocketAddr>,
    baselines: Vec<SocketAddr>,
    canary_percent: u64,
}

// === impl Nodes ===

impl Nodes {
    /// Begins to play.
    pub fn start(client: Client, plan: Plan) -> Self {
        let (stop, stopped) = channel();
        let node = Node {
            plan,
            client,
            pods: BTreeMap::new(),
            aim: None,
            load: None,
        };
        let thread = spawn(move || node.run(&stopped));
        Self {
            running: Some((stop, thread)),
        }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        let Some((stop, thread)) = self.running.take() else {
            return;
        };
        drop(stop);
        if let Err(panic) = thread.join()
            && !panicking()
        {
            resume_unwind(panic);
        }
    }
}

// === impl Node ===

impl Node {
    fn run(mut self, stopped: &Receiver<()>) {
        // Nothing is ever sent: the other end is dropped when it is over.
        while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            self.look();
        }
    }

    fn look(&mut self) {
        let path = format!("{}?{SELECTOR}", self.path(""));
        let mut list = self.client.request("GET", &path, &Value::Null).json();
        let Value::Array(pods) = list["items"].take() else {
            panic!("no list of pods: {list}");
        };
        let (gone, there): (Vec<_>, Vec<_>) = pods
            .into_iter()
            .partition(|pod| pod["metadata"]["deletionTimestamp"].is_string());
        for pod in &there {
            let uid = text(&pod["metadata"]["uid"]);
            match self.pods.get_mut(uid) {
                Some(known) => known.label(&pod["metadata"]["labels"]),
                None => self.start(pod),
            }
        }
        self.lead(&there);
        let is_there = |uid: &String| there.iter().any(|pod| pod["metadata"]["uid"] == uid.as_str());
        let ended: Vec<_> = self.pods.extract_if(.., |uid, _| !is_there(uid)).collect();
        ended.into_iter().for_each(|(_, pod)| pod.end());
        for pod in &gone {
            self.take_away(pod);
        }
    }

    fn path(&self, rest: &str) -> String {
        format!("/api/v1/namespaces/{}/pods{rest}", self.plan.namespace)
    }

    /// Where a file of a pod is.
    fn file(&self, pod: &Value, name: &str) -> PathBuf {
        self.plan
            .directory
            .join(format!("{}-{name}", text(&pod["metadata"]["name"])))
    }

    fn start(&mut self, pod: &Value) {
        let name = text(&pod["metadata"]["name"]);
        self.bind(name);
        let labels = &pod["metadata"]["labels"];
        let failing = text(&labels[VERSION]).ends_with(BROKEN).then_some(FAILING);
        let application = Nginx::start(&self.plan.directory, &format!("{name}-nginx"), failing);
        let labels_file = self.file(pod, "labels");
        write_labels(&labels_file, labels);
        let agent = container(pod).map(|container| self.start_agent(pod, container, &application));
        let (agent, address) = match agent {
            Some((agent, address)) => (Some(agent), address),
            None => (None, application.address),
        };
        self.tell_running(pod);
        let running = Pod {
            agent,
            address,
            labels_file,
            labels: labels.clone(),
            _application: application,
        };
        self.pods
            .insert(text(&pod["metadata"]["uid"]).to_owned(), running);
    }

    /// As a scheduler does it, unless the pod says itself where it is to run.
    fn bind(&self, name: &str) {
        let target = json!({ "apiVersion": "v1", "kind": "Node", "name": "loopback" });
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": { "name": name }, "target": target,
        });
        let path = self.path(&format!("/{name}/binding"));
        // It may be gone by now, or be bound.
        expect(
            &self.client.request("POST", &path, &binding),
            &[201, 404, 409],
            &path,
        );
    }

    fn start_agent(&self, pod: &Value, container: &Value, application: &Nginx) -> (Process, SocketAddr) {
        let [address, admin] = free_addresses();
        let token_file = self.file(pod, "token");
        if let Some(audience) = audience(pod) {
            fs::write(&token_file, self.token(pod, audience)).expect("the token is written");
        }
        let here = [
            ("--listen", address.to_string()),
            ("--admin", admin.to_string()),
            ("--upstream", application.address.to_string()),
            ("--aggregator", format!("http://{}", self.plan.aggregator)),
            ("--labels-file", self.file(pod, "labels").display().to_string()),
            ("--token-file", token_file.display().to_string()),
        ];
        let mut command = Command::new(program("coalmine-agent"));
        command.args(arguments(container, text(&pod["metadata"]["uid"]), &here));
        let mut agent = Process::start(command, &self.file(pod, "agent.log"));
        wait_for_listener(&mut agent, address);
        (agent, address)
    }

    /// The token that a node would mount into the pod.
    fn token(&self, pod: &Value, audience: &str) -> String {
        let meta = &pod["metadata"];
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [audience],
                "expirationSeconds": 3_600,
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"],
                },
            },
        });
        let account = text(&pod["spec"]["serviceAccountName"]);
        let namespace = &self.plan.namespace;
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = self.client.request("POST", &path, &request);
        expect(&answer, &[201], &path);
        text(&answer.json()["status"]["token"]).to_owned()
    }

    fn tell_running(&self, pod: &Value) {
        let now = Timestamp::now().to_string();
        let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
            .map(|kind| json!({ "type": kind, "status": "True", "lastTransitionTime": now }));
        let status = json!({ "status": {
            "phase": "Running",
            "startTime": now,
            "podIP": "10.0.0.1",
            "podIPs": [{ "ip": "10.0.0.1" }],
            "conditions": conditions,
            "initContainerStatuses": statuses(&pod["spec"]["initContainers"], &now),
            "containerStatuses": statuses(&pod["spec"]["containers"], &now),
        } });
        let path = self.path(&format!("/{}/status", text(&pod["metadata"]["name"])));
        expect(&self.client.request("PATCH", &path, &status), &[200, 404], &path);
    }

    /// Leads requests anew when there are other pods, or other shares.
    fn lead(&mut self, pods: &[Value]) {
        let aim = self.aim(pods);
        if aim == self.aim {
            return;
        }
        if let Some(load) = self.load.take() {
            // Whoever was asked has answered before anything is ended.
            assert!(load.terminate().success(), "the load generator ends");
        }
        let log = self.plan.directory.join("load.log");
        self.load = aim
            .as_ref()
            .map(|aim| Process::start(aim.command(self.plan.rate), &log));
        self.aim = aim;
    }

    /// Where requests are to go; none while there is no baseline.
    fn aim(&self, pods: &[Value]) -> Option<Aim> {
        let of = |arm: Arm| -> Vec<SocketAddr> {
            let of_pod = |pod: &Value| {
                let labels = &pod["metadata"]["labels"];
                Arm::of_labels(|name| labels[name].as_str())
            };
            let ours = pods.iter().filter(|pod| of_pod(pod) == Some(Ok(arm)));
            let uids = ours.map(|pod| text(&pod["metadata"]["uid"]));
            uids.filter_map(|uid| Some(self.pods.get(uid)?.address)).collect()
        };
        let (canaries, baselines) = (of(Arm::Canary), of(Arm::Baseline));
        let canary_percent = match &self.plan.split {
            _ if canaries.is_empty() => 0,
            Split::Pods => 100 * canaries.len() as u64 / (canaries.len() + baselines.len()) as u64,
            Split::Weight { object, pointer } => {
                let answer = self.client.request("GET", object, &Value::Null);
                expect(&answer, &[200, 404], object);
                answer
                    .json()
                    .pointer(pointer)
                    .and_then(Value::as_u64)
                    .unwrap_or(0)
            }
        };
        (!baselines.is_empty()).then_some(Aim {
            canaries,
            baselines,
            canary_percent,
        })
    }

    /// Says of a pod that it has ended, after which nobody knows it any more.
    fn take_away(&self, pod: &Value) {
        let options = json!({ "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0 });
        let path = self.path(&format!("/{}", text(&pod["metadata"]["name"])));
        expect(
            &self.client.request("DELETE", &path, &options),
            &[200, 404],
            &path,
        );
    }
}

// === impl Pod ===

impl Pod {
    fn label(&mut self, labels: &Value) {
        if self.labels != *labels {
            write_labels(&self.labels_file, labels);
            self.labels = labels.clone();
        }
    }

    fn end(self) {
        if let Some(agent) = self.agent {
            assert!(agent.terminate().success(), "the agent ends");
        }
    }
}

// === impl Aim ===

impl Aim {
    fn command(&self, rate: u32) -> Command {
        let mut command = Command::new(program("coalmine"));
        command.args(["demo", "load", "--tenants", TENANTS]);
        command.args(["--rate", &rate.to_string()]);
        command.args(["--canary-percent", &self.canary_percent.to_string()]);
        // It wants one of each. None of these requests is for a canary when there is none.
        let canaries = if self.canaries.is_empty() {
            &self.baselines
        } else {
            &self.canaries
        };
        let targets = [("--canary", canaries), ("--baseline", &self.baselines)];
        for (flag, addresses) in targets {
            for address in addresses {
                command.args([flag, &address.to_string()]);
            }
        }
        command
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn expect(answer: &Answer, wanted: &[u16], path: &str) {
    assert!(
        wanted.contains(&answer.status),
        "{path}: {} {}",
        answer.status,
        answer.body
    );
}

/// The agent's container.
fn container(pod: &Value) -> Option<&Value> {
    let lists = ["initContainers", "containers"].map(|list| pod["spec"][list].as_array());
    let mut all = lists.into_iter().flatten().flatten();
    all.find(|container| container["name"] == AGENT)
}

/// The container's arguments as the node gives them, with what is elsewhere here put in their place.
fn arguments(container: &Value, uid: &str, here: &[(&str, String)]) -> Vec<String> {
    let given = container["args"].as_array().into_iter().flatten().map(text);
    given
        .map(|argument| {
            let flag = argument.split_once('=').map_or(argument, |(flag, _)| flag);
            match here.iter().find(|(name, _)| *name == flag) {
                Some((_, value)) => format!("{flag}={value}"),
                None => argument.replace("$(POD_UID)", uid).replace("$$", "$"),
            }
        })
        .collect()
}

/// Whom the pod's own token is for.
fn audience(pod: &Value) -> Option<&str> {
    let volumes = pod["spec"]["volumes"].as_array()?;
    let sources = volumes
        .iter()
        .filter_map(|volume| volume["projected"]["sources"].as_array());
    // What every pod gets, for the API server, names nobody.
    let mut audiences = sources
        .flatten()
        .filter_map(|source| source["serviceAccountToken"]["audience"].as_str());
    audiences.next()
}

/// The states of containers that stay.
fn statuses(containers: &Value, now: &str) -> Value {
    let containers = containers.as_array().into_iter().flatten();
    containers
        .map(|container| {
            json!({
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": true,
                "started": true,
                "restartCount": 0,
                "state": { "running": { "startedAt": now } },
            })
        })
        .collect()
}

/// As the kubelet does it: another file takes the place of the old one.
fn write_labels(file: &Path, labels: &Value) {
    let lines = labels.as_object().into_iter().flatten();
    let lines: String = lines.map(|(key, value)| format!("{key}={value}\n")).collect();
    let fresh = file.with_extension("fresh");
    fs::write(&fresh, lines).expect("the labels are written");
    fs::rename(&fresh, file).expect("the labels are replaced");
}
