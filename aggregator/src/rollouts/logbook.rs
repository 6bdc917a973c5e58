//! The rollouts of a log, gathered while it is read.

use std::collections::BTreeMap;

use coalmine_judge::{
    chain::Hash,
    record::{Actuation, Body, Decision, Record, RolloutEnd, RolloutStart},
    v1,
};

use super::overriding::Changed;

/// A rollout as the log tells it.
#[derive(Debug)]
pub(super) struct Logged {
    pub(super) start: RolloutStart,
    pub(super) last: Option<(Decision, String)>,
    /// Whether any of its decisions was an approval.
    pub(super) approved: bool,
    /// Whether the hold deadline that the last decision reached, if it did, has its record.
    pub(super) deadline_told: bool,
    pub(super) end: Option<RolloutEnd>,
    /// What was done outside because of its decisions.
    pub(super) actuations: Vec<Actuation>,
    /// The last change of who decides, as long as it counts.
    pub(super) changed: Option<Changed>,
    pub(super) bootstrapped: bool,
    /// Whether its HOLD goes on beyond its deadline.
    pub(super) hold_expired: bool,
}

/// The rollouts of a log, gathered while it is read.
#[derive(Debug, Default)]
pub struct Logbook {
    pub(super) rollouts: BTreeMap<String, Logged>,
    /// In the order of their starts.
    pub(super) order: Vec<String>,
}

impl Logbook {
    /// Takes the next record.
    pub fn take(&mut self, record: &Record, hash: Hash) {
        match &record.body {
            Body::Rollout(start) => {
                self.order.push(start.rollout.clone());
                let logged = Logged {
                    start: start.clone(),
                    last: None,
                    approved: false,
                    deadline_told: false,
                    end: None,
                    actuations: Vec::new(),
                    changed: None,
                    bootstrapped: false,
                    hold_expired: false,
                };
                self.rollouts.insert(start.rollout.clone(), logged);
            }
            Body::Decision(decision) => {
                if let Some(rollout) = self.rollouts.get_mut(&decision.rollout) {
                    rollout.last = Some(((**decision).clone(), hash.to_string()));
                    rollout.approved |= decision.finding.verdict == v1::Verdict::Approve.as_str();
                    rollout.deadline_told = false;
                    let changed = rollout.changed.take();
                    rollout.changed = changed.filter(|changed| changed.change.verdict.is_some());
                    rollout.hold_expired &= decision.finding.verdict == v1::Verdict::Hold.as_str();
                }
            }
            Body::Deadline(deadline) => {
                if let Some(rollout) = self.rollouts.get_mut(&deadline.rollout) {
                    rollout.deadline_told = true;
                    rollout.hold_expired = deadline.verdict == v1::Verdict::Hold.as_str();
                }
            }
            Body::End(end) => {
                if let Some(rollout) = self.rollouts.get_mut(&end.rollout) {
                    rollout.end = Some(end.clone());
                }
            }
            Body::Actuation(actuation) => {
                if let Some(rollout) = self.rollouts.get_mut(&actuation.rollout) {
                    rollout.actuations.push(actuation.clone());
                }
            }
            Body::Override(change) => {
                if let Some(rollout) = self.rollouts.get_mut(&change.rollout) {
                    rollout.approved |= change.verdict.as_deref() == Some(v1::Verdict::Approve.as_str());
                    rollout.changed = Some(Changed {
                        change: change.clone(),
                        hash: Some(hash.to_string()),
                        at_ms: record.time_ms,
                    });
                }
            }
            Body::Bootstrap(bootstrap) => {
                if let Some(rollout) = self.rollouts.get_mut(&bootstrap.rollout) {
                    rollout.bootstrapped = true;
                }
            }
            // What concerns the log alone.
            _ => {}
        }
    }

    /// Of each service, the slot that its open rollout waits for.
    pub fn waiting(&self) -> BTreeMap<String, u64> {
        let open = self.rollouts.values().filter(|rollout| rollout.end.is_none());
        let slot = |Logged { start, last, .. }: &Logged| {
            let windows = last.as_ref().map_or(0, |(decision, _)| decision.finding.window);
            let passed = windows.saturating_mul(start.window_ms);
            (start.service.clone(), start.start_ms.saturating_add(passed))
        };
        open.map(slot).collect()
    }
}
