//! Flagger 1.44.0: its webhooks and its Prometheus provider.
//!
//! Read in `pkg/controller/{webhook,scheduler_hooks,scheduler,scheduler_metrics}.go`, `pkg/metrics/providers/prometheus.go`
//! and, for what is asked again, go-retryablehttp 0.7.8.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Poll, Reading, Server, Subject, escape, json_body, parse};
use crate::http::Answer;

/// How long an attempt of a hook may take, as it is by default.
const HOOK_WITHIN: Duration = Duration::from_secs(10);

/// How long a query may take; it is fixed.
const QUERY_WITHIN: Duration = Duration::from_secs(5);

/// Attempts of a hook with `retries: 2`.
const ATTEMPTS: u32 = 3;

/// What the MetricTemplate that we ship asks for, whatever blanks are around it.
pub const QUERY: &str = r#"coalmine_verdict{service="{{ variables.service }}"}"#;

/// The least value that is no failed check: HOLD must not be one.
pub const LEAST: f64 = 0.0;

/// What a hook is for, and so what its passing and its failing do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// `rollout`: a failure is a failed check.
    Rollout,
    /// `confirm-traffic-increase`: a failure leaves the weight as it is, for as long as it fails.
    TrafficIncrease,
    /// `confirm-promotion`: a failure waits, for as long as it fails.
    Promotion,
    /// `rollback`: passing goes back at once, and whatever else comes does nothing.
    Rollback,
}

impl Hook {
    fn reads(self, outcome: Result<(), String>) -> Reading {
        match (self, outcome) {
            (Self::Rollback, Ok(())) => Reading::Stops,
            (_, Ok(())) | (Self::Rollback, Err(_)) => Reading::Goes,
            (Self::Rollout, Err(why)) => Reading::Errors(why),
            (Self::TrafficIncrease | Self::Promotion, Err(_)) => Reading::Holds,
        }
    }
}

/// Whether the request is sent again. If it is in vain the body is dropped, so nobody is shown it.
fn is_asked_again(status: u16) -> bool {
    status == 429 || (status >= 500 && status != 501)
}

/// Whether a hook has passed, by its last answer; why not, as Flagger has it then.
fn outcome(answer: &Result<Answer, String>) -> Result<(), String> {
    let in_vain = format!("giving up after {ATTEMPTS} attempt(s)");
    match answer {
        Err(why) => Err(format!("{in_vain}: {why}")),
        Ok(answer) if is_asked_again(answer.status) => Err(in_vain),
        Ok(answer) if answer.status > 202 => Err(answer.body.clone()),
        Ok(_) => Ok(()),
    }
}

/// Calls a hook at a path, while a Canary is in progress.
pub fn call(server: &Server, subject: &Subject, path: &str, hook: Hook) -> Poll {
    let mut metadata = json!({ "service": subject.service, "version": subject.version });
    if let Some(token) = &server.token {
        metadata["token"] = json!(token);
    }
    let payload = json!({
        "name": subject.service,
        "namespace": subject.namespace,
        "phase": "Progressing",
        "checksum": "5d8b8f6c9d",
        "metadata": metadata,
    });
    let payload = payload.to_string();
    let attempt = || server.ask(HOOK_WITHIN, "POST", path, &[json_body()], &payload);
    let mut answer = attempt();
    for _ in 1..ATTEMPTS {
        if answer.as_ref().is_ok_and(|answer| !is_asked_again(answer.status)) {
            break;
        }
        answer = attempt();
    }
    let kept = answer
        .as_ref()
        .ok()
        .filter(|answer| !is_asked_again(answer.status));
    let came = kept.map_or_else(String::new, |answer| answer.body.clone());
    Poll {
        reading: hook.reads(outcome(&answer)),
        came,
    }
}

/// The value that an answer to a query has for Flagger.
fn value(answer: &Answer) -> Result<f64, String> {
    if answer.status >= 400 {
        return Err(format!(
            "error response: status {}: {}",
            answer.status, answer.body
        ));
    }
    let body = parse(&answer.body)?;
    let mut value = None;
    for series in body["data"]["result"].as_array().into_iter().flatten() {
        if !series["values"].is_null() {
            return Err("multiple values returned".to_owned());
        }
        let sample = series["value"].as_array().and_then(|sample| sample.get(1));
        // Flagger takes the second part of a sample without a look at how many there are.
        let sample = sample.ok_or("a sample without a value: it panics")?;
        if let Value::String(sample) = sample {
            // Of several series the last one counts.
            let number = sample.parse::<f64>();
            value = Some(number.map_err(|error| format!("{sample:?}: {error}"))?);
        }
    }
    value
        .filter(|value| !value.is_nan())
        .ok_or_else(|| "no values found".to_owned())
}

