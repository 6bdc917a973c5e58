//! The judge on scripted rollouts, and its formats beside those of other programs.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic and read its golden file"
)]

mod script;

mod edges;
mod golden;
mod interop;
mod memory;
mod metrics;
mod pool;
mod saved;
mod verdicts;
