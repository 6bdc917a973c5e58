//! What a crash or a bad disk does to an aggregator: nothing that it said before becomes untrue, and no request that an
//! agent counted is lost or counted twice.
//!
//! Here is what these tests share: the promises that an aggregator makes while it runs, and agents made by hand.

#![allow(clippy::print_stderr, reason = "a long test says how it went")]

mod restart;

mod kills;

mod faults;

pub(crate) mod full_disk;

mod elsewhere;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    slice,
    time::Duration,
};

use coalmine_judge::{
    chain::Hash,
    note::{Checkpoint, Note, VerifierKey},
    tree::{Nodes, is_consistent},
};
use coalmine_proto::{names::Arm, v1::TenantRow};
use coalmine_tests::{
    components::{Aggregator, Counts},
    eventually,
    http::{get, post},
    process::coalmine,
    speaker::{Speaker, now_ms},
};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

/// Windows of one second, and errors alone: three good windows are enough for APPROVE.
const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 5% }
  judge_window: 1s
  hold_deadline: 5m
  required: [errors]
rollout: { min_coverage: { requests: 10 } }
";

/// How long an agent listens in a turn that a test gives it.
const LISTEN: Duration = Duration::from_millis(5);

/// How long agents may take to get rid of all that they hold.
const FLUSH: Duration = Duration::from_secs(120);

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
        .to_owned()
}

/// An answer of the API that came whole; none if the aggregator cannot answer now.
fn ask(http: SocketAddr, path: &str) -> Option<Value> {
    let answer = get(http, path).ok().filter(|answer| answer.status == 200)?;
    serde_json::from_str(&answer.body).ok()
}

/// Starts a rollout, or finds the one with this key; gives its name. None if that is not to be had now.
fn start(http: SocketAddr, key: &str) -> Option<String> {
    let request = json!({ "service": "checkout", "canary_version": "v2", "key": key });
    let answer = post(http, "/v1/rollouts", &request).ok()?;
    assert!(!(400..500).contains(&answer.status), "{key}: {}", answer.body);
    let body: Value = serde_json::from_str(&answer.body).ok()?;
    let started = matches!(answer.status, 200 | 201);
    started.then(|| text(&body["id"]))
}

/// Ends a rollout. None if that is not to be had now.
fn end(http: SocketAddr, rollout: &str) -> Option<()> {
    let answer = post(http, &format!("/v1/rollouts/{rollout}/end"), &json!({})).ok()?;
    assert_ne!(answer.status, 404, "{rollout} was started: {}", answer.body);
    (answer.status == 200).then_some(())
}

/// Ends every rollout that is open.
fn end_all(aggregator: &Aggregator) {
    for rollout in aggregator.get("/v1/rollouts")["rollouts"].as_array().unwrap() {
        if rollout["state"] != "ended" {
            let id = text(&rollout["id"]);
            eventually(&format!("{id} is ended"), || end(aggregator.http, &id));
        }
    }
}

/// The book has exactly what the agents counted, and no gap.
fn conserves(aggregator: &Aggregator, made: &Counts) {
    assert_eq!(&aggregator.counts(), made, "requests by arm, tenant and outcome");
    if made.total() > 0 {
        let service = aggregator.get("/v1/services/checkout");
        for arm in Arm::ALL {
            assert_eq!(service["arms"][arm.as_str()]["gap_requests"], 0, "{service}");
        }
    }
}

/// The directory is whole, and every decision in it can be made again.
fn verified(data: &Path) {
    let data = data.display().to_string();
    for (arguments, says) in [
        (vec!["audit", "verify", "--data", &data], "verified"),
        (
            vec!["replay", "--all", "--data", &data],
            "the same bytes, all of them",
        ),
    ] {
        let output = coalmine(&arguments);
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.contains(says),
            "{arguments:?}: {said}"
        );
    }
}

/// The records' lines, from the oldest segment to the current one.
fn lines(data: &Path) -> Vec<String> {
    let names = fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path());
    let is_sealed = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("decisions-") && name.ends_with(".jsonl")
    };
    let mut files: Vec<PathBuf> = names.filter(is_sealed).collect();
    files.sort();
    files.push(data.join("decisions.jsonl"));
    let all = files.iter().map(|file| fs::read_to_string(file).unwrap());
    all.collect::<String>().lines().map(str::to_owned).collect()
}

/// A hash in base64, read as a checkpoint has its root.
fn hash_of(base64: &Value) -> Hash {
    Checkpoint::parse(&format!("log\n1\n{}\n", text(base64)))
        .unwrap()
        .root
}

