//! The admin port: health and metrics.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};

use super::Faces;

/// `/livez`, `/readyz` and `/metrics`.
pub fn admin(faces: Faces) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(faces)
}

/// Ready also while the log cannot be written: HOLD and ROLLBACK must be readable then, and agents connected.
async fn ready(State(faces): State<Faces>) -> &'static str {
    if faces.ledger.is_writable() {
        "ok\n"
    } else {
        "ok, but the decision log cannot be written: nothing is approved\n"
    }
}

async fn metrics(State(faces): State<Faces>) -> impl IntoResponse {
    match faces.metrics.render() {
        Ok(text) => (
            StatusCode::OK,
            [(header::CONTENT_TYPE, coalmine_proto::exposition::CONTENT_TYPE)],
            text,
        )
            .into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
