//! The gate of one rollout: whoever waits at it with `coalmine gate --wait`. And what other tests ask of all faces:
//! what each says of a rollout that is asked for by its name, and that none shows an approval that is held back.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use coalmine_tests::{
    clients::{
        Reading, Server, Subject, argo, ci,
        flagger::{self, Hook},
        orca::{self, Interval},
    },
    components::Aggregator,
    eventually,
    http::get,
    process::{Process, coalmine, program},
};
use serde_json::Value;

/// What a client may take; each has a shorter limit of its own.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a reason begins where the judge approves and nobody may go on.
const HELD_BACK: &str = "APPROVE is held back: ";

/// What a face says of a rollout.
#[derive(Debug)]
pub(crate) struct Said {
    /// In the gate's words.
    pub(crate) verdict: String,
    /// All that was answered.
    pub(crate) came: String,
}

impl Said {
    fn new(verdict: &str, body: &Value) -> Self {
        Self {
            verdict: verdict.to_owned(),
            came: body.to_string(),
        }
    }

    /// Of an answer that has the verdict by that name.
    fn of(body: &Value) -> Self {
        Self::new(body["verdict"].as_str().unwrap_or_default(), body)
    }
}

/// A face that is asked for a rollout by its name, and says the same when that is over.
pub(crate) struct Face {
    pub(crate) name: &'static str,
    pub(crate) ask: fn(&Server, &str) -> Said,
}

pub(crate) static FACES: [Face; 4] = [
    Face {
        name: "the rollout",
        ask: |server, rollout| Said::of(&json_at(server, &format!("/v1/rollouts/{rollout}"))),
    },
    Face {
        name: "the first event",
        ask: |server, rollout| Said::of(&first_event(server, rollout)),
    },
    Face {
        name: "Prometheus by GET",
        ask: by_prometheus,
    },
    Face {
        name: "standalone Kayenta",
        ask: by_standalone_kayenta,
    },
];

/// A path for whoever sends no header: the token is in front.
fn prefixed(server: &Server, path: &str) -> String {
    let token = server.token.as_ref();
    token.map_or_else(|| path.to_owned(), |token| format!("/t/{token}{path}"))
}

fn json_at(server: &Server, path: &str) -> Value {
    let answer = get(server.http, &prefixed(server, path)).unwrap();
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    answer.json()
}

/// What whoever begins to watch a rollout is told at once.
fn first_event(server: &Server, rollout: &str) -> Value {
    let mut stream = TcpStream::connect(server.http).unwrap();
    stream.set_read_timeout(Some(server.patience)).unwrap();
    let path = prefixed(server, &format!("/v1/rollouts/{rollout}/watch"));
    let head = format!(
        "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n",
        server.http
    );
    stream.write_all(head.as_bytes()).unwrap();
    let lines = BufReader::new(stream).lines().map(Result::unwrap);
    let mut fields = lines.skip_while(|line| !line.starts_with("event: "));
    assert_eq!(fields.next().as_deref(), Some("event: verdict"), "{rollout}");
    let data = fields.find_map(|line| line.strip_prefix("data: ").map(str::to_owned));
    serde_json::from_str(&data.expect("the event has data")).unwrap()
}

fn by_prometheus(server: &Server, rollout: &str) -> Said {
    let path = format!("/api/v1/query?query=coalmine_verdict%7Brollout=%22{rollout}%22%7D");
    let body = json_at(server, &path);
    let verdict = match body["data"]["result"][0]["value"][1].as_str() {
        Some("1") => "APPROVE",
        Some("0") => "HOLD",
        Some("-1") => "ROLLBACK",
        other => panic!("{other:?} is no verdict: {body}"),
    };
    Said::new(verdict, &body)
}

/// The execution of a rollout between the thresholds that all tools have here.
fn execution(rollout: &str) -> String {
    format!("{rollout}.95.75")
}

fn by_standalone_kayenta(server: &Server, rollout: &str) -> Said {
    let path = format!("/kayenta/standalone_canary_analysis/{}", execution(rollout));
    let body = json_at(server, &path);
    let score = &body["canaryAnalysisExecutionResult"]["canaryScores"][0];
    let verdict = match (body["status"].as_str(), score.as_u64()) {
        // The score between the thresholds is that of a HOLD after which nothing comes.
        (Some("running"), None) | (Some("terminal"), Some(85)) => "HOLD",
        (Some("succeeded"), Some(100)) => "APPROVE",
        (Some("terminal"), Some(0)) => "ROLLBACK",
        other => panic!("{other:?} is no verdict: {body}"),
    };
    Said::new(verdict, &body)
}

/// Who does not say that an approval is held back: each tool by its own rule, then each face.
fn not_held_back(http: SocketAddr, rollout: &str) -> Vec<String> {
    let server = Server {
        http,
        token: None,
        patience: PATIENCE,
    };
    let subject = Subject {
        service: "checkout".to_owned(),
        version: "v2".to_owned(),
        namespace: "shop".to_owned(),
    };
    let execution = execution(rollout);
    let polls = [
        (
            "Flagger's gate",
            flagger::call(&server, &subject, "/gate/check", Hook::Promotion),
        ),
        ("Argo's web provider", argo::web::measure(&server, &subject)),
        (
            "Argo's prometheus provider",
            argo::prometheus::measure(&server, &subject),
        ),
        (
            "Argo's kayenta provider",
            argo::kayenta::poll(&server, &execution),
        ),
        ("Orca", orca::poll(&server, &execution, Interval::Last)),
        ("a script", ci::ask(&server, &subject)),
    ];
    let polled = polls
        .into_iter()
        .filter(|(_, poll)| poll.reading != Reading::Holds || !poll.came.contains(HELD_BACK))
        .map(|(name, poll)| format!("{name}: {poll:?}"));
    let said = FACES
        .iter()
        .map(|face| (face.name, (face.ask)(&server, rollout)))
        .filter(|(_, said)| said.verdict != "HOLD" || !said.came.contains(HELD_BACK))
        .map(|(name, said)| format!("{name}: {said:?}"));
    polled.chain(said).collect()
}

