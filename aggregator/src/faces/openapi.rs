//! What the faces offer, as an OpenAPI 3.1 document. Each route brings its own part of it; here is what they share: who
//! may ask, how errors look, and the statuses that any of them can answer.
//!
//! `docs/openapi.json` is a copy that people and generators of clients read; the test below holds it to the code.

use axum::{Router, body::Bytes, http::header, routing::get};
use utoipa::openapi::{
    Components, ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder, Ref, RefOr,
    content::Content,
    info::LicenseBuilder,
    path::{Operation, PathItem},
    response::Response,
    security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    tag::TagBuilder,
};

use super::{Faces, problem::Problem};

/// What every operation can answer: the door says it.
const EVERYWHERE: [(&str, &str); 2] = [
    (
        "401",
        "There is no such token, or none was presented where one is needed",
    ),
    ("429", "Too many requests; Retry-After says when to ask again"),
];

/// What is said to a token that may not ask. Clients of Prometheus are told 401 instead.
const FORBIDDEN: (&str, &str) = ("403", "The token is not for this, or not for this service");

/// What an operation with parameters or with a body can answer.
const MALFORMED: (&str, &str) = ("400", "The request makes no sense");

/// What an operation with a body can answer.
const WITH_A_BODY: [(&str, &str); 2] = [
    ("408", "The body did not come whole within 10 s"),
    ("413", "The body is larger than 64 KiB"),
];

/// What an operation that reads JSON can answer.
const UNFIT: (&str, &str) = (
    "422",
    "The body has a field that is not known, or a value that does not fit",
);

/// What it can answer where the body has to be declared.
const UNDECLARED: (&str, &str) = ("415", "The body is not said to be JSON");

/// What an operation can answer that reads or writes the decision log.
const FAULT: (&str, &str) = ("500", "A fault of the server, whose log has the request's id");

/// Where a body is read as JSON whatever it is said to be.
const DECLARED_OR_NOT: [&str; 3] = ["/gate/{act}", "/rollback/{act}", "/v1/rollouts/{rollout}/end"];

/// Where whoever has any token may ask.
const FOR_EVERY_TOKEN: &str = "/kayenta/health";

/// Where an expression is evaluated, for which there may be no rollout (404) or too large an answer (422).
const EVALUATED: [&str; 2] = ["/api/v1/query", "/api/v1/query_range"];

const PROMETHEUS: &str = "prometheus";

const PROBLEM: &str = "application/problem+json";

const TAGS: [(&str, &str); 5] = [
    ("rollouts", "Begin, ask for, watch, decide and end rollouts"),
    ("decisions", "The audit trail, and what was counted"),
    ("flagger", "Webhooks of Flagger, and the gates of its load tester"),
    (PROMETHEUS, "The part of Prometheus' API that deploy tools ask"),
    (
        "kayenta",
        "The part of Kayenta's API that Argo Rollouts and Spinnaker ask",
    ),
];

/// The document before any route has brought its part.
pub(super) fn outline() -> OpenApi {
    let license = LicenseBuilder::new()
        .name("Apache License 2.0")
        .identifier(Some("Apache-2.0"))
        .build();
    let info = InfoBuilder::new()
        .title("Coalmine")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Judges canary rollouts for every tenant, and proves it. All faces read the same verdict: what was last \
             decided and recorded. Errors are problem documents (RFC 9457) with a request's id, except in Prometheus' API, \
             which has its own.",
        ))
        .license(Some(license))
        .build();
    let tags = TAGS.map(|(name, what)| TagBuilder::new().name(name).description(Some(what)).build());
    let no_scopes: [&str; 0] = [];
    OpenApiBuilder::new()
        .info(info)
        .components(Some(components()))
        .security(Some([
            SecurityRequirement::new("bearer", no_scopes),
            SecurityRequirement::new("basic", no_scopes),
            // Callers on the same machine, and whatever the server lets everybody do.
            SecurityRequirement::default(),
        ]))
        .tags(Some(tags))
        .build()
}

fn components() -> Components {
    let scheme = |scheme: HttpAuthScheme, what: &str| {
        SecurityScheme::Http(HttpBuilder::new().scheme(scheme).description(Some(what)).build())
    };
    ComponentsBuilder::new()
        .schema_from::<Problem>()
        .security_scheme("bearer", scheme(HttpAuthScheme::Bearer, "The token."))
        .security_scheme(
            "basic",
            scheme(
                HttpAuthScheme::Basic,
                "The token as the password, with any user name. A path that begins with /t/TOKEN works as well.",
            ),
        )
        .build()
}

