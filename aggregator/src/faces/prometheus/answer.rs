//! The envelope that every answer of Prometheus' API is in, and what numbers and times look like in it.

use std::collections::BTreeMap;

use axum::{
    Json,
    body::{Body, to_bytes},
    extract::Request,
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{
    IntoResponses, PartialSchema as _, ToSchema,
    openapi::{ContentBuilder, RefOr, ResponseBuilder},
};

use super::series::Sample;
use crate::access::Denied;

/// Most points of an answer: one of them takes some hundred bytes while it is written.
const MAX_POINTS: i64 = 200_000;

/// Largest problem document that is put into an envelope.
const MAX_PROBLEM_BYTES: usize = 64 << 10;

/// What was asked for.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = PrometheusAnswer)]
pub(super) struct Answer {
    /// `success`
    status: &'static str,
    /// What was asked for
    data: Value,
    /// Why the verdict is what it is, and whatever else is worth a look
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

impl Answer {
    pub(super) fn of(data: Value) -> Self {
        Self {
            status: "success",
            data,
            warnings: Vec::new(),
        }
    }

    pub(super) fn warn(mut self, warnings: Vec<String>) -> Self {
        self.warnings.extend(warnings);
        self
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        ([(header::CACHE_CONTROL, "no-store")], Json(self)).into_response()
    }
}

/// When an expression is evaluated.
#[derive(Debug, Clone, Copy)]
pub(super) enum When {
    /// Once.
    At(i64),
    /// At each step.
    Over(Span),
}

/// A span of time and its steps, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start_ms: i64,
    pub(super) end_ms: i64,
    /// At least 1.
    pub(super) step_ms: i64,
}

impl Span {
    /// The part of it in which something is known that is known from then on.
    fn known_from(self, from_ms: i64) -> Self {
        let late_ms = from_ms.saturating_sub(self.start_ms).max(0);
        let is_between = late_ms % self.step_ms != 0;
        let skipped = (late_ms / self.step_ms).saturating_add(i64::from(is_between));
        Self {
            start_ms: self.start_ms.saturating_add(skipped.saturating_mul(self.step_ms)),
            ..self
        }
    }

    /// How many steps it has.
    fn count(self) -> i64 {
        let length_ms = self.end_ms.saturating_sub(self.start_ms);
        if length_ms < 0 {
            return 0;
        }
        (length_ms / self.step_ms).saturating_add(1)
    }

    pub(super) fn steps(self) -> impl Iterator<Item = i64> {
        let next = move |at: &i64| at.checked_add(self.step_ms);
        std::iter::successors(Some(self.start_ms), next).take_while(move |at| *at <= self.end_ms)
    }
}

impl When {
    /// A number.
    pub(super) fn scalar(self, value: f64) -> Result<Answer, Failure> {
        match self {
            Self::At(at) => Ok(result("scalar", &point(at, value))),
            Self::Over(_) => self.series(&[Sample::alone(value)]),
        }
    }

    /// Series with a value each.
    pub(super) fn series(self, samples: &[Sample<'_>]) -> Result<Answer, Failure> {
        let points = samples.iter().map(|sample| self.points(sample));
        let points = points.fold(0_i64, i64::saturating_add);
        if points > MAX_POINTS {
            return Err(Failure::of(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!(
                    "the answer would have {points} points of {} series, and at most {MAX_POINTS} are given; ask for a \
                     longer step or a shorter time, or for fewer series by the matchers rollout and tenant or by limit",
                    samples.len()
                ),
            ));
        }
        Ok(match self {
            Self::At(at) => {
                let shown = samples
                    .iter()
                    .map(|sample| json!({ "metric": sample.labels, "value": point(at, sample.value) }));
                result("vector", &shown.collect())
            }
            Self::Over(span) => {
                let shown = samples.iter().filter_map(|sample| over(span, sample));
                result("matrix", &shown.collect())
            }
        })
    }

    /// How many points a series has.
    fn points(self, sample: &Sample<'_>) -> i64 {
        match self {
            Self::At(_) => 1,
            Self::Over(span) => span.known_from(sample.from_ms).count(),
        }
    }
}

/// The steps from which on a value is known; none if there are none.
fn over(span: Span, sample: &Sample<'_>) -> Option<Value> {
    let known = span.known_from(sample.from_ms).steps();
    let values: Vec<_> = known.map(|at| point(at, sample.value)).collect();
    (!values.is_empty()).then(|| json!({ "metric": sample.labels, "values": values }))
}

fn result(kind: &str, result: &Value) -> Answer {
    Answer::of(json!({ "resultType": kind, "result": result }))
}

fn point(at_ms: i64, value: f64) -> Value {
    json!([timestamp(at_ms), number(value)])
}

/// Seconds with three decimals at most, never with an exponent.
fn timestamp(ms: i64) -> Value {
    if ms % 1_000 == 0 {
        json!(ms / 1_000)
    } else {
        json!(ms as f64 / 1e3)
    }
}

/// The shortest text that is the same number again, as Prometheus writes it: with an exponent of two digits or more where
/// the number is very small or very large.
fn number(value: f64) -> String {
    if value.is_finite() && value != 0.0 && !(1e-6..1e21).contains(&value.abs()) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    if value.is_infinite() {
        let sign = if value > 0.0 { '+' } else { '-' };
        format!("{sign}Inf")
    } else {
        value.to_string()
    }
}

/// Why there is no answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Failure {
    #[serde(skip)]
    code: StatusCode,
    /// `error`
    status: &'static str,
    /// `bad_data`, `client_error`, `execution`, `not_found`, `unavailable` or `internal`
    #[serde(rename = "errorType")]
    kind: &'static str,
    /// What was wrong and what to do
    error: String,
}

/// When something fails, for those who read the documentation: `openapi.rs` leaves to each route what it can answer.
const FAILURES: [(&str, &str); 7] = [
    (
        "400",
        "A parameter or the expression is malformed, or more than is read here",
    ),
    ("401", "No token, an unknown one, or one that may not ask this"),
    ("404", "No rollout matches"),
    ("408", "The form did not come whole within 10 s"),
    ("413", "The form is too large"),
    (
        "422",
        "The expression can only be answered by a service mesh, or the answer is too large",
    ),
    (
        "429",
        "The caller asks too often; Retry-After says when to ask again",
    ),
];

impl Failure {
    /// A failure with the type that Prometheus, or its client in Go, has for this status. That client looks at the body
    /// of 400 and 422 only. It makes `client_error` of a 401 itself, and after a 403 it asks once more with GET, so the
    /// latter does not occur.
    pub(super) fn of(code: StatusCode, error: impl Into<String>) -> Self {
        let kind = match code {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "client_error",
            StatusCode::NOT_FOUND => "not_found",
            StatusCode::UNPROCESSABLE_ENTITY => "execution",
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => "unavailable",
            _ if code.is_server_error() => "internal",
            _ => "bad_data",
        };
        Self {
            code: match code {
                StatusCode::FORBIDDEN => StatusCode::UNAUTHORIZED,
                _ => code,
            },
            status: "error",
            kind,
            error: error.into(),
        }
    }

    pub(super) fn bad_data(error: impl Into<String>) -> Self {
        Self::of(StatusCode::BAD_REQUEST, error)
    }

    pub(super) fn of_parameter(name: &str, why: &str) -> Self {
        Self::bad_data(format!("invalid parameter {name:?}: {why}"))
    }

    #[cfg(test)]
    pub(super) fn error(&self) -> &str {
        &self.error
    }
}

impl From<Denied> for Failure {
    fn from(denied: Denied) -> Self {
        Self::of(StatusCode::UNAUTHORIZED, denied.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.code, [(header::CACHE_CONTROL, "no-store")], Json(self)).into_response()
    }
}

impl IntoResponses for Failure {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let described = |description: &str| {
            let content = ContentBuilder::new().schema(Some(Self::schema())).build();
            ResponseBuilder::new()
                .description(description)
                .content("application/json", content)
                .build()
        };
        let all = FAILURES.into_iter();
        all.map(|(code, description)| (code.to_owned(), RefOr::T(described(description))))
            .collect()
    }
}

