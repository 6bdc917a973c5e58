//! The sidecar that relays bytes, observes requests and streams windows to the aggregator.

pub mod backoff;
pub mod config;
pub mod observer;
pub mod recorder;
pub mod ring;
pub mod tenant;
pub mod window;