/// What an aggregator said, and must stand by whatever happens to it.
#[derive(Debug, Clone, Default)]
struct Promises {
    /// Hashes of the decisions that it showed as recorded.
    decisions: BTreeMap<String, String>,
    /// Signed checkpoints, by the number of records that they cover.
    checkpoints: BTreeMap<u64, String>,
    /// Names of the rollouts that it started, by key.
    rollouts: BTreeMap<String, String>,
    /// Rollouts that it ended.
    ended: BTreeSet<String>,
}

impl Promises {
    fn decided(&mut self, id: &Value, hash: &Value) {
        if let (Some(id), Some(hash)) = (id.as_str(), hash.as_str()) {
            let before = self.decisions.insert(id.to_owned(), hash.to_owned());
            assert!(
                before.is_none_or(|before| before == hash),
                "decision {id} has become another one"
            );
        }
    }

    fn signed(&mut self, note: &str) {
        // One that breaks off, since the aggregator died in the middle, is no note.
        let checkpoint = Note::parse(note).and_then(|note| Checkpoint::parse(note.unverified()));
        if let Ok(checkpoint) = checkpoint {
            let before = self.checkpoints.insert(checkpoint.size, note.to_owned());
            assert!(
                before.is_none_or(|before| before == note),
                "two checkpoints of one size: {note}"
            );
        }
    }

    fn started(&mut self, key: &str, rollout: &str) {
        let before = self.rollouts.insert(key.to_owned(), rollout.to_owned());
        assert!(
            before.is_none_or(|before| before == rollout),
            "the key {key} was another rollout's"
        );
    }

    /// Takes note of what the gate says, and of the checkpoint; nothing if the aggregator is down.
    fn ask_gate(&mut self, http: SocketAddr, rollout: &str) {
        if let Some(gate) = ask(http, &format!("/v1/rollouts/{rollout}/gate")) {
            self.decided(&gate["decision_id"], &gate["decision_hash"]);
        }
        let note = get(http, "/v1/audit/checkpoint").ok();
        if let Some(note) = note.filter(|answer| answer.status == 200) {
            self.signed(&note.body);
        }
    }

    /// Takes note of the newest records of a rollout; nothing if the aggregator is down.
    fn ask_records(&mut self, http: SocketAddr, rollout: &str) {
        let found = ask(http, &format!("/v1/decisions?rollout={rollout}&limit=10")).unwrap_or_default();
        for decision in found["decisions"].as_array().into_iter().flatten() {
            self.decided(&decision["record"]["body"]["id"], &decision["hash"]);
        }
    }

    /// Adds what somebody else was told.
    fn merge(&mut self, other: Self) {
        for (id, hash) in other.decisions {
            self.decided(&id.into(), &hash.into());
        }
        other.checkpoints.values().for_each(|note| self.signed(note));
        for (key, rollout) in &other.rollouts {
            self.started(key, rollout);
        }
        self.ended.extend(other.ended);
    }

    /// Holds an aggregator that runs to all of it, then stops it, and holds its directory to all of it.
    fn hold(&self, aggregator: &mut Aggregator) {
        let latest = get(aggregator.http, "/v1/audit/checkpoint").unwrap();
        assert_eq!(latest.status, 200, "{}", latest.body);
        let first: Value = serde_json::from_str(&lines(&aggregator.data)[0]).unwrap();
        let key = VerifierKey::parse(&text(&first["body"]["key"])).unwrap();
        let open = |note: &str| Checkpoint::open(note, slice::from_ref(&key)).unwrap();
        let now = open(&latest.body);
        for note in self.checkpoints.values() {
            let before = open(note);
            let path = format!("/v1/audit/consistency?from={}&to={}", before.size, now.size);
            let proof = aggregator.get(&path);
            let path: Vec<Hash> = proof["path"].as_array().unwrap().iter().map(hash_of).collect();
            assert!(
                is_consistent(before.size, before.root, now.size, now.root, &path),
                "{note}{}: {proof}",
                latest.body
            );
        }
        for (id, hash) in &self.decisions {
            assert_eq!(
                aggregator.get(&format!("/v1/decisions/{id}"))["hash"],
                **hash,
                "{id}"
            );
        }
        aggregator.terminate();
        self.hold_records(&aggregator.data, &open);
        verified(&aggregator.data);
    }

