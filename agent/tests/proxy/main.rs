//! The agent between real sockets: what goes through it, what it counts, and what it tells the aggregator.

// The helpers are no test functions, which clippy.toml allows to unwrap.
#![allow(clippy::unwrap_used)]

mod aggregator;
mod support;

mod admin;
mod cli;
mod closing;
mod counting;
mod handover;
mod http2;
mod pool;
mod relay;
mod session;