/// What an envelope takes from a problem document.
#[derive(Debug, Default, Deserialize)]
struct Problem {
    detail: String,
}

/// Puts the problem documents of whatever stands before this face into its envelope, with their other headers. A method
/// that a route does not have is answered with a plain text, as Prometheus does.
pub(in crate::faces) async fn as_envelope(request: Request, next: Next) -> Response {
    // A token may stand before the path.
    let is_ours = request.uri().path().contains("/api/v1/");
    let response = next.run(request).await;
    let content_type = response.headers().get(header::CONTENT_TYPE);
    let is_problem = content_type.is_some_and(|value| value == "application/problem+json");
    if !is_ours || !(is_problem || response.status() == StatusCode::METHOD_NOT_ALLOWED) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let mut answer = if parts.status == StatusCode::METHOD_NOT_ALLOWED {
        let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
        (parts.status, headers, Body::from("Method Not Allowed\n")).into_response()
    } else {
        let document = to_bytes(body, MAX_PROBLEM_BYTES).await.unwrap_or_default();
        let problem: Problem = serde_json::from_slice(&document).unwrap_or_default();
        Failure::of(parts.status, problem.detail).into_response()
    };
    for (name, value) in &parts.headers {
        if *name != header::CONTENT_LENGTH && !answer.headers().contains_key(name) {
            answer.headers_mut().insert(name.clone(), value.clone());
        }
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_go_writes_them() {
        for (value, text) in [
            (1.0, "1"),
            (0.1 + 0.2, "0.30000000000000004"),
            (-0.0, "-0"),
            (1e20, "100000000000000000000"),
            (1e21, "1e+21"),
            (-1.5e300, "-1.5e+300"),
            (0.000_001, "0.000001"),
            (1e-7, "1e-07"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "+Inf"),
            (f64::NEG_INFINITY, "-Inf"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn times_are_numbers_with_three_decimals_at_most() {
        for (ms, text) in [
            (0, "0"),
            (1_700_000_000_000, "1700000000"),
            (1_700_000_000_123, "1700000000.123"),
            (1_700_000_000_100, "1700000000.1"),
            (-1_500, "-1.5"),
            (1, "0.001"),
            (253_402_300_799_999, "253402300799.999"),
        ] {
            assert_eq!(timestamp(ms).to_string(), text);
        }
    }

    #[test]
    fn a_scalar_is_a_series_over_time() {
        let text = |answer: Result<Answer, Failure>| serde_json::to_value(answer.unwrap()).unwrap();
        assert_eq!(
            text(When::At(1_500).scalar(1.0)),
            json!({ "status": "success", "data": { "resultType": "scalar", "result": [1.5, "1"] } })
        );
        let span = Span {
            start_ms: 0,
            end_ms: 2_500,
            step_ms: 1_000,
        };
        let values = json!([[0, "1"], [1, "1"], [2, "1"]]);
        assert_eq!(
            text(When::Over(span).scalar(1.0))["data"],
            json!({ "resultType": "matrix", "result": [{ "metric": {}, "values": values }] })
        );
    }

    #[test]
    fn nothing_is_shown_of_the_time_before_a_value_is_known() {
        let span = Span {
            start_ms: 0,
            end_ms: 10_000,
            step_ms: 5_000,
        };
        let sample = |from_ms| Sample {
            from_ms,
            ..Sample::alone(0.0)
        };
        assert_eq!(
            over(span, &sample(1)).unwrap()["values"],
            json!([[5, "0"], [10, "0"]])
        );
        assert_eq!(over(span, &sample(10_001)), None);
        assert_eq!(over(span, &sample(i64::MAX)), None);
        for (from_ms, count) in [
            (i64::MIN, 3),
            (0, 3),
            (1, 2),
            (5_000, 2),
            (5_001, 1),
            (10_000, 1),
            (i64::MAX, 0),
        ] {
            let known = span.known_from(from_ms);
            assert_eq!(known.count(), count, "{from_ms}");
            assert_eq!(i64::try_from(known.steps().count()), Ok(count), "{from_ms}");
        }
    }

    #[test]
    fn an_answer_has_so_many_points_and_no_more() {
        let when = When::Over(Span {
            start_ms: 0,
            end_ms: 11_000_000,
            step_ms: 1_000,
        });
        let series = |count: usize, from_ms: i64| {
            let sample = Sample {
                from_ms,
                ..Sample::alone(0.0)
            };
            when.series(&vec![sample; count])
        };
        // 11,001 points of each; only what is known counts.
        for (count, from_ms) in [(18, 0), (36, 5_500_000), (100_000, 10_999_500)] {
            series(count, from_ms).unwrap();
        }
        for (count, from_ms) in [(19, 0), (100_001, 10_999_000), (200_001, 10_999_500)] {
            let refused = series(count, from_ms).unwrap_err();
            assert_eq!(refused.code, StatusCode::UNPROCESSABLE_ENTITY);
            assert_eq!(refused.kind, "execution");
            assert!(
                refused.error().contains("longer step"),
                "{count}: {}",
                refused.error()
            );
        }
    }

    #[test]
    fn a_caller_that_may_not_is_never_told_403() {
        let forbidden = Failure::from(Denied::Forbidden("no".to_owned())).into_response();
        assert_eq!(forbidden.status(), StatusCode::UNAUTHORIZED);
        let body = serde_json::to_value(Failure::of(StatusCode::FORBIDDEN, "no")).unwrap();
        assert_eq!(
            body,
            json!({ "status": "error", "errorType": "client_error", "error": "no" })
        );
    }
}
