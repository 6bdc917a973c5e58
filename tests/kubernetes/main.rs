//! The tests against a real API server: one binary, run by `make test-kubernetes` alone, since what it needs is large.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]
#![allow(clippy::print_stdout, reason = "a test says what it has seen")]

mod access;
mod argo;
mod certificates;
mod crash;
mod deploying;
mod flagger;
mod halts;
mod identity;
mod injection;
mod manifests;
mod scene;
mod watching;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lets one cluster run at a time, so that they do not starve each other of the machine.
fn stage() -> MutexGuard<'static, ()> {
    static STAGE: Mutex<()> = Mutex::new(());
    STAGE.lock().unwrap_or_else(PoisonError::into_inner)
}
