//! The audit trail: decisions, what they rest on, and what shows that they are right.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use coalmine_judge::{
    record::{Body, Record},
    replay::replay_decision,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    input::{Asked, Named, Parameters},
    records,
};
use crate::{
    access::{Caller, Scope},
    clock,
    faces::{Faces, problem::Problem},
    ledger::Appended,
};

/// Most decisions in one answer, and most that are read for it.
const MAX_LIMIT: usize = 1_000;

/// Decisions in one answer, if it is not said how many.
const LIMIT: usize = 100;

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(evidence))
        .routes(routes!(proof))
        .routes(routes!(replay))
}

/// A decision as it stands in the log.
#[derive(Debug, Serialize, ToSchema)]
struct DecisionRecorded {
    /// The record.
    #[schema(value_type = Object)]
    record: Record,
    /// Its hash, which the log's tree is made of.
    hash: String,
    /// When it was recorded, RFC 3339.
    timestamp: String,
    /// Left out where it was not the judge who decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    summary: Option<DecisionSummary>,
}

/// What readers of an execution log expect.
#[derive(Debug, Serialize, ToSchema)]
struct DecisionSummary {
    total_duration_ms: u64,
    tenants_checked: u64,
    /// From 0 to 1.
    health_score: f64,
    /// APPROVE, HOLD or ROLLBACK.
    rollout_decision: String,
    anomalies_detected: u64,
    /// The hash of the record.
    audit_hash: String,
}

impl DecisionRecorded {
    fn of(appended: Appended) -> Self {
        let Appended { record, hash } = appended;
        let hash = hash.to_string();
        let summary = match &record.body {
            Body::Decision(decision) => {
                let took_us = decision.steps.iter().map(|step| step.duration_us);
                Some(DecisionSummary {
                    total_duration_ms: took_us.fold(0, u64::saturating_add) / 1_000,
                    tenants_checked: decision.finding.tenants_checked,
                    health_score: f64::from(decision.finding.score_ppm) / 1e6,
                    rollout_decision: decision.finding.verdict.clone(),
                    anomalies_detected: decision.finding.anomalies_detected,
                    audit_hash: hash.clone(),
                })
            }
            _ => None,
        };
        Self {
            timestamp: clock::rfc3339(record.time_ms),
            record,
            hash,
            summary,
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    /// Only those on this rollout.
    rollout: Option<String>,
    /// How many at most: 100 if it is left out, never more than 1,000.
    limit: Option<usize>,
}

impl Parameters for ListQuery {
    const WHICH: &'static str = "the parameters are rollout and limit";
}

/// Decisions.
#[derive(Debug, Serialize, ToSchema)]
struct DecisionList {
    /// Newest first.
    decisions: Vec<DecisionRecorded>,
}

/// List the judge's decisions, newest first.
///
/// Of the newest thousand, those on services that the caller may ask about. What was not decided by the judge, an override
/// or a first traffic that was let through, is not listed: the gate names it while it is in force.
#[utoipa::path(
    get,
    path = "/v1/decisions",
    tag = "decisions",
    params(ListQuery),
    responses((status = 200, description = "The decisions", body = DecisionList))
)]
async fn list(
    caller: Caller,
    State(faces): State<Faces>,
    Asked(query): Asked<ListQuery>,
) -> Result<Json<DecisionList>, Problem> {
    caller.may(Scope::Audit, "")?;
    let limit = query.limit.unwrap_or(LIMIT);
    let seqs = faces.ledger.index().decisions(query.rollout.as_deref());
    let mut decisions = Vec::new();
    for seq in seqs.into_iter().rev().take(MAX_LIMIT) {
        if decisions.len() >= limit {
            break;
        }
        let appended = records::read(&faces, seq).await?;
        if may_see(&caller, &appended.record) {
            decisions.push(DecisionRecorded::of(appended));
        }
    }
    Ok(Json(DecisionList { decisions }))
}

fn may_see(caller: &Caller, record: &Record) -> bool {
    match &record.body {
        Body::Decision(decision) => caller.may(Scope::Audit, &decision.service).is_ok(),
        _ => false,
    }
}

