//! Records of the decision log, read for an answer: beside the runtime, since a log may be on a slow disk.

use axum::http::StatusCode;
use coalmine_judge::{
    note::Proof,
    record::{Body, Record},
};

use crate::{
    access::{Caller, Scope},
    faces::{Faces, problem::Problem},
    ledger::Appended,
};

/// What a service is taken for that nothing tells any more. No service has this name, so only those may see what is
/// about it who may see what is about every service.
const UNKNOWN: &str = "?";

/// That no decision has this name.
pub(super) fn no_decision(id: &str) -> Problem {
    Problem::not_found(format!(
        "there is no decision {id:?}; the gate names the one that is in force, and GET /v1/decisions lists the judge's"
    ))
}

/// The record at a position.
pub(super) async fn read(faces: &Faces, seq: u64) -> Result<Appended, Problem> {
    let ledger = faces.ledger.clone();
    match tokio::task::spawn_blocking(move || ledger.read(seq)).await {
        Ok(Ok(Some(appended))) => Ok(appended),
        Ok(Ok(None)) => Err(Problem::not_found(format!("there is no record {seq}"))),
        Ok(Err(error)) => Err(Problem::internal("the decision log cannot be read", &error)),
        Err(error) => Err(Problem::internal("the decision log cannot be read", &error)),
    }
}

/// The record of a decision, if the caller may see decisions on its service.
pub(super) async fn find(faces: &Faces, caller: &Caller, id: &str) -> Result<Appended, Problem> {
    caller.may(Scope::Audit, "")?;
    let seq = faces.ledger.index().decision(id);
    let appended = read(faces, seq.ok_or_else(|| no_decision(id))?).await?;
    caller.may(Scope::Audit, &service_of(faces, &appended.record).await?)?;
    Ok(appended)
}

/// The service that a decision is about. A decision that is not the judge's names its rollout alone; where that is no
/// longer kept, one of the judge's decisions on it says more.
async fn service_of(faces: &Faces, record: &Record) -> Result<String, Problem> {
    let rollout = match &record.body {
        Body::Decision(decision) => return Ok(decision.service.clone()),
        Body::Override(change) => &change.rollout,
        Body::Bootstrap(bootstrap) => &bootstrap.rollout,
        _ => return Ok(UNKNOWN.to_owned()),
    };
    if let Ok(view) = faces.rollouts.view(rollout) {
        return Ok(view.service.clone());
    }
    let last = faces.ledger.index().decisions(Some(rollout)).last().copied();
    let Some(seq) = last else {
        return Ok(UNKNOWN.to_owned());
    };
    match read(faces, seq).await?.record.body {
        Body::Decision(decision) => Ok(decision.service),
        _ => Ok(UNKNOWN.to_owned()),
    }
}

/// The proof that a decision is in the log, against the latest checkpoint.
pub(super) async fn proof_of(faces: &Faces, id: &str) -> Result<Proof, Problem> {
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
