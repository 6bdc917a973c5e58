//! Spinnaker's Orca: how it runs a canary analysis with a Kayenta. It can send no header.
//!
//! Read in `orca-kayenta/src/main/kotlin`: `KayentaService.kt` (what an answer must have, and of which type),
//! `pipeline/RunCanaryIntervalsStage.kt` (what is asked for),
//! `tasks/{RunKayentaCanaryTask,MonitorKayentaCanaryTask,AggregateCanaryResultsTask}.kt`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Poll, Reading, Server, Subject, escape, json_body, parse};
use crate::http::Answer;

/// How long a request may take.
const WITHIN: Duration = Duration::from_secs(10);

/// The score from which on an analysis passes, in the pipeline that we ship.
pub const PASS: i64 = 95;

/// The score up to which an interval ends it.
pub const MARGINAL: i64 = 75;

/// The accounts that a stage names; Coalmine has none.
const ACCOUNTS: [&str; 3] = [
    "metricsAccountName",
    "configurationAccountName",
    "storageAccountName",
];

/// Names of a status that Orca knows; any other is an exception.
const STATUSES: [&str; 12] = [
    "NOT_STARTED",
    "RUNNING",
    "PAUSED",
    "SUSPENDED",
    "SUCCEEDED",
    "FAILED_CONTINUE",
    "TERMINAL",
    "CANCELED",
    "REDIRECT",
    "STOPPED",
    "SKIPPED",
    "BUFFERED",
];

/// Those that end the stage.
const HALTS: [&str; 3] = ["TERMINAL", "CANCELED", "STOPPED"];

/// Which of the intervals of an analysis is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interval {
    /// Another one follows.
    Early,
    /// Its score is the whole analysis'.
    Last,
}

/// The body of an answer that is a success.
fn whole(answer: Result<Answer, String>) -> Result<Value, String> {
    let answer = answer?;
    if !(200..300).contains(&answer.status) {
        return Err(format!("status {}: {}", answer.status, answer.body));
    }
    parse(&answer.body)
}

/// Begins an analysis; gives the execution to look at.
pub fn begin(server: &Server, subject: &Subject) -> Result<String, String> {
    let scope = |version: &str| format!("{}/{}/{version}", subject.namespace, subject.service);
    let scopes = json!([{
        "scopeName": "default",
        "controlScope": scope("v1"),
        "experimentScope": scope(&subject.version),
    }]);
    let mut config = json!({
        "canaryConfigId": subject.service,
        "scopes": scopes,
        "scoreThresholds": { "pass": PASS, "marginal": MARGINAL },
    });
    for account in ACCOUNTS {
        config[account] = json!("coalmine");
    }
    run(server, &subject.service, &config)
}

/// The scopes of a request, by their names: those of a stage's `canaryConfig`, each with the times of the interval.
fn scopes(config: &Value) -> Map<String, Value> {
    let named = |scope: &Value| {
        let side = |side: &str| {
            json!({
                "scope": scope[format!("{side}Scope")],
                "location": scope[format!("{side}Location")],
                "start": "2026-11-01T10:00:00Z",
                "end": "2026-11-01T10:05:00Z",
                "step": scope["step"].as_u64().unwrap_or(60),
                "extendedScopeParams": scope["extendedScopeParams"].as_object().cloned().unwrap_or_default(),
            })
        };
        let name = scope["scopeName"].as_str().unwrap_or("default");
        let sides = json!({ "controlScope": side("control"), "experimentScope": side("experiment") });
        (name.to_owned(), sides)
    };
    config["scopes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(named)
        .collect()
}

/// Begins an interval of the stage that has this `canaryConfig`; gives the execution to look at.
pub fn run(server: &Server, application: &str, config: &Value) -> Result<String, String> {
    let body = json!({
        "scopes": scopes(config),
        "thresholds": config["scoreThresholds"],
        "siteLocal": config["siteLocal"].as_object().cloned().unwrap_or_default(),
    });
    let id = config["canaryConfigId"]
        .as_str()
        .ok_or("Invalid canaryConfigId")?;
    let account = |name: &str| {
        let account = config[name].as_str()?;
        Some(format!("&{name}={}", escape(account)))
    };
    let accounts: String = ACCOUNTS.into_iter().filter_map(account).collect();
    let path = format!(
        "/kayenta/canary/{}?application={}&parentPipelineExecutionId=01JDPIPELINE{accounts}",
        escape(id),
        escape(application)
    );
    let answer = server.ask(
        WITHIN,
        "POST",
        &server.prefixed(&path),
        &[json_body()],
        &body.to_string(),
    );
    let body = whole(answer)?;
    let fields = body.as_object().ok_or("the answer is no map")?;
    if let Some((field, value)) = fields.iter().find(|(_, value)| !value.is_string()) {
        return Err(format!("{field} is {value}, and every value is text"));
    }
    let id = fields.get("canaryExecutionId").and_then(Value::as_str);
    id.map(str::to_owned)
        .ok_or_else(|| format!("no canaryExecutionId in {body}"))
}

/// What a field must be.
type Is = fn(&Value) -> bool;

fn is_instant(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|time| time.contains('T') && time.ends_with('Z'))
}

