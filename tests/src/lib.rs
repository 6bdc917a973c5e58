//! The harness of the end-to-end tests: real processes on loopback, each killed when its handle is dropped.
//!
//! A test reads like a story: start an aggregator, start an application, put an agent before it, send
//! requests, wait for what must become true. Nothing sleeps for a fixed time: [`eventually`] waits for a
//! condition, with a deadline.

#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a harness fails a test by panicking, and says why"
)]

pub mod clients;
pub mod components;
pub mod cutter;
mod held;
pub mod http;
pub mod kubernetes;
pub mod postgres;
pub mod process;
pub mod speaker;
pub mod tools;

use std::time::{Duration, Instant};

/// How long a condition may take to become true before the test fails.
const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives a value. Panics with `what` when it does not in time.
///
/// # Panics
/// When the deadline passes.
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    within(DEADLINE, what, condition)
}

/// Waits no longer than `limit` until `condition` gives a value.
///
/// # Panics
/// When the deadline passes.
pub fn within<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "not within {} s: {what}",
            limit.as_secs()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
