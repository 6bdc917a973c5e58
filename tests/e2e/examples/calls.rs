//! What the examples call: routes that the running aggregator documents, and commands that it has.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_tests::{
    http::{Answer, request},
    process::program,
};
use serde_json::{Map, Value, json};

use super::{Stand, TOKEN, document, documents, files, list, read, text};

/// The aggregator's address in the examples.
const HOST: &str = "coalmine.coalmine:8080";

/// What Argo's kayenta provider calls below its address, and then what Orca and Gate call beside that.
const KAYENTA: [(&str, &str); 6] = [
    ("get", "/canaryConfig"),
    ("post", "/canary/checkout"),
    ("get", "/canary/execution"),
    ("get", "/credentials"),
    ("put", "/pipelines/execution/cancel"),
    ("get", "/judges"),
];

/// How many of them are Argo's.
const OF_ARGO: usize = 3;

/// What is asked of the aggregator: method and path.
type Call = (String, String);

/// The path of a URL of ours, without host, user, token and query.
pub(super) fn path_of(url: &str) -> Option<String> {
    let (before, rest) = url.split_once(HOST)?;
    assert!(before.starts_with("http://"), "{url}");
    let path = rest.split('?').next().unwrap_or_default();
    Some(match path.strip_prefix("/t/") {
        None => path.to_owned(),
        Some(rest) => format!("/{}", rest.split_once('/').unwrap_or_default().1),
    })
}

/// What is called because of one URL, by where it stands.
fn calls_of(parent: &Map<String, Value>, key: &str, path: &str) -> Vec<Call> {
    let of_kayenta = |calls: &[(&str, &str)]| -> Vec<Call> {
        let calls = calls.iter();
        calls
            .map(|(method, below)| ((*method).to_owned(), format!("{path}{below}")))
            .collect()
    };
    match key {
        "url" => {
            let method = parent
                .get("method")
                .map_or("POST", |method| method.as_str().unwrap());
            vec![(method.to_lowercase(), path.to_owned())]
        }
        "address" if parent.contains_key("canaryConfigName") => of_kayenta(&KAYENTA[..OF_ARGO]),
        "address" => {
            assert_eq!(path, "", "Prometheus' routes are at the root");
            ["get", "post"]
                .map(|method| (method.to_owned(), "/api/v1/query".to_owned()))
                .to_vec()
        }
        "base-url" | "baseUrl" => of_kayenta(&KAYENTA),
        // The server of the command line.
        _ if path.is_empty() => Vec::new(),
        _ => panic!("{key}: nobody knows what is called at {path}"),
    }
}

fn gather(value: &Value, calls: &mut Vec<Call>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value.as_str().and_then(path_of) {
                    Some(path) => calls.extend(calls_of(fields, key, &path)),
                    None => gather(value, calls),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| gather(item, calls)),
        _ => {}
    }
}

/// Whether a document of OpenAPI has a route.
fn has(openapi: &Value, (method, path): &Call) -> bool {
    let fits = |template: &str| {
        let [wanted, given] = [template, path].map(|path| path.split('/').collect::<Vec<_>>());
        let mut pairs = wanted.iter().zip(&given);
        wanted.len() == given.len() && pairs.all(|(wanted, given)| wanted.starts_with('{') || wanted == given)
    };
    let paths = openapi["paths"].as_object().unwrap();
    paths
        .iter()
        .any(|(template, methods)| fits(template) && methods.get(method).is_some())
}

#[test]
fn every_route_in_an_example_is_documented_by_the_running_aggregator() {
    let stand = Stand::start();
    let openapi = stand.get("/openapi.json");
    let mut all = 0;
    for name in files(&[".yaml", ".yml", ".json"]) {
        let mut calls = Vec::new();
        for document in documents(&name) {
            gather(&document, &mut calls);
        }
        all += calls.len();
        for call in calls {
            assert!(has(&openapi, &call), "{name}: there is no {call:?}");
        }
    }
    assert!(all >= 25, "only {all} calls were found");
    assert!(!has(&openapi, &("get".to_owned(), "/v1/nothing".to_owned())));
}

/// What each hook of a canary that nothing is known of yet is told: HOLD keeps weight and promotion, and nothing else.
const ON_HOLD: [(&str, u16); 8] = [
    ("confirm-rollout", 200),
    ("pre-rollout", 200),
    ("rollout", 200),
    ("confirm-traffic-increase", 403),
    ("confirm-promotion", 403),
    ("rollback", 403),
    ("post-rollout", 200),
    ("event", 200),
];