fn query(server: &Server, query: &str) -> Result<(f64, String), String> {
    let words: Vec<_> = query.split_whitespace().collect();
    let path = format!("/api/v1/query?query={}", escape(&words.join(" ")));
    let answer = server.ask(QUERY_WITHIN, "GET", &path, &server.bearer(), "")?;
    Ok((value(&answer)?, answer.body))
}

/// A metric with our MetricTemplate, the service in `templateVariables`, and `thresholdRange: { min: 0 }`: less is a
/// failed check.
pub fn metric(server: &Server, subject: &Subject) -> Poll {
    let asked = QUERY.replace("{{ variables.service }}", &subject.service);
    // The first is what Flagger asks to see whether anybody is there, before an analysis.
    let online = query(server, "vector(1)").and_then(|(value, _)| {
        let is_online = (value - 1.0).abs() < f64::EPSILON;
        is_online
            .then_some(())
            .ok_or_else(|| format!("value is not 1 for query: vector(1), but {value}"))
    });
    match online.and_then(|()| query(server, &asked)) {
        Ok((value, came)) if value < LEAST => Poll {
            reading: Reading::Errors(format!("{value} is below {LEAST}")),
            came,
        },
        Ok((_, came)) => Poll {
            reading: Reading::Goes,
            came,
        },
        Err(why) => Poll::failed(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer {
            status,
            head: String::new(),
            body: body.to_owned(),
        }
    }

    #[test]
    fn a_hook_passes_up_to_202_and_its_reason_is_lost_with_what_is_asked_again() {
        let says = |status| outcome(&Ok(answer(status, "why")));
        for status in [200, 201, 202] {
            assert_eq!(says(status), Ok(()), "{status}");
        }
        for status in [203, 204, 304, 400, 401, 403, 404, 409, 501] {
            assert_eq!(says(status), Err("why".to_owned()), "{status}");
        }
        for status in [429, 500, 502, 503] {
            assert!(
                says(status).is_err_and(|said| said.starts_with("giving up")),
                "{status}"
            );
        }
        assert!(outcome(&Err("refused".to_owned())).is_err_and(|said| said.ends_with(": refused")));
    }

    #[test]
    fn what_an_outcome_does_depends_on_the_hook() {
        let cases = [
            (Hook::Rollout, "goes", "errors"),
            (Hook::TrafficIncrease, "goes", "holds"),
            (Hook::Promotion, "goes", "holds"),
            (Hook::Rollback, "stops", "goes"),
        ];
        for (hook, passed, failed) in cases {
            assert_eq!(hook.reads(Ok(())).word(), passed, "{hook:?}");
            assert_eq!(hook.reads(Err(String::new())).word(), failed, "{hook:?}");
        }
    }

    #[test]
    fn the_last_series_counts_and_there_must_be_a_number() {
        let of = |series: &str| {
            let body =
                format!(r#"{{"status":"success","data":{{"resultType":"vector","result":[{series}]}}}}"#);
            value(&answer(200, &body))
        };
        assert_eq!(of(r#"{"value":[1,"0"]},{"value":[1,"1"]}"#), Ok(1.0));
        assert_eq!(of(r#"{"value":[1,"1"]},{"value":[1,2]}"#), Ok(1.0));
        for (series, says) in [
            ("", "no values"),
            (r#"{"value":[1,"NaN"]}"#, "no values"),
            (r#"{"value":[1,"1"]},{"value":[1,"NaN"]}"#, "no values"),
            (r#"{"value":[1]}"#, "panics"),
            (r#"{"values":[[1,"1"]]}"#, "multiple"),
            (r#"{"value":[1,"many"]}"#, "invalid float"),
        ] {
            assert!(of(series).is_err_and(|said| said.contains(says)), "{series}");
        }
        assert!(value(&answer(404, "who?")).is_err_and(|said| said.ends_with("who?")));
        assert!(value(&answer(200, "fine")).is_err());
    }
}
