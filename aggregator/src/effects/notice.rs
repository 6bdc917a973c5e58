//! What others are told of a decision.

use coalmine_judge::{
    record::{Body, Override, RolloutStart},
    v1::Verdict,
};
use serde_json::json;

use super::plan::Step;
use crate::{clock, ledger::Appended, rollouts::View};

/// Longest text that is taken into a record or an Event, in bytes.
const MAX_TEXT_BYTES: usize = 900;

/// What is told of a decision. It stays the same while it is tried to tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) decision: String,
    pub(super) verdict: Verdict,
    /// By what a receiver knows a repetition.
    pub(super) key: String,
    rollout: String,
    service: String,
    canary_version: String,
    pub(super) reason: String,
    score_ppm: u32,
    worst_tenant: Option<String>,
    /// The hash of the decision's record, if it is on record.
    hash: Option<String>,
    /// When it was recorded.
    at_ms: Option<u64>,
}

impl Notice {
    /// Tells what is on record; none if the record is not one of this verdict.
    pub(super) fn of_record(appended: &Appended, step: &Step) -> Option<Self> {
        let Body::Decision(decision) = &appended.record.body else {
            return None;
        };
        (decision.finding.verdict == step.verdict.as_str()).then(|| Self {
            decision: step.decision.clone(),
            verdict: step.verdict,
            key: step.decision.clone(),
            rollout: decision.rollout.clone(),
            service: decision.service.clone(),
            canary_version: decision.canary_version.clone(),
            reason: decision.finding.reason.clone(),
            score_ppm: decision.finding.score_ppm,
            worst_tenant: decision.finding.worst_tenant.clone(),
            hash: Some(appended.hash.to_string()),
            at_ms: Some(appended.record.time_ms),
        })
    }

    /// Tells what is shown, for a decision that is not on record.
    pub(super) fn of_view(view: &View, start: &RolloutStart, step: &Step) -> Self {
        Self {
            decision: step.decision.clone(),
            verdict: step.verdict,
            key: step.decision.clone(),
            rollout: start.rollout.clone(),
            service: start.service.clone(),
            canary_version: start.canary_version.clone(),
            reason: view.reason.clone(),
            score_ppm: view.score_ppm,
            worst_tenant: view.worst_tenant.clone(),
            hash: None,
            at_ms: None,
        }
    }

    /// The same of a person's decision, which is on record.
    pub(super) fn of_person(self, change: &Override, appended: &Appended) -> Self {
        Self {
            reason: format!("{} has decided: {}", change.actor, change.reason),
            hash: Some(appended.hash.to_string()),
            at_ms: Some(appended.record.time_ms),
            ..self
        }
    }

    /// One sentence for a record.
    pub(super) fn summary(&self) -> String {
        cut(&format!("{}: {}", self.verdict, self.reason))
    }

    /// The message of an Event. What was done comes first, if anything, then the numbers; a long reason is cut.
    pub(super) fn message(&self, done: &str) -> String {
        let worst = self.worst_tenant.as_ref();
        let worst = worst.map_or_else(String::new, |tenant| format!(", worst tenant {tenant}"));
        let score = f64::from(self.score_ppm) / 1e6;
        let done = if done.is_empty() {
            String::new()
        } else {
            format!(": {done}")
        };
        cut(&format!(
            "{}{done}; score {score:.3}{worst}; decision {}; {}",
            self.verdict, self.decision, self.reason
        ))
    }

    /// The body of a webhook.
    pub(super) fn body(&self) -> String {
        json!({
            "decision": self.decision,
            "rollout": self.rollout,
            "service": self.service,
            "canary_version": self.canary_version,
            "verdict": self.verdict.as_str(),
            "reason": self.reason,
            "score": f64::from(self.score_ppm) / 1e6,
            "score_ppm": self.score_ppm,
            "worst_tenant": self.worst_tenant,
            "hash": self.hash,
            "at": self.at_ms.map(clock::rfc3339),
        })
        .to_string()
    }
}

/// Cuts a text at a character, so that a record or an Event takes it.
pub(super) fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::effects) fn notice(decision: &str, verdict: Verdict) -> Notice {
        Notice {
            decision: decision.to_owned(),
            verdict,
            key: decision.to_owned(),
            rollout: "checkout-v2-1".to_owned(),
            service: "checkout".to_owned(),
            canary_version: "v2".to_owned(),
            reason: "acme fails".to_owned(),
            score_ppm: 412_345,
            worst_tenant: Some("acme".to_owned()),
            hash: Some("ab".repeat(32)),
            at_ms: Some(1_700_000_000_123),
        }
    }

    #[test]
    fn the_body_has_what_a_receiver_needs() {
        let body: serde_json::Value = serde_json::from_str(&notice("r-7", Verdict::Rollback).body()).unwrap();
        let expected = json!({
            "decision": "r-7", "rollout": "checkout-v2-1", "service": "checkout", "canary_version": "v2",
            "verdict": "ROLLBACK", "reason": "acme fails", "score": 0.412_345, "score_ppm": 412_345,
            "worst_tenant": "acme", "hash": "ab".repeat(32), "at": "2023-11-14T22:13:20Z",
        });
        assert_eq!(body, expected);
        let unrecorded = Notice {
            hash: None,
            at_ms: None,
            ..notice("r-7", Verdict::Rollback)
        };
        let body: serde_json::Value = serde_json::from_str(&unrecorded.body()).unwrap();
        assert!(body["hash"].is_null() && body["at"].is_null(), "{body}");
    }

    #[test]
    fn an_event_says_what_was_done_and_is_bounded() {
        let mut notice = notice("r-7", Verdict::Rollback);
        assert_eq!(
            notice.message("aborted"),
            "ROLLBACK: aborted; score 0.412, worst tenant acme; decision r-7; acme fails"
        );
        notice.reason = "é".repeat(2_000);
        let message = notice.message("aborted");
        assert!(
            message.len() <= MAX_TEXT_BYTES && message.ends_with('é'),
            "{message}"
        );
    }
}
