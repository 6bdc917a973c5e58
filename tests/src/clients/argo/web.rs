//! Argo's web provider with the template that we ship, read in `metricproviders/webmetric/webmetric.go`.

use std::time::Duration;

use serde_json::Value;

use super::Phase;
use crate::{
    clients::{Poll, Server, Subject, escape},
    http::Answer,
};

/// How long a measurement may take, as it is by default.
const WITHIN: Duration = Duration::from_secs(10);

/// What the template asks for, at the aggregator's address.
pub const PATH: &str = "/v1/gate?service={{args.service}}&version={{args.version}}";

/// Its conditions for APPROVE and for ROLLBACK.
pub const CONDITIONS: [&str; 2] = [
    r#"result.verdict == "APPROVE" && result.state != "ended""#,
    r#"result.verdict == "ROLLBACK" && result.state != "ended""#,
];

/// One of the conditions. A field that is not there is nil; what has no fields has no answer.
fn says(result: &Value, verdict: &str) -> Result<bool, String> {
    let fields = result.as_object();
    let fields = fields.ok_or_else(|| format!("cannot fetch verdict from {result}"))?;
    let is = |field: &str, text: &str| fields.get(field).and_then(Value::as_str) == Some(text);
    Ok(is("verdict", verdict) && !is("state", "ended"))
}

/// What an answer is.
fn phase(answer: &Answer) -> Phase {
    if !(200..300).contains(&answer.status) {
        return Phase::Error(format!("received non 2xx response code: {}", answer.status));
    }
    match serde_json::from_str::<Value>(&answer.body) {
        // The first match of the JSONPath `{$}` is the whole.
        Ok(result) => Phase::of(says(&result, "APPROVE"), says(&result, "ROLLBACK")),
        // Until 1.9.1, whatever the conditions are: a page of a proxy approves.
        Err(_) => Phase::Successful,
    }
}

/// One measurement.
pub fn measure(server: &Server, subject: &Subject) -> Poll {
    let path = PATH
        .replace("{{args.service}}", &escape(&subject.service))
        .replace("{{args.version}}", &escape(&subject.version));
    match server.ask(WITHIN, "GET", &path, &server.bearer(), "") {
        // The body of what is not 2xx is lost.
        Ok(answer) if !(200..300).contains(&answer.status) => phase(&answer).poll(String::new()),
        Ok(answer) => phase(&answer).poll(answer.body),
        Err(why) => Poll::failed(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_json_is_a_success_and_what_is_no_verdict_is_none() {
        for (status, body, wanted) in [
            (200, r#"{"verdict":"APPROVE"}"#, "goes"),
            (200, r#"{"verdict":"APPROVE","state":"running"}"#, "goes"),
            (200, r#"{"verdict":"APPROVE","state":"ended"}"#, "holds"),
            (200, r#"{"verdict":"ROLLBACK"}"#, "stops"),
            (200, r#"{"verdict":"ROLLBACK","state":"ended"}"#, "holds"),
            (200, r#"{"verdict":"HOLD"}"#, "holds"),
            (200, r#"{"verdict":"approve"}"#, "holds"),
            (200, "{}", "holds"),
            (200, "[]", "errors"),
            (200, "null", "errors"),
            (200, "", "goes"),
            (204, "", "goes"),
            (202, "<html>", "goes"),
            (301, r#"{"verdict":"APPROVE"}"#, "errors"),
            (404, r#"{"verdict":"APPROVE"}"#, "errors"),
            (503, "", "errors"),
        ] {
            let answer = Answer {
                status,
                head: String::new(),
                body: body.to_owned(),
            };
            let poll = phase(&answer).poll(String::new());
            assert_eq!(poll.reading.word(), wanted, "{status} {body}");
        }
    }
}
