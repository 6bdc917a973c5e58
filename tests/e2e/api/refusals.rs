//! What makes no sense to the JSON API: each gives a problem document with the request's id, and changes nothing.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
};

use coalmine_tests::components::Aggregator;
use serde_json::{Value, json};

use super::{connect, records};

/// Sends bytes that may be no text; gives status, head and body.
fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    content_type: &str,
    body: &[u8],
) -> (u16, String, String) {
    let mut stream = connect(address);
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A body that is too large is not read to its end, so the rest may find nobody, and the end may be a reset.
    stream.write_all(body).ok();
    let (mut answer, mut block) = (Vec::new(), [0; 4_096]);
    while let Ok(read @ 1..) = stream.read(&mut block) {
        answer.extend_from_slice(&block[..read]);
    }
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{method} {path}: no answer but {answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_owned())
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
    let (status, head, body) = send(address, method, path, content_type, body);
    assert!(statuses.contains(&status), "{asked}: {status} {body}");
    assert_eq!(
        header(&head, "content-type"),
        Some("application/problem+json"),
        "{asked}: {head}"
    );
    let problem: Value =
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{asked}: {error}: {body}"));
    assert_eq!(problem["status"], status, "{asked}: {problem}");
    let id = problem["request_id"].as_str().unwrap();
    assert_eq!(header(&head, "x-request-id"), Some(id), "{asked}: {head}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains(says), "{asked}: {detail}");
    if status == 405 {
        let allow = header(&head, "allow").unwrap_or_else(|| panic!("{asked}: {head}"));
        assert!(
            !allow.is_empty() && !allow.contains(&method.to_ascii_lowercase()),
            "{asked}: {allow}"
        );
    }
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
