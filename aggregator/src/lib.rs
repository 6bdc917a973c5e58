//! The aggregator: takes windows from agents, judges rollouts, keeps the decision log, answers deploy tools.
//!
//! In the order in which a window travels: [`ingest`] takes it from the agent, [`store`] makes it durable,
//! [`book`] holds it by service, version, tenant and time, [`rollouts`] freezes it into evidence and has it
//! judged, [`ledger`] records the decision, [`faces`] answers with it, [`metrics`] counts all of it.
//! [`witness`] lets somebody else vouch that the log has only grown.
//! [`inject`] puts the agent into pods, [`kubernetes`] asks a cluster, `identity` finds out who an agent is, and
//! [`effects`] does outside what verdicts ask for.
//! [`server`] ties them together; [`cli`] is the `coalmine` command and [`demo`] its demonstration.

pub mod ingest;

pub mod store;

pub mod access;
pub mod book;

pub mod rollouts;

pub mod ledger;

pub mod faces;

pub mod metrics;

pub mod witness;

pub mod inject;

pub mod kubernetes;

pub mod effects;

pub mod server;

pub mod cli;
pub mod client;
pub mod demo;

mod clock;
mod connections;
pub mod database;
mod disk;
mod identity;

/// The program's name and version, as records and answers carry it.
pub const BUILD: &str = concat!("coalmine ", env!("CARGO_PKG_VERSION"));
