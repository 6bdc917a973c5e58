//! The metrics that deploy tools gate on: what they are called, and what they are of the rollouts that match.
//!
//! A tool reads the last series of an answer, or the first, and takes no number for bad news. So a gate's metric is one
//! series with a finite number: where several rollouts match they are a group, and it shows the worst of them, under
//! the labels that all of them share. What is known of tenants has a name of its own.

use std::{cmp::Reverse, collections::BTreeMap};

use coalmine_judge::{
    record::Anomaly,
    v1::{State as UnitState, Verdict},
};

use super::expression::{NAME, Selector};
use crate::rollouts::{State, View};

/// The labels of a rollout; `canary` is the workload's name too, as Flagger calls it.
const LABELS: [&str; 7] = [
    "rollout",
    "service",
    "version",
    "namespace",
    "canary",
    "workload",
    "state",
];

/// The label of a tenant.
const TENANT: &str = "tenant";

/// A metric with one number for all rollouts that match.
pub(super) struct Gate {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    value: fn(&Group<'_, '_>) -> f64,
}

const SCORE_HELP: &str = "Health score from 0 to 1; below the policy's threshold some unit is in breach. 1 before \
                          anything is judged, so that no harm is no proof of health: gate on coalmine_approved";

/// Each with its name. Those that `/metrics` has with the same meaning have the same name here.
pub(super) static GATES: [Gate; 9] = [
    Gate {
        name: "coalmine_health_score",
        help: SCORE_HELP,
        value: |group| ratio(group.score_ppm),
    },
    Gate {
        name: "canary_health_score",
        help: SCORE_HELP,
        value: |group| ratio(group.score_ppm),
    },
    Gate {
        name: "coalmine_rollout_health_score_ratio",
        help: SCORE_HELP,
        value: |group| ratio(group.score_ppm),
    },
    Gate {
        name: "coalmine_verdict",
        help: "1 for APPROVE, 0 for HOLD, -1 for ROLLBACK",
        value: |group| match group.worst.verdict {
            Verdict::Approve => 1.0,
            Verdict::Hold => 0.0,
            Verdict::Rollback => -1.0,
        },
    },
    Gate {
        name: "coalmine_approved",
        help: "1 if the verdict is APPROVE, else 0",
        value: |group| f64::from(u8::from(group.worst.verdict == Verdict::Approve)),
    },
    Gate {
        name: "coalmine_rollback",
        help: "1 if the verdict is ROLLBACK, else 0",
        value: |group| f64::from(u8::from(group.worst.verdict == Verdict::Rollback)),
    },
    Gate {
        name: "coalmine_tenants_in_breach",
        help: "Tenants in breach, among those that the last decision lists",
        value: |group| f64::from(group.worst.tenants_in_breach),
    },
    Gate {
        name: "coalmine_coverage_agents",
        help: "Share of the expected agents that reported, from 0 to 1",
        value: |group| ratio(group.worst.agents_ppm),
    },
    Gate {
        name: "coalmine_coverage_traffic",
        help: "Share of the canary's requests in judged tenants, from 0 to 1",
        value: |group| ratio(group.worst.traffic_ppm),
    },
];

/// The metric with one series for each tenant that the last decision lists.
pub(super) const TENANT_SCORE: &str = "coalmine_tenant_score";

/// What it says.
pub(super) const TENANT_SCORE_HELP: &str =
    "Health score from 0 to 1 of each tenant that is not in order, or only watched; many series, so no gate";

/// The labels of a series with its name.
pub(super) type Labels<'a> = BTreeMap<&'static str, &'a str>;

/// A series with its present value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample<'a> {
    pub(super) labels: Labels<'a>,
    pub(super) value: f64,
    /// Since when it is known.
    pub(super) from_ms: i64,
}

impl Sample<'_> {
    /// A value of its own, at any time.
    pub(super) fn alone(value: f64) -> Self {
        Self {
            labels: Labels::new(),
            value,
            from_ms: i64::MIN,
        }
    }
}

