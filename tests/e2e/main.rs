//! The end-to-end tests: one binary, real components.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod bad_input;
mod crash;
mod deadline;
mod demo;
mod halts;
mod house;
mod identity;
mod judging;
mod manifests;
mod monitoring;
mod pool;
mod postgres;
mod rollout;
mod witness;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lets one test at a time drive traffic, so that they do not starve each other of the machine.
fn stage() -> MutexGuard<'static, ()> {
    static STAGE: Mutex<()> = Mutex::new(());
    STAGE.lock().unwrap_or_else(PoisonError::into_inner)
}
