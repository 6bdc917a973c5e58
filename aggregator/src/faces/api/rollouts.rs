//! Rollouts: begun, listed, shown, decided in the judge's place, ended.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use coalmine_judge::{record::Body, v1::Verdict};
use coalmine_proto::names::{MAX_NAME_BYTES, check_name};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    PROVE_WITHIN,
    input::{Given, MaybeGiven, Named},
    permitted, records,
};
use crate::{
    access::{Caller, Scope},
    book::{ArmContext, Comparison},
    clock,
    faces::{
        Faces,
        problem::Problem,
        recorded::{Waiting, recorded},
    },
    rollouts::{StartRequest, View},
};

/// Where the decision log does not answer.
const NOT_STARTED: Waiting = Waiting::new("the rollout cannot be started", "ask again, with the same key");
const NOT_DECIDED: Waiting = Waiting::new(
    "the decision cannot be taken",
    "look at the rollout before you ask again",
);
const NOT_ENDED: Waiting = Waiting::new("the rollout cannot be ended", "ask again");

/// Most records of what was done outside in one answer.
const MAX_ACTUATIONS: usize = 20;

/// Longest reason, in bytes.
const MAX_REASON_BYTES: usize = 1_000;

/// Longest name of whoever asks, in bytes, where no token says who that is.
const MAX_ACTOR_BYTES: usize = 128;

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default()
        .routes(routes!(start, list))
        .routes(routes!(show))
        .routes(routes!(decide))
        .routes(routes!(end))
}

/// A rollout that was asked for.
#[derive(Debug, Serialize, ToSchema)]
struct RolloutStarted {
    #[serde(flatten)]
    view: View,
    /// What is likely to keep it on HOLD.
    warnings: Vec<String>,
}

/// Begin a rollout.
///
/// The same key names the same rollout, so a request can be sent again. One service has one open rollout at a time.
#[utoipa::path(
    post,
    path = "/v1/rollouts",
    tag = "rollouts",
    request_body = StartRequest,
    responses(
        (status = 201, description = "It is begun", body = RolloutStarted,
            headers(("location" = String, description = "Where it is shown"))),
        (status = 200, description = "The key is that of this rollout, which was begun before", body = RolloutStarted,
            headers(("location" = String, description = "Where it is shown"))),
        (status = 404, description = "The service has no policy"),
        (status = 409, description = "The service has an open rollout, or the key is another rollout's"),
        (status = 503, description = "The decision log takes no records now; ask again with the same key"),
    )
)]
async fn start(
    caller: Caller,
    State(faces): State<Faces>,
    given: Result<Given<StartRequest>, Problem>,
) -> Result<impl IntoResponse, Problem> {
    caller.may(Scope::Rollout, "")?;
    let Given(mut request) = given?;
    caller.may(Scope::Rollout, &request.service)?;
    if let Some(said) = &request.actor {
        let checked = check_name(said.as_bytes());
        checked.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, format!("actor {error}")))?;
    }
    request.actor = actor(&caller, request.actor).map(as_a_name);
    let version = request.canary_version.clone();
    let rollouts = faces.rollouts.clone();
    let (view, new) = recorded(NOT_STARTED, async move { rollouts.start(request).await }).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    let location = format!("/v1/rollouts/{}", view.id);
    let started = RolloutStarted {
        warnings: missing_version(&faces, &view.service, &version),
        view: Arc::unwrap_or_clone(view),
    };
    Ok((status, [(header::LOCATION, location)], Json(started)))
}

/// Who stands in a record. A token's name cannot be left out, nor that there was none where others have one; what else is
/// said about who asks comes after it.
fn actor(caller: &Caller, said: Option<String>) -> Option<String> {
    let name = caller.name();
    match said {
        said if !caller.is_named() => said,
        Some(said) => Some(format!("{name}:{said}")),
        None => Some(name.to_owned()),
    }
}

/// As much as a name may have: a token's own may be that long already.
fn as_a_name(mut actor: String) -> String {
    actor.truncate(actor.floor_char_boundary(MAX_NAME_BYTES));
    actor
}

/// A hint where agents of the service are connected, but none of this version.
fn missing_version(faces: &Faces, service: &str, version: &str) -> Vec<String> {
    let book = faces.book();
    if book.get(service).is_none() {
        return vec!["no agent of this service has connected yet".to_owned()];
    }
    let mut seen: Vec<_> = book
        .canaries(service)
        .into_iter()
        .map(|canary| canary.version)
        .collect();
    if seen.iter().any(|seen| seen == version) {
        return Vec::new();
    }
    seen.sort_unstable();
    seen.dedup();
    vec![format!(
        "no canary agent reports version {version} (canary versions seen: {}); the rollout stays on HOLD until one does",
        if seen.is_empty() {
            "none".to_owned()
        } else {
            seen.join(", ")
        }
    )]
}

