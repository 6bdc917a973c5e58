//! A data directory on a disk that is full: nothing is approved, harm is shown all the same, and what could not be
//! recorded is recorded later, with a mark.
//!
//! The disk is a tmpfs of its own, which only root may mount. Where that is refused the test fails and says so;
//! `COALMINE_NO_MOUNT=1` leaves it out, and says that, too.

use std::{
    env,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use coalmine_tests::{
    components::Aggregator,
    http::{Answer, get},
    tools::tool,
    within,
};
use serde_json::{Value, json};

use super::{Agents, POLICY, Promises, Traffic, ask, conserves, end_all, lines};
use crate::{gate::all_hold_back, stage};

/// Sixteen pages: a few decisions and windows fill it.
const DISK: &str = "size=64k,mode=0755";

/// So much more there is when space has come back.
const LARGER: &str = "remount,size=4m";

const LIMIT: Duration = Duration::from_secs(60);

const TRAFFIC: Traffic = Traffic {
    tenants: 2,
    requests: 500,
    length_ms: 1_000,
};

/// A file system of its own; taken away when dropped.
#[derive(Debug)]
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Mounts one; none where that is refused and need not be.
    pub(crate) fn mount(path: &Path) -> Option<Self> {
        fs::create_dir(path).unwrap();
        let mut mount = Command::new(tool("mount", "mount"));
        mount.args(["-t", "tmpfs", "-o", DISK, "tmpfs"]).arg(path);
        let output = mount.output().unwrap();
        if output.status.success() {
            return Some(Self(path.to_owned()));
        }
        let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        assert!(
            env::var("COALMINE_NO_MOUNT").is_ok_and(|value| value == "1"),
            "a tmpfs cannot be mounted ({said}): run this test as root, or set COALMINE_NO_MOUNT=1 to leave it out"
        );
        eprintln!(
            "NOT TESTED: what a full disk does; a tmpfs cannot be mounted ({said}), and COALMINE_NO_MOUNT=1"
        );
        None
    }
}

impl Disk {
    /// Makes room.
    pub(crate) fn enlarge(&self) {
        let mut mount = Command::new(tool("mount", "mount"));
        let status = mount.args(["-o", LARGER]).arg(&self.0).status().unwrap();
        assert!(status.success(), "the tmpfs cannot be enlarged");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmounted = |options: &[&str]| {
            let mut umount = Command::new(tool("umount", "mount"));
            umount
                .args(options)
                .arg(&self.0)
                .status()
                .is_ok_and(|status| status.success())
        };
        if !unmounted(&[]) && !unmounted(&["-l"]) {
            eprintln!("{} is still mounted; run: umount -l {0}", self.0.display());
        }
    }
}

/// A file that takes all the space that is left.
#[derive(Debug)]
pub(crate) struct Filler(File);

impl Filler {
    pub(crate) fn new(data: &Path) -> Self {
        Self(File::create(data.join("filler")).unwrap())
    }

    /// Takes what is free now; gives how many bytes that was.
    pub(crate) fn fill(&mut self) -> usize {
        let block = [0; 4_096];
        let mut taken = 0;
        while let Ok(written) = self.0.write(&block) {
            taken += written;
        }
        taken
    }
}

fn readiness(aggregator: &Aggregator) -> Option<Answer> {
    get(aggregator.admin, "/readyz").ok()
}

/// Whether the log is in this state, and in no other.
fn is_in_state(aggregator: &Aggregator, state: &str) -> bool {
    let metrics = get(aggregator.admin, "/metrics").map_or_else(|_| String::new(), |answer| answer.body);
    let states = metrics
        .lines()
        .filter(|line| line.starts_with("coalmine_audit_log_state{"));
    let held: Vec<_> = states.filter(|line| line.ends_with(" 1")).collect();
    held == [format!("coalmine_audit_log_state{{state=\"{state}\"}} 1")]
}

/// The bodies of the records of a type. A line that is just being written is none.
fn records(data: &Path, kind: &str) -> Vec<Value> {
    let whole = lines(data)
        .into_iter()
        .filter_map(|line| serde_json::from_str::<Value>(&line).ok());
    let bodies = whole.map(|mut record| record["body"].take());
    bodies.filter(|body| body["type"] == kind).collect()
}

