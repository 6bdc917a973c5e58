//! Follows one rollout for one target: acts when the verdict changes, takes what has begun to its end, and tells a HOLD that
//! goes on again.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use coalmine_judge::{
    record::{Actuation, Body, RolloutStart},
    v1::Verdict,
};
use tokio::{sync::watch, time::Instant};

use super::{
    Effects, Order,
    journal::{Journal, RECORD_WITHIN},
    notice::{Notice, cut},
    plan::{self, Again, Next, Problem, Stage, Step, Target, Told, act},
};
use crate::{
    clock,
    rollouts::{State, View},
};

/// So many different failures of one act are recorded; more say nothing new.
const MAX_FAILURES: usize = 20;

/// So often it is tried to lift a pause at the end of a rollout.
const MAX_RELEASES: u32 = 6;

/// How long to wait before it is asked again whether the log takes records.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The mark of an act that the log was too slow for.
const UNRECORDED: &str = "; done before its beginning was on record";

/// A step that is under way.
struct Trial {
    step: Step,
    notice: Notice,
    told: Told,
    /// How often it has failed.
    tries: u32,
    due: Instant,
}

/// What was told last.
struct Reminder {
    told: Told,
    at: Instant,
    /// How often it has failed to tell it again, and until when that is not tried.
    tries: u32,
    not_before: Instant,
}

impl Reminder {
    /// Was told right now.
    fn of(told: Told) -> Self {
        let at = Instant::now();
        Self {
            told,
            at,
            tries: 0,
            not_before: at,
        }
    }

    /// When it is to be told again, with `standing` as what would be told.
    fn due(&self, standing: &Told) -> Instant {
        self.not_before.max(self.at + self.told.lasts(standing))
    }
}

/// Who acts on a target.
pub(super) struct Follower {
    effects: Effects,
    target: Target,
    start: Arc<RolloutStart>,
    view: watch::Receiver<Arc<View>>,
    /// What is on record about the target, or on its way there, in order.
    records: Vec<Actuation>,
    /// How many of the records are from before this process.
    restored: usize,
    journal: Journal,
    given_up: Option<Step>,
    /// None as long as this process has told nothing.
    reminder: Option<Reminder>,
}

impl Follower {
    pub(super) fn new(
        effects: Effects,
        target: Target,
        start: Arc<RolloutStart>,
        view: watch::Receiver<Arc<View>>,
        records: Vec<Actuation>,
    ) -> Self {
        Self {
            journal: Journal::new(effects.ledger().clone()),
            restored: records.len(),
            effects,
            target,
            start,
            view,
            records,
            given_up: None,
            reminder: None,
        }
    }

    /// Runs until the rollout is ended, or nobody shows it any more.
    pub(super) async fn run(mut self) {
        let mut trial: Option<Trial> = None;
        loop {
            let view = Arc::clone(&self.view.borrow_and_update());
            trial = self.prepare(trial, &view).await;
            if view.state == State::Ended {
                // What was not tried yet still is, once.
                let is_over = |trial: &Trial| {
                    let is_barred = self.journal.is_settled() && !self.may(trial.step.verdict);
                    trial.tries > 0 || self.journal.is_distrusted() || is_barred
                };
                if trial.as_ref().is_none_or(is_over) {
                    if let Some(trial) = trial {
                        let why = "not tried again: the rollout was ended".to_owned();
                        self.record(&trial.step, Stage::Failed, why);
                    }
                    self.release(&view).await;
                    return self.journal.settle().await;
                }
            }
            let may_act = trial.as_ref().is_some_and(|trial| self.may(trial.step.verdict));
            trial = match trial {
                Some(trial) if may_act && trial.due <= Instant::now() => self.attempt(trial).await,
                trial => {
                    let due = trial.as_ref().filter(|_| may_act).map(|trial| trial.due);
                    // Nobody tells when the log takes records again.
                    let is_barred = trial.is_some() && !may_act && self.journal.is_settled();
                    let mut due = due.or_else(|| is_barred.then(|| Instant::now() + LOOK_AGAIN));
                    if trial.is_none() {
                        due = self.remind(&view).await;
                    }
                    if !self.wait(due).await {
                        return;
                    }
                    trial
                }
            };
        }
    }

    /// HOLD and ROLLBACK act without the log, APPROVE does not.
    fn may(&self, verdict: Verdict) -> bool {
        verdict != Verdict::Approve || self.is_recorded()
    }

    /// Whether all is on record, and the log goes on.
    fn is_recorded(&self) -> bool {
        self.journal.is_settled() && self.effects.ledger().trouble().is_none()
    }

