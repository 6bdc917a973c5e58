//! What verdicts do outside: halts in a cluster and a webhook. Each is opt-in, and each is on record before and after.
//!
//! For every open rollout a task watches what is shown of it. When the verdict changes, each target gets one act:
//!
//! ```text
//!              HOLD                  APPROVE                ROLLBACK
//! argo         an Event              an Event               the Rollout is aborted, and an Event
//! flagger      an Event              an Event               an Event (Flagger asks its gates by itself)
//! deployment   paused                goes on, if we had     the former template is put back
//!                                    paused it
//! webhook      posted                posted                 posted
//! ```
//!
//! The order is: `begun` on record, the act, `done` or `failed` on record. An act that is on record as begun and not as done
//! is looked up at its target: an annotation with the decision there, and an Idempotency-Key at the webhook, make the second
//! try of an act nothing but a look. So a decision acts once, wherever the process ends in between.
//!
//! A HOLD that goes on is told again on a Rollout and a Canary: when a person's HOLD begins or ends, at most each ten minutes
//! when its reason has changed, and before the API server forgets the Event. That changes nothing but what people read, so it
//! is no act: the decision has acted once, and no record is made of an Event more.
//!
//! When a rollout ends, the pause that it has left on a Deployment is lifted (`release`), since nobody else would, unless
//! the version on trial is there still and was never approved.
//!
//! What fails is tried again for as long as the verdict stays, and each failure is recorded once. The log keeps a ROLLBACK or
//! HOLD from acting for four seconds at most (two to read the decision,
//! two to record the beginning); an APPROVE and a release act only when their beginning is on record and the
//! log takes records.
//!
//! Read in this order: `plan` (what follows, pure), `follow` (the task), `journal` (the records), `notice` (what is told),
//! then the targets.

use std::{collections::BTreeSet, fmt, path::PathBuf, sync::Arc};

use coalmine_judge::record::{Actuation, RolloutStart, Workload};
use tokio::sync::watch;

mod plan;

mod follow;

mod journal;

mod notice;

mod cluster;

mod event;

mod argo;

mod flagger;

mod deployment;

mod webhook;

#[cfg(test)]
mod tests;

pub use self::plan::Halt;
pub(crate) use self::webhook::Webhook;
use self::{
    follow::Follower,
    notice::Notice,
    plan::{Again, Problem, Target},
};
use crate::{
    ledger::Ledger,
    metrics::Metrics,
    rollouts::{State, View},
};

/// So often an act is tried again at once when somebody else has changed the object meanwhile: the controller of a
/// workload that rolls writes to it all the time.
const MAX_CONFLICTS: usize = 5;

/// What verdicts act on.
#[derive(Clone)]
pub struct Effects(Arc<Inner>);

struct Inner {
    /// What is halted in the cluster.
    halts: BTreeSet<Halt>,
    cluster: Option<kube::Client>,
    webhook: Option<Webhook>,
    ledger: Ledger,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for Effects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Effects")
            .field("halts", &self.0.halts)
            .field("webhook", &self.0.webhook)
            .finish_non_exhaustive()
    }
}

/// What an act in the cluster is about.
struct Order<'o> {
    workload: &'o Workload,
    canary_version: &'o str,
    notice: &'o Notice,
    /// Whether it was begun before this process was.
    is_resumed: bool,
}

/// What verdicts do outside; nothing by default.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Halts")]
#[group(id = "effects")]
pub struct Settings {
    /// What is told and halted in the cluster, of the rollouts that name their workload; repeat it for several
    #[arg(long, env = "COALMINE_HALT", value_name = "WHAT", value_delimiter = ',')]
    pub halt: Vec<Halt>,
    /// Where each change of a verdict is posted, as in https://deploys.example.com/hooks/coalmine
    #[arg(
        long,
        env = "COALMINE_HALT_WEBHOOK",
        value_name = "URL",
        hide_env_values = true,
        requires = "halt_webhook_key"
    )]
    pub halt_webhook: Option<String>,
    /// The key that signs what is posted; each byte of the file counts
    #[arg(
        long,
        env = "COALMINE_HALT_WEBHOOK_KEY",
        value_name = "FILE",
        requires = "halt_webhook"
    )]
    pub halt_webhook_key: Option<PathBuf>,
}

impl Settings {
    /// The webhook, if there is one.
    pub(crate) fn webhook(&self) -> Result<Option<Webhook>, String> {
        let webhook = self.halt_webhook.as_ref().zip(self.halt_webhook_key.as_ref());
        webhook.map(|(url, key)| Webhook::open(url, key)).transpose()
    }
}

impl Order<'_> {
    /// What is said of an act that was done before.
    fn found(&self) -> String {
        let found = if self.is_resumed {
            "found done after a restart"
        } else {
            "found done"
        };
        found.to_owned()
    }

    /// Says that the workload has another version than the canary's.
    fn replaced(&self, version: &str) -> String {
        format!(
            "its template carries version {version} and not {} any more",
            self.canary_version
        )
    }
}