#[test]
fn on_a_full_disk_nothing_is_approved_and_harm_is_shown_and_recorded_later() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(&directory.path().join("data")) else {
        return;
    };
    let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY);
    aggregator.launch();
    assert!(is_in_state(&aggregator, "ok"));
    let (grpc, http, data) = (aggregator.grpc, aggregator.http, aggregator.data.clone());
    let mut agents = Agents::new(1, TRAFFIC);
    let mut promises = Promises::default();
    let rollout = aggregator.start_rollout();
    let (path, gate) = (
        format!("/v1/rollouts/{rollout}"),
        format!("/v1/rollouts/{rollout}/gate"),
    );

    let before = within(LIMIT, "a window is judged", || {
        agents.turn(grpc, false);
        ask(http, &path).filter(|view| view["recorded"] == true)
    });
    promises.ask_gate(http, &rollout);
    assert_eq!(before["verdict"], "HOLD", "it takes more windows: {before}");

    // The next decision does not fit any more, and the reserve is given up for the record that says so.
    let mut filler = Filler::new(&data);
    filler.fill();
    within(LIMIT, "it is recorded that the disk is full", || {
        agents.turn(grpc, false);
        promises.ask_gate(http, &rollout);
        (!records(&data, "disk_full").is_empty()).then_some(())
    });

    // From now on others take each page that becomes free. Windows go on being judged.
    let held = within(LIMIT, "an approval is held back", || {
        filler.fill();
        agents.turn(grpc, false);
        let answer = ask(http, &gate)?;
        let reason = answer["reason"].as_str()?;
        reason.starts_with("APPROVE is held back: ").then_some(answer)
    });
    assert_eq!(held["verdict"], "HOLD", "{held}");
    assert_eq!(held["decision_hash"], Value::Null, "{held}");
    let reason = held["reason"].as_str().unwrap();
    assert!(reason.contains("the decision log cannot be written"), "{held}");
    assert_eq!(ask(http, &path).unwrap()["recorded"], false);
    let ready = readiness(&aggregator).unwrap();
    assert_eq!(ready.status, 503, "{}", ready.body);
    assert!(
        ready.body.contains("the decision log cannot be written"),
        "{}",
        ready.body
    );
    assert!(is_in_state(&aggregator, "full"));
    all_hold_back(http, &rollout, || {
        filler.fill();
        agents.turn(grpc, false);
    });

    // Harm is shown without a record.
    let harm = within(LIMIT, "harm is shown", || {
        filler.fill();
        agents.turn(grpc, true);
        ask(http, &gate).filter(|gate| gate["verdict"] == "ROLLBACK")
    });
    assert_eq!(harm["decision_hash"], Value::Null, "{harm}");
    let view = ask(http, &path).unwrap();
    assert_eq!(
        (&view["recorded"], &view["state"]),
        (&false.into(), &"halted".into()),
        "{view}"
    );
    let decision = harm["decision_id"].as_str().unwrap();
    let is_recorded = |decision: &str| {
        let decisions = records(&data, "decision");
        decisions.into_iter().find(|body| body["id"] == decision)
    };
    assert_eq!(is_recorded(decision), None);

    // Space is back.
    disk.enlarge();
    within(LIMIT, "the decision is recorded late", || {
        agents.turn(grpc, true);
        ask(http, &path).filter(|view| view["recorded"] == true)
    });
    let late = is_recorded(decision).unwrap();
    assert_eq!(
        (&late["verdict"], &late["late"]),
        (&"ROLLBACK".into(), &true.into()),
        "{late}"
    );
    within(LIMIT, "it is ready again", || {
        let ready = readiness(&aggregator)?.status == 200;
        (ready && is_in_state(&aggregator, "ok")).then_some(())
    });
    // An approval that was held back had no effect, so it is not late.
    let approvals = records(&data, "decision");
    let approvals = approvals.iter().filter(|body| body["verdict"] == "APPROVE");
    assert!(approvals.inspect(|body| assert_eq!(body["late"], false)).count() > 0);

    promises.ask_gate(http, &rollout);
    promises.ask_records(http, &rollout);
    agents.flush(grpc);
    conserves(&aggregator, &agents.made());
    end_all(&aggregator);
    promises.hold(&mut aggregator);
}

#[test]
fn what_a_person_decides_on_a_full_disk_holds_and_rolls_back_and_is_recorded_later() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(&directory.path().join("data")) else {
        return;
    };
    let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY);
    aggregator.launch();
    let (grpc, http, data) = (aggregator.grpc, aggregator.http, aggregator.data.clone());
    let mut agents = Agents::new(1, TRAFFIC);
    let rollout = aggregator.start_rollout();
    let gate = format!("/v1/rollouts/{rollout}/gate");
    let decide = |verdict: Value| {
        let body = json!({ "verdict": verdict, "reason": "I have seen it" });
        aggregator.post(&format!("/v1/rollouts/{rollout}/override"), &body)
    };
    within(LIMIT, "a window is judged", || {
        agents.turn(grpc, false);
        ask(http, &gate).filter(|gate| gate["recorded"] == true)
    });
    let mut filler = Filler::new(&data);
    within(LIMIT, "the log takes nothing any more", || {
        filler.fill();
        agents.turn(grpc, false);
        is_in_state(&aggregator, "full").then_some(())
    });

    // What lets go needs the log; what keeps back does not, and saying it again changes nothing.
    let refused = decide(json!("approve"));
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert_eq!(ask(http, &gate).unwrap()["overridden"], Value::Null);
    for _ in 0..3 {
        let taken = decide(json!("rollback"));
        assert_eq!(taken.status, 200, "{}", taken.body);
    }
    let refused = decide(Value::Null);
    assert_eq!(refused.status, 503, "{}", refused.body);
    let harm = ask(http, &gate).unwrap();
    assert_eq!(
        (&harm["verdict"], &harm["decision_hash"]),
        (&"ROLLBACK".into(), &Value::Null),
        "{harm}"
    );

    disk.enlarge();
    let late = within(LIMIT, "it is recorded", || {
        agents.turn(grpc, false);
        ask(http, &gate).filter(|gate| gate["decision_hash"].is_string())
    });
    assert_eq!(
        (&late["verdict"], &late["decision_id"]),
        (&harm["verdict"], &harm["decision_id"]),
        "{late}"
    );
    let overrides = records(&data, "override");
    assert_eq!(overrides.len(), 1, "{overrides:?}");
    let marks = within(LIMIT, "it is marked that it was late", || {
        let marks = records(&data, "late_record");
        let of_it = |mark: &Value| mark["decision"] == harm["decision_id"];
        marks.iter().any(of_it).then_some(marks)
    });
    assert!(!marks.is_empty());

    aggregator.kill_9();
    aggregator.launch();
    let again = ask(http, &gate).unwrap();
    assert_eq!(
        (&again["verdict"], &again["decision_id"]),
        (&harm["verdict"], &harm["decision_id"]),
        "{again}"
    );
}
