//! What Argo Rollouts' kayenta provider, Spinnaker's Orca and standalone callers ask Kayenta, at its paths under
//! `/kayenta`.
//!
//! ```text
//! GET  /credentials, /judges, /canaryConfig, /canaryConfig/{id}, /health            (`catalog`)
//! POST /canary/{config}                       which rollout is meant, begun if there is none (`begin`)
//! GET  /canary/{execution}                    the verdict as a score (`execution`): a read of what was last published
//! PUT  /pipelines/{execution}/cancel          ends the rollout if it was begun here
//! POST /standalone_canary_analysis/{config}   the same as a canary, in another form (`answer`)
//! GET  /standalone_canary_analysis/{execution}
//! ```
//!
//! A canary config is a policy, by the name of its service (`config`); what scopes mean is in `scope`. Errors are
//! problem documents with a `message`, where callers of Kayenta look. The rest of Kayenta is answered with 501: its
//! configs are our policies, and its metrics come from agents.

mod answer;
mod begin;
mod catalog;
mod config;
mod execution;
mod scope;

use std::sync::Arc;

use axum::{
    Json,
    body::{Body, to_bytes},
    extract::{
        Path, Query, Request, State,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::any,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::{
    router::{OpenApiRouter, UtoipaMethodRouter},
    routes,
};

use self::{
    answer::{CanaryExecution, StandaloneExecution},
    begin::{Question, is_begun_here, settle},
    execution::Execution,
    scope::{Asked, CanaryExecutionRequest, StandaloneRequest},
};
use super::{
    Faces,
    problem::Problem,
    recorded::{Waiting, recorded},
};
use crate::{
    access::{Caller, Denied, Scope},
    rollouts::{State as RolloutState, View},
};

/// Where the decision log does not answer.
const NOT_BEGUN: Waiting = Waiting::new("the rollout cannot be begun", "ask again");
const NOT_ENDED: Waiting = Waiting::new("the rollout cannot be ended", "ask again");

/// Longest error that gets a `message`.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// Longest name of an account that is answered.
const MAX_ACCOUNT_BYTES: usize = 256;

/// What Kayenta lists all executions by, in the place of one's id. No id of ours is without dots.
const ALL_EXECUTIONS: &str = "executions";

/// The routes.
pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::new()
        .merge(catalog::routes())
        .routes(only(routes!(begin_canary, canary)))
        .routes(only(routes!(begin_standalone, standalone)))
        .routes(only(routes!(cancel)))
        .route("/kayenta/{*rest}", any(not_offered))
}

/// What Kayenta has besides under the same path is refused as not offered.
fn only((schemas, paths, router): UtoipaMethodRouter<Faces>) -> UtoipaMethodRouter<Faces> {
    (schemas, paths, router.fallback(not_offered))
}

async fn not_offered() -> Problem {
    Problem::new(
        StatusCode::NOT_IMPLEMENTED,
        "this part of Kayenta is not offered; offered are GET credentials, judges, canaryConfig, canaryConfig/ID and \
         health, POST canary/CONFIG and GET canary/EXECUTION, PUT pipelines/EXECUTION/cancel, POST \
         standalone_canary_analysis/CONFIG and GET standalone_canary_analysis/EXECUTION, all under /kayenta; canary configs \
         are the policies of --policy and are changed there",
    )
}

/// Says an error once more where callers of Kayenta look for it, whoever has refused the request.
pub(super) async fn with_message(request: Request, next: Next) -> Response {
    // A token may stand before the path.
    let is_ours = request.uri().path().contains("/kayenta");
    let response = next.run(request).await;
    if is_ours {
        repeated(response).await
    } else {
        response
    }
}

async fn repeated(response: Response) -> Response {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let bytes = to_bytes(body, MAX_ERROR_BYTES).await.unwrap_or_default();
    let Ok(mut fields) = serde_json::from_slice::<Map<String, Value>>(&bytes) else {
        return Response::from_parts(parts, Body::from(bytes));
    };
    if let Some(detail) = fields.get("detail").cloned() {
        fields.insert("message".to_owned(), detail);
    }
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(Value::Object(fields).to_string()))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BeginQuery {
    parent_pipeline_execution_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PollQuery {
    storage_account_name: Option<String>,
}

/// What is asked for from now on.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct BegunCanary {
    canary_execution_id: String,
}

/// What is asked for from now on.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct BegunStandalone {
    canary_analysis_execution_id: String,
}

