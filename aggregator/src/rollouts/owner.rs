//! The task that owns a rollout.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use coalmine_judge::{
    evidence::Window,
    manifest::Snapshot,
    record::{Body, Bootstrap, Decision, HoldDeadline, Override, RolloutEnd},
    replay::Judged,
    v1::{Outcome, Verdict},
};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    RolloutError, Shared, comparison, execution,
    overriding::{Changed, Overriding},
    view::{State, View},
};
use crate::{
    book::{Comparison, locked},
    clock,
    ledger::{AppendError, Appended, Blob},
};

/// How often a slot's deadline is looked at when nothing else happens.
const TICK: Duration = Duration::from_millis(100);

/// How long a decision waits for the log before it is shown without.
const RECORD_WITHIN: Duration = Duration::from_secs(2);

/// Decisions that may wait for a log that cannot be written; then judging pauses.
const MAX_PENDING: usize = 1_000;

/// Where the answer to a command goes.
pub(super) type Reply = oneshot::Sender<Result<(), RolloutError>>;

/// What a person or a tool asks of a rollout.
#[derive(Debug)]
pub(super) enum Command {
    End {
        actor: String,
        reason: String,
        reply: Reply,
    },
    Override {
        verdict: Option<Verdict>,
        actor: String,
        reason: String,
        reply: Reply,
    },
    Bootstrap {
        agents: u64,
        hook: String,
        reply: Reply,
    },
}

/// What can happen to a rollout.
enum Event {
    /// A slot is complete, or late enough.
    Slot,
    /// The log may have answered, or may be tried again.
    Record,
    /// Somebody asks for something.
    Command(Command),
    /// Nobody can ask any more: the server stops.
    Closed,
}

/// A record on its way into the log.
#[derive(Debug)]
struct Pending {
    entry: Entry,
    blobs: Vec<Blob>,
    /// The log's answer, while it is awaited.
    answer: Option<oneshot::Receiver<Result<Appended, AppendError>>>,
    /// Whether it took effect while the answer was awaited.
    shown: bool,
}

impl Pending {
    /// What somebody's decision says, if it is one and has taken effect; nothing, if it has not.
    fn says(&self) -> Option<&str> {
        match &self.entry {
            Entry::Override(change) => Some(
                change
                    .verdict
                    .as_deref()
                    .filter(|_| self.shown)
                    .unwrap_or_default(),
            ),
            _ => None,
        }
    }

    fn new(entry: Entry, blobs: Vec<Blob>) -> Self {
        Self {
            entry,
            blobs,
            answer: None,
            shown: false,
        }
    }
}

/// What is recorded of a window.
#[derive(Debug, Clone)]
enum Entry {
    /// What was decided.
    Decision(Box<Decision>),
    /// That a HOLD has lasted as long as it may.
    Deadline(HoldDeadline),
    /// What somebody decided in the judge's place.
    Override(Override),
    /// That the canary may get its first traffic.
    Bootstrap(Bootstrap),
    /// That a decision, by name, took effect before it was on record.
    Late(String, String),
}

impl Entry {
    /// Whether it is somebody's decision, or a canary's first traffic, of this name.
    fn names(&self, wanted: &str) -> bool {
        matches!(self, Self::Override(Override { id, .. }) | Self::Bootstrap(Bootstrap { id, .. }) if id == wanted)
    }

    const fn is_override(&self) -> bool {
        matches!(self, Self::Override(_))
    }

    fn body(&self) -> Body {
        match self {
            Self::Decision(decision) => Body::Decision(decision.clone()),
            Self::Deadline(deadline) => Body::Deadline(deadline.clone()),
            Self::Override(change) => Body::Override(change.clone()),
            Self::Bootstrap(bootstrap) => Body::Bootstrap(bootstrap.clone()),
            Self::Late(rollout, decision) => Body::LateRecord {
                rollout: rollout.clone(),
                decision: decision.clone(),
            },
        }
    }
}

