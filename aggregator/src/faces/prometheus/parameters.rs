//! What is asked: parameters from the query string and from a form alike, as Prometheus reads them, and what times and
//! durations mean.

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    http::{Method, header},
};
use utoipa::{IntoParams, ToSchema};

use super::answer::{Failure, Span, When};
use crate::clock;

const FORM: &str = "application/x-www-form-urlencoded";

/// Furthest time from 1970: the end of the year 9999.
const MAX_TIME_MS: f64 = 253_402_300_799_999.0;

/// Longest duration: what Go's holds.
const MAX_DURATION_MS: i64 = i64::MAX / 1_000_000;

/// Most steps of a range.
const MAX_STEPS: i64 = 11_000;

/// Most selectors of one request.
const MAX_SELECTORS: usize = 16;

/// Parameters by name, in order: those of a form before those of the query string.
#[derive(Debug, Default)]
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Adds what a query string or a form has. A pair that is not well-formed is left out, as Go does.
    fn add(&mut self, encoded: &[u8]) {
        let pairs = encoded.split(|byte| *byte == b'&').filter_map(|pair| {
            if pair.is_empty() || pair.contains(&b';') {
                return None;
            }
            let mut halves = pair.splitn(2, |byte| *byte == b'=');
            let name = decoded(halves.next()?)?;
            Some((name, decoded(halves.next().unwrap_or_default())?))
        });
        self.0.extend(pairs);
    }

    fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        let named = self.0.iter().filter(move |(found, _)| found == name);
        named.map(|(_, value)| value.as_str())
    }

    /// The first value; none where it is empty.
    fn get(&self, name: &str) -> Option<String> {
        self.all(name)
            .next()
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
    }

    fn text(&self, name: &str) -> String {
        self.get(name).unwrap_or_default()
    }
}

/// Undoes the encoding of a form. What is no UTF-8 then is refused as an expression anyway.
fn decoded(encoded: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.iter().copied();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            _ => byte,
        });
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

impl<S: Send + Sync> FromRequest<S> for Parameters {
    type Rejection = Failure;

    /// A body that is no form is not looked at: then there is no expression in it.
    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let query = request.uri().query().unwrap_or_default().to_owned();
        let content_type = request.headers().get(header::CONTENT_TYPE);
        let is_form = content_type
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .is_some_and(|value| value.trim().eq_ignore_ascii_case(FORM));
        let mut parameters = Self::default();
        if request.method() == Method::POST && is_form {
            let body = Bytes::from_request(request, state).await;
            let body = body.map_err(|error| Failure::of(error.status(), error.body_text()))?;
            parameters.add(&body);
        }
        parameters.add(query.as_bytes());
        Ok(parameters)
    }
}

/// An expression at one time.
#[derive(Debug, IntoParams, ToSchema)]
#[into_params(parameter_in = Query)]
#[schema(as = PrometheusQuery)]
pub(super) struct InstantQuery {
    /// One selector such as `coalmine_approved{service="checkout"}`, `vector(N)`, or a number
    pub(super) query: String,
    /// RFC 3339 or seconds since 1970; now, if it is not given. What is shown is always the present.
    time: Option<String>,
    /// A duration; answers never take long, so it changes nothing
    timeout: Option<String>,
    /// Most series of the answer; 0 is all
    limit: Option<String>,
}

impl From<Parameters> for InstantQuery {
    fn from(asked: Parameters) -> Self {
        Self {
            query: asked.text("query"),
            time: asked.get("time"),
            timeout: asked.get("timeout"),
            limit: asked.get("limit"),
        }
    }
}

impl InstantQuery {
    pub(super) fn when(&self) -> Result<When, Failure> {
        let at_ms = match &self.time {
            Some(text) => {
                // Its own words, in which the parameter is named twice.
                let time = time(text).map_err(|why| format!("Invalid time value for 'time': {why}"));
                checked("time", time)?
            }
            None => i64::try_from(clock::now_ms()).unwrap_or(i64::MAX),
        };
        check_timeout(self.timeout.as_deref())?;
        Ok(When::At(at_ms))
    }

