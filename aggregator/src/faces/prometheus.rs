//! The verdict in the shape of Prometheus' HTTP API, for tools that read a metric: Flagger's metric templates, the
//! `prometheus` provider of Argo Rollouts, Grafana.
//!
//! ```text
//! /api/v1/query, query_range   one selector, vector(N), or a number (expression.rs)
//! /api/v1/labels, label/{name}/values, series, metadata, status/buildinfo
//! ```
//!
//! Nothing is stored here and nothing is computed: an answer is the present verdict, at whatever time it is asked for.
//! The reason is in `warnings`, which Argo Rollouts keeps with its measurement. Statuses, types of errors and texts are
//! those of Prometheus 2.42, but for one: a gate's metric without a rollout is 404, since no series would be taken for
//! no problem.

mod answer;
mod expression;
mod parameters;
mod series;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{
    extract::{Path, State, rejection::PathRejection},
    http::StatusCode,
};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) use self::answer::as_envelope;
use self::{
    answer::{Answer, Failure, When},
    expression::{Expression, Refusal, Selector, parse, parse_selector},
    parameters::{Described, InstantQuery, Listing, Parameters, RangeQuery},
    series::{GATES, Reading, Sample, TENANT_SCORE, TENANT_SCORE_HELP, is_known, listed, select},
};
use super::Faces;
use crate::{
    access::{Caller, Scope},
    rollouts::{Question, State as RolloutState, View},
};

/// What to do about an expression that is refused.
const SUPPORTED: &str = "this server answers one selector such as coalmine_approved{service=\"checkout\"}, vector(N), \
                         or a number, and computes nothing: see docs/gates.md";

/// What to do about Flagger's built-in metrics.
const OF_A_MESH: &str = "request-success-rate and request-duration are computed from a service mesh's metrics and \
                         cannot be asked here: let --metrics-server name the Prometheus that has them, and ask here \
                         through a MetricTemplate, with a thresholdRange of min 0, for \
                         coalmine_verdict{service=\"{{ variables.service }}\"}, with the service in the metric's \
                         templateVariables: see docs/gates.md";

/// What Prometheus says where a limit was reached.
const TRUNCATED: &str = "results truncated due to limit";

/// Most open rollouts in an error.
const MAX_NAMED: usize = 5;

/// The face's routes.
pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default()
        .routes(routes!(query, query_form))
        .routes(routes!(query_range, query_range_form))
        .routes(routes!(labels, labels_form))
        .routes(routes!(label_values))
        .routes(routes!(series, series_form))
        .routes(routes!(metadata))
        .routes(routes!(build_info))
}

/// Reads a verdict as a metric.
#[utoipa::path(
    get, path = "/api/v1/query", tag = "prometheus", params(InstantQuery),
    responses((status = 200, description = "A vector or a scalar", body = Answer), Failure)
)]
async fn query(caller: Caller, State(faces): State<Faces>, asked: Parameters) -> Result<Answer, Failure> {
    instant(&faces, &caller, &asked.into())
}

/// Reads a verdict as a metric, asked by a form.
#[utoipa::path(
    post, path = "/api/v1/query", tag = "prometheus",
    request_body(content = InstantQuery, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "A vector or a scalar", body = Answer), Failure)
)]
async fn query_form(
    caller: Caller,
    State(faces): State<Faces>,
    asked: Parameters,
) -> Result<Answer, Failure> {
    instant(&faces, &caller, &asked.into())
}

/// Reads a verdict as a metric over time.
#[utoipa::path(
    get, path = "/api/v1/query_range", tag = "prometheus",
    params(RangeQuery), responses((status = 200, description = "A matrix", body = Answer), Failure)
)]
async fn query_range(
    caller: Caller,
    State(faces): State<Faces>,
    asked: Parameters,
) -> Result<Answer, Failure> {
    range(&faces, &caller, &asked.into())
}

/// Reads a verdict as a metric over time, asked by a form.
#[utoipa::path(
    post, path = "/api/v1/query_range", tag = "prometheus",
    request_body(content = RangeQuery, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "A matrix", body = Answer), Failure)
)]
async fn query_range_form(
    caller: Caller,
    State(faces): State<Faces>,
    asked: Parameters,
) -> Result<Answer, Failure> {
    range(&faces, &caller, &asked.into())
}

/// The names of labels.
#[utoipa::path(
    get, path = "/api/v1/labels", tag = "prometheus", params(Listing),
    responses((status = 200, description = "Names, in order", body = Answer), Failure)
)]
async fn labels(caller: Caller, State(faces): State<Faces>, asked: Parameters) -> Result<Answer, Failure> {
    label_names(&faces, &caller, &asked.into())
}

/// The names of labels, asked by a form.
#[utoipa::path(
    post, path = "/api/v1/labels", tag = "prometheus",
    request_body(content = Listing, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "Names, in order", body = Answer), Failure)
)]
async fn labels_form(
    caller: Caller,
    State(faces): State<Faces>,
    asked: Parameters,
) -> Result<Answer, Failure> {
    label_names(&faces, &caller, &asked.into())
}

