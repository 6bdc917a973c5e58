//! The JSON API: watching a rollout, and deciding in the judge's place. What it refuses, and how, is beside it.

mod pages;
mod refusals;
mod streams;
mod threads;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use coalmine_tests::{
    components::Aggregator,
    eventually,
    http::{Answer, get},
    process::coalmine,
};
use serde_json::{Value, json};

use crate::crash::full_disk::{Disk, Filler};

/// Nothing is proven without traffic, and a HOLD is over soon.
const SHORT: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1% }
  judge_window: 1s
  hold_deadline: 3s
  required: [errors]
";

/// How long a stream may be silent; it says that it is alive more often.
const SILENCE: Duration = Duration::from_secs(30);

/// Less than the server gives open requests when it stops: who watches is let go, and not cut off.
const SOON: Duration = Duration::from_secs(4);

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    stream
}

/// The types of the records in the log, in order.
fn records(data: &Path) -> Vec<String> {
    let text = fs::read_to_string(data.join("decisions.jsonl")).unwrap();
    let whole = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let kind = |record: Value| record["body"]["type"].as_str().unwrap_or_default().to_owned();
    whole.map(kind).collect()
}

#[test]
fn the_document_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let document = aggregator.get("/openapi.json");
    assert_eq!(document["openapi"], "3.1.0");
    for path in ["/v1/gate", "/v1/rollouts/{rollout}/watch", "/v1/flagger/{hook}"] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
}

/// An event of a stream.
#[derive(Debug)]
struct Event {
    kind: String,
    id: Option<String>,
    data: Value,
}

/// Server-sent events, read off the socket. Lines that are no field of an event, such as the lengths of chunks, are
/// passed over: each event comes in one chunk.
#[derive(Debug)]
struct Events(BufReader<TcpStream>);

impl Events {
    fn open(address: SocketAddr, rollout: &str, last: Option<&str>) -> Self {
        Self::at(address, &format!("/v1/rollouts/{rollout}/watch"), last)
    }

    fn at(address: SocketAddr, path: &str, last: Option<&str>) -> Self {
        let mut stream = connect(address);
        let last = last.map_or_else(String::new, |id| format!("last-event-id: {id}\r\n"));
        let head = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{last}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut lines = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(lines.read_line(&mut head).unwrap() > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.contains("text/event-stream"), "{head}");
        Self(lines)
    }

    /// The next event; none at the end of the stream.
    fn next(&mut self) -> Option<Event> {
        let (mut kind, mut id, mut data) = (None, None, Value::Null);
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            match line.trim_end().split_once(": ") {
                Some(("event", value)) => kind = Some(value.to_owned()),
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("data", value)) => data = serde_json::from_str(value).unwrap(),
                _ => {}
            }
            if line.trim_end().is_empty()
                && let Some(kind) = kind.take()
            {
                return Some(Event { kind, id, data });
            }
        }
    }

    /// Events until one is of this kind and says this.
    fn until(&mut self, kind: &str, field: &str, value: &str) -> Event {
        loop {
            let event = self
                .next()
                .unwrap_or_else(|| panic!("it ended before {kind} {value}"));
            assert_ne!((event.kind.as_str(), kind), ("end", "verdict"), "{event:?}");
            if event.kind == kind && event.data[field] == value {
                return event;
            }
        }
    }
}

#[test]
fn who_watches_is_told_each_change_once_until_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::prepare_with(directory.path(), SHORT);
    aggregator.launch();
    let rollout = aggregator.start_rollout();
    let mut first = Events::open(aggregator.http, &rollout, None);
    let event = first.next().unwrap();
    assert_eq!(
        (event.kind.as_str(), &event.data["verdict"]),
        ("verdict", &"HOLD".into()),
        "{event:?}"
    );

    let halted = first.until("verdict", "verdict", "ROLLBACK");
    let gate = aggregator.wait_for_verdict(&rollout, &["ROLLBACK"]);
    let decision = gate["decision_id"].as_str().unwrap();
    assert_eq!(halted.id, Some(format!("{decision}/ROLLBACK")), "{halted:?}");
    for field in [
        "verdict",
        "reason",
        "decision_id",
        "score_ppm",
        "state",
        "rollout",
    ] {
        assert_eq!(halted.data[field], gate[field], "{field}: {halted:?}");
    }

    // Who has seen it is not told again, and the next that there is to tell is the end.
    let mut second = Events::open(aggregator.http, &rollout, halted.id.as_deref());
    // Who has seen another verdict of the same decision is.
    let mut other = Events::open(aggregator.http, &rollout, Some(&format!("{decision}/HOLD")));
    let told = other.next().unwrap();
    assert_eq!((told.kind.as_str(), told.id), ("verdict", halted.id.clone()));
    let ended = aggregator.post(&format!("/v1/rollouts/{rollout}/end"), &json!({}));
    assert_eq!(ended.status, 200, "{}", ended.body);
    let mut third = Events::open(aggregator.http, &rollout, None);
    let told = [
        first.until("verdict", "state", "ended"),
        second.next().unwrap(),
        third.next().unwrap(),
    ];
    for (events, told) in [first, second, third].iter_mut().zip(told) {
        assert_eq!(
            (&told.data["state"], &told.data["verdict"]),
            (&"ended".into(), &"ROLLBACK".into()),
            "{told:?}"
        );
        let event = events.next().unwrap();
        assert_eq!(event.kind, "end", "{event:?}");
        assert_eq!(event.data["state"], "ended", "{event:?}");
        assert!(events.next().is_none());
    }

    // What the last one has ended with is not said of the next.
    let server = format!("http://{}", aggregator.http);
    for (arguments, code) in [
        (&["--service", "checkout"][..], 2),
        (&["--service", "checkout", "--wait", "--timeout", "1s"][..], 2),
        (&[&*rollout][..], 1),
    ] {
        let words = ["gate", "--server", &server].into_iter();
        let asked = coalmine(words.chain(arguments.iter().copied()));
        assert_eq!(asked.status.code(), Some(code), "{arguments:?}: {asked:?}");
    }

    // When the server stops it waits for nobody who watches.
    let next = aggregator.start_rollout();
    let mut events = Events::open(aggregator.http, &next, None);
    assert_eq!(events.next().unwrap().kind, "verdict");
    let asked = Instant::now();
    aggregator.terminate();
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
    while let Some(event) = events.next() {
        assert_eq!(event.kind, "verdict", "the rollout goes on: {event:?}");
    }
}