/// The evidence of a window as a blob.
fn pack(window: &Window) -> Result<Blob, AppendError> {
    let line = window.to_json();
    // What could not be read back must not be written.
    Window::from_json(&line).map_err(|error| AppendError::Refused(format!("the evidence: {error}")))?;
    Blob::pack(line.as_bytes())
}

/// A rollout and its state.
#[derive(Debug)]
pub(super) struct Owner {
    judged: Judged,
    comparison: Comparison,
    /// What is shown if nobody has decided in the judge's place.
    view: View,
    overriding: Overriding,
    shared: Shared,
    /// Records that are not in the log yet, in order.
    pending: VecDeque<Pending>,
    /// Why nothing could be recorded, if that was said.
    told: Option<String>,
    /// The override that was recorded last.
    last_recorded: Option<String>,
    broken: bool,
}

impl Owner {
    pub(super) fn new(judged: Judged, view: View, overriding: Overriding, shared: Shared) -> Self {
        let owner = Self {
            comparison: comparison(&judged.start),
            judged,
            view,
            overriding,
            shared,
            pending: VecDeque::new(),
            told: None,
            last_recorded: None,
            broken: false,
        };
        if let Some(outcome) = &owner.judged.outcome {
            owner.show_metrics(outcome, None);
        }
        owner
    }

    fn show_metrics(&self, outcome: &Outcome, before: Option<&Outcome>) {
        let View {
            service, id, verdict, ..
        } = &self.trusted();
        self.shared.metrics.decided(service, id, verdict, outcome, before);
    }

    /// Shows the verdict after something else than a window has changed it.
    fn show_verdict(&self) {
        if self.view.state != State::Ended && self.judged.outcome.is_some() {
            let view = self.trusted();
            self.shared
                .metrics
                .shown(&view.service, &view.id, view.standing());
        }
    }

    fn trusted(&self) -> View {
        let mut view = self.overriding.shown(&self.view);
        if let Some(why) = self.shared.ledger.trouble() {
            view.hold_back(&why);
        }
        view
    }

    pub(super) fn view(&self) -> Arc<View> {
        Arc::new(self.overriding.shown(&self.view))
    }

    /// The number of the window that comes next.
    pub(super) fn next_window(&self) -> u64 {
        self.judged.judge.last_window().unwrap_or(0) + 1
    }

    fn next_slot_ms(&self) -> u64 {
        self.judged.start.start_ms + (self.next_window() - 1) * self.judged.start.window_ms
    }

