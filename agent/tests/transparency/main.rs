//! The agent against no agent: the same scripts are played by a client and an application directly and
//! through an agent; both must see the same bytes and the same ends, and the agent must have counted what
//! the case says.
//!
//! Read in this order: [`script`] (what each side does), [`stage`] (plays a case twice and compares),
//! [`messages`] and [`frames`] (what is said), then the cases.

// The helpers are no test functions, which clippy.toml allows to unwrap.
#![allow(clippy::unwrap_used, clippy::expect_used)]

// Shared with the tests of the proxy, which use more of them.
#[allow(dead_code)]
#[path = "../proxy/aggregator.rs"]
mod aggregator;
#[allow(dead_code)]
#[path = "../proxy/support.rs"]
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
