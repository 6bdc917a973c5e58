//! The limits of a policy: for everybody, for a tier, for one tenant.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use super::{Name, Requirement};
use crate::quantity::{PercentagePoints, Rate, Ratio, Share, Span};

/// What holds for every tenant unless a tier or the tenant itself says otherwise.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Limits on errors.
    #[serde(default)]
    pub errors: ErrorLimits,
    /// Limits on latency.
    #[serde(default)]
    pub latency: LatencyLimits,
    /// Limits on the database connection pool.
    pub pool: Option<PoolLimits>,
    /// Longest time that a rollout may stay on HOLD.
    #[serde(default = "thirty_minutes")]
    pub hold_deadline: Span,
    /// What ends a HOLD that lasted that long.
    #[serde(default)]
    pub on_deadline: OnDeadline,
    /// What must be proven before APPROVE.
    #[serde(default = "errors_and_latency")]
    pub required: Vec<Requirement>,
    /// Length of the windows that the judge takes; a whole number of milliseconds.
    #[serde(default = "ten_seconds")]
    pub judge_window: Span,
}

/// What ends a HOLD that lasted as long as the policy allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDeadline {
    /// The canary is rolled back.
    #[default]
    Rollback,
    /// It stays on HOLD until somebody decides.
    Hold,
    /// It is approved, but only when nothing is suspected and only proof or coverage is missing; rolled back
    /// otherwise.
    Approve,
}

impl OnDeadline {
    /// The word as it stands in a policy.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rollback => "rollback",
            Self::Hold => "hold",
            Self::Approve => "approve",
        }
    }
}

const fn thirty_minutes() -> Span {
    Span {
        micros: 30 * 60 * 1_000_000,
    }
}

const fn ten_seconds() -> Span {
    Span { micros: 10_000_000 }
}

fn errors_and_latency() -> Vec<Requirement> {
    vec![Requirement::Errors, Requirement::Latency]
}

/// Limits of a tier.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Limits on errors.
    #[serde(default)]
    pub errors: ErrorLimits,
    /// Limits on latency.
    #[serde(default)]
    pub latency: LatencyLimits,
}

/// What is said of one tenant.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantPolicy {
    /// The tenant's tier.
    pub tier: Option<String>,
    /// What else groups the tenant with others, such as its region.
    #[serde(default, deserialize_with = "labels")]
    pub labels: BTreeMap<String, String>,
    /// Limits on errors.
    #[serde(default)]
    pub errors: ErrorLimits,
    /// Limits on latency.
    #[serde(default)]
    pub latency: LatencyLimits,
}

fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    let labels = BTreeMap::<Name, Name>::deserialize(deserializer)?;
    Ok(labels
        .into_iter()
        .map(|(name, value)| (name.0, value.0))
        .collect())
}

/// Limits on errors; what is absent comes from the next level up.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorLimits {
    /// Highest share of failing requests that the SLA allows.
    pub max_rate: Option<Rate>,
    /// How much higher than the live baseline's the canary's error rate may be.
    pub max_increase: Option<PercentagePoints>,
    /// How many times the live baseline's error rate is tolerated.
    pub max_ratio: Option<Ratio>,
}

/// Limits on latency; what is absent comes from the next level up.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatencyLimits {
    /// At most one request in a hundred may take longer.
    pub p99: Option<Span>,
    /// How much slower than the live baseline is tolerated.
    pub margin: Option<Share>,
}

/// Limits on the connection pool, which belongs to the service and not to a tenant.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolLimits {
    /// Highest share of acquires that may have to wait.
    pub max_wait_rate: Rate,
    /// How much higher than the live baseline's the canary's share of waits may be.
    #[serde(default = "one_point")]
    pub max_increase: PercentagePoints,
    /// How many times the live baseline's share of waits is tolerated.
    #[serde(default = "one_and_a_quarter")]
    pub max_ratio: Ratio,
}

const fn one_point() -> PercentagePoints {
    PercentagePoints { ppb: 10_000_000 }
}

const fn one_and_a_quarter() -> Ratio {
    Ratio { milli: 1_250 }
}
