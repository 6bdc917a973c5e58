//! Argo's prometheus provider, read in `metricproviders/prometheus/prometheus.go` and client_golang 1.22.0
//! (`api/prometheus/v1/api.go`).

use std::time::Duration;

use serde_json::Value;

use super::Phase;
use crate::{
    clients::{Poll, Server, Subject, escape, parse},
    http::Answer,
    speaker::now_ms,
};

/// How long a measurement may take, as it is by default.
const WITHIN: Duration = Duration::from_secs(30);

/// What the template that we ship asks for.
pub const QUERY: &str = r#"coalmine_verdict{service="{{args.service}}",version="{{args.version}}"}"#;

/// Its conditions for APPROVE and for ROLLBACK.
pub const CONDITIONS: [&str; 2] = ["result[0] == 1", "result[0] == -1"];

/// Statuses of POST after which the client asks again by GET. In 1.22.0 403 is not among them; later it is.
const ASKED_BY_GET: [u16; 3] = [403, 405, 501];

/// Errors whose body is read. Of all others only the status is known.
const READ_ERRORS: [u16; 2] = [400, 422];

/// The values of an answer, and its warnings.
fn values(answer: &Answer) -> Result<(Vec<f64>, String), String> {
    let is_error = READ_ERRORS.contains(&answer.status);
    if !(200..300).contains(&answer.status) && !is_error {
        return Err(format!("error: {}", answer.status));
    }
    let body = parse(&answer.body)?;
    if body["status"] == "error" {
        return Err(format!("{}: {}", body["errorType"], body["error"]));
    }
    if is_error {
        return Err("inconsistent body for response code".to_owned());
    }
    let result = &body["data"]["result"];
    let samples = match body["data"]["resultType"].as_str() {
        Some("scalar") => vec![result],
        Some("vector") => {
            let series = result.as_array().ok_or("the result is no list")?;
            series.iter().map(|series| &series["value"]).collect()
        }
        other => return Err(format!("unexpected value type {other:?}")),
    };
    let values: Result<_, _> = samples.into_iter().map(value).collect();
    Ok((values?, body["warnings"].to_string()))
}

/// A sample: a time, which is a number, and a value, which is text.
fn value(sample: &Value) -> Result<f64, String> {
    let [Value::Number(_), Value::String(value)] = sample.as_array().map_or(&[][..], Vec::as_slice) else {
        return Err(format!("{sample} is no sample"));
    };
    let number = value.parse::<f64>();
    number.map_err(|error| format!("{value:?}: {error}"))
}

/// One of the conditions.
fn first_is(values: &[f64], wanted: f64) -> Result<bool, String> {
    let first = values
        .first()
        .ok_or("index out of range: 0 (array length is 0)")?;
    Ok((first - wanted).abs() < f64::EPSILON)
}

/// One measurement of `coalmine_verdict`, successful if it is 1 and failed if it is -1.
pub fn measure(server: &Server, subject: &Subject) -> Poll {
    let query = QUERY
        .replace("{{args.service}}", &subject.service)
        .replace("{{args.version}}", &subject.version);
    let (seconds, millis) = (now_ms() / 1_000, now_ms() % 1_000);
    let form = format!("query={}&time={seconds}.{millis:03}", escape(&query));
    let mut headers = server.bearer();
    headers.push(("content-type", "application/x-www-form-urlencoded".to_owned()));
    let mut answer = server.ask(WITHIN, "POST", "/api/v1/query", &headers, &form);
    if answer
        .as_ref()
        .is_ok_and(|answer| ASKED_BY_GET.contains(&answer.status))
    {
        let path = format!("/api/v1/query?{form}");
        answer = server.ask(WITHIN, "GET", &path, &server.bearer(), "");
    }
    match answer.and_then(|answer| values(&answer)) {
        Ok((values, warnings)) => Phase::of(first_is(&values, 1.0), first_is(&values, -1.0)).poll(warnings),
        Err(why) => Poll::failed(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_envelope_with_a_number_is_a_measurement() {
        let vector = |series: &str| {
            format!(
                r#"{{"status":"success","data":{{"resultType":"vector","result":[{series}]}},"warnings":["w"]}}"#
            )
        };
        for (status, body, wanted) in [
            (200, vector(r#"{"metric":{},"value":[1.5,"1"]}"#), "goes"),
            (200, vector(r#"{"metric":{},"value":[1.5,"-1"]}"#), "stops"),
            (200, vector(r#"{"metric":{},"value":[1.5,"0"]}"#), "holds"),
            (200, vector(r#"{"value":[1,"1"]},{"value":[1,"-1"]}"#), "goes"),
            (200, vector(""), "errors"),
            (200, vector(r#"{"metric":{},"value":[1.5,1]}"#), "errors"),
            (
                200,
                r#"{"data":{"resultType":"scalar","result":[1,"1"]}}"#.to_owned(),
                "goes",
            ),
            (200, String::new(), "errors"),
            (400, vector(r#"{"value":[1,"1"]}"#), "errors"),
            (404, vector(r#"{"value":[1,"1"]}"#), "errors"),
            (401, r#"{"status":"error"}"#.to_owned(), "errors"),
        ] {
            let answer = Answer {
                status,
                head: String::new(),
                body: body.clone(),
            };
            let reading = match values(&answer) {
                Ok((values, _)) => {
                    Phase::of(first_is(&values, 1.0), first_is(&values, -1.0))
                        .poll(body)
                        .reading
                }
                Err(why) => Poll::failed(why).reading,
            };
            assert_eq!(reading.word(), wanted, "{status} {}", answer.body);
        }
    }
}
