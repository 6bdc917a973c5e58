//! The HTTP faces. Each answer is a read of what was last published; polls write nothing.

mod admin;
mod api;
mod flagger;
mod problem;

pub use self::{admin::admin, api::api};

use crate::{ingest::Ingest, ledger::Ledger, metrics::Metrics, rollouts::Rollouts};
use std::sync::Arc;

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
}
