//! What a page in somebody's browser can send to this machine: a browser says so, or the page's own name does.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_judge::chain::Hash;
use coalmine_tests::components::Aggregator;
use serde_json::json;

use super::connect;

/// Sends a request with these lines in its head, the name of the host among them; gives the status.
fn send(address: SocketAddr, method: &str, path: &str, lines: &[&str]) -> u16 {
    let mut stream = connect(address);
    let body = match method {
        "POST" => json!({ "verdict": "hold", "reason": "a page says so" }).to_string(),
        _ => String::new(),
    };
    let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let head = format!(
        "{method} {path} HTTP/1.1\r\n{lines}connection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap_or_else(|| panic!("{answer:?}"));
    status.parse().unwrap()
}

const ORIGIN: &str = "origin: http://evil.example";
const CROSS: &str = "sec-fetch-site: cross-site";
const EVIL: &str = "host: evil.example";

#[test]
fn a_page_is_not_taken_for_a_program_on_this_machine() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let rollout = aggregator.start_rollout();
    let decide = format!("/v1/rollouts/{rollout}/override");
    let port = aggregator.http.port();
    let hosts = [
        aggregator.http.to_string(),
        format!("localhost:{port}"),
        format!("evil.example:{port}"),
    ];
    let hosts = hosts.map(|host| format!("host: {host}"));
    let [own, name, evil] = hosts.each_ref().map(String::as_str);
    for (method, path, lines, status) in [
        ("GET", "/v1/rollouts", &[own][..], 200),
        ("GET", "/v1/rollouts", &[name][..], 200),
        ("GET", "/v1/rollouts", &[own, "sec-fetch-site: none"][..], 200),
        (
            "GET",
            "/v1/rollouts",
            &[own, "sec-fetch-site: same-origin"][..],
            200,
        ),
        ("GET", "/v1/rollouts", &[own, CROSS][..], 401),
        ("GET", "/v1/rollouts", &[own, ORIGIN][..], 401),
        // Of a name that was made to lead here its page is the owner, so the browser says nothing of it.
        ("GET", "/v1/rollouts", &[EVIL][..], 401),
        ("POST", &decide, &[evil][..], 401),
        (
            "POST",
            &decide,
            &[evil, "sec-fetch-site: same-origin", ORIGIN][..],
            403,
        ),
        ("POST", &decide, &[own, ORIGIN][..], 403),
        ("POST", &decide, &[own, CROSS][..], 403),
        ("POST", &decide, &[own, "origin: null"][..], 403),
        ("OPTIONS", &decide, &[own, ORIGIN][..], 403),
    ] {
        let answered = send(aggregator.http, method, path, lines);
        assert_eq!(answered, status, "{method} {path} {lines:?}");
    }
    let gate = aggregator.get(&format!("/v1/rollouts/{rollout}/gate"));
    assert!(gate["overridden"].is_null(), "{gate}");
    assert_eq!(send(aggregator.http, "POST", &decide, &[own]), 200);
}

#[test]
fn a_page_changes_nothing_whatever_everybody_may_do() {
    let directory = tempfile::tempdir().unwrap();
    let token = format!("cmt_{}", "a".repeat(43));
    let file = directory.path().join("tokens");
    let line = format!("{} ops override *\n", Hash::of(token.as_bytes()));
    std::fs::write(&file, line).unwrap();
    let mut aggregator = Aggregator::prepare(directory.path()).with_arguments(&[
        "--tokens",
        file.to_str().unwrap(),
        "--anonymous",
        "gate,rollout,override",
    ]);
    aggregator.launch();
    let rollout = aggregator.start_rollout();
    let decide = format!("/v1/rollouts/{rollout}/override");
    let with_token = format!("/t/{token}{decide}");
    let [own, bearer] = [
        format!("host: {}", aggregator.http),
        format!("authorization: Bearer {token}"),
    ];
    let (own, bearer) = (own.as_str(), bearer.as_str());
    let basic = format!("authorization: Basic {}", STANDARD.encode(format!("any:{token}")));
    let basic = basic.as_str();
    for (method, path, lines, status) in [
        ("GET", "/v1/rollouts", &[own, ORIGIN][..], 200),
        ("GET", "/v1/rollouts", &[EVIL][..], 200),
        ("POST", &decide, &[own, ORIGIN][..], 403),
        ("POST", &decide, &[own, CROSS][..], 403),
        // A password that a browser remembers is added to whatever a page asks for.
        ("POST", &decide, &[own, ORIGIN, basic][..], 403),
        ("POST", &decide, &[own, basic][..], 200),
        // A token says who asks, and no browser adds it by itself.
        ("POST", &decide, &[own, ORIGIN, bearer][..], 200),
        ("POST", &with_token, &[own, ORIGIN][..], 200),
        ("POST", &decide, &[EVIL][..], 200),
    ] {
        let answered = send(aggregator.http, method, path, lines);
        assert_eq!(answered, status, "{method} {path} {lines:?}");
    }
}
