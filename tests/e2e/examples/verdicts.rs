//! How the conditions in the examples read real answers: each verdict means to the tool what it says.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_tests::{
    clients::{
        Reading, Server,
        orca::{self, Interval},
    },
    http::{Answer, request},
};
use serde_json::{Value, json};

use super::{Stand, TOKEN, at, calls::path_of, document, number, read, text};

/// What is decided in the judge's place, and what each tool has to make of it, in this order.
const VERDICTS: [(&str, Reading); 3] = [
    ("approve", Reading::Goes),
    ("hold", Reading::Holds),
    ("rollback", Reading::Stops),
];

/// The value of the left side of a comparison, such as `result.verdict` or `result[0]`.
fn value_of<'r>(name: &str, result: &'r Value) -> &'r Value {
    let path = name.strip_prefix("result").unwrap();
    let pointer = path.replace(['.', '['], "/").replace(']', "");
    at(result, &pointer)
}

/// Whether a condition holds: comparisons with a literal, joined by `&&`.
fn holds(condition: &str, result: &Value) -> bool {
    condition.split("&&").all(|comparison| {
        let words: Vec<_> = comparison.split_whitespace().collect();
        let [left, operator, right] = words[..] else {
            panic!("{comparison:?} is no comparison")
        };
        let left = value_of(left, result);
        let right: Value = serde_json::from_str(right).unwrap();
        let equal = match (left.as_f64(), right.as_f64()) {
            (Some(left), Some(right)) => left.total_cmp(&right).is_eq(),
            _ => *left == right,
        };
        match operator {
            "==" => equal,
            "!=" => !equal,
            _ => panic!("{operator} is no comparison"),
        }
    })
}