/// Asks everybody about the rollout of checkout while its gate holds an approval back: all must. Before each attempt
/// something is done that it goes on by.
pub(crate) fn all_hold_back(http: SocketAddr, rollout: &str, mut before: impl FnMut()) {
    let is_held_back = || {
        let gate = get(http, &format!("/v1/rollouts/{rollout}/gate")).unwrap();
        assert_eq!(gate.status, 200, "{}", gate.body);
        let gate = gate.json();
        let reason = gate["reason"].as_str();
        reason.is_some_and(|reason| reason.starts_with(HELD_BACK))
    };
    let wrong = eventually("the gate holds an approval back for long enough", || {
        before();
        let wrong = is_held_back().then(|| not_held_back(http, rollout))?;
        is_held_back().then_some(wrong)
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Begins to wait: the verdict goes to the file `verdict`, and what is told meanwhile is what the process says.
fn begin_to_wait(directory: &Path, server: &str, rollout: &str) -> Process {
    let mut command = Command::new("sh");
    command
        .args(["-c", r#"exec "$@" >"$VERDICT""#, "sh"])
        .arg(program("coalmine"))
        .args(["gate", rollout, "--wait", "--timeout", "60s"])
        .args(["--server", server])
        .env("VERDICT", directory.join("verdict"));
    Process::start(command, &directory.join("progress"))
}

/// Waits until the last line that was told is as it must be.
fn is_told(waiting: &Process, what: &str, is_so: impl Fn(&str) -> bool) {
    eventually(what, || {
        let told = waiting.said();
        is_so(told.lines().next_back()?).then_some(())
    });
}

fn is_told_the_hold(waiting: &Process, aggregator: &Aggregator, rollout: &str) {
    is_told(waiting, "it is told why it waits", |line| {
        let gate = aggregator.get(&format!("/v1/rollouts/{rollout}/gate"));
        assert_eq!(gate["verdict"], "HOLD", "{gate}");
        line.starts_with("HOLD ") && line.ends_with(gate["reason"].as_str().unwrap())
    });
}

/// Nobody comes, so that there is a HOLD until somebody decides.
fn waits_through_an_outage(decision: &str, verdict: &str, code: i32) {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::start(directory.path());
    let rollout = aggregator.start_rollout();
    let server = format!("http://{}", aggregator.http);
    let mut waiting = begin_to_wait(directory.path(), &server, &rollout);
    is_told_the_hold(&waiting, &aggregator, &rollout);

    aggregator.kill_9();
    let away = format!("waiting: cannot ask {server}: ");
    is_told(&waiting, "it is told of the outage", |line| {
        line.starts_with(&away)
    });
    aggregator.launch();
    is_told_the_hold(&waiting, &aggregator, &rollout);
    assert_eq!(waiting.ended(), None, "it waits on");

    let decided = coalmine([
        "rollout",
        "override",
        &rollout,
        "--verdict",
        decision,
        "--reason",
        "I have looked",
        "--server",
        &server,
    ]);
    assert!(decided.status.success(), "{decided:?}");
    let status = eventually("there is a verdict", || waiting.ended());
    let told = waiting.said();
    assert_eq!(status.code(), Some(code), "{told}");
    let said = fs::read_to_string(directory.path().join("verdict")).unwrap();
    assert!(
        said.lines().count() == 1
            && said.starts_with(&format!("{verdict} "))
            && said.contains("I have looked"),
        "{said}"
    );
    // Each change is told once.
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines.windows(2).all(|two| two[0] != two[1]), "{told}");
    let mut kinds: Vec<_> = lines.iter().filter_map(|line| line.split(' ').next()).collect();
    kinds.dedup();
    assert_eq!(kinds, ["HOLD", "waiting:", "HOLD"], "{told}");
}

#[test]
fn whoever_waits_at_the_gate_is_told_of_an_outage_and_gets_the_verdict_after_it() {
    waits_through_an_outage("approve", "APPROVE", 0);
    waits_through_an_outage("rollback", "ROLLBACK", 1);
}

#[test]
fn a_wait_that_ends_during_an_outage_has_no_verdict() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::start(directory.path());
    let rollout = aggregator.start_rollout();
    let server = format!("http://{}", aggregator.http);
    aggregator.kill_9();
    let output = coalmine(["gate", &rollout, "--wait", "--timeout=1s", "--server", &server]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = told.lines().collect();
    let why = format!("cannot ask {server}: ");
    assert!(
        lines.len() == 2
            && lines[0].starts_with(&format!("waiting: {why}"))
            && lines[1].starts_with(&format!("coalmine: {why}")),
        "{told}"
    );
}
