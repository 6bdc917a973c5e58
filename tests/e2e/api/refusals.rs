//! What makes no sense to the JSON API gives a problem document with the request's id, and changes nothing. What makes no
//! sense to any route is sent to all that are documented, and answered as the document says.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
};

use coalmine_tests::{components::Aggregator, eventually, http::Answer, process::coalmine};
use serde_json::{Value, json};

use super::{connect, records};
use crate::tokens::asked;

/// Sends bytes that may be no text; gives the answer, its head in small letters. Of a stream there is the head alone.
fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut stream = connect(address);
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes()).unwrap();
    // A body that is too large is not read to its end, so the rest may find nobody, and the end may be a reset.
    stream.write_all(body).ok();
    let (mut answer, mut block) = (Vec::new(), [0; 4_096]);
    while let Ok(read @ 1..) = stream.read(&mut block) {
        answer.extend_from_slice(&block[..read]);
        if let Some(end) = head_of_stream(&answer) {
            answer.truncate(end);
            break;
        }
    }
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{method} {path}: no answer but {answer:?}"));
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.to_ascii_lowercase(),
        body: body.to_owned(),
    }
}

/// Where the head of an answer ends that goes on for ever.
fn head_of_stream(answer: &[u8]) -> Option<usize> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&answer[..end]);
    head.contains("text/event-stream").then_some(end)
}

/// The value of a header.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(": "));
    lines.find(|(found, _)| *found == name).map(|(_, value)| value)
}

/// A request that makes no sense, what it is answered by, and what the answer says.
type Row<'a> = (&'a str, &'a str, &'a str, &'a [u8], &'a [u16], &'a str);

const JSON: &str = "application/json";

/// That a problem document of one of these statuses says this.
fn refused(address: SocketAddr, row: Row<'_>) {
    let (method, path, content_type, body, statuses, says) = row;
    let shown: String = String::from_utf8_lossy(body).chars().take(60).collect();
    let asked = format!("{method} {path} {content_type} {shown}");
    let answer = send(address, method, path, &[("content-type", content_type)], body);
    let status = answer.status;
    assert!(statuses.contains(&status), "{asked}: {status} {}", answer.body);
    let problem = problem(&asked, &answer);
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains(says), "{asked}: {detail}");
    if status == 405 {
        allows_others(method, &asked, &answer);
    }
}

/// That an answer is a problem document with the request's id; gives it.
fn problem(asked: &str, answer: &Answer) -> Value {
    let Answer { status, head, body } = answer;
    assert_eq!(
        header(head, "content-type"),
        Some("application/problem+json"),
        "{asked}: {head}"
    );
    let problem: Value =
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{asked}: {error}: {body}"));
    assert_eq!(problem["status"], *status, "{asked}: {problem}");
    let id = problem["request_id"].as_str().unwrap();
    assert_eq!(header(head, "x-request-id"), Some(id), "{asked}: {head}");
    problem
}

