//! The end-to-end tests: one binary, real components.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod api;
mod bad_input;
mod contracts;
mod crash;
mod deadline;
mod demo;
mod examples;
mod flagger_face;
mod gate;
mod halts;
mod house;
mod identity;
mod judging;
mod kayenta_face;
mod manifests;
mod monitoring;
mod pool;
mod postgres;
mod prometheus_face;
mod rollout;
mod tokens;
mod witness;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lets one test at a time drive traffic, so that they do not starve each other of the machine.
fn stage() -> MutexGuard<'static, ()> {
    static STAGE: Mutex<()> = Mutex::new(());
    STAGE.lock().unwrap_or_else(PoisonError::into_inner)
}