/// Rollouts.
#[derive(Debug, Serialize, ToSchema)]
struct RolloutList {
    /// Newest first.
    rollouts: Vec<View>,
}

/// List rollouts, newest first.
///
/// Those of services that the caller may ask about; ended ones beyond a thousand are only in the decision log.
#[utoipa::path(
    get,
    path = "/v1/rollouts",
    tag = "rollouts",
    responses((status = 200, description = "The rollouts", body = RolloutList))
)]
async fn list(caller: Caller, State(faces): State<Faces>) -> Result<Json<RolloutList>, Problem> {
    caller.may(Scope::Gate, "")?;
    let views = faces.rollouts.list();
    let seen = views
        .into_iter()
        .filter(|view| caller.may(Scope::Gate, &view.service).is_ok());
    Ok(Json(RolloutList {
        rollouts: seen.map(Arc::unwrap_or_clone).collect(),
    }))
}

/// A rollout with what is around it.
#[derive(Debug, Serialize, ToSchema)]
struct RolloutShown {
    #[serde(flatten)]
    view: View,
    /// The service's agents.
    agents: Vec<AgentSeen>,
    arms: ArmContexts,
    /// What was done outside last, oldest first; null where the log cannot be read now.
    #[schema(value_type = Option<Vec<Object>>)]
    actuations: Option<Vec<Value>>,
}

/// An agent.
#[derive(Debug, Serialize, ToSchema)]
struct AgentSeen {
    instance: String,
    /// `canary` or `baseline`.
    arm: String,
    version: String,
    connected: bool,
    /// Whether it has said that it ends.
    ended: bool,
    /// The last batch of it that is on disk.
    durable_seq: u64,
}

/// The pods and pools of both arms at present: context that is not judged.
#[derive(Debug, Serialize, ToSchema)]
struct ArmContexts {
    #[schema(value_type = Object)]
    canary: ArmContext,
    #[schema(value_type = Object)]
    baseline: ArmContext,
}

/// Show a rollout with its agents and with what was done because of it.
#[utoipa::path(
    get,
    path = "/v1/rollouts/{rollout}",
    tag = "rollouts",
    params(("rollout" = String, Path, description = "The rollout")),
    responses(
        (status = 200, description = "The rollout", body = RolloutShown),
        (status = 404, description = "There is no such rollout"),
    )
)]
async fn show(
    caller: Caller,
    State(faces): State<Faces>,
    Named(rollout): Named,
) -> Result<Json<RolloutShown>, Problem> {
    let view = permitted(&faces, &caller, Scope::Gate, &rollout)?;
    Ok(Json(RolloutShown {
        agents: agents(&faces, &view),
        arms: arms(&faces, &view),
        actuations: actuations(&faces, &view.id).await,
        view: Arc::unwrap_or_clone(view),
    }))
}

/// What was done outside last; none where the log cannot be read now, which hides nothing else.
async fn actuations(faces: &Faces, rollout: &str) -> Option<Vec<Value>> {
    let positions = {
        let index = faces.ledger.index();
        let all = index.actuations(rollout);
        all[all.len().saturating_sub(MAX_ACTUATIONS)..].to_vec()
    };
    let (until, mut told) = (tokio::time::Instant::now() + PROVE_WITHIN, Vec::new());
    for position in positions {
        let read = tokio::time::timeout_at(until, records::read(faces, position)).await;
        let record = read.ok()?.ok()?.record;
        if let Body::Actuation(actuation) = record.body {
            let mut fields = serde_json::to_value(&actuation).ok()?;
            fields["at"] = json!(clock::rfc3339(record.time_ms));
            told.push(fields);
        }
    }
    Some(told)
}

fn agents(faces: &Faces, view: &View) -> Vec<AgentSeen> {
    let book = faces.book();
    let agents = book
        .get(&view.service)
        .into_iter()
        .flat_map(|service| service.agents());
    let seen = agents.map(|(instance, agent)| AgentSeen {
        instance: instance.to_owned(),
        arm: agent.build.arm.as_str().to_owned(),
        version: agent.build.version.clone(),
        connected: agent.connected,
        ended: agent.gone,
        durable_seq: agent.durable_seq,
    });
    seen.collect()
}

fn arms(faces: &Faces, view: &View) -> ArmContexts {
    let comparison = Comparison {
        service: view.service.clone(),
        canary_version: view.canary_version.clone(),
        baseline_version: view.baseline_version.clone(),
    };
    let [canary, baseline] = faces.book().contexts(&comparison, clock::now_ms());
    ArmContexts { canary, baseline }
}

