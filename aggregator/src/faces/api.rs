//! The JSON API.

use std::time::Duration;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path, Query, State, rejection::JsonRejection, rejection::QueryRejection},
    http::{StatusCode, header},
    response::IntoResponse,
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_judge::{
    note::Proof,
    record::{Body, Record},
    replay::replay_decision,
};
use coalmine_proto::names::Outcome;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Faces, flagger, problem::Problem};
use crate::{
    book::{Comparison, locked},
    clock,
    ledger::Appended,
    rollouts::{StartRequest, View},
};

const TEXT: &str = "text/plain; charset=utf-8";

/// Largest body of a request, in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;

/// How long a request waits for the decision log.
const RECORD_WITHIN: Duration = Duration::from_secs(10);

/// How long an answer waits for what goes with it and can be left out: the gate's proof, a record.
const PROVE_WITHIN: Duration = Duration::from_secs(1);

/// Most records of what was done outside in one answer.
const MAX_ACTUATIONS: usize = 20;

/// Most decisions in one answer.
const MAX_LIMIT: usize = 1_000;

/// The API's routes.
pub fn api(faces: Faces) -> Router {
    Router::new()
        .route("/v1/rollouts", post(start).get(list))
        .route("/v1/rollouts/{id}", get(rollout))
        .route("/v1/rollouts/{id}/gate", get(gate))
        .route("/v1/rollouts/{id}/end", post(end))
        .route("/v1/decisions", get(decisions))
        .route("/v1/decisions/{id}", get(decision))
        .route("/v1/decisions/{id}/evidence", get(evidence))
        .route("/v1/decisions/{id}/proof", get(proof))
        .route("/v1/decisions/{id}/replay", post(replay))
        .route("/v1/audit/checkpoint", get(checkpoint))
        .route("/v1/audit/consistency", get(consistency))
        .route("/v1/services/{service}", get(service))
        .route("/gate/check", post(flagger::gate))
        .route("/rollback/check", post(flagger::rollback))
        .fallback(|| async {
            Problem::not_found("there is no such route; the API is under /v1/rollouts and /v1/decisions")
        })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this route does not have that method",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(faces)
}

async fn start(
    State(faces): State<Faces>,
    request: Result<Json<StartRequest>, JsonRejection>,
) -> Result<impl IntoResponse, Problem> {
    let Json(request) = request.map_err(|error| Problem::new(error.status(), error.body_text()))?;
    let version = request.canary_version.clone();
    // A caller that goes away must not leave half a start behind.
    let rollouts = faces.rollouts.clone();
    let started = tokio::spawn(async move { rollouts.start(request).await });
    let (view, new) = recorded("the rollout cannot be started", started).await??;
    let warnings = missing_version(&faces, &view.service, &version);
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    let location = format!("/v1/rollouts/{}", view.id);
    let mut body = to_value(&*view)?;
    if let Value::Object(fields) = &mut body {
        fields.insert("warnings".to_owned(), json!(warnings));
    }
    Ok((status, [(header::LOCATION, location)], Json(body)))
}

/// Waits for what is recorded on the way, but not without end: a database may be away.
async fn recorded<T>(what: &str, work: tokio::task::JoinHandle<T>) -> Result<T, Problem> {
    match tokio::time::timeout(RECORD_WITHIN, work).await {
        Ok(done) => done.map_err(|error| Problem::internal(what, &error)),
        Err(_) => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "{what} yet: the decision log has not answered within {} s; it may still be done, so ask again, with the \
                 same key",
                RECORD_WITHIN.as_secs()
            ),
        )),
    }
}