fn decide(aggregator: &Aggregator, rollout: &str, verdict: &Value, reason: &str) -> Answer {
    aggregator.post(
        &format!("/v1/rollouts/{rollout}/override"),
        &json!({ "verdict": verdict, "actor": "eve", "reason": reason }),
    )
}

#[test]
fn a_person_decides_in_the_judges_place_and_gives_the_decision_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::start(directory.path());
    let rollout = aggregator.start_rollout();
    let path = format!("/v1/rollouts/{rollout}/gate");
    let server = format!("http://{}", aggregator.http);

    let decided = decide(
        &aggregator,
        &rollout,
        &"approve".into(),
        "the customer is waiting",
    );
    assert_eq!(decided.status, 200, "{}", decided.body);
    assert_eq!(decided.json()["verdict"], "APPROVE", "{}", decided.body);
    let gate = aggregator.get(&path);
    assert_eq!(
        (&gate["verdict"], &gate["recorded"], &gate["rollout"]),
        (&"APPROVE".into(), &true.into(), &rollout.as_str().into()),
        "{gate}"
    );
    let overridden = json!({
        "verdict": "APPROVE", "actor": "eve", "reason": "the customer is waiting", "judged": "HOLD"
    });
    assert_eq!(gate["overridden"], overridden, "{gate}");
    assert!(
        gate["reason"]
            .as_str()
            .unwrap()
            .contains("the customer is waiting"),
        "{gate}"
    );

    // It is on record, and nothing can be judged again of it.
    let id = gate["decision_id"].as_str().unwrap();
    let decision = aggregator.get(&format!("/v1/decisions/{id}"));
    let body = &decision["record"]["body"];
    assert_eq!(
        (&body["type"], &body["verdict"], &body["judged"], &body["actor"]),
        (
            &"override".into(),
            &"APPROVE".into(),
            &"HOLD".into(),
            &"eve".into()
        ),
        "{decision}"
    );
    assert_eq!(decision["hash"], gate["decision_hash"]);
    let ask = |rest: &str| get(aggregator.http, &format!("/v1/decisions/{id}/{rest}")).unwrap();
    assert_eq!(ask("proof").status, 200);
    let evidence = ask("evidence");
    assert_eq!(evidence.status, 404, "{}", evidence.body);
    assert!(
        evidence.body.contains("not the judge's decision"),
        "{}",
        evidence.body
    );
    let replay = aggregator.post(&format!("/v1/decisions/{id}/replay"), &Value::Null);
    assert_eq!(replay.status, 409, "{}", replay.body);
    let overriding = id.to_owned();
    let explains = |arguments: &[&str]| {
        let explained = coalmine(["explain", &*overriding].iter().chain(arguments));
        let said = String::from_utf8_lossy(&explained.stdout).into_owned();
        assert!(explained.status.success(), "{explained:?}");
        for part in [
            "APPROVE, in the judge's place",
            "eve",
            "the customer is waiting",
            "said HOLD",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        said
    };
    explains(&["--server", &server]);

    // The judge goes on beside it, and the rollout is found by what it is of.
    let judged = |aggregator: &Aggregator| {
        let view = aggregator.get(&format!("/v1/rollouts/{rollout}"));
        view["windows_judged"].as_u64().unwrap()
    };
    let before = judged(&aggregator);
    eventually("more windows are judged", || {
        (judged(&aggregator) > before).then_some(())
    });
    for query in ["", "&version=v2", "&namespace=shop&workload=checkout"] {
        let found = aggregator.get(&format!("/v1/gate?service=checkout{query}"));
        for field in ["verdict", "decision_id", "decision_hash", "rollout", "overridden"] {
            assert_eq!(found[field], gate[field], "{query} {field}: {found}");
        }
    }
    let status = coalmine(["rollout", "status", &rollout, "--server", &server]);
    let said = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        said.contains("overridden by eve: the customer is waiting; the judge says HOLD"),
        "{said}"
    );

    // It survives a crash.
    aggregator.kill_9();
    aggregator.launch();
    let after = aggregator.get(&path);
    for field in ["verdict", "decision_id", "decision_hash", "overridden"] {
        assert_eq!(after[field], gate[field], "{field}: {after}");
    }
    let approved = coalmine(["gate", "--service", "checkout", "--server", &server]);
    assert_eq!(approved.status.code(), Some(0), "{approved:?}");

    // A longer story is cut where tools poll, and whole on record.
    let long = "\"".repeat(1_000);
    assert_eq!(decide(&aggregator, &rollout, &"hold".into(), &long).status, 200);
    let polled = get(aggregator.http, &path).unwrap();
    assert!(polled.body.len() <= 2_048, "{} bytes", polled.body.len());
    let id = polled.json()["decision_id"].as_str().unwrap().to_owned();
    let decision = aggregator.get(&format!("/v1/decisions/{id}"));
    assert_eq!(decision["record"]["body"]["reason"], *long);

    let arguments = [
        "rollout",
        "override",
        &rollout,
        "--verdict",
        "judge",
        "--reason",
        "seen enough",
    ];
    let back = coalmine(arguments.into_iter().chain(["--server", &server]));
    assert!(back.status.success(), "{back:?}");
    let gate = aggregator.get(&path);
    assert_eq!(
        (&gate["verdict"], &gate["overridden"]),
        (&"HOLD".into(), &Value::Null),
        "{gate}"
    );
    let held = coalmine(["gate", &rollout, "--server", &server]);
    assert_eq!(held.status.code(), Some(2), "{held:?}");

    let ended = aggregator.post(&format!("/v1/rollouts/{rollout}/end"), &json!({ "actor": "eve" }));
    assert_eq!(ended.status, 200, "{}", ended.body);
    let late = decide(&aggregator, &rollout, &"approve".into(), "too late");
    assert_eq!(late.status, 409, "{}", late.body);
    let overrides = records(&aggregator.data)
        .into_iter()
        .filter(|kind| kind == "override");
    assert_eq!(overrides.count(), 3);
    aggregator.terminate();
    let data = aggregator.data.display().to_string();
    for arguments in [
        ["audit", "verify", "--data", &data],
        ["replay", "--all", "--data", &data],
    ] {
        let output = coalmine(arguments);
        assert!(output.status.success(), "{output:?}");
    }
    let said = explains(&["--data", &data]);
    assert!(said.contains("not the judge's decision"), "{said}");
    let proof = coalmine(["audit", "proof", &overriding, "--data", &data]);
    assert!(proof.status.success(), "{proof:?}");
    let replay = coalmine(["replay", &overriding, "--data", &data]);
    let complaint = String::from_utf8_lossy(&replay.stderr).into_owned();
    assert_eq!(replay.status.code(), Some(64), "{replay:?}");
    assert!(complaint.contains("is not the judge's decision"), "{complaint}");
}

