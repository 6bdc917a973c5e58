//! Replay: judges the recorded evidence again and compares the bytes.
//!
//! Nothing is needed but the log's records and the blobs that they name.

use std::collections::BTreeMap;

use crate::{
    chain::Hash,
    evidence::Window,
    policy::Policy,
    record::{Anomaly, Body, Decision, Finding, MAX_ANOMALIES, Record, RolloutStart},
    v1::{self, Judge, Outcome, State, UnitReport},
};

/// Where blobs come from. An implementation checks the digest of what it returns.
pub trait Blobs {
    /// The content of a blob.
    fn text(&self, digest: &Hash) -> Result<String, String>;
}

/// What became of a record when it was judged again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replayed {
    /// No decision; nothing to judge.
    Other,
    /// The same bytes.
    Same,
    /// Something differs or is missing.
    Different {
        /// The decision or rollout.
        name: String,
        /// What differs, or why it could not be judged.
        problem: String,
    },
}

/// Replays a log, record by record, in order.
#[derive(Debug, Default)]
pub struct Replay {
    rollouts: BTreeMap<String, Result<Judged, String>>,
}

/// A rollout as it stands after the records taken so far.
#[derive(Debug)]
pub struct Judged {
    /// How it began.
    pub start: RolloutStart,
    /// Its judge.
    pub judge: Judge,
    /// What the judge said last.
    pub outcome: Option<Outcome>,
}

/// A judge for a rollout, from its record and its policy's text.
pub fn judge_for(start: &RolloutStart, policy: &str) -> Result<Judge, String> {
    if start.judge != v1::ID {
        return Err(format!(
            "was judged by {}, which this program does not have (it has {})",
            start.judge,
            v1::ID
        ));
    }
    let policy = Policy::parse(policy).map_err(|error| format!("its policy is refused: {error}"))?;
    Judge::new(policy, Some(start.max_windows)).map_err(|error| error.to_string())
}

impl Replay {
    /// Takes the next record.
    pub fn take(&mut self, record: &Record, blobs: &dyn Blobs) -> Replayed {
        match &record.body {
            Body::LogStart { .. } => Replayed::Other,
            Body::Rollout(start) => {
                let judge = blobs
                    .text(&start.policy)
                    .map_err(|error| format!("its policy {} {error}", start.policy))
                    .and_then(|policy| judge_for(start, &policy));
                let judge = judge.map(|judge| Judged {
                    start: start.clone(),
                    judge,
                    outcome: None,
                });
                if self.rollouts.contains_key(&start.rollout) {
                    let problem = "is begun twice".to_owned();
                    return Replayed::Different {
                        name: start.rollout.clone(),
                        problem,
                    };
                }
                let replayed = match &judge {
                    Ok(_) => Replayed::Other,
                    Err(problem) => Replayed::Different {
                        name: start.rollout.clone(),
                        problem: problem.clone(),
                    },
                };
                self.rollouts.insert(start.rollout.clone(), judge);
                replayed
            }
            Body::Decision(decision) => match self.judge(decision, blobs) {
                Ok(()) => Replayed::Same,
                Err(problem) => Replayed::Different {
                    name: decision.id.clone(),
                    problem,
                },
            },
            Body::End(end) => {
                self.rollouts.remove(&end.rollout);
                Replayed::Other
            }
        }
    }

    /// A rollout as it stands after the records taken so far.
    pub fn judged(&self, rollout: &str) -> Option<&Judged> {
        self.rollouts.get(rollout)?.as_ref().ok()
    }

    /// Takes a rollout out, to be continued live.
    pub fn remove(&mut self, rollout: &str) -> Option<Judged> {
        self.rollouts.remove(rollout)?.ok()
    }

    fn judge(&mut self, decision: &Decision, blobs: &dyn Blobs) -> Result<(), String> {
        let judged = match self.rollouts.get_mut(&decision.rollout) {
            None => {
                return Err(format!(
                    "belongs to rollout {}, which no record begins",
                    decision.rollout
                ));
            }
            Some(Err(problem)) => return Err(format!("rollout {}: {problem}", decision.rollout)),
            Some(Ok(judged)) => judged,
        };
        let evidence = blobs
            .text(&decision.evidence)
            .map_err(|error| format!("its evidence {} {error}", decision.evidence))?;
        let start = &judged.start;
        if (&decision.policy, &decision.judge) != (&start.policy, &start.judge) {
            return Err("names another policy or judge than its rollout".to_owned());
        }
        let window =
            Window::from_json(&evidence).map_err(|error| format!("its evidence is refused: {error}"))?;
        let place = (judged.judge.last_window().unwrap_or(0) + 1, start.window_ms);
        let begin = start.start_ms.checked_add((place.0 - 1).saturating_mul(place.1));
        if (window.number, window.len_ms) != place || Some(window.start_ms) != begin {
            return Err(format!("its evidence is not that of window {}", place.0));
        }
        let outcome = judged.judge.step(&window).map_err(|error| error.to_string())?;
        let difference = decision.finding.difference(&Finding::of(&outcome));
        judged.outcome = Some(outcome);
        difference.map_or(Ok(()), Err)
    }
}

impl Finding {
    /// What a record must say of this outcome.
    pub fn of(outcome: &Outcome) -> Self {
        Self {
            window: outcome.window,
            verdict: outcome.verdict.as_str().to_owned(),
            score_ppm: outcome.score_ppm,
            confidence_ppm: outcome.confidence_ppm,
            reason: outcome.reason.clone(),
            worst: outcome.worst.as_ref().map(anomaly),
            worst_tenant: outcome
                .worst_tenant
                .as_ref()
                .map(|tenant| tenant.as_str().to_owned()),
            anomalies: anomalies(outcome),
            anomalies_detected: outcome
                .units
                .iter()
                .filter(|report| report.state.is_trouble())
                .count() as u64,
            traffic_ppm: outcome.traffic_ppm,
            agents_ppm: outcome.agents_ppm,
            tenants_checked: outcome.tenants.total(),
            outcome: Hash::of(outcome.to_json().as_bytes()),
        }
    }

    /// The first field in which a replay differs, with both values.
    fn difference(&self, replayed: &Self) -> Option<String> {
        // Integers, strings and lists always convert.
        let [recorded, replayed] =
            [self, replayed].map(|finding| serde_json::to_value(finding).unwrap_or_default());
        let fields = recorded.as_object()?;
        let (name, value) = fields
            .iter()
            .find(|(name, value)| replayed.get(name.as_str()) != Some(*value))?;
        let other = replayed.get(name).cloned().unwrap_or_default();
        Some(format!("{name} differs: recorded {value}, replayed {other}"))
    }
}

/// What is not in order, as a record lists it: the lowest score first.
fn anomalies(outcome: &Outcome) -> Vec<Anomaly> {
    let mut reports: Vec<&UnitReport> = outcome
        .units
        .iter()
        .filter(|report| report.state.is_trouble())
        .collect();
    reports.sort_by_key(|report| (report.score_ppm, report.unit.clone(), report.metric));
    reports.into_iter().take(MAX_ANOMALIES).map(anomaly).collect()
}

/// One unit as a record lists it.
fn anomaly(report: &UnitReport) -> Anomaly {
    Anomaly {
        unit: report.unit.to_string(),
        metric: report.metric.as_str().to_owned(),
        state: report.state.as_str().to_owned(),
        severity: if report.state == State::Breach {
            "critical"
        } else {
            "warning"
        }
        .to_owned(),
        detail: report.seen.clone(),
        bits_q32: report.bits,
        budget_q32: report.budget,
        score_ppm: report.score_ppm,
    }
}