/// What is read off a rollout.
#[derive(Debug, Clone)]
pub(super) struct Reading<'a> {
    /// In the order of [`LABELS`]; empty where there is none.
    labels: [&'a str; LABELS.len()],
    verdict: Verdict,
    score_ppm: u32,
    agents_ppm: u32,
    traffic_ppm: u32,
    tenants_in_breach: u32,
    /// The lowest score of each tenant that is listed.
    tenants: BTreeMap<&'a str, u32>,
    decision: Option<&'a str>,
    worst_tenant: Option<&'a str>,
    reason: &'a str,
    is_over: bool,
    /// End of what the decision rests on.
    decided_ms: i64,
}

impl<'a> Reading<'a> {
    pub(super) fn of(view: &'a View) -> Self {
        let workload = view.workload.as_ref();
        let namespace = workload.map_or("", |workload| workload.namespace.as_str());
        let name = workload.map_or("", |workload| workload.name.as_str());
        let (tenants, tenants_in_breach) = tenants(&view.anomalies);
        Self {
            labels: [
                view.id.as_str(),
                view.service.as_str(),
                view.canary_version.as_str(),
                namespace,
                name,
                name,
                match view.state {
                    State::Running => "running",
                    State::Halted => "halted",
                    State::Ended => "ended",
                },
            ],
            verdict: view.standing(),
            score_ppm: view.score_ppm,
            agents_ppm: view.agents_ppm,
            traffic_ppm: view.traffic_ppm,
            tenants_in_breach,
            tenants,
            decision: view.decision_id.as_deref(),
            worst_tenant: view.worst_tenant.as_deref(),
            reason: &view.reason,
            is_over: view.state == State::Ended,
            decided_ms: i64::try_from(view.decided_ms).unwrap_or(i64::MAX),
        }
    }

    /// What a label is of all of its series; empty where there is none.
    fn value(&self, label: &str) -> &'a str {
        let mut named = LABELS.into_iter().zip(self.labels);
        named
            .find(|(name, _)| *name == label)
            .map_or("", |(_, value)| value)
    }

    /// The labels of one of its series.
    fn labels(&self, name: &'a str) -> Labels<'a> {
        let named = LABELS.into_iter().zip(self.labels);
        named
            .filter(|(_, value)| !value.is_empty())
            .chain([(NAME, name)])
            .collect()
    }

    /// What a gate's caller should know of it.
    fn warning(&self) -> String {
        let decision = self.decision.unwrap_or(self.labels[0]);
        let mut warning = format!("{} ({decision}): {}", self.verdict.as_str(), self.reason);
        if let Some(tenant) = self.worst_tenant {
            warning = format!("{warning}; look at tenant {tenant} first");
        }
        if self.is_over {
            warning.push_str("; this rollout is ended");
        }
        warning
    }

    /// The series of its tenants that a selector means.
    fn tenant_samples(&self, selector: Option<&Selector>) -> impl Iterator<Item = Sample<'a>> {
        let is_meant = move |tenant: &str| {
            selector.is_none_or(|selector| is_series_meant(selector, TENANT_SCORE, tenant))
        };
        let meant = self.tenants.iter().filter(move |(tenant, _)| is_meant(tenant));
        meant.map(move |(&tenant, &score_ppm)| {
            let mut labels = self.labels(TENANT_SCORE);
            labels.insert(TENANT, tenant);
            Sample {
                labels,
                value: ratio(score_ppm),
                from_ms: self.decided_ms,
            }
        })
    }
}

/// The lowest score of each tenant that is listed, and how many of them are in breach.
fn tenants(anomalies: &[Anomaly]) -> (BTreeMap<&str, u32>, u32) {
    let mut tenants: BTreeMap<&str, (u32, bool)> = BTreeMap::new();
    for anomaly in anomalies {
        if let Some(tenant) = anomaly.unit.strip_prefix("tenant:") {
            let (score, is_in_breach) = tenants.entry(tenant).or_insert((u32::MAX, false));
            *score = anomaly.score_ppm.min(*score);
            *is_in_breach |= anomaly.state == UnitState::Breach.as_str();
        }
    }
    let in_breach = tenants.values().filter(|(_, is_in_breach)| *is_in_breach).count();
    let scores = tenants.into_iter().map(|(tenant, (score, _))| (tenant, score));
    (scores.collect(), u32::try_from(in_breach).unwrap_or(u32::MAX))
}

/// Rollouts that match, as one.
struct Group<'r, 'a> {
    members: Vec<&'r Reading<'a>>,
    worst: &'r Reading<'a>,
    score_ppm: u32,
}