/// A hint where agents of the service are connected, but none of this version.
fn missing_version(faces: &Faces, service: &str, version: &str) -> Vec<String> {
    let book = locked(&faces.ingest.book);
    let Some(service) = book.get(service) else {
        return vec!["no agent of this service has connected yet".to_owned()];
    };
    let canaries: Vec<_> = service
        .agents()
        .filter(|(_, agent)| agent.build.arm == coalmine_proto::names::Arm::Canary && !agent.gone)
        .map(|(_, agent)| agent.build.version.as_str())
        .collect();
    if canaries.contains(&version) {
        return Vec::new();
    }
    let mut seen = canaries;
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

async fn list(State(faces): State<Faces>) -> Result<Json<Value>, Problem> {
    let views = faces.rollouts.list();
    let rollouts: Result<Vec<_>, _> = views.iter().map(|view| to_value(&**view)).collect();
    Ok(Json(json!({ "rollouts": rollouts? })))
}

async fn rollout(State(faces): State<Faces>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    let view = faces.rollouts.view(&id)?;
    let mut body = to_value(&*view)?;
    if let Value::Object(fields) = &mut body {
        fields.insert("agents".to_owned(), agents(&faces, &view));
        fields.insert("arms".to_owned(), arms(&faces, &view));
        fields.insert("actuations".to_owned(), actuations(&faces, &view.id).await?);
    }
    Ok(Json(body))
}

/// What was done outside last, oldest first; null where the log cannot be read now, which hides nothing else.
async fn actuations(faces: &Faces, rollout: &str) -> Result<Value, Problem> {
    let positions = {
        let index = faces.ledger.index();
        let all = index.actuations(rollout);
        all[all.len().saturating_sub(MAX_ACTUATIONS)..].to_vec()
    };
    let (until, mut told) = (tokio::time::Instant::now() + PROVE_WITHIN, Vec::new());
    for position in positions {
        let Ok(Ok(appended)) = tokio::time::timeout_at(until, read(faces, position)).await else {
            return Ok(Value::Null);
        };
        let record = appended.record;
        if let Body::Actuation(actuation) = record.body {
            let mut fields = to_value(&actuation)?;
            fields["at"] = json!(clock::rfc3339(record.time_ms));
            told.push(fields);
        }
    }
    Ok(Value::Array(told))
}

fn agents(faces: &Faces, view: &View) -> Value {
    let book = locked(&faces.ingest.book);
    let agents = book
        .get(&view.service)
        .into_iter()
        .flat_map(|service| service.agents());
    let agents = agents.map(|(instance, agent)| {
        json!({
            "instance": instance,
            "arm": agent.build.arm.as_str(),
            "version": agent.build.version,
            "connected": agent.connected,
            "ended": agent.gone,
            "durable_seq": agent.durable_seq,
        })
    });
    agents.collect()
}

/// The pods and pools of both arms at present: context that is not judged.
fn arms(faces: &Faces, view: &View) -> Value {
    let comparison = Comparison {
        service: view.service.clone(),
        canary_version: view.canary_version.clone(),
        baseline_version: view.baseline_version.clone(),
    };
    let [canary, baseline] = locked(&faces.ingest.book).contexts(&comparison, clock::now_ms());
    json!({ "canary": canary, "baseline": baseline })
}

/// What deploy tools poll.
#[derive(Debug, Serialize)]
struct Gate<'a> {
    verdict: &'a str,
    score: f64,
    decision_id: Option<&'a str>,
    reason: &'a str,
    worst_tenant: Option<&'a str>,
    score_ppm: u32,
    decision_hash: Option<&'a str>,
    recorded: bool,
    state: crate::rollouts::State,
    /// The decision's record as it stands in the log, and the proof that it does; only if they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    proof: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct GateQuery {
    #[serde(default)]
    proof: bool,
}

async fn gate(
    State(faces): State<Faces>,
    Path(id): Path<String>,
    query: Result<Query<GateQuery>, QueryRejection>,
) -> Result<impl IntoResponse, Problem> {
    let Query(query) = query.map_err(|error| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            format!("{error}; the only parameter is proof, true or false"),
        )
    })?;
    let view = faces.rollouts.view(&id)?;
    // The verdict does not wait for its proof.
    let decision = view
        .decision_id
        .as_deref()
        .filter(|_| query.proof && view.recorded);
    let proof = match decision {
        Some(decision) => {
            let proof = tokio::time::timeout(PROVE_WITHIN, proof_of(&faces, decision)).await;
            proof.ok().and_then(Result::ok)
        }
        None => None,
    };
    let line = proof.as_ref().and_then(|proof| proof.extra.clone());
    let gate = Gate {
        verdict: &view.verdict,
        score: view.score,
        decision_id: view.decision_id.as_deref(),
        reason: &view.reason,
        worst_tenant: view.worst_tenant.as_deref(),
        score_ppm: view.score_ppm,
        decision_hash: view.decision_hash.as_deref(),
        recorded: view.recorded,
        state: view.state,
        record: line.and_then(|line| String::from_utf8(line).ok()),
        proof: proof.map(|proof| proof.to_string()),
    };
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(to_value(&gate)?)))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndRequest {
    actor: Option<String>,
    reason: Option<String>,
}

