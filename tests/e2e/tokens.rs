//! Who may ask: tokens with scopes and services, in each way that a tool can present one, and how often.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_judge::chain::Hash;
use coalmine_tests::{
    components::Aggregator,
    eventually,
    http::{Answer, get, request},
    process::{coalmine, program},
};
use serde_json::{Value, json};

/// The policy of another service than the one that all tests have.
const CART: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: cart
defaults:
  errors: { max_rate: 1% }
  judge_window: 1s
  hold_deadline: 5m
  required: [errors]
";

/// Tokens that tests write into files themselves; the form counts, not what is in it.
fn token(letter: &str) -> String {
    format!("cmt_{}", letter.repeat(43))
}

fn line(token: &str, rest: &str) -> String {
    format!("{} {rest}\n", Hash::of(token.as_bytes()))
}

/// An aggregator with this file of tokens.
fn start(directory: &Path, tokens: &str, more: &[&str]) -> (Aggregator, PathBuf) {
    let file = directory.join("tokens");
    fs::write(&file, tokens).unwrap();
    let aggregator = Aggregator::prepare(directory).with_arguments(&["--tokens", file.to_str().unwrap()]);
    let mut aggregator = aggregator.with_arguments(more);
    aggregator.launch();
    (aggregator, file)
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

fn ask(aggregator: &Aggregator, path: &str, authorization: Option<&str>) -> Answer {
    let headers: Vec<_> = authorization
        .map(|value| ("authorization", value))
        .into_iter()
        .collect();
    request(aggregator.http, "GET", path, &headers, "").unwrap()
}

fn post(aggregator: &Aggregator, path: &str, authorization: Option<&str>, body: &Value) -> Answer {
    let mut headers = vec![("content-type", "application/json")];
    headers.extend(authorization.map(|value| ("authorization", value)));
    request(aggregator.http, "POST", path, &headers, &body.to_string()).unwrap()
}

/// Starts a rollout of checkout in the name of Flagger's Canary.
fn start_rollout(aggregator: &Aggregator, token: &str) -> String {
    let workload = json!({ "kind": "Canary", "namespace": "shop", "name": "checkout" });
    let body = json!({ "service": "checkout", "canary_version": "v2", "workload": workload });
    let answer = post(aggregator, "/v1/rollouts", Some(&bearer(token)), &body);
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()["id"].as_str().unwrap().to_owned()
}

fn header<'a>(answer: &'a Answer, name: &str) -> Option<&'a str> {
    let mut lines = answer.head.lines();
    lines.find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// What every refusal of ours has.
fn is_problem(answer: &Answer) {
    let problem = answer.json();
    assert_eq!(problem["status"], answer.status, "{problem}");
    assert!(!problem["detail"].as_str().unwrap().is_empty(), "{problem}");
    assert_eq!(header(answer, "content-type"), Some("application/problem+json"));
    assert_eq!(header(answer, "x-request-id"), problem["request_id"].as_str());
    let challenge = header(answer, "www-authenticate");
    let expected = (answer.status == 401).then_some("Bearer, Basic realm=\"coalmine\"");
    assert_eq!(challenge, expected, "{problem}");
}

fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join("aggregator.log")).unwrap()
}

