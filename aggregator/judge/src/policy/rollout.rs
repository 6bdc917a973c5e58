//! How a rollout is judged, and how limits may follow history.

use coalmine_proto::names::TenantName;
use serde::Deserialize;

use super::{Name, Tenant};
use crate::quantity::{Rate, Share, Span, Times};

/// The word in `rollout.cohorts` that groups tenants by their tier.
pub(super) const TIER: &str = "tier";

/// The word in `rollout.cohorts` that groups the tenants with little traffic.
pub(super) const TAIL: &str = "tail";

/// How a rollout is judged.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// Probability with which a healthy rollout may be halted, over its whole length.
    #[serde(default = "one_percent")]
    pub alpha: Rate,
    /// Health score below which a rollout is rolled back.
    #[serde(default = "score_of_95")]
    pub rollback_threshold: Share,
    /// What must have been seen before APPROVE.
    #[serde(default)]
    pub min_coverage: MinCoverage,
    /// Windows that must have been judged before APPROVE.
    #[serde(default = "three")]
    pub min_windows: u32,
    /// Windows that begin within this time from the start are not evidence.
    pub warm_up: Option<Span>,
    /// What tenants are grouped by.
    #[serde(default = "tier_and_tail")]
    pub(super) cohorts: Vec<Name>,
    /// Tenants that must be judged on enough requests before APPROVE.
    #[serde(default)]
    pub(super) critical: Vec<Tenant>,
}

const fn one_percent() -> Rate {
    Rate { ppb: 10_000_000 }
}

const fn score_of_95() -> Share {
    Share { ppm: 950_000 }
}

const fn three() -> u32 {
    3
}

fn tier_and_tail() -> Vec<Name> {
    [TIER, TAIL].map(|word| Name(word.to_owned())).to_vec()
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            alpha: one_percent(),
            rollback_threshold: score_of_95(),
            min_coverage: MinCoverage::default(),
            min_windows: three(),
            warm_up: None,
            cohorts: tier_and_tail(),
            critical: Vec::new(),
        }
    }
}

impl Rollout {
    /// Tenants that must be judged on enough requests before APPROVE.
    pub fn critical(&self) -> impl Iterator<Item = &TenantName> {
        self.critical.iter().map(|tenant| &tenant.0)
    }

    /// What tenants are grouped by: `tier`, `tail` and names of labels.
    pub fn cohorts(&self) -> impl Iterator<Item = &str> {
        self.cohorts.iter().map(|word| word.0.as_str())
    }

    /// Length of the warm-up in microseconds; 0 without one.
    pub fn warm_up_us(&self) -> u64 {
        self.warm_up.map_or(0, |span| span.micros)
    }
}

/// What must have been seen before APPROVE.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MinCoverage {
    /// Share of the canary's requests that belong to tenants with enough requests and no suspicion.
    #[serde(default = "ninety_percent")]
    pub traffic: Share,
    /// Share of the expected agents that reported.
    #[serde(default = "ninety_percent")]
    pub agents: Share,
    /// Share of the tenants with canary traffic that are judged on enough requests.
    #[serde(default = "none_of_them")]
    pub tenants: Share,
    /// Canary requests from which a tenant counts as judged.
    #[serde(default = "twenty")]
    pub requests: u64,
}

const fn ninety_percent() -> Share {
    Share { ppm: 900_000 }
}

const fn none_of_them() -> Share {
    Share { ppm: 0 }
}

const fn twenty() -> u64 {
    20
}

impl Default for MinCoverage {
    fn default() -> Self {
        Self {
            traffic: ninety_percent(),
            agents: ninety_percent(),
            tenants: none_of_them(),
            requests: twenty(),
        }
    }
}

/// How thresholds may follow history.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adjust {
    /// Whether thresholds are derived from a frozen digest of earlier windows where there is one.
    pub from_history: bool,
    /// Lowest factor on a limit.
    pub floor: Times,
    /// Highest factor on a limit.
    pub ceiling: Times,
}
