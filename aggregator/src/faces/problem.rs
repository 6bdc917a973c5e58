//! Errors as RFC 9457 problem documents.

use axum::{
    Json,
    extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::admit::request_id;
use crate::{access::Denied, rollouts::RolloutError};

/// Longest detail, in bytes. What callers send stands in some.
const MAX_DETAIL_BYTES: usize = 512;

/// What stands in the place of the rest of a detail.
const ELLIPSIS: char = '…';

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
    /// After so many seconds the caller may ask again; a header says so.
    #[serde(skip)]
    retry_after: Option<u64>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let problem = Self {
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or("error"),
            status: status.as_u16(),
            detail: cut(detail.into()),
            request_id: request_id(),
            retry_after: None,
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
        // Whoever asks what makes no sense, or without a right, must not be able to fill the log.
        if *status < 500 {
            tracing::debug!(status, detail, request_id, "request refused");
        } else {
            tracing::info!(status, detail, request_id, "request refused");
        }
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// The caller has to wait for so many seconds.
    pub(super) fn too_many(detail: impl Into<String>, seconds: u64) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, detail)
        }
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

/// The beginning of a detail that is too long.
fn cut(mut detail: String) -> String {
    if detail.len() > MAX_DETAIL_BYTES {
        detail.truncate(detail.floor_char_boundary(MAX_DETAIL_BYTES - ELLIPSIS.len_utf8()));
        detail.push(ELLIPSIS);
    }
    detail
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

/// What a request gives that cannot be read: axum says what is wrong with it.
macro_rules! from_rejections {
    ($($rejection:ty),+) => {$(
        impl From<$rejection> for Problem {
            fn from(rejection: $rejection) -> Self {
                Self::new(rejection.status(), rejection.body_text())
            }
        }
    )+};
}

from_rejections!(BytesRejection, JsonRejection, PathRejection, QueryRejection);

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
        let retry_after = self.retry_after;
        let mut response = (status, Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_is_cut_between_characters() {
        for (text, kept) in [
            (String::new(), None),
            ("x".repeat(512), None),
            ("x".repeat(513), Some(509)),
            ("x".repeat(60_000), Some(509)),
            // 170 characters are 510 bytes.
            ("€".repeat(171), Some(507)),
        ] {
            let problem = Problem::new(StatusCode::BAD_REQUEST, text.clone());
            let wanted = kept.map_or_else(|| text.clone(), |kept| format!("{}…", &text[..kept]));
            assert_eq!(problem.detail, wanted, "{} bytes", text.len());
            assert!(problem.detail.len() <= MAX_DETAIL_BYTES);
        }
    }

    #[test]
    fn one_who_has_to_wait_is_told_how_long() {
        let response = Problem::too_many("too fast", 3).into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "3");
        let response = Problem::not_found("nothing").into_response();
        assert!(!response.headers().contains_key(header::RETRY_AFTER));
    }
}