#[test]
fn a_token_may_do_what_it_says_in_whatever_way_it_is_presented() {
    let directory = tempfile::tempdir().unwrap();
    let [deploy, reader, cart, old, unknown, prover] = ["a", "b", "c", "d", "e", "f"].map(token);
    let tokens = line(&deploy, "deploy gate,rollout check*")
        + &line(&prover, "prover gate,audit checkout")
        + &line(&reader, "reader audit *")
        + &line(&cart, "cart gate,rollout cart")
        + &line(&old, "old gate * until=2020-01-01T00:00:00Z");
    let (aggregator, _) = start(directory.path(), &tokens, &[]);
    let rollout = start_rollout(&aggregator, &deploy);
    let gate = format!("/v1/rollouts/{rollout}/gate");
    let basic = |pair: String| format!("Basic {}", STANDARD.encode(pair));
    // No more than ten a second are answered that present nothing good.
    for (path, authorization, status) in [
        (&*gate, None, 401),
        (&gate, Some("Bearer"), 401),
        (&gate, Some("Digest username=\"a\""), 401),
        (&gate, Some("Basic ???"), 401),
        (&gate, Some(&*bearer("secret")), 401),
        (&gate, Some(&bearer(&unknown)), 401),
        (&gate, Some(&bearer(&old)), 401),
        (&gate, Some(&bearer(&deploy)), 200),
        (&gate, Some(&deploy), 401),
        // As `http://any:TOKEN@host` asks.
        (&gate, Some(&basic(format!("any:{deploy}"))), 200),
        (&gate, Some(&basic(format!("{deploy}:"))), 401),
        (&format!("/t/{deploy}{gate}"), None, 200),
        // A proof has the record, which is for who may read the audit trail.
        (&format!("/t/{deploy}{gate}?proof=true"), None, 403),
        (&format!("/t/{prover}{gate}?proof=true"), None, 200),
        (&format!("/t/{deploy}/v1/gate?service=checkout"), None, 200),
        (
            &format!("/t/{deploy}/v1/gate?service=checkout&proof=true"),
            None,
            403,
        ),
        (
            &format!("/t/{prover}/v1/gate?service=checkout&proof=true"),
            None,
            200,
        ),
        (&format!("/t/{unknown}{gate}"), None, 401),
        (&format!("/t/{deploy}{gate}"), Some(&bearer(&unknown)), 200),
        (&gate, Some(&bearer(&reader)), 403),
        (&gate, Some(&bearer(&cart)), 403),
        ("/v1/audit/checkpoint", Some(&bearer(&reader)), 200),
        ("/v1/audit/checkpoint", Some(&bearer(&deploy)), 403),
        ("/openapi.json", None, 200),
        ("/nowhere", None, 404),
    ] {
        let answer = ask(&aggregator, path, authorization);
        assert_eq!(answer.status, status, "{path} {authorization:?}: {}", answer.body);
        assert!(header(&answer, "x-request-id").is_some());
        if status != 200 {
            is_problem(&answer);
        }
    }
    // Clients of Prometheus try another way after a 403.
    for (authorization, status) in [
        (None, 401),
        (Some(&*bearer(&reader)), 401),
        (Some(&bearer(&deploy)), 200),
    ] {
        let answer = ask(&aggregator, "/api/v1/query?query=vector(1)", authorization);
        assert_eq!(answer.status, status, "{authorization:?}: {}", answer.body);
        assert_eq!(header(&answer, "www-authenticate").is_some(), status == 401);
    }
    let told = ask(&aggregator, &gate, Some(&bearer(&old))).json();
    assert!(
        told["detail"]
            .as_str()
            .unwrap()
            .contains("old has expired at 2020-01-01"),
        "{told}"
    );
    let given = [("x-request-id", "deploy-17")];
    let answer = request(aggregator.http, "GET", &gate, &given, "").unwrap();
    assert_eq!(header(&answer, "x-request-id"), Some("deploy-17"));
    is_problem(&answer);

    let start = json!({ "service": "cart", "canary_version": "v2" });
    assert_eq!(post(&aggregator, "/v1/rollouts", None, &start).status, 401);
    // Nobody's body is looked at who may not send it.
    let nonsense = json!({ "color": "x".repeat(50_000) });
    for path in ["/v1/rollouts", &format!("/v1/rollouts/{rollout}/end")] {
        let answer = post(&aggregator, path, None, &nonsense);
        assert_eq!(answer.status, 401, "{}", answer.body);
    }
    let answer = post(&aggregator, "/v1/rollouts", Some(&bearer(&deploy)), &nonsense);
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.len() < 1_024, "{}", answer.body);
    for wrong in [&deploy, &reader] {
        let answer = post(&aggregator, "/v1/rollouts", Some(&bearer(wrong)), &start);
        assert_eq!(answer.status, 403, "{}", answer.body);
    }
    let metrics = get(aggregator.admin, "/metrics").unwrap().body;
    for reason in ["unauthenticated", "forbidden"] {
        let series = format!("coalmine_requests_refused_total{{reason=\"{reason}\"}}");
        assert!(metrics.contains(&series), "{metrics}");
    }
    let log = log(directory.path());
    for secret in [&deploy, &reader, &cart, &old, &unknown, &prover] {
        assert!(
            !log.contains(secret.as_str()),
            "a token is nobody's business: {log}"
        );
    }
}