/// That an answer says which methods there are, and that this is none of them.
fn allows_others(method: &str, asked: &str, answer: &Answer) {
    let allow = header(&answer.head, "allow").unwrap_or_else(|| panic!("{asked}: {}", answer.head));
    assert!(
        !allow.is_empty() && !allow.contains(&method.to_ascii_lowercase()),
        "{asked}: {allow}"
    );
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let rollout = aggregator.start_rollout();
    let at = |rest: &str| format!("/v1/rollouts/{rollout}/{rest}");
    let (decide, end, gate) = (at("override"), at("end"), at("gate?proof=perhaps"));
    let deep = "[".repeat(60_000);
    let deep_field = format!("{{\"reason\":{deep}");
    let deep_unknown = format!("{{\"name\":\"checkout\",\"namespace\":\"shop\",\"more\":{deep}");
    let huge = format!("{{\"service\":\"{}\"}}", "x".repeat(70_000));
    let long_reason = json!({ "verdict": "hold", "reason": "x".repeat(1_001) }).to_string();
    let long_actor = json!({ "verdict": "hold", "reason": "x", "actor": "x".repeat(129) }).to_string();
    let body = &b""[..];
    let rows: &[Row<'_>] = &[
        // Wrong types, unknown and missing fields.
        (
            "POST",
            "/v1/rollouts",
            JSON,
            br#"{"service":1,"canary_version":"v2"}"#,
            &[422],
            "service",
        ),
        (
            "POST",
            "/v1/rollouts",
            JSON,
            br#"{"service":"checkout"}"#,
            &[422],
            "canary_version",
        ),
        (
            "POST",
            "/v1/rollouts",
            JSON,
            br#"{"service":"checkout","canary_version":"v2","color":1}"#,
            &[422],
            "color",
        ),
        (
            "POST",
            "/v1/rollouts",
            JSON,
            br#"{"service":"check out","canary_version":"v2"}"#,
            &[400],
            "service",
        ),
        (
            "POST",
            "/v1/rollouts",
            JSON,
            br#"{"service":"cart","canary_version":"v2"}"#,
            &[404],
            "no policy",
        ),
        (
            "POST",
            "/v1/rollouts",
            JSON,
            br#"{"service":"checkout","canary_version":"v3"}"#,
            &[409],
            "still open",
        ),
        (
            "POST",
            &decide,
            JSON,
            br#"{"verdict":"maybe","reason":"x"}"#,
            &[422],
            "approve",
        ),
        ("POST", &decide, JSON, br#"{"reason":"x"}"#, &[422], "verdict"),
        (
            "POST",
            &decide,
            JSON,
            br#"{"verdict":"approve"}"#,
            &[422],
            "reason",
        ),
        (
            "POST",
            &decide,
            JSON,
            br#"{"verdict":"approve","reason":" "}"#,
            &[400],
            "say why",
        ),
        (
            "POST",
            &decide,
            JSON,
            br#"{"verdict":"approve","reason":"x","force":true}"#,
            &[422],
            "force",
        ),
        (
            "POST",
            &decide,
            JSON,
            long_reason.as_bytes(),
            &[400],
            "at most 1000",
        ),
        (
            "POST",
            &decide,
            JSON,
            long_actor.as_bytes(),
            &[400],
            "at most 128",
        ),
        ("POST", &end, JSON, br#"{"reason":1}"#, &[422], "reason"),
        ("POST", &end, JSON, br#"{"color":1}"#, &[422], "color"),
        // No JSON, too deep, too large, no text, not said to be JSON.
        ("POST", "/v1/rollouts", JSON, b"{", &[400], "EOF"),
        ("POST", "/v1/rollouts", JSON, body, &[400], "EOF"),
        ("POST", "/v1/rollouts", JSON, deep.as_bytes(), &[400, 422], ""),
        ("POST", &decide, JSON, deep_field.as_bytes(), &[400, 422], ""),
        ("POST", &end, JSON, deep_field.as_bytes(), &[400, 422], ""),
        (
            "POST",
            "/gate/check",
            JSON,
            deep_unknown.as_bytes(),
            &[400, 422],
            "",
        ),
        ("POST", "/v1/rollouts", JSON, huge.as_bytes(), &[413], "limit"),
        ("POST", &decide, JSON, huge.as_bytes(), &[413], "limit"),
        ("POST", &end, JSON, huge.as_bytes(), &[413], "limit"),
        (
            "POST",
            "/v1/rollouts",
            JSON,
            b"{\"service\":\"\xff\"}",
            &[400, 422],
            "",
        ),
        (
            "POST",
            &decide,
            JSON,
            b"{\"reason\":\"\xc3\x28\"}",
            &[400, 422],
            "",
        ),
        ("POST", &end, JSON, b"{\"reason\":\"\xff\"}", &[400, 422], ""),
        (
            "POST",
            "/v1/rollouts",
            "text/plain",
            br#"{"service":"checkout"}"#,
            &[415],
            "application/json",
        ),
        (
            "POST",
            &decide,
            "text/plain",
            br#"{"reason":"x"}"#,
            &[415],
            "application/json",
        ),
        // Paths and parameters.
        ("GET", "/v1/rollouts/%ff", JSON, body, &[400], "UTF-8"),
        ("GET", "/v1/rollouts/%ff/gate", JSON, body, &[400], "UTF-8"),
        ("GET", "/v1/rollouts/%ff/watch", JSON, body, &[400], "UTF-8"),
        ("POST", "/v1/rollouts/%ff/end", JSON, body, &[400], "UTF-8"),
        ("GET", "/v1/decisions/%ff/proof", JSON, body, &[400], "UTF-8"),
        ("GET", "/v1/services/%ff", JSON, body, &[400], "UTF-8"),
        ("GET", "/v1/gate?service=%ff", JSON, body, &[404], "begin one"),
        ("GET", "/v1/gate", JSON, body, &[400], "service, version"),
        (
            "GET",
            "/v1/gate?service=checkout&color=1",
            JSON,
            body,
            &[400],
            "service, version",
        ),
        (
            "GET",
            "/v1/gate?service=checkout&version=v9",
            JSON,
            body,
            &[404],
            "version \"v9\"",
        ),
        (
            "GET",
            "/v1/gate?service=checkout&workload=cart",
            JSON,
            body,
            &[404],
            "workload \"cart\"",
        ),
        ("GET", &gate, JSON, body, &[400], "proof, true or false"),
        (
            "GET",
            "/v1/decisions?limit=-1",
            JSON,
            body,
            &[400],
            "rollout and limit",
        ),
        (
            "GET",
            "/v1/decisions?limit=99999999999999999999999",
            JSON,
            body,
            &[400],
            "rollout and limit",
        ),
        (
            "GET",
            "/v1/rollouts/nothing/watch",
            JSON,
            body,
            &[404],
            "no rollout \"nothing\"",
        ),
        (
            "POST",
            "/v1/rollouts/nothing/end",
            JSON,
            body,
            &[404],
            "no rollout \"nothing\"",
        ),
        (
            "POST",
            "/v1/rollouts/nothing/override",
            JSON,
            br#"{"verdict":null,"reason":"x"}"#,
            &[404],
            "nothing",
        ),
        (
            "GET",
            "/v1/decisions/nothing",
            JSON,
            body,
            &[404],
            "no decision \"nothing\"",
        ),
        ("GET", "/v1/services/cart", JSON, body, &[404], "cart"),
        // Methods and routes.
        ("DELETE", "/v1/rollouts", JSON, body, &[405], "method"),
        ("PUT", "/v1/gate", JSON, body, &[405], "method"),
        ("POST", "/v1/rollouts/nothing/gate", JSON, body, &[405], "method"),
        (
            "GET",
            "/v1/rollouts/nothing/override",
            JSON,
            body,
            &[405],
            "method",
        ),
        ("POST", "/openapi.json", JSON, body, &[405], "method"),
        ("GET", "/v1", JSON, body, &[404], "no such route"),
        ("GET", "/v1/rollouts/a/b", JSON, body, &[404], "no such route"),
        ("PATCH", "/", JSON, body, &[404], "no such route"),
    ];
    for row in rows {
        refused(aggregator.http, *row);
    }

    let gate = aggregator.get(&at("gate"));
    assert_eq!(
        (&gate["verdict"], &gate["state"], &gate["overridden"]),
        (&"HOLD".into(), &"running".into(), &Value::Null),
        "{gate}"
    );
    let rollouts = aggregator.get("/v1/rollouts");
    assert_eq!(rollouts["rollouts"].as_array().unwrap().len(), 1, "{rollouts}");
    for kind in records(&aggregator.data) {
        assert!(
            !["override", "end", "bootstrap"].contains(&kind.as_str()),
            "{kind}"
        );
    }
    let said = fs::read_to_string(directory.path().join("aggregator.log")).unwrap();
    assert!(!said.contains("panicked"), "{said}");
}

/// A method that no route has.
const NO_METHOD: &str = "DELETE";

/// What the judge and the log record by themselves.
const OF_ITS_OWN: [&str; 3] = ["decision", "heartbeat", "segment_seal"];

/// A documented operation.
struct Operation<'a> {
    address: SocketAddr,
    document: &'a Value,
    /// What the document says of it.
    said: &'a Value,
    method: &'a str,
    /// With names that there are.
    path: String,
    /// What its body is to be.
    kind: &'static str,
}

impl Operation<'_> {
    fn lists(&self, status: u16) -> bool {
        self.said["responses"][status.to_string()].is_object()
    }

    fn reads_json(&self) -> bool {
        self.said["requestBody"]["content"][JSON].is_object()
    }

    /// A body that gives every field, each as a text that is none.
    fn no_utf8(&self) -> Vec<u8> {
        let body = self.said["requestBody"].to_string();
        let schema = body.split("\"#/components/schemas/").nth(1);
        let schema = schema.and_then(|rest| rest.split('"').next()).unwrap_or_default();
        let fields = self.document["components"]["schemas"][schema]["properties"].as_object();
        let names = fields.into_iter().flat_map(|fields| fields.keys());
        let text = if self.kind == JSON {
            let pairs = names.map(|name| format!("\"{name}\":\"?\""));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(","))
        } else {
            let pairs = names.map(|name| format!("{name}=?"));
            pairs.collect::<Vec<_>>().join("&")
        };
        let spoiled = text.bytes().map(|byte| if byte == b'?' { b'\xff' } else { byte });
        spoiled.collect()
    }

    /// Sends a body, and holds the answer against the document.
    fn ask(&self, what: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let asked = format!("{what} to {} {}", self.method, self.path);
        let answer = send(self.address, self.method, &self.path, headers, body);
        let Answer { status, head, body } = &answer;
        assert!(self.lists(*status), "{asked}: {status} is not listed: {body}");
        let kind = header(head, "content-type").unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default();
        assert!(
            self.said["responses"][status.to_string()]["content"][kind].is_object(),
            "{asked}: {status} is not listed as {kind}"
        );
        if *status >= 400 {
            self.is_refusal(&asked, &answer);
        }
        answer
    }

    /// That an answer is an error in the form of its face.
    fn is_refusal(&self, asked: &str, answer: &Answer) {
        let id = header(&answer.head, "x-request-id").unwrap_or_default();
        assert!(!id.is_empty(), "{asked}: {}", answer.head);
        if self.path.starts_with("/api/v1/") {
            let envelope = answer.json();
            assert_eq!(envelope["status"], "error", "{asked}: {envelope}");
            for field in ["errorType", "error"] {
                let text = envelope[field].as_str().unwrap_or_default();
                assert!(!text.is_empty(), "{asked}: {envelope}");
            }
            return;
        }
        let problem = problem(asked, answer);
        if self.path.starts_with("/kayenta/") {
            assert_eq!(problem["message"], problem["detail"], "{asked}");
        }
    }

    /// Sends it bodies that make no sense. Where none is read, none matters.
    fn refuses_bodies(&self) {
        let deep = "[".repeat(60_000);
        let huge = format!("{{\"name\":\"{}\"}}", "x".repeat(70_000));
        let no_utf8 = self.no_utf8();
        let bodies: [(&str, &str, &[u8]); 4] = [
            ("text", "text/plain", b"no JSON"),
            ("brackets", self.kind, deep.as_bytes()),
            ("70 KB", self.kind, huge.as_bytes()),
            ("no UTF-8", self.kind, &no_utf8),
        ];
        for (what, kind, body) in bodies {
            let answer = self.ask(what, &[("content-type", kind)], body);
            let (method, path, status) = (self.method, &self.path, answer.status);
            if self.reads_json() {
                assert!(
                    status >= 400,
                    "{what} to {method} {path}: {status} {}",
                    answer.body
                );
            }
            // These two are answered wherever they are listed, and for nothing else.
            for (other, code) in [("70 KB", 413), ("text", 415)] {
                assert_eq!(
                    status == code,
                    what == other && self.lists(code),
                    "{what} to {method} {path}: {status} {}",
                    answer.body
                );
            }
        }
    }

    fn refuses_another_method(&self) {
        let asked = format!("{NO_METHOD} {}", self.path);
        let answer = send(self.address, NO_METHOD, &self.path, &[], b"");
        // What else Kayenta has is not offered, whatever the method.
        let is_kayentas = self.path.starts_with("/kayenta/");
        let wanted = if is_kayentas { 501 } else { 405 };
        assert_eq!(answer.status, wanted, "{asked}: {}", answer.body);
        if !is_kayentas {
            allows_others(NO_METHOD, &asked, &answer);
        }
        if self.path.starts_with("/api/v1/") {
            // As Prometheus does.
            assert_eq!(answer.body, "Method Not Allowed\n", "{asked}");
        } else {
            self.is_refusal(&asked, &answer);
        }
    }

    /// No more than ten a second are answered that present nothing good.
    fn refuses_a_token_that_is_none(&self) {
        let headers = [("authorization", "Bearer x")];
        let answer = eventually("it is not asked too fast", || {
            let answer = self.ask("a token that is none", &headers, b"");
            (answer.status != 429).then_some(answer)
        });
        assert_eq!(answer.status, 401, "{}: {}", self.path, answer.body);
    }
}

