//! The Prometheus face: what promtool, Flagger's metric templates and Argo Rollouts' provider read of a real rollout, and
//! the same requests to a real Prometheus, which must be answered alike.

use std::{fs, net::SocketAddr, process::Command};

use coalmine_judge::chain::Hash;
use coalmine_tests::{
    components::{Aggregator, Scene},
    eventually,
    http::{Answer, get, request},
    tools::tool,
};
use serde_json::{Map, Value, json};

use crate::{monitoring::prometheus, stage};

const FAILING: &str = "stark-bank";

const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");

/// A time with a fraction, so that answers can be compared to the last digit.
const AT: &str = "1700000000.125";

/// Text as it stands in a query string or a form.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

fn form(address: SocketAddr, path: &str, body: &str) -> Answer {
    request(address, "POST", path, &[FORM], body).unwrap()
}

/// The envelope of one expression; GET and the form must answer alike.
fn query(address: SocketAddr, expression: &str) -> (u16, Value) {
    let asked = format!("query={}&time={AT}", encoded(expression));
    let by_query = get(address, &format!("/api/v1/query?{asked}")).unwrap();
    let by_form = form(address, "/api/v1/query", &asked);
    assert_eq!(by_query.status, by_form.status, "{expression}");
    assert!(
        by_query
            .head
            .to_ascii_lowercase()
            .contains("content-type: application/json"),
        "{}",
        by_query.head
    );
    (by_form.status, by_form.json())
}

/// The one series of a gate's metric: its value, its labels and the warnings.
fn gate(address: SocketAddr, expression: &str) -> (String, Value, Value) {
    let (status, answer) = query(address, expression);
    assert_eq!(
        (status, &answer["status"]),
        (200, &json!("success")),
        "{expression}: {answer}"
    );
    assert_eq!(answer["data"]["resultType"], "vector", "{answer}");
    let result = answer["data"]["result"].as_array().unwrap();
    assert_eq!(result.len(), 1, "{expression}: {answer}");
    assert_eq!(result[0]["value"][0], json!(1_700_000_000.125), "{answer}");
    let value = result[0]["value"][1].as_str().unwrap();
    assert!(value.parse::<f64>().unwrap().is_finite(), "{answer}");
    (
        value.to_owned(),
        result[0]["metric"].clone(),
        answer["warnings"].clone(),
    )
}

/// Asks with promtool, which is Prometheus' own client in Go; gives what it prints.
fn promtool(kind: &str, options: &[&str], address: SocketAddr, what: Option<&str>) -> String {
    let mut command = Command::new(tool("promtool", "prometheus"));
    command.args(["query", kind]).args(options);
    command.arg(format!("http://{address}")).args(what);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "promtool query {kind}: {said}{complained}"
    );
    said
}

#[test]
fn promtool_and_deploy_tools_read_the_verdict_as_one_number() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let http = aggregator.http;
    // Flagger asks this before anything else.
    let (status, online) = query(http, "vector(1)");
    assert_eq!(
        (status, &online["data"]["result"][0]["value"][1]),
        (200, &json!("1"))
    );
    let template = "canary_health_score{canary=\"checkout\",namespace=\"shop\"}";
    let (status, nothing) = query(http, template);
    assert_eq!(
        (status, &nothing["errorType"]),
        (404, &json!("not_found")),
        "{nothing}"
    );

    let scene = Scene::start(directory.path(), aggregator.grpc, Some(FAILING));
    let load = scene.load(1_500, 60_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));
    let rollout = aggregator.start_rollout();
    let (value, labels, warnings) = gate(http, "coalmine_verdict");
    assert_eq!(value, "0", "too early to say");
    assert!(warnings[0].as_str().unwrap().starts_with("HOLD ("), "{warnings}");
    assert_eq!(
        labels,
        json!({
            "__name__": "coalmine_verdict", "rollout": rollout, "service": "checkout", "version": "v2",
            "namespace": "shop", "canary": "checkout", "workload": "checkout", "state": "running",
        })
    );

    let told = aggregator.wait_for_verdict(&rollout, &["ROLLBACK", "APPROVE"]);
    assert_eq!(told["verdict"], "ROLLBACK", "{told}");
    for (name, value) in [
        ("coalmine_verdict", "-1"),
        ("coalmine_approved", "0"),
        ("coalmine_rollback", "1"),
    ] {
        assert_eq!(gate(http, name).0, value, "{name}");
    }
    let (score, _, warnings) = gate(http, template);
    assert_eq!(score.parse::<f64>().unwrap(), told["score"].as_f64().unwrap());
    let warning = warnings[0].as_str().unwrap();
    for part in ["ROLLBACK", told["decision_id"].as_str().unwrap(), FAILING] {
        assert!(warning.contains(part), "{part} is missing: {warning}");
    }
    for matchers in [
        format!("rollout=\"{rollout}\""),
        "service=~\"check.*\", version!=\"v1\"".to_owned(),
        "workload='checkout'".to_owned(),
    ] {
        assert_eq!(gate(http, &format!("coalmine_rollback {{ {matchers} }}")).0, "1");
    }
    let (status, missing) = query(http, "coalmine_verdict{canary=\"other\"}");
    assert_eq!(status, 404, "{missing}");
    let why = missing["error"].as_str().unwrap();
    assert!(
        why.contains("canary=\"other\"") && why.contains(&rollout),
        "{why}"
    );
    let (status, tenants) = query(http, &format!("coalmine_tenant_score{{tenant=\"{FAILING}\"}}"));
    assert_eq!(
        (status, tenants["data"]["result"].as_array().unwrap().len()),
        (200, 1),
        "{tenants}"
    );
    let (status, mesh) = query(
        http,
        "sum(rate(istio_requests_total{reporter=\"destination\"}[1m]))",
    );
    assert_eq!((status, &mesh["errorType"]), (422, &json!("execution")), "{mesh}");

    reads_with_promtool(&aggregator, &rollout);
    drop(load);
}