#[test]
fn flagger_presents_its_token_among_the_metadata() {
    let directory = tempfile::tempdir().unwrap();
    let [deploy, reader, cart, flagger] = ["a", "b", "c", "d"].map(token);
    let tokens = line(&deploy, "deploy rollout *")
        + &line(&reader, "reader audit *")
        + &line(&cart, "cart gate cart")
        + &line(&flagger, "flagger gate *");
    let (aggregator, _) = start(directory.path(), &tokens, &[]);
    start_rollout(&aggregator, &deploy);
    let check = |metadata: &Value| {
        let body = json!({
            "name": "checkout", "namespace": "shop", "phase": "Progressing", "checksum": "1", "metadata": metadata,
        });
        post(&aggregator, "/gate/check", None, &body)
    };
    for (metadata, status, verdict) in [
        (json!({}), 401, false),
        (json!({ "token": "secret" }), 401, false),
        (json!({ "token": reader }), 403, false),
        (json!({ "token": cart }), 403, false),
        (json!({ "token": flagger }), 403, true),
    ] {
        let answer = check(&metadata);
        assert_eq!(answer.status, status, "{metadata}: {}", answer.body);
        assert_eq!(answer.body.contains("HOLD"), verdict, "{}", answer.body);
    }
    let unknown = json!({ "token": token("e") });
    let refused = eventually("tokens that are not known are limited here too", || {
        let burst: Vec<_> = (0..20).map(|_| check(&unknown)).collect();
        burst.into_iter().find(|answer| answer.status == 429)
    });
    is_problem(&refused);
    assert!(header(&refused, "retry-after").is_some(), "{}", refused.head);
    let known = check(&json!({ "token": flagger }));
    assert_eq!(known.status, 403, "it is not held up: {}", known.body);
    assert!(known.body.contains("HOLD"), "{}", known.body);
}

/// A documented route as it is asked: with names that there are, and with what it has to be given.
pub(crate) fn asked(
    method: &str,
    path: &str,
    rollout: &str,
    decision: &str,
) -> (String, &'static str, String) {
    let execution = format!("{rollout}.95.75");
    let id = match (method, path) {
        ("POST", _) | (_, "/kayenta/canaryConfig/{id}") => "checkout",
        _ => &execution,
    };
    let names = [
        ("{rollout}", rollout),
        ("{decision}", decision),
        ("{service}", "checkout"),
        ("{id}", id),
        ("{hook}", "rollout"),
        ("{act}", "check"),
        ("{name}", "service"),
    ];
    let named = names
        .into_iter()
        .fold(path.to_owned(), |path, (name, value)| path.replace(name, value));
    let parameters = match path {
        "/v1/gate" => "service=checkout",
        "/v1/audit/consistency" => "from=1&to=1",
        "/api/v1/query" => "query=vector(1)",
        "/api/v1/query_range" => "query=vector(1)&start=0&end=1&step=1",
        "/api/v1/series" => "match[]=coalmine_verdict",
        _ => "",
    };
    if method == "POST" && path.starts_with("/api/v1/") {
        return (named, "application/x-www-form-urlencoded", parameters.to_owned());
    }
    let side = |scope: &str| {
        json!({
            "scope": scope, "location": "shop", "step": 60,
            "start": "2026-11-28T10:00:00Z", "end": "2026-11-28T10:00:30Z",
        })
    };
    let scopes = json!({ "default": { "controlScope": side("*"), "experimentScope": side("v2") } });
    let thresholds = json!({ "pass": 95, "marginal": 75 });
    let body = match path {
        "/v1/rollouts" => json!({ "service": "checkout", "canary_version": "v2" }),
        "/v1/rollouts/{rollout}/override" => json!({ "verdict": "approve", "reason": "nobody may" }),
        "/kayenta/canary/{id}" => json!({ "scopes": scopes, "thresholds": thresholds }),
        "/kayenta/standalone_canary_analysis/{id}" => json!({
            "scopes": [{ "experimentScope": "v2", "experimentLocation": "shop" }],
            "thresholds": thresholds,
            "lifetimeDurationMins": 60,
        }),
        "/v1/flagger/{hook}" | "/gate/{act}" | "/rollback/{act}" => json!({
            "name": "checkout", "namespace": "shop", "phase": "Progressing", "checksum": "1", "metadata": {},
        }),
        _ => json!({}),
    };
    let query = if parameters.is_empty() { "" } else { "?" };
    (
        format!("{named}{query}{parameters}"),
        "application/json",
        body.to_string(),
    )
}