#[test]
fn what_makes_no_sense_to_any_route_is_answered_as_documented_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = directory.path().join("tokens");
    let file = tokens.to_str().unwrap();
    let made = coalmine([
        "token",
        "create",
        "--name",
        "deploy",
        "--scope",
        "gate",
        "--service",
        "*",
        "--file",
        file,
    ]);
    assert!(made.status.success(), "{made:?}");
    let arguments = ["--tokens", file, "--anonymous", "gate,rollout,override,audit"];
    let mut aggregator = Aggregator::prepare(directory.path()).with_arguments(&arguments);
    aggregator.launch();
    let rollout = aggregator.start_rollout();
    let gate = format!("/v1/rollouts/{rollout}/gate");
    let decision = eventually("a window is judged", || {
        aggregator.get(&gate)["decision_id"].as_str().map(str::to_owned)
    });
    let recorded = || {
        let mut kinds = records(&aggregator.data);
        kinds.retain(|kind| !OF_ITS_OWN.contains(&kind.as_str()));
        kinds
    };
    let before = recorded();

    let document = aggregator.get("/openapi.json");
    let mut operations = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, said) in methods.as_object().unwrap() {
            let method = method.to_ascii_uppercase();
            let (path, kind, _) = asked(&method, path, &rollout, &decision);
            let operation = Operation {
                address: aggregator.http,
                document: &document,
                said,
                method: &method,
                path,
                kind,
            };
            operation.refuses_bodies();
            operation.refuses_another_method();
            operation.refuses_a_token_that_is_none();
            operations += 1;
        }
    }
    assert!(operations > 30, "{operations} operations");

    assert_eq!(recorded(), before);
    let gate = aggregator.get(&gate);
    assert_eq!(
        (&gate["verdict"], &gate["state"], &gate["overridden"]),
        (&"HOLD".into(), &"running".into(), &Value::Null),
        "{gate}"
    );
    let said = fs::read_to_string(directory.path().join("aggregator.log")).unwrap();
    assert!(!said.contains("panicked"), "{said}");
}
