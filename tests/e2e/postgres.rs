//! The aggregator with its log, evidence and windows in a real PostgreSQL.

mod faults;
mod owners;
mod refusals;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use coalmine_tests::{
    components::{Agent, Aggregator, Counts, Scene},
    cutter::Cutter,
    eventually,
    http::get,
    postgres::{DATABASE, Postgres, url_at},
    process::{Process, coalmine, program},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::stage;

/// Whose schema it is, who may append, and who may only read.
const OWNER: &str = "keeper";
pub(super) const WRITER: &str = "writer";
const READER: &str = "reader";

/// The tenant of the sixth rank in the load generator's traffic.
const FAILING: &str = "stark-bank";

/// Brings the schema up to date; gives the exit code and what was said.
fn migrate(directory: &Path, url: &str) -> (Option<i32>, String) {
    ends(directory, &["migrate", "--postgres", url])
}

/// Runs the aggregator until it ends by itself; gives the exit code and what it said.
fn ends(directory: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let log = directory.join("ends.log");
    fs::write(&log, "").unwrap();
    let mut command = Command::new(program("coalmine-aggregator"));
    command.args(arguments);
    let mut process = Process::start(command, &log);
    let status = eventually("the aggregator ends by itself", || process.ended());
    (status.code(), process.said())
}

/// Makes the schema in a new server, and one user for each thing that may be done with it.
fn make_schema(directory: &Path, postgres: &Postgres) {
    postgres.query(&format!("CREATE ROLE {OWNER} LOGIN CREATEROLE"));
    postgres.query(&format!("ALTER DATABASE {DATABASE} OWNER TO {OWNER}"));
    let (code, said) = migrate(directory, &postgres.url(OWNER, DATABASE));
    assert_eq!(code, Some(0), "{said}");
    postgres.query(&format!("CREATE ROLE {WRITER} LOGIN IN ROLE coalmine_writer"));
    postgres.query(&format!("CREATE ROLE {READER} LOGIN IN ROLE coalmine_reader"));
}

/// A server with the schema.
pub(super) fn database(directory: &Path) -> Postgres {
    let postgres = Postgres::start(directory);
    make_schema(directory, &postgres);
    postgres
}

/// The command line that serves with a database.
fn serve(aggregator: &Aggregator, url: &str) -> Vec<String> {
    let policy = aggregator.data.with_file_name("sla.yaml");
    let pairs = [
        ("--data", aggregator.data.display().to_string()),
        ("--policy", policy.display().to_string()),
        ("--listen-grpc", aggregator.grpc.to_string()),
        ("--listen-http", aggregator.http.to_string()),
        ("--listen-admin", aggregator.admin.to_string()),
        ("--postgres", url.to_owned()),
    ];
    let arguments = pairs
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value]);
    ["serve".to_owned()].into_iter().chain(arguments).collect()
}

fn is_ready(aggregator: &Aggregator) -> bool {
    get(aggregator.admin, "/readyz").is_ok_and(|answer| answer.status == 200)
}

/// Requests that come until they are told to stop.
#[derive(Debug)]
struct Traffic {
    process: Process,
    report: PathBuf,
}

impl Traffic {
    /// Many tenants, as in every other test, for a rollout that fails; else so few that it is approved soon.
    fn start(directory: &Path, scene: &Scene, failing: Option<&str>) -> Self {
        let report = directory.join("traffic.json");
        let mut command = Command::new(program("coalmine"));
        command.args(["demo", "load", "--report"]).arg(&report);
        command.args(match failing {
            Some(_) => ["--rate", "2000", "--tenants", "200", "--canary-percent", "10"],
            None => ["--rate", "1000", "--tenants", "20", "--canary-percent", "30"],
        });
        for (agent, arm) in scene.agents.iter().zip(["--baseline", "--baseline", "--canary"]) {
            command.args([arm, &agent.address.to_string()]);
        }
        Self {
            process: Process::start(command, &directory.join("traffic.log")),
            report,
        }
    }

    /// Ends it; gives what was sent and answered.
    fn stop(self) -> Counts {
        assert!(self.process.terminate().success());
        let report: Value = serde_json::from_str(&fs::read_to_string(&self.report).unwrap()).unwrap();
        assert_eq!(report["unanswered"], 0, "requests without an answer");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let mut counts = Counts::default();
        for row in report["counts"].as_array().unwrap() {
            for (outcome, count) in row["outcomes"].as_object().unwrap() {
                let count = count.as_u64().unwrap();
                if count > 0 {
                    let key = (text(&row["arm"]), text(&row["tenant"]), outcome.clone());
                    *counts.0.entry(key).or_insert(0) += count;
                }
            }
        }
        counts
    }
}