    pub(super) fn limit(&self) -> Result<usize, Failure> {
        limit(self.limit.as_deref())
    }
}

/// An expression at each step of a time.
#[derive(Debug, IntoParams, ToSchema)]
#[into_params(parameter_in = Query)]
#[schema(as = PrometheusRange)]
pub(super) struct RangeQuery {
    /// As of an instant query
    pub(super) query: String,
    /// RFC 3339 or seconds since 1970. Nothing is known of the time before the present decision.
    start: String,
    /// The same; not before `start`
    end: String,
    /// A duration such as `15s`, or seconds; at most 11,000 to the range
    step: String,
    /// A duration; answers never take long, so it changes nothing
    timeout: Option<String>,
    /// Most series of the answer; 0 is all
    limit: Option<String>,
}

impl From<Parameters> for RangeQuery {
    fn from(asked: Parameters) -> Self {
        Self {
            query: asked.text("query"),
            start: asked.text("start"),
            end: asked.text("end"),
            step: asked.text("step"),
            timeout: asked.get("timeout"),
            limit: asked.get("limit"),
        }
    }
}

impl RangeQuery {
    pub(super) fn when(&self) -> Result<When, Failure> {
        let start_ms = checked("start", time(&self.start))?;
        let end_ms = checked("end", time(&self.end))?;
        if end_ms < start_ms {
            return Err(Failure::of_parameter(
                "end",
                "end timestamp must not be before start time",
            ));
        }
        let step_ms = checked("step", duration(&self.step))?;
        if step_ms <= 0 {
            return Err(Failure::of_parameter(
                "step",
                "zero or negative query resolution step widths are not accepted. Try a positive integer",
            ));
        }
        if end_ms.saturating_sub(start_ms) / step_ms > MAX_STEPS {
            return Err(Failure::bad_data(
                "exceeded maximum resolution of 11,000 points per timeseries. Try decreasing the query resolution \
                 (?step=XX)",
            ));
        }
        check_timeout(self.timeout.as_deref())?;
        Ok(When::Over(Span {
            start_ms,
            end_ms,
            step_ms,
        }))
    }

    pub(super) fn limit(&self) -> Result<usize, Failure> {
        limit(self.limit.as_deref())
    }
}

/// Which series are listed.
#[derive(Debug, IntoParams, ToSchema)]
#[into_params(parameter_in = Query)]
#[schema(as = PrometheusSelectors)]
pub(super) struct Listing {
    /// Selectors of the series that are meant
    #[param(rename = "match[]")]
    #[schema(rename = "match[]")]
    selectors: Option<Vec<String>>,
    /// Most entries of the answer; 0 is all
    limit: Option<String>,
}

impl From<Parameters> for Listing {
    fn from(asked: Parameters) -> Self {
        let selectors: Vec<_> = asked.all("match[]").map(str::to_owned).collect();
        Self {
            selectors: (!selectors.is_empty()).then_some(selectors),
            limit: asked.get("limit"),
        }
    }
}

impl Listing {
    /// The selectors, if there are any.
    pub(super) fn selectors(&self) -> Result<&[String], Failure> {
        let selectors = self.selectors.as_deref().unwrap_or_default();
        if selectors.len() > MAX_SELECTORS {
            let what = format!(
                "{} selectors are given, and at most {MAX_SELECTORS} are read",
                selectors.len()
            );
            return Err(Failure::of_parameter("match[]", &what));
        }
        Ok(selectors)
    }

    pub(super) fn limit(&self) -> Result<usize, Failure> {
        limit(self.limit.as_deref())
    }
}

/// Which metrics are described.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Described {
    /// The only metric; all, if it is not given
    pub(super) metric: Option<String>,
    /// Most metrics of the answer; 0 is all
    limit: Option<String>,
}