    /// Lifts the pause that this rollout has left on a Deployment: nobody else would. A version goes on then, so it takes
    /// what an approval takes of the log.
    async fn release(&mut self, view: &View) {
        let (Target::Deployment, Some(step)) = (self.target, plan::held(&self.records)) else {
            return;
        };
        let notice = Notice::of_view(view, &self.start, &step);
        let why = "the rollout was ended".to_owned();
        self.put(&step.decision, plan::RELEASE, Stage::Begun, why);
        self.journal.settle().await;
        let result = self.try_to_release(&notice, view.approved).await;
        let (stage, detail) = match result {
            Ok(done) => (Stage::Done, done),
            Err(problem) => (
                Stage::Failed,
                format!("{}; if it is paused still, resume it by hand", cut(&problem.text)),
            ),
        };
        let metrics = self.effects.metrics();
        metrics.actuated(self.target.as_str(), plan::RELEASE, stage.as_str());
        tracing::warn!(
            target_kind = self.target.as_str(),
            rollout = self.start.rollout,
            decision = step.decision,
            result = stage.as_str(),
            detail,
            "a rollout was ended on a hold"
        );
        self.put(&step.decision, plan::RELEASE, stage, detail);
    }

    async fn try_to_release(&self, notice: &Notice, was_approved: bool) -> Result<String, Problem> {
        let (true, Some(workload)) = (self.is_recorded(), self.start.workload.as_ref()) else {
            return Err(Problem::new("the log takes no records", Again::Never));
        };
        let is_hold = |record: &&Actuation| record.act == act(Verdict::Hold);
        let holds = self.records.iter().filter(is_hold);
        let holds: BTreeSet<_> = holds.map(|record| record.decision.as_str()).collect();
        let order = Order {
            workload,
            canary_version: &self.start.canary_version,
            notice,
            is_resumed: false,
        };
        for tries in 1..MAX_RELEASES {
            match self.effects.release(&order, &holds, was_approved).await {
                Err(problem) if matches!(problem.again, Again::Soon | Again::AtOnce) => {
                    let pause = plan::pause(self.target, problem.again, tries);
                    tokio::time::sleep(pause.unwrap_or_default()).await;
                }
                result => return result,
            }
        }
        self.effects.release(&order, &holds, was_approved).await
    }

    /// Tells a HOLD that goes on again, if that is due. Says when it is due next.
    async fn remind(&mut self, view: &View) -> Option<Instant> {
        let step = Step::of(view).filter(|step| plan::goes_on(step, &self.records))?;
        let workload = self
            .start
            .workload
            .as_ref()
            .filter(|_| self.target.is_reminded())?;
        let standing = Told::of(&step, &view.reason, view);
        // What an earlier process has told last is not on record. It counts as told now, but for a person's HOLD: that is
        // told under its own name, and so not twice.
        let reminder = self.reminder.get_or_insert_with(|| Reminder::of(Told::default()));
        let due = reminder.due(&standing);
        if due > Instant::now() {
            return Some(due);
        }
        let mut notice = Notice::of_view(view, &self.start, &step);
        if reminder.told.order == standing.order {
            // Its own name, since the Event before may be there still.
            notice.key = format!("{}/{}", step.decision, clock::now_ms());
        }
        let order = Order {
            workload,
            canary_version: &self.start.canary_version,
            notice: &notice,
            is_resumed: false,
        };
        let mut news = self.view.clone();
        let is_news = |newer: &Arc<View>| newer.verdict != view.verdict || newer.state != view.state;
        let overtaken = async { drop(news.wait_for(is_news).await) };
        let result = tokio::select! {
            result = self.effects.tell_again(self.target, &order) => result,
            // Nothing that is to be done waits for this.
            () = overtaken => return None,
        };
        let rollout = &self.start.rollout;
        let target_kind = self.target.as_str();
        if let Err(problem) = result {
            reminder.tries = reminder.tries.saturating_add(1);
            let pause = plan::pause(self.target, problem.again, reminder.tries)?;
            if reminder.tries == 1 {
                tracing::warn!(
                    target_kind,
                    rollout,
                    problem = cut(&problem.text),
                    "cannot tell a HOLD again"
                );
            }
            reminder.not_before = Instant::now() + pause;
        } else {
            tracing::info!(
                target_kind,
                rollout,
                decision = step.decision,
                "told a HOLD again"
            );
            *reminder = Reminder::of(standing.clone());
        }
        Some(reminder.due(&standing))
    }