/// Finds or begins the rollout of a canary.
///
/// The experiment's scope names it: `NAMESPACE/WORKLOAD/VERSION`, `VERSION`, or `rollout:ID`. With a workload, the hash of
/// a pod template that no agent reports as its version stands for the only version that connected agents of the canary
/// report, and so for the open rollout of that version, unless the rollout names another workload. The control's scope
/// names the version to compare with, if a rollout is begun. All that one pipeline execution asks about a version is
/// one rollout; another execution ends it and begins its own.
#[utoipa::path(
    post, path = "/kayenta/canary/{id}", tag = "kayenta",
    params(
        ("id" = String, Path, description = "The canary config: the service"),
        ("parentPipelineExecutionId" = Option<String>, Query, description = "The execution of the pipeline that asks"),
    ),
    request_body = CanaryExecutionRequest,
    responses(
        (status = 200, description = "Ask for the execution", body = BegunCanary),
        (status = 400, description = "What is asked for is unclear"),
        (status = 404, description = "There is no such policy or rollout"),
        (status = 409, description = "Another rollout is open, or agents are not connected yet"),
        (status = 503, description = "The decision log takes no records"),
    )
)]
async fn begin_canary(
    caller: Caller,
    State(faces): State<Faces>,
    id: Result<Path<String>, PathRejection>,
    query: Result<Query<BeginQuery>, QueryRejection>,
    request: Result<Json<CanaryExecutionRequest>, JsonRejection>,
) -> Result<Json<BegunCanary>, Problem> {
    let (Path(service), Query(query)) = (id?, query?);
    may_begin(&faces, &caller, &service)?;
    let asked = request?.0.read().map_err(refused)?;
    let execution = begin(faces, &caller, service, asked, query).await?;
    Ok(Json(BegunCanary {
        canary_execution_id: execution.id(),
    }))
}

/// The verdict as a score.
///
/// `complete` is false while the verdict is HOLD. APPROVE has the score 100 and ROLLBACK 0. A HOLD that the policy does
/// not end at its deadline gets a score between the thresholds there, and so does one that somebody has ended, or that
/// cannot be judged any more.
#[utoipa::path(
    get, path = "/kayenta/canary/{id}", tag = "kayenta",
    params(
        ("id" = String, Path, description = "The execution"),
        ("storageAccountName" = Option<String>, Query, description = "Stands in the answer, and is used for nothing"),
    ),
    responses(
        (status = 200, description = "How far it is", body = CanaryExecution),
        (status = 404, description = "There is no such execution"),
    )
)]
async fn canary(
    caller: Caller,
    State(faces): State<Faces>,
    id: Result<Path<String>, PathRejection>,
    query: Result<Query<PollQuery>, QueryRejection>,
) -> Result<impl IntoResponse, Problem> {
    let Path(id) = id?;
    if id == ALL_EXECUTIONS {
        return Err(not_offered().await);
    }
    let (execution, view) = polled(&faces, &caller, Scope::Gate, &id)?;
    let answer = CanaryExecution::of(&view, &execution, account(query)?);
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(answer)))
}

/// Finds or begins the rollout of a canary, for a caller without a pipeline.
///
/// Scopes are as those of a canary. How long it takes is for the policy to say, by its hold deadline.
#[utoipa::path(
    post, path = "/kayenta/standalone_canary_analysis/{id}", tag = "kayenta",
    params(
        ("id" = String, Path, description = "The canary config: the service"),
        ("parentPipelineExecutionId" = Option<String>, Query, description = "The execution of the pipeline that asks"),
    ),
    request_body = StandaloneRequest,
    responses(
        (status = 200, description = "Ask for the execution", body = BegunStandalone),
        (status = 400, description = "What is asked for is unclear"),
        (status = 404, description = "There is no such policy or rollout"),
        (status = 409, description = "Another rollout is open, or agents are not connected yet"),
        (status = 503, description = "The decision log takes no records"),
    )
)]
async fn begin_standalone(
    caller: Caller,
    State(faces): State<Faces>,
    id: Result<Path<String>, PathRejection>,
    query: Result<Query<BeginQuery>, QueryRejection>,
    request: Result<Json<StandaloneRequest>, JsonRejection>,
) -> Result<Json<BegunStandalone>, Problem> {
    let (Path(service), Query(query)) = (id?, query?);
    may_begin(&faces, &caller, &service)?;
    let asked = request?.0.read().map_err(refused)?;
    let execution = begin(faces, &caller, service, asked, query).await?;
    Ok(Json(BegunStandalone {
        canary_analysis_execution_id: execution.id(),
    }))
}

/// The verdict as the result of a standalone analysis.
#[utoipa::path(
    get, path = "/kayenta/standalone_canary_analysis/{id}", tag = "kayenta",
    params(
        ("id" = String, Path, description = "The execution"),
        ("storageAccountName" = Option<String>, Query, description = "Stands in the answer, and is used for nothing"),
    ),
    responses(
        (status = 200, description = "How far it is", body = StandaloneExecution),
        (status = 404, description = "There is no such execution"),
    )
)]
async fn standalone(
    caller: Caller,
    State(faces): State<Faces>,
    id: Result<Path<String>, PathRejection>,
    query: Result<Query<PollQuery>, QueryRejection>,
) -> Result<impl IntoResponse, Problem> {
    let (execution, view) = polled(&faces, &caller, Scope::Gate, &id?)?;
    let answer = StandaloneExecution::of(&view, &execution, account(query)?);
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(answer)))
}

#[derive(Debug, Serialize, ToSchema)]
struct CancelledCanary {
    /// Whether the rollout is over; it goes on if somebody else has begun it.
    ended: bool,
}

