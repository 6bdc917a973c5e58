//! Checks of a policy that concern more than one field.

use std::collections::BTreeSet;

use coalmine_proto::rule;

use super::{
    MAX_COHORTS, MAX_LATENCY_US, Policy, PolicyError, Requirement,
    rollout::{TAIL, TIER},
};

impl Policy {
    /// Checks what concerns more than one field.
    pub(super) fn check(&self) -> Result<(), PolicyError> {
        let fail = |needle: &str, message: String| Err(PolicyError::at(&self.source, needle, message));
        if self.defaults.errors.max_rate.is_none() {
            return fail(
                "defaults",
                "defaults.errors.max_rate is missing; say which error rate the SLA allows, like 1%".into(),
            );
        }
        if self.defaults.required.contains(&Requirement::Latency) && self.defaults.latency.p99.is_none() {
            return fail(
                "required",
                "latency is required, but defaults.latency.p99 is missing; set it, like 350ms, or leave latency out of required".into(),
            );
        }
        let window = self.defaults.judge_window.micros;
        if !window.is_multiple_of(1_000) || !(1_000_000..=600_000_000).contains(&window) {
            return fail(
                "judge_window",
                "judge_window must be whole milliseconds from 1s to 10m".into(),
            );
        }
        if self.defaults.hold_deadline.micros < 2 * window {
            return fail(
                "hold_deadline",
                "hold_deadline must be at least two judge windows".into(),
            );
        }
        if self.defaults.required.contains(&Requirement::Pool) && self.defaults.pool.is_none() {
            return fail(
                "required",
                "pool is required, but defaults.pool is missing; set it, like { max_wait_rate: 1% }, or leave pool out of required".into(),
            );
        }
        if self.rollout.alpha.ppb > 500_000_000 {
            return fail("alpha", "rollout.alpha must be at most 50%; 1% is usual".into());
        }
        if !(500_000..1_000_000).contains(&self.rollout.rollback_threshold.ppm) {
            return fail(
                "rollback_threshold",
                "rollout.rollback_threshold must be from 0.5 to below 1; 0.95 is usual".into(),
            );
        }
        if self.defaults.required.is_empty() {
            return fail(
                "required",
                "defaults.required is empty; say what APPROVE must prove, like [errors, latency]".into(),
            );
        }
        let limits = self
            .tiers
            .values()
            .map(|tier| tier.latency)
            .chain(self.tenants.values().map(|tenant| tenant.latency));
        for limit in limits
            .chain([self.defaults.latency])
            .filter_map(|latency| latency.p99)
        {
            if limit.micros > MAX_LATENCY_US {
                return fail(
                    "p99",
                    "latency.p99 is longer than 128s, the longest latency that is measured".into(),
                );
            }
        }
        if let Some(adjust) = self.adjust
            && (adjust.floor.milli > 1_000 || adjust.ceiling.milli < 1_000)
        {
            return fail(
                "adjust",
                "adjust.floor must be at most 1x and adjust.ceiling at least 1x".into(),
            );
        }
        if let Err(error) = rule::check_list(&self.tenant_rules) {
            return fail("tenant_rules", format!("in tenant_rules, {error}"));
        }
        self.check_rollout()?;
        for (name, tenant) in &self.tenants {
            if let Some(tier) = &tenant.tier
                && !self.tiers.contains_key(tier)
            {
                let known: Vec<_> = self.tiers.keys().map(String::as_str).collect();
                return fail(
                    name.as_str(),
                    format!(
                        "tenant {name} is in tier {tier:?}, which is not under tiers (there are: {})",
                        known.join(", ")
                    ),
                );
            }
        }
        Ok(())
    }

    /// Checks the warm-up and the cohorts.
    fn check_rollout(&self) -> Result<(), PolicyError> {
        if self.rollout.warm_up_us() > self.defaults.hold_deadline.micros / 2 {
            return Err(PolicyError::at(
                &self.source,
                "warm_up",
                "rollout.warm_up must be at most half of hold_deadline".into(),
            ));
        }
        for label in self.tenants.values().flat_map(|tenant| tenant.labels.keys()) {
            if [TIER, TAIL].contains(&label.as_str()) || label.contains(':') {
                return Err(PolicyError::below(
                    &self.source,
                    "labels",
                    label,
                    format!(
                        "a label cannot be named {label:?}: {TIER} and {TAIL} are cohorts already, and a colon stands between name and value"
                    ),
                ));
            }
        }
        let mut seen = BTreeSet::new();
        for word in self.rollout.cohorts() {
            let fail = |message| Err(PolicyError::below(&self.source, "cohorts", word, message));
            if !seen.insert(word) {
                return fail(format!("{word:?} stands twice in rollout.cohorts"));
            }
            let known = || {
                self.tenants
                    .values()
                    .any(|tenant| tenant.labels.contains_key(word))
            };
            if ![TIER, TAIL].contains(&word) && !known() {
                return fail(format!(
                    "{word:?} in rollout.cohorts is a label that no tenant has; write {TIER}, {TAIL} or a label of some tenant"
                ));
            }
        }
        let cohorts = self.cohorts().len();
        if cohorts > MAX_COHORTS {
            return Err(PolicyError::at(
                &self.source,
                "cohorts",
                format!(
                    "the tenants form {cohorts} cohorts; at most {MAX_COHORTS} can be judged, so choose a coarser label"
                ),
            ));
        }
        Ok(())
    }
}
