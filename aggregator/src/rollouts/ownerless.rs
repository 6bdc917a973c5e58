//! What can still be done with a rollout that cannot be judged any more, and so has no owner.

use std::time::Duration;

use coalmine_judge::{
    record::{Body, Override, RolloutEnd},
    v1::Verdict,
};

use super::{
    RolloutError, Rollouts,
    kept::Handle,
    overriding::{Changed, override_id},
};
use crate::{clock, ledger::AppendError};

/// How long somebody's decision waits for the log before it takes effect without.
const RECORD_WITHIN: Duration = Duration::from_secs(2);

impl Rollouts {
    /// Ends a rollout.
    pub(super) async fn end_without_owner(
        &self,
        id: &str,
        handle: &Handle,
        actor: String,
        reason: String,
    ) -> Result<(), RolloutError> {
        let _one_at_a_time = handle.changing.lock().await;
        if handle.is_ended() {
            return Ok(());
        }
        let end = RolloutEnd {
            rollout: id.to_owned(),
            actor,
            reason,
            verdict: handle.shown().verdict.clone(),
        };
        let ledger = &self.0.shared.ledger;
        ledger.append(Body::End(end.clone()), Vec::new()).await?;
        let shown = handle.change(|view| view.end(&end));
        self.0.shared.metrics.ended(&shown.service, id, None);
        Ok(())
    }

    /// Decides about it: the judge cannot.
    pub(super) async fn override_without_owner(
        &self,
        id: &str,
        handle: &Handle,
        verdict: Option<Verdict>,
        actor: String,
        reason: String,
    ) -> Result<(), RolloutError> {
        let _one_at_a_time = handle.changing.lock().await;
        if handle.is_ended() {
            return Err(RolloutError::Conflict(format!(
                "rollout {id} was ended meanwhile"
            )));
        }
        let judges = handle.shown().judges();
        let change = Override {
            id: override_id(id, clock::now_ms()),
            rollout: id.to_owned(),
            verdict: verdict.map(|verdict| verdict.as_str().to_owned()),
            judged: judges.verdict.clone(),
            decision: judges.decision_id.clone(),
            actor,
            reason,
        };
        let ledger = self.0.shared.ledger.clone();
        let recorded = ledger.append(Body::Override(change.clone()), Vec::new());
        let recorded = tokio::time::timeout(RECORD_WITHIN, recorded).await;
        let recorded = recorded.unwrap_or_else(|_| {
            let why = "it does not answer; whether this is on record shows after a restart";
            Err(AppendError::Disk(why.to_owned()))
        });
        let hash = match (recorded, verdict) {
            (Ok(appended), _) => Some(appended.hash.to_string()),
            (Err(error), Some(Verdict::Hold | Verdict::Rollback)) => {
                tracing::error!(rollout = id, decision = change.id, %error, "a person's decision is not on record");
                None
            }
            (Err(error), _) => return Err(error.into()),
        };
        let changed = Changed::now(&change, hash);
        let shown = handle.change(|view| *view = view.judges().with(&changed));
        self.0.shared.metrics.shown(&shown.service, id, shown.standing());
        Ok(())
    }
}