/// Show a decision as it stands in the log.
///
/// Also one that was not the judge's: an override, or a first traffic that was let through.
#[utoipa::path(
    get,
    path = "/v1/decisions/{decision}",
    tag = "decisions",
    params(("decision" = String, Path, description = "The decision, as the gate names it")),
    responses(
        (status = 200, description = "The decision", body = DecisionRecorded),
        (status = 404, description = "There is no such decision"),
    )
)]
async fn show(
    caller: Caller,
    State(faces): State<Faces>,
    Named(decision): Named,
) -> Result<Json<DecisionRecorded>, Problem> {
    let appended = records::find(&faces, &caller, &decision).await?;
    Ok(Json(DecisionRecorded::of(appended)))
}

/// Show the evidence of a decision: the one line of JSON that `coalmine judge` reads.
#[utoipa::path(
    get,
    path = "/v1/decisions/{decision}/evidence",
    tag = "decisions",
    params(("decision" = String, Path, description = "The decision, as the gate names it")),
    responses(
        (status = 200, description = "The evidence", body = serde_json::Value, content_type = "application/json"),
        (status = 404, description = "There is no such decision, or it rests on no evidence"),
    )
)]
async fn evidence(
    caller: Caller,
    State(faces): State<Faces>,
    Named(decision): Named,
) -> Result<impl IntoResponse, Problem> {
    let appended = records::find(&faces, &caller, &decision).await?;
    let Body::Decision(judged) = appended.record.body else {
        return Err(Problem::not_found(format!(
            "{decision} is not the judge's decision and rests on no evidence; its record says who decided and why"
        )));
    };
    let ledger = faces.ledger.clone();
    let text = tokio::task::spawn_blocking(move || ledger.blobs().text(&judged.evidence)).await;
    match text {
        Ok(Ok(text)) => Ok(([(header::CONTENT_TYPE, "application/json")], text)),
        Ok(Err(error)) => Err(Problem::internal("the evidence cannot be read", &error)),
        Err(error) => Err(Problem::internal("the evidence cannot be read", &error)),
    }
}

/// Prove that a decision is in the log, in the text form of C2SP tlog-proof, against the latest checkpoint.
#[utoipa::path(
    get,
    path = "/v1/decisions/{decision}/proof",
    tag = "decisions",
    params(("decision" = String, Path, description = "The decision, as the gate names it")),
    responses(
        (status = 200, description = "The proof", body = String, content_type = "text/plain"),
        (status = 404, description = "There is no such decision"),
        (status = 503, description = "No checkpoint covers the decision yet; ask again"),
    )
)]
async fn proof(
    caller: Caller,
    State(faces): State<Faces>,
    Named(decision): Named,
) -> Result<impl IntoResponse, Problem> {
    records::find(&faces, &caller, &decision).await?;
    let proof = records::proof_of(&faces, &decision).await?;
    Ok(([(header::CONTENT_TYPE, super::TEXT)], proof.to_string()))
}

/// A decision that was judged again.
#[derive(Debug, Serialize, ToSchema)]
struct DecisionReplayed {
    decision: String,
    /// Whether the bytes are the same.
    same: bool,
    /// What is different, if they are not.
    problem: Option<String>,
}

/// Judge a decision again from what it rests on, and compare the bytes.
#[utoipa::path(
    post,
    path = "/v1/decisions/{decision}/replay",
    tag = "decisions",
    params(("decision" = String, Path, description = "The decision, as the gate names it")),
    responses(
        (status = 200, description = "Whether it is the same", body = DecisionReplayed),
        (status = 404, description = "There is no such decision"),
        (status = 409, description = "It is not the judge's decision"),
    )
)]
async fn replay(
    caller: Caller,
    State(faces): State<Faces>,
    Named(decision): Named,
) -> Result<Json<DecisionReplayed>, Problem> {
    let appended = records::find(&faces, &caller, &decision).await?;
    let Body::Decision(judged) = appended.record.body else {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            format!("{decision} is not the judge's decision, so it cannot be judged again"),
        ));
    };
    let ledger = faces.ledger.clone();
    let again = tokio::task::spawn_blocking(move || replay_decision(&judged, ledger.blobs()).err()).await;
    let problem = again.map_err(|error| Problem::internal("the decision cannot be judged again", &error))?;
    Ok(Json(DecisionReplayed {
        decision,
        same: problem.is_none(),
        problem,
    }))
}