#[test]
fn nothing_that_is_documented_is_open_to_whoever_presents_no_token() {
    let directory = tempfile::tempdir().unwrap();
    let deploy = token("a");
    let tokens = line(&deploy, "deploy gate,rollout,override,audit *");
    let (aggregator, _) = start(directory.path(), &tokens, &[]);
    let rollout = start_rollout(&aggregator, &deploy);
    let gate = format!("/v1/rollouts/{rollout}/gate");
    let decision = eventually("a window is judged", || {
        let gate = ask(&aggregator, &gate, Some(&bearer(&deploy))).json();
        gate["decision_id"].as_str().map(str::to_owned)
    });
    let document = ask(&aggregator, "/openapi.json", None).json();
    let (mut routes, mut open) = (0, Vec::new());
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            if !["get", "post", "put", "delete", "patch"].contains(&method.as_str()) {
                continue;
            }
            let method = method.to_ascii_uppercase();
            let (asked, kind, body) = asked(&method, path, &rollout, &decision);
            assert!(
                !asked.contains('{'),
                "{path} has a name that is not known here: {asked}"
            );
            let headers = [("content-type", kind)];
            let answer = request(aggregator.http, &method, &asked, &headers, &body).unwrap();
            routes += 1;
            if answer.status != 401 {
                open.push(format!("{method} {path}: {}", answer.status));
            }
            // With the token the same request is let in, whatever it is answered.
            let authorization = bearer(&deploy);
            let headers = [("content-type", kind), ("authorization", &authorization)];
            let read_only = ["GET", "/api/v1/"]
                .iter()
                .any(|part| format!("{method} {path}").contains(part));
            if read_only && !path.ends_with("/watch") {
                let answer = request(aggregator.http, &method, &asked, &headers, &body).unwrap();
                assert!(
                    ![400, 401, 403, 422].contains(&answer.status),
                    "{method} {asked}: {} {}",
                    answer.status,
                    answer.body
                );
            }
        }
    }
    // What says nothing of any rollout.
    assert_eq!(open, ["GET /kayenta/health: 200"]);
    assert!(routes > 30, "{routes} routes");
    let gate = ask(&aggregator, &gate, Some(&bearer(&deploy))).json();
    assert_eq!(
        (&gate["verdict"], &gate["state"]),
        (&"HOLD".into(), &"running".into()),
        "{gate}"
    );
}

#[test]
fn whoever_presents_no_token_signs_as_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let deploy = token("a");
    let tokens = line(&deploy, "deploy rollout *");
    let (aggregator, _) = start(
        directory.path(),
        &tokens,
        &["--anonymous", "gate,rollout,override"],
    );
    let body = json!({ "service": "checkout", "canary_version": "v2", "actor": "deploy" });
    let answer = post(&aggregator, "/v1/rollouts", None, &body);
    assert_eq!(answer.status, 201, "{}", answer.body);
    let rollout = answer.json()["id"].as_str().unwrap().to_owned();
    let at = |rest: &str| format!("/v1/rollouts/{rollout}/{rest}");
    for (said, actor) in [(json!("deploy"), "anonymous:deploy"), (Value::Null, "anonymous")] {
        let decision = json!({ "verdict": "hold", "reason": "wait", "actor": said });
        let answer = post(&aggregator, &at("override"), None, &decision);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!(answer.json()["overridden"]["actor"], actor, "{}", answer.body);
    }
    let answer = post(
        &aggregator,
        &at("end"),
        Some(&bearer(&deploy)),
        &json!({ "actor": "run-17" }),
    );
    assert_eq!(answer.status, 200, "{}", answer.body);
    let log = fs::read_to_string(aggregator.data.join("decisions.jsonl")).unwrap();
    for actor in ["\"anonymous:deploy\"", "\"deploy:run-17\""] {
        assert!(log.contains(actor), "{actor}: {log}");
    }
    assert!(!log.contains("\"actor\":\"deploy\""), "{log}");
}

