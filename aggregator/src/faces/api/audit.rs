//! The decision log as a whole: how long it is, and that it only grows.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::input::{Asked, Parameters};
use crate::{
    access::{Caller, Scope},
    faces::{Faces, problem::Problem},
};

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default()
        .routes(routes!(checkpoint))
        .routes(routes!(consistency))
}

/// Show the latest checkpoint, as a signed note.
#[utoipa::path(
    get,
    path = "/v1/audit/checkpoint",
    tag = "decisions",
    responses(
        (status = 200, description = "The checkpoint", body = String, content_type = "text/plain"),
        (status = 503, description = "No checkpoint was written yet; ask again"),
    )
)]
async fn checkpoint(caller: Caller, State(faces): State<Faces>) -> Result<impl IntoResponse, Problem> {
    caller.may(Scope::Audit, "")?;
    let published = faces.ledger.checkpoint();
    let published = published.ok_or_else(|| {
        let detail = "no checkpoint was written yet, because the decision log cannot be written; ask again";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    })?;
    Ok((
        [
            (header::CONTENT_TYPE, super::TEXT),
            (header::CACHE_CONTROL, "no-store"),
        ],
        published.note,
    ))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct Growth {
    /// Records of the shorter log.
    from: u64,
    /// Records of the longer one.
    to: u64,
}

impl Parameters for Growth {
    const WHICH: &'static str = "the parameters are from and to, two numbers of records";
}

/// Proof that a shorter log is the beginning of a longer one.
#[derive(Debug, Serialize, ToSchema)]
struct Consistency {
    from: u64,
    to: u64,
    /// Hashes in base64, in the order of RFC 6962 section 2.1.2.
    path: Vec<String>,
}

/// Prove that a shorter log is the beginning of a longer one, as in RFC 6962 section 2.1.2.
#[utoipa::path(
    get,
    path = "/v1/audit/consistency",
    tag = "decisions",
    params(Growth),
    responses((status = 200, description = "The proof", body = Consistency))
)]
async fn consistency(
    caller: Caller,
    State(faces): State<Faces>,
    Asked(growth): Asked<Growth>,
) -> Result<Json<Consistency>, Problem> {
    caller.may(Scope::Audit, "")?;
    let Growth { from, to } = growth;
    let path = faces.ledger.consistency(from, to).ok_or_else(|| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            format!(
                "from {from} to {to} is no growth of this log; the checkpoint says how many records it has"
            ),
        )
    })?;
    let path = path.iter().map(|hash| STANDARD.encode(hash.0)).collect();
    Ok(Json(Consistency { from, to, path }))
}