impl From<Parameters> for Described {
    fn from(asked: Parameters) -> Self {
        Self {
            metric: asked.get("metric"),
            limit: asked.get("limit"),
        }
    }
}

impl Described {
    pub(super) fn limit(&self) -> Result<usize, Failure> {
        limit(self.limit.as_deref())
    }
}

fn checked(name: &str, value: Result<i64, String>) -> Result<i64, Failure> {
    value.map_err(|why| Failure::of_parameter(name, &why))
}

fn check_timeout(text: Option<&str>) -> Result<(), Failure> {
    text.map_or(Ok(()), |text| checked("timeout", duration(text)).map(|_| ()))
}

fn limit(text: Option<&str>) -> Result<usize, Failure> {
    let Some(text) = text else {
        return Ok(usize::MAX);
    };
    match text.parse() {
        Ok(0) => Ok(usize::MAX),
        Ok(limit) => Ok(limit),
        Err(_) => Err(Failure::of_parameter(
            "limit",
            &format!("cannot parse {text:?} to a number that is not negative"),
        )),
    }
}

/// A time in milliseconds since 1970.
fn time(text: &str) -> Result<i64, String> {
    let found = match text.parse::<f64>() {
        Ok(seconds) => whole(seconds * 1e3, MAX_TIME_MS),
        Err(_) => text
            .parse()
            .ok()
            .map(|time: jiff::Timestamp| time.as_millisecond()),
    };
    found.ok_or_else(|| format!("cannot parse {text:?} to a valid timestamp"))
}

/// A duration in milliseconds: seconds, or numbers with units such as `1h30m`.
fn duration(text: &str) -> Result<i64, String> {
    let found = match text.parse::<f64>() {
        Ok(seconds) => whole((seconds * 1e3).trunc(), MAX_DURATION_MS as f64),
        Err(_) => with_units(text).filter(|ms| *ms <= MAX_DURATION_MS),
    };
    found.ok_or_else(|| format!("cannot parse {text:?} to a valid duration"))
}

/// The nearest whole number, unless it is further from 0 than `most`, or none.
fn whole(value: f64, most: f64) -> Option<i64> {
    (value.abs() <= most).then_some(value.round() as i64)
}