fn reads_with_promtool(aggregator: &Aggregator, rollout: &str) {
    let http = aggregator.http;
    let instant = promtool(
        "instant",
        &[],
        http,
        Some("coalmine_verdict{canary=\"checkout\"}"),
    );
    let lines: Vec<_> = instant.lines().collect();
    assert_eq!(lines.len(), 1, "{instant}");
    assert!(
        lines[0].starts_with("coalmine_verdict{") && lines[0].contains("} => -1 @["),
        "{instant}"
    );
    assert!(promtool("instant", &[], http, Some("1")).contains("scalar: 1"));

    // The decision is of the past by now, so the present value is that of the last steps.
    let shown = promtool("range", &["--step=1s"], http, Some("coalmine_rollback"));
    assert!(shown.contains(rollout) && shown.contains("1 @["), "{shown}");
    let services = promtool("labels", &[], http, Some("service"));
    assert_eq!(services.trim(), "checkout");
    let names = promtool("labels", &[], http, Some("__name__"));
    assert!(names.lines().any(|name| name == "coalmine_approved"), "{names}");
    let listed = promtool("series", &["--match=coalmine_approved"], http, None);
    assert_eq!(listed.lines().count(), 1, "{listed}");
    assert!(listed.contains(rollout), "{listed}");
    let labels = get(http, "/api/v1/labels").unwrap().json();
    assert!(
        labels["data"].as_array().unwrap().contains(&json!("canary")),
        "{labels}"
    );
}