async fn end(
    State(faces): State<Faces>,
    Path(id): Path<String>,
    body: axum::body::Bytes,
) -> Result<Json<Value>, Problem> {
    let request: EndRequest = if body.is_empty() {
        EndRequest::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| {
            Problem::new(StatusCode::BAD_REQUEST, format!("the body is not valid: {error}"))
        })?
    };
    for (field, text) in [("actor", &request.actor), ("reason", &request.reason)] {
        if text.as_ref().is_some_and(|text| text.len() > 1_000) {
            return Err(Problem::new(
                StatusCode::BAD_REQUEST,
                format!("{field} has more than 1000 bytes"),
            ));
        }
    }
    let actor = request.actor.unwrap_or_else(|| "api".to_owned());
    let reason = request.reason.unwrap_or_else(|| "ended by request".to_owned());
    let rollouts = faces.rollouts.clone();
    let ended = tokio::spawn(async move { rollouts.end(&id, actor, reason).await });
    let view = recorded("the rollout cannot be ended", ended).await??;
    Ok(Json(to_value(&*view)?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DecisionsQuery {
    rollout: Option<String>,
    limit: Option<usize>,
}

async fn decisions(
    State(faces): State<Faces>,
    query: Result<Query<DecisionsQuery>, QueryRejection>,
) -> Result<Json<Value>, Problem> {
    let Query(query) = query.map_err(|error| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            format!("{error}; the parameters are rollout and limit"),
        )
    })?;
    let limit = query.limit.unwrap_or(100).min(MAX_LIMIT);
    let seqs = faces.ledger.index().decisions(query.rollout.as_deref());
    let mut decisions = Vec::new();
    for seq in seqs.into_iter().rev().take(limit) {
        decisions.push(in_answer(&read(&faces, seq).await?)?);
    }
    Ok(Json(json!({ "decisions": decisions })))
}

async fn decision(State(faces): State<Faces>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    Ok(Json(in_answer(&find(&faces, &id).await?)?))
}

async fn evidence(State(faces): State<Faces>, Path(id): Path<String>) -> Result<impl IntoResponse, Problem> {
    let appended = find(&faces, &id).await?;
    let Record {
        body: Body::Decision(decision),
        ..
    } = appended.record
    else {
        return Err(no_decision(&id));
    };
    let ledger = faces.ledger.clone();
    let text = tokio::task::spawn_blocking(move || ledger.blobs().text(&decision.evidence)).await;
    match text {
        Ok(Ok(text)) => Ok(([(header::CONTENT_TYPE, "application/json")], text)),
        Ok(Err(error)) => Err(Problem::internal("the evidence cannot be read", &error)),
        Err(error) => Err(Problem::internal("the evidence cannot be read", &error)),
    }
}

/// Judges a decision again from what it rests on, and says whether the bytes are the same.
async fn replay(State(faces): State<Faces>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    let appended = find(&faces, &id).await?;
    let Body::Decision(decision) = appended.record.body else {
        return Err(no_decision(&id));
    };
    let ledger = faces.ledger.clone();
    let replayed =
        tokio::task::spawn_blocking(move || replay_decision(&decision, ledger.blobs()).err()).await;
    let problem =
        replayed.map_err(|error| Problem::internal("the decision cannot be judged again", &error))?;
    Ok(Json(
        json!({ "decision": id, "same": problem.is_none(), "problem": problem }),
    ))
}

/// A proof in the text form of C2SP tlog-proof, against the latest checkpoint.
async fn proof(State(faces): State<Faces>, Path(id): Path<String>) -> Result<impl IntoResponse, Problem> {
    let kind = [(header::CONTENT_TYPE, TEXT)];
    Ok((kind, proof_of(&faces, &id).await?.to_string()))
}

async fn proof_of(faces: &Faces, id: &str) -> Result<Proof, Problem> {
    let seq = faces.ledger.index().decision(id);
    let seq = seq.ok_or_else(|| no_decision(id))?;
    let ledger = faces.ledger.clone();
    match tokio::task::spawn_blocking(move || ledger.proof(seq)).await {
        Ok(Ok(Some(proof))) => Ok(proof),
        Ok(Ok(None)) => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "no checkpoint covers this decision yet, because the last one could not be written; ask again",
        )),
        Ok(Err(error)) => Err(Problem::internal("the proof cannot be made", &error)),
        Err(error) => Err(Problem::internal("the proof cannot be made", &error)),
    }
}