    pub(super) async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Command>,
        publish: Arc<watch::Sender<Arc<View>>>,
    ) {
        loop {
            let event = self.select(&mut inbox).await;
            match event {
                Event::Slot => self.judge_slot().await,
                Event::Record => self.record().await,
                Event::Command(command) => {
                    let (result, reply) = self.obey(command).await;
                    publish.send_replace(self.view());
                    self.show_verdict();
                    // The caller may have gone away.
                    drop(reply.send(result));
                    if self.view.state == State::Ended {
                        return;
                    }
                }
                Event::Closed => return,
            }
            publish.send_replace(self.view());
        }
    }

    async fn obey(&mut self, command: Command) -> (Result<(), RolloutError>, Reply) {
        match command {
            Command::End { actor, reason, reply } => (self.end(actor, reason).await, reply),
            Command::Override {
                verdict,
                actor,
                reason,
                reply,
            } => (self.decide_otherwise(verdict, actor, reason).await, reply),
            Command::Bootstrap { agents, hook, reply } => (self.bootstrap(agents, hook).await, reply),
        }
    }

    /// Puts somebody's decision in the place of the judge's. A HOLD and a ROLLBACK take effect also while the log cannot be
    /// written.
    async fn decide_otherwise(
        &mut self,
        verdict: Option<Verdict>,
        actor: String,
        reason: String,
    ) -> Result<(), RolloutError> {
        let acts_without = verdict.filter(|verdict| *verdict != Verdict::Approve);
        let queued = self.pending.iter().rev().find_map(Pending::says);
        if acts_without.is_some_and(|verdict| queued == Some(verdict.as_str())) {
            // Said again while the log does not take it: once is enough.
            return Ok(());
        }
        let start = &self.judged.start;
        let change = Override {
            id: self.overriding.name(&start.rollout),
            rollout: start.rollout.clone(),
            verdict: verdict.map(|verdict| verdict.as_str().to_owned()),
            judged: self.view.verdict.clone(),
            decision: self.view.decision_id.clone(),
            actor,
            reason,
        };
        let id = change.id.clone();
        self.pending
            .push_back(Pending::new(Entry::Override(change.clone()), Vec::new()));
        self.record().await;
        if self.last_recorded.as_deref() == Some(&id) {
            return Ok(());
        }
        if acts_without.is_some() {
            self.overriding.take(Changed::now(&change, None));
            for pending in &mut self.pending {
                pending.shown |= pending.entry.names(&id);
            }
            return Ok(());
        }
        Err(self.not_recorded(&id))
    }

    /// Records that the canary may get its first traffic.
    async fn bootstrap(&mut self, agents: u64, hook: String) -> Result<(), RolloutError> {
        if self.view.bootstrapped {
            return Ok(());
        }
        let rollout = &self.judged.start.rollout;
        let bootstrap = Bootstrap {
            id: format!("{rollout}-bootstrap"),
            rollout: rollout.clone(),
            agents,
            hook,
        };
        let id = bootstrap.id.clone();
        if !self.waits_for(&id) {
            self.pending
                .push_back(Pending::new(Entry::Bootstrap(bootstrap), Vec::new()));
        }
        self.record().await;
        if self.view.bootstrapped {
            return Ok(());
        }
        Err(self.not_recorded(&id))
    }

    fn waits_for(&self, id: &str) -> bool {
        self.pending.iter().any(|pending| pending.entry.names(id))
    }

    /// Lets go of what has not taken effect, unless it is on its way.
    fn not_recorded(&mut self, id: &str) -> RolloutError {
        self.pending
            .retain(|pending| pending.answer.is_some() || !pending.entry.names(id));
        let why = self.told.as_deref().unwrap_or("the decision log does not answer");
        let may_be = if self.waits_for(id) {
            "it takes effect once it is recorded"
        } else {
            "ask again"
        };
        AppendError::Disk(format!("{why}; {may_be}")).into()
    }

    /// Waits for the next thing to do.
    async fn select(&self, inbox: &mut mpsc::Receiver<Command>) -> Event {
        let judging = self.view.state != State::Halted && !self.broken && self.pending.len() < MAX_PENDING;
        // Whoever asks does not wait until all slots are judged, each of which may have to wait for the log.
        if let Ok(command) = inbox.try_recv() {
            return Event::Command(command);
        }
        let tick = tokio::time::sleep(TICK);
        tokio::pin!(tick);
        loop {
            let news = self.shared.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if judging && self.is_ready() {
                return Event::Slot;
            }
            tokio::select! {
                command = inbox.recv() => return command.map_or(Event::Closed, Event::Command),
                () = &mut news => {}
                () = &mut tick => {
                    if !self.pending.is_empty() {
                        return Event::Record;
                    }
                    tick.as_mut().reset(tokio::time::Instant::now() + TICK);
                }
            }
        }
    }

    fn is_ready(&self) -> bool {
        locked(&self.shared.book).is_ready(&self.comparison, self.next_slot_ms(), clock::now_ms())
    }

    /// Judges the next slot, records the decision and shows it.
    async fn judge_slot(&mut self) {
        let begun = Instant::now();
        let before = self.judged.outcome.take();
        // With very many tenants this takes a while, which must not keep others from being served.
        if let Err(problem) = tokio::task::block_in_place(|| self.judge_next()) {
            self.judged.outcome = before;
            return self.fail(&problem);
        }
        self.record().await;
        if let Some(outcome) = &self.judged.outcome {
            self.show_metrics(outcome, before.as_ref());
        }
        self.shared
            .metrics
            .decision_seconds
            .observe(begun.elapsed().as_secs_f64());
    }

    /// Freezes the next slot, judges it, and puts the decision in line for the log.
    fn judge_next(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        let (window, contexts) = {
            let now_ms = clock::now_ms();
            let (slot_ms, number) = (self.next_slot_ms(), self.next_window());
            let mut book = locked(&self.shared.book);
            let window = book.freeze(&self.comparison, slot_ms, number, now_ms);
            (window, book.contexts(&self.comparison, now_ms))
        };
        let frozen = begun.elapsed();
        let refused = |error: AppendError| error.to_string();
        let mut blobs = Vec::new();
        if self.judged.manifest.wants_snapshot() {
            let state = Blob::pack(&self.judged.judge.save()).map_err(refused)?;
            self.judged.manifest.rest_on(Snapshot {
                window: self.next_window() - 1,
                state: state.digest,
            });
            blobs.push(state);
        }
        let judging = Instant::now();
        let outcome = self
            .judged
            .judge
            .step(&window)
            .map_err(|error| error.to_string())?;
        let judged = judging.elapsed();
        let evidence = pack(&window).map_err(refused)?;
        self.judged.manifest.windows.push(evidence.digest);
        let manifest = Blob::pack(self.judged.manifest.to_json().as_bytes()).map_err(refused)?;
        let connectivity = execution::connectivity(&window, &contexts);
        let times = (frozen, judged);
        let blobs_of = (&evidence, &manifest);
        let decision = execution::decision(&self.judged, &window, &outcome, blobs_of, connectivity, times);
        blobs.extend([evidence, manifest]);
        self.pending
            .push_back(Pending::new(Entry::Decision(Box::new(decision)), blobs));
        self.judged.outcome = Some(outcome);
        self.overriding.judged();
        self.tell_deadline();
        Ok(())
    }

    /// Puts the record of a hold deadline in line, if the last window reached it.
    pub(super) fn tell_deadline(&mut self) {
        if let Some(deadline) = self.judged.hold_deadline() {
            self.view.hold_expired = deadline.verdict == Verdict::Hold.as_str();
            self.pending
                .push_back(Pending::new(Entry::Deadline(deadline), Vec::new()));
        }
    }

    /// Writes what is pending, in order, and shows the newest decision as recorded or not. Waits for the log only
    /// for a while: HOLD and ROLLBACK take effect without it, APPROVE does not.
    async fn record(&mut self) {
        while let Some(pending) = self.pending.front_mut() {
            let ledger = &self.shared.ledger;
            let answer = pending
                .answer
                .get_or_insert_with(|| ledger.submit(pending.entry.body(), pending.blobs.clone()));
            let answer = match tokio::time::timeout(RECORD_WITHIN, answer).await {
                Ok(answer) => answer.unwrap_or(Err(AppendError::Closed)),
                // Still on its way: what was submitted is not submitted again.
                Err(_) => return self.unrecorded("the decision log does not answer", true),
            };
            pending.answer = None;
            match answer {
                Ok(appended) => self.recorded(&appended.hash.to_string()),
                Err(error @ AppendError::Untrusted(_)) => {
                    // It will never be recorded, so nothing of it is kept.
                    self.unrecorded(&error.to_string(), false);
                    self.pending.clear();
                    return;
                }
                Err(error) => return self.unrecorded(&error.to_string(), true),
            }
        }
    }

    fn recorded(&mut self, hash: &str) {
        self.told = None;
        let Some(Pending { entry, shown, .. }) = self.pending.pop_front() else {
            return;
        };
        match entry {
            Entry::Late(..) => {}
            Entry::Override(change) => {
                if shown {
                    let late = Entry::Late(change.rollout.clone(), change.id.clone());
                    self.pending.push_front(Pending::new(late, Vec::new()));
                }
                tracing::warn!(
                    rollout = change.rollout,
                    decision = change.id,
                    verdict = change.verdict.as_deref().unwrap_or("the judge's"),
                    judged = change.judged,
                    actor = change.actor,
                    reason = change.reason,
                    "somebody has decided in the judge's place"
                );
                let is_newer_shown = |pending: &Pending| pending.shown && pending.entry.is_override();
                if !self.pending.iter().any(is_newer_shown) {
                    self.overriding.take(Changed::now(&change, Some(hash.to_owned())));
                }
                self.last_recorded = Some(change.id);
            }
            Entry::Bootstrap(bootstrap) => {
                tracing::info!(
                    rollout = bootstrap.rollout,
                    agents = bootstrap.agents,
                    hook = bootstrap.hook,
                    "the canary may get its first traffic"
                );
                self.view.bootstrapped = true;
            }
            Entry::Deadline(deadline) => tracing::info!(
                rollout = deadline.rollout,
                held_ms = deadline.held_ms,
                on_deadline = deadline.on_deadline,
                verdict = deadline.verdict,
                "hold deadline recorded"
            ),
            Entry::Decision(decision) => {
                // In the order of the log: what was given back before it is settled.
                self.overriding.judged();
                if shown && !decision.late {
                    let late = Entry::Late(decision.rollout.clone(), decision.id.clone());
                    self.pending.push_front(Pending::new(late, Vec::new()));
                }
                tracing::info!(
                    rollout = decision.rollout,
                    window = decision.finding.window,
                    verdict = decision.finding.verdict,
                    score_ppm = decision.finding.score_ppm,
                    reason = decision.finding.reason,
                    "decision recorded"
                );
                self.view.recorded_decision(&decision, hash);
            }
        }
    }

    /// Shows the newest decision although the log does not have it. Its windows are kept if it may still be recorded.
    fn unrecorded(&mut self, error: &str, may_be_recorded: bool) {
        if self.told.as_deref() != Some(error) {
            tracing::error!(
                rollout = self.judged.start.rollout,
                pending = self.pending.len(),
                error,
                "decision not recorded yet"
            );
            self.told = Some(error.to_owned());
        }
        let start = &self.judged.start;
        let (mut newest, mut slot_ms) = (None, None);
        for pending in &mut self.pending {
            if let Entry::Decision(decision) = &mut pending.entry {
                // An approval that is held back has no effect, so it is not recorded late.
                let late = decision.finding.verdict != Verdict::Approve.as_str();
                if pending.answer.is_none() {
                    decision.late = late;
                } else {
                    pending.shown |= late;
                }
                let passed = decision.finding.window.saturating_sub(1) * start.window_ms;
                slot_ms.get_or_insert(start.start_ms + passed);
                newest = Some(&*decision);
            }
        }
        // A deadline's record alone changes nothing that is shown.
        if let Some(decision) = newest {
            self.view.decision(decision);
            self.view.unrecorded(error, slot_ms.filter(|_| may_be_recorded));
        }
    }

    fn fail(&mut self, problem: &str) {
        tracing::error!(
            rollout = self.judged.start.rollout,
            problem,
            "rollout cannot be judged"
        );
        self.broken = true;
        self.view.broken(problem);
    }

    async fn end(&mut self, actor: String, reason: String) -> Result<(), RolloutError> {
        self.record().await;
        if !self.pending.is_empty() {
            let problem = format!(
                "{} decisions are not in the log yet; try again",
                self.pending.len()
            );
            return Err(AppendError::Disk(problem).into());
        }
        let end = RolloutEnd {
            rollout: self.judged.start.rollout.clone(),
            actor,
            reason,
            verdict: self.view().verdict.clone(),
        };
        self.shared
            .ledger
            .append(Body::End(end.clone()), Vec::new())
            .await?;
        self.view.end(&end);
        self.shared.metrics.ended(
            &self.judged.start.service,
            &self.judged.start.rollout,
            self.judged.outcome.as_ref(),
        );
        tracing::info!(
            rollout = end.rollout,
            actor = end.actor,
            reason = end.reason,
            "rollout ended"
        );
        Ok(())
    }
}
