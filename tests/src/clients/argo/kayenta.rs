//! Argo's kayenta provider, read in `metricproviders/kayenta/kayenta.go`. It can send no header.

use std::time::Duration;

use serde_json::{Value, json};

use super::Phase;
use crate::{
    clients::{Poll, Server, Subject, escape, json_body, parse},
    http::Answer,
};

/// How long a request may take; it is fixed.
const WITHIN: Duration = Duration::from_secs(15);

const PASS: i64 = 95;
const MARGINAL: i64 = 75;

/// The body of an answer, which must be of status 200 and nothing else.
fn whole(answer: Result<Answer, String>) -> Result<Value, String> {
    let answer = answer?;
    if answer.status != 200 {
        return Err(format!("invalid response: {}: {}", answer.status, answer.body));
    }
    parse(&answer.body)
}

/// The id of the config of a service, as the list has it.
fn config(list: &Value, service: &str) -> Result<String, String> {
    for config in list.as_array().ok_or("the configs are no list")? {
        // A field of another type would fail the whole list.
        let texts = ["id", "name", "updatedTimestampIso"].map(|field| config[field].as_str());
        let [Some(id), Some(name), Some(_)] = texts else {
            return Err(format!("{config}: id, name and updatedTimestampIso are texts"));
        };
        let applications = config["applications"].as_array();
        let are_texts = applications.is_some_and(|names| names.iter().all(Value::is_string));
        if !config["updatedTimestamp"].is_i64() || !are_texts {
            return Err(format!("{config}: updatedTimestamp or applications"));
        }
        if name == service {
            return Ok(id.to_owned());
        }
    }
    Err("canary config not found".to_owned())
}

/// Begins a measurement; gives the execution to look at.
pub fn begin(server: &Server, subject: &Subject) -> Result<String, String> {
    let service = escape(&subject.service);
    let path = format!("/kayenta/canaryConfig?application={service}&configurationAccountName=coalmine");
    let list = server.ask(WITHIN, "GET", &server.prefixed(&path), &[], "");
    let config = config(&whole(list)?, &subject.service)?;
    let scope = |version: &str| {
        json!({
            "scope": format!("{}/{}/{version}", subject.namespace, subject.service),
            "location": "",
            "step": 60,
            "start": "2026-11-01T10:00:00Z",
            "end": "2026-11-01T10:05:00Z",
        })
    };
    let body = json!({
        "scopes": { "default": { "controlScope": scope("v1"), "experimentScope": scope(&subject.version) } },
        "thresholds": { "pass": PASS, "marginal": MARGINAL },
    });
    let path = format!(
        "/kayenta/canary/{}?application={service}&metricsAccountName=coalmine&configurationAccountName=coalmine\
         &storageAccountName=coalmine",
        escape(&config)
    );
    let answer = server.ask(
        WITHIN,
        "POST",
        &server.prefixed(&path),
        &[json_body()],
        &body.to_string(),
    );
    match &whole(answer)?["canaryExecutionId"] {
        Value::String(id) if id.is_empty() => Err("invalid canaryExecutionId".to_owned()),
        Value::String(id) => Ok(id.clone()),
        // An id that is missing is asked for as it would be printed.
        Value::Null => Ok("<nil>".to_owned()),
        other => Ok(other.to_string()),
    }
}

fn phase(body: &Value) -> Phase {
    match body["complete"].as_bool() {
        None => return Phase::Error("missing complete status".to_owned()),
        Some(false) => return Phase::Running,
        Some(true) => {}
    }
    match body["result"]["judgeResult"]["score"]["score"].as_f64() {
        None => Phase::Error("missing score".to_owned()),
        Some(score) if score.trunc() >= PASS as f64 => Phase::Successful,
        Some(score) if score.trunc() >= MARGINAL as f64 => Phase::Inconclusive,
        Some(_) => Phase::Failed,
    }
}

/// Looks at an execution.
pub fn poll(server: &Server, execution: &str) -> Poll {
    let path = format!("/kayenta/canary/{}", escape(execution));
    match whole(server.ask(WITHIN, "GET", &server.prefixed(&path), &[], "")) {
        Ok(body) => phase(&body).poll(body.to_string()),
        Err(why) => Poll::failed(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_counts_once_it_is_complete_and_is_cut_to_a_whole_number() {
        let scored = |score: Value| json!({ "complete": true, "result": { "judgeResult": { "score": { "score": score } } } });
        for (body, wanted) in [
            (json!({ "complete": false }), "holds"),
            (scored(json!(100)), "goes"),
            (scored(json!(95)), "goes"),
            (scored(json!(94.9)), "holds"),
            (scored(json!(75)), "holds"),
            (scored(json!(74.9)), "stops"),
            (scored(json!(0)), "stops"),
            (scored(json!("100")), "errors"),
            (json!({ "complete": true }), "errors"),
            (json!({ "complete": "true" }), "errors"),
            (json!({}), "errors"),
        ] {
            assert_eq!(phase(&body).poll(String::new()).reading.word(), wanted, "{body}");
        }
    }

    #[test]
    fn the_config_is_found_by_its_name_in_a_list_of_the_right_types() {
        let entry = |name: &str, updated: Value| json!({ "id": "7", "name": name, "updatedTimestamp": updated, "updatedTimestampIso": "", "applications": [name] });
        let list = json!([entry("cart", json!(0)), entry("checkout", json!(0))]);
        assert_eq!(config(&list, "checkout"), Ok("7".to_owned()));
        assert!(config(&list, "search").is_err());
        assert!(config(&json!([entry("checkout", json!("0"))]), "checkout").is_err());
        assert!(config(&json!({}), "checkout").is_err());
    }
}