/// A rollout on real traffic, with a cutter on the aggregator's way to the database.
#[derive(Debug)]
struct Play {
    traffic: Traffic,
    scene: Scene,
    aggregator: Aggregator,
    cutter: Cutter,
    postgres: Postgres,
    rollout: String,
    // Last, since it goes when nothing uses it any more.
    directory: TempDir,
}

impl Play {
    fn begin(failing: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let postgres = database(path);
        let cutter = Cutter::start(postgres.address);
        let url = url_at(cutter.address, WRITER, DATABASE);
        let arguments = ["--postgres", &url, "--instance", "one"];
        let mut aggregator = Aggregator::prepare(path).with_arguments(&arguments);
        aggregator.launch();
        let scene = Scene::start(path, aggregator.grpc, failing);
        let traffic = Traffic::start(path, &scene, failing);
        eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));
        let rollout = aggregator.start_rollout();
        Self {
            traffic,
            scene,
            aggregator,
            cutter,
            postgres,
            rollout,
            directory,
        }
    }

    /// The rollout as it is shown.
    fn view(&self) -> Option<Value> {
        let answer = get(self.aggregator.http, &format!("/v1/rollouts/{}", self.rollout)).ok()?;
        (answer.status == 200).then(|| answer.json())
    }

    /// How many windows are judged, when the last decision is on record, of a rollout in which nothing fails.
    fn recorded(&self) -> Option<u64> {
        let view = self.view()?;
        assert_ne!(view["verdict"], "ROLLBACK", "nothing fails here: {view}");
        view["windows_judged"]
            .as_u64()
            .filter(|_| view["recorded"] == true)
    }

    /// Waits until decisions are recorded that are still to come.
    fn goes_on(&self) {
        let before = eventually("the last decision is on record", || self.recorded());
        eventually("the rollout goes on", || {
            self.recorded().filter(|now| *now >= before + 2)
        });
    }

    /// Ends all in order and holds everything against everything: what was sent against what is counted, before and
    /// after a restart; the database against an export; and what is recorded against itself.
    fn finish(self) {
        // They are dropped in the order from the last to the first.
        let Self {
            directory,
            rollout,
            postgres,
            cutter: _cutter,
            mut aggregator,
            scene,
            traffic,
        } = self;
        let sent = traffic.stop();
        let end = format!("/v1/rollouts/{rollout}/end");
        eventually("the rollout is ended", || {
            let answer = aggregator.post(&end, &json!({ "actor": "test", "reason": "seen enough" }));
            (answer.status == 200).then_some(())
        });
        scene.agents.into_iter().for_each(Agent::terminate);
        conserves(&aggregator, &sent);
        let records = audits(directory.path(), &aggregator, &postgres);
        judged_once(&records, &rollout);
        // What is counted then comes from the database.
        aggregator.kill_9();
        aggregator.launch();
        conserves(&aggregator, &sent);
        assert_eq!(
            aggregator.get(&format!("/v1/rollouts/{rollout}"))["state"],
            "ended"
        );
    }
}

