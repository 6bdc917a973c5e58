//! Whoever keeps checkpoints elsewhere notices what the data directory cannot tell: an older state of it that was put
//! back, and a log that went on from there. And what people do about it: keys, new logs, proofs, exports.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use coalmine_judge::{
    chain::Hash,
    note::{Checkpoint, Proof, VerifierKey},
};
use coalmine_tests::{
    components::{Aggregator, Counts},
    eventually,
    http::get,
    process::{Process, coalmine, free_addresses, program, repository, wait_for_listener},
    tools::tool,
};
use serde_json::Value;

use super::{Agents, POLICY, Traffic, ask, conserves, end_all, lines};
use crate::{gate::all_hold_back, stage};

const TRAFFIC: Traffic = Traffic {
    tenants: 2,
    requests: 500,
    length_ms: 1_000,
};

/// The key of the log in a directory, as `coalmine audit verify` prints it.
fn key_of(data: &Path) -> String {
    let output = coalmine([
        "audit",
        "verify",
        "--output",
        "json",
        "--data",
        &data.display().to_string(),
    ]);
    assert!(output.status.success(), "{output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    said["key"].as_str().unwrap().to_owned()
}

/// Runs the aggregator's program to its end; gives whether it succeeded, and what it said.
fn upkeep(arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(program("coalmine-aggregator"));
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

/// A rollout until it is approved; its decisions are recorded, and it stays open.
fn approved(aggregator: &Aggregator, agents: &mut Agents) -> String {
    let rollout = aggregator.start_rollout();
    let path = format!("/v1/rollouts/{rollout}");
    eventually("the rollout is approved", || {
        agents.turn(aggregator.grpc, false);
        ask(aggregator.http, &path).filter(|view| view["verdict"] == "APPROVE" && view["recorded"] == true)
    });
    rollout
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn put_back(backup: &Path, data: &Path) {
    fs::remove_dir_all(data).unwrap();
    copy(backup, data);
}

/// What was acknowledged by a state that is no more is declared as missing; all else is counted.
fn accounts_for(aggregator: &Aggregator, made: &Counts) {
    let service = aggregator.get("/v1/services/checkout");
    let missing = |arm: &str| service["arms"][arm]["gap_requests"].as_u64().unwrap();
    let missing = missing("canary") + missing("baseline");
    assert!(missing > 0, "{service}");
    assert_eq!(aggregator.counts().total() + missing, made.total(), "{service}");
}

/// Starts an aggregator that will not be ready.
fn launch_untrusted(aggregator: &mut Aggregator) {
    aggregator.spawn();
    eventually("the aggregator answers", || ask(aggregator.http, "/v1/rollouts"));
}

/// Nothing is approved, the state is said, and whoever asks learns why.
fn is_distrusted(aggregator: &Aggregator, rollout: &str, state: &str, says: &str) {
    let gate = aggregator.get(&format!("/v1/rollouts/{rollout}/gate"));
    assert_eq!(gate["verdict"], "HOLD", "{gate}");
    let reason = gate["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("APPROVE is held back: ") && reason.contains(says),
        "{gate}"
    );
    let ready = get(aggregator.admin, "/readyz").unwrap();
    assert!(ready.status == 503 && ready.body.contains(says), "{}", ready.body);
    let metrics = get(aggregator.admin, "/metrics").unwrap().body;
    let approves = |line: &&str| line.starts_with("coalmine_rollout_verdict{") && line.contains("APPROVE");
    let approved = metrics.lines().find(approves);
    assert!(approved.is_none_or(|line| line.ends_with(" 0")), "{approved:?}");
    let line = format!("coalmine_audit_log_state{{state=\"{state}\"}} 1");
    assert!(metrics.lines().any(|metric| metric == line), "{metrics}");
    all_hold_back(aggregator.http, rollout, || {});
}

struct Witness {
    data: PathBuf,
    address: SocketAddr,
    process: Process,
}

impl Witness {
    fn start(directory: &Path, log: &str) -> Self {
        let [address] = free_addresses();
        let data = directory.join("witness");
        let mut command = Command::new(program("coalmine"));
        let listen = address.to_string();
        command.args([
            "witness",
            "serve",
            "--name",
            "witness.example/w1",
            "--log",
            log,
            "--listen",
            &listen,
        ]);
        command.arg("--data").arg(&data);
        let mut process = Process::start(command, &directory.join("witness.log"));
        wait_for_listener(&mut process, address);
        Self {
            data,
            address,
            process,
        }
    }

    fn key(&self) -> String {
        let output = coalmine(["witness", "key", "--data", &self.data.display().to_string()]);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

#[test]
fn a_witness_signs_every_checkpoint_and_knows_when_an_older_state_is_put_back() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY);
    aggregator.launch();
    aggregator.terminate();
    let log_key = key_of(&aggregator.data);
    let witness = Witness::start(directory.path(), &log_key);
    let witness_key = witness.key();
    let flag = format!("http://{} {witness_key}", witness.address);
    let mut aggregator = aggregator.with_arguments(&["--witness", &flag]);
    aggregator.launch();
    let mut agents = Agents::new(1, TRAFFIC);
    let rollout = approved(&aggregator, &mut agents);

    // The checkpoint carries both signatures, and each alone is enough for whoever knows its key.
    let cosigned = eventually("the checkpoint is cosigned", || {
        let note = get(aggregator.http, "/v1/audit/checkpoint").ok()?.body;
        note.contains("— witness.example/w1 ").then_some(note)
    });
    for key in [&log_key, &witness_key] {
        let key = VerifierKey::parse(key).unwrap();
        assert!(Checkpoint::open(&cosigned, &[key]).is_ok(), "{cosigned}");
    }

    // The gate's answer is proof enough, for somebody who has only the log's key.
    let gate = aggregator.get(&format!("/v1/rollouts/{rollout}/gate?proof=true"));
    let record = gate["record"].as_str().unwrap();
    let proof = Proof::parse(gate["proof"].as_str().unwrap()).unwrap();
    let key = VerifierKey::parse(&log_key).unwrap();
    assert!(proof.verify(Hash::leaf(record.as_bytes()), &[key]).is_ok());
    assert!(record.contains(gate["decision_id"].as_str().unwrap()));
    let file = directory.path().join("proof");
    fs::write(&file, gate["proof"].as_str().unwrap()).unwrap();
    let output = coalmine(["audit", "check", &file.display().to_string(), "--key", &log_key]);
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("APPROVE"),
        "{output:?}"
    );
    let plain = aggregator.get(&format!("/v1/rollouts/{rollout}/gate"));
    assert!(plain.get("proof").is_none(), "{plain}");
    let id = gate["decision_id"].as_str().unwrap();
    let replayed = aggregator
        .post(&format!("/v1/decisions/{id}/replay"), &Value::Null)
        .json();
    assert_eq!(replayed["same"], true, "{replayed}");

    aggregator.terminate();
    let backup = directory.path().join("backup");
    copy(&aggregator.data, &backup);
    aggregator.launch();
    let before = lines(&aggregator.data).len();
    eventually("more is recorded and cosigned", || {
        agents.turn(aggregator.grpc, false);
        let note = get(aggregator.http, "/v1/audit/checkpoint").ok()?.body;
        let size: usize = note.lines().nth(1)?.parse().ok()?;
        (size > before + 2 && note.contains("— witness.example/w1 ")).then_some(())
    });
    aggregator.terminate();
    let newest = directory.path().join("newest");
    copy(&aggregator.data, &newest);

    // The older state is in order by itself.
    put_back(&backup, &aggregator.data);
    assert_eq!(key_of(&aggregator.data), log_key);
    launch_untrusted(&mut aggregator);
    is_distrusted(
        &aggregator,
        &rollout,
        "behind",
        "an older state of it was put back",
    );
    let records = lines(&aggregator.data).len();
    eventually("windows are judged and not recorded", || {
        agents.turn(aggregator.grpc, false);
        ask(aggregator.http, &format!("/v1/rollouts/{rollout}")).filter(|view| view["recorded"] == false)
    });
    aggregator.kill_9();
    assert_eq!(lines(&aggregator.data).len(), records, "nothing was recorded");
    let said = fs::read_to_string(directory.path().join("aggregator.log")).unwrap();
    assert!(
        said.contains("here=") && said.contains("there=") && said.contains("new-log"),
        "{said}"
    );

    // With the newer state back it goes on where it was.
    put_back(&newest, &aggregator.data);
    aggregator.launch();
    assert_eq!(get(aggregator.admin, "/readyz").unwrap().status, 200);
    let windows = aggregator.windows();
    eventually("each agent has sent another window", || {
        agents.turn(aggregator.grpc, false);
        (aggregator.windows() >= windows + 2).then_some(())
    });
    agents.flush(aggregator.grpc);
    accounts_for(&aggregator, &agents.made());
    end_all(&aggregator);
    aggregator.terminate();
    drop(witness.process);
    super::verified(&aggregator.data);
}

#[test]
fn a_copy_of_the_checkpoint_knows_of_forks_and_a_new_log_names_the_one_that_it_replaces() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let kept = directory.path().join("kept");
    let flag = kept.display().to_string();
    let mut aggregator =
        Aggregator::prepare_with(directory.path(), POLICY).with_arguments(&["--checkpoint-copy", &flag]);
    aggregator.launch();
    let mut agents = Agents::new(1, TRAFFIC);
    let rollout = approved(&aggregator, &mut agents);
    aggregator.terminate();
    let data = aggregator.data.display().to_string();
    assert_eq!(
        fs::read(&kept).unwrap(),
        fs::read(aggregator.data.join("checkpoint")).unwrap()
    );

    // A volume that is empty is no new beginning.
    let backup = directory.path().join("backup");
    copy(&aggregator.data, &backup);
    fs::remove_dir_all(&aggregator.data).unwrap();
    aggregator.spawn();
    let status = eventually("it does not start", || aggregator.ended());
    assert_eq!(status.code(), Some(1));
    let said = fs::read_to_string(directory.path().join("aggregator.log")).unwrap();
    assert!(said.contains("has no log at all: was a volume lost?"), "{said}");
    put_back(&backup, &aggregator.data);

    // Two histories: one goes on without the copy being told, the other one is put back.
    aggregator.launch();
    end_all(&aggregator);
    let other = approved(&aggregator, &mut agents);
    aggregator.terminate();
    let known = directory.path().join("known");
    fs::copy(&kept, &known).unwrap();
    put_back(&backup, &aggregator.data);
    let args = ["audit", "verify", "--data", &data, "--checkpoint", &flag];
    let output = coalmine(args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.code() == Some(1) && said.contains("the log was cut"),
        "{said}"
    );
    assert!(
        said.matches("— coalmine/default ").count() == 2,
        "both notes are evidence: {said}"
    );
    fs::remove_file(&kept).unwrap();
    aggregator.launch();
    end_all(&aggregator);
    for _ in 0..4 {
        let one = approved(&aggregator, &mut agents);
        assert_ne!(one, other);
        end_all(&aggregator);
    }
    let last = approved(&aggregator, &mut agents);
    aggregator.terminate();
    fs::copy(&known, &kept).unwrap();
    let output = coalmine(args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("FAILED") && said.contains("differs from what the checkpoint"),
        "{said}"
    );
    launch_untrusted(&mut aggregator);
    is_distrusted(
        &aggregator,
        &last,
        "forked",
        "are not those that the checkpoint in",
    );
    aggregator.kill_9();

    // A person opens another log.
    let retired_size = lines(&aggregator.data).len();
    let refused = upkeep(&[
        "new-log",
        "--data",
        &data,
        "--log-name",
        "coalmine/default",
        "--reason",
        "a fork",
    ]);
    assert!(
        !refused.0 && refused.1.contains("another --log-name"),
        "{}",
        refused.1
    );
    let (done, said) = upkeep(&[
        "new-log",
        "--data",
        &data,
        "--log-name",
        "coalmine/two",
        "--reason",
        "a fork",
    ]);
    assert!(done, "{said}");
    let mut aggregator = aggregator.with_arguments(&["--log-name", "coalmine/two"]);
    aggregator.launch();
    assert_eq!(get(aggregator.admin, "/readyz").unwrap().status, 200);
    let first: Value = serde_json::from_str(&lines(&aggregator.data)[0]).unwrap();
    assert_eq!(first["body"]["follows"]["log"], "coalmine/default", "{first}");
    assert_eq!(first["body"]["follows"]["reason"], "a fork");
    assert_eq!(first["body"]["follows"]["size"], retired_size);
    approved(&aggregator, &mut agents);
    agents.flush(aggregator.grpc);
    accounts_for(&aggregator, &agents.made());
    end_all(&aggregator);
    aggregator.terminate();
    assert!(fs::read_to_string(&kept).unwrap().starts_with("coalmine/two\n"));
    super::verified(&aggregator.data);
    let retired = fs::read_dir(&aggregator.data)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let retired = retired
        .filter(|path| path.is_dir())
        .find(|path| path.display().to_string().contains("retired-"));
    // The old log is whole, with its evidence.
    super::verified(&retired.unwrap());
    assert!(!rollout.is_empty());
}

#[test]
fn a_log_whose_key_was_rotated_in_segments_is_verified_exported_and_read_with_hashes_alone() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let small = [
        "--segment-bytes",
        "4096",
        "--heartbeat-seconds",
        "1",
        "--windows-bytes",
        "65536",
    ];
    let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY).with_arguments(&small);
    aggregator.launch();
    let data = aggregator.data.display().to_string();
    let busy = upkeep(&["rotate-key", "--data", &data, "--reason", "too early"]);
    assert!(
        !busy.0 && busy.1.contains("in use by another aggregator"),
        "{}",
        busy.1
    );
    let mut agents = Agents::new(1, TRAFFIC);
    approved(&aggregator, &mut agents);
    end_all(&aggregator);
    let beats = |data: &Path| {
        lines(data)
            .iter()
            .filter(|line| line.contains(r#"{"type":"heartbeat"}"#))
            .count()
    };
    eventually("silence is recorded", || {
        (beats(&aggregator.data) >= 2).then_some(())
    });
    aggregator.terminate();
    let old = key_of(&aggregator.data);
    let nowhere = directory.path().join("nowhere").display().to_string();
    fs::create_dir(&nowhere).unwrap();
    let wrong = upkeep(&["rotate-key", "--data", &nowhere, "--reason", "wrong directory"]);
    assert!(
        !wrong.0 && wrong.1.contains("cannot find a decision log in"),
        "{}",
        wrong.1
    );
    let (done, said) = upkeep(&["rotate-key", "--data", &data, "--reason", "yearly"]);
    assert!(done, "{said}");
    aggregator.launch();
    // Long enough for a snapshot, with a restart that goes on from it.
    let rollout = approved(&aggregator, &mut agents);
    for windows in [12, 14] {
        eventually("more windows are judged", || {
            agents.turn(aggregator.grpc, false);
            let view = ask(aggregator.http, &format!("/v1/rollouts/{rollout}"))?;
            (view["recorded"] == true && view["windows_judged"].as_u64()? >= windows).then_some(())
        });
        aggregator.kill_9();
        aggregator.launch();
    }
    agents.flush(aggregator.grpc);
    conserves(&aggregator, &agents.made());
    end_all(&aggregator);
    aggregator.terminate();

    let sealed = fs::read_dir(&aggregator.data).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with("decisions-")
    });
    assert!(sealed.count() >= 2);
    let to = directory.path().join("export");
    let exported = coalmine([
        "audit",
        "export",
        "--data",
        &data,
        "--to",
        &to.display().to_string(),
    ]);
    assert!(exported.status.success(), "{exported:?}");
    let whole = fs::read_to_string(to.join("decisions.jsonl")).unwrap();
    assert_eq!(whole.lines().collect::<Vec<_>>(), lines(&aggregator.data));
    for directory in [&aggregator.data, &to] {
        let deep = coalmine([
            "audit",
            "verify",
            "--deep",
            "--key",
            &old,
            "--data",
            &directory.display().to_string(),
        ]);
        let said = String::from_utf8_lossy(&deep.stdout).into_owned();
        assert!(
            deep.status.success() && said.contains("the same bytes, all of them"),
            "{said}"
        );
        let mut python = Command::new(tool("python3", "python3"));
        let output = python
            .arg(repository().join("deploy/examples/verify.py"))
            .arg(directory)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && said.contains(&format!("{} records", whole.lines().count())),
            "{output:?}"
        );
    }
    // One decision, from its snapshot and nothing else.
    let decisions: Vec<Value> = whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |record: &&Value| record["body"]["type"] == "decision";
    let last = &decisions.iter().rfind(of).unwrap()["body"];
    assert!(last["snapshot"].is_string(), "{last}");
    let last = last["id"].as_str().unwrap();
    let one = coalmine(["replay", last, "--data", &to.display().to_string()]);
    assert!(
        one.status.success() && String::from_utf8_lossy(&one.stdout).contains("the same bytes"),
        "{one:?}"
    );

    // Whoever has the files and not the key cannot go on with a key of his own.
    let mut forged: Vec<Value> = decisions.iter().take(1).cloned().collect();
    let mut rotation = decisions
        .iter()
        .find(|record| record["body"]["type"] == "key_rotation")
        .unwrap()
        .clone();
    rotation["seq"] = 1.into();
    rotation["prev"] = Hash::leaf(whole.lines().next().unwrap().as_bytes())
        .to_string()
        .into();
    let endorsed = rotation["body"]["endorsed"].as_str().unwrap().to_owned();
    let own = coalmine_judge::note::SignerKey::from_seed(
        "coalmine/default",
        coalmine_judge::note::Kind::Ed25519,
        &[9; 32],
    );
    rotation["body"]["key"] = own.verifier().to_string().into();
    assert!(!endorsed.is_empty());
    forged.push(rotation);
    let text: String = forged
        .iter()
        .map(|record| coalmine_judge::record::canonical(record) + "\n")
        .collect();
    fs::write(to.join("decisions.jsonl"), text).unwrap();
    fs::remove_file(to.join("checkpoints.txt")).unwrap();
    let forged = coalmine([
        "audit",
        "verify",
        "--key",
        &old,
        "--data",
        &to.display().to_string(),
    ]);
    let said = String::from_utf8_lossy(&forged.stdout).into_owned();
    assert!(
        forged.status.code() == Some(1) && said.contains("record 1: its endorsement by the key before"),
        "{said}"
    );
}