fn with_units(text: &str) -> Option<i64> {
    const SECOND: i64 = 1_000;
    const DAY: i64 = 24 * 60 * 60 * SECOND;
    // From the longest to the shortest, each at most once.
    let mut units = [
        ("y", 365 * DAY),
        ("w", 7 * DAY),
        ("d", DAY),
        ("h", 60 * 60 * SECOND),
        ("m", 60 * SECOND),
        ("s", SECOND),
        ("ms", 1),
    ]
    .into_iter();
    let (mut rest, mut total) = (text, 0_i64);
    loop {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(|byte| !byte.is_ascii_digit()).count();
        let (unit, tail) = tail.split_at(letters);
        let (_, length) = units.find(|(name, _)| *name == unit)?;
        let part = number.parse::<i64>().ok()?.checked_mul(length)?;
        total = total.checked_add(part)?;
        if tail.is_empty() {
            return Some(total);
        }
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(form: &str, query: &str) -> Parameters {
        let mut parameters = Parameters::default();
        parameters.add(form.as_bytes());
        parameters.add(query.as_bytes());
        parameters
    }

    #[test]
    fn the_form_comes_before_the_query_string_and_bad_pairs_are_left_out() {
        let parameters = asked(
            "query=a%2Bb+c&empty=",
            "query=other&time=1&bad=%zz&bad=%4&semi;colon=1&match[]=x&match%5B%5D=y",
        );
        assert_eq!(parameters.text("query"), "a+b c");
        assert_eq!(parameters.get("time").as_deref(), Some("1"));
        for absent in ["empty", "bad", "semi;colon", "none"] {
            assert_eq!(parameters.get(absent), None, "{absent}");
        }
        assert_eq!(Listing::from(parameters).selectors.unwrap(), ["x", "y"]);
        assert_eq!(asked("", "query=%FF").text("query"), "\u{FFFD}");
    }

    #[test]
    fn times_are_read_as_prometheus_reads_them() {
        for (text, ms) in [
            ("0", 0),
            ("1700000000", 1_700_000_000_000),
            ("1700000000.123", 1_700_000_000_123),
            ("1700000000.1239", 1_700_000_000_124),
            ("-1.5", -1_500),
            ("1e3", 1_000_000),
            ("2023-11-14T22:13:20Z", 1_700_000_000_000),
            ("2023-11-14T23:13:20.5+01:00", 1_700_000_000_500),
        ] {
            assert_eq!(time(text), Ok(ms), "{text}");
        }
        for text in [
            "",
            "soon",
            "NaN",
            "inf",
            "1e300",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "1,5",
        ] {
            assert_eq!(
                time(text),
                Err(format!("cannot parse {text:?} to a valid timestamp")),
                "{text}"
            );
        }
    }

    #[test]
    fn durations_are_read_as_prometheus_reads_them() {
        for (text, ms) in [
            ("15", 15_000),
            ("0.5", 500),
            ("-1", -1_000),
            ("0", 0),
            ("0.0009", 0),
            ("15s", 15_000),
            ("1h30m", 5_400_000),
            ("1y1w1d1h1m1s1ms", 32_230_861_001),
            ("100ms", 100),
        ] {
            assert_eq!(duration(text), Ok(ms), "{text}");
        }
        for text in [
            "",
            "s",
            "1x",
            "1s1m",
            "1s1s",
            "1 s",
            "-1s",
            "1.5h",
            "NaN",
            "9999999999999y",
            "300y",
            "é1s",
        ] {
            assert_eq!(
                duration(text),
                Err(format!("cannot parse {text:?} to a valid duration")),
                "{text}"
            );
        }
    }

    /// What Prometheus 2.42 answers to the same requests.
    #[test]
    fn ranges_are_refused_in_the_words_of_prometheus() {
        let refused = |query: &str| {
            let range = RangeQuery::from(asked("", query));
            range.when().unwrap_err().error().to_owned()
        };
        assert_eq!(
            refused("start=10&end=5&step=1"),
            "invalid parameter \"end\": end timestamp must not be before start time"
        );
        for step in ["0", "-1", "0s", "0.0001"] {
            assert_eq!(
                refused(&format!("start=1&end=5&step={step}")),
                "invalid parameter \"step\": zero or negative query resolution step widths are not accepted. Try a \
                 positive integer"
            );
        }
        assert_eq!(
            refused("start=0&end=11001&step=1"),
            "exceeded maximum resolution of 11,000 points per timeseries. Try decreasing the query resolution (?step=XX)"
        );
        assert_eq!(
            refused("end=5&step=1"),
            "invalid parameter \"start\": cannot parse \"\" to a valid timestamp"
        );
        assert_eq!(
            refused("start=1&end=5&step=1&timeout=x"),
            "invalid parameter \"timeout\": cannot parse \"x\" to a valid duration"
        );
        let most = RangeQuery::from(asked("", "start=0&end=11000&step=1s&timeout=5m"));
        let When::Over(span) = most.when().unwrap() else {
            panic!("a range has a span")
        };
        assert_eq!(span.steps().count(), 11_001);
    }

    #[test]
    fn a_limit_is_a_number_and_0_is_none() {
        for (text, most) in [(None, usize::MAX), (Some("0"), usize::MAX), (Some("5"), 5)] {
            assert_eq!(limit(text).unwrap(), most, "{text:?}");
        }
        for text in ["-1", "x", "1.5"] {
            limit(Some(text)).unwrap_err();
        }
    }
}
