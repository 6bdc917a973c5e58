//! The sidecar that relays bytes, observes requests and streams windows to the aggregator.
//!
//! Read in this order: [`config`] (what it is told), [`run`] (two threads and what is between them);
//! on the data thread `proxy` (accept and stop), `relay` (bytes), [`observer`] (what they mean),
//! [`tenant`] (whose they are), [`recorder`] (counts), `sealer` (windows); on the control thread
//! `session` (the aggregator), [`ring`] (what it does not have yet), `context` (what is known of the pod:
//! [`pool`], `sockets`, `host`), [`metrics`] and `admin`.
//!
//! [`Session`] is public for the simulation (tests/simulation), which gives it other [`Surroundings`].

pub mod config;
pub mod run;

pub mod gate;
pub mod observer;
mod proxy;
pub mod recorder;
mod relay;
mod sealer;
mod system;
pub mod tenant;
pub mod window;

mod admin;
pub mod backoff;
mod context;
pub mod handover;
mod host;
mod labels;
pub mod metrics;
pub mod pool;
pub mod ring;
mod session;
mod sockets;

pub use session::{Dial, Dialling, Session, Surroundings};
