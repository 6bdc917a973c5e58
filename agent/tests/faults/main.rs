//! What goes wrong around the agent: the application, clients, crowds of both, and the aggregator. Each time the
//! client must see what it would have seen without an agent, and every request must be counted exactly once.

// The helpers are no test functions, which clippy.toml allows to unwrap.
#![allow(clippy::unwrap_used)]

#[path = "../proxy/aggregator.rs"]
#[allow(dead_code, reason = "another binary uses all of it")]
mod aggregator;

#[path = "../proxy/support.rs"]
#[allow(dead_code, reason = "another binary uses all of it")]
mod support;

mod program;
mod stage;

mod aggregators;
mod application;
mod clients;
mod crowd;
mod files;
mod flood;
mod relabel;
