//! The admin port: health and metrics.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::task::block_in_place;

use super::Faces;

/// `/livez`, `/readyz` and `/metrics`.
pub fn admin(faces: Faces) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(faces)
}

/// Not ready while the log takes no records, since nothing is approved then. HOLD and ROLLBACK can still be asked for.
async fn ready(State(faces): State<Faces>) -> (StatusCode, String) {
    match faces.ledger.trouble() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(why) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("nothing is approved: {why}\n"),
        ),
    }
}

async fn metrics(State(faces): State<Faces>) -> impl IntoResponse {
    // Ten thousand tenants take a while, and nobody else is to wait for them.
    match block_in_place(|| faces.metrics.render()) {
        Ok(text) => (
            StatusCode::OK,
            [(header::CONTENT_TYPE, coalmine_proto::exposition::CONTENT_TYPE)],
            text,
        )
            .into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