/// Holds what is counted against what was sent.
fn conserves(aggregator: &Aggregator, sent: &Counts) {
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

/// Exports the log and has it checked; it must have the database's bytes and the root that is served. Gives the records.
fn audits(directory: &Path, aggregator: &Aggregator, postgres: &Postgres) -> Vec<Value> {
    let to = directory.join("export");
    let data = to.display().to_string();
    let good = |arguments: &[&str]| {
        let output = coalmine(arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}{complaint}");
        said
    };
    let url = postgres.url(READER, DATABASE);
    good(&["audit", "export", "--postgres", &url, "--to", &data]);
    good(&["audit", "verify", "--deep", "--data", &data]);
    let said = good(&["replay", "--all", "--data", &data]);
    assert!(said.contains("the same bytes, all of them"), "{said}");

    // Log, number of records and root; a signature may be another one.
    let signed = |note: &str| note.lines().take(3).map(str::to_owned).collect::<Vec<_>>();
    let served = get(aggregator.http, "/v1/audit/checkpoint").unwrap();
    assert_eq!(served.status, 200, "{}", served.body);
    let exported = fs::read_to_string(to.join("checkpoint")).unwrap();
    assert_eq!(signed(&served.body), signed(&exported));

    let log = fs::read_to_string(to.join("decisions.jsonl")).unwrap();
    let rows = postgres.query("SELECT convert_from(line, 'UTF8') FROM log_entry ORDER BY seq");
    let lines: Vec<_> = rows.concat();
    assert!(log.lines().eq(&lines), "the export has not the database's bytes");
    let size = lines.len().to_string();
    assert_eq!(postgres.value("SELECT size FROM log_head"), size);
    assert_eq!(postgres.value("SELECT max(seq) + 1 FROM log_entry"), size);
    lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Each window has one decision, in order, on the reports of every agent; and one end comes after all of them.
fn judged_once(records: &[Value], rollout: &str) {
    let bodies: Vec<_> = records
        .iter()
        .map(|record| &record["body"])
        .filter(|body| body["rollout"] == *rollout)
        // What a person decides is beside it.
        .filter(|body| body["type"] != "late_record" && body["type"] != "override")
        .collect();
    let kinds: Vec<_> = bodies.iter().map(|body| body["type"].as_str().unwrap()).collect();
    assert_eq!((kinds.first(), kinds.last()), (Some(&"rollout"), Some(&"end")));
    let others = bodies.get(1..bodies.len() - 1).unwrap();
    let windows: Vec<_> = others
        .iter()
        .map(|body| {
            assert_eq!(body["type"], "decision", "{body}");
            assert_eq!(body["agents_ppm"], 1_000_000, "{body}");
            body["window"].as_u64().unwrap()
        })
        .collect();
    assert!(!windows.is_empty(), "nothing was judged");
    assert_eq!(windows, (1..=windows.len() as u64).collect::<Vec<_>>());
}

#[test]
fn a_rollout_is_rolled_back_and_anybody_with_an_export_can_check_why() {
    let _stage = stage();
    let play = Play::begin(Some(FAILING));
    let gate = play
        .aggregator
        .wait_for_verdict(&play.rollout, &["ROLLBACK", "APPROVE"]);
    assert_eq!(
        (&gate["verdict"], &gate["worst_tenant"]),
        (&"ROLLBACK".into(), &FAILING.into()),
        "{gate}"
    );
    let server = format!("http://{}", play.aggregator.http);
    let said = coalmine(["gate", &play.rollout, "--server", &server]);
    assert_eq!(said.status.code(), Some(1));

    // Record, evidence and proof are read from the database.
    let view = eventually("the decision is on record", || {
        play.view().filter(|view| view["recorded"] == true)
    });
    let decision = format!("/v1/decisions/{}", view["decision_id"].as_str().unwrap());
    let recorded = play.aggregator.get(&decision);
    assert_eq!(recorded["hash"], view["decision_hash"]);
    let evidence = play.aggregator.get(&format!("{decision}/evidence"));
    assert_eq!(evidence["window"], recorded["record"]["body"]["window"]);
    let proof = get(play.aggregator.http, &format!("{decision}/proof")).unwrap();
    assert_eq!(proof.status, 200, "{}", proof.body);
    let file = play.directory.path().join("proof.txt");
    fs::write(&file, &proof.body).unwrap();
    let first = "SELECT convert_from(line, 'UTF8') FROM log_entry WHERE seq = 0";
    let first: Value = serde_json::from_str(&play.postgres.value(first)).unwrap();
    let key = first["body"]["key"].as_str().unwrap();
    let checked = coalmine(["audit", "check", &file.display().to_string(), "--key", key]);
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );

    // The directory has what must not be in a database, and nothing else.
    let mut names: Vec<_> = fs::read_dir(&play.aggregator.data)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [".lock", "key", "postgres"]);
    play.finish();
}

#[test]
fn whoever_may_not_make_roles_owns_a_schema_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let postgres = Postgres::start(directory.path());
    postgres.query("CREATE ROLE modest LOGIN");
    postgres.query(&format!("ALTER DATABASE {DATABASE} OWNER TO modest"));
    let url = postgres.url("modest", DATABASE);
    for _ in ["makes it", "finds it made"] {
        let (code, said) = migrate(directory.path(), &url);
        assert_eq!(code, Some(0), "{said}");
    }
    let roles = postgres.value("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'coalmine%'");
    assert_eq!(roles, "0");
    let mut aggregator = Aggregator::prepare(directory.path()).with_arguments(&["--postgres", &url]);
    aggregator.launch();
    aggregator.start_rollout();
    aggregator.terminate();
}