/// The values of a label.
#[utoipa::path(
    get, path = "/api/v1/label/{name}/values", tag = "prometheus",
    params(("name" = String, Path, description = "The label"), Listing),
    responses((status = 200, description = "Values, in order", body = Answer), Failure)
)]
async fn label_values(
    caller: Caller,
    State(faces): State<Faces>,
    name: Result<Path<String>, PathRejection>,
    asked: Parameters,
) -> Result<Answer, Failure> {
    let Path(name) = name.map_err(|error| Failure::of(error.status(), error.body_text()))?;
    if !is_label(&name) {
        return Err(Failure::bad_data(format!("invalid label name: {name:?}")));
    }
    let asked = Listing::from(asked);
    let found = found(&faces, &caller, &asked)?;
    let values: BTreeSet<_> = found.iter().filter_map(|labels| labels.get(&name)).collect();
    list(values, &asked)
}

/// The series that selectors mean.
#[utoipa::path(
    get, path = "/api/v1/series", tag = "prometheus", params(Listing),
    responses((status = 200, description = "The labels of each", body = Answer), Failure)
)]
async fn series(caller: Caller, State(faces): State<Faces>, asked: Parameters) -> Result<Answer, Failure> {
    series_of(&faces, &caller, &asked.into())
}

/// The series that selectors mean, asked by a form.
#[utoipa::path(
    post, path = "/api/v1/series", tag = "prometheus",
    request_body(content = Listing, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "The labels of each", body = Answer), Failure)
)]
async fn series_form(
    caller: Caller,
    State(faces): State<Faces>,
    asked: Parameters,
) -> Result<Answer, Failure> {
    series_of(&faces, &caller, &asked.into())
}

/// What the metrics say.
#[utoipa::path(
    get, path = "/api/v1/metadata", tag = "prometheus", params(Described),
    responses((status = 200, description = "Type and text of each metric", body = Answer), Failure)
)]
async fn metadata(caller: Caller, asked: Parameters) -> Result<Answer, Failure> {
    caller.may(Scope::Gate, "")?;
    let asked = Described::from(asked);
    let gates = GATES.iter().map(|gate| (gate.name, gate.help));
    let described = gates
        .chain([(TENANT_SCORE, TENANT_SCORE_HELP)])
        .filter(|(name, _)| asked.metric.as_deref().is_none_or(|metric| metric == *name))
        .take(asked.limit()?)
        .map(|(name, help)| {
            let described = json!([{ "type": "gauge", "help": help, "unit": "" }]);
            (name.to_owned(), described)
        });
    Ok(Answer::of(Value::Object(described.collect())))
}

/// Which program this is.
#[utoipa::path(
    get, path = "/api/v1/status/buildinfo", tag = "prometheus",
    responses((status = 200, description = "The aggregator's version", body = Answer), Failure)
)]
async fn build_info(caller: Caller) -> Result<Answer, Failure> {
    caller.may(Scope::Gate, "")?;
    Ok(Answer::of(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "revision": "",
        "branch": "",
        "buildUser": "",
        "buildDate": "",
        "goVersion": "",
    })))
}

fn instant(faces: &Faces, caller: &Caller, asked: &InstantQuery) -> Result<Answer, Failure> {
    evaluate(faces, caller, &asked.query, asked.when()?, asked.limit()?)
}

fn range(faces: &Faces, caller: &Caller, asked: &RangeQuery) -> Result<Answer, Failure> {
    evaluate(faces, caller, &asked.query, asked.when()?, asked.limit()?)
}

fn evaluate(
    faces: &Faces,
    caller: &Caller,
    query: &str,
    when: When,
    limit: usize,
) -> Result<Answer, Failure> {
    caller.may(Scope::Gate, "")?;
    let selector = match parse(query).map_err(refused)? {
        Expression::Number(value) => return when.scalar(value),
        Expression::Vector(value) => return when.series(&[Sample::alone(value)]),
        Expression::Selector(selector) => selector,
    };
    let Some(name) = selector.name() else {
        let what = "1:1: parse error: the metric's name must be given as it is".to_owned();
        return Err(refused(Refusal::Malformed(what)));
    };
    if !is_known(name) {
        return Ok(when.series(&[])?.warn(vec![no_such_metric(name)]));
    }
    let views = find(faces, caller, &selector)?;
    let readings: Vec<_> = views.iter().map(|view| Reading::of(view)).collect();
    let mut selected =
        select(name, &selector, &readings).ok_or_else(|| no_rollout(faces, caller, &selector))?;
    if selected.samples.len() > limit {
        selected.samples.truncate(limit);
        selected.warnings.push(TRUNCATED.to_owned());
    }
    Ok(when.series(&selected.samples)?.warn(selected.warnings))
}

fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Malformed(why) => Failure::of_parameter("query", &format!("{why}; {SUPPORTED}")),
        Refusal::OfAMesh => Failure::of(StatusCode::UNPROCESSABLE_ENTITY, OF_A_MESH),
    }
}

