//! What can still be done with a rollout that cannot be judged any more, and so has no owner.

use std::time::Duration;

use coalmine_judge::{
    record::{Body, Override, RolloutEnd},
    v1::Verdict,
};

use tokio::sync::oneshot;

use super::{
    RolloutError, Rollouts,
    kept::Handle,
    overriding::{Changed, override_id},
};
use crate::{
    clock,
    ledger::{AppendError, Appended},
};

/// How often it is tried again to record what took effect without.
const RECORD_AGAIN: Duration = Duration::from_secs(1);

/// The log's answer.
type Answer = oneshot::Receiver<Result<Appended, AppendError>>;

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
        let mut answer = self.submit(&change);
        let recorded = tokio::time::timeout(RECORD_WITHIN, &mut answer).await;
        let acts_without = matches!(verdict, Some(Verdict::Hold | Verdict::Rollback));
        let hash = match recorded {
            Ok(Ok(Ok(appended))) => Some(appended.hash.to_string()),
            Ok(Ok(Err(AppendError::Untrusted(_)))) | Ok(Err(_)) if acts_without => None,
            Ok(Ok(Err(_))) if acts_without => {
                self.record_late(handle, &change, self.submit(&change));
                None
            }
            Err(_) if acts_without => {
                self.record_late(handle, &change, answer);
                None
            }
            Ok(Ok(Err(error))) => return Err(error.into()),
            Ok(Err(_)) => return Err(AppendError::Closed.into()),
            Err(_) => {
                let why = "it does not answer; what it was asked for may still be recorded, and holds after a restart";
                return Err(AppendError::Disk(why.to_owned()).into());
            }
        };
        let changed = Changed::now(&change, hash);
        let shown = handle.change(|view| {
            let mut judges = view.judges();
            judges.approved |= view.approved || changed.approves();
            *view = judges.with(&changed);
        });
        self.0.shared.metrics.shown(&shown.service, id, shown.standing());
        Ok(())
    }

    fn submit(&self, change: &Override) -> Answer {
        let body = Body::Override(change.clone());
        self.0.shared.ledger.submit(body, Vec::new())
    }

    /// Records what took effect before it was on record, with a mark, for as long as it is in effect.
    fn record_late(&self, handle: &Handle, change: &Override, mut answer: Answer) {
        let (this, handle, change) = (self.clone(), handle.clone(), change.clone());
        tracing::error!(
            rollout = change.rollout,
            decision = change.id,
            "a person's decision is not on record yet"
        );
        self.0.runtime.spawn(async move {
            let is_shown =
                |handle: &Handle| handle.shown().decision_id.as_deref() == Some(change.id.as_str());
            let appended = loop {
                match answer.await {
                    Ok(Ok(appended)) => break appended,
                    Ok(Err(AppendError::Untrusted(_))) | Err(_) => return,
                    Ok(Err(_)) if !is_shown(&handle) => return,
                    Ok(Err(_)) => tokio::time::sleep(RECORD_AGAIN).await,
                }
                answer = this.submit(&change);
            };
            let late = Body::LateRecord {
                rollout: change.rollout.clone(),
                decision: change.id.clone(),
            };
            if let Err(error) = this.0.shared.ledger.append(late, Vec::new()).await {
                tracing::error!(rollout = change.rollout, %error, "that a decision was late is not on record");
            }
            if is_shown(&handle) {
                let changed = Changed::now(&change, Some(appended.hash.to_string()));
                handle.change(|view| *view = view.judges().with(&changed));
            }
        });
    }
}