fn is_duration(value: &Value) -> bool {
    value.as_str().is_some_and(|duration| duration.starts_with('P'))
}

/// Checks fields that must be there. A path has a dot between names.
fn must(body: &Value, fields: &[(&str, Is)]) -> Result<(), String> {
    for (path, is) in fields {
        let value = path.split('.').fold(body, |value, name| &value[name]);
        if !is(value) {
            return Err(format!("{path} is {value} in {body}"));
        }
    }
    Ok(())
}

/// Checks fields that may be missing.
fn may(body: &Value, fields: &[(&str, Is)]) -> Result<(), String> {
    let there: Vec<_> = fields
        .iter()
        .filter(|(name, _)| !body[*name].is_null())
        .copied()
        .collect();
    must(body, &there)
}

/// Whether an answer can be read at all: what a Kotlin class has without a question mark is there.
fn check(body: &Value) -> Result<(), String> {
    must(
        body,
        &[
            ("complete", Value::is_boolean),
            ("status", Value::is_string),
            ("application", Value::is_string),
        ],
    )?;
    may(
        body,
        &[
            ("buildTimeIso", is_instant),
            ("startTimeIso", is_instant),
            ("endTimeIso", is_instant),
            ("storageAccountName", Value::is_string),
            ("exception", Value::is_object),
        ],
    )?;
    check_result(&body["result"])?;
    check_request(&body["canaryExecutionRequest"])
}

fn check_result(result: &Value) -> Result<(), String> {
    if result.is_null() {
        return Ok(());
    }
    must(
        result,
        &[
            ("judgeResult.score.score", Value::is_i64),
            ("judgeResult.score.classification", Value::is_string),
            ("judgeResult.score.classificationReason", Value::is_string),
            ("judgeResult.results", Value::is_array),
            ("canaryDuration", is_duration),
        ],
    )?;
    let results = result["judgeResult"]["results"].as_array();
    results
        .into_iter()
        .flatten()
        .try_for_each(|result| must(result, &[("controlMetadata.stats.count", Value::is_i64)]))
}

fn check_request(request: &Value) -> Result<(), String> {
    if request.is_null() {
        return Ok(());
    }
    must(
        request,
        &[
            ("thresholds.pass", Value::is_i64),
            ("thresholds.marginal", Value::is_i64),
        ],
    )?;
    let times: [(&str, Is); 4] = [
        ("controlScope.start", is_instant),
        ("controlScope.end", is_instant),
        ("experimentScope.start", is_instant),
        ("experimentScope.end", is_instant),
    ];
    let scopes = request["scopes"].as_object();
    scopes
        .into_iter()
        .flatten()
        .try_for_each(|(_, scope)| must(scope, &times))
}