fn no_such_metric(name: &str) -> String {
    let names: Vec<_> = GATES.iter().map(|gate| gate.name).collect();
    format!(
        "there is no metric {name:?} here, but {} and {TENANT_SCORE}",
        names.join(", ")
    )
}

/// The rollouts that a selector may mean and that the caller may see.
fn find(faces: &Faces, caller: &Caller, selector: &Selector) -> Result<Vec<Arc<View>>, Failure> {
    let only = |label: &str| selector.only(label).map(str::to_owned);
    let question = Question {
        rollout: only("rollout"),
        service: only("service"),
        version: only("version"),
        namespace: only("namespace"),
        workload: only("canary").or_else(|| only("workload")),
    };
    if let Some(service) = &question.service {
        caller.may(Scope::Gate, service)?;
    }
    Ok(visible(faces, caller, &question))
}

/// The open rollouts that are meant; if none is open, the newest. Those that the caller may not see are left out before:
/// of them there is nothing to tell, not even that they are there.
fn visible(faces: &Faces, caller: &Caller, question: &Question) -> Vec<Arc<View>> {
    let mut views = faces.rollouts.find(question);
    views.retain(|view| caller.may(Scope::Gate, &view.service).is_ok());
    // Those that are open come first.
    let open = views.iter().filter(|view| view.state != RolloutState::Ended);
    let open = open.count();
    views.truncate(open.max(1));
    views
}

/// What to do where no rollout matches.
fn no_rollout(faces: &Faces, caller: &Caller, selector: &Selector) -> Failure {
    let views = faces.rollouts.list();
    let open = views
        .iter()
        .filter(|view| view.state != RolloutState::Ended && caller.may(Scope::Gate, &view.service).is_ok());
    let open: Vec<_> = open.take(MAX_NAMED).map(|view| named(view)).collect();
    let open = if open.is_empty() {
        "none is open".to_owned()
    } else {
        format!("open are {}", open.join(", "))
    };
    let error = format!(
        "no rollout matches {selector}; {open}; begin one with `coalmine rollout start` or POST /v1/rollouts, and name \
         its workload there to find it by canary and namespace"
    );
    Failure::of(StatusCode::NOT_FOUND, error)
}

/// A rollout by all that it can be found by.
fn named(view: &View) -> String {
    let of = format!("{} (service {:?}", view.id, view.service);
    match &view.workload {
        Some(workload) => {
            let (namespace, name) = (&workload.namespace, &workload.name);
            format!("{of}, namespace {namespace:?}, canary {name:?})")
        }
        None => format!("{of}, no workload)"),
    }
}

fn label_names(faces: &Faces, caller: &Caller, asked: &Listing) -> Result<Answer, Failure> {
    let found = found(faces, caller, asked)?;
    let names: BTreeSet<_> = found.iter().flat_map(BTreeMap::keys).collect();
    list(names, asked)
}

fn series_of(faces: &Faces, caller: &Caller, asked: &Listing) -> Result<Answer, Failure> {
    if asked.selectors()?.is_empty() {
        return Err(Failure::bad_data("no match[] parameter provided"));
    }
    list(found(faces, caller, asked)?, asked)
}

/// The labels of all series that are meant: those of any selector, or of all rollouts.
fn found(
    faces: &Faces,
    caller: &Caller,
    asked: &Listing,
) -> Result<BTreeSet<BTreeMap<String, String>>, Failure> {
    caller.may(Scope::Gate, "")?;
    let mut found = BTreeSet::new();
    let mut add = |views: &[Arc<View>], selector: Option<&Selector>| {
        let readings: Vec<_> = views.iter().map(|view| Reading::of(view)).collect();
        let listed = listed(selector, &readings).into_iter();
        found.extend(listed.map(|labels| {
            let owned = |(label, value): (&str, &str)| (label.to_owned(), value.to_owned());
            labels.into_iter().map(owned).collect()
        }));
    };
    let selectors = asked.selectors()?;
    if selectors.is_empty() {
        add(&visible(faces, caller, &Question::default()), None);
    }
    for text in selectors {
        let selector = parse_selector(text)
            .map_err(|why| Failure::of_parameter("match[]", &format!("{why}; {SUPPORTED}")))?;
        add(&find(faces, caller, &selector)?, Some(&selector));
    }
    Ok(found)
}

/// As many entries as are wanted.
fn list<T: Serialize>(entries: BTreeSet<T>, asked: &Listing) -> Result<Answer, Failure> {
    let limit = asked.limit()?;
    let is_cut = entries.len() > limit;
    let shown: Vec<T> = entries.into_iter().take(limit).collect();
    let warnings = is_cut.then(|| TRUNCATED.to_owned());
    Ok(Answer::of(json!(shown)).warn(warnings.into_iter().collect()))
}

fn is_label(name: &str) -> bool {
    let mut bytes = name.bytes();
    let begins = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    bytes.next().is_some_and(begins) && bytes.all(|byte| begins(byte) || byte.is_ascii_digit())
}
