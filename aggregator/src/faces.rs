//! The HTTP faces. Each answer is a read of what was last published; polls write nothing.
//!
//! Every face is a router that brings its own part of the OpenAPI document, so that no route is without; `admit` stands
//! before all of them and says who asks.

mod admin;
mod admit;
mod api;
mod flagger;
mod kayenta;
mod openapi;
mod problem;
mod prometheus;
mod recorded;

use std::sync::{Arc, MutexGuard};

use axum::{Router, extract::DefaultBodyLimit, http::StatusCode, middleware};
use tokio::{sync::watch, task::block_in_place};
use utoipa_axum::router::OpenApiRouter;

pub use self::{admin::admin, flagger::Attempts};
use self::{admit::admit, problem::Problem};
use crate::{
    access::Access,
    book::{Book, locked},
    ingest::Ingest,
    ledger::Ledger,
    metrics::Metrics,
    rollouts::Rollouts,
};

/// Largest body of a request, in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;

/// What the faces read.
#[derive(Debug, Clone)]
pub struct Faces {
    /// The rollouts.
    pub rollouts: Rollouts,
    /// The decision log.
    pub ledger: Ledger,
    /// The agents' windows.
    pub ingest: Ingest,
    /// What Prometheus scrapes.
    pub metrics: Arc<Metrics>,
    /// Who may ask.
    pub access: Arc<Access>,
    /// What is remembered of Flagger's Canaries.
    pub flagger: Arc<Attempts>,
    /// Says when the server stops, so that what is endless ends.
    pub stopping: watch::Receiver<bool>,
}

impl Faces {
    /// The book. Whoever waits for it, as for ten thousand tenants that are counted, keeps nobody else from being answered.
    fn book(&self) -> MutexGuard<'_, Book> {
        match self.ingest.book.try_lock() {
            Ok(book) => book,
            Err(_) => block_in_place(|| locked(&self.ingest.book)),
        }
    }
}

/// All that tools and people ask.
pub fn api(faces: Faces) -> Router {
    let (access, metrics) = (Arc::clone(&faces.access), Arc::clone(&faces.metrics));
    let (router, document) = routes().split_for_parts();
    let router = router
        .merge(openapi::route(document))
        .fallback(|| async {
            Problem::not_found("there is no such route; /openapi.json lists all that there are")
        })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this route does not have that method",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(faces);
    // What the door says itself is in the envelope of the face that was asked, too.
    admit(access, metrics, router)
        .layer(middleware::from_fn(prometheus::as_envelope))
        .layer(middleware::from_fn(kayenta::with_message))
}

fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::with_openapi(openapi::outline())
        .merge(api::routes())
        .merge(flagger::routes())
        .merge(prometheus::routes())
        .merge(kayenta::routes())
}