/// A value with what is in it replaced by what it is.
fn shape(value: &Value) -> Value {
    match value {
        Value::Null => json!("null"),
        Value::Bool(_) => json!("bool"),
        Value::Number(_) => json!("number"),
        Value::String(_) => json!("string"),
        Value::Array(items) => items.iter().map(shape).collect(),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(name, value)| (name.clone(), shape(value)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
    }
}

/// One request, to ours and to Prometheus.
struct Both {
    ours: SocketAddr,
    prometheus: SocketAddr,
}

/// How alike two answers must be.
#[derive(Clone, Copy, PartialEq)]
enum Alike {
    /// All of the data, to the last digit, and errors in the same words; ours may go on.
    Exactly,
    /// Status, types of results and errors, types of JSON.
    InShape,
    /// The status.
    InStatus,
}

impl Both {
    fn ask(&self, alike: Alike, method: &str, path: &str, headers: &[(&str, &str)], body: &str) {
        let [ours, theirs] = [self.ours, self.prometheus]
            .map(|address| request(address, method, path, headers, body).unwrap());
        let what = format!(
            "{method} {path} {body}\nours: {}\ntheirs: {}",
            ours.body, theirs.body
        );
        assert_eq!(ours.status, theirs.status, "{what}");
        if alike == Alike::InStatus {
            return;
        }
        let [ours, theirs] = [ours.json(), theirs.json()];
        for field in ["status", "errorType"] {
            assert_eq!(ours[field], theirs[field], "{what}");
        }
        assert_eq!(ours["data"]["resultType"], theirs["data"]["resultType"], "{what}");
        assert_eq!(shape(&ours["data"]), shape(&theirs["data"]), "{what}");
        assert_eq!(ours["error"].is_string(), theirs["error"].is_string(), "{what}");
        if alike == Alike::Exactly {
            assert_eq!(ours["data"], theirs["data"], "{what}");
            let [ours, theirs] = [&ours, &theirs].map(|answer| answer["error"].as_str().unwrap_or_default());
            assert!(ours.starts_with(theirs), "{what}");
        }
    }

    fn get(&self, alike: Alike, path: &str) {
        self.ask(alike, "GET", path, &[], "");
    }

    /// By the query string, and by a form.
    fn either(&self, alike: Alike, path: &str, parameters: &str) {
        self.get(alike, &format!("{path}?{parameters}"));
        self.ask(alike, "POST", path, &[FORM], parameters);
    }
}

#[test]
fn prometheus_answers_the_same_requests_alike() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let (_process, address) = prometheus(directory.path(), &[]);
    eventually("Prometheus is ready", || {
        get(address, "/-/ready")
            .ok()
            .filter(|answer| answer.status == 200)
    });
    let both = Both {
        ours: aggregator.http,
        prometheus: address,
    };
    expressions_are_alike(&both);
    times_are_alike(&both);
    forms_are_alike(&both);

    for (alike, path) in [
        (Alike::Exactly, "/api/v1/labels"),
        (Alike::Exactly, "/api/v1/label/job/values"),
        (Alike::Exactly, "/api/v1/label/a-b/values"),
        (Alike::Exactly, "/api/v1/series"),
        (Alike::Exactly, "/api/v1/series?match[]=up"),
        (Alike::InShape, "/api/v1/series?match[]=up%7B"),
        (Alike::InShape, "/api/v1/labels?match[]=%7B%7D"),
        (Alike::InShape, "/api/v1/status/buildinfo"),
        (Alike::InStatus, "/api/v1/metadata"),
        (Alike::InStatus, "/api/v1/nothing"),
    ] {
        both.get(alike, path);
    }
    for path in ["/api/v1/query", "/api/v1/query_range", "/api/v1/labels"] {
        both.ask(Alike::InStatus, "DELETE", path, &[], "");
    }
    let refused = request(aggregator.http, "DELETE", "/api/v1/query", &[], "").unwrap();
    assert!(
        refused
            .head
            .to_ascii_lowercase()
            .contains("content-type: text/plain"),
        "{}",
        refused.head
    );
}

fn expressions_are_alike(both: &Both) {
    for expression in [
        "vector(1)",
        " vector ( -0 ) # a comment",
        "vector(NaN)",
        "vector(1e21)",
        "vector(1e-7)",
        "1",
        "--1",
        "NaN",
        "+Inf",
        "-inf",
        "0x1F",
        "010",
        "08",
        "1.",
        ".5",
        "0.30000000000000004",
        "no_such_metric",
        "no_such_metric{a=\"b\",c!='d',e=~`f.*`,g!~\"h\",}",
        "{__name__=\"no_such_metric\",a=\"\\x62\\u0062\\142\"}",
    ] {
        both.either(
            Alike::Exactly,
            "/api/v1/query",
            &format!("query={}&time={AT}", encoded(expression)),
        );
    }
    for expression in [
        "",
        " # nothing",
        "up{",
        "up{a=",
        "up{a=\"b",
        "up{,}",
        "up{a=\"b\" c=\"d\"}",
        "up{a=b}",
        "up{a>\"b\"}",
        "up{a=\"\\q\"}",
        "up{a=\"\\400\"}",
        "{}",
        "{a=~\".*\"}",
        "up{__name__=\"x\"}",
        "1_000",
        "vector(1",
        "up\n up",
    ] {
        both.either(
            Alike::Exactly,
            "/api/v1/query",
            &format!("query={}", encoded(expression)),
        );
    }
    // The reasons are in other words.
    for expression in [
        "up{a=~\"(\"}",
        "up{a=~\"a)|(b\"}",
        "1e400",
        "0x",
        "vector()",
        "vector(up)",
        ")",
    ] {
        both.either(
            Alike::InShape,
            "/api/v1/query",
            &format!("query={}", encoded(expression)),
        );
    }
}

