//! Errors as RFC 9457 problem documents.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::admit::request_id;
use crate::{access::Denied, rollouts::RolloutError};

/// An error for the caller. What only the operator may know goes to the log instead.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Problem {
    r#type: &'static str,
    title: &'static str,
    status: u16,
    /// What was wrong and what to do.
    detail: String,
    /// Stands in the server's log too.
    request_id: String,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let problem = Self {
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or("error"),
            status: status.as_u16(),
            detail: detail.into(),
            request_id: request_id(),
        };
        problem.log();
        problem
    }

    fn log(&self) {
        let Self {
            status,
            detail,
            request_id,
            ..
        } = self;
        // Whoever knocks without a right must not be able to fill the log.
        if matches!(
            StatusCode::from_u16(*status),
            Ok(StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS)
        ) {
            tracing::debug!(status, detail, request_id, "request refused");
        } else {
            tracing::info!(status, detail, request_id, "request refused");
        }
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// An error that is ours: the cause goes to the log, the caller gets the request's id.
    pub(super) fn internal(what: &str, cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, what, "request failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{what}; the server's log says why"),
        )
    }
}

impl From<RolloutError> for Problem {
    fn from(error: RolloutError) -> Self {
        let status = match &error {
            RolloutError::Invalid(_) => StatusCode::BAD_REQUEST,
            RolloutError::NotFound(_) => StatusCode::NOT_FOUND,
            RolloutError::Conflict(_) => StatusCode::CONFLICT,
            RolloutError::Append(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<Denied> for Problem {
    fn from(denied: Denied) -> Self {
        let status = match &denied {
            Denied::Unknown(_) => StatusCode::UNAUTHORIZED,
            Denied::Forbidden(_) => StatusCode::FORBIDDEN,
        };
        Self::new(status, denied.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        response
    }
}