/// Tries again at once, but not for ever, what has failed only because somebody else has changed the object meanwhile.
async fn despite_conflicts<F>(mut act: impl FnMut() -> F) -> Result<String, Problem>
where
    F: Future<Output = Result<String, Problem>>,
{
    for _ in 0..MAX_CONFLICTS {
        match act().await {
            Err(problem) if problem.again == Again::AtOnce => {}
            result => return result,
        }
    }
    act().await
}

/// Whether the log has a HOLD that may have left a pause, which the end of its rollout has to look at. Only a Deployment
/// is paused.
fn is_held(records: &[Actuation]) -> bool {
    let is_paused = |record: &&Actuation| record.target.starts_with("Deployment ");
    plan::held(records.iter().filter(is_paused)).is_some()
}

/// Whether the log has an act that was begun and neither done nor given up.
pub(crate) fn is_unfinished(actuations: &[Actuation]) -> bool {
    let same =
        |a: &Actuation, b: &Actuation| (&a.target, &a.decision, &a.act) == (&b.target, &b.decision, &b.act);
    let unfinished = actuations.iter().enumerate().any(|(place, begun)| {
        let mut later = actuations.iter().skip(place + 1);
        begun.stage == plan::Stage::Begun.as_str() && !later.any(|it| same(it, begun))
    });
    unfinished || is_held(actuations)
}

impl Effects {
    /// Effects on these targets; none in a cluster without a client of it.
    pub(crate) fn new(
        halts: BTreeSet<Halt>,
        cluster: Option<kube::Client>,
        webhook: Option<Webhook>,
        ledger: Ledger,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self(Arc::new(Inner {
            halts: if cluster.is_some() { halts } else { BTreeSet::new() },
            cluster,
            webhook,
            ledger,
            metrics,
        }))
    }

    /// Acts on what is shown of an open rollout, until it is ended. `done` is what the log has about it, in order.
    pub(crate) async fn follow(
        self,
        start: RolloutStart,
        view: watch::Receiver<Arc<View>>,
        done: Vec<Actuation>,
    ) {
        let start = Arc::new(start);
        let targets = plan::targets(&self.0.halts, self.0.webhook.is_some(), start.workload.as_ref());
        // Of a rollout that was over when this process began, only what is open is taken to its end.
        let is_over = view.borrow().state == State::Ended;
        // A target that does not answer keeps no other one waiting.
        let followers = targets.into_iter().filter_map(|target| {
            let name = target.name(start.workload.as_ref());
            let records: Vec<_> = done.iter().filter(|it| it.target == name).cloned().collect();
            let is_due = !is_over || is_unfinished(&records);
            let (effects, start, view) = (self.clone(), Arc::clone(&start), view.clone());
            is_due.then(|| Follower::new(effects, target, start, view, records).run())
        });
        futures_util::future::join_all(followers).await;
    }

    fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Acts once. Says what was done.
    async fn act(
        &self,
        target: Target,
        order: Option<&Order<'_>>,
        notice: &Notice,
    ) -> Result<String, Problem> {
        despite_conflicts(move || self.try_to_act(target, order, notice)).await
    }

    /// Lifts the pause that a rollout has left on its Deployment. Says what was done.
    async fn release(
        &self,
        order: &Order<'_>,
        holds: &BTreeSet<&str>,
        was_approved: bool,
    ) -> Result<String, Problem> {
        let Some(client) = &self.0.cluster else {
            return Err(Problem::new("there is no cluster", Again::Never));
        };
        despite_conflicts(move || deployment::release(client, order, holds, was_approved)).await
    }

    /// Tells a HOLD again, where it is only told.
    async fn tell_again(&self, target: Target, order: &Order<'_>) -> Result<(), Problem> {
        match (target, &self.0.cluster) {
            (Target::Argo, Some(client)) => event::tell_only(client, &cluster::ROLLOUT, order).await,
            (Target::Flagger, Some(client)) => event::tell_only(client, &cluster::CANARY, order).await,
            _ => Err(Problem::new("it is not configured", Again::Never)),
        }
    }

    async fn try_to_act(
        &self,
        target: Target,
        order: Option<&Order<'_>>,
        notice: &Notice,
    ) -> Result<String, Problem> {
        match (target, &self.0.webhook, self.0.cluster.as_ref().zip(order)) {
            (Target::Webhook, Some(webhook), _) => webhook.post(notice).await,
            (Target::Argo, _, Some((client, order))) => argo::act(client, order).await,
            (Target::Flagger, _, Some((client, order))) => flagger::act(client, order).await,
            (Target::Deployment, _, Some((client, order))) => deployment::act(client, order).await,
            // A target is only one where there is what it takes.
            _ => Err(Problem::new("it is not configured", Again::Never)),
        }
    }
}