/// Whoever asks by a label that others' rollouts have too must not find nothing because of them.
#[test]
fn a_token_s_own_rollout_is_found_whatever_others_have() {
    let directory = tempfile::tempdir().unwrap();
    let [deploy, cart] = ["a", "b"].map(token);
    let tokens = line(&deploy, "deploy rollout *") + &line(&cart, "cart gate cart");
    let policy = directory.path().join("cart.yaml");
    fs::write(&policy, CART).unwrap();
    let also = ["--policy", policy.to_str().unwrap()];
    let (aggregator, _) = start(directory.path(), &tokens, &also);
    let begin = |service: &str| {
        let body = json!({ "service": service, "canary_version": "v2" });
        let begun = post(&aggregator, "/v1/rollouts", Some(&bearer(&deploy)), &body);
        assert_eq!(begun.status, 201, "{}", begun.body);
        begun.json()["id"].as_str().unwrap().to_owned()
    };
    let end = |id: &str| {
        let end = format!("/v1/rollouts/{id}/end");
        let ended = post(&aggregator, &end, Some(&bearer(&deploy)), &json!({}));
        assert_eq!(ended.status, 200, "{}", ended.body);
    };
    let own = begin("cart");
    end(&own);
    let found = |what: &str| {
        let query = "/api/v1/query?query=coalmine_verdict%7Bversion%3D%22v2%22%7D";
        let answer = ask(&aggregator, query, Some(&bearer(&cart)));
        assert_eq!(answer.status, 200, "{what}: {}", answer.body);
        let answer = answer.json();
        let series = &answer["data"]["result"][0];
        assert_eq!(series["metric"]["rollout"], own, "{what}: {answer}");
        assert_eq!(series["value"][1], "0", "{what}: {answer}");
        assert!(!answer.to_string().contains("checkout"), "{what}: {answer}");
    };
    found("it is the only one");
    let other = begin("checkout");
    found("another is open");
    end(&other);
    found("another is the newest");
}

#[test]
fn a_token_s_name_leaves_others_as_much_room_as_there_is() {
    let directory = tempfile::tempdir().unwrap();
    let deploy = token("a");
    let name = "n".repeat(110);
    let tokens = line(&deploy, &format!("{name} rollout *"));
    let (aggregator, _) = start(directory.path(), &tokens, &[]);
    let begin = |actor: &str| {
        let body = json!({ "service": "checkout", "canary_version": "v2", "actor": actor });
        post(&aggregator, "/v1/rollouts", Some(&bearer(&deploy)), &body)
    };
    // What somebody says is looked at before anything is cut off.
    for (actor, says) in [
        ("x".repeat(129), "actor is 129 bytes long"),
        (format!("{}\\", "x".repeat(20)), "actor has the character"),
        (String::new(), "actor is empty"),
    ] {
        let answer = begin(&actor);
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert!(answer.body.contains(says), "{}", answer.body);
    }
    let answer = begin(&"x".repeat(20));
    assert_eq!(answer.status, 201, "{}", answer.body);
    let begun = answer.json();
    assert_eq!(begun["actor"], format!("{name}:{}", "x".repeat(17)));
    let end = format!("/v1/rollouts/{}/end", begun["id"].as_str().unwrap());
    let answer = post(&aggregator, &end, Some(&bearer(&deploy)), &json!({}));
    assert_eq!(answer.status, 200, "{}", answer.body);

    let server = format!("http://{}", aggregator.http);
    let mut command = Command::new(program("coalmine"));
    command
        .env("COALMINE_TOKEN", &deploy)
        .env("USER", r"DOMAIN\user")
        .args("rollout start --service checkout --canary-version v2".split(' '))
        .args(["--server", &server, "--output", "json"]);
    let started = command.output().unwrap();
    assert!(started.status.success(), "{}", text(&started.stderr));
    let view: Value = serde_json::from_slice(&started.stdout).unwrap();
    assert_eq!(view["actor"], format!("{name}:DOMAIN-user"));
}