#[test]
fn conditions_are_read_as_they_are_written() {
    let result = json!({ "verdict": "APPROVE", "state": "running" });
    let list = json!([1.0, 0.5]);
    for (condition, result, expected) in [
        (r#"result.verdict == "APPROVE""#, &result, true),
        (r#"result.verdict == "HOLD""#, &result, false),
        (
            r#"result.verdict == "APPROVE" && result.state != "ended""#,
            &result,
            true,
        ),
        (
            r#"result.verdict == "APPROVE" && result.state == "ended""#,
            &result,
            false,
        ),
        ("result[0] == 1", &list, true),
        ("result[0] == -1", &list, false),
    ] {
        assert_eq!(holds(condition, result), expected, "{condition}");
    }
}

/// What Argo makes of an answer: both conditions false is inconclusive.
fn argo(metric: &Value, result: &Value) -> Reading {
    let [succeeds, fails] =
        ["/successCondition", "/failureCondition"].map(|name| holds(text(metric, name), result));
    assert!(!(succeeds && fails), "{result}");
    match (succeeds, fails) {
        (true, _) => Reading::Goes,
        (_, true) => Reading::Stops,
        _ => Reading::Holds,
    }
}

impl Stand {
    /// What stands in for the arguments of a template.
    fn filled(&self, template: &str) -> String {
        let names = [
            ("{{args.service}}", "checkout"),
            ("{{args.version}}", "v2"),
            ("{{args.workload}}", "checkout"),
            ("{{args.stable-hash}}", "5c9d8b7f6d"),
            // No agent is there that would say which version the pods of a hash have.
            ("{{args.canary-hash}}", "v2"),
            ("{{args.token}}", self.token.as_str()),
        ];
        let filled = names.iter().fold(template.to_owned(), |text, (name, value)| {
            text.replace(name, value)
        });
        assert!(!filled.contains("{{"), "{filled}");
        filled
    }

    fn ask(&self, method: &str, path: &str, authorization: &str, body: &str) -> Answer {
        let headers = [
            ("authorization", authorization),
            ("content-type", "application/json"),
        ];
        let answer = request(self.aggregator.http, method, path, &headers, body).unwrap();
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.body);
        answer
    }

    /// What the web provider reads.
    fn by_web(&self, metric: &Value) -> Reading {
        let web = at(metric, "/provider/web");
        let url = self.filled(text(web, "/url"));
        let query = url.split_once('?').unwrap().1;
        let path = format!("{}?{query}", path_of(&url).unwrap());
        let answer = self.ask(text(web, "/method"), &path, &self.header(web), "");
        // A measurement's value is kept in the AnalysisRun.
        assert!(answer.body.len() <= 2_048, "{}", answer.body);
        argo(metric, &answer.json())
    }

    /// The header that a provider sends.
    fn header(&self, provider: &Value) -> String {
        assert_eq!(text(provider, "/headers/0/key"), "Authorization");
        self.filled(text(provider, "/headers/0/value"))
    }

    /// The numbers that a query is answered with.
    fn query(&self, query: &str, authorization: &str) -> Vec<f64> {
        let path = format!("/api/v1/query?query={}", escaped(query));
        let answer = self.ask("GET", &path, authorization, "").json();
        let values = super::list(&answer, "/data/result").iter();
        values.map(|one| text(one, "/value/1").parse().unwrap()).collect()
    }

    /// What the prometheus provider reads.
    fn by_prometheus(&self, metric: &Value) -> Reading {
        let provider = at(metric, "/provider/prometheus");
        let query = self.filled(text(provider, "/query"));
        let values = self.query(&query, &self.header(provider));
        assert_eq!(values.len(), 1, "{query}");
        argo(metric, &json!(values))
    }

    /// What Flagger reads: the last series has to be in the range.
    fn by_flagger(&self, template: &Value, canary: &Value) -> Reading {
        let metric = at(canary, "/spec/analysis/metrics/0");
        let mut query = text(template, "/spec/query").to_owned();
        for (name, value) in at(metric, "/templateVariables").as_object().unwrap() {
            let variable = format!("{{{{ variables.{name} }}}}");
            query = query.replace(&variable, value.as_str().unwrap());
        }
        assert!(!query.contains("{{"), "{query}");
        let values = self.query(query.trim(), &format!("Bearer {}", self.token));
        let least = at(metric, "/thresholdRange/min").as_f64().unwrap();
        let value = values.last().unwrap();
        if *value < least {
            Reading::Stops
        } else {
            Reading::Goes
        }
    }

    /// What the kayenta provider reads of a canary that it begins as Argo does.
    fn by_kayenta(&self, metric: &Value) -> Reading {
        let kayenta = at(metric, "/provider/kayenta");
        let base = path_of(text(kayenta, "/address")).unwrap();
        let scope = |name: &str| {
            let scope = at(kayenta, &format!("/scopes/0/{name}"));
            json!({
                "scope": self.filled(text(scope, "/scope")),
                "location": text(scope, "/region"),
                "step": number(scope, "/step"),
                "start": "2026-11-28T10:00:00Z",
                "end": "2026-11-28T10:00:30Z",
            })
        };
        let name = text(kayenta, "/scopes/0/name");
        let scopes =
            json!({ "controlScope": scope("controlScope"), "experimentScope": scope("experimentScope") });
        let thresholds = at(kayenta, "/threshold");
        let body = json!({ "scopes": { name: scopes }, "thresholds": thresholds });

        // As Go does with the password of a URL.
        let basic = format!("Basic {}", STANDARD.encode(format!("argo:{}", self.token)));
        let configs = format!("{base}/canaryConfig?application=checkout");
        let configs = self.ask("GET", &configs, &basic, "").json();
        let wanted = self.filled(text(kayenta, "/canaryConfigName"));
        let mut configs = configs.as_array().unwrap().iter();
        let config = configs.find(|config| config["name"] == wanted.as_str()).unwrap();
        let begin = format!("{base}/canary/{}?application=checkout", text(config, "/id"));
        let begun = self.ask("POST", &begin, &basic, &body.to_string()).json();
        let poll = format!("{base}/canary/{}", text(&begun, "/canaryExecutionId"));
        let answer = self.ask("GET", &poll, &basic, "").json();
        if answer["complete"] == false {
            return Reading::Holds;
        }
        let score = number(&answer, "/result/judgeResult/score/score");
        let [pass, marginal] = ["/pass", "/marginal"].map(|name| number(thresholds, name));
        if score >= pass {
            Reading::Goes
        } else if score >= marginal {
            Reading::Holds
        } else {
            Reading::Stops
        }
    }
}

/// Escapes a query for a URL.
fn escaped(query: &str) -> String {
    let escape = |byte: u8| {
        if byte.is_ascii_alphanumeric() || byte == b'_' {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    query.bytes().map(escape).collect()
}

#[test]
fn each_verdict_is_read_as_what_it_is() {
    let stand = Stand::start();
    let canary = json!({ "kind": "Canary", "namespace": "shop", "name": "checkout" });
    let rollout = stand.begin("verdicts", Some(canary));
    let metric = |file: &str| document(file)["spec"]["metrics"][0].clone();
    let web = metric("argo/analysis-web.yaml");
    let prometheus = metric("argo/analysis-prometheus.yaml");
    let kayenta = metric("argo/analysis-kayenta.yaml");
    let template = document("flagger/metrictemplate.yaml");
    let flagger = document("flagger/canary.yaml");
    for (verdict, reading) in VERDICTS {
        stand.decide(&rollout, verdict);
        assert_eq!(stand.by_web(&web), reading, "{verdict}");
        assert_eq!(stand.by_prometheus(&prometheus), reading, "{verdict}");
        assert_eq!(stand.by_kayenta(&kayenta), reading, "{verdict}");
        // A metric of Flagger can only fail or not: a HOLD must not.
        let of_flagger = if reading == Reading::Stops {
            Reading::Stops
        } else {
            Reading::Goes
        };
        assert_eq!(stand.by_flagger(&template, &flagger), of_flagger, "{verdict}");
    }
    // What it has ended with says nothing of the next one.
    stand.end(&rollout);
    assert_eq!(stand.by_web(&web), Reading::Holds);
    assert_eq!(stand.by_prometheus(&prometheus), Reading::Holds);
    assert_eq!(stand.by_flagger(&template, &flagger), Reading::Goes);
}

#[test]
fn the_stage_of_spinnaker_ends_as_the_verdict_says() {
    let stand = Stand::start();
    let pipeline = read("spinnaker/pipeline.json").replace("${parameters.version}", "v2");
    let pipeline: Value = serde_json::from_str(&pipeline).unwrap();
    let config = at(&pipeline, "/stages/0/canaryConfig");
    let base = document("spinnaker/orca-local.yml");
    let base = text(&base, "/kayenta/base-url");
    assert!(base.ends_with(&format!("/t/{TOKEN}/kayenta")), "{base}");
    let server = Server {
        http: stand.aggregator.http,
        token: Some(stand.token.clone()),
        patience: Duration::from_secs(30),
    };
    let execution = orca::run(&server, text(&pipeline, "/application"), config).unwrap();
    let gate = stand.get("/v1/gate?service=checkout&version=v2");
    let rollout = text(&gate, "/rollout");
    // It is compared with all of the baseline.
    let view = stand.get(&format!("/v1/rollouts/{rollout}"));
    assert!(view["baseline_version"].is_null(), "{view}");
    // There is one interval, which is the last one.
    let lifetime = text(config, "/lifetimeDuration");
    assert_eq!(
        (lifetime, number(config, "/canaryAnalysisIntervalMins")),
        ("PT1M", 1)
    );
    for (verdict, reading) in VERDICTS {
        stand.decide(rollout, verdict);
        let poll = orca::poll(&server, &execution, Interval::Last);
        assert_eq!(poll.reading, reading, "{verdict}: {}", poll.came);
    }
}