/// The document's text, once every route has brought its part.
fn text(mut document: OpenApi) -> String {
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations(item) {
            operation.operation_id = Some(operation_id(method, path));
            complete(method, path, operation);
        }
    }
    let value = serde_json::to_value(&document);
    let text = value.and_then(|value| serde_json::to_string_pretty(&value));
    // It cannot fail; a test would see an empty document.
    text.unwrap_or_default() + "\n"
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (&'static str, &mut Operation)> {
    let methods = [
        ("get", &mut item.get),
        ("put", &mut item.put),
        ("post", &mut item.post),
        ("delete", &mut item.delete),
        ("options", &mut item.options),
        ("head", &mut item.head),
        ("patch", &mut item.patch),
    ];
    let those = methods.into_iter();
    those.filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// A name that no other operation has.
fn operation_id(method: &str, path: &str) -> String {
    let words = path.split(|c: char| !c.is_ascii_alphanumeric());
    let words = words.filter(|word| !word.is_empty());
    [method].into_iter().chain(words).collect::<Vec<_>>().join("_")
}

/// What an operation can answer as others can.
fn shared(method: &str, path: &str, operation: &Operation) -> Vec<(&'static str, &'static str)> {
    let mut shared = EVERYWHERE.to_vec();
    let has_body = operation.request_body.is_some();
    if has_body || operation.parameters.as_ref().is_some_and(|all| !all.is_empty()) {
        shared.push(MALFORMED);
    }
    if has_body {
        shared.extend(WITH_A_BODY);
    }
    if is_of_prometheus(operation) {
        return shared;
    }
    if path != FOR_EVERY_TOKEN {
        shared.push(FORBIDDEN);
    }
    if has_body {
        shared.push(UNFIT);
    }
    if has_body && !DECLARED_OR_NOT.contains(&path) {
        shared.push(UNDECLARED);
    }
    if method != "get" || path.starts_with("/v1/decisions") {
        shared.push(FAULT);
    }
    shared
}

fn is_of_prometheus(operation: &Operation) -> bool {
    let mut tags = operation.tags.iter().flatten();
    tags.any(|tag| tag == PROMETHEUS)
}

/// Adds what a route does not say itself: statuses that it shares with others, and how an error looks.
fn complete(method: &str, path: &str, operation: &mut Operation) {
    let shared = shared(method, path, operation);
    if is_of_prometheus(operation) {
        // The envelope is described with every failure of that face, whatever the route.
        let of_expressions: &[&str] = if EVALUATED.contains(&path) {
            &["404", "422"]
        } else {
            &[]
        };
        operation.responses.responses.retain(|status, _| {
            status.as_str() < "400"
                || of_expressions.contains(&status.as_str())
                || shared.iter().any(|(shared, _)| shared == status)
        });
    }
    let responses = &mut operation.responses.responses;
    for (status, why) in shared {
        let response = || RefOr::T(Response::new(why));
        responses.entry(status.to_owned()).or_insert_with(response);
    }
    for (status, response) in responses {
        if let RefOr::T(response) = response
            && status.as_str() >= "400"
            && response.content.is_empty()
        {
            let content = Content::new(Some(Ref::from_schema_name("Problem")));
            response.content.insert(PROBLEM.to_owned(), RefOr::T(content));
        }
    }
}

/// Serves the document. It is the same for everybody, and was written once.
pub(super) fn route(document: OpenApi) -> Router<Faces> {
    let text = Bytes::from(text(document));
    Router::new().route(
        "/openapi.json",
        get(move || {
            let text = text.clone();
            async move { ([(header::CONTENT_TYPE, "application/json")], text) }
        }),
    )
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use serde_json::Value;

    use super::*;

    const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");

    /// All that is answered, by operation.
    const ANSWERS: &str = "\
GET /api/v1/label/{name}/values: 200 400 401 429
GET /api/v1/labels: 200 400 401 429
POST /api/v1/labels: 200 400 401 408 413 429
GET /api/v1/metadata: 200 400 401 429
GET /api/v1/query: 200 400 401 404 422 429
POST /api/v1/query: 200 400 401 404 408 413 422 429
GET /api/v1/query_range: 200 400 401 404 422 429
POST /api/v1/query_range: 200 400 401 404 408 413 422 429
GET /api/v1/series: 200 400 401 429
POST /api/v1/series: 200 400 401 408 413 429
GET /api/v1/status/buildinfo: 200 401 429
POST /gate/{act}: 200 202 400 401 403 404 408 409 413 422 429 500 503
GET /kayenta/canary/{id}: 200 400 401 403 404 429
POST /kayenta/canary/{id}: 200 400 401 403 404 408 409 413 415 422 429 500 503
GET /kayenta/canaryConfig: 200 400 401 403 429
GET /kayenta/canaryConfig/{id}: 200 400 401 403 404 429
GET /kayenta/credentials: 200 401 403 429
GET /kayenta/health: 200 401 429
GET /kayenta/judges: 200 401 403 429
PUT /kayenta/pipelines/{id}/cancel: 200 400 401 403 404 429 500 503
GET /kayenta/standalone_canary_analysis/{id}: 200 400 401 403 404 429
POST /kayenta/standalone_canary_analysis/{id}: 200 400 401 403 404 408 409 413 415 422 429 500 503
POST /rollback/{act}: 200 202 400 401 403 404 408 409 413 422 429 500 503
GET /v1/audit/checkpoint: 200 401 403 429 503
GET /v1/audit/consistency: 200 400 401 403 429
GET /v1/decisions: 200 400 401 403 429 500
GET /v1/decisions/{decision}: 200 400 401 403 404 429 500
GET /v1/decisions/{decision}/evidence: 200 400 401 403 404 429 500
GET /v1/decisions/{decision}/proof: 200 400 401 403 404 429 500 503
POST /v1/decisions/{decision}/replay: 200 400 401 403 404 409 429 500
POST /v1/flagger/{hook}: 200 400 401 403 404 408 409 413 415 422 429 500 503
GET /v1/gate: 200 400 401 403 404 429
GET /v1/rollouts: 200 401 403 429
POST /v1/rollouts: 200 201 400 401 403 404 408 409 413 415 422 429 500 503
GET /v1/rollouts/{rollout}: 200 400 401 403 404 429
POST /v1/rollouts/{rollout}/end: 200 400 401 403 404 408 413 422 429 500 503
GET /v1/rollouts/{rollout}/gate: 200 400 401 403 404 429
POST /v1/rollouts/{rollout}/override: 200 400 401 403 404 408 409 413 415 422 429 500 503
GET /v1/rollouts/{rollout}/watch: 200 400 401 403 404 429
GET /v1/services/{service}: 200 400 401 403 404 429
";

    fn served() -> String {
        text(crate::faces::routes().into_openapi())
    }

    #[test]
    fn the_committed_document_is_the_one_that_is_served() {
        let served = served();
        if std::env::var_os("COALMINE_BLESS").is_some() {
            fs::write(COMMITTED, &served).unwrap();
        }
        let committed = fs::read_to_string(COMMITTED).unwrap_or_default();
        let differs = committed
            .lines()
            .zip(served.lines())
            .position(|(one, other)| one != other);
        assert!(
            committed == served,
            "docs/openapi.json differs from the code from line {} on; write it with \
             COALMINE_BLESS=1 cargo test -p coalmine-aggregator openapi",
            differs.unwrap_or(committed.lines().count().min(served.lines().count())) + 1
        );
    }

    #[test]
    fn every_operation_says_all_that_it_answers_and_nothing_else_and_has_a_name() {
        let document: Value = serde_json::from_str(&served()).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let (mut names, mut listed) = (BTreeSet::new(), String::new());
        let paths = document["paths"].as_object().unwrap();
        for (path, item) in paths {
            for (method, operation) in item.as_object().unwrap() {
                let name = operation["operationId"].as_str().unwrap();
                assert!(names.insert(name.to_owned()), "{method} {path}: {name} is taken");
                assert!(operation["summary"].is_string(), "{method} {path} has no summary");
                let tag = operation["tags"][0].as_str().unwrap();
                assert!(
                    TAGS.iter().any(|(known, _)| *known == tag),
                    "{method} {path}: {tag}"
                );
                let answers = operation["responses"].as_object().unwrap();
                let statuses: Vec<_> = answers.keys().map(String::as_str).collect();
                let method = method.to_ascii_uppercase();
                listed += &format!("{method} {path}: {}\n", statuses.join(" "));
                let envelope = if tag == PROMETHEUS {
                    "application/json"
                } else {
                    PROBLEM
                };
                let errors = answers.iter().filter(|(status, _)| status.as_str() >= "400");
                for (status, answer) in errors {
                    assert!(
                        answer["content"][envelope].is_object(),
                        "{method} {path}: {status} has no {envelope}"
                    );
                }
            }
        }
        assert_eq!(listed, ANSWERS);
        // What is named is there.
        let text = document.to_string();
        for name in text.split("\"#/components/schemas/").skip(1) {
            let name = name.split('"').next().unwrap();
            assert!(schemas.contains_key(name), "{name} is named, and not described");
        }
    }
}