#[test]
fn the_file_is_read_again_while_running() {
    let directory = tempfile::tempdir().unwrap();
    let [ci, cd] = ["a", "b"].map(token);
    let ci_line = line(&ci, "ci gate *");
    let (aggregator, file) = start(directory.path(), &ci_line, &[]);
    let status = |token: &str| ask(&aggregator, "/v1/rollouts", Some(&bearer(token))).status;
    let becomes = |what: &str, token: &str, wanted: u16| {
        eventually(what, || (status(token) == wanted).then_some(()));
    };
    assert_eq!((status(&ci), status(&cd)), (200, 401));
    // Put in its place at once, as a cluster does with a Secret.
    let next = directory.path().join("next");
    fs::write(&next, format!("{ci_line}{}", line(&cd, "cd gate *"))).unwrap();
    fs::rename(&next, &file).unwrap();
    becomes("the second token is known", &cd, 200);

    fs::write(&file, format!("{ci_line}nonsense\n")).unwrap();
    eventually("the bad line is told", || {
        log(directory.path())
            .contains("tokens:2: a line has")
            .then_some(())
    });
    assert_eq!(
        (status(&ci), status(&cd)),
        (200, 200),
        "a bad file changes nothing"
    );

    let revoked = coalmine(["token", "revoke", "ci", "--file", file.to_str().unwrap()]);
    assert_eq!(revoked.status.code(), Some(64), "it is not repaired by the way");
    fs::write(&file, line(&cd, "cd gate *")).unwrap();
    becomes("the first token is revoked", &ci, 401);
    assert_eq!(status(&cd), 200);
    let revoked = coalmine(["token", "revoke", "cd", "--file", file.to_str().unwrap()]);
    assert!(revoked.status.success());
    becomes("the last one is revoked", &cd, 401);
}

#[test]
fn one_who_asks_too_fast_waits_and_the_others_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let [fast, other] = ["a", "b"].map(token);
    let tokens = line(&fast, "fast gate *") + &line(&other, "other gate *");
    let (aggregator, _) = start(directory.path(), &tokens, &["--rate-limit", "2"]);
    let ask = |token: &str| ask(&aggregator, "/v1/rollouts", Some(&bearer(token)));
    let refused = eventually("it asks too fast", || {
        Some(ask(&fast)).filter(|answer| answer.status == 429)
    });
    is_problem(&refused);
    assert_eq!(header(&refused, "retry-after"), Some("1"));
    assert_eq!(ask(&other).status, 200);
    eventually("it is answered again", || {
        (ask(&fast).status == 200).then_some(())
    });
    let unknown = token("c");
    let refused = eventually("tokens that are not known are limited too", || {
        let burst: Vec<_> = (0..20).map(|_| ask(&unknown)).collect();
        burst.into_iter().find(|answer| answer.status == 429)
    });
    assert!(header(&refused, "retry-after").is_some());
    let metrics = get(aggregator.admin, "/metrics").unwrap().body;
    assert!(
        metrics.contains("coalmine_requests_refused_total{reason=\"rate_limited\"}"),
        "{metrics}"
    );
}

#[test]
fn tokens_may_be_missing_only_where_it_is_said_what_everybody_may_do() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("none");
    let arguments = ["--tokens", file.to_str().unwrap()];
    let mut aggregator = Aggregator::prepare(directory.path()).with_arguments(&arguments);
    aggregator.spawn();
    let status = eventually("it ends", || aggregator.ended());
    assert_eq!(status.code(), Some(64));
    let said = log(directory.path());
    assert!(
        said.contains(file.to_str().unwrap()) && said.contains("coalmine token create"),
        "{said}"
    );

    let mut aggregator = aggregator.with_arguments(&["--anonymous", "gate"]);
    aggregator.launch();
    let start = json!({ "service": "checkout", "canary_version": "v2" });
    assert_eq!(ask(&aggregator, "/v1/rollouts", None).status, 200);
    assert_eq!(post(&aggregator, "/v1/rollouts", None, &start).status, 401);
    let deploy = token("a");
    fs::write(&file, line(&deploy, "deploy rollout *")).unwrap();
    eventually("the tokens are read when they are there", || {
        let answer = post(&aggregator, "/v1/rollouts", Some(&bearer(&deploy)), &start);
        [200, 201].contains(&answer.status).then_some(())
    });
    let answer = ask(&aggregator, "/v1/rollouts", Some(&bearer(&deploy)));
    assert_eq!(answer.status, 403, "a token has its own scopes: {}", answer.body);
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `coalmine` with a token in the environment.
fn coalmine_with(token: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("coalmine"));
    command.env("COALMINE_TOKEN", token).args(arguments);
    command.output().unwrap()
}

