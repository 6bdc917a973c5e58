//! The gates that Flagger asks, at the paths of its own load tester, so that a Canary needs another host and no more.
//!
//! ```text
//!                    APPROVE   HOLD   ROLLBACK   no rollout
//! /gate/check        200       403    403        503          confirm-promotion
//! /rollback/check    403       403    200        503          rollback
//! ```
//!
//! Flagger sends the Canary's name and namespace; asked for is the rollout that names this Canary as its workload. It
//! shows a refusal's text for some hooks only, so the reason is in the Canary's Events as well (`effects`). Nothing but
//! 200 and 403 is a verdict: on anything else Flagger waits, and does not roll back.

use axum::{
    Json,
    extract::{State, rejection::JsonRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use coalmine_judge::v1::Verdict;
use serde::Deserialize;

use super::{Faces, problem::Problem};
use crate::rollouts::{State as RolloutState, View};

/// What Flagger says of a Canary; it sends more.
#[derive(Debug, Deserialize)]
pub(super) struct Canary {
    name: String,
    namespace: String,
}

/// Whether the Canary may be promoted.
pub(super) async fn gate(
    State(faces): State<Faces>,
    canary: Result<Json<Canary>, JsonRejection>,
) -> Result<Response, Problem> {
    answer(&faces, canary, Verdict::Approve)
}

/// Whether it has to go back.
pub(super) async fn rollback(
    State(faces): State<Faces>,
    canary: Result<Json<Canary>, JsonRejection>,
) -> Result<Response, Problem> {
    answer(&faces, canary, Verdict::Rollback)
}

fn answer(
    faces: &Faces,
    canary: Result<Json<Canary>, JsonRejection>,
    opens: Verdict,
) -> Result<Response, Problem> {
    let Json(canary) = canary.map_err(|error| Problem::new(error.status(), error.body_text()))?;
    let views = faces.rollouts.list();
    let view = views.iter().find(|view| is_of(view, &canary)).ok_or_else(|| {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "no rollout of the Canary {}/{} is open; start one with --workload Canary/{0}/{1}",
                canary.namespace, canary.name
            ),
        )
    })?;
    let status = if view.verdict == opens.as_str() {
        StatusCode::OK
    } else {
        StatusCode::FORBIDDEN
    };
    let decision = view.decision_id.as_deref().unwrap_or(&view.id);
    let text = format!("{} ({decision}): {}\n", view.verdict, view.reason);
    Ok((
        status,
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
        text,
    )
        .into_response())
}

fn is_of(view: &View, canary: &Canary) -> bool {
    view.state != RolloutState::Ended
        && view.workload.as_ref().is_some_and(|workload| {
            workload.kind == "Canary"
                && workload.name == canary.name
                && workload.namespace == canary.namespace
        })
}
