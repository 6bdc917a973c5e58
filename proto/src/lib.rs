//! The contract between agents and the aggregator.
//!
//! Read in this order: [`names`] (what things are called and which names are allowed), [`rule`] (where a
//! request's tenant stands), [`histogram`] (how latency is counted), [`exposition`] (how it is shown to
//! Prometheus), [`pool`] (how much may be said of connection pools), [`v1`] (the messages, generated from
//! `proto/coalmine/v1/telemetry.proto`).

pub mod exposition;
pub mod histogram;
pub mod names;
pub mod pool;
pub mod rule;

/// Messages and services of protocol version 1, generated and committed.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
pub mod v1 {
    include!("generated/coalmine.v1.rs");
}

/// The protocol version that this crate speaks.
pub const PROTOCOL: u32 = 1;