#[test]
fn an_approval_by_a_person_is_held_back_while_the_log_takes_no_records() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(&directory.path().join("data")) else {
        return;
    };
    let aggregator = Aggregator::start(directory.path());
    let rollout = aggregator.start_rollout();
    let path = format!("/v1/rollouts/{rollout}/gate");
    let decided = decide(
        &aggregator,
        &rollout,
        &"approve".into(),
        "the customer is waiting",
    );
    assert_eq!(decided.status, 200, "{}", decided.body);
    assert_eq!(aggregator.get(&path)["verdict"], "APPROVE");

    // The judge's next decisions do not fit any more.
    let mut filler = Filler::new(&aggregator.data);
    let held = eventually("the approval is held back", || {
        filler.fill();
        Some(aggregator.get(&path)).filter(|gate| gate["verdict"] == "HOLD")
    });
    assert!(
        held["reason"]
            .as_str()
            .unwrap()
            .starts_with("APPROVE is held back: "),
        "{held}"
    );
    // Nor is another approval shown, recorded or not.
    let refused = decide(&aggregator, &rollout, &"approve".into(), "once more");
    assert_ne!(refused.json()["verdict"], "APPROVE", "{}", refused.body);
    assert_eq!(aggregator.get(&path)["verdict"], "HOLD");

    disk.enlarge();
    eventually("the approval is shown again", || {
        (aggregator.get(&path)["verdict"] == "APPROVE").then_some(())
    });
}
