//! The judge: what an auditor must read to understand, verify and replay a decision.
//!
//! Read in this order:
//!
//! 1. [`policy`]: what the operator asks for, [`history`], what earlier rollouts have shown, and [`threshold`], what
//!    follows from both for one tenant;
//! 2. [`evidence`]: the frozen input of one step;
//! 3. [`fixed`] and [`eprocess`]: the arithmetic and the statistics, with proofs;
//! 4. [`budget`]: where the error probability of a rollout is spent;
//! 5. [`v1`]: the judge itself, `step(state, window) -> outcome`;
//! 6. [`manifest`]: what a decision rests on, and [`record`]: the decision log's lines, [`chain`], [`tree`] and [`note`], what holds them together and proves
//!    them, [`witness`], what somebody else sees to, and [`replay`], which recomputes them.
//!
//! The crate does no I/O, reads no clock, spawns nothing, and has no floating point: the same evidence
//! gives the same bytes on every machine, for ever. The lints below and this crate's `clippy.toml`
//! enforce it.

#![deny(clippy::float_arithmetic)]

pub mod history;
pub mod policy;
pub mod quantity;
pub mod threshold;

pub mod evidence;

pub mod fixed;

pub mod eprocess;

pub mod budget;

pub mod v1;

pub mod chain;
pub mod manifest;
pub mod note;
pub mod record;
pub mod replay;
pub mod tree;
pub mod witness;