#[test]
fn a_token_is_made_presented_and_revoked_by_the_command() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let path = file.to_str().unwrap();
    let create = |name: &str| {
        coalmine([
            "token",
            "create",
            "--name",
            name,
            "--scope",
            "gate",
            "--scope",
            "rollout",
            "--service",
            "check*",
            "--until",
            "2100-01-01T00:00:00Z",
            "--file",
            path,
        ])
    };
    let made = create("ci");
    assert!(made.status.success(), "{}", text(&made.stderr));
    let secret = text(&made.stdout);
    let secret = secret.strip_suffix('\n').unwrap();
    assert!(
        secret.len() == 47 && secret.starts_with("cmt_"),
        "only the token: {secret:?}"
    );
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let kept = fs::read_to_string(&file).unwrap();
    assert!(!kept.contains(secret), "{kept}");
    let again = create("ci");
    assert_eq!(again.status.code(), Some(64));
    assert!(text(&again.stderr).contains("tokens:1: there is a token of that name"));
    assert_eq!(text(&again.stdout), "");
    let listed = coalmine(["token", "list", "--file", path, "--output", "json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let wanted = json!({
        "name": "ci",
        "scopes": ["gate", "rollout"],
        "services": ["check*"],
        "until": "2100-01-01T00:00:00Z",
        "expired": false,
    });
    assert_eq!(listed, wanted);
    // Without a file the line is for whoever keeps it elsewhere.
    let alone = coalmine([
        "token",
        "create",
        "--name",
        "cd",
        "--scope",
        "gate",
        "--service",
        "*",
    ]);
    let (alone_token, said) = (text(&alone.stdout), text(&alone.stderr));
    let hash = Hash::of(alone_token.trim().as_bytes()).to_string();
    assert!(said.contains(&format!("{hash} cd gate *\n")), "{said}");

    let mut aggregator = Aggregator::prepare(directory.path()).with_arguments(&["--tokens", path]);
    aggregator.launch();
    let server = format!("http://{}", aggregator.http);
    let start = [
        "rollout",
        "start",
        "--service",
        "checkout",
        "--canary-version",
        "v2",
        "--server",
        &server,
        "--output",
        "json",
    ];
    let refused = coalmine(start);
    assert_eq!(refused.status.code(), Some(64), "{}", text(&refused.stderr));
    assert!(
        text(&refused.stderr).contains("a token with the scope rollout"),
        "{}",
        text(&refused.stderr)
    );
    let started = coalmine_with(secret, &start);
    assert!(started.status.success(), "{}", text(&started.stderr));
    let view: Value = serde_json::from_slice(&started.stdout).unwrap();
    let rollout = view["id"].as_str().unwrap();

    let token_file = directory.path().join("token");
    fs::write(&token_file, format!("{secret}\n")).unwrap();
    let token_path = token_file.to_str().unwrap();
    let gate = || coalmine(["gate", rollout, "--server", &server, "--token-file", token_path]);
    let asked = gate();
    assert_eq!(asked.status.code(), Some(2), "{}", text(&asked.stderr));
    let revoked = coalmine(["token", "revoke", "ci", "--file", path]);
    assert!(revoked.status.success(), "{}", text(&revoked.stderr));
    eventually("the token is good for nothing", || {
        let asked = gate();
        (asked.status.code() == Some(64) && text(&asked.stderr).contains("not known")).then_some(())
    });
}