    /// Each decision, rollout and end is in the log, once, and each checkpoint is of this log.
    fn hold_records(&self, data: &Path, open: &impl Fn(&str) -> Checkpoint) {
        let mut nodes = Nodes::default();
        let (mut decisions, mut rollouts, mut ended) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        for (position, line) in lines(data).iter().enumerate() {
            let record: Value = serde_json::from_str(line).unwrap();
            assert_eq!(record["seq"], position, "{line}");
            let hash = Hash::leaf(line.as_bytes());
            nodes.push(hash);
            let body = &record["body"];
            let fresh = match body["type"].as_str() {
                Some("decision") => decisions.insert(text(&body["id"]), hash.to_string()).is_none(),
                Some("rollout") => rollouts
                    .insert(text(&body["key"]), text(&body["rollout"]))
                    .is_none(),
                Some("end") => ended.insert(text(&body["rollout"])),
                _ => true,
            };
            assert!(fresh, "this was recorded before: {line}");
        }
        for (id, hash) in &self.decisions {
            assert_eq!(decisions.get(id), Some(hash), "decision {id}");
        }
        for (key, rollout) in &self.rollouts {
            assert_eq!(rollouts.get(key), Some(rollout), "the rollout with the key {key}");
        }
        for rollout in &self.ended {
            assert!(ended.contains(rollout), "the end of {rollout}");
        }
        for note in self.checkpoints.values() {
            let checkpoint = open(note);
            assert_eq!(nodes.root(checkpoint.size), Some(checkpoint.root), "{note}");
        }
    }
}

/// What each agent counts in each window.
#[derive(Debug, Clone, Copy)]
struct Traffic {
    tenants: u32,
    /// Of each tenant.
    requests: u64,
    length_ms: u32,
}

impl Traffic {
    fn names(self) -> impl Iterator<Item = String> {
        (0..self.tenants).map(|tenant| format!("tenant-{tenant:03}"))
    }

    /// A window's rows; a fifth of the requests has failed if it is said so.
    fn rows(self, failing: bool) -> Vec<TenantRow> {
        let failed = if failing { self.requests / 5 } else { 0 };
        let row = |tenant: u32| TenantRow {
            tenant,
            success: self.requests - failed,
            client_error: u64::from(tenant % 3),
            server_error: failed,
            client_abort: u64::from(tenant % 2),
            ..TenantRow::default()
        };
        (0..self.tenants).map(row).collect()
    }
}

/// Agents made by hand whose windows follow the clock; they talk when a test gives them a turn.
struct Agents {
    runtime: Runtime,
    speakers: Vec<Speaker>,
    traffic: Traffic,
    /// Start of the next window.
    next_ms: u64,
}

impl Agents {
    /// So many agents on each arm.
    fn new(on_each_arm: usize, traffic: Traffic) -> Self {
        let numbers = (0..on_each_arm).flat_map(|number| Arm::ALL.map(|arm| (number, arm)));
        let speaker = |(number, arm): (usize, Arm)| {
            Speaker::new("checkout", &format!("{arm}-{number}"), arm, traffic.names())
        };
        Self::of(numbers.map(speaker).collect(), traffic)
    }

    fn of(speakers: Vec<Speaker>, traffic: Traffic) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        Self {
            runtime: runtime.unwrap(),
            speakers,
            traffic,
            next_ms: now_ms().next_multiple_of(u64::from(traffic.length_ms)),
        }
    }

    /// Counts the windows that have ended since the last turn, and lets every agent talk for a moment. A fifth of the
    /// canary's requests fails if it is said so.
    fn turn(&mut self, grpc: SocketAddr, failing: bool) {
        let length_ms = self.traffic.length_ms;
        while self.next_ms + u64::from(length_ms) <= now_ms() {
            for speaker in &mut self.speakers {
                let rows = self.traffic.rows(failing && speaker.arm() == Arm::Canary);
                speaker.count(self.next_ms, length_ms, rows);
            }
            self.next_ms += u64::from(length_ms);
        }
        self.runtime.block_on(async {
            for speaker in &mut self.speakers {
                // The aggregator may be down; then the agent comes back in another turn.
                speaker.turn(grpc, LISTEN).await.ok();
            }
        });
    }

    /// Lets all agents talk until every window is durable.
    fn flush(&mut self, grpc: SocketAddr) {
        let flushing: Vec<_> = self
            .speakers
            .drain(..)
            .map(|mut speaker| {
                self.runtime.spawn(async move {
                    speaker.flush(grpc, FLUSH).await;
                    speaker
                })
            })
            .collect();
        for speaker in flushing {
            self.speakers.push(self.runtime.block_on(speaker).unwrap());
        }
    }

    /// All that the agents have counted.
    fn made(&self) -> Counts {
        let mut made = Counts::default();
        self.speakers.iter().for_each(|speaker| made.add(speaker.made()));
        made
    }
}