/// What somebody decides.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum OverrideVerdict {
    Approve,
    Hold,
    Rollback,
}

impl From<OverrideVerdict> for Verdict {
    fn from(decided: OverrideVerdict) -> Self {
        match decided {
            OverrideVerdict::Approve => Self::Approve,
            OverrideVerdict::Hold => Self::Hold,
            OverrideVerdict::Rollback => Self::Rollback,
        }
    }
}

/// A decision in the judge's place.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct OverrideRequest {
    /// The decision; null gives it back to the judge. It cannot be left out.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required = true)]
    verdict: Option<OverrideVerdict>,
    /// Who decides; a token's name comes before it.
    #[schema(max_length = 128)]
    actor: Option<String>,
    /// Why; it is part of the record.
    #[schema(min_length = 1, max_length = 1000)]
    reason: String,
}

/// Decide in the judge's place, or give the decision back to it.
///
/// It is recorded before it is shown, stands on every face until it is given back, and changes nothing that the judge
/// says: that goes on beside it. An approval is shown only while the decision log takes records, whoever has decided.
#[utoipa::path(
    post,
    path = "/v1/rollouts/{rollout}/override",
    tag = "rollouts",
    params(("rollout" = String, Path, description = "The rollout")),
    request_body = OverrideRequest,
    responses(
        (status = 200, description = "The rollout as it stands now", body = View),
        (status = 404, description = "There is no such rollout"),
        (status = 409, description = "The rollout is over"),
        (status = 503, description = "The decision log takes no records now; ask again"),
    )
)]
async fn decide(
    caller: Caller,
    State(faces): State<Faces>,
    Named(rollout): Named,
    given: Result<Given<OverrideRequest>, Problem>,
) -> Result<Json<View>, Problem> {
    permitted(&faces, &caller, Scope::Override, &rollout)?;
    let Given(request) = given?;
    if request.reason.trim().is_empty() {
        let detail = "reason is empty; say why, since it is part of the record";
        return Err(Problem::new(StatusCode::BAD_REQUEST, detail));
    }
    bounded("reason", Some(&request.reason), MAX_REASON_BYTES)?;
    bounded("actor", request.actor.as_deref(), MAX_ACTOR_BYTES)?;
    let verdict = request.verdict.map(Verdict::from);
    let actor = actor(&caller, request.actor).unwrap_or_else(|| "api".to_owned());
    let (rollouts, reason) = (faces.rollouts.clone(), request.reason);
    let work = async move { rollouts.override_verdict(&rollout, verdict, actor, reason).await };
    let decided = recorded(NOT_DECIDED, work).await?;
    Ok(Json(Arc::unwrap_or_clone(decided)))
}

fn bounded(field: &str, text: Option<&str>, most: usize) -> Result<(), Problem> {
    match text {
        Some(text) if text.len() > most => Err(Problem::new(
            StatusCode::BAD_REQUEST,
            format!("{field} has {} bytes; at most {most} are kept", text.len()),
        )),
        _ => Ok(()),
    }
}

/// The end of a rollout.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct EndRequest {
    /// Who ends it; a token's name comes before it.
    #[schema(max_length = 1000)]
    actor: Option<String>,
    /// Why; it is part of the record.
    #[schema(max_length = 1000)]
    reason: Option<String>,
}

/// End a rollout: nothing more is judged, and its last verdict stays.
///
/// Ending one that is over changes nothing. The body may be left out.
#[utoipa::path(
    post,
    path = "/v1/rollouts/{rollout}/end",
    tag = "rollouts",
    params(("rollout" = String, Path, description = "The rollout")),
    request_body = Option<EndRequest>,
    responses(
        (status = 200, description = "The rollout as it ended", body = View),
        (status = 404, description = "There is no such rollout"),
        (status = 503, description = "The decision log takes no records now; ask again"),
    )
)]
async fn end(
    caller: Caller,
    State(faces): State<Faces>,
    Named(rollout): Named,
    given: Result<MaybeGiven<EndRequest>, Problem>,
) -> Result<Json<View>, Problem> {
    permitted(&faces, &caller, Scope::Rollout, &rollout)?;
    let MaybeGiven(request) = given?;
    bounded("actor", request.actor.as_deref(), MAX_REASON_BYTES)?;
    bounded("reason", request.reason.as_deref(), MAX_REASON_BYTES)?;
    let actor = actor(&caller, request.actor).unwrap_or_else(|| "api".to_owned());
    let reason = request.reason.unwrap_or_else(|| "ended by request".to_owned());
    let rollouts = faces.rollouts.clone();
    let ended = async move { rollouts.end(&rollout, actor, reason).await };
    let view = recorded(NOT_ENDED, ended).await?;
    Ok(Json(Arc::unwrap_or_clone(view)))
}
