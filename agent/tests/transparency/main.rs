//! The agent against no agent: the same scripts are played by a client and an application directly and
//! through an agent; both must see the same bytes and the same ends, and the agent must have counted what
//! the case says.
//!
//! Read in this order: [`script`] (what each side does), [`stage`] (plays a case twice and compares),
//! [`messages`] and [`frames`] (what is said), then the cases.

// The helpers are no test functions, which clippy.toml allows to unwrap.
#![allow(clippy::unwrap_used)]

#[path = "../proxy/aggregator.rs"]
#[allow(dead_code, reason = "another binary uses all of it")]
mod aggregator;

#[path = "../proxy/support.rs"]
#[allow(dead_code, reason = "another binary uses all of it")]
mod support;

mod frames;
mod messages;
mod script;
mod stage;

mod grpc;
mod hostile;
mod http1;
mod http2;
mod idle;
mod lifecycle;
mod other;
mod random;