fn times_are_alike(both: &Both) {
    for time in [
        "1700000000",
        "1700000000.1239",
        "-1.5",
        "1e3",
        "2023-11-14T22%3A13%3A20Z",
        "2023-11-14T23%3A13%3A20.5%2B01%3A00",
        "",
        "soon",
        "2023-11-14",
    ] {
        let alike = if time.is_empty() {
            Alike::InShape
        } else {
            Alike::Exactly
        };
        both.either(alike, "/api/v1/query", &format!("query=1&time={time}"));
    }
    both.either(Alike::Exactly, "/api/v1/query", "query=1&time=5&timeout=soon");
    both.either(Alike::Exactly, "/api/v1/query", "query=1&time=5&timeout=1m30s");
    for range in [
        "query=1&start=1&end=3&step=1",
        "query=vector(1)&start=1.5&end=3&step=0.5",
        "query=no_such_metric&start=1&end=3&step=1s",
        "query=1&start=1&end=1&step=5m",
        "query=1&start=0&end=11000&step=1",
        "query=1&start=0&end=11001&step=1",
        "query=1&start=3&end=1&step=1",
        "query=1&start=1&end=3&step=0",
        "query=1&start=1&end=3&step=-1",
        "query=1&start=1&end=3&step=often",
        "query=1&start=1&end=3",
        "query=1&start=soon&end=3&step=1",
        "query=1&start=1&step=1",
        "query=1",
        "query=1&start=1&end=3&step=1&timeout=soon",
    ] {
        both.either(Alike::Exactly, "/api/v1/query_range", range);
    }
    both.either(
        Alike::InShape,
        "/api/v1/query_range",
        "query=up%7B&start=1&end=3&step=1",
    );
    both.either(
        Alike::InShape,
        "/api/v1/query_range",
        "query=&start=1&end=3&step=1",
    );
}

fn forms_are_alike(both: &Both) {
    let json = [("content-type", "application/json")];
    both.ask(
        Alike::Exactly,
        "POST",
        "/api/v1/query",
        &json,
        "{\"query\":\"vector(1)\"}",
    );
    both.ask(
        Alike::Exactly,
        "POST",
        "/api/v1/query?query=1&time=5",
        &json,
        "{\"query\":\"2\"}",
    );
    both.ask(Alike::Exactly, "POST", "/api/v1/query?query=1&time=5", &[], "");
    // The form is read first.
    both.ask(
        Alike::Exactly,
        "POST",
        "/api/v1/query?query=1&time=5",
        &[FORM],
        "query=2",
    );
    both.ask(
        Alike::Exactly,
        "POST",
        "/api/v1/query?time=5",
        &[FORM],
        "query=vector%281%29&query=2",
    );
    // A pair that cannot be read is not there.
    both.ask(
        Alike::Exactly,
        "POST",
        "/api/v1/query?time=5",
        &[FORM],
        "query=%zz&query=2",
    );
    let charset = [("content-type", "application/x-www-form-urlencoded; charset=utf-8")];
    both.ask(
        Alike::Exactly,
        "POST",
        "/api/v1/query",
        &charset,
        "query=+2+&time=5",
    );
}

#[test]
fn whoever_may_not_ask_is_told_401_in_the_envelope() {
    let directory = tempfile::tempdir().unwrap();
    let [known, other, unknown] = ["a", "b", "c"].map(|letter| format!("cmt_{}", letter.repeat(43)));
    let file = directory.path().join("tokens");
    let line = |token: &str, rest: &str| format!("{} {rest}\n", Hash::of(token.as_bytes()));
    fs::write(
        &file,
        line(&known, "argo gate checkout") + &line(&other, "starter rollout *"),
    )
    .unwrap();
    let tokens = ["--tokens", file.to_str().unwrap()];
    let mut aggregator = Aggregator::prepare(directory.path()).with_arguments(&tokens);
    aggregator.launch();
    let ask = |token: Option<&String>, query: &str| {
        let authorization = token.map(|token| format!("Bearer {token}"));
        let headers: Vec<_> = authorization
            .iter()
            .map(|value| ("authorization", value.as_str()))
            .collect();
        let path = format!("/api/v1/query?query={}", encoded(query));
        request(aggregator.http, "GET", &path, &headers, "").unwrap()
    };
    assert_eq!(ask(Some(&known), "vector(1)").status, 200);
    assert_eq!(
        ask(Some(&known), "coalmine_verdict{service=\"checkout\"}").status,
        404
    );
    for (who, query) in [
        (None, "vector(1)"),
        (Some(&unknown), "vector(1)"),
        (Some(&other), "vector(1)"),
        (Some(&known), "coalmine_verdict{service=\"payments\"}"),
    ] {
        let refused = ask(who, query);
        assert_eq!(refused.status, 401, "{}", refused.body);
        assert!(
            refused.head.to_ascii_lowercase().contains("www-authenticate:"),
            "{}",
            refused.head
        );
        let envelope = refused.json();
        assert_eq!(envelope["status"], "error", "{envelope}");
        assert_eq!(envelope["errorType"], "client_error", "{envelope}");
        assert!(!envelope["error"].as_str().unwrap().is_empty(), "{envelope}");
    }
    // The token of the path opens as well.
    let answer = get(aggregator.http, &format!("/t/{known}/api/v1/query?query=1")).unwrap();
    assert_eq!(answer.json()["data"]["resultType"], "scalar", "{}", answer.body);
}