/// What Orca does because of an answer. It looks at the status, and never at `complete`.
fn reading(body: &Value, interval: Interval) -> Reading {
    if let Err(why) = check(body) {
        return Reading::Errors(why);
    }
    let status = body["status"].as_str().unwrap_or_default().to_uppercase();
    if !STATUSES.contains(&status.as_str()) {
        return Reading::Errors(format!("no status is named {status}"));
    }
    if HALTS.contains(&status.as_str()) {
        return Reading::Stops;
    }
    if status != "SUCCEEDED" {
        return Reading::Holds;
    }
    match body["result"]["judgeResult"]["score"]["score"].as_i64() {
        None => Reading::Errors("it has succeeded without a result".to_owned()),
        Some(score) if score <= MARGINAL => Reading::Stops,
        Some(score) if score < PASS && interval == Interval::Last => Reading::Stops,
        Some(_) => Reading::Goes,
    }
}

/// Looks at an execution.
pub fn poll(server: &Server, execution: &str, interval: Interval) -> Poll {
    let path = format!(
        "/kayenta/canary/{}?storageAccountName=coalmine",
        escape(execution)
    );
    match whole(server.ask(WITHIN, "GET", &server.prefixed(&path), &[], "")) {
        Ok(body) => Poll {
            reading: reading(&body, interval),
            came: body.to_string(),
        },
        Err(why) => Poll::failed(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(score: i64) -> Value {
        let score = json!({ "score": score, "classification": "Pass", "classificationReason": "" });
        json!({
            "complete": true,
            "status": "succeeded",
            "application": "checkout",
            "result": {
                "judgeResult": { "score": score, "results": [{ "controlMetadata": { "stats": { "count": 60 } } }] },
                "canaryDuration": "PT5M",
            },
        })
    }

    #[test]
    fn the_status_decides_and_then_the_score_and_marginal_itself_is_a_failure() {
        for (score, early, last) in [
            (100, "goes", "goes"),
            (95, "goes", "goes"),
            (94, "goes", "stops"),
            (76, "goes", "stops"),
            (75, "stops", "stops"),
            (0, "stops", "stops"),
        ] {
            let body = scored(score);
            let readings = [Interval::Early, Interval::Last].map(|interval| reading(&body, interval).word());
            assert_eq!(readings, [early, last], "{score}");
        }
        let mut body = scored(0);
        for (status, wanted) in [
            ("running", "holds"),
            ("Running", "holds"),
            ("failed_continue", "holds"),
            ("terminal", "stops"),
            ("canceled", "stops"),
            ("done", "errors"),
        ] {
            body["status"] = json!(status);
            assert_eq!(reading(&body, Interval::Last).word(), wanted, "{status}");
        }
    }

    #[test]
    fn what_a_class_needs_must_be_there_and_of_its_type() {
        let broken: [(&str, Value); 12] = [
            ("/complete", json!("true")),
            ("/status", json!(null)),
            ("/application", json!(null)),
            ("/result/judgeResult/score/score", json!(99.5)),
            ("/result/judgeResult/score/classificationReason", json!(null)),
            ("/result/judgeResult/results", json!(null)),
            (
                "/result/judgeResult/results/0/controlMetadata/stats/count",
                json!(null),
            ),
            ("/result/canaryDuration", json!(300)),
            ("/exception", json!("no reason provided")),
            ("/startTimeIso", json!(1_700_000_000)),
            (
                "/canaryExecutionRequest",
                json!({ "thresholds": { "pass": 95.5, "marginal": 75 } }),
            ),
            ("/result", json!({})),
        ];
        assert_eq!(reading(&scored(100), Interval::Last), Reading::Goes);
        for (path, value) in broken {
            let mut body = scored(100);
            // Fields that may be missing are not there yet.
            if body.pointer(path).is_none() {
                body[&path[1..]] = json!(null);
            }
            *body.pointer_mut(path).unwrap() = value;
            assert_eq!(reading(&body, Interval::Last).word(), "errors", "{path}");
        }
        let mut body = scored(100);
        body["result"] = json!(null);
        assert_eq!(reading(&body, Interval::Last).word(), "errors");
    }
}