    /// Waits for something to do: news, the next try, or the log. False if there will be no news.
    async fn wait(&mut self, due: Option<Instant>) -> bool {
        let Self { view, journal, .. } = self;
        let is_writing = !journal.is_empty();
        let due = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = view.changed() => changed.is_ok(),
            () = due => true,
            () = journal.settle(), if is_writing => true,
        }
    }

    /// What is to be tried now: the same as before, or what follows from the newest verdict.
    async fn prepare(&mut self, trial: Option<Trial>, view: &View) -> Option<Trial> {
        let standing = Step::of(view);
        let is_ordered = view.overridden.is_some();
        let next = plan::next(standing.as_ref(), is_ordered, &self.records);
        let Next::Act { step, begun, dropped } = next else {
            // Nothing follows, and what was being tried is not to be done any more.
            if let (Some(trial), Some(standing)) = (trial, standing)
                && trial.step.verdict != standing.verdict
            {
                let why = format!("not tried again: {} says {}", standing.decision, standing.verdict);
                self.record(&trial.step, Stage::Failed, why);
            }
            return None;
        };
        if trial.as_ref().is_some_and(|trial| trial.step == step) {
            return trial;
        }
        if self.given_up.as_ref() == Some(&step) {
            return None;
        }
        if let Some(dropped) = dropped.filter(|dropped| self.given_up.as_ref() != Some(dropped)) {
            let why = format!("not tried again: {} says {}", step.decision, step.verdict);
            self.record(&dropped, Stage::Failed, why);
        }
        let mut notice = self.notice(&step, view).await;
        notice.key = plan::key(&step, &self.records);
        if !begun {
            self.record(&step, Stage::Begun, notice.summary());
            self.journal.wait().await;
        }
        Some(Trial {
            told: Told::of(&step, &notice.reason, view),
            step,
            notice,
            tries: 0,
            due: Instant::now(),
        })
    }

    /// What is told of a decision: what its record says, or what is shown if that cannot be read in time.
    async fn notice(&self, step: &Step, view: &View) -> Notice {
        let (ledger, decision) = (self.effects.ledger().clone(), step.decision.clone());
        let read = tokio::task::spawn_blocking(move || {
            let seq = ledger.index().decision(&decision)?;
            ledger.read(seq).ok().flatten()
        });
        let read = tokio::time::timeout(RECORD_WITHIN, read).await;
        let appended = read.ok().and_then(Result::ok).flatten();
        let told = appended
            .as_ref()
            .and_then(|appended| Notice::of_record(appended, step));
        told.unwrap_or_else(|| {
            let notice = Notice::of_view(view, &self.start, step);
            match appended
                .as_ref()
                .map(|appended| (&appended.record.body, appended))
            {
                Some((Body::Override(change), appended)) => notice.of_person(change, appended),
                _ => notice,
            }
        })
    }

    /// Tries once. Gives the trial back if it is to be tried again.
    async fn attempt(&mut self, trial: Trial) -> Option<Trial> {
        let is_begin = |record: &Actuation| trial.step.is_told_by(record);
        let is_resumed = self.records.iter().take(self.restored).any(is_begin);
        let order = self.start.workload.as_ref().map(|workload| Order {
            workload,
            canary_version: &self.start.canary_version,
            notice: &trial.notice,
            is_resumed,
        });
        let is_recorded = self.journal.has_begun(&trial.step);
        let result = self.effects.act(self.target, order.as_ref(), &trial.notice).await;
        let stage = if result.is_ok() {
            Stage::Done
        } else {
            Stage::Failed
        };
        let metrics = self.effects.metrics();
        metrics.actuated(self.target.as_str(), act(trial.step.verdict), stage.as_str());
        match result {
            Ok(done) => {
                let mark = if is_recorded { "" } else { UNRECORDED };
                let done = format!("{}{mark}", cut(&done));
                tracing::info!(
                    target_kind = self.target.as_str(),
                    rollout = self.start.rollout,
                    decision = trial.step.decision,
                    verdict = %trial.step.verdict,
                    done,
                    "acted on a verdict"
                );
                self.record(&trial.step, Stage::Done, done);
                self.reminder = Some(Reminder::of(trial.told));
                None
            }
            Err(problem) => self.failed(trial, problem),
        }
    }

    /// Records a failure, if it is a new one, and says when to try again.
    fn failed(&mut self, trial: Trial, problem: Problem) -> Option<Trial> {
        let tries = trial.tries.saturating_add(1);
        let pause = plan::pause(self.target, problem.again, tries);
        let text = cut(&problem.text);
        let told =
            |record: &&Actuation| record.stage == Stage::Failed.as_str() && trial.step.is_told_by(record);
        let is_told = self
            .records
            .iter()
            .filter(told)
            .any(|record| record.detail.starts_with(&text));
        if !is_told && self.records.iter().filter(told).count() < MAX_FAILURES {
            tracing::warn!(
                target_kind = self.target.as_str(),
                rollout = self.start.rollout,
                decision = trial.step.decision,
                verdict = %trial.step.verdict,
                problem = text,
                "cannot act on a verdict"
            );
            self.record(&trial.step, Stage::Failed, text);
        }
        let Some(pause) = pause else {
            tracing::error!(
                target_kind = self.target.as_str(),
                rollout = self.start.rollout,
                decision = trial.step.decision,
                tries,
                "acting on a verdict was given up"
            );
            self.given_up = Some(trial.step);
            return None;
        };
        Some(Trial {
            tries,
            due: Instant::now() + pause,
            ..trial
        })
    }

    /// Puts a record of a step in line.
    fn record(&mut self, step: &Step, stage: Stage, detail: String) {
        self.put(&step.decision, act(step.verdict), stage, detail);
    }

    /// Puts a record in line; `wait` writes it beside what is done next.
    fn put(&mut self, decision: &str, act: &str, stage: Stage, detail: String) {
        let actuation = Actuation {
            rollout: self.start.rollout.clone(),
            decision: decision.to_owned(),
            target: self.target.name(self.start.workload.as_ref()),
            act: act.to_owned(),
            stage: stage.as_str().to_owned(),
            detail,
        };
        self.records.push(actuation.clone());
        self.journal.push(actuation);
    }
}