#[test]
fn the_hooks_of_the_canary_are_answered_in_their_order() {
    let stand = Stand::start();
    let canary = document("flagger/canary.yaml");
    let hooks = list(&canary, "/spec/analysis/webhooks");
    let types: Vec<_> = hooks.iter().map(|hook| text(hook, "/type")).collect();
    assert_eq!(types, ON_HOLD.map(|(hook, _)| hook));
    for (hook, (_, status)) in hooks.iter().zip(ON_HOLD) {
        let metadata = hook["metadata"].to_string().replace(TOKEN, &stand.token);
        let mut body = json!({
            "name": text(&canary, "/metadata/name"),
            "namespace": text(&canary, "/metadata/namespace"),
            "phase": if text(hook, "/type") == "post-rollout" { "Succeeded" } else { "Progressing" },
            "checksum": "7f6d",
            "metadata": serde_json::from_str::<Value>(&metadata).unwrap(),
        });
        if text(hook, "/type") == "event" {
            body["metadata"]["eventMessage"] = json!("Promotion completed! checkout.shop");
            body["metadata"]["eventType"] = json!("Normal");
            body["metadata"]["timestamp"] = json!("1795000000000");
        }
        let path = path_of(text(hook, "/url")).unwrap();
        let json = [("content-type", "application/json")];
        let answer = request(stand.aggregator.http, "POST", &path, &json, &body.to_string()).unwrap();
        assert_eq!(answer.status, status, "{path}: {}", answer.body);
        // What a token may not do is 403 too, as a problem document.
        assert!(!answer.body.starts_with('{'), "{path}: {}", answer.body);
    }
}

/// How a hook without metadata presents its token.
#[derive(Debug, Clone, Copy)]
enum Presented {
    /// As the URL says; Go sends what stands before the host as Basic.
    InTheUrl,
    /// In front of the path, for a client that leaves out what stands before the host.
    InThePath,
    Nowhere,
}

/// Calls a hook of a Canary as Flagger does.
fn call(stand: &Stand, canary: &Value, hook: &Value, phase: &str, presented: Presented) -> Answer {
    let body = json!({
        "name": text(canary, "/metadata/name"),
        "namespace": text(canary, "/metadata/namespace"),
        "phase": phase,
        "checksum": "7f6d",
    });
    let url = text(hook, "/url").replace(TOKEN, &stand.token);
    let mut path = path_of(&url).unwrap();
    let mut headers = vec![("content-type", "application/json".to_owned())];
    match presented {
        Presented::InTheUrl => {
            let (user, _) = url.split_once("://").unwrap().1.split_once('@').unwrap();
            headers.push(("authorization", format!("Basic {}", STANDARD.encode(user))));
        }
        Presented::InThePath => path = format!("/t/{}{path}", stand.token),
        Presented::Nowhere => {}
    }
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, &**value)).collect();
    request(stand.aggregator.http, "POST", &path, &headers, &body.to_string()).unwrap()
}

/// What the gates of the load tester are told at each verdict: whether it may be promoted, and whether it is to go back.
const AT_THE_GATES: [(&str, [u16; 2]); 3] = [
    ("hold", [403, 403]),
    ("approve", [200, 403]),
    ("rollback", [403, 200]),
];

#[test]
fn the_gates_of_the_load_tester_are_answered_at_their_new_host() {
    let stand = Stand::start();
    let canary = document("flagger/loadtester.yaml");
    let [promotion, rollback, end] = list(&canary, "/spec/analysis/webhooks") else {
        panic!("other hooks than a promotion, a rollback and an end: {canary}");
    };
    let types = [promotion, rollback, end].map(|hook| text(hook, "/type"));
    assert_eq!(types, ["confirm-promotion", "rollback", "post-rollout"]);
    for hook in [promotion, rollback, end] {
        assert!(hook.get("metadata").is_none(), "{hook}");
        let answer = call(&stand, &canary, hook, "Progressing", Presented::Nowhere);
        assert_eq!(answer.status, 401, "{hook}: {}", answer.body);
    }
    for presented in [Presented::InTheUrl, Presented::InThePath] {
        let ask = |hook: &Value, phase: &str, status: u16| {
            let answer = call(&stand, &canary, hook, phase, presented);
            let told = format!("{presented:?}, {hook}: {}", answer.body);
            assert_eq!(answer.status, status, "{told}");
            // What a token may not do is 403 too, as a problem document.
            assert!(!answer.body.starts_with('{'), "{told}");
        };
        // Flagger asks for the way back first, and by that an attempt begins.
        ask(rollback, "Progressing", 403);
        let gate = stand.get("/v1/gate?service=search");
        assert_eq!(gate["state"], "running", "{gate}");
        let rollout = text(&gate, "/rollout");
        for (verdict, [promotes, goes_back]) in AT_THE_GATES {
            stand.decide(rollout, verdict);
            ask(promotion, "WaitingPromotion", promotes);
            ask(rollback, "WaitingPromotion", goes_back);
        }
        ask(end, "Succeeded", 200);
        assert_eq!(stand.state(rollout), "ended");
    }
}

/// The commands in a text that begin with these words, up to what the shell does with them.
fn commands<'t>(text: &'t str, words: &str) -> Vec<&'t str> {
    let lines = text.lines();
    let found = lines.filter_map(|line| line.find(words).map(|start| line.split_at(start).1));
    found
        .map(|command| command.split([')', '|']).next().unwrap().trim())
        .collect()
}

#[test]
fn the_commands_that_make_tokens_make_them() {
    let mut made = 0;
    for name in files(&["README.md"]) {
        for command in commands(&read(&name), "coalmine token create") {
            let directory = tempfile::tempdir().unwrap();
            let words = command.split_whitespace().skip(1);
            let output = std::process::Command::new(program("coalmine"))
                .args(words)
                .current_dir(directory.path())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: {command}: {said}");
            assert!(output.stdout.starts_with(b"cmt_"), "{name}: {command}");
            made += 1;
        }
    }
    assert_eq!(made, 6, "a README does not say how a token is made");
}