impl<'r, 'a> Group<'r, 'a> {
    /// None of none.
    fn of(members: Vec<&'r Reading<'a>>) -> Option<Self> {
        let badness = |reading: &&Reading<'_>| {
            let verdict = match reading.verdict {
                Verdict::Rollback => 2,
                Verdict::Hold => 1,
                Verdict::Approve => 0,
            };
            (verdict, Reverse(reading.score_ppm))
        };
        let worst = members.iter().copied().max_by_key(badness)?;
        let score_ppm = members.iter().map(|reading| reading.score_ppm).min()?;
        Some(Self {
            members,
            worst,
            score_ppm,
        })
    }

    fn sample(&self, gate: &Gate) -> Sample<'a> {
        let mut labels = self.worst.labels(gate.name);
        for other in &self.members {
            let others = other.labels(gate.name);
            labels.retain(|label, value| others.get(label).copied() == Some(*value));
        }
        Sample {
            labels,
            value: (gate.value)(self),
            from_ms: self.worst.decided_ms,
        }
    }

    fn warnings(&self) -> Vec<String> {
        const MOST: usize = 5;
        let mut warnings = vec![self.worst.warning()];
        if self.members.len() > 1 {
            let names: Vec<_> = self
                .members
                .iter()
                .take(MOST)
                .map(|member| member.labels[0])
                .collect();
            let more = if self.members.len() > MOST {
                ", and more"
            } else {
                ""
            };
            warnings.push(format!(
                "{} rollouts match, of which this is the worst: {}{more}",
                self.members.len(),
                names.join(", ")
            ));
        }
        warnings
    }
}

/// What a selector gives.
#[derive(Debug)]
pub(super) struct Selected<'a> {
    pub(super) samples: Vec<Sample<'a>>,
    pub(super) warnings: Vec<String>,
}

/// Whether there is such a metric.
pub(super) fn is_known(name: &str) -> bool {
    name == TENANT_SCORE || GATES.iter().any(|gate| gate.name == name)
}

/// The series that a selector of this metric means; none where a gate has no rollout.
pub(super) fn select<'a>(name: &str, selector: &Selector, readings: &[Reading<'a>]) -> Option<Selected<'a>> {
    let meant = readings
        .iter()
        .filter(|reading| is_rollout_meant(selector, reading));
    let Some(gate) = GATES.iter().find(|gate| gate.name == name) else {
        let samples = meant.flat_map(|reading| reading.tenant_samples(Some(selector)));
        return Some(Selected {
            samples: samples.collect(),
            warnings: Vec::new(),
        });
    };
    if !is_series_meant(selector, gate.name, "") {
        return None;
    }
    let group = Group::of(meant.collect())?;
    Some(Selected {
        samples: vec![group.sample(gate)],
        warnings: group.warnings(),
    })
}

/// All series of these rollouts that a selector means. A pattern takes time, so what series have in common is looked at
/// once.
pub(super) fn listed<'a>(selector: Option<&Selector>, readings: &[Reading<'a>]) -> Vec<Labels<'a>> {
    let gates: Vec<&Gate> = GATES
        .iter()
        .filter(|gate| selector.is_none_or(|selector| is_series_meant(selector, gate.name, "")))
        .collect();
    let meant = readings
        .iter()
        .filter(|reading| selector.is_none_or(|selector| is_rollout_meant(selector, reading)));
    let labels = meant.flat_map(|reading| {
        let of_gates = gates.iter().map(move |gate| reading.labels(gate.name));
        let of_tenants = reading.tenant_samples(selector).map(|sample| sample.labels);
        of_gates.chain(of_tenants)
    });
    labels.collect()
}

/// Whether series of a rollout may be meant, by the labels that all of them have.
fn is_rollout_meant(selector: &Selector, reading: &Reading<'_>) -> bool {
    selector.matches(|label| match label {
        NAME | TENANT => None,
        label => Some(reading.value(label)),
    })
}

/// Whether a series may be meant, by its name and its tenant.
fn is_series_meant(selector: &Selector, name: &str, tenant: &str) -> bool {
    selector.matches(|label| match label {
        NAME => Some(name),
        TENANT => Some(tenant),
        _ => None,
    })
}

fn ratio(ppm: u32) -> f64 {
    f64::from(ppm) / 1e6
}

#[cfg(test)]
mod tests;
