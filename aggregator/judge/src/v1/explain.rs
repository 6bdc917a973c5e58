//! How a verdict comes about: policy, thresholds, evidence, states, score, verdict.

use coalmine_proto::names::TenantName;

use super::{
    Judge,
    findings::{self, bits_text, unit_name},
    outcome::{Outcome, Unit, Verdict},
    track::Reading,
};
use crate::{
    budget::{Holder, Metric, Share},
    policy::{Policy, Requirement},
    quantity::{percent, span},
    threshold::{Derivation, Limit},
};

impl Judge {
    /// The account of alpha: who was given which share of it, a line each.
    pub fn account(&self) -> Vec<String> {
        let alpha = u128::from(self.policy.rollout.alpha.ppb);
        let of_alpha = |share: Share| percent(share.ppb());
        let mut lines = vec![format!("alpha is {} for the whole rollout", percent(alpha))];
        for entry in self.ledger.entries() {
            let units = entry.units;
            let who = match entry.holder {
                Holder::Fleet => "the fleet".to_owned(),
                Holder::Cohorts if units == 1 => "the one cohort".to_owned(),
                Holder::Cohorts => format!("{units} cohorts, equal parts"),
                Holder::Known => format!("{units} tenants known at the start, equal parts"),
                Holder::Newcomers(group) => {
                    format!("newcomers, group {group}: {units} that appeared together, equal parts")
                }
            };
            lines.push(format!("{} of it to {who}", of_alpha(entry.share)));
        }
        lines.push(format!(
            "{} of it is left for newcomers",
            percent(self.ledger.reserve_ppb())
        ));
        lines
    }

    /// The whole tree behind an outcome, from the policy to the verdict, a line each: for fleet and cohorts, for the
    /// worst tenants, and for `tenant` if one is asked for.
    pub fn explain(&self, outcome: &Outcome, tenant: Option<&TenantName>) -> Vec<String> {
        let mut lines = policy_lines(&self.policy);
        lines.push("alpha".to_owned());
        lines.extend(self.account().into_iter().map(|line| format!("  {line}")));
        for (position, group) in self.groups.iter().enumerate() {
            lines.push(unit_name(&group.unit));
            if position == 0 {
                let default = TenantName::none();
                let derived = Derivation::of(&self.policy, self.history.as_deref(), &default);
                lines.extend(
                    derived
                        .limits()
                        .iter()
                        .map(|limit| format!("  threshold {limit}")),
                );
                lines.push(
                    "  fleet and cohorts tolerate 2/5 of max_ratio above 1, and 1/5 of max_increase"
                        .to_owned(),
                );
            }
            let limits = super::tenant::fleet_tolerance(self.limits);
            let readings = group.readings(self.proof);
            let mut all: Vec<(Reading, String)> = readings
                .into_iter()
                .flatten()
                .map(|reading| {
                    let seen =
                        findings::seen(reading.metric, &group.unit, group.episode(reading.metric), limits);
                    (reading, seen)
                })
                .collect();
            if position == 0 {
                let service = self.service.readings(&group.bars).into_iter().flatten();
                all.extend(service.map(|reading| (reading, self.service.seen(reading.metric))));
            }
            let unit = &group.unit;
            let said = |metric: Metric| {
                let mut reports = outcome.units.iter();
                reports.find(|report| (&report.unit, report.metric) == (unit, metric))
            };
            let totals = group.totals;
            lines.push(format!(
                "  {} canary requests, {} failed; on the baseline {}, {} failed",
                totals.canary.requests,
                totals.canary.events,
                totals.baseline.requests,
                totals.baseline.events
            ));
            for (reading, seen) in &mut all {
                // Where data is missing the outcome says so, whatever the evidence was until then.
                match said(reading.metric) {
                    Some(report) if report.state.is_trouble() => {
                        reading.state = report.state;
                        seen.clone_from(&report.seen);
                    }
                    Some(report) => reading.state = report.state,
                    None => {}
                }
            }
            let is_read = |metric: Metric| all.iter().any(|(reading, _)| reading.metric == metric);
            let mut unread = Vec::new();
            for report in &outcome.units {
                if report.unit == *unit && !is_read(report.metric) {
                    let (metric, state) = (report.metric.as_str(), report.state.as_str());
                    unread.push(format!("  {metric:<12} {state}: {}", report.seen));
                }
            }
            lines.extend(
                all.iter()
                    .flat_map(|(reading, seen)| self.reading_lines(reading, seen)),
            );
            lines.extend(unread);
        }
        let worst = outcome.worst_tenants.iter().map(|(name, _)| name);
        let asked = tenant.filter(|tenant| worst.clone().all(|name| name != *tenant));
        for name in worst.chain(asked) {
            lines.extend(self.tenant_lines(name));
        }
        lines.push(format!("verdict {}", outcome.verdict));
        lines.push(format!("  {}", outcome.reason));
        lines.push(format!(
            "  the lowest score is {}, {} the threshold of {}",
            ppm(outcome.score_ppm),
            if outcome.score_ppm < self.policy.rollout.rollback_threshold.ppm {
                "below"
            } else {
                "not below"
            },
            ppm(self.policy.rollout.rollback_threshold.ppm),
        ));
        if outcome.verdict != Verdict::Approve {
            lines.extend(
                outcome
                    .missing
                    .iter()
                    .map(|missing| format!("  missing for APPROVE: {missing}")),
            );
        }
        lines
    }