/// The latest checkpoint, as a signed note.
async fn checkpoint(State(faces): State<Faces>) -> Result<impl IntoResponse, Problem> {
    let published = faces.ledger.checkpoint();
    let published = published.ok_or_else(|| {
        let detail = "no checkpoint was written yet, because the decision log cannot be written; ask again";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    })?;
    Ok((
        [(header::CONTENT_TYPE, TEXT), (header::CACHE_CONTROL, "no-store")],
        published.note,
    ))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsistencyQuery {
    from: u64,
    to: u64,
}

/// Proof that a shorter log is the beginning of a longer one (RFC 6962 section 2.1.2).
async fn consistency(
    State(faces): State<Faces>,
    query: Result<Query<ConsistencyQuery>, QueryRejection>,
) -> Result<Json<Value>, Problem> {
    let Query(ConsistencyQuery { from, to }) = query.map_err(|error| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            format!("{error}; the parameters are from and to, two numbers of records"),
        )
    })?;
    let path = faces.ledger.consistency(from, to).ok_or_else(|| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            format!(
                "from {from} to {to} is no growth of this log; the checkpoint says how many records it has"
            ),
        )
    })?;
    let path: Vec<String> = path.iter().map(|hash| STANDARD.encode(hash.0)).collect();
    Ok(Json(json!({ "from": from, "to": to, "path": path })))
}

fn no_decision(id: &str) -> Problem {
    Problem::not_found(format!(
        "there is no decision {id:?}; GET /v1/decisions lists them"
    ))
}

async fn find(faces: &Faces, id: &str) -> Result<Appended, Problem> {
    let seq = faces.ledger.index().decision(id);
    read(faces, seq.ok_or_else(|| no_decision(id))?).await
}

async fn read(faces: &Faces, seq: u64) -> Result<Appended, Problem> {
    let ledger = faces.ledger.clone();
    match tokio::task::spawn_blocking(move || ledger.read(seq)).await {
        Ok(Ok(Some(appended))) => Ok(appended),
        Ok(Ok(None)) => Err(Problem::not_found(format!("there is no record {seq}"))),
        Ok(Err(error)) => Err(Problem::internal("the decision log cannot be read", &error)),
        Err(error) => Err(Problem::internal("the decision log cannot be read", &error)),
    }
}

/// A record with its hash and the summary that readers of an execution log expect.
fn in_answer(appended: &Appended) -> Result<Value, Problem> {
    let hash = appended.hash.to_string();
    let Body::Decision(decision) = &appended.record.body else {
        return Ok(json!({ "record": to_value(&appended.record)?, "hash": hash }));
    };
    let total_us: u64 = decision.steps.iter().map(|step| step.duration_us).sum();
    Ok(json!({
        "record": to_value(&appended.record)?,
        "hash": hash,
        "timestamp": clock::rfc3339(appended.record.time_ms),
        "summary": {
            "total_duration_ms": total_us / 1_000,
            "tenants_checked": decision.finding.tenants_checked,
            "health_score": f64::from(decision.finding.score_ppm) / 1e6,
            "rollout_decision": decision.finding.verdict,
            "anomalies_detected": decision.finding.anomalies_detected,
            "audit_hash": hash,
        },
    }))
}

/// What the book holds of a service since the beginning: the other half of every conservation check.
async fn service(State(faces): State<Faces>, Path(name): Path<String>) -> Result<Json<Value>, Problem> {
    let book = locked(&faces.ingest.book);
    let Some(service) = book.get(&name) else {
        return Err(Problem::not_found(format!(
            "no agent of service {name:?} has connected"
        )));
    };
    let mut totals = Vec::new();
    for (build, tenant, outcomes) in service.totals().filter(|(_, _, outcomes)| !outcomes.is_empty()) {
        let counts: serde_json::Map<_, _> = Outcome::ALL
            .into_iter()
            .map(|outcome| (outcome.as_str().to_owned(), json!(outcomes.get(outcome))))
            .collect();
        totals.push(json!({
            "arm": build.arm.as_str(),
            "version": build.version,
            "tenant": tenant.as_str(),
            "outcomes": counts,
        }));
    }
    let gaps: serde_json::Map<_, _> = coalmine_proto::names::Arm::ALL
        .into_iter()
        .map(|arm| {
            let (_, gap, late) = service.arm_totals(arm);
            (
                arm.as_str().to_owned(),
                json!({ "gap_requests": gap, "late_requests": late }),
            )
        })
        .collect();
    let (windows, _, duplicates) = service.received();
    Ok(Json(
        json!({ "service": name, "windows": windows, "duplicates": duplicates, "totals": totals, "arms": gaps }),
    ))
}

fn to_value(value: &impl Serialize) -> Result<Value, Problem> {
    serde_json::to_value(value).map_err(|error| Problem::internal("the answer cannot be written", &error))
}
