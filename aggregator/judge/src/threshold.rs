//! What the policy means for one tenant: plain integers, fixed when the rollout starts.
//!
//! A pure function of the policy, the tenant's own entry and its tier. Nothing that the canary does can
//! change a threshold while it is being judged, and a gap in the data can never loosen one.

use coalmine_proto::names::TenantName;
use serde::Serialize;

use crate::policy::Policy;

/// The tolerated ratio of the canary's error rate to the baseline's when the policy is silent, in thousandths.
const DEFAULT_MAX_RATIO_MILLI: u64 = 1_250;

/// The tolerated difference between the two error rates when the policy is silent, in parts per billion.
const DEFAULT_MAX_INCREASE_PPB: u64 = 1_000_000;

/// The limits of one tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Thresholds {
    /// Highest error rate that the SLA allows, in parts per billion.
    pub max_rate_ppb: u64,
    /// Tolerated ratio of the canary's error rate to the baseline's, in thousandths.
    pub max_ratio_milli: u64,
    /// Tolerated difference between the two error rates, in parts per billion.
    pub max_increase_ppb: u64,
    /// Latency that at most one request in a hundred may exceed, in microseconds.
    pub p99_us: Option<u64>,
}

impl Thresholds {
    /// The limits of `tenant`: its own entry, else its tier's, else the defaults.
    pub fn of(policy: &Policy, tenant: &TenantName) -> Self {
        let own = policy.tenants.get(tenant);
        let tier = own
            .and_then(|own| own.tier.as_ref())
            .and_then(|tier| policy.tiers.get(tier));
        let errors = [
            own.map(|own| own.errors),
            tier.map(|tier| tier.errors),
            Some(policy.defaults.errors),
        ];
        let latency = [
            own.map(|own| own.latency),
            tier.map(|tier| tier.latency),
            Some(policy.defaults.latency),
        ];
        let errors = || errors.into_iter().flatten();
        Self {
            // The policy is refused when the defaults lack it.
            max_rate_ppb: errors()
                .find_map(|limits| limits.max_rate)
                .map_or(10_000_000, |rate| rate.ppb),
            max_ratio_milli: errors()
                .find_map(|limits| limits.max_ratio)
                .map_or(DEFAULT_MAX_RATIO_MILLI, |ratio| ratio.milli),
            max_increase_ppb: errors()
                .find_map(|limits| limits.max_increase)
                .map_or(DEFAULT_MAX_INCREASE_PPB, |points| points.ppb),
            p99_us: latency
                .into_iter()
                .flatten()
                .find_map(|limits| limits.p99)
                .map(|span| span.micros),
        }
    }

    /// The limits of a tenant that the policy does not name.
    pub fn default_of(policy: &Policy) -> Self {
        Self::of(policy, &TenantName::none())
    }
}