    fn tenant_lines(&self, name: &TenantName) -> Vec<String> {
        let Some(id) = self.roster.find(name) else {
            return vec![
                format!("tenant {name}"),
                "  has not been seen in this rollout".to_owned(),
            ];
        };
        let tenant = &self.tenants[id as usize];
        let bars = &self.bars[tenant.bars as usize];
        let least = self.policy.rollout.min_coverage.requests;
        let mut lines = vec![format!(
            "tenant {name}: {} canary requests, {} on the baseline{}",
            tenant.canary_requests,
            tenant.baseline_requests,
            if tenant.canary_requests < least {
                format!("; not judged, as fewer than {least}")
            } else {
                String::new()
            }
        )];
        let derived = Derivation::of(&self.policy, self.history.as_deref(), name);
        lines.extend(
            derived
                .limits()
                .iter()
                .map(|limit| format!("  threshold {limit}")),
        );
        for reading in tenant.readings(bars).iter().flatten() {
            let unit = Unit::Tenant(name.clone());
            let seen = findings::seen(
                reading.metric,
                &unit,
                tenant.episode(reading.metric),
                derived.thresholds,
            );
            lines.extend(self.reading_lines(reading, &seen));
        }
        lines
    }

    fn reading_lines(&self, reading: &Reading, seen: &str) -> [String; 2] {
        let theta = self.policy.rollout.rollback_threshold.ppm;
        [
            format!(
                "  {:<12} {} of {} bits of harm -> {} -> score {}",
                reading.metric.as_str(),
                bits_text(reading.bits.max(0)),
                bits_text(reading.budget),
                reading.state.as_str(),
                ppm(findings::score(reading, theta)),
            ),
            format!("               {seen}"),
        ]
    }

    /// The thresholds that a finding about a unit was judged by, with where they come from.
    pub(super) fn limits_of(&self, unit: &Unit, metric: Metric) -> String {
        let none = TenantName::none();
        let tenant = match unit {
            Unit::Tenant(name) => name,
            Unit::Fleet | Unit::Cohort(_) => &none,
        };
        let [max_rate, max_ratio, max_increase, p99, margin] =
            Derivation::of(&self.policy, self.history.as_deref(), tenant).limits();
        let all = |limits: &[Limit]| {
            let texts: Vec<String> = limits.iter().map(ToString::to_string).collect();
            texts.join("; ")
        };
        match metric {
            Metric::ErrorsLive => all(&[max_ratio, max_increase]),
            Metric::ErrorsSla => all(&[max_rate]),
            Metric::LatencyLive => all(&[margin]),
            Metric::LatencySla => all(&[p99]),
            Metric::Probes => all(&[max_rate, max_ratio, max_increase]),
            Metric::Pool => self.policy.defaults.pool.map_or_else(String::new, |pool| {
                format!(
                    "pool.max_wait_rate {} (defaults)",
                    percent(pool.max_wait_rate.ppb.into())
                )
            }),
            Metric::Gaps => format!(
                "min_coverage.agents {} (rollout)",
                percent(u128::from(self.policy.rollout.min_coverage.agents.ppm) * 1_000)
            ),
        }
    }
}

fn policy_lines(policy: &Policy) -> Vec<String> {
    let rollout = &policy.rollout;
    let required: Vec<&str> = policy
        .defaults
        .required
        .iter()
        .map(|requirement| match requirement {
            Requirement::Errors => "errors",
            Requirement::Latency => "latency",
            Requirement::Pool => "pool",
        })
        .collect();
    let share = |ppm: u32| percent(u128::from(ppm) * 1_000);
    vec![
        format!("policy of service {}", policy.service),
        format!(
            "  roll back below score {}; approve after {} windows when {} are proven, and {} of the traffic, {} of the \
             tenants and {} of the agents are covered",
            ppm(rollout.rollback_threshold.ppm),
            rollout.min_windows,
            required.join(", "),
            share(rollout.min_coverage.traffic.ppm),
            share(rollout.min_coverage.tenants.ppm),
            share(rollout.min_coverage.agents.ppm),
        ),
        format!(
            "  a HOLD lasts at most {}, then {}",
            span(policy.defaults.hold_deadline.micros),
            policy.defaults.on_deadline.as_str()
        ),
    ]
}

/// A score with three digits.
fn ppm(score: u32) -> String {
    format!("{}.{:03}", score / 1_000_000, score % 1_000_000 / 1_000)
}
