//! Replay: judges the recorded evidence again and compares the bytes.
//!
//! Nothing is needed but the log's records and the blobs that they name.

use std::collections::BTreeMap;

use crate::{
    evidence::Window,
    policy::Policy,
    record::{Anomaly, Body, Decision, Hash, MAX_ANOMALIES, Record, RolloutStart},
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
                let judge = judge.map(|judge| Judged { judge, outcome: None });
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
        let window =
            Window::from_json(&evidence).map_err(|error| format!("its evidence is refused: {error}"))?;
        let outcome = judged.judge.step(&window).map_err(|error| error.to_string())?;
        let same = compare(decision, &outcome);
        judged.outcome = Some(outcome);
        same
    }
}

fn compare(decision: &Decision, outcome: &Outcome) -> Result<(), String> {
    let differs = |field: &str, recorded: &dyn std::fmt::Display, replayed: &dyn std::fmt::Display| {
        Err(format!(
            "{field} differs: recorded {recorded}, replayed {replayed}"
        ))
    };
    if decision.window != outcome.window {
        return differs("window", &decision.window, &outcome.window);
    }
    if decision.verdict != outcome.verdict.as_str() {
        return differs("verdict", &decision.verdict, &outcome.verdict);
    }
    if decision.score_ppm != outcome.score_ppm {
        return differs("score_ppm", &decision.score_ppm, &outcome.score_ppm);
    }
    if decision.reason != outcome.reason {
        return differs("reason", &decision.reason, &outcome.reason);
    }
    let replayed = Hash::of(outcome.to_json().as_bytes());
    if decision.outcome != replayed {
        return differs("outcome", &decision.outcome, &replayed);
    }
    if decision.anomalies != anomalies(outcome) {
        return Err("anomalies differ from what the evidence gives".to_owned());
    }
    Ok(())
}

/// What is not in order, as a record lists it: the lowest score first.
pub fn anomalies(outcome: &Outcome) -> Vec<Anomaly> {
    let mut reports: Vec<&UnitReport> = outcome
        .units
        .iter()
        .filter(|report| report.state.is_trouble())
        .collect();
    reports.sort_by_key(|report| (report.score_ppm, report.unit.clone(), report.metric));
    reports.into_iter().take(MAX_ANOMALIES).map(anomaly).collect()
}

/// One unit as a record lists it.
pub fn anomaly(report: &UnitReport) -> Anomaly {
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
