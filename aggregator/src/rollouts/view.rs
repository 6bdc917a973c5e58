//! What is published of a rollout: an immutable picture, replaced after each recorded decision.

use std::sync::Arc;

use coalmine_judge::{
    record::{Anomaly, Decision, RolloutEnd, RolloutStart, Workload},
    v1::{self, Verdict},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::overriding::Changed;
use crate::clock;

/// Where a rollout stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Windows are being judged.
    Running,
    /// Harm was proven; nothing more is judged.
    Halted,
    /// It was ended.
    Ended,
}

/// A decision in the judge's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Overridden {
    /// APPROVE, HOLD or ROLLBACK.
    pub verdict: String,
    /// Who decided.
    pub actor: String,
    /// Why.
    pub reason: String,
    /// What the judge says now.
    pub judged: String,
}

/// What a view is shown instead of.
#[derive(Debug, Clone)]
pub(crate) struct Beneath {
    judges: View,
    changed: Changed,
}

/// A rollout as the world sees it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct View {
    /// Its name.
    pub id: String,
    /// The caller's key.
    pub key: String,
    /// The service.
    pub service: String,
    /// The version on trial.
    pub canary_version: String,
    /// The version to compare with.
    pub baseline_version: Option<String>,
    /// Who began it.
    pub actor: String,
    /// What is rolled out, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub workload: Option<Workload>,
    /// Whether it was approved at any time.
    #[serde(skip)]
    pub approved: bool,
    /// Where it stands.
    pub state: State,
    /// When its first window begins, RFC 3339.
    pub started_at: String,
    /// The same in milliseconds since the Unix epoch.
    pub start_ms: u64,
    /// Length of a window.
    pub window_ms: u64,
    /// Windows judged so far.
    pub windows_judged: u64,
    /// APPROVE, HOLD or ROLLBACK.
    pub verdict: String,
    /// The decision in the judge's place, if one is in force; `verdict` is then that of it.
    pub overridden: Option<Overridden>,
    /// Whether the canary was let have its first traffic although nothing could be judged.
    pub bootstrapped: bool,
    /// Whether the HOLD has reached its deadline, and goes on.
    pub hold_expired: bool,
    /// Health score from 0 to 1.
    pub score: f64,
    /// The same in parts per million.
    pub score_ppm: u32,
    /// Why, in one sentence.
    pub reason: String,
    /// The unit with the lowest score, if one is suspected.
    #[schema(value_type = Option<Object>)]
    pub worst: Option<Anomaly>,
    /// The tenant to look at first, if anything is suspected.
    pub worst_tenant: Option<String>,
    /// The decision that this is.
    pub decision_id: Option<String>,
    /// The hash of its record.
    pub decision_hash: Option<String>,
    /// Whether the decision is in the log.
    pub recorded: bool,
    /// Probability that the verdict is right.
    pub confidence_ppm: Option<u32>,
    /// Share of the expected agents that reported.
    pub agents_ppm: u32,
    /// Share of the canary's requests in judged tenants.
    pub traffic_ppm: u32,
    /// Tenants judged.
    pub tenants_checked: u64,
    /// What is not in order, worst first.
    #[schema(value_type = Vec<Object>)]
    pub anomalies: Vec<Anomaly>,
    /// The judge.
    pub judge: String,
    /// Digest of the policy.
    pub policy: String,
    /// Who ended it and why.
    #[schema(value_type = Option<Object>)]
    pub ended: Option<RolloutEnd>,
    /// The end of the last window that was judged.
    #[serde(skip)]
    pub decided_ms: u64,
    /// The judge's own view, and the change that is shown instead.
    #[serde(skip)]
    #[schema(ignore)]
    pub(crate) beneath: Option<Arc<Beneath>>,
    /// The slot that the rollout waits for.
    #[serde(skip)]
    pub waits_for_ms: Option<u64>,
}

impl View {
    /// A rollout of which nothing was judged yet.
    pub(super) fn new(start: &RolloutStart) -> Self {
        Self {
            id: start.rollout.clone(),
            key: start.key.clone(),
            service: start.service.clone(),
            canary_version: start.canary_version.clone(),
            baseline_version: start.baseline_version.clone(),
            actor: start.actor.clone(),
            workload: start.workload.clone(),
            approved: false,
            state: State::Running,
            started_at: clock::rfc3339(start.start_ms),
            start_ms: start.start_ms,
            window_ms: start.window_ms,
            windows_judged: 0,
            verdict: v1::Verdict::Hold.as_str().to_owned(),
            overridden: None,
            bootstrapped: false,
            hold_expired: false,
            score: 1.0,
            score_ppm: 1_000_000,
            reason: "no window is judged yet".to_owned(),
            worst: None,
            worst_tenant: None,
            decision_id: None,
            decision_hash: None,
            recorded: false,
            confidence_ppm: None,
            agents_ppm: 0,
            traffic_ppm: 0,
            tenants_checked: 0,
            anomalies: Vec::new(),
            judge: start.judge.clone(),
            policy: start.policy.to_string(),
            ended: None,
            beneath: None,
            decided_ms: start.start_ms,
            waits_for_ms: Some(start.start_ms),
        }
    }