/// Ends the rollout of an execution if it was begun here; others' rollouts go on.
#[utoipa::path(
    put, path = "/kayenta/pipelines/{id}/cancel", tag = "kayenta",
    params(("id" = String, Path, description = "The execution")),
    responses(
        (status = 200, description = "Nothing more is asked for", body = CancelledCanary),
        (status = 404, description = "There is no such execution"),
        (status = 503, description = "The decision log takes no records"),
    )
)]
async fn cancel(
    caller: Caller,
    State(faces): State<Faces>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<CancelledCanary>, Problem> {
    let (_, view) = polled(&faces, &caller, Scope::Rollout, &id?)?;
    let view = if is_begun_here(&view) {
        let (id, actor) = (view.id.clone(), caller.name().to_owned());
        let reason = "the pipeline that had asked for it was cancelled".to_owned();
        recorded(
            NOT_ENDED,
            async move { faces.rollouts.end(&id, actor, reason).await },
        )
        .await?
    } else {
        view
    };
    Ok(Json(CancelledCanary {
        ended: view.state == RolloutState::Ended,
    }))
}

// === what they share ===

async fn begin(
    faces: Faces,
    caller: &Caller,
    service: String,
    asked: Asked,
    query: BeginQuery,
) -> Result<Execution, Problem> {
    let question = Question {
        service,
        trial: asked.trial,
        pipeline: query.parent_pipeline_execution_id.filter(|id| !id.is_empty()),
        actor: caller.name().to_owned(),
    };
    let view = recorded(NOT_BEGUN, settle(faces, question)).await?;
    Ok(Execution {
        rollout: view.id.clone(),
        thresholds: asked.thresholds,
    })
}

fn polled(faces: &Faces, caller: &Caller, scope: Scope, id: &str) -> Result<(Execution, Arc<View>), Problem> {
    let execution = Execution::parse(id);
    let found = execution.and_then(|execution| {
        let view = faces.rollouts.view(&execution.rollout).ok()?;
        Some((execution, view))
    });
    match found {
        Some((execution, view)) => {
            caller.may(scope, &view.service)?;
            Ok((execution, view))
        }
        None => {
            visible(faces, caller)?;
            Err(Problem::not_found(format!(
                "there is no execution {id:.300?}; POST canary/CONFIG gives the id of one"
            )))
        }
    }
}

/// The services that a caller may ask about; an error if that is none of those that there are.
fn visible<'f>(faces: &'f Faces, caller: &Caller) -> Result<Vec<&'f str>, Denied> {
    let (mut services, mut denied) = (Vec::new(), None);
    for service in faces.rollouts.policies().keys() {
        match caller.may(Scope::Gate, service) {
            Ok(()) => services.push(service.as_str()),
            Err(why) => denied = Some(why),
        }
    }
    match denied {
        Some(why) if services.is_empty() => Err(why),
        _ => Ok(services),
    }
}

fn may_begin(faces: &Faces, caller: &Caller, service: &str) -> Result<(), Problem> {
    caller.may(Scope::Rollout, service)?;
    if faces.rollouts.policies().contains_key(service) {
        return Ok(());
    }
    Err(no_config(faces, caller, service))
}

fn no_config(faces: &Faces, caller: &Caller, id: &str) -> Problem {
    let known = visible(faces, caller).unwrap_or_default();
    Problem::not_found(format!(
        "there is no canary config {id:.130?}: its id is the name of a service that has a policy (there is one for: {})",
        known.join(", ")
    ))
}

fn refused(problem: String) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, problem)
}

/// The account that stands in the answer, as the caller gave it.
fn account(query: Result<Query<PollQuery>, QueryRejection>) -> Result<Option<String>, Problem> {
    let name = query?.0.storage_account_name;
    if name.as_ref().is_some_and(|name| name.len() > MAX_ACCOUNT_BYTES) {
        return Err(refused(format!(
            "storageAccountName has more than {MAX_ACCOUNT_BYTES} bytes"
        )));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_error_has_a_message_and_an_answer_stays_as_it_is() {
        let text = async |response: Response| {
            let bytes = to_bytes(response.into_body(), MAX_ERROR_BYTES).await.unwrap();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        let refused = repeated(refused("too little".to_owned()).into_response()).await;
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
        assert_eq!(
            refused.headers()[header::CONTENT_TYPE],
            "application/problem+json"
        );
        let fields: Value = serde_json::from_str(&text(refused).await).unwrap();
        assert_eq!(
            (&fields["message"], &fields["status"]),
            (&fields["detail"], &Value::from(400))
        );
        assert_eq!(fields["message"], "too little");
        let plain = repeated((StatusCode::NOT_FOUND, "no JSON").into_response()).await;
        assert_eq!(text(plain).await, "no JSON");
        let fine = repeated(Json(serde_json::json!({ "detail": 1 })).into_response()).await;
        assert_eq!(text(fine).await, r#"{"detail":1}"#);
    }
}
