//! What a request gives: the name in its path, its parameters, its body. What is wrong with them is a problem document.

use axum::{
    Json,
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;

use crate::faces::problem::Problem;

/// The name in the path.
#[derive(Debug)]
pub(super) struct Named(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(name) = Path::<String>::from_request_parts(parts, state).await?;
        Ok(Self(name))
    }
}

/// Parameters that a query may have.
pub(super) trait Parameters: DeserializeOwned {
    /// Which there are, as the end of a sentence that refuses others.
    const WHICH: &'static str;
}

/// The parameters in the query.
#[derive(Debug)]
pub(super) struct Asked<P>(pub(super) P);

impl<S: Send + Sync, P: Parameters> FromRequestParts<S> for Asked<P> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let parameters = Query::<P>::from_request_parts(parts, state).await;
        let Query(parameters) = parameters.map_err(|error| {
            let detail = format!("{}; {}", error.body_text(), P::WHICH);
            Problem::new(StatusCode::BAD_REQUEST, detail)
        })?;
        Ok(Self(parameters))
    }
}

/// The body, as JSON.
#[derive(Debug)]
pub(super) struct Given<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Given<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let Json(given) = Json::<T>::from_request(request, state).await?;
        Ok(Self(given))
    }
}

/// A body, as JSON, that may be left out.
#[derive(Debug)]
pub(super) struct MaybeGiven<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for MaybeGiven<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let body = Bytes::from_request(request, state).await?;
        if body.is_empty() {
            return Ok(Self(T::default()));
        }
        let Json(given) = Json::<T>::from_bytes(&body)?;
        Ok(Self(given))
    }
}