    /// What the verdict says.
    pub fn standing(&self) -> Verdict {
        let mut verdicts = Verdict::ALL.into_iter();
        let known = verdicts.find(|verdict| verdict.as_str() == self.verdict);
        known.unwrap_or(Verdict::Hold)
    }

    /// Shows a decision that is in the log.
    pub(super) fn recorded_decision(&mut self, decision: &Decision, hash: &str) {
        self.decision(decision);
        self.recorded = true;
        self.approved |= decision.finding.verdict == v1::Verdict::Approve.as_str();
        self.decision_hash = Some(hash.to_owned());
    }

    /// Shows a decision.
    pub(super) fn decision(&mut self, decision: &Decision) {
        self.windows_judged = decision.finding.window;
        self.verdict.clone_from(&decision.finding.verdict);
        self.score_ppm = decision.finding.score_ppm;
        self.score = f64::from(decision.finding.score_ppm) / 1e6;
        self.reason.clone_from(&decision.finding.reason);
        self.worst.clone_from(&decision.finding.worst);
        self.worst_tenant.clone_from(&decision.finding.worst_tenant);
        self.decision_id = Some(decision.id.clone());
        self.decision_hash = None;
        self.recorded = false;
        self.confidence_ppm = decision.finding.confidence_ppm;
        self.agents_ppm = decision.finding.agents_ppm;
        self.traffic_ppm = decision.finding.traffic_ppm;
        self.tenants_checked = decision.finding.tenants_checked;
        self.anomalies.clone_from(&decision.finding.anomalies);
        self.decided_ms = self.start_ms + decision.finding.window * self.window_ms;
        self.waits_for_ms = Some(self.decided_ms);
        self.hold_expired &= decision.finding.verdict == Verdict::Hold.as_str();
        if decision.finding.verdict == v1::Verdict::Rollback.as_str() {
            self.state = State::Halted;
            self.waits_for_ms = None;
        }
    }

    /// Shows a decision that could not be recorded, and the slot of the first one that is not, if it may have to be judged
    /// again.
    pub(super) fn unrecorded(&mut self, error: &str, slot_ms: Option<u64>) {
        self.hold_back(error);
        self.recorded = false;
        self.waits_for_ms = slot_ms.or(self.waits_for_ms);
    }

    /// What a rollout that is over says of the one that comes next.
    pub(super) fn of_next(&self) -> Self {
        let mut view = self.clone();
        let last = std::mem::replace(&mut view.verdict, Verdict::Hold.as_str().to_owned());
        view.reason = format!(
            "no rollout that was asked for is open; the newest, {}, was ended at {last}: {}",
            view.id, self.reason
        );
        view.confidence_ppm = None;
        view.overridden = None;
        view.hold_expired = false;
        view
    }

    /// Whether whoever knows this has something new to learn.
    pub(crate) fn differs(&self, newer: &Self) -> bool {
        self.verdict != newer.verdict
            || self.reason != newer.reason
            || self.decision_id != newer.decision_id
            || self.state != newer.state
    }

    /// An approval becomes a HOLD.
    pub(super) fn hold_back(&mut self, why: &str) {
        if self.verdict == v1::Verdict::Approve.as_str() {
            self.verdict = v1::Verdict::Hold.as_str().to_owned();
            self.confidence_ppm = None;
            self.reason = format!("APPROVE is held back: {why}");
        }
    }

    /// What is shown of the judge's view while somebody's decision is in force, or was given back and the judge has said
    /// nothing since.
    pub(super) fn with(self, changed: &Changed) -> Self {
        let Changed { change, hash, at_ms } = changed;
        let mut view = self.clone();
        view.decision_id = Some(change.id.clone());
        view.decision_hash.clone_from(hash);
        view.recorded = hash.is_some();
        view.decided_ms = view.decided_ms.max(*at_ms);
        if let Some(verdict) = &change.verdict {
            view.overridden = Some(Overridden {
                verdict: verdict.clone(),
                actor: change.actor.clone(),
                reason: change.reason.clone(),
                judged: self.verdict.clone(),
            });
            view.reason = format!(
                "{} has decided: {} (the judge says {}: {})",
                change.actor, change.reason, self.verdict, self.reason
            );
            view.verdict.clone_from(verdict);
            view.confidence_ppm = None;
            view.hold_expired = false;
        }
        view.beneath = Some(Arc::new(Beneath {
            judges: self,
            changed: changed.clone(),
        }));
        view
    }

    /// The judge's own view.
    pub(super) fn judges(&self) -> Self {
        match &self.beneath {
            Some(beneath) => beneath.judges.clone(),
            None => self.clone(),
        }
    }

    /// Shows that the rollout cannot go on. Whoever has decided has still decided.
    pub(super) fn broken(&mut self, problem: &str) {
        if let Some(beneath) = &self.beneath {
            let Beneath { mut judges, changed } = (**beneath).clone();
            judges.broken(problem);
            *self = judges.with(&changed);
            return;
        }
        self.waits_for_ms = None;
        if self.state != State::Halted {
            self.verdict = v1::Verdict::Hold.as_str().to_owned();
        }
        self.confidence_ppm = None;
        self.reason = format!("the rollout cannot be judged any more: {problem}; start a new one");
    }

    /// Shows the end.
    pub(super) fn end(&mut self, end: &RolloutEnd) {
        self.state = State::Ended;
        self.waits_for_ms = None;
        self.ended = Some(end.clone());
    }
}
